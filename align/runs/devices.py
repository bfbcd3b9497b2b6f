"""Validation of devices in settings, with the same messages in every command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignflow.devices import absent, unusable
from alignflow.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch


def problems(setting: str, name: str) -> list[Problem]:
    """Problems of a device that a setting names, for ``check``, without torch."""
    wrong = None if name in ("auto", "cpu") else absent(name)
    return [Problem(setting, wrong)] if wrong else []


def said(name: str) -> str:
    """The device for a line of ``check``, with what only a run can find out."""
    known = name in ("auto", "cpu") or absent(name) is not None
    return name if known else f"{name} (whether this machine has it shows when it runs)"


def require(name: str, setting: str = "generator.device") -> torch.device:
    """The device of this name.

    Raises:
        ConfigError: it is malformed, or this machine lacks it; names the setting.
    """
    import torch

    if wrong := unusable(name):
        raise ConfigError([Problem(setting, wrong)])
    return torch.device(name)


def chosen(name: str, setting: str = "generator.device") -> torch.device:
    """The device that a command uses: the one of this name or, for ``auto``, what accelerate would choose.

    Raises:
        ConfigError: it is malformed, or this machine lacks it; names the setting.
    """
    if name != "auto":
        return require(name, setting)
    from accelerate import PartialState

    return PartialState().device
