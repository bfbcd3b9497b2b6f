"""Rewriter and generator trained in alternation: what each stage learns from, and what stays as it is."""

from __future__ import annotations

import json

import pytest
import tiny_rewriter
import torch
from safetensors.torch import load_file
from tiny_rewriter import PROMPTS

from align.config.load import read_yaml
from align.data.files import without_nan
from align.rewriting import joint as module
from align.rewriting.joint import anchored, train_joint
from align.rewriting.joint_settings import load_joint
from align.rewriting.settings import load_rewriter
from align.rewriting.train import train_rewriter
from alignflow.errors import ConfigError, DataError

RENDERER = """\
generator: {{kind: sd3, path: shapes, device: cpu}}
policy: {{kind: lora, rank: 2}}
prompts: {{train: shapes:train}}
rollout: {{kind: online, prompts: 1, group: 2, sampler: {{kind: cps, steps: 2}}}}
reward: {{kind: shapes}}
recipe: {{kind: grpo}}
train: {{steps: 1, lr: 1e-3}}
evaluate: {{every: 0}}
samples: {{every: 0}}
out: {out}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_rewriter.save(tmp_path_factory.mktemp("rewriter"))


@pytest.fixture
def rewriter(tmp_path, model):
    """A config of the first stage, whose prompts have a wanted text."""
    path = tiny_rewriter.training(tmp_path, model, "grpo")
    table = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text, "caption": tiny_rewriter.canonical(text)} for text in PROMPTS]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = path.read_text().replace(str(tmp_path / "prompts.txt"), str(table))
    path.write_text(text + "caption: {rouge: 1.0, media: 1.0}\n")
    return path


@pytest.fixture
def config(tmp_path, rewriter):
    (tmp_path / "render.yaml").write_text(RENDERER.format(out=tmp_path / "render"))
    path = tmp_path / "joint.yaml"
    path.write_text(
        f"rewriter: {{config: {rewriter}, overrides: [method.steps=1]}}\n"
        f"renderer: {{config: {tmp_path / 'render.yaml'}}}\nrounds: 2\nanchor: 0\nout: {tmp_path / 'joint'}\n"
    )
    return path


def quiet(line: str) -> None:
    """Says nothing."""


@pytest.mark.slow
def test_each_stage_goes_on_from_the_ones_before(config, monkeypatch):
    """Random words would be too long for the generator, so the captions are the wanted texts."""
    captions = []

    def wanted(config, lora, least):
        captions.append(lora.name)
        texts = [tiny_rewriter.canonical(text) for text in PROMPTS]
        return [{"prompt": text, "caption": text} for text in texts]

    monkeypatch.setattr(module, "anchored", wanted)
    found = train_joint(load_joint(config), say=quiet)
    assert [stage["stage"] for stage in found] == ["00-rewriter", "00-renderer", "01-rewriter", "01-renderer"]
    stages = config.parent / "joint" / "stages"
    second, policy = (read_yaml(stages / f"01-{name}" / "config.yaml") for name in ("rewriter", "renderer"))
    assert second["writer"]["lora"] == str(stages / "00-rewriter")
    assert second["generator_lora"] == str(stages / "00-renderer")
    assert policy["policy"]["init"] == str(stages / "00-renderer" / "lora")
    assert policy["prompts"]["train"] == str(stages / "01-anchors.jsonl")
    assert captions == ["00-rewriter", "01-rewriter"]
    again = train_joint(load_joint(config), resume=True, say=quiet)
    assert without_nan(again) == without_nan(found)


def test_without_its_media_a_rewrite_is_learned_apart_from_the_generator(tmp_path, rewriter):
    found = []
    for steps in (1, 3):
        words = [
            "caption.media=0",
            f"rendering.sampler.steps={steps}",
            f"out={tmp_path / str(steps)}",
            "method.steps=2",
        ]
        train_rewriter(load_rewriter(rewriter, words), say=quiet)
        found.append(load_file(tmp_path / str(steps) / "adapter_model.safetensors"))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_captions_below_the_threshold_are_dropped_and_no_others(tmp_path, rewriter, monkeypatch):
    said = ["a red circle", "two squares on a blue background", "three blue triangles"]

    class Fixed:
        def write(self, asked, seeds, reply):
            assert reply.temperature == 0
            return said

    monkeypatch.setattr(module, "build_writer", lambda settings, device: Fixed())
    settings = load_rewriter(rewriter)
    alike = [1.0, 10 / 12, 0.0]
    rows = anchored(settings, tmp_path, 0.0)
    assert [row["rouge_l"] for row in rows] == pytest.approx(alike)
    for least, kept in ((0.6, 2), (rows[1]["rouge_l"], 2), (0.9, 1)):
        assert [row["prompt"] for row in anchored(settings, tmp_path, least)] == said[:kept]
    said[:1] = ["nothing"]
    with pytest.raises(DataError, match=r"no caption reaches a ROUGE-L of 0\.9, the best has 0\.833"):
        anchored(settings, tmp_path, 0.9)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("rewriter.overrides=[caption=null]", "rewriter.config"),
        ("renderer.overrides=[generator.text_length=8]", "trains a generator other than the one that renders"),
        ("renderer.overrides=[policy.kind=full]", "trains all weights"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config, override, why):
    with pytest.raises(ConfigError) as caught:
        load_joint(config, [override])
    assert why in str(caught.value)
