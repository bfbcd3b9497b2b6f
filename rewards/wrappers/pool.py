"""A reward replicated in several Ray actors, on this machine or on a cluster."""

from __future__ import annotations

import logging
import math
import os
import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from alignflow.extras import optional
from alignflow.lazy import lazy
from rewards import AnyReward
from rewards.base import Reward, RewardError, Scores, WrapperSettings
from rewards.parts import parts_of
from rewards.serving.dispatch import Dispatcher, UnansweredError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.parts import Part
    from rewards.serving import pool_worker
else:
    pool_worker = lazy("rewards.serving.pool_worker")


class Pool(WrapperSettings):
    """Another reward in several Ray actors, on this machine or across a cluster.

    A worker that dies or does not answer in time is replaced, and its samples are scored by another; what stays
    unanswered is missing, with its reason. Workers on other machines need the same packages and the reward's code.
    """

    renamed: ClassVar[dict[str, str]] = {"batch": "chunk"}
    kind: Literal["pool"] = Field("pool", description="another reward in several Ray actors")
    reward: AnyReward = Field(description="reward to replicate: {kind: ...}")
    workers: int = Field(2, ge=1, description="copies of the reward")
    address: str | None = Field(
        None, description="address of a Ray cluster (auto, ray://host:10001); null = start a local one"
    )
    cpus: float = Field(1.0, ge=0, description="cluster CPUs per worker")
    gpus: float = Field(0.0, ge=0, description="cluster GPUs per worker; above 0 it scores on cuda")
    chunk: int = Field(16, ge=1, description="samples sent to a worker at a time")
    timeout: float = Field(60.0, gt=0, le=86_400, description="seconds for one such batch")
    start_timeout: float = Field(600.0, gt=0, le=86_400, description="seconds for a new worker to load")
    retries: int = Field(5, ge=0, description="further attempts for samples without a score")
    backoff: float = Field(1.0, ge=0, description="seconds before the second attempt, doubled after each, at most 30")

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Start the workers and wait until one is ready.

        Raises:
            RewardError: Ray is not installed, its cluster cannot be reached, or the reward cannot be built there.
        """
        crew = Crew(self)
        about = crew.describe()

        def function(media: Tensor, prompts: list[str], group: Tensor | None, **inputs: Any) -> Scores:
            parts = parts_of(media, prompts, group, inputs, about["scope"], self.chunk)
            return Dispatcher(crew.score, self.workers, self.retries, self.backoff)(parts)

        wants, known = about["wants"], about["fingerprint"]
        return Reward(
            about["name"],
            function,
            about["range"],
            wants=wants,
            scope=about["scope"],
            fingerprint=lambda: known,
            apart=about["apart"],
        )


@dataclass
class Worker:
    """An actor, and whether it may still be loading."""

    actor: Any
    new: bool = True


class Crew:
    """The actors of one pool; whoever is idle gets the next part."""

    def __init__(self, settings: Pool) -> None:
        ray = optional("ray", "reward 'pool'", RewardError)

        self.settings, self.ray = settings, ray
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # whoever wants to be counted says so
            own = {} if settings.address else {"num_cpus": math.ceil(settings.workers * settings.cpus) or 1}
            try:
                ray.init(
                    settings.address or "local",
                    include_dashboard=None if settings.address else False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    **own,
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise RewardError(f"reward 'pool': no Ray cluster at {settings.address}: {error}") from None
        self.remote = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus)(pool_worker.PoolWorker)
        self.idle: queue.Queue[Worker] = queue.Queue()
        for _ in range(settings.workers):
            self.idle.put(self._hire())

    def _hire(self) -> Worker:
        place = "cuda" if self.settings.gpus else "cpu"
        return Worker(self.remote.remote(self.settings.reward.model_dump(mode="json"), place))

    def describe(self) -> dict[str, Any]:
        """What the workers score with."""
        worker = self.idle.get()
        try:
            return self.ray.get(worker.actor.describe.remote(), timeout=self.settings.start_timeout)
        except self.ray.exceptions.GetTimeoutError:
            limit = f"{self.settings.start_timeout:g} s"
            raise RewardError(
                f"reward 'pool': no worker was ready after {limit}; does the cluster have "
                f"{self.settings.cpus:g} CPUs and {self.settings.gpus:g} GPUs for each?"
            ) from None
        except self.ray.exceptions.RayError as error:
            raise RewardError(f"reward 'pool': a worker could not start: {_innermost(error)}") from None
        finally:
            self.idle.put(worker)

    def score(self, part: Part) -> Scores:
        """Scores of a part by an idle worker.

        Raises:
            UnansweredError: it died or took too long; another has taken its place.
            RewardError: the reward refuses such media.
        """
        import torch

        worker = self.idle.get()
        limit = self.settings.start_timeout if worker.new else self.settings.timeout
        arrays = {name: _plain(value) for name, value in {"media": part.media, **part.inputs}.items()}
        asked = worker.actor.score.remote(arrays, part.prompts, _plain(part.group))
        try:
            values, reasons, parts = self.ray.get(asked, timeout=limit)
            worker.new = False
        except self.ray.exceptions.GetTimeoutError:
            worker = self._replace(worker)
            raise UnansweredError(f"a worker of the pool took more than {limit:g} s") from None
        except self.ray.exceptions.RayTaskError as error:
            worker.new = False
            if isinstance(error.cause, RewardError):
                raise RewardError(str(error.cause)) from None
            raise UnansweredError(f"a worker of the pool failed: {_innermost(error)}") from None
        except self.ray.exceptions.RayError as error:
            worker = self._replace(worker)
            raise UnansweredError(f"a worker of the pool died: {_innermost(error)}") from None
        finally:
            self.idle.put(worker)
        return Scores(torch.tensor(values), reasons, {name: torch.tensor(column) for name, column in parts.items()})

    def _replace(self, worker: Worker) -> Worker:
        self.ray.kill(worker.actor)
        return self._hire()


def _plain(value: Any) -> Any:
    """Tensors as float32 or integer arrays, which Ray hands over without a copy."""
    if value is None or isinstance(value, list):
        return value
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()


def _innermost(error: Any) -> str:
    """What Ray tells in its first line, or, where it prints a traceback of a worker, in that's last."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    return lines[-1] if any(line.startswith("File ") for line in lines) else lines[0]
