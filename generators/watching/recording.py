"""Recording of a diffusers pipeline as it samples: every network call and every scheduler step.

The pipeline's own code runs unmodified. Its scheduler is replaced by a copy whose ``step`` also writes things down, and
its denoiser carries hooks; both are taken off again, whatever happens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from alignflow.errors import EarlyExit
from generators.errors import GeneratorError

DENOISERS = ("transformer", "unet", "transformer_2")  # components that may be called once a step


@dataclass
class Call:
    """One call of the denoiser: every argument by its name, and the first tensor it returned."""

    arguments: dict[str, Any]
    output: Tensor | None = None


@dataclass
class Step:
    """One scheduler step: velocity as the scheduler got it, state before and after, noise levels before and after."""

    calls: list[Call]
    output: Tensor
    before: Tensor
    after: Tensor
    sigma: float
    next_sigma: float


@dataclass
class Tape:
    """A run of a pipeline: its steps, the times of its grid."""

    steps: list[Step] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    sigmas: Tensor | None = None


def stacked(value: Any) -> Any:
    """A list of tensors of one shape as one tensor; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(v, Tensor) and v.shape == value[0].shape for v in value):
        return torch.stack(value)
    return value


class LeaveError(EarlyExit):
    """Raised inside a pipeline to leave it once everything needed is recorded."""


def denoiser(pipeline: Any) -> nn.Module:
    """The network a pipeline calls at every step.

    Raises:
        GeneratorError: it has none of :data:`DENOISERS`, or two that share the work.
    """
    found = {name: part for name in DENOISERS if isinstance(part := getattr(pipeline, name, None), nn.Module)}
    if not found:
        raise GeneratorError(f"{type(pipeline).__name__} has no network to train ({', '.join(DENOISERS)})")
    if len(found) > 1:
        raise GeneratorError(
            f"{type(pipeline).__name__} samples with {' and '.join(found)}: experts by time need their own adapter"
        )
    return next(iter(found.values()))


@contextmanager
def recording(
    pipeline: Any,
    *,
    stop_after: int | None = None,
    forced: Tensor | None = None,
    stub: Callable[[dict[str, Any]], Tensor] | None = None,
) -> Iterator[Tape]:
    """Writes down what ``pipeline`` does inside the block.

    Raises GeneratorError for a scheduler without noise levels.

    Args:
        stop_after: leave the pipeline at this network call, before it is made.
        forced: what every scheduler step answers instead of its own result.
        stub: answers in the network's place, given the arguments by name.
    """
    network = denoiser(pipeline)
    tape, original, forward = Tape(), pipeline.scheduler, network.forward
    bind = inspect.signature(forward)

    def call(*args: Any, **kwargs: Any) -> Any:
        made = Call(dict(bind.bind(*args, **kwargs).arguments))
        made.arguments.update(made.arguments.pop("kwargs", {}))
        made.arguments = tree_map_only(Tensor, torch.clone, made.arguments)  # some pipelines write into them later
        tape.calls.append(made)
        if stop_after is not None and len(tape.calls) >= stop_after:
            raise LeaveError
        out = Transformer2DModelOutput(stub(made.arguments)) if stub else forward(*args, **kwargs)
        made.output = stacked(out[0])
        return out

    network.forward = call  # type: ignore[method-assign]
    pipeline.scheduler = watched(original, tape, forced)
    try:
        yield tape
    except LeaveError:
        pass
    finally:
        pipeline.scheduler = original
        del network.forward


def watched(original: Any, tape: Tape, forced: Tensor | None) -> Any:
    """A copy of a scheduler that writes its steps down, and answers ``forced`` where that is given."""
    scheduler = copy.deepcopy(original)
    step = scheduler.step

    def stepped(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(scheduler, "sigmas"):
            raise GeneratorError(
                f"{type(scheduler).__name__} counts no noise levels: a flow-matching scheduler is needed"
            )
        tape.sigmas = scheduler.sigmas.detach().float().cpu().clone()
        before = sample.clone()
        out = step(model_output, timestep, sample, *args, **kwargs)
        after = out[0] if isinstance(out, tuple) else out.prev_sample
        done = sum(len(s.calls) for s in tape.steps)
        index = len(tape.steps) if getattr(scheduler, "step_index", None) is None else scheduler.step_index - 1
        sigma, following = (float(tape.sigmas[i]) for i in (index, index + 1))
        tape.steps.append(Step(tape.calls[done:], model_output, before, after, sigma, following))
        if forced is None:
            return out
        return (forced.to(after.dtype),) if isinstance(out, tuple) else type(out)(prev_sample=forced.to(after.dtype))

    scheduler.step = stepped
    return scheduler
