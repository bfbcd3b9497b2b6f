"""Files of trained policies other than LoRAs, by their names in a folder. No torch."""

from __future__ import annotations

from pathlib import Path

from alignflow.paths import is_file

GATED = "gated_loras.safetensors"
"""Several LoRAs with a gate over them."""
USERS = "user_attention.safetensors"
"""Attention to the embeddings of users, and these."""
OTHERS = {GATED: "experts with a gate", USERS: "attention to users"}
"""File name -> its contents in words."""


def other_than_lora(place: Path) -> Path | None:
    """The file of a policy other than a LoRA, at a path or in the folder there; None if there is none."""
    if place.name in OTHERS:
        return place if is_file(place) else None
    return next((place / name for name in OTHERS if is_file(place / name)), None)
