"""Embedded worlds: captioned scenes, a renderer, a parser and small weights, defined without torch."""
