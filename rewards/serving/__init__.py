"""Scores from elsewhere, and kept: the wire and its server, workers of a pool, a file of scores. No reward."""
