"""Arithmetic of a config: operations as torch counts them, images a second in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_estimate import IMAGE, NETWORKS, TEXT, ready
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from align.config.load import load_config
from benchmarks import roofline


@pytest.mark.parametrize("name", NETWORKS)
def test_a_call_is_what_torch_counts(name: str) -> None:
    """To 5 %: embeddings and modulation, which work once a sample, are left out."""
    network, forward, _ = ready(name)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    assert roofline.call(network, IMAGE, TEXT) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.fixture(scope="module")
def config() -> Any:
    return load_config("configs/flux-dev/nft.yaml", ["memory=80gb"])


def test_seconds_in_closed_form(config: Any) -> None:
    samples = config.rollout.prompts * config.rollout.group
    found = roofline.Work(1e12, 6e12, 4e12, 0)
    peak, link = roofline.CARDS["h100"]
    one = roofline.images_per_second(config, found, "h100", 1, 0.5)
    assert one == pytest.approx(peak * 0.5 / 1e13)
    assert roofline.images_per_second(config, found, "h100", 8, 0.5) == pytest.approx(8 * one)
    more = config.rollout.prompts + 1  # a card more than prompts has nothing to do
    assert roofline.images_per_second(config, found, "h100", more, 0.5) == pytest.approx(config.rollout.prompts * one)
    heavy = replace(found, sampling=0.0, updating=0.0, numbers=10**9)
    two = roofline.images_per_second(config, heavy, "h100", 2, 0.5)
    assert two == pytest.approx(samples / (config.train.updates * 8e9 / link))


def test_work_follows_the_settings(config: Any) -> None:
    plain = roofline.work(config)
    steps = config.rollout.sampler.steps
    assert plain.sampling == pytest.approx(plain.call * steps)
    guided = roofline.work(load_config("configs/flux-dev/nft.yaml", ["memory=80gb", "rollout.sampler.guidance=2"]))
    assert guided.sampling == pytest.approx(2 * plain.sampling)
    assert guided.updating == plain.updating  # the loss of nft is not guided
    kept = roofline.work(
        load_config("configs/flux-dev/nft.yaml", ["memory=80gb", "train.gradient_checkpointing=false"])
    )
    roles = len(config.recipe.roles(config))
    assert kept.updating / plain.updating == pytest.approx((2 + roles) / (3 + roles))


def test_fp8_halves_the_forward_products(config: Any) -> None:
    """A forward pass and, per term, the policy's, the recomputed and the roles' passes; backward and attention stay."""
    fast = load_config("configs/flux-dev/nft.yaml", ["memory=80gb", "memory.quantise=fp8", "memory.compute=fp8"])
    plain, found = roofline.work(config), roofline.work(fast)
    saved, steps = plain.call - found.call, config.rollout.sampler.steps
    assert 0.4 < saved / plain.call < 0.5
    assert plain.sampling - found.sampling == pytest.approx(steps * saved)
    passes = (2 + len(config.recipe.roles(config))) * config.recipe.timesteps
    assert plain.updating - found.updating == pytest.approx(passes * saved)
