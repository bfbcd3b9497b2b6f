"""Adapters, one diffusers pipeline a file."""
