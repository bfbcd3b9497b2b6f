"""Nonsense overrides are refused with the setting's name: by type, by bounds, by what the file system takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.load import load_config
from alignflow.errors import ConfigError

SHAPES = Path(__file__).resolve().parent.parent / "configs" / "shapes" / "nft.yaml"
BIG = "1" + "0" * 23

NUMBERS = ["train.steps", "train.lr", "seed", "rollout.prompts", "rollout.group", "rollout.chunk", "train.threads",
           "train.ema", "evaluate.every", "evaluate.prompts", "checkpoint.keep", "samples.fps", "policy.rank",
           "policy.alpha", "recipe.beta", "rollout.sampler.steps", "evaluate.sampler.guidance", "generator.frames",
           "train.warmup", "train.max_grad_norm", "evaluate.seed", "train.chunk", "prompts.limit"]  # fmt: skip
TRUTHS = ["train.gradient_checkpointing", "rollout.same_noise", "evaluate.at_start", "memory.vae_tiling"]


def refused(override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(SHAPES, [override])
    return str(caught.value)


@pytest.mark.parametrize("value", ["true", "false", BIG, "-" + BIG, "[1]", "{}", "text", ".nan", ".inf"])
@pytest.mark.parametrize("key", NUMBERS)
def test_numbers(key, value):
    assert refused(f"{key}={value}").startswith(f"{key} (override")


@pytest.mark.parametrize("value", ["0", "1", "2", "1.0", "'1'", "maybe", "null", "[true]", "{}"])
@pytest.mark.parametrize("key", TRUTHS)
def test_truths(key, value):
    assert f"{key} (override" in refused(f"{key}={value}")


@pytest.mark.parametrize(
    "override",
    [
        "generator.size=[0,0]", "generator.size=[-64,64]", "generator.size=[63,65]", "generator.size=[true,true]",
        "generator.size=[64]", "generator.size=[64,64,64]", "generator.size=[100000,64]", "generator.device=banana",
        "generator.device=''", "generator.device=cuda:-1", "generator.device=cuda:x", "generator.device=CUDA",
        "generator.device='cpu '", "policy.targets=[]", "policy.targets=['']", "policy.targets=[' ']",
        "out=/", "out=''", "out='  '", "out=/dev/null", "out=/dev/null/x", r'out="a\0b"', f"out={'a' * 300}",
        f"out={'a/' * 3000}", f"out={SHAPES}", "out=//", "out=/tmp/..",
        f"name={'a' * 300}", "name=a b", "name=", "name=../x",
        "evaluate.rewards={' x': shapes}", "evaluate.rewards={'x ': shapes}", "evaluate.rewards={'a/b': shapes}",
        "evaluate.rewards={'': shapes}", r'evaluate.rewards={"a\e[31m": shapes}',
        f"evaluate.rewards={{{'a' * 90}: shapes}}",
        "reward={kind: remote, url: 'http://[::1'}", "reward={kind: remote, url: 'http://h:99999'}",
        "reward={kind: remote, url: 'http://h:x'}", "reward={kind: remote, url: 'http://:80'}",
        "reward={kind: remote, url: 'ftp://h'}", "reward={kind: remote, url: 'http://h', timeout: 1e308}",
        "reward={kind: remote, url: 'http://h', timeout: 0}", f"reward={{kind: remote, url: 'http://h', chunk: {BIG}}}",
        "reward={kind: remote, url: 'http://h', retries: true}", "reward={kind: clip, chunk: true}",
        "reward={kind: mixture, parts: {' a': {reward: shapes}}}",
        "reward={kind: mixture, parts: {a: {reward: shapes, weight: true}}}",
        "rollout.group=1", "rollout.sampler.kind=[ode]", "rollout.sampler.kind={}", "evaluate.sampler.kind=[ode]",
        "train.betas=[true, 0.9]", "recipe.t_range=[true, 1]", "rollout.sampler.window.size=true",
        "generator.kind=" + "a" * 3000, "recipe.kind=" + "a" * 3000, "reward.kind=" + "a" * 3000,
        "generator.path=true", "generator.path=[]", "generator.dtype=1", "prompts.train=3", "trackers=[1]",
        "trackers={a: b}", "memory=99gb", "memory=[]", "memory=true", "policy=3", "policy.kind=[]", "recipe=[]",
        "reward=[]", "evaluate.rewards=[shapes]", "evaluate.gold=true", "checkpoint=[]", "samples.video=avi",
    ],
)  # fmt: skip
def test_nonsense(override):
    message = refused(override)
    assert f"{override.partition('=')[0].split('.')[0]}." in message.replace(" (override", ".")
    assert len(message) < 1500


def test_numbers_that_are_numbers_stay(tmp_path):
    config = load_config(
        SHAPES, ["train.lr=1", "train.steps=1e3", f"out={tmp_path / 'new' / 'run'}", "generator.size=[64,72]"]
    )
    assert config.train.lr == 1.0
    assert config.train.steps == 1000
