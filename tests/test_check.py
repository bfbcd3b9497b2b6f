"""``alignflow check``: configs of every command, and a config given to another command than its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import written
from PIL import Image

from align.config import command_of

run = written.run
CONFIGS = Path(__file__).parent.parent / "configs"
OWN = {
    "train": "shapes/nft.yaml",
    "search": "shapes/search_fk.yaml",
    "reward train": "rewards/pairs.yaml",
    "reward judge": "rewards/judge.yaml",
    "reward latent": "rewards/latent_shapes.yaml",
}


@pytest.mark.parametrize("command", OWN)
def test_a_config_of_another_command_is_named(command, run):
    path = CONFIGS / OWN[command]
    assert command_of(path) == command
    for other in OWN:
        if other != command:
            code, _, err = run(*other.split(), str(path))
            assert code == 2
            assert f"{OWN[command].split('/')[1]} is a config for alignflow {command}, not for alignflow {other}" in err
            assert len(err.splitlines()) == 1


def test_a_mistake_in_the_right_config_is_told_with_its_place(run):
    code, _, err = run("check", str(CONFIGS / OWN["reward latent"]), "fit.setps=3")
    assert code == 2
    assert "no such setting 'setps'; did you mean 'steps'?" in err


def test_check_reads_what_a_reward_is_trained_on(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    tables = ("data.train=a.jsonl", "data.heldout=b.jsonl")
    pairs = str(CONFIGS / OWN["reward train"])
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
        code, out, err = run("check", str(CONFIGS / OWN[config]), tables[0], "seed=7")
        assert (code, err) == (0, "")
        assert "seed 7" in out
        assert "is ready to run" in out
        assert not Path("runs").exists()


def test_check_asks_for_the_generator_and_the_prompts_of_every_command(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    latent, search = (str(CONFIGS / OWN[name]) for name in ("reward latent", "search"))
    for config, prompts in ((latent, "prompts.train"), (search, "prompts.source")):
        code, _, err = run("check", config, "generator.path=./gone", f"{prompts}=gone.txt")
        assert code == 2
        assert "generator.path: no folder ./gone" in err
        assert f"{prompts}: " in err
        assert "gone.txt does not exist" in err
