"""LoRA files that diffusers' converters must read, or of which a part may be left out: recognised by their keys."""

from __future__ import annotations

import re
from pathlib import Path

from alignflow.files import tensor_files
from alignflow.files.lora_files import LoraFileError
from alignflow.files.tensor_files import TensorFileError

FOREIGN = re.compile(r".*\.processor\.(qkv|proj)_lora|.*\.diff(_b)?$|lora_te\d?_|text_encoders\.")
"""Keys that only diffusers' converters read (XLabs, changed biases and norms, T5), and those of text encoders, which
training of the network alone leaves out."""


def foreign(path: Path) -> bool:
    """Whether only loading a file can tell what is read of it: some of its keys are those of :data:`FOREIGN`.

    Raises:
        LoraFileError: not a safetensors file.
    """
    try:
        entries, _ = tensor_files.header(path)
    except TensorFileError as error:
        raise LoraFileError(f"{path} is not a whole safetensors file: {error}; copy or download it again") from None
    return any(FOREIGN.match(key) for key in entries) and not any("lokr_" in key or "hada_" in key for key in entries)
