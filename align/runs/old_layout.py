"""Reading of checkpoints that were written before a run could have several learners.

They hold one learner, without its name, and call two roles otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

COUNTERS = ("updates", "skipped", "overflows")


def converted(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], state: Any, anchor: bool
) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """Manifest, tensors and state of the optimizer in today's layout.

    Args:
        anchor: whether the run has a reference that moves; its role was called ``old`` too.
    """
    names = {"old": "anchor" if anchor else "behaviour", "ref": "reference"}
    counters = dict(about["counters"])
    counters["learners"] = {"policy": {name: counters.pop(name, 0) for name in COUNTERS}}
    versions = {names.get(role, role): version for role, version in about["roles"].items()}
    moved = {}
    for key, value in tensors.items():
        role, _, name = key.partition("/")
        moved[f"policy/{names.get(role, role)}/{name}"] = value
    if isinstance(state, dict) and "optimizer" in state:
        state = dict(state)
        policy = {name: state.pop(name) for name in ("optimizer", "scaler") if name in state}
        state["learners"] = {"policy": policy}
    return {**about, "counters": counters, "roles": {"policy": versions}}, moved, state
