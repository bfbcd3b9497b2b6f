"""Rows of groups, however many there are."""

from __future__ import annotations

import torch

from align.data.media import from_bytes
from align.maths import pairs
from align.maths.filters import uninformative
from align.rollout.rollout import spreads
from alignflow.groups import members
from benchmarks import growth
from rewards.combine import standardised


def test_rows_are_in_order_of_groups_and_of_themselves() -> None:
    group = torch.tensor([7, -1, 7, 3, -1, 7])
    assert [rows.tolist() for rows in members(group)] == [[1, 4], [3], [0, 2, 5]]
    assert members(group[:0]) == []


def test_groups_in_any_order_give_what_masks_give() -> None:
    draw = torch.Generator().manual_seed(0)
    group = torch.randint(0, 9, (60,), generator=draw) * 5
    rewards = torch.rand(60, generator=draw)
    rewards[::7] = torch.nan
    media = torch.randint(0, 256, (60, 3, 4, 4), dtype=torch.uint8, generator=draw)
    numbers = group.unique()
    masks = [group == number for number in numbers]

    found = torch.stack([from_bytes(media[mask]).var(0).mean().sqrt() for mask in masks if mask.sum() > 1])
    assert torch.equal(spreads(media, group), found)

    void = uninformative(rewards, group, 0.4, 0.3)
    for mask in masks:
        known = rewards[mask & rewards.isfinite()].double()
        assert bool(void[mask].all()) == bool(known.mean() > 0.4 and known.std(correction=0) < 0.3)
        assert len(void[mask].unique()) == 1

    expected = torch.full_like(rewards, torch.nan)
    for mask in masks:
        rows = mask & rewards.isfinite()
        expected[rows] = (rewards[rows] - rewards[rows].mean()) / rewards[rows].std(correction=0)
    torch.testing.assert_close(standardised(rewards, group), expected, equal_nan=True)

    best = pairs.best_worst(rewards, group)
    for mask, winner, loser, valid in zip(masks, best.winner, best.loser, best.valid, strict=True):
        known = rewards[mask & rewards.isfinite()]
        assert mask[winner]
        assert mask[loser]
        if valid:
            assert (rewards[winner], rewards[loser]) == (known.max(), known.min())


def test_standardised_scores_have_a_gradient() -> None:
    values = torch.tensor([1.0, 3.0, 2.0, torch.nan, 5.0], requires_grad=True)
    out = standardised(values, torch.tensor([0, 0, 1, 1, 0]))
    out[torch.tensor([0, 1, 4])].sum().backward()
    assert values.grad is not None
    spread = values[torch.tensor([0, 1, 4])].detach().std(correction=0)
    torch.testing.assert_close(values.grad[torch.tensor([0, 1, 4])], (1 / spread).expand(3))


def test_the_slope_of_growth_in_closed_form() -> None:
    sizes = [2**power for power in range(1, 9)]
    assert abs(growth.exponent(sizes, [float(size) for size in sizes]) - 1) < 1e-9
    assert abs(growth.exponent(sizes, [1e-3 * size**2 for size in sizes]) - 2) < 1e-9
    assert all(callable(work(64)) and growth.seconds(work(64), 1) > 0 for work in growth.PARTS.values())
