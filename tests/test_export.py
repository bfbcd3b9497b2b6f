"""Exports read back as what was trained, in every family's layout, or are refused and leave nothing."""

from __future__ import annotations

import inspect
import json

import pytest
import tiny_hunyuan
import tiny_video
import torch
from adapter_cases import CASES, Case, moved
from adapter_cases_video import CASES as CLIPS
from diffusers import DiffusionPipeline
from diffusers.loaders import lora_conversion_utils, lora_pipeline, single_file_utils
from image_cases import CASES as PICTURES
from safetensors.torch import load_file, save_file

from align.errors import CheckpointError, RunFolderError
from align.export import check, export
from align.export.layouts import SD3, ExportError, comfyui, fuse, kohya, published
from align.lora import FILE, LoraError, add_lora, save_lora
from align.policy import find_policy, load_policy
from generators.load import adapter

EVERY = {case.name: case for case in (*CASES, *CLIPS, *PICTURES)}
SD3_CASE = next(case for case in EVERY.values() if case.kind == "sd3") if any(
    case.kind == "sd3" for case in EVERY.values()
) else None
print(sorted((c.kind, c.name) for c in EVERY.values()))
