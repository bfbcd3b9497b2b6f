"""How configs are put together: default names, what null takes away, overrides in either form, typical mistakes."""

from __future__ import annotations

import pytest
import written
from written import refused

from align.config.load import load_config

write, run = written.write, written.run

BASE = """\
generator: {path: shapes}
prompts: {train: 'shapes:train', heldout: 'shapes:heldout'}
rollout: {prompts: 2, group: 2}
recipe: nft
reward: {kind: mixture, parts: {a: {reward: shapes}, b: {reward: clip}}}
evaluate: {rewards: {x: shapes, y: {kind: clip, batch: 3}}, gold: x}
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
    code, out, _ = run("check", path, "seed=3", "--set", "train.lr=0.5")
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
        (("reward.kind=hps",), "did you mean 'hpsv3'?; there are hpsv3, hpsv2, "),
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
