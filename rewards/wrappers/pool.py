"""A reward replicated in several Ray actors, on this machine or on a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards import AnyReward
from rewards.base import Reward, RewardError, Scores, WrapperSettings
from rewards.parts import parts_of
from rewards.serving.crew import Crew, Workers
from rewards.serving.dispatch import Dispatcher

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.parts import Part
    from rewards.serving import pool_worker
else:
    pool_worker = lazy("rewards.serving.pool_worker")


class Pool(Workers, WrapperSettings):
    """Another reward in several Ray actors, on this machine or across a cluster.

    A worker that dies or does not answer in time is replaced, and its samples are scored by another; what stays
    unanswered is missing, with its reason. Workers on other machines need the same packages and the reward's code.
    """

    renamed: ClassVar[dict[str, str]] = {"batch": "chunk"}
    kind: Literal["pool"] = Field("pool", description="another reward in several Ray actors")
    reward: AnyReward = Field(description="reward to replicate: {kind: ...}")
    chunk: int = Field(16, ge=1, description="samples sent to a worker at a time")

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Start the workers and wait until one is ready.

        Raises:
            RewardError: Ray is not installed, its cluster cannot be reached, or the reward cannot be built there.
        """
        crew = RewardCrew(self)
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


class RewardCrew(Crew):
    """The actors of one pool."""

    def __init__(self, settings: Pool) -> None:
        plain = settings.reward.model_dump(mode="json")
        super().__init__(settings, "reward 'pool'", RewardError, pool_worker.PoolWorker, plain)

    def score(self, part: Part) -> Scores:
        """Scores of a part by an idle worker; raises as :meth:`~rewards.serving.crew.Crew.ask`."""
        import torch

        arrays = {name: _plain(value) for name, value in {"media": part.media, **part.inputs}.items()}
        values, reasons, parts = self.ask(
            lambda worker: worker.actor.score.remote(arrays, part.prompts, _plain(part.group))
        )
        return Scores(torch.tensor(values), reasons, {name: torch.tensor(column) for name, column in parts.items()})


def _plain(value: Any) -> Any:
    """Tensors as float32 or integer arrays, which Ray passes without a copy."""
    if value is None or isinstance(value, list):
        return value
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()
