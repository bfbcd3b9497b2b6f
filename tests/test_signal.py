"""The share of signal in a recipe's gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import settings

from benchmarks.signal import half_gradients, share_of_signal


def test_the_share_of_signal_in_closed_form() -> None:
    # g_1 . g_2 = 1, |g_1|^2 = 1, |g_2|^2 = 5
    assert share_of_signal([torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])]) == pytest.approx(1 / 3)
    assert share_of_signal([torch.ones(3), torch.ones(3)]) == 1
    assert share_of_signal([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]) == 0


def test_halves_of_rollouts_have_gradients_of_every_slot(model: Path, tmp_path: Path) -> None:
    found = half_gradients(settings(tmp_path, model, rollout={"prompts": 2, "group": 4}), 2)
    assert {slot: len(gradients) for slot, gradients in found.items()} == {0: 4, 1: 4}
    assert all(gradient.norm() > 0 for gradients in found.values() for gradient in gradients)
