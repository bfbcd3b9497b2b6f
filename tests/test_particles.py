"""Particles: tensors and lineage move together, by indices and masks of any kind."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from align.search.particles import Particles, cat


def particles(rows=(0, 0, 1, 1), first=0) -> Particles:
    """Particle n has ``x`` n, velocity 10 n, value 100 n and lineage ``p n``."""
    n = torch.arange(first, first + len(rows), dtype=torch.float64)
    x = n.view(-1, 1, 1).expand(-1, 2, 3).clone()
    lineage = tuple((f"p {int(k)}",) for k in n)
    return Particles(x, torch.tensor(rows), n.long(), lineage, v=10 * x, value=100 * n)


def holds(made: Particles, wanted: list[int]) -> None:
    """Every field is that of the particles ``wanted``."""
    assert made.x[:, 0, 0].tolist() == wanted
    assert made.v[:, 1, 2].tolist() == [10 * n for n in wanted]
    assert made.value.tolist() == [100 * n for n in wanted]
    assert [line[0] for line in made.lineage] == [f"p {n}" for n in wanted]
    assert made.grad is None


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        (torch.tensor([2, 0, 2]), [2, 0, 2]),
        (torch.tensor([False, True, False, True]), [1, 3]),
        (slice(1, 3), [1, 2]),
        (torch.tensor([], dtype=torch.int64), []),
    ],
    ids=["rows", "mask", "slice", "none"],
)
def test_an_index_takes_every_field(index, wanted):
    made = particles()[index]
    holds(made, wanted)
    assert made.number.tolist() == wanted
    assert made.row.tolist() == [n // 2 for n in wanted]


def test_repeat_puts_copies_side_by_side_and_numbers_them_anew():
    made = particles().repeat(3)
    holds(made, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    assert made.number.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert made.row.tolist() == [0] * 6 + [1] * 6


def test_where_and_put_choose_whole_particles():
    mine, other = particles(), particles(first=10)
    holds(mine.where(torch.tensor([True, False, False, True]), other), [0, 11, 12, 3])
    holds(mine.put(torch.tensor([3, 1]), other[:2]), [0, 11, 2, 10])
    holds(mine.put(torch.tensor([True, False, False, True]), other[:2]), [10, 1, 2, 11])
    holds(mine, [0, 1, 2, 3])  # nothing is changed in place


def test_cat_and_by_prompt_keep_the_order_within_a_prompt():
    both = cat([particles((0, 1)), particles((0, 0, 1, 1), first=2)])
    holds(both, [0, 1, 2, 3, 4, 5])
    holds(both.by_prompt(), [0, 2, 3, 1, 4, 5])
    assert both.by_prompt().numbered().number.tolist() == [0, 1, 2, 0, 1, 2]


def test_best_of_each_prompt_the_first_of_equals_and_missing_ones_last():
    values = torch.tensor([1.0, 3.0, 3.0, torch.nan, -5.0, torch.nan], dtype=torch.float64)
    six = particles((0, 0, 0, 1, 1, 1)).valued(values)
    assert six.best(2).number.tolist() == [1, 4]
    assert six.best(2, 2).number.tolist() == [1, 2, 4, 3]
    assert len(six.best(2, 0)) == 0


def test_moving_drops_what_belonged_to_the_old_place():
    moved = particles().moved(torch.zeros(4, 2, 3), torch.ones(4, 2, 3))
    assert moved.value is None
    assert moved.v.mean() == 1
    assert moved.moved(moved.x).v is None
    assert moved.lineage == particles().lineage


def test_names_are_added_to_each_lineage():
    made = particles().named("round 1: sample", torch.tensor([7, 8, 9, 6])).named("end")
    assert made.lineage[2] == ("p 2", "round 1: sample 9", "end")


def test_what_one_has_and_the_other_lacks_is_not_lost_in_silence():
    with pytest.raises(ValueError, match="only some of the particles have 'v'"):
        particles().where(torch.ones(4, dtype=torch.bool), particles().moved(torch.zeros(4, 2, 3)))
    with pytest.raises(ValueError, match="only some of the particles have 'value'"):
        cat([particles(), replace(particles(), value=None)])


def test_fields_of_a_subclass_move_as_well():
    @dataclass(frozen=True, eq=False, kw_only=True)
    class Heavy(Particles):
        weight: Tensor

    heavy = Heavy(**vars(particles()), weight=torch.arange(4) * 2.0)
    made = heavy[torch.tensor([3, 1])].repeat(2)
    assert type(made) is Heavy
    assert made.weight.tolist() == [6, 6, 2, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_indices_and_masks_of_either_device():
    cpu = particles()
    there = replace(cpu, x=cpu.x.cuda(), v=cpu.v.cuda(), row=cpu.row.cuda())
    for device in ("cpu", "cuda"):
        holds(there[torch.tensor([2, 0], device=device)], [2, 0])
        mask = torch.tensor([True, False, True, False], device=device)
        holds(there[mask], [0, 2])
        holds(there.where(mask, there[torch.tensor([3, 3, 3, 3])]), [0, 3, 2, 3])
        holds(there.put(mask, there[2:]), [2, 1, 3, 3])
