"""Rewards: media and prompts in, scores out. Each file in its subfolders is a reward.

Importing this package, and reading the settings of every reward, imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from alignflow.folders import classes_in
from alignflow.kinds import nearest
from alignflow.words import KINDS, listing
from rewards.base import Reward, RewardError, RewardSettings, Scores

__all__ = ["AnyReward", "Reward", "RewardError", "RewardSettings", "Scores", "kinds", "parse"]

ROOMS = ("encoders", "questions", "verifiers", "video", "wrappers", "learned")
"""Folders whose every file is a reward."""


@cache
def kinds() -> dict[str, type[RewardSettings]]:
    """Kind -> settings class, from the files of :data:`ROOMS`.

    Raises:
        ImportError: a file there defines no reward, or two rewards have one kind.
    """
    found: dict[str, type[RewardSettings]] = {}
    for room in ROOMS:
        for kind, cls in classes_in(import_module(f"rewards.{room}"), RewardSettings).items():
            if kind in found:
                raise ImportError(f"two rewards are called {kind!r}: {found[kind]} and {cls}")
            found[kind] = cls
    return dict(sorted(found.items()))


def parse(data: Any) -> RewardSettings:
    """A mapping with ``kind``, or the kind alone -> settings; settings pass through.

    Raises:
        pydantic.ValidationError: unknown kind or key, wrong value; ``loc`` leads to it.
    """
    if isinstance(data, RewardSettings):
        return data
    if isinstance(data, str):
        data = {"kind": data}
    if not isinstance(data, Mapping):
        raise _problem((), f"should be a mapping with a kind ({listing(kinds())})", data)
    kind = data.get("kind")
    if isinstance(kind, str) and ":" in kind:
        from rewards.call import CallableReward

        return CallableReward.model_validate(dict(data))
    if not isinstance(kind, str) or kind not in kinds():
        others = f"there are {listing(kinds(), kind, KINDS)}, or package.module:name"
        said = f"is missing; {others}" if kind is None else f"no such reward{nearest(kind, kinds(), others)}"
        raise _problem(("kind",), said, kind)
    return kinds()[kind].model_validate(dict(data))


def _problem(loc: tuple[str, ...], message: str, value: Any) -> ValidationError:
    # braces in the message are its own, not a template's
    kind = PydanticCustomError("setting", "{message}", {"message": message})
    return ValidationError.from_exception_data("reward", [InitErrorDetails(type=kind, loc=loc, input=value)])


AnyReward = Annotated[SerializeAsAny[RewardSettings], BeforeValidator(parse)]
"""Type of a field that holds any reward's settings, for rewards made of rewards."""
