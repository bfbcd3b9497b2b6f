"""The seam to an engine that generates samples elsewhere: its requests, its replies, and refusals.

A process gives the engine the trained weights with their digest, then orders of a few samples each. Every reply
names the digest of the weights that made it. A reply of other weights, seeds or shapes is not used: it is counted and
asked again, and what stays without a usable reply is a sample without a score.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from generators.base import Generator
from rewards.serving.dispatch import Dispatcher, UnansweredError

logger = logging.getLogger(__name__)

KINDS = ("stale", "wrong", "lost")
"""Samples that are counted: of other weights, of another shape or other seeds, and without a usable reply at last."""


@dataclass(frozen=True)
class Order:
    """The samples ``n`` of one call.

    Args:
        prompts: ``[n]``.
        seeds: ``[n]``, from which everything random about a sample comes.
        starts: ``[n]`` seeds of the initial noise.
        steps: indices of the stochastic steps; None = as the sampler does by itself.
        keep: whether the latents around the stochastic steps are wanted.
    """

    prompts: list[str]
    seeds: list[int]
    starts: list[int]
    steps: tuple[int, ...] | None = None
    keep: bool = False

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Indices of the latents that are wanted: before and after each stochastic step; 0 = the noise."""
        return boundaries(self.steps or ()) if self.keep else ()

    def parts(self, size: int | None) -> Iterator[Order]:
        """The order in parts of at most ``size`` samples; None = as it is."""
        size = size or len(self.seeds)
        for first in range(0, len(self.seeds), size):
            some = slice(first, first + size)
            yield replace(self, prompts=self.prompts[some], seeds=self.seeds[some], starts=self.starts[some])


@dataclass(frozen=True)
class Reply:
    """Samples of an order.

    Args:
        latents: ``[n, ...]`` clean latents x_0, float32.
        media: uint8 ``[n, 3, H, W]`` or ``[n, F, 3, H, W]``.
        seeds: ``[n]`` that they were made from.
        policy: digest of the weights that made them.
        calls: network calls that it took.
        lost: sample -> why it cannot be scored.
        states: ``[n, K, ...]`` latents at the K :attr:`Order.boundaries`, float32; None where none are wanted.
    """

    latents: Tensor
    media: Tensor
    seeds: list[int]
    policy: str
    calls: int = 0
    lost: Mapping[int, str] = field(default_factory=dict)
    states: Tensor | None = None


class Engine(Protocol):
    """Generates samples with the newest weights that it received."""

    parallel: int
    """Orders that it works on at a time."""
    chunk: int | None
    """Samples of an order at most; None = as many as it is asked for."""

    def pack(self, trained: Mapping[str, Tensor]) -> bytes:
        """The weights of the role in place as the engine takes them.

        Args:
            trained: name -> parameter of the policy.
        """

    def push(self, weights: bytes, policy: str) -> None:
        """Take weights that :meth:`pack` made, whose digest is ``policy``; raises UnansweredError where it cannot."""

    def draw(self, order: Order, policy: str) -> Reply:
        """Samples by the weights ``policy``; raises UnansweredError if there is no reply."""

    def verify(self, policy: str) -> None:
        """After the last reply of a rollout: raise UnansweredError unless the weights are still those that it took."""


class RejectedError(UnansweredError):
    """A reply that is not used.

    Args:
        kind: ``stale`` or ``wrong``.
    """

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def digest(weights: bytes) -> str:
    """SHA-256 of the bytes, in hexadecimal digits."""
    return hashlib.sha256(weights).hexdigest()


def boundaries(steps: Sequence[int]) -> tuple[int, ...]:
    """Indices of the latents before and after each of ``steps``, rising, each once.

    >>> boundaries((0, 1, 4))
    (0, 1, 2, 4, 5)
    """
    return tuple(sorted({*steps, *(step + 1 for step in steps)}))


def joined(replies: Sequence[Reply]) -> Reply:
    """One reply of the parts of an order."""
    first, states = replies[0], [reply.states for reply in replies if reply.states is not None]
    if len(replies) == 1:
        return first
    lost: dict[int, str] = {}
    before = 0
    for reply in replies:
        lost |= {before + number: why for number, why in reply.lost.items()}
        before += len(reply.seeds)
    return Reply(
        torch.cat([reply.latents for reply in replies]),
        torch.cat([reply.media for reply in replies]),
        [seed for reply in replies for seed in reply.seeds],
        first.policy,
        sum(reply.calls for reply in replies),
        lost,
        torch.cat(states) if states else None,
    )


def check(order: Order, reply: Reply, policy: str, latents: tuple[int, ...], media: tuple[int, ...]) -> None:
    """Raise RejectedError for a reply of other weights, seeds, shapes or dtypes than those asked for, or with NaN.

    Args:
        policy: digest of the weights that were sent.
        latents: shape of one sample's latents, ``media`` of its image or video.
    """
    count = len(order.seeds)
    if reply.policy != policy:
        raise RejectedError("stale", f"the engine sampled with weights {reply.policy[:8]}, not {policy[:8]}")
    if reply.seeds != order.seeds:
        raise RejectedError("wrong", "the engine replied with other seeds than it was given")
    parts = [("latents", reply.latents, latents), ("media", reply.media, media)]
    if order.keep:
        states = torch.empty(0) if reply.states is None else reply.states
        parts.append(("latents of the steps", states, (len(order.boundaries), *latents)))
    for name, value, shape in parts:
        if tuple(value.shape) != (count, *shape):
            raise RejectedError("wrong", f"the engine replied with {name} {[*value.shape]}, not {[count, *shape]}")
    if reply.media.dtype != torch.uint8 or not reply.latents.is_floating_point():
        kinds = f"latents in {reply.latents.dtype} and media in {reply.media.dtype}"
        raise RejectedError("wrong", f"the engine replied with {kinds}, not floating point and uint8")
    whole = [n for n in range(count) if n not in reply.lost]
    found = [reply.latents[whole], *([reply.states[whole]] if reply.states is not None else [])]
    if not all(bool(value.isfinite().all()) for value in found):
        raise RejectedError("wrong", "the engine replied with NaN or infinity in latents")


class Remote:
    """Sends orders to an engine, repeats those whose reply is refused, and counts refusals.

    Args:
        generator: whose shapes the samples must have.
        trained: name -> parameter of the policy, whose values are sent.
        retries: further attempts for an order.
        backoff: seconds before the second attempt, doubled for each after it.
    """

    def __init__(
        self, engine: Engine, generator: Generator, trained: Mapping[str, Tensor], retries: int, backoff: float
    ) -> None:
        self.engine, self.generator, self.trained = engine, generator, trained
        self.dispatcher = Dispatcher(self._ask, engine.parallel, retries, backoff)
        self.pusher = Dispatcher(self._push, 1, retries, backoff)
        self.policy = ""
        self.counts = Counter[str]()
        self._lock = threading.Lock()

    def __call__(self, orders: Sequence[Order], weights: bytes) -> list[Reply]:
        """A reply for each order, sampled by ``weights``; one that was given up holds zeros, and why.

        Where the weights turn out to have changed during the rollout, all of it is asked for once more.
        """
        parts = [[*order.parts(self.engine.chunk)] for order in orders]
        asked = [part for some in parts for part in some]
        replies = self._filled(asked, weights)
        if why := self._changed(asked):
            logger.warning("%s; asking for all samples of this rollout again", why)
            replies = self._filled(asked, weights)
            if why := self._changed(asked):
                replies = [self._nothing(part, why) for part in asked]
        self.generator.network_calls += sum(reply.calls for reply in replies)
        left = iter(replies)
        return [joined([next(left) for _ in some]) for some in parts]

    def weights(self) -> bytes:
        """The weights of the role in place, as the engine takes them."""
        return self.engine.pack(self.trained)

    def take(self) -> dict[str, int]:
        """Samples by :data:`KINDS` since the last call."""
        with self._lock:
            found, self.counts = {kind: self.counts[kind] for kind in KINDS}, Counter[str]()
        return found

    def _filled(self, orders: Sequence[Order], weights: bytes) -> list[Reply]:
        """The weights sent, and a reply for each order."""
        self.policy = digest(weights)
        [why] = self.pusher.each([weights], lambda _, why: why)
        if why is not None:
            return [self._nothing(order, why) for order in orders]
        return self.dispatcher.each(orders, self._nothing)

    def _push(self, weights: bytes) -> None:
        self.engine.push(weights, self.policy)

    def _changed(self, orders: Sequence[Order]) -> str | None:
        """Why the samples of all orders are stale, which are counted then; None where they are not."""
        try:
            self.engine.verify(self.policy)
        except UnansweredError as error:
            for order in orders:
                self._count("stale", order)
            return str(error)
        return None

    def _count(self, kind: str, order: Order) -> None:
        with self._lock:
            self.counts[kind] += len(order.seeds)

    def _ask(self, order: Order) -> Reply:
        try:
            reply = self.engine.draw(order, self.policy)
            check(order, reply, self.policy, *self._shapes())
        except RejectedError as error:
            self._count(error.kind, order)
            raise
        return reply

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        frames = getattr(self.generator, "frames", None)
        image = (3, *self.generator.size)
        return self.generator.latent_shape(), image if frames is None else (frames, *image)

    def _nothing(self, order: Order, why: str) -> Reply:
        self._count("lost", order)
        count, (latents, media) = len(order.seeds), self._shapes()
        empty = torch.zeros(count, *latents), torch.zeros(count, *media, dtype=torch.uint8)
        states = torch.zeros(count, len(order.boundaries), *latents) if order.keep else None
        lost = dict.fromkeys(range(count), why)
        return Reply(*empty, order.seeds, self.policy, lost=lost, states=states)
