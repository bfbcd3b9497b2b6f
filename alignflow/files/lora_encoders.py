"""Text encoders in LoRA files: which of a pipeline's encoders a layer belongs to, by the names of each layout."""

from __future__ import annotations

import re

PUBLISHED = {
    "text_encoder": ("lora_te1_", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("lora_te2_", "text_encoders.clip_g.transformer."),
}
"""Component of a pipeline whose CLIP encoder it is -> start of a layer's name in kohya's layout (sd-scripts,
``networks/lora_sd3.py`` and ``lora_flux.py``) and in ComfyUI's (``comfy/lora.py``, ``model_lora_keys_clip``)."""

_ENCODER = re.compile(r"(text_encoder(?:_\d+)?)\.")


def encoder_of(stem: str) -> str:
    """Component name of the text encoder that holds a layer of a file; "" for another network's layer."""
    if found := _ENCODER.match(stem):
        return found[1]
    return next((component for component, starts in PUBLISHED.items() if stem.startswith(starts)), "")
