"""Held-out scores, and scores of files."""
