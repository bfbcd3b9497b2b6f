"""Adapters, one diffusers pipeline per file."""
