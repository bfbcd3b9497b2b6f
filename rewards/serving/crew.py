"""Ray actors of one class: an idle one gets the next call, and one that dies or hangs is replaced."""

from __future__ import annotations

import logging
import math
import os
import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from alignflow.errors import AlignflowError
from alignflow.extras import optional
from alignflow.settings import Settings
from rewards.serving.dispatch import UnansweredError


class Workers(Settings):
    """Actors on this machine or on a Ray cluster, and how long they may take."""

    workers: int = Field(2, ge=1, description="number of actors per process of the run")
    address: str | None = Field(
        None, description="address of a Ray cluster (auto, ray://host:10001); null = start a local one"
    )
    cpus: float = Field(1.0, ge=0, description="cluster CPUs per worker")
    gpus: float = Field(0.0, ge=0, description="cluster GPUs per worker; above 0 it computes on cuda")
    timeout: float = Field(60.0, gt=0, le=86_400, description="seconds for one call of a worker")
    start_timeout: float = Field(600.0, gt=0, le=86_400, description="seconds for a new worker to load")
    retries: int = Field(5, ge=0, description="further attempts for samples that got no answer")
    backoff: float = Field(1.0, ge=0, description="seconds before the second attempt, doubled after each, at most 30")


@dataclass
class Worker:
    """An actor, and whether it may still be loading.

    Args:
        knows: notes of the caller, such as the weights that it has.
    """

    actor: Any
    new: bool = True
    knows: dict[str, Any] = field(default_factory=dict)


class Crew:
    """The actors of one pool.

    Args:
        who: names the pool in messages, such as ``reward 'pool'``.
        error: of a Ray that is missing or cannot be reached, and of an actor that cannot start. Errors of this class
            that an actor raises are raised here, and no other attempt is made.
        actor: class of the actors, with ``describe()``.
        arguments: of the class, besides the device, which comes last.
    """

    def __init__(self, settings: Workers, who: str, error: type[AlignflowError], actor: type, *arguments: Any) -> None:
        ray = optional("ray", who, error)
        self.settings, self.who, self.error, self.ray, self.arguments = settings, who, error, ray, arguments
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
            except (ConnectionError, RuntimeError, ValueError) as reason:
                raise error(f"{who}: no Ray cluster at {settings.address}: {reason}") from None
        self.remote = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus)(actor)
        self.idle: queue.Queue[Worker] = queue.Queue()
        for _ in range(settings.workers):
            self.idle.put(self._hire())

    def _hire(self) -> Worker:
        return Worker(self.remote.remote(*self.arguments, "cuda" if self.settings.gpus else "cpu"))

    def describe(self) -> Any:
        """Description that an actor gives of itself, once one is ready."""
        worker = self.idle.get()
        try:
            return self.ray.get(worker.actor.describe.remote(), timeout=self.settings.start_timeout)
        except self.ray.exceptions.GetTimeoutError:
            limit = f"{self.settings.start_timeout:g} s"
            raise self.error(
                f"{self.who}: no worker was ready after {limit}; does the cluster have "
                f"{self.settings.cpus:g} CPUs and {self.settings.gpus:g} GPUs for each?"
            ) from None
        except self.ray.exceptions.RayError as error:
            raise self.error(f"{self.who}: a worker could not start: {_innermost(error)}") from None
        finally:
            self.idle.put(worker)

    def ask(self, call: Callable[[Worker], Any]) -> Any:
        """The answer of an idle worker.

        Args:
            call: starts the work; returns Ray's reference to the answer.

        Raises:
            UnansweredError: it died or took too long, and another has taken its place; or it failed.
            AlignflowError: of the class ``error``, raised by the actor.
        """
        worker = self.idle.get()
        limit = self.settings.start_timeout if worker.new else self.settings.timeout
        try:
            found = self.ray.get(call(worker), timeout=limit)
            worker.new = False
        except self.ray.exceptions.GetTimeoutError:
            worker = self._replace(worker)
            raise UnansweredError(f"a worker of the pool took more than {limit:g} s") from None
        except self.ray.exceptions.RayTaskError as error:
            worker.new = False
            if isinstance(error.cause, self.error):
                raise self.error(str(error.cause)) from None
            raise UnansweredError(f"a worker of the pool failed: {_innermost(error)}") from None
        except self.ray.exceptions.RayError as error:
            worker = self._replace(worker)
            raise UnansweredError(f"a worker of the pool died: {_innermost(error)}") from None
        finally:
            self.idle.put(worker)
        return found

    def _replace(self, worker: Worker) -> Worker:
        self.ray.kill(worker.actor)
        return self._hire()


def _innermost(error: Any) -> str:
    """Message of Ray's first line or, if it prints a traceback of a worker, of that traceback's last line."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    return lines[-1] if any(line.startswith("File ") for line in lines) else lines[0]
