"""The measurement of a full-size step: what it samples, how it names phases, and what the estimate counts."""

from __future__ import annotations

import time

import torch

from align.checking.architectures import KNOWN, stored_buffers
from align.checking.estimate import Estimate, Item
from benchmarks import full_size
from benchmarks.helpers import random_weights

MB = 2**20


def draw() -> torch.Tensor:
    """64 MB that live for a fifth of a second, under a name that the benchmark knows."""
    held = torch.ones(64 * MB, dtype=torch.uint8)
    time.sleep(0.2)
    return held


def test_memory_is_sampled_by_phase() -> None:
    before = sum(full_size.resident())
    with full_size.Watch(every=0.01) as watch:
        draw()
        time.sleep(0.05)
    assert 60 * MB < sum(watch.peaks["sampling"]) - before < 90 * MB
    assert "draw test_full_size.py" in watch.where


def test_phases_are_named_by_the_innermost_function() -> None:
    stack = ["fit trainer.py", "save checkpoint.py", "export trainer.py", "dumps json.py"]
    assert full_size.phase_of(stack) == "export"
    assert full_size.phase_of(stack[:2]) == "checkpoint"
    assert full_size.phase_of(["fit trainer.py", "__call__ learning.py", "__call__ module.py"]) == "updating"
    assert full_size.phase_of(["save keeping.py"]) == "other"


def test_the_estimate_is_what_is_kept_and_the_largest_phase() -> None:
    phases = {"sampling": (Item("a", 3.0),), "updating": (Item("b", 2.0), Item("c", 2.0))}
    assert full_size.bytes_of(Estimate((Item("x", 10.0), Item("y", 5.0)), phases)) == 19.0


def test_stored_tables_are_counted_and_have_the_dtype_of_the_weights() -> None:
    assert stored_buffers(KNOWN[full_size.MODEL]["transformer"]) == 384 * 384 * 1536  # positions x width
    assert stored_buffers(KNOWN["black-forest-labs/FLUX.1-dev"]["transformer"]) == 0
    part = KNOWN[random_weights.smaller(full_size.MODEL)]["transformer"]
    network = random_weights.network(part, "cpu", torch.bfloat16)
    assert network.pos_embed.pos_embed.dtype == torch.bfloat16
