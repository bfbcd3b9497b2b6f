"""Roles of a denoiser's arguments (state, time, prompt), inferred from recorded calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as tree

from generators.errors import GeneratorError
from generators.watching.recording import Call, Step, stacked

LENGTH = " length"  # beside the rows of a list, how long each is
TIME_SCALES = ((1.0, 0.0), (1000.0, 0.0), (-1.0, 1.0), (-1000.0, 1000.0))  # argument = scale * t + offset


@dataclass(frozen=True)
class Layout:
    """Layout of the state in a tensor: its dimensions in another order, and more beside it along one of them.

    Args:
        order: ``tensor.dims[i]`` is the state's dimension ``order[i]``.
        dim: dimension of the tensor along which something is beside the state; None = nothing does.
        first: whether the state comes first there.
        single: a dimension of size 1 that only the tensor has, as the one frame of an image; None = it has none.
    """

    order: tuple[int, ...]
    dim: int | None = None
    first: bool = True
    single: int | None = None

    def take(self, tensor: Tensor, like: Sequence[int]) -> Tensor:
        """The state's part of ``tensor``, in the state's own order; ``like`` is the state's shape."""
        tensor = tensor if self.single is None else tensor.squeeze(self.single)
        if self.dim is not None:
            size = like[self.order[self.dim]]
            tensor = tensor.narrow(self.dim, 0 if self.first else tensor.shape[self.dim] - size, size)
        return tensor.permute([self.order.index(i) for i in range(tensor.ndim)])

    def rest(self, tensor: Tensor, like: Sequence[int]) -> Tensor | None:
        """Entries beside the state in ``tensor``."""
        if self.dim is None:
            return None
        tensor = tensor if self.single is None else tensor.squeeze(self.single)
        size, whole = like[self.order[self.dim]], tensor.shape[self.dim]
        return tensor.narrow(self.dim, size if self.first else 0, whole - size)

    def put(self, state: Tensor, rest: Tensor | None) -> Tensor:
        """The inverse of :meth:`take` and :meth:`rest`."""
        tensor = state.permute(self.order)
        if rest is not None and self.dim is not None:
            parts = [tensor, rest.to(tensor.dtype)]
            tensor = torch.cat(parts if self.first else parts[::-1], self.dim)
        return tensor if self.single is None else tensor.unsqueeze(self.single)


def layouts(tensor: Tensor, state: Tensor) -> list[Layout]:
    """Every possible layout of ``state`` in ``tensor``, the simplest first; rows stay rows."""
    if tensor.ndim == state.ndim + 1:
        singles = [d for d in range(1, tensor.ndim) if tensor.shape[d] == 1]
        return [replace(found, single=d) for d in singles for found in layouts(tensor.squeeze(d), state)]
    if tensor.ndim != state.ndim or tensor.shape[0] != state.shape[0]:
        return []
    found = []
    for rest in permutations(range(1, state.ndim)):
        order = (0, *rest)
        longer = [d for d in range(1, state.ndim) if tensor.shape[d] != state.shape[order[d]]]
        if not longer:
            found.append(Layout(order))
        elif len(longer) == 1 and tensor.shape[longer[0]] > state.shape[order[longer[0]]]:
            found += [Layout(order, longer[0], first) for first in (True, False)]
    return found


def same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors are equal but for rounding, at the scale of the second."""
    if a.shape != b.shape:
        return False
    a, b = a.detach().float(), b.detach().float()
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0)) if a.numel() else True


@dataclass(frozen=True)
class Plan:
    """Arguments of the denoiser as a tree whose leaves are rebuilt or kept.

    Args:
        spec: the tree.
        names: a leaf's name in messages, e.g. ``image_rotary_emb[0]``.
        state: leaf -> the layout of the state in it.
        times: leaf -> (scale, offset, dtype) of the time in it.
        rows: leaves that hold one row per sample besides.
        kinds: dtypes of the state's and of these leaves; a network may want some in another dtype than its own.
        listed: those of them that are lists of one tensor a row, texts of which may differ in length.
        repeated: lists that hold the same for every row, by what they hold.
        kept: the other leaves' values.
    """

    spec: Any
    names: tuple[str, ...]
    state: dict[int, Layout]
    times: dict[int, tuple[float, float, torch.dtype, int]]
    rows: tuple[int, ...]
    kinds: dict[int, torch.dtype]
    listed: frozenset[int]
    repeated: dict[int, Any]
    kept: dict[int, Any]

    def conditioning(self, call: Call, shape: Sequence[int], copies: int, part: int) -> dict[str, Tensor]:
        """Named rows of ``call``: copy ``part`` of the ``copies`` of the batch that it holds; ``shape`` is the state's.

        Raises:
            GeneratorError: the call looks different from those the plan was made from.
        """
        leaves = leaves_of(call.arguments)[1]
        if len(leaves) != len(self.names):
            raise GeneratorError("generator.kind generic: the network's arguments change from prompt to prompt")
        for index, value in self.kept.items():
            if not _equal(value, leaves[index]):
                raise GeneratorError(
                    f"generator.kind generic: argument {self.names[index]} changes with the prompt, but has no row for "
                    "each; give prompts of one length, or write an adapter"
                )
        found: dict[str, Tensor] = {}
        for index in self.rows:
            if index in self.listed:
                rows = _chunk(leaves[index], copies, part)
                found[self.names[index]] = pad_sequence(rows, batch_first=True)
                found[self.names[index] + LENGTH] = torch.tensor([len(row) for row in rows], device=rows[0].device)
            elif leaves[index] is not None:
                found[self.names[index]] = leaves[index].chunk(copies)[part]
        for index in self.rows:  # a mask is left out where all texts are of one length
            if leaves[index] is None:
                length = max((rows.shape[1] for rows in found.values() if rows.ndim == 3), default=1)
                device = stacked(leaves[next(iter(self.state))]).device
                found[self.names[index]] = torch.ones(shape[0], length, dtype=self.kinds[index], device=device)
        for index, layout in self.state.items():
            rest = layout.rest(stacked(leaves[index]).chunk(copies)[part], shape)
            if rest is not None:
                found[self.names[index]] = rest
        return found

    def arguments(self, x: Tensor, t: Tensor, rows: dict[str, Tensor]) -> dict[str, Any]:
        """The denoiser's arguments at state ``x [N, ...]`` and times ``t [N]``."""
        leaves: list[Any] = [None] * len(self.names)
        for index, value in self.kept.items():
            leaves[index] = value.to(x.device) if isinstance(value, Tensor) else value
        for index, layout in self.state.items():
            value = layout.put(x, rows.get(self.names[index])).to(self.kinds[index])
            leaves[index] = list(value) if index in self.listed else value
        for index, (scale, offset, kind, ndim) in self.times.items():
            value = (scale * t + offset).to(kind)
            leaves[index] = value.view(-1, *[1] * (ndim - 1)) if ndim > 1 else value
        for index, value in self.repeated.items():
            leaves[index] = [value] * len(x)
        for index in self.rows:
            value = rows[self.names[index]]
            lengths = rows.get(self.names[index] + LENGTH)
            leaves[index] = value if lengths is None else [row[:n] for row, n in zip(value, lengths, strict=True)]
        return tree.tree_unflatten(leaves, self.spec)


def _chunk(rows: list[Tensor], copies: int, part: int) -> list[Tensor]:
    size = len(rows) // copies
    return rows[part * size : (part + 1) * size]


def leaves_of(arguments: dict[str, Any]) -> tuple[tuple[str, ...], list[Any], Any]:
    """Names, values and tree of a call's arguments; a list is a leaf, it may hold one thing for each row."""
    pairs, spec = tree.tree_flatten_with_path(arguments, is_leaf=lambda value: isinstance(value, list))
    names = tuple(tree.keystr(path)[2:].replace("']", "", 1) for path, _ in pairs)
    return names, [value for _, value in pairs], spec


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b.to(a.device))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def read(steps: Sequence[Step], other: Call, times: Sequence[float]) -> Plan:
    """The plan behind recorded steps, each with the same calls.

    Args:
        steps: at least two, of N samples.
        other: a call made for one sample fewer, which tells rows from tensors that only look like them.
        times: time of each step, in [0, 1].

    Raises:
        GeneratorError: names the argument that could not be understood.
    """
    first = [step.calls[0] for step in steps]
    names, values, spec = leaves_of(first[0].arguments)
    columns = list(zip(*[leaves_of(call.arguments)[1] for call in first], strict=True))
    fewer = leaves_of(other.arguments)[1]
    count = steps[0].before.shape[0]
    state, clock, rows, repeated, kept = {}, {}, [], {}, {}
    listed = frozenset(i for i, value in enumerate(values) if _tensors(value))
    for index, column in enumerate(columns):
        layout = _state_layout([stacked(value) for value in column], steps)
        time = None if layout else _time(column, times)
        if layout:
            state[index] = layout
        elif time:
            clock[index] = time
        elif not all(_equal(column[0], value) for value in column):
            raise GeneratorError(
                f"generator.kind generic: argument {names[index]} changes from step to step; it is neither the state "
                f"nor {', '.join(f'{a:g} t + {b:g}' for a, b in TIME_SCALES)}; write an adapter"
            )
        elif isinstance(values[index], list) and _repeats(values[index], fewer[index], count):
            repeated[index] = values[index][0]
        elif _is_row(column[0], fewer[index] if index < len(fewer) else None, count):
            rows.append(index)
        else:
            kept[index] = values[index]
    if not state or not clock:
        missing = "state" if not state else "time"
        raise GeneratorError(f"generator.kind generic: no argument of {', '.join(names)} holds the {missing}")
    kinds = {i: (values[i][0] if i in listed else values[i]).dtype for i in (*state, *rows)}
    return Plan(spec, names, state, clock, tuple(rows), kinds, listed, repeated, kept)


def _tensors(value: Any) -> bool:
    """Whether a leaf is a list of tensors."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, Tensor) for v in value)


def _is_row(value: Any, fewer: Any, count: int) -> bool:
    """Whether a tensor or a list of them has ``count`` rows (or a multiple), and as many fewer with a sample fewer."""
    if _tensors(value) and _tensors(fewer):
        return len(value) * (count - 1) == len(fewer) * count
    if not isinstance(value, Tensor) or not isinstance(fewer, Tensor) or not value.ndim or not fewer.ndim:
        return False
    return value.shape[0] * (count - 1) == fewer.shape[0] * count


def _repeats(value: list[Any], fewer: Any, count: int) -> bool:
    """Whether a list holds the same thing ``count`` times where it held it one time fewer for one sample fewer."""
    return (
        isinstance(fewer, list)
        and len(value) * (count - 1) == len(fewer) * count
        and all(_equal(value[0], v) for v in (*value, *fewer))
    )


def _state_layout(column: Sequence[Any], steps: Sequence[Step]) -> Layout | None:
    """The layout by which every value of an argument holds its step's state, in each of its copies of the batch."""
    value, state = column[0], steps[0].before
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.ndim:
        return None
    copies, left = divmod(value.shape[0], state.shape[0])
    if left or not copies:
        return None
    for layout in layouts(value.chunk(copies)[-1], state):
        if all(
            same(layout.take(v.chunk(copies)[-1], s.before.shape), s.before.to(v.dtype))
            for v, s in zip(column, steps, strict=True)
        ):
            return layout
    return None


def _time(column: Sequence[Any], times: Sequence[float]) -> tuple[float, float, torch.dtype, int] | None:
    """(scale, offset, dtype, dimensions) where every value is scale * t + offset, truncated if whole numbers."""
    tensors = [torch.as_tensor(v) for v in column if isinstance(v, Tensor | float | int) and not isinstance(v, bool)]
    if len(tensors) != len(column) or all(_equal(tensors[0], v) for v in tensors):
        return None
    kind = tensors[0].dtype
    for scale, offset in TIME_SCALES:
        slack = 1.0 if not kind.is_floating_point else 2e-2 * abs(scale) if kind.itemsize < 4 else 1e-5 * abs(scale)
        if all((v.double() - scale * t - offset).abs().max() <= slack for v, t in zip(tensors, times, strict=True)):
            return scale, offset, kind, tensors[0].ndim
    return None
