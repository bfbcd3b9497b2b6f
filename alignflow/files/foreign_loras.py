"""Layouts of LoRA files that only diffusers' converters read, told by the keys. No torch at import."""

from __future__ import annotations

import re
from pathlib import Path

from alignflow.files import tensor_files
from alignflow.files.lora_files import LoraFileError
from alignflow.files.tensor_files import TensorFileError

FOREIGN = re.compile(r".*\.processor\.(qkv|proj)_lora|.*\.diff(_b)?$|lora_te\d?_|text_encoders\.")
"""Keys of layouts that only diffusers' converters read: XLabs, changed biases and norms, kohya's text encoders."""


def foreign(path: Path) -> bool:
    """Whether a file is in a layout that diffusers' converters may read and our own reader does not.

    Raises:
        LoraFileError: not a safetensors file.
    """
    try:
        entries, _ = tensor_files.header(path)
    except TensorFileError as error:
        raise LoraFileError(f"{path} is not a whole safetensors file: {error}; copy or download it again") from None
    return any(FOREIGN.match(key) for key in entries) and not any("lokr_" in key or "hada_" in key for key in entries)
