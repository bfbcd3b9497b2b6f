"""Rewards of CLIP-type and BLIP-type encoders."""
