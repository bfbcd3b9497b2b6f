"""The seam to an engine that generates samples elsewhere: what it is asked, what it replies, and what is refused.

A process sends the trained weights with their digest, then orders of a few samples each. Every reply repeats the
digest. A reply of other weights, seeds or shapes is not used: it is counted and asked again, and what stays without a
usable reply is a sample without a score.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from generators.base import Generator
from rewards.serving.dispatch import Dispatcher, UnansweredError

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
    """

    prompts: list[str]
    seeds: list[int]
    starts: list[int]
    steps: tuple[int, ...] | None = None


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
    """

    latents: Tensor
    media: Tensor
    seeds: list[int]
    policy: str
    calls: int = 0
    lost: Mapping[int, str] = field(default_factory=dict)


class Engine(Protocol):
    """Generates samples by the weights that it was given last."""

    parallel: int
    """Orders that it works on at a time."""

    def push(self, weights: bytes, policy: str) -> None:
        """Take the trained weights, a safetensors file, whose digest is ``policy``."""

    def draw(self, order: Order, policy: str) -> Reply:
        """Samples by the weights ``policy``; raises UnansweredError where there is no reply."""


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
    for name, value, shape in (("latents", reply.latents, latents), ("media", reply.media, media)):
        if tuple(value.shape) != (count, *shape):
            raise RejectedError("wrong", f"the engine replied with {name} {[*value.shape]}, not {[count, *shape]}")
    if reply.media.dtype != torch.uint8 or not reply.latents.is_floating_point():
        kinds = f"latents in {reply.latents.dtype} and media in {reply.media.dtype}"
        raise RejectedError("wrong", f"the engine replied with {kinds}, not floating point and uint8")
    whole = [n for n in range(count) if n not in reply.lost]
    if not bool(reply.latents[whole].isfinite().all()):
        raise RejectedError("wrong", "the engine replied with NaN or infinity in latents")


class Remote:
    """Has orders filled by an engine, again where a reply is refused, and counts what is.

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
        self.policy = ""
        self.counts = Counter[str]()
        self._lock = threading.Lock()

    def __call__(self, orders: Sequence[Order], weights: bytes) -> list[Reply]:
        """A reply for each order, sampled by ``weights``; one that was given up holds zeros, and why."""
        self.policy = digest(weights)
        self.engine.push(weights, self.policy)
        replies = self.dispatcher.each(orders, self._nothing)
        self.generator.network_calls += sum(reply.calls for reply in replies)
        return replies

    def weights(self) -> bytes:
        """The trained parameters as they are now, as a safetensors file."""
        return save({name: value.detach().cpu().contiguous() for name, value in self.trained.items()})

    def take(self) -> dict[str, int]:
        """Samples by :data:`KINDS` since the last call."""
        with self._lock:
            found, self.counts = {kind: self.counts[kind] for kind in KINDS}, Counter[str]()
        return found

    def _count(self, kind: str, order: Order) -> None:
        with self._lock:
            self.counts[kind] += len(order.seeds)

    def _ask(self, order: Order) -> Reply:
        reply = self.engine.draw(order, self.policy)
        try:
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
        return Reply(*empty, order.seeds, self.policy, lost=dict.fromkeys(range(count), why))
