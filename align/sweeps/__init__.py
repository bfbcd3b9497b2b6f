"""Sweeps: several values of some settings, a run for every combination, and a comparison at the end. No torch."""
