"""The engine ``pool``: copies of the generator in Ray actors. Weights and samples travel as safetensors bytes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from align.policy.build import add_trained, build_generator, parameters_of
from align.rollout.engine import Order, Reply, digest
from align.rollout.paths import states_of
from align.rollout.rollout import decode_to_cpu, draw
from alignflow.errors import TrainingError
from generators.base import Generator
from rewards.serving.crew import Crew, Worker

if TYPE_CHECKING:
    from align.config.engines import PoolEngine
    from align.config.settings import Config


class RolloutWorker:
    """One actor: a generator with the policy's LoRA on ``device``.

    Args:
        config: a training config, resolved, as JSON values.
    """

    def __init__(self, config: dict[str, Any], device: str) -> None:
        from align.config.settings import Config

        self.config = Config.model_validate(config)
        if self.config.train.threads:
            torch.set_num_threads(self.config.train.threads)
        memory = self.config.memory.model_copy(update={"cache_prompts": "none", "swap_blocks": 0})
        self.generator = build_generator(self.config.generator, memory, device)
        add_trained(self.config, self.generator)
        self.parameters = dict(parameters_of(self.config, self.generator))
        self.policy = ""

    def describe(self) -> int:
        """Trained numbers of the policy; the actor is ready."""
        return sum(value.numel() for value in self.parameters.values())

    @torch.no_grad()
    def load(self, weights: bytes, policy: str) -> None:
        """Take the policy's weights; raises ValueError if they are damaged or another LoRA's."""
        if digest(weights) != policy:
            raise ValueError("the weights were damaged in transit")
        tensors = load(weights)
        if {name: value.shape for name, value in tensors.items()} != {
            name: value.shape for name, value in self.parameters.items()
        }:
            raise ValueError("the weights do not fit the LoRA of this worker")
        for name, value in self.parameters.items():
            value.copy_(tensors[name])
        self.policy = policy

    @torch.no_grad()
    def draw(self, order: Order) -> dict[str, Any]:
        """Samples of an order: tensors as safetensors bytes, the rest as plain values."""
        generator, rollout = self.generator, self.config.rollout
        texts = list(dict.fromkeys(order.prompts))
        row = torch.tensor([texts.index(prompt) for prompt in order.prompts])
        calls = generator.network_calls
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.train.precision)
        with torch.autocast(generator.device.type, precision, enabled=precision is not None):
            latents, path = draw(
                generator, generator.encode(texts), order.seeds, rollout.sampler,  # type: ignore[union-attr]
                row=row, start=order.starts, steps=order.steps, keep=order.keep, chunk=len(order.seeds),
            )  # fmt: skip
        media, lost = decode_to_cpu(generator, latents, rollout.decode_chunk)  # type: ignore[union-attr]
        tensors = {"latents": latents.float().cpu().contiguous(), "media": media}
        if path is not None:
            tensors["states"] = states_of(path).cpu()
        plain = {"seeds": order.seeds, "policy": self.policy, "calls": generator.network_calls - calls, "lost": lost}
        return {"tensors": save(tensors), **plain}


class RayPool:
    """Actors that each hold the generator; a new actor receives the newest weights before its first order."""

    chunk: int | None = None

    def __init__(self, settings: PoolEngine, config: Config, generator: Generator) -> None:
        from align.config.load import resolved_settings

        self.parallel = settings.workers
        self.crew = Crew(settings, "rollout.engine 'pool'", TrainingError, RolloutWorker, resolved_settings(config))
        self.crew.describe()
        self._newest: tuple[Any, str] = (None, "")
        self._lock = threading.Lock()

    def pack(self, trained: Mapping[str, Tensor]) -> bytes:
        """The parameters by their names here, as a safetensors file."""
        return save({name: value.detach().cpu().contiguous() for name, value in trained.items()})

    def push(self, weights: bytes, policy: str) -> None:
        """Keep the weights for the actors, which take them with their next order."""
        with self._lock:
            self._newest = (self.crew.ray.put(weights), policy)

    def draw(self, order: Order, policy: str) -> Reply:
        """Samples by an idle actor; raises UnansweredError if it dies, fails or takes too long."""
        with self._lock:
            weights, newest = self._newest

        def call(worker: Worker) -> Any:
            if worker.knows.get("policy") != newest:
                limit = self.crew.settings.start_timeout
                self.crew.ray.get(worker.actor.load.remote(weights, newest), timeout=limit)
                worker.knows["policy"] = newest
            return worker.actor.draw.remote(order)

        found = self.crew.ask(call)
        tensors = load(found.pop("tensors"))
        return Reply(tensors["latents"], tensors["media"], states=tensors.get("states"), **found)

    def verify(self, policy: str) -> None:
        """Nothing to ask: every reply names its weights."""
