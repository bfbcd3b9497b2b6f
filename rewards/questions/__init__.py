"""Rewards that put questions to a vision-language model."""
