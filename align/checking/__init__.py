"""Checks of ``alignflow check``, made before anything runs. No torch."""
