"""Rewards that are trained here."""
