"""Any Python callable as a reward: ``kind: my_module:function`` or ``kind: path/to/file.py:function``."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationError

from alignflow import plugins
from alignflow.kinds import from_outside
from alignflow.text import first_line, line_of, printable
from rewards.base import INPUTS, Reward, RewardError, RewardSettings, Scope, resolved

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class CallableReward(RewardSettings):
    """Custom code: a function, a class with callable instances, or a subclass of RewardSettings.

    It is called as ``fn(media, prompts)`` and returns N numbers, a tensor ``[N]`` or :class:`~rewards.base.Scores`.
    ``media`` is ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` float in [0, 1]. An argument called ``group``, ``image``,
    ``mask`` or ``metadata`` (see :data:`~rewards.base.INPUTS`) is filled in by name.
    """

    gives_regions: ClassVar[bool] = True  # only building it tells
    kind: str = Field(pattern=r"^[^:]+(:.*)?:[A-Za-z_][\w.]*$", description="package.module:name or path/file.py:name")
    options: dict[str, Any] = Field({}, description="keyword arguments of the function or the class")
    range: tuple[float, float] | None = Field(None, description="[lowest, highest] possible score; null = unbounded")
    differentiable: bool | None = Field(
        None,
        description="whether gradients flow from the scores to the media; null = false, unless the code is a "
        "RewardSettings class, which declares it itself",
    )
    scope: Scope | None = Field(
        None,
        description="samples that must be scored together; null = group if the code has a parameter group, else sample",
    )

    def compares(self) -> Scope | None:
        """Unknown unless it is set, because the code is not imported to find out."""
        return self.scope

    def gradient(self) -> bool | None:
        """Unknown unless it is set, like the scope."""
        return self.differentiable

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Import the code, so that a missing module or option is found before any sample is generated.

        Raises:
            RewardError: module, name or option missing, object not callable, or the code itself fails.
        """
        try:
            return self._build(device)
        except RewardError:
            raise
        except (Exception, SystemExit) as error:
            raise RewardError(f"reward {self.kind!r} cannot be made: {_told(error)}") from error

    def _build(self, device: torch.device | str) -> Reward:
        found = load_object(self.kind)
        given = resolved(self.options, f"reward {self.kind!r}: options")
        if isinstance(found, type) and issubclass(found, RewardSettings):
            self._declares_itself()
            return from_outside(found).model_validate({"kind": self.kind, **given}).build(device)
        if isinstance(found, type):
            where = {"device": device} if "device" in self._signature(found).parameters else {}
            self._accepts(found, **{**where, **given})
            call, options = found(**{**where, **given}), {}
        else:
            call, options = found, given
        free = self._signature(call).parameters.keys() - options.keys()
        takes_group, wants = "group" in free, tuple(name for name in INPUTS if name in free)
        filled = dict.fromkeys([*wants, *(["group"] if takes_group else [])])
        self._accepts(call, None, None, **options, **filled)

        def function(media: Tensor, prompts: list[str], group: Tensor | None, **inputs: Any) -> Any:
            return call(media, prompts, **options, **inputs, **({"group": group} if takes_group else {}))

        name, span = self.kind.rsplit(":", 1)[1], self.range or (-math.inf, math.inf)
        scope = self.scope or ("group" if takes_group else "sample")
        return Reward(name, function, span, bool(self.differentiable), wants, scope, fingerprint=lambda: _source(found))

    def _declares_itself(self) -> None:
        written = [name for name in ("range", "differentiable", "scope") if getattr(self, name) is not None]
        if written:
            raise RewardError(
                f"reward {self.kind!r} is a RewardSettings class, which declares {', '.join(written)} itself"
            )

    def _signature(self, call: Any) -> inspect.Signature:
        if not callable(call):
            raise RewardError(f"reward {self.kind!r} is a {type(call).__name__}, which cannot be called")
        try:
            return inspect.signature(call)
        except ValueError as error:
            raise RewardError(f"reward {self.kind!r}: {error}; call it from your own function") from error

    def _accepts(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        signature = self._signature(call)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            said = f"{self.kind.rsplit(':', 1)[1]}{signature}"
            wanted = "(media, prompts, **options)" if args else "(**options)"
            raise RewardError(f"reward {self.kind!r} is {said} and cannot be called as {wanted}: {error}") from error


def load_object(kind: str) -> Any:
    """The object at ``package.module:name`` or ``path/to/file.py:name``, see :mod:`alignflow.plugins`.

    Raises:
        RewardError: file, module or name missing, or the import fails.
    """
    try:
        return plugins.load(kind)
    except plugins.PluginError as error:
        raise RewardError(str(error)) from error


def _source(found: Any) -> str:
    """Digest of the source of the module with the code; empty if there is none."""
    try:
        text = inspect.getsource(inspect.getmodule(found) or type(found))
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


def _told(error: BaseException) -> str:
    """The error and the line that raised it."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": "), 300)
    place = line_of(error)
    return f"{type(error).__name__}: {first_line(error)}" + (f" ({place})" if place else "")
