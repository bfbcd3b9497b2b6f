"""Samples and their scores: drawn from the policy or read from a table."""
