"""``alignflow check``: configs of every command, and a config given to another command than its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import written
from PIL import Image

from align.config.roots import roots
from align.config.settings import Config
from align.preference.settings import JudgeTrainConfig, LatentTrainConfig, RewardTrainConfig
from align.reasoning.settings import ReasonConfig
from align.rewriting.joint_settings import JointConfig
from align.rewriting.settings import EvolveConfig, RewriterConfig
from align.search.settings import SearchConfig

run = written.run
SHIPPED = Path(__file__).parent.parent / "configs"
OWN = {
    Config: "shapes/nft.yaml",
    SearchConfig: "shapes/search_fk.yaml",
    RewardTrainConfig: "rewards/pairs.yaml",
    JudgeTrainConfig: "rewards/judge.yaml",
    LatentTrainConfig: "rewards/latent_shapes.yaml",
    ReasonConfig: "rewards/reason_cold.yaml",
    EvolveConfig: "rewriting/evolve.yaml",
    RewriterConfig: "rewriting/grpo.yaml",
    JointConfig: "rewriting/joint.yaml",
}


def test_every_tree_of_settings_is_here():
    assert set(OWN) == set(roots())


@pytest.mark.parametrize("root", OWN)
def test_a_config_of_another_command_is_named(root, run):
    path = SHIPPED / OWN[root]
    command = root.command
    for other in {each.command for each in OWN}:
        if other != command:
            code, _, err = run(*other.split(), str(path))
            assert code == 2
            assert f"{path.name} is a config for alignflow {command}, not for alignflow {other}" in err
            assert len(err.splitlines()) == 1


def test_reward_train_runs_what_the_config_trains(run, monkeypatch):
    trained = []
    monkeypatch.setattr("align.cli.reward._train_reward", lambda settings, *_: trained.append(settings))
    monkeypatch.setattr("align.cli.reward._train_judge", lambda settings, _: trained.append(settings))
    monkeypatch.setattr("align.cli.reward._train_latent", lambda settings, _: trained.append(settings))
    kinds = [root for root in OWN if root.command == "reward train"]
    for root in kinds:
        assert run("reward", "train", str(SHIPPED / OWN[root]), "seed=7", "--out", "my/reward") == (0, "", "")
    assert [type(settings) for settings in trained] == kinds
    assert {(settings.seed, settings.out) for settings in trained} == {(7, "my/reward")}


def test_configs_that_train_different_things_are_not_merged(run):
    pairs, judge = (SHIPPED / OWN[root] for root in (RewardTrainConfig, JudgeTrainConfig))
    code, _, err = run("reward", "train", str(pairs), str(judge))
    assert code == 2
    assert f"{pairs} for alignflow reward train (a reward), {judge} for alignflow reward train (a judge)" in err


def test_a_config_is_known_by_all_its_keys_not_by_one(tmp_path, monkeypatch, run):
    """What has a default may be left out, and what is missing is told as missing."""
    monkeypatch.chdir(tmp_path)
    latent = (SHIPPED / OWN[LatentTrainConfig]).read_text().splitlines()
    Path("latent.yaml").write_text("\n".join(line for line in latent if not line.startswith("fit:")))
    code, out, err = run("check", "latent.yaml")
    assert (code, err) == (0, "")
    assert "ready to run" in out
    Path("search.yaml").write_text(
        "generator: {kind: sd3, path: shapes}\nprompts: {source: shapes:heldout}\nreward: {kind: clip}\n"
        "budget: {network_calls: 40}\n"
    )
    for command in ("check", "search"):
        code, _, err = run(command, "search.yaml")
        assert code == 2
        assert "search: is missing" in err


def test_memory_is_estimated_of_training_runs_alone(run):
    for option in (["--memory"], ["--card", "24gb"]):
        code, out, err = run("check", str(SHIPPED / OWN[SearchConfig]), *option)
        assert (code, out) == (2, "")
        assert "--memory and --card are for training runs" in err
        assert "is a config for alignflow search" in err


def test_a_mistake_in_the_right_config_is_told_with_its_place(run):
    code, _, err = run("check", str(SHIPPED / OWN[LatentTrainConfig]), "fit.setps=3")
    assert code == 2
    assert "no such setting 'setps'; did you mean 'steps'?" in err


def test_check_reads_what_a_reward_is_trained_on(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    tables = ("data.train=a.jsonl", "data.heldout=b.jsonl")
    pairs = str(SHIPPED / OWN[RewardTrainConfig])
    code, _, err = run("check", pairs, *tables)
    assert code == 2
    assert "data.train: file a.jsonl does not exist" in err
    assert "data.heldout: file b.jsonl does not exist" in err
    row = '{"prompt": "a", "chosen": "a.png", "rejected": "b.png", "tie": %s}\n'
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(name)
    Path("a.jsonl").write_text(row % "false")
    Path("b.jsonl").write_text(row % "false" + row % '"maybe"')
    code, _, err = run("check", pairs, *tables)
    assert code == 2
    assert 'data.heldout: b.jsonl line 2: "tie" should be true or false' in err
    for config in (RewardTrainConfig, JudgeTrainConfig):
        code, out, err = run("check", str(SHIPPED / OWN[config]), tables[0], "seed=7")
        assert (code, err) == (0, "")
        assert "seed 7" in out
        assert "is ready to run" in out
        assert not Path("runs").exists()


def test_check_asks_for_the_generator_and_the_prompts_of_every_command(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    latent, search = (str(SHIPPED / OWN[name]) for name in (LatentTrainConfig, SearchConfig))
    for config, prompts in ((latent, "prompts.train"), (search, "prompts.source")):
        code, _, err = run("check", config, "generator.path=./gone", f"{prompts}=gone.txt")
        assert code == 2
        assert "generator.path: no folder ./gone" in err
        assert f"{prompts}: " in err
        assert "gone.txt does not exist" in err


def test_a_mixture_has_a_line_per_part(run):
    reward = (
        "reward={kind: mixture, parts: {gold: {reward: {kind: shapes}, weight: 2, normalise: group}, "
        "match: {reward: {kind: clip, model: shapes}}}}"
    )
    code, out, _ = run("check", str(SHIPPED / "shapes/nft.yaml"), reward)
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert "gold: shapes score=dense, weight=2.0 normalise=group" in lines
    assert any(line.startswith("match: clip ") and line.endswith(", weight=1.0 normalise=none") for line in lines)
    assert "{'" not in "".join(line for line in lines if "shapes score" in line or line.startswith("reward"))


def test_list_is_another_name_of_recipes(run):
    assert run("list")[:2] == run("recipes")[:2]


CODE = """
from rewards.base import RewardSettings

def red(media, prompts):
    return media[:, 0].mean(dim=(1, 2))

class Declares(RewardSettings):
    kind: str
    passes_gradient = True
"""


@pytest.mark.parametrize(
    ("config", "reward", "place"),
    [
        ("reward_backprop", "{kind: FILE:red}", "reward.differentiable"),
        ("search_guidance", "{kind: FILE:red}", "reward.differentiable"),
        (
            "reward_backprop",
            "{kind: mixture, parts: {a: {reward: {kind: FILE:red}}, b: {reward: {kind: clip}}}}",
            "reward.parts.a.reward.differentiable",
        ),
        ("reward_backprop", "{kind: FILE:red, differentiable: true}", ""),
        ("reward_backprop", "{kind: FILE:Declares}", ""),
        ("nft", "{kind: FILE:red}", ""),
    ],
)
def test_code_that_does_not_declare_the_gradient_it_is_used_for(config, reward, place, run, tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    lines = (
        f"extends: {SHIPPED / 'shapes' / config}.yaml\nreward: {reward.replace('FILE', str(tmp_path / 'mine.py'))}\n"
    )
    (tmp_path / "run.yaml").write_text(lines)
    code, out, err = run("check", "--import", str(tmp_path / "run.yaml"))
    assert (code, "is ready to run" in out) == ((2, False) if place else (0, True))
    assert f"{place}: is not set, which means no gradient" in err or not place
