"""A call of a reward in parts: what must be scored together stays together, and scores return in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignflow.lazy import lazy
from rewards.base import Scope, Scores
from rewards.combine import groups_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class Part:
    """Samples ``rows`` of a larger call, with all that belongs to them."""

    rows: list[int]
    media: Tensor
    prompts: list[str]
    group: Tensor | None
    inputs: dict[str, Any]


def parts_of(
    media: Tensor,
    prompts: Sequence[str],
    group: Tensor | None,
    inputs: Mapping[str, Any],
    scope: Scope,
    size: int,
) -> list[Part]:
    """Parts of about ``size`` samples; what must be scored together stays together."""
    count = len(prompts)
    if scope == "batch":
        chunks = [list(range(count))]
    elif scope == "sample":
        chunks = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    else:
        members: dict[int, list[int]] = {}
        for row, number in enumerate(groups_of(prompts, group).tolist()):
            members.setdefault(number, []).append(row)
        chunks = [[]]
        for rows in members.values():
            if chunks[-1] and len(chunks[-1]) + len(rows) > size:
                chunks.append([])
            chunks[-1] += rows
    return [_part(rows, media, prompts, group, inputs) for rows in chunks if rows]


def _part(
    rows: list[int], media: Tensor, prompts: Sequence[str], group: Tensor | None, inputs: Mapping[str, Any]
) -> Part:
    some = {
        name: value[rows] if isinstance(value, torch.Tensor) else [value[i] for i in rows]
        for name, value in inputs.items()
    }
    return Part(rows, media[rows], [prompts[i] for i in rows], None if group is None else group[rows], some)


def joined(parts: Sequence[Part], scores: Sequence[Scores]) -> Scores:
    """Scores of parts as scores of the whole, each row in its place."""
    count = sum(len(part.rows) for part in parts)
    values = torch.full((count,), torch.nan)
    reasons: dict[int, str] = {}
    columns: dict[str, Tensor] = {}
    for part, found in zip(parts, scores, strict=True):
        values[part.rows] = found.values.detach().float().cpu()
        reasons |= {part.rows[index]: why for index, why in found.reasons.items()}
        for name, column in found.parts.items():
            whole = columns.setdefault(name, torch.full((count,), torch.nan))
            whole[part.rows] = column.detach().float().cpu()
    return Scores(values, reasons, columns)
