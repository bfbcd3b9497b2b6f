"""Preferences from people: a local page that compares two samples, and the table of their votes."""
