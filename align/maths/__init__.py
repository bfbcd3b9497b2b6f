"""Formulas on tensors: samplers, losses, advantages, weights, pairs. Imports torch and itself only."""
