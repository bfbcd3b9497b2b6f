"""Rewards that query a vision-language model."""
