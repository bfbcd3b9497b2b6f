"""Rewards: media and prompts in, scores out. A file here with a subclass of ``RewardSettings`` is a reward.

Importing this package, and reading the settings of every reward, imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BeforeValidator, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from alignflow.words import KINDS, close, listing
from rewards.base import Reward, RewardError, RewardSettings, Scores

__all__ = ["AnyReward", "Reward", "RewardError", "RewardSettings", "Scores", "kinds", "parse"]

_HOLDS_SETTINGS = re.compile(r"^class \w+\(\w*RewardSettings\)", re.MULTILINE)


@cache
def kinds() -> dict[str, type[RewardSettings]]:
    """Kind -> settings class, from the files of this folder; other files are not imported."""
    found: dict[str, type[RewardSettings]] = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        if not _HOLDS_SETTINGS.search(file.read_text(encoding="utf-8")):
            continue
        module = import_module(f"rewards.{file.stem}")
        for value in vars(module).values():
            if not (
                isinstance(value, type) and issubclass(value, RewardSettings) and value.__module__ == module.__name__
            ):
                continue
            if "kind" not in value.model_fields:  # what several rewards share
                continue
            kind = value.model_fields["kind"].annotation
            for name in get_args(kind) if get_origin(kind) is Literal else ():
                assert name not in found, f"two rewards are called {name!r}: {found[name]} and {value}"
                found[name] = value
    return found


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
        near = close(kind, kinds())
        hint = f"; did you mean {near[0]!r}?" if near else ""
        said = "is missing" if kind is None else f"no such reward {kind!r:.80}{hint}"
        there = listing(kinds(), kind, KINDS)
        raise _problem(("kind",), f"{said}; there are {there}, or package.module:name", kind)
    return kinds()[kind].model_validate(dict(data))


def _problem(loc: tuple[str, ...], message: str, value: Any) -> ValidationError:
    # braces in the message are its own, not a template's
    kind = PydanticCustomError("setting", "{message}", {"message": message})
    return ValidationError.from_exception_data("reward", [InitErrorDetails(type=kind, loc=loc, input=value)])


AnyReward = Annotated[SerializeAsAny[RewardSettings], BeforeValidator(parse)]
"""Type of a field that holds any reward's settings, for rewards made of rewards."""
