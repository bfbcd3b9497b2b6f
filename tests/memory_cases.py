"""Generators for the tests of memory and speed: one of every kind, and what it draws."""

from __future__ import annotations

import adapter_cases
import adapter_cases_video
import image_cases
import tiny
import torch
from adapter_cases import PROMPTS, Case

from generators.base import Generator
from generators.load import adapter

SD3 = Case("sd3", "sd3", tiny.sd3_pipeline, guidance=2.0)
SHIPPED = (SD3, *adapter_cases.CASES, *image_cases.CASES, *adapter_cases_video.CASES)
EVERY = {case.kind: case for case in SHIPPED}


def generator_of(case: Case) -> Generator:
    """The case's generator with the same weights every time."""
    return adapter(case.kind)(case.build(), case.options)


def velocity(generator: Generator, case: Case) -> torch.Tensor:
    """Guided velocities of two prompts at two times."""
    cond = generator.encode(PROMPTS, case.inputs)
    with torch.no_grad():
        return generator.velocity(generator.noise([1, 2]), torch.tensor([0.3, 0.8]), cond, case.guidance)
