"""A diffusers pipeline seen as a velocity field.

One convention for every model: ``t`` in [0, 1] with 1 = noise, ``x_t = (1 - t) x0 + t eps``, ``v = eps - x0``.
A generator converts to its pipeline's own scale inside and nowhere else does anybody have to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class GeneratorError(ValueError):
    """A generator cannot do what was asked; the message says what, where and what to do instead."""


@dataclass(frozen=True)
class Conditioning:
    """What the network is told besides ``x_t`` and ``t``: tensors whose first dimension is the prompt.

    Args:
        tensors: name -> ``[B, ...]``; the names belong to the generator that made them.
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, rows: Tensor) -> Conditioning:
        """Rows by index ``[M]``; an index may repeat, as it does for the samples of one group."""
        return Conditioning({name: value[rows] for name, value in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """One conditioning holding the rows of all ``parts`` in order."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Generator(ABC):
    """Velocity, text encoding and latent coding of one diffusers pipeline.

    A subclass supplies the five abstract methods and the two class attributes; everything else exists once, here.

    Attributes:
        backbone: the network that is trained (``pipeline.transformer``), always the bare module.
        network: what :meth:`velocity` calls; the trainer replaces it by the wrapped (DDP, compiled) backbone.
        network_calls: single-sample network evaluations so far (a batch of N counts N).
        lora_targets: default LoRA target module names.
        pipeline_class: name of the diffusers class this adapter reads.
        optional: components the pipeline draws without; a folder may leave them out.
    """

    lora_targets: tuple[str, ...] = ()
    pipeline_class: str = ""
    optional: tuple[str, ...] = ()

    def __init__(self, pipeline: Any, size: tuple[int, int] | None = None) -> None:
        self.pipeline = pipeline
        self.backbone: nn.Module = pipeline.transformer
        self.network: Any = self.backbone
        self.size = size or self.native_size()
        self.network_calls = 0
        self._negative: Conditioning | None = None
        for module in self.modules().values():
            module.requires_grad_(False).eval()
        self.check_size()

    # -- what differs from model to model -----------------------------------------------------------------------

    @abstractmethod
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the pipeline draws by default."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> conditioning with ``B = len(prompts)`` rows. Raises GeneratorError for a prompt too long."""

    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents, ``(C, H, W)`` or ``(C, F, H, W)``, at :attr:`size`."""

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """One unguided network call: ``x [N, ...]``, ``t [N]`` in [0, 1], ``cond`` with N rows -> ``v [N, ...]``."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[N, ...]`` -> media ``[N, 3, H, W]`` or ``[N, F, 3, H, W]``, float32 in [0, 1]; keeps the graph."""

    @abstractmethod
    def encode_media(self, media: Tensor) -> Tensor:
        """Media in [0, 1] -> latents (the mode of the encoder's distribution), inverse of :meth:`decode`."""

    @abstractmethod
    def times(self, steps: int) -> Tensor:
        """Time grid ``[steps + 1]``, falling from 1 to 0, as the pipeline's own scheduler spaces it."""

    # -- what is the same for all of them -----------------------------------------------------------------------

    def check_size(self) -> None:  # noqa: B027 - a model without limits has nothing to say
        """Raise GeneratorError when the model cannot draw :attr:`size`; a subclass knows its own limits."""

    @property
    def device(self) -> torch.device:
        """Where the backbone lives."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the backbone."""
        return next(self.backbone.parameters()).dtype

    def modules(self) -> dict[str, nn.Module]:
        """The pipeline's networks by component name."""
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    def to(self, device: torch.device | str) -> Generator:
        """Move every network of the pipeline."""
        self.pipeline.to(device)
        self._negative = None  # encoded on the device it was on
        return self

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning, guidance: float = 1.0) -> Tensor:
        """Velocity ``v = eps - x0`` at ``x_t``, with classifier-free guidance unless ``guidance == 1``.

        Args:
            x: ``[N, ...]`` float32 latents at time ``t [N]`` (or a scalar tensor).
            cond: N rows.
            guidance: scale ``g`` of ``v_uncond + g (v_cond - v_uncond)``; both halves go through in one call.
        """
        t = t.to(x.device, torch.float32).expand(x.shape[0])
        if guidance == 1.0:
            self.network_calls += x.shape[0]
            return self.predict(x, t, cond).float()
        self.network_calls += 2 * x.shape[0]
        rows = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        both = Conditioning.cat([self.negative()[rows], cond])
        unconditional, conditional = self.predict(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def negative(self) -> Conditioning:
        """Conditioning of the empty prompt, one row, encoded once."""
        if self._negative is None:
            self._negative = self.encode([""])
        return self._negative

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents ``[N, ...]``, float32: row i depends on ``seeds[i]`` alone, on no batch or device."""
        return seeded_noise(seeds, self.latent_shape()).to(self.device)

    @contextmanager
    def trained_by(self, network: Any) -> Iterator[None]:
        """Route :meth:`velocity` through ``network`` (the accelerator-wrapped backbone) inside the block."""
        before, self.network = self.network, network
        try:
            yield
        finally:
            self.network = before


def in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """``function`` over at most ``size`` rows at a time, so a VAE's activations do not grow with the batch."""
    return torch.cat([function(part) for part in rows.split(max(1, size))])


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal ``[len(seeds), *shape]`` on the CPU; row i comes from its own generator seeded ``seeds[i]``."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty((0, *shape))
