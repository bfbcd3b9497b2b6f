"""What must be scored together is known from settings, and searches refuse rewards that compare samples."""

from __future__ import annotations

import pytest

import rewards
from align.search.driver import check_alone
from alignflow.errors import SearchError
from rewards.base import Reward

GROUPED = {"kind": "mixture", "parts": {"a": {"reward": "shapes", "normalise": "group"}}}


@pytest.mark.parametrize(
    ("settings", "scope"),
    [
        ("shapes", "sample"),
        ("pairwise", "group"),
        ({"kind": "placed", "reward": "pairwise"}, "group"),
        ({"kind": "segmental", "reward": "shapes"}, "sample"),
        ({"kind": "pool", "reward": GROUPED}, "group"),
        ({"kind": "consistent", "reward": "clip"}, "group"),
        (GROUPED, "group"),
        ({"kind": "mixture", "parts": {"a": {"reward": "shapes", "normalise": "batch"}}}, "batch"),
        ({"kind": "mixture", "parts": {"a": {"reward": GROUPED}}}, "group"),
        ({"kind": "mixture", "how": "log_tamed", "parts": {"a": {"reward": "m:f"}}}, "batch"),
        ({"kind": "mixture", "parts": {"a": {"reward": "m:f"}}}, None),
        ({"kind": "mixture", "parts": {"a": {"reward": "m:f"}, "b": {"reward": "pairwise"}}}, "group"),
        ({"kind": "m:f", "scope": "batch"}, "batch"),
        ("m:f", None),
        ({"kind": "remote", "url": "http://127.0.0.1:1"}, None),
    ],
)
def test_scopes_are_known_before_anything_is_built(settings: object, scope: str | None) -> None:
    assert rewards.parse(settings).compares() == scope


def test_declared_scopes_are_those_of_the_built_rewards() -> None:
    for settings in (GROUPED, "shapes", {"kind": "placed", "reward": GROUPED}, {"kind": "cached", "reward": "shapes"}):
        parsed = rewards.parse(settings)
        assert parsed.compares() == parsed.build().scope


def test_a_search_refuses_what_only_the_built_reward_tells() -> None:
    with pytest.raises(SearchError, match="'mine' compares samples of a group with one another"):
        check_alone(Reward("mine", lambda *_: [], scope="group"))
    check_alone(Reward("mine", lambda *_: []))
