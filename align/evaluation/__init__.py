"""Evaluation on held-out prompts, and scoring of files."""
