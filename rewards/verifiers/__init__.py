"""Rewards that measure: detectors, text readers, similarity, the verifiers of the embedded worlds."""
