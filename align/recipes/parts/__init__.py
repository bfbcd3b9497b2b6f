"""Recipes that train something other than a LoRA on the network."""
