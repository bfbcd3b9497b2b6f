"""Derivation of random seeds, such that each random number depends on its purpose alone."""

from __future__ import annotations

import hashlib


def derive(*parts: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive(run_seed, "rollout", step, sample_index)``.

    Equal parts give equal seeds on every machine and process; different parts give unrelated ones.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def whole(low: int, high: int, *parts: int | str) -> int:
    """A whole number, uniform in [low, high], for one purpose."""
    return low + derive(*parts) % (high - low + 1)
