"""Checks around every reward call: shapes are validated, a failure becomes NaN with a reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from alignflow.secrets import shown
from alignflow.text import line_of
from rewards.guard import foreign, lend
from rewards.scores import RewardError, RewardExitError, Scores

logger = logging.getLogger(__name__)
_RAISED: ContextVar[bool] = ContextVar("exceptions_raised", default=False)


class Scorer(Protocol):
    """The object that is called and checked: a :class:`rewards.base.Reward`."""

    @property
    def name(self) -> str: ...

    @property
    def function(self) -> Callable[..., Any]: ...

    @property
    def differentiable(self) -> bool: ...

    @property
    def wants(self) -> tuple[str, ...]: ...


@contextmanager
def exceptions_raised() -> Iterator[None]:
    """Inside, an exception of code from outside this package is a RewardError and not a missing score."""
    token = _RAISED.set(True)
    try:
        yield
    finally:
        _RAISED.reset(token)


def checked_scores(
    reward: Scorer,
    media: Tensor,
    prompts: list[str],
    group: Tensor | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Scores:
    """Call ``reward`` and turn its result or exception into :class:`Scores`.

    Args:
        media: ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` float in [0, 1].
        prompts: N prompts.
        group: ``[N]`` prompt number of each sample, or None.
        inputs: name -> input of the N prompts; the reward receives those in its ``wants``.

    Returns:
        values ``[N]`` float32, on the CPU without graph unless the reward is differentiable. A value is NaN, with a
        reason, if the reward returned NaN, infinity or None; all values are NaN if it raised an exception. The
        reason then names the line, where the reward is code from outside this package.

    Raises:
        RewardError: media or the returned scores have the wrong shape, an input is missing, the reward modified its
            arguments, or it raised RewardError itself, or anything inside :func:`exceptions_raised`.
    """
    _check_inputs(reward, media, prompts, group)
    count = len(prompts)
    wanted = {name: _input(reward, inputs or {}, name, media, count) for name in reward.wants}
    loan, lent = lend(reward.name, reward.function, {"media": media, "group": group, **wanted})
    try:
        with nullcontext() if reward.differentiable else torch.no_grad():
            result = reward.function(lent.pop("media"), list(prompts), lent.pop("group"), **lent)
    except RewardError:
        raise
    except SystemExit as error:
        raise RewardExitError(
            f"reward {reward.name!r} called sys.exit({error.code!r}); it should return scores or raise an exception"
        ) from error
    except Exception as error:
        logger.debug("reward %s failed", reward.name, exc_info=True)
        place = line_of(error) if foreign(reward.function) else ""
        why = shown(f"{type(error).__name__}: {error}" + (f" ({place})" if place else ""))
        loan.check()
        if _RAISED.get() and foreign(reward.function):
            said = "a sample without a score is NaN in what it returns"
            raise RewardError(f"reward {reward.name!r} fails on a grey sample: {why}; {said}") from error
        return Scores(torch.full((count,), torch.nan), dict.fromkeys(range(count), why))
    loan.check()
    return _whole(reward, result if isinstance(result, Scores) else Scores(result), media)


def _whole(reward: Scorer, scores: Scores, media: Tensor) -> Scores:
    """The scores as float32 vectors, NaN with a reason where one is missing; RewardError if they are malformed."""
    count = len(media)
    for what, given in (("reasons", scores.reasons), ("parts", scores.parts)):
        if not isinstance(given, Mapping):
            raise RewardError(f"reward {reward.name!r}: {what} should be a mapping, got {type(given).__name__}")
    values = _as_vector(reward, scores.values, count, "scores")
    if not reward.differentiable:
        values = values.detach().cpu()
    parts = {
        name: _as_vector(reward, part, count, f"part {name!r}").detach().cpu().clone()  # it may belong to the reward
        for name, part in scores.parts.items()
    }
    reasons = _reasons(values, scores.reasons, media)
    return Scores(torch.where(values.isfinite(), values, torch.nan), reasons, parts)


def _check_inputs(reward: Scorer, media: Any, prompts: list[str], group: Tensor | None) -> None:
    good = isinstance(media, Tensor) and media.ndim in (4, 5) and media.shape[-3] == 3 and media.is_floating_point()
    if not good:
        given = f"{media.dtype} {list(media.shape)}" if isinstance(media, Tensor) else type(media).__name__
        raise RewardError(f"reward {reward.name!r}: media should be float [N, 3, H, W] or [N, F, 3, H, W], got {given}")
    if len(media) and not media.numel():
        raise RewardError(f"reward {reward.name!r}: media {list(media.shape)} have no pixels")
    lengths = [len(media), len(prompts), *([] if group is None else [len(group)])]
    if len(set(lengths)) > 1:
        raise RewardError(f"reward {reward.name!r}: media, prompts and group should have equal lengths, got {lengths}")


def _input(reward: Scorer, inputs: Mapping[str, Any], name: str, media: Tensor, count: int) -> Any:
    """The prompts' input ``name``, on the device of the media."""
    if name not in inputs:
        raise RewardError(f"reward {reward.name!r} needs {name!r} with every prompt, but there is none")
    value = inputs[name]
    if len(value) != count:
        raise RewardError(f"reward {reward.name!r}: {count} prompts, but {len(value)} of {name!r}")
    return value.to(media.device) if isinstance(value, Tensor) else value


def _as_vector(reward: Scorer, values: Any, count: int, what: str) -> Tensor:
    """Tensor, array or sequence of numbers (None = no score) -> float32 ``[count]``."""
    if isinstance(values, list | tuple):
        if values and all(isinstance(value, Tensor) and value.ndim == 0 for value in values):
            values = torch.stack(values)  # keeps the graph
        else:
            values = [torch.nan if value is None else value for value in values]
    try:
        vector = torch.as_tensor(values).to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"reward {reward.name!r}: {what} should be {count} numbers, got {type(values).__name__} ({error})"
        ) from error
    if vector.shape != (count,):
        raise RewardError(f"reward {reward.name!r}: {what} should have shape [{count}], got {list(vector.shape)}")
    return vector


def _reasons(values: Tensor, given: Mapping[int, str], media: Tensor) -> dict[int, str]:
    """A reason for every value that is not finite: the reward's own, if it gave one."""
    found = {}
    for index in (~values.isfinite()).nonzero().flatten().tolist():
        broken = not bool(media[index].isfinite().all())
        said = "the media hold NaN or infinity" if broken else f"the reward returned {values[index].item()}"
        found[index] = shown(given.get(index, said))
    return found
