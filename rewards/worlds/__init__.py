"""Verifiers of the embedded worlds: media parsed into scenes and compared with captions."""
