"""Recipes that follow the gradient of a reward to the pixels."""
