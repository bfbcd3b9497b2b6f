"""``memory.rewards``: which rewards compute on the CPU, their line of the estimate, and a run with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from tiny_run import final_tensors, policy_gap, settings

from align.checking import estimate, remedies
from align.config.load import load_config, load_settings
from align.config.memory import placed
from align.config.needs import followed
from align.policy.build import build_rewards
from align.runs.identity import MEMORY_ALONE, under
from align.search.run import load
from align.search.settings import SearchConfig
from align.training.trainer import train
from generators.settings import Memory
from rewards.base import Reward, RewardSettings

CPU = Memory(rewards="cpu")
VIT_H = 986_109_441


class Located(RewardSettings):
    """A reward that keeps the devices on which it was built"""

    kind: Literal["located"] = "located"
    number: int = 0
    built: ClassVar[list[tuple[int, str]]] = []

    def build(self, device: Any = "cpu") -> Reward:
        self.built.append((self.number, torch.device(device).type))
        return Reward("located", lambda media, *_: media.flatten(1).mean(1))


def test_rewards_are_built_where_the_memory_settings_put_them(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"reward": Located(number=1), "same": Located(number=1), "other": Located(number=2), "none": None}
    for memory, gradient, expected in [
        (Memory(), None, [(1, "meta"), (2, "meta")]),
        (CPU, None, [(1, "cpu"), (2, "cpu")]),
        (CPU, named["reward"], [(1, "meta"), (2, "cpu")]),
    ]:
        monkeypatch.setattr(Located, "built", [])
        ready = build_rewards(named, "meta", memory, followed=gradient)
        assert Located.built == expected
        assert [*ready] == ["reward", "same", "other"]
        assert ready["reward"] is ready["same"]


def test_media_are_copied_to_the_cpu() -> None:
    ready = build_rewards({"one": Located()}, "meta", CPU)["one"]
    assert ready(torch.full((2, 3, 4, 4), 0.25), ["a", "b"]).values.tolist() == [0.25, 0.25]


def rewards_of(name: str, *overrides: str) -> Any:
    config = load_config(f"configs/sd35-medium/{name}.yaml", list(overrides))
    return next(item for item in estimate.estimate(config).kept if item.name == "rewards")


def test_the_estimate_counts_what_stays_on_the_card() -> None:
    assert rewards_of("nft").bytes == 2 * 2 * VIT_H
    line = rewards_of("nft", "memory.rewards=cpu")
    assert (line.bytes, line.how) == (0, "on the CPU")
    line = rewards_of("reward_backprop", "memory.rewards=cpu")  # PickScore is trained on and held out
    assert line.bytes == 2 * VIT_H
    said = "pick_score 986 million weights, bfloat16, as reward_backprop follows its gradient; others on the CPU"
    assert line.how == said


def test_only_recipes_that_follow_a_gradient_keep_their_reward() -> None:
    for name, follows in [("nft", False), ("grpo", False), ("reward_backprop", True), ("srpo", True)]:
        config = load_config(f"configs/sd35-medium/{name}.yaml", ["memory=12gb"])
        assert followed(config) == (config.reward if follows else None)
        assert placed({"reward": config.reward}, config.memory, followed(config))["reward"].kind == (
            config.reward.kind if follows else "placed"
        )


@pytest.mark.parametrize(("name", "follows"), [("search_reno", True), ("search", False)])
def test_a_search_with_gradients_keeps_its_reward(name: str, follows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def stopped(*given: Any, **how: Any) -> None:
        seen.update(how, memory=given[2])
        raise InterruptedError

    monkeypatch.setattr("align.search.run.build_rewards", stopped)
    config = load_settings(f"configs/shapes/{name}.yaml", ["memory.rewards=cpu"], SearchConfig)
    with pytest.raises(InterruptedError):
        load(config, [])
    assert seen == {"memory": config.memory, "followed": config.reward if follows else None}


def test_it_is_a_remedy_where_it_moves_something() -> None:
    def proposed(*overrides: str) -> bool:
        config = load_config("configs/sd35-medium/nft.yaml", list(overrides))
        return any(one.change == "memory.rewards=cpu" for one in remedies.remedies(config))

    assert proposed()
    assert not proposed("memory.rewards=cpu")
    assert not proposed("generator.device=cpu")


def test_a_resumed_run_may_change_every_memory_setting_but_the_weights() -> None:
    fixed = [name for name in Memory.model_fields if not under(f"memory.{name}", MEMORY_ALONE)]
    assert fixed == ["quantise", "compute"]


@pytest.mark.parametrize("recipe", ["grpo", "reward_backprop"])
def test_a_run_learns_the_same(recipe: str, model: Path, tmp_path: Path) -> None:
    found = []
    for place in ("device", "cpu"):
        (tmp_path / place).mkdir()
        config = settings(tmp_path / place, model, recipe, train={"steps": 1}, memory={"rewards": place})
        train(config)
        found.append(final_tensors(config))
    assert policy_gap(*found) == 0
