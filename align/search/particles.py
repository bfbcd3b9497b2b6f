"""Particles, the data structure of every search method; tensors and lineage move together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from align.search.rows import places, top
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

Lineage = tuple[tuple[str, ...], ...]
UNKNOWN: Any = None
"""Stands for a field that is not known; reading it before it is, is a mistake of the method's."""


@dataclass(frozen=True, eq=False)
class Particles:
    """N unfinished samples of a batch of prompts; the samples of a prompt are adjacent.

    Every operation returns new particles and treats all fields alike, also those that a subclass adds. Indices and
    masks may be on any device. The last three are None until something computes them.

    Args:
        x: ``[N, ...]`` latents.
        row: ``[N]`` the prompt of each, on the device of ``x``.
        number: ``[N]`` int64 on the CPU; with the prompt it decides a particle's noise.
        lineage: N histories, first things first.
        v: ``[N, ...]`` velocity at ``x``.
        value: ``[N]`` float64 on the CPU, NaN where missing.
        grad: ``[N, ...]`` gradient of the value to ``x``.
    """

    x: Tensor
    row: Tensor
    number: Tensor
    lineage: Lineage
    v: Tensor = UNKNOWN
    value: Tensor = UNKNOWN
    grad: Tensor = UNKNOWN

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor | slice) -> Self:
        """Particles at row numbers ``[M]``, where a mask ``[N]`` is true, or in a slice."""
        if isinstance(index, slice):
            return self._map(lambda one: one[index], lambda one: one[index])
        where = _numbers(index).tolist()
        return self._map(lambda one: one[index.to(one.device)], lambda one: tuple(one[n] for n in where))

    def repeat(self, count: int) -> Self:
        """Every particle ``count`` times, copies side by side, numbered anew."""
        copies = self._map(
            lambda one: one.repeat_interleave(count, 0), lambda one: tuple(a for a in one for _ in range(count))
        )
        return copies.numbered()

    def where(self, mask: Tensor, other: Self) -> Self:
        """These where ``mask [N]`` is true, the N others elsewhere.

        Raises:
            ValueError: one has a field that the other lacks.
        """
        chosen = mask.tolist()
        return self._map(
            lambda one, two: torch.where(_column(mask, one), one, two),
            lambda one, two: tuple(a if yes else b for yes, a, b in zip(chosen, one, two, strict=True)),
            other,
        )

    def put(self, index: Tensor, other: Self) -> Self:
        """These with the rows ``index [M]``, or where a mask is true, replaced by the M others.

        Raises:
            ValueError: as :meth:`where`.
        """
        where = _numbers(index).tolist()

        def texts(one: Lineage, two: Lineage) -> Lineage:
            new = dict(zip(where, two, strict=True))
            return tuple(new.get(n, line) for n, line in enumerate(one))

        return self._map(lambda one, two: _put(one, _numbers(index).to(one.device), two), texts, other)

    def moved(self, x: Tensor, v: Tensor = UNKNOWN) -> Self:
        """At other latents ``[N, ...]``; velocity, value and gradient belonged to the old ones and are dropped."""
        return replace(self, x=x, v=v, value=UNKNOWN, grad=UNKNOWN)

    def valued(self, value: Tensor) -> Self:
        """With values ``[N]``."""
        return replace(self, value=value)

    def numbered(self, number: int | None = None) -> Self:
        """Numbered from 0 within each prompt, or all by one number."""
        numbers = places(self.row) if number is None else [number] * len(self)
        return replace(self, number=torch.tensor(numbers, dtype=torch.int64))

    def named(self, word: str, number: Tensor | None = None) -> Self:
        """With a word more in each lineage, followed by a number of ``[N]`` if they are given."""
        words = [word] * len(self) if number is None else [f"{word} {k}" for k in number.tolist()]
        return replace(self, lineage=tuple((*line, more) for line, more in zip(self.lineage, words, strict=True)))

    def by_prompt(self) -> Self:
        """Particles of a prompt side by side, otherwise in the same order."""
        return self[self.row.cpu().argsort(stable=True)]

    def best(self, prompts: int, count: int = 1) -> Self:
        """The ``count`` of highest value of each prompt, best first, the first of equals; missing values come last.

        Every prompt must have equally many.
        """
        return self[top(self.value, prompts, count)]

    def _map(self, tensors: Callable[..., Tensor], texts: Callable[..., Lineage], *others: Self) -> Self:
        """Every field through ``tensors``, the lineage through ``texts``."""
        changed: dict[str, Any] = {}
        for name in (field.name for field in fields(self)):
            parts = [getattr(one, name) for one in (self, *others)]
            missing = [part is None for part in parts]
            if any(missing) and not all(missing):
                raise ValueError(f"only some of the particles have {name!r}")
            if not any(missing):
                changed[name] = texts(*parts) if name == "lineage" else tensors(*parts)
        return replace(self, **changed)


P = TypeVar("P", bound=Particles)


def cat(parts: Sequence[P]) -> P:
    """All of them, one part behind the other; raises ValueError as :meth:`Particles.where`."""
    first, *others = parts
    return first._map(lambda *all_of: torch.cat(all_of), lambda *all_of: sum(all_of, ()), *others)


def _numbers(index: Tensor) -> Tensor:
    return index.nonzero().flatten() if index.dtype == torch.bool else index


def _put(one: Tensor, index: Tensor, two: Tensor) -> Tensor:
    dtype = torch.promote_types(one.dtype, two.dtype)
    return one.to(dtype).index_copy(0, index, two.to(dtype))


def _column(mask: Tensor, like: Tensor) -> Tensor:
    return mask.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
