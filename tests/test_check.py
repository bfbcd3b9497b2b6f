"""``alignflow check``: configs of every command, and a config given to another command than its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import written
from PIL import Image

from align.checking.commands import CONFIGS

run = written.run
SHIPPED = Path(__file__).parent.parent / "configs"
OWN = {
    "train": "shapes/nft.yaml",
    "search": "shapes/search_fk.yaml",
    "reward train": "rewards/pairs.yaml",
    "reward judge": "rewards/judge.yaml",
    "reward latent": "rewards/latent_shapes.yaml",
}


def test_every_command_that_reads_a_config_is_here():
    assert set(OWN) == set(CONFIGS)


@pytest.mark.parametrize("command", OWN)
def test_a_config_of_another_command_is_named(command, run):
    path = SHIPPED / OWN[command]
    for other in OWN:
        if other != command:
            code, _, err = run(*other.split(), str(path))
            assert code == 2
            assert f"{OWN[command].split('/')[1]} is a config for alignflow {command}, not for alignflow {other}" in err
            assert len(err.splitlines()) == 1


def test_a_config_is_known_by_all_its_keys_not_by_one(tmp_path, monkeypatch, run):
    """What has a default may be left out, and what is missing is told as missing."""
    monkeypatch.chdir(tmp_path)
    latent = (SHIPPED / OWN["reward latent"]).read_text().splitlines()
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
        code, out, err = run("check", str(SHIPPED / OWN["search"]), *option)
        assert (code, out) == (2, "")
        assert "--memory and --card are for training runs" in err
        assert "is a config for alignflow search" in err


def test_a_mistake_in_the_right_config_is_told_with_its_place(run):
    code, _, err = run("check", str(SHIPPED / OWN["reward latent"]), "fit.setps=3")
    assert code == 2
    assert "no such setting 'setps'; did you mean 'steps'?" in err


def test_check_reads_what_a_reward_is_trained_on(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    tables = ("data.train=a.jsonl", "data.heldout=b.jsonl")
    pairs = str(SHIPPED / OWN["reward train"])
    code, _, err = run("check", pairs, *tables)
    assert code == 2
    assert "data.train: file a.jsonl does not exist" in err
    assert "data.heldout: file b.jsonl does not exist" in err
    row = '{"prompt": "a", "chosen": "a.png", "rejected": "a.png", "tie": %s}\n'
    Image.new("RGB", (8, 8)).save("a.png")
    Path("a.jsonl").write_text(row % "false")
    Path("b.jsonl").write_text(row % "false" + row % '"maybe"')
    code, _, err = run("check", pairs, *tables)
    assert code == 2
    assert 'data.heldout: b.jsonl line 2: "tie" should be true or false' in err
    for config in ("reward train", "reward judge"):
        code, out, err = run("check", str(SHIPPED / OWN[config]), tables[0], "seed=7")
        assert (code, err) == (0, "")
        assert "seed 7" in out
        assert "is ready to run" in out
        assert not Path("runs").exists()


def test_check_asks_for_the_generator_and_the_prompts_of_every_command(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    latent, search = (str(SHIPPED / OWN[name]) for name in ("reward latent", "search"))
    for config, prompts in ((latent, "prompts.train"), (search, "prompts.source")):
        code, _, err = run("check", config, "generator.path=./gone", f"{prompts}=gone.txt")
        assert code == 2
        assert "generator.path: no folder ./gone" in err
        assert f"{prompts}: " in err
        assert "gone.txt does not exist" in err
