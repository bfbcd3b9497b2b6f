"""Rewards composed of other rewards."""
