"""Settings that change during training: their values, their effect on a run, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import final_tensors, policy_gap, settings

from align.config.load import load_config
from align.maths.schedules import old_policy_decay, stratified_times, unordered, value_at
from align.policy.held import copies
from align.training.trainer import train
from alignflow.errors import ConfigError


def test_a_schedule_is_linear_between_its_points_and_constant_outside() -> None:
    points = [(2, 1.0), (4, 0.0), (5, 3.0)]
    assert [value_at(points, rollout) for rollout in range(7)] == [1.0, 1.0, 1.0, 0.5, 0.0, 3.0, 3.0]
    assert value_at([(3, 0.25)], 0) == value_at([(3, 0.25)], 9) == 0.25
    assert unordered(points) == ""
    assert unordered([(4, 1.0), (4, 0.0)]) == "rollout 4 should stand before the point to its left"


def test_the_published_decays_of_the_old_policy() -> None:
    assert [old_policy_decay("linear", step) for step in (1, 100, 900)] == pytest.approx([0.001, 0.1, 0.5])
    assert [old_policy_decay("delayed", step) for step in (74, 75, 85, 999)] == pytest.approx([0, 0, 0.075, 0.999])
    assert old_policy_decay("on_policy", 500) == 0


def test_stratified_times_have_one_draw_in_every_slice_and_depend_on_their_seed_alone() -> None:
    times = stratified_times([5, 6, 5], 8, (0.2, 0.6))
    edges = 0.2 + 0.4 * torch.arange(9) / 8
    assert ((times >= edges[:-1]) & (times < edges[1:])).all()
    assert torch.equal(times[0], times[2])
    assert not torch.equal(times[0], times[1])
    many = stratified_times(list(range(4000)), 2, (0.0, 1.0))
    assert many.mean(0).tolist() == pytest.approx([0.25, 0.75], abs=0.01)


def test_a_scheduled_weight_is_that_of_the_rollout(model: Path, tmp_path: Path) -> None:
    def weights(name: str, steps: int, **recipe: object) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir()
        config = settings(
            tmp_path / name, model, {"kind": "nft", "timesteps": 2, **recipe}, prompts={"heldout": None},
            train={"steps": steps, "updates": 2, "schedule": "constant"},
        )  # fmt: skip
        train(config)
        return final_tensors(config)

    fixed, constant = weights("fixed", 2, kl=0.5), weights("constant", 2, schedule={"kl": [[0, 0.5]]})
    assert policy_gap(fixed, constant) == 0
    falling = {"kl": [[0, 0.5], [1, 0.0]]}
    assert policy_gap(weights("fixed_1", 1, kl=0.5), weights("falling_1", 1, schedule=falling)) == 0
    assert policy_gap(fixed, weights("falling", 2, schedule=falling)) > 0


def test_a_run_holds_the_roles_that_a_schedule_will_need(model: Path, tmp_path: Path) -> None:
    recipe = {"kind": "grpo", "kl": 0.0, "schedule": {"kl": [[0, 0.0], [5, 0.1]]}}
    config = settings(tmp_path, model, recipe, policy={"kind": "full"}, train={"ema": 0})
    assert config.recipe.at(0).roles(config) == ()
    assert copies(config) == ("reference",)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"ka": [[0, 1.0]]}, "is not a decimal setting of nft; those are kl, beta, advantage_clip"),
        ({"timesteps": [[0, 1.0]]}, "is not a decimal setting"),
        ({"kl": [[3, 0.1], [1, 0.2]]}, "rollout 1 should stand before the point to its left"),
        ({"kl": [[0, -1.0]]}, "greater than or equal to 0"),
        ({"kl": []}, "at least 1"),
        ({"kl": [[-1, 0.1]]}, "greater than or equal to 0"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(schedule: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "generator: {path: shapes}\nprompts: {train: 'shapes:train'}\nreward: {kind: shapes}\nrecipe: {kind: nft}\n"
    )
    with pytest.raises(ConfigError) as error:
        load_config(path, [f"recipe.schedule={json.dumps(schedule)}"])
    assert str(error.value).startswith("recipe.schedule.")
    assert message in str(error.value)


def test_a_filter_bans_single_prompts_of_an_embedded_world(model: Path, tmp_path: Path) -> None:
    config = settings(
        tmp_path, model, prompts={"train": "shapes:train", "heldout": None, "limit": 6},
        rollout={"prompts": 2, "group": 2, "sampler": {"kind": "ode", "steps": 2},
                 "filter": {"mean_above": -1e6, "std_below": 1e6}}, train={"steps": 2},
    )  # fmt: skip
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["banned_prompts"] for row in rows if row["event"] == "train"] == [2, 4]


def test_a_run_takes_its_prompts_from_several_sources(model: Path, tmp_path: Path) -> None:
    for name in ("easy", "hard"):
        (tmp_path / f"{name}.txt").write_text(f"{name} a\n{name} b\n")
    sources = [
        {"file": str(tmp_path / "easy.txt"), "weight": [[0, 1], [1, 0]]},
        {"file": str(tmp_path / "hard.txt"), "weight": [[0, 0], [1, 1]]},
    ]
    config = settings(tmp_path, model, prompts={"train": sources, "heldout": None}, train={"steps": 2})
    asked = []

    def noted(media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        asked.append(sorted({prompt.split()[0] for prompt in prompts}))
        return media.mean(dim=(1, 2, 3))

    import tiny_run

    tiny_run.redness, before = noted, tiny_run.redness
    try:
        train(config)
    finally:
        tiny_run.redness = before
    assert asked[1:] == [["easy"], ["hard"]]  # after the trial on a grey sample
