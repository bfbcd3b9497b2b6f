"""Builders of the embedded worlds' weights."""
