"""Prompts, tables, pictures and clips: what is read and written."""
