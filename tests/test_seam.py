"""The seam between recipes and the trainer: what is scored, filtered, looked at once, and declared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_recipes
import torch
from pydantic import ValidationError
from tiny_run import final_tensors, redness, settings
from torch import Tensor

from align.data.media import from_bytes, to_bytes
from align.maths.filters import uninformative
from align.policy.build import add_trained, build_generator, build_rewards, build_roles
from align.rollout.bench import Bench, Point
from align.training.trainer import train
from alignflow.errors import TrainingError


def solved_cats(media: Tensor, prompts: list[str]) -> Tensor:
    """0.95 for every cat, ``redness`` for the rest."""
    return torch.where(torch.tensor(["cat" in prompt for prompt in prompts]), 0.95, redness(media, prompts))


def solved(media: Tensor, prompts: list[str]) -> Tensor:
    """The best score for everything."""
    return torch.ones(len(prompts))


def test_solved_groups_are_uninformative() -> None:
    nan = float("nan")
    rewards = torch.tensor([0.95, 0.95, 0.80, 1.00, 0.50, 0.50, 0.95, nan, nan, nan])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    found = uninformative(rewards, group, mean_above=0.9, std_below=0.05)
    assert found.tolist() == [True, True, False, False, False, False, True, True, False, False]
    # group 1 has mean 0.9 and deviation 0.1
    assert uninformative(rewards, group, 0.89, 0.11).tolist()[2:4] == [True, True]
    assert uninformative(rewards, group, 0.91, 0.11).tolist()[2:4] == [False, False]


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "train"]


@pytest.mark.few(1)
@pytest.mark.parametrize("ban", [True, False])
def test_solved_groups_are_void_and_their_prompts_banned(ban: bool, model: Path, tmp_path: Path) -> None:
    runs = []
    for name, parts in (("whole", [4]), ("resumed", [2, 4])):
        (tmp_path / name).mkdir()
        for steps in parts:
            config = settings(
                tmp_path / name, model, reward={"kind": "test_seam:solved_cats"}, prompts={"heldout": None},
                rollout={"prompts": 3, "filter": {"ban": ban}}, train={"steps": steps},
            )  # fmt: skip
            train(config, resume=steps > parts[0])
        runs.append(config)
    rows = rows_of(runs[0].run_dir)
    assert all(row["missing"] == 0 for row in rows)
    assert sum(row["void_groups"] for row in rows) == (1 if ban else 2)  # six prompts, three a step: two passes
    assert [row["banned_prompts"] for row in rows][-1] == int(ban)
    assert all(row["grad_norm"] > 0 for row in rows)
    whole, resumed = (final_tensors(run) for run in runs)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_rollout_of_void_groups_teaches_nothing_and_no_prompt_left_stops(model: Path, tmp_path: Path) -> None:
    reward, heldout = {"kind": "test_seam:solved"}, {"heldout": None}
    config = settings(tmp_path, model, reward=reward, prompts=heldout, rollout={"filter": {"ban": False}})
    train(config)
    assert [row["void_groups"] for row in rows_of(config.run_dir)] == [2, 2, 2]
    assert [row["loss"] for row in rows_of(config.run_dir)] == [None] * 3
    (tmp_path / "banned").mkdir()
    config = settings(tmp_path / "banned", model, reward=reward, prompts=heldout, rollout={"filter": {}})
    with pytest.raises(TrainingError, match=r"rollout.filter has banned every training prompt.*rollout.filter.ban"):
        train(config)


@pytest.mark.parametrize("chunk", [1000, 3])
def test_scores_of_steps_and_one_look(chunk: int, model: Path, tmp_path: Path) -> None:
    """Each step's score is the reward of the sample it predicts; the last step's prediction is the sample itself."""
    tiny_recipes.SEEN.clear()
    sampler = {"kind": "flow_sde", "steps": 3, "window": {"strategy": "random", "size": 3}}
    config = settings(
        tmp_path, model, {"kind": "tiny_recipes:Recording", "timesteps": 2}, prompts={"heldout": None},
        rollout={"sampler": sampler}, train={"steps": 1, "updates": 2, "chunk": chunk},
    )  # fmt: skip
    train(config)
    scores, group = tiny_recipes.SEEN["scores"][0]
    assert scores.steps.shape == (8, 3)
    assert group.tolist() == [0] * 4 + [1] * 4
    rollout, terms = tiny_recipes.SEEN["loss"][0]
    generator = build_generator(config.generator, config.memory, "cpu")
    for step in range(3):
        with torch.no_grad():
            media = from_bytes(to_bytes(generator.decode(rollout.trajectory.x0[:, step])))
        torch.testing.assert_close(scores.steps[:, step], redness(media, rollout.prompts))
    assert scores.steps.std() > 1e-4
    looked = torch.cat(tiny_recipes.SEEN["look"])
    assert looked.tolist() == list(range(8))  # once a rollout, whatever the number of updates and chunks
    for rollout, terms in tiny_recipes.SEEN["loss"]:
        assert rollout.seen["number"].tolist() == list(range(8))
        assert (rollout.seen["weight"] == rollout.seen["weight"][0]).all()
        assert type(terms).__name__ == "NoisedTerms"
        assert len(terms) <= chunk


def test_one_point_costs_one_call_a_role(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, {"kind": "nft", "kl": 0.1})
    generator = build_generator(config.generator, config.memory, "cpu", training=True)
    add_trained(config, generator)
    reward = build_rewards({"reward": config.reward}, "cpu")["reward"]
    bench = Bench(generator, build_roles(config, generator), reward=reward)
    point = Point(generator.noise([1, 2]), torch.tensor([0.5, 0.7]), generator.encode(["a cat", "a dog"]))

    def calls(role: str) -> int:
        before = generator.network_calls
        bench.velocity(role, point)
        return generator.network_calls - before

    assert [calls(role) for role in ("policy", "behaviour", "reference", "policy")] == [2, 0, 0, 0]
    bench.roles.policy_changed()
    assert [calls(role) for role in ("behaviour", "reference")] == [0, 0]  # known at this point
    point = point[torch.tensor([0, 1])]
    assert [calls(role) for role in ("policy", "behaviour", "behaviour", "reference")] == [2, 2, 0, 2]
    assert bench.velocity("policy", point).requires_grad
    assert not bench.velocity("behaviour", point).requires_grad


BAD = [
    ({"kind": "grpo"}, {"rollout": {"sampler": {"kind": "ode", "steps": 3}}}, "rollout.sampler.kind", "stochastic"),
    (
        {"kind": "tiny_recipes:Recording"},
        {"rollout": {"sampler": {"kind": "ode", "steps": 3}}},
        "sampler.kind",
        "needs",
    ),
    (
        {"kind": "nft"},
        {"rollout": {"overlap": "next", "filter": {"ban": True}}},
        "rollout.filter.ban",
        "sampled before this one's groups are filtered",
    ),
]


@pytest.mark.parametrize(("recipe", "sections", "path", "words"), BAD)
def test_needs_that_are_not_met_are_said_with_their_place(
    recipe: dict[str, Any], sections: dict[str, Any], path: str, words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        settings(tmp_path, model, recipe, **sections)
    assert path in str(caught.value)
