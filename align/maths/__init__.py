"""Formulas on tensors: samplers, losses, advantages, weights, pairs, statistics. Imports torch and itself only."""
