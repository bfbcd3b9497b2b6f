"""How configs are put together: default names, what null takes away, overrides in either form, typical mistakes."""

from __future__ import annotations

import pytest
import written
from written import refused

from align.config.command_line import files_and_overrides
from align.config.load import load_config
from alignflow.errors import ConfigError

write, run = written.write, written.run

BASE = """\
generator: {path: shapes}
prompts: {train: 'shapes:train', heldout: 'shapes:heldout'}
rollout: {prompts: 2, group: 2}
recipe: nft
reward: {kind: mixture, parts: {a: {reward: shapes}, b: {reward: clip}}}
evaluate: {rewards: {x: shapes, y: {kind: clip, chunk: 3}}, gold: x}
"""


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("run.yaml", "run"),
        ("configs/quickstart.yaml", "quickstart"),
        ("configs/flux-dev/nft.yaml", "flux-dev-nft"),
        ("my experiments/a b.yaml", "my-experiments-a-b"),
        (".hidden/x.yaml", "hidden-x"),
        ("löwe/große.yaml", "löwe-große"),
    ],
)
def test_default_names(write, file, name):
    assert load_config(write(BASE, file)).name == name
    assert load_config(write(BASE, file), ["name=mine"]).name == "mine"


def test_null_takes_away_what_stands_below(write):
    write(BASE, "base.yaml")
    text = "extends: base.yaml\nreward: {parts: {b: null}}\nevaluate: {rewards: {y: null}}\n"
    config = load_config(write(text))
    assert list(config.evaluate.rewards) == ["x"]
    assert list(config.reward.parts) == ["a"]
    again = load_config("base.yaml", ["evaluate.rewards.y=null"])
    assert list(again.evaluate.rewards) == ["x"]
    assert list(load_config("run.yaml", ["evaluate.rewards.y=shapes"]).evaluate.rewards) == ["x", "y"]
    none = load_config("base.yaml", ["evaluate.rewards.x=null", "evaluate.rewards.y=null", "evaluate.gold=null"])
    assert none.evaluate.rewards == {}
    assert none.evaluate.gold is None


def test_null_of_what_is_not_there_is_nothing(write):
    assert list(load_config(write(BASE), ["evaluate.rewards.z=null"]).evaluate.rewards) == ["x", "y"]


def test_null_that_something_needs(write):
    write(BASE)
    assert "no such reward in evaluate.rewards 'x'" in refused("run.yaml", ["evaluate.rewards.x=null"])
    assert "reward.parts" in refused("run.yaml", ["reward.parts.a=null", "reward.parts.b=null"])


def test_null_is_a_value_among_ones_own_options(write):
    config = load_config(write(BASE), ["reward={kind: 'a:b', options: {c: null, d: {e: null}}}"])
    assert config.reward.options == {"c": None, "d": {"e": None}}


def test_overrides_in_either_form(write, run):
    path = str(write(BASE))
    code, out, _ = run("check", path, "seed=3", "train.lr=0.5")
    assert code == 0
    assert "seed 3" in out
    assert "lr 0.5" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--train.lr", "1e-4"), "settings are written without dashes: train.lr=1e-4, not --train.lr"),
        (("--train.lr=1e-4",), "settings are written without dashes: train.lr=1e-4"),
        (("train.lr", "=", "1e-4"), "an override reads key=value"),
        (("reward={kind: 'a:b', scale: 3}",), "arguments of a reward of your own go under options: {scale: ...}"),
        (("rollout.kind=pairs",), "rollout.file (override 'rollout.kind=pairs'): is missing"),
        (("reward.kind=hps",), "did you mean 'hpsv3'? There are hpsv3, hpsv2, "),
    ],
)
def test_typical_mistakes(write, run, words, says):
    code, _, err = run("check", str(write(BASE)), *words)
    assert code == 2
    assert says in err
    assert len(err) < 700


def test_a_misspelt_file(write, run):
    write(BASE, "nft.yaml")
    assert "no config file ntf.yaml" in (err := run("check", "ntf.yaml")[2])
    assert "did you mean nft.yaml?" in err


# -- several files ----------------------------------------------------------------------------------------------------

STEPS = "rollout: {sampler: {kind: cps, noise_level: 0.7}}\nrecipe:\n  kind: grpo\n"
SEARCH = "generator: {path: shapes}\nprompts: {source: 'shapes:heldout'}\nreward: shapes\nsearch: fk\n"


def test_several_files_are_one_that_extends_them(write):
    write(BASE + "train: {lr: 0.5, steps: 7}\nmemory: 24gb\n", "a.yaml")
    write("recipe: {kind: nft, beta: 0.3}\ntrain: {lr: 0.25}\nreward: {parts: {b: null}}\n", "b.yaml")
    write("extends: [a.yaml, b.yaml]\n", "both.yaml")
    merged = load_config(["a.yaml", "b.yaml"], ["seed=3"])
    assert merged == load_config("both.yaml", ["seed=3", "name=b"])
    assert (merged.train.lr, merged.train.steps, merged.recipe.beta) == (0.25, 7, 0.3)
    assert list(merged.reward.parts) == ["a"]
    assert load_config(["b.yaml", "a.yaml"]).train.lr == 0.5
    assert load_config(["a.yaml"]) == load_config("a.yaml")


def test_a_later_kind_drops_the_settings_of_the_earlier_one(write, run):
    write(BASE.replace("recipe: nft", "recipe:\n  kind: nft\n  beta: 0.3"), "a.yaml")
    write(STEPS, "b.yaml")
    assert load_config(["a.yaml", "b.yaml"]).recipe.kind == "grpo"
    code, out, _ = run("check", "a.yaml", "b.yaml")
    assert code == 0
    assert "note       recipe: grpo (b.yaml:3) replaces nft (a.yaml:5) and its settings" in out
    assert "a.yaml + b.yaml are ready to run" in out
    assert "replaces" not in run("check", "a.yaml", "a.yaml")[1]


def test_the_name_is_the_folder_of_the_first_file_and_the_name_of_the_last(write):
    write(BASE, "base.yaml")
    write(BASE, "configs/flux/base.yaml")
    write("seed: 3\n", "configs/shared/seeded.yaml")
    assert load_config(["configs/flux/base.yaml", "configs/shared/seeded.yaml"]).name == "flux-seeded"
    assert load_config(["base.yaml", "configs/shared/seeded.yaml"]).name == "seeded"
    assert load_config(["configs/shared/seeded.yaml", "base.yaml"]).name == "shared-base"


def test_data_is_found_beside_the_file_that_names_it(write):
    write("a red cube\n", "there/prompts.txt")
    write(BASE, "base.yaml")
    write("prompts: {train: prompts.txt}\n", "there/more.yaml")
    assert load_config(["base.yaml", "there/more.yaml"]).prompts.train == "there/prompts.txt"


def test_problems_name_the_file_they_were_written_in(write):
    write(BASE, "a.yaml")
    write("train: {lr: fast}\n", "b.yaml")
    write("recipe:\n  control_variate: true\n", "c.yaml")
    said = refused(["a.yaml", "b.yaml", "c.yaml"])
    assert said.startswith("2 problems in a.yaml + b.yaml + c.yaml")
    assert "train.lr (b.yaml:1): should be a number" in said
    assert "recipe.control_variate (c.yaml:2): only valid for kind=flow_rwr; here kind is nft" in said


def test_a_setting_of_another_kind_names_the_file_of_the_kind(write):
    write(BASE.replace("recipe: nft", "recipe:\n  kind: nft"), "a.yaml")
    write("recipe:\n  control_variate: true\n", "b.yaml")
    assert refused(["a.yaml", "b.yaml"]).endswith("here kind is nft (kind is set in a.yaml:5)")


def test_files_of_different_commands(write, run):
    write(BASE, "a.yaml")
    write(SEARCH, "s.yaml")
    for command in ("check", "train", "search"):
        code, _, err = run(command, "a.yaml", "s.yaml")
        assert code == 2
        assert "cannot be merged: a.yaml for alignflow train, s.yaml for alignflow search" in err
    assert "s.yaml is a config for alignflow search, not for alignflow train" in run("train", "s.yaml")[2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("a.yaml", "b.yaml"), "no config file b.yaml"),
        (("a.yaml", "b.yml"), "no config file b.yml"),
        (
            ("a.yaml", "seed=3", "more.yaml"),
            "more.yaml comes after the override seed=3; config files come first: a.yaml",
        ),
        (("seed=3", "a.yaml"), "seed=3 is an override, and config files come first"),
        (
            ("a.yaml", "notes"),
            "an override reads key=value, such as train.lr=1e-4; notes is a file, and config files end",
        ),
    ],
)
def test_words_that_are_no_config(write, run, words, says):
    for name in ("a.yaml", "more.yaml", "notes"):
        write(BASE, name)
    for command in (("check",), ("train",), ("search",), ("evaluate",), ("reward", "train")):
        code, _, err = run(*command, *words)
        assert code == 2
        assert says in err


def test_which_words_are_files():
    words = ["b.YML", "train.lr=0.1", "data.train=pairs.yaml"]
    files, overrides = files_and_overrides("a", words)
    assert list(map(str, files)) == ["a", "b.YML"]
    assert overrides == ["train.lr=0.1", "data.train=pairs.yaml"]
    with pytest.raises(ConfigError, match="no config file was given"):
        load_config([])


def test_a_stopped_run_names_every_file(write, run, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    write(BASE, "a.yaml")
    write(STEPS, "b.yaml")
    monkeypatch.setattr("align.training.trainer.train", stop)
    _, _, err = run("train", "a.yaml", "b.yaml", "seed=3", "train.lr=0.5")
    assert "alignflow train a.yaml b.yaml seed=3 train.lr=0.5 --resume" in err
