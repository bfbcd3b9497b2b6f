"""Rewards based on CLIP-type and BLIP-type encoders."""
