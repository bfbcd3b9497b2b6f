"""Rewards trained by this project."""
