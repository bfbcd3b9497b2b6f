"""Rewards that measure: detectors, readers, similarity, the verifiers of the embedded worlds."""
