"""``alignflow new`` writes configs that pass check; ``alignflow show`` has a page for every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import written

from align.config import registry, showing
from align.config.load import load_config
from alignflow.errors import ConfigError

run = written.run


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle\n")
    Path("mine.py").write_text("def red(media, prompts):\n    return media[:, 0].mean(dim=(1, 2))\n")
    Path("edits.jsonl").write_text('{"prompt": "a", "image": "a.png"}\n')
    Path("a.png").touch()
    return tmp_path


def pipeline(name):
    Path("model").mkdir()
    Path("model/model_index.json").write_text(json.dumps({"_class_name": name}))
    return "model"


@pytest.mark.parametrize("recipe", ["nft", "grpo", "flow_rwr", "awm", "dgpo", "flow_dpo"])
def test_a_config_of_the_embedded_world_passes_check(run, here, recipe):
    words = ("--model", "shapes", "--prompts", "shapes:train", "--reward", "shapes", "--recipe", recipe)
    code, out, _ = run("new", "mine.yaml", *words, "--heldout", "shapes:heldout")
    assert code == 0, out
    assert "alignflow train mine.yaml" in out
    assert run("check", "mine.yaml")[0] == 0
    assert load_config("mine.yaml").prompts.heldout == "shapes:heldout"
    assert run("new", "mine.yaml", *words)[0] == 2  # never over another file


def test_model_prompts_and_reward_of_ones_own(run, here):
    model = pipeline("StableDiffusion3Pipeline")
    words = ("--model", model, "--prompts", "prompts.txt", "--reward", "mine.py:red")
    assert run("new", "mine.yaml", *words)[0] == 0
    config = load_config("mine.yaml")
    assert (config.generator.kind, config.generator.dtype, config.train.precision) == ("sd3", "bfloat16", "bf16")
    assert config.prompts.heldout is None
    assert all(line.startswith("#") or ":" in line or not line for line in Path("mine.yaml").read_text().splitlines())


def test_an_editor_says_what_prompts_need(run, here):
    words = ("--model", pipeline("FluxKontextPipeline"), "--prompts", "edits.jsonl", "--reward", "mine.py:red")
    assert run("new", "mine.yaml", *words)[0] == 0
    assert "Every prompt comes with: image" in Path("mine.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "owner/name"), "add --generator KIND, one of"),
        (("--model", "shapes", "--recipe", "nftt"), "no recipe 'nftt'"),
        (("--model", "shapes", "--reward", "clp"), "clip"),
        (("--model", "shapes", "--recipe", "reward_backprop"), "gradient"),
    ],
)
def test_what_cannot_work_is_said_and_nothing_stays(run, here, words, message):
    given = {"--prompts": "shapes:train", "--reward": "shapes", **dict(zip(words[::2], words[1::2], strict=True))}
    code, _, err = run("new", "mine.yaml", *[word for pair in given.items() for word in pair])
    assert code == 2
    assert message in err
    assert not Path("mine.yaml").exists()


@pytest.mark.parametrize("room", showing.ROOMS)
def test_every_kind_has_a_page_with_an_example(room):
    for name in showing.kinds(room):
        page = showing.show(room, name)
        assert page.startswith(f"{room} {name}\n")
        assert "example\n  " in page


def test_a_page_has_every_setting_with_its_default(run):
    code, out, _ = run("show", "recipe", "nft")
    assert code == 0
    own = set(registry.recipes()["nft"].model_fields) - {"kind", "schedule"}
    assert own <= {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert "source: arXiv 2509.16117" in out
    assert "code: align/recipes/nft.py" in out
    assert "gradient to the media: yes" in run("show", "reward", "clip")[1]
    assert "frames" in run("show", "generator", "wan")[1]


def test_an_unknown_kind_names_the_nearest(run):
    code, _, err = run("show", "reward", "clp")
    assert code == 2
    assert "did you mean 'clip'" in err
    with pytest.raises(ConfigError, match="did you mean 'reward'"):
        showing.kinds("rewards")
