"""A LoRA as the start of a training run, on the base that is evaluated, and on the base that is sampled."""

from __future__ import annotations

import shutil

import pytest
import tiny
import tiny_run
import torch
from safetensors.torch import load_file, save_file

from align.config.load import dump_config, load_config
from align.evaluation.evaluate import evaluate_run, sample_to_folder
from align.policy import layouts
from align.policy.build import build_generator, trainable
from align.policy.layers import LoraError, linear_layers
from align.policy.lora import FILE, as_diffusers, lora_of
from align.training.trainer import train
from alignflow.errors import ConfigError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and a run on it with a large learning rate."""
    folder = tmp_path_factory.mktemp("warm")
    tiny.sd3_pipeline(t5=False).save_pretrained(folder / "model")
    first = tiny_run.settings(folder, folder / "model", train={"steps": 2, "lr": 5e-2, "ema": 0})
    train(first)
    return folder, first


def warm(made, tmp_path, file, **train_settings):
    folder, _ = made
    policy = {"kind": "lora", "init": str(file)}
    return tiny_run.settings(tmp_path, folder / "model", policy=policy, train={"steps": 1, "ema": 0, **train_settings})


def as_kohya(made, tmp_path):
    """The run's LoRA as a kohya file."""
    _, first = made
    generator = build_generator(first.generator, first.memory, "cpu")
    from align.policy.lora import load_lora

    load_lora(generator, first.run_dir / "lora")
    network = generator.backbone
    rows = {name: shape[0] for name, shape in linear_layers(network).items()}
    theirs = layouts.published(lora_of(network), rows, layouts.LAYOUTS[type(network).__name__])
    save_file({key: value.contiguous() for key, value in layouts.kohya(theirs).items()}, tmp_path / "kohya.safetensors")
    return tmp_path / "kohya.safetensors"


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_training_starts_from_a_lora(made, tmp_path, layout):
    _, first = made
    source = first.run_dir / "lora"
    file = source if layout == "diffusers" else as_kohya(made, tmp_path)
    config = warm(made, tmp_path, file, lr=0)  # at rate 0 the result is the start
    assert load_config_again(config, tmp_path).policy == config.policy
    train(config)
    start, end = load_file(source / FILE), load_file(config.run_dir / "lora" / FILE)
    for key in (key for key in start if "lora_A" in key):
        both = [(key, key.replace("lora_A", "lora_B"))] * 2
        if key not in end:  # a layer whose B stayed zero is left out of a fused one
            assert not start[both[0][1]].any()
            continue
        mine, theirs = (found[b] @ found[a] for found, (a, b) in zip((end, start), both, strict=True))
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
    assert set(end) <= set(start)
    assert len(end) >= len(start) - 2


def load_config_again(config, tmp_path):
    (tmp_path / "again.yaml").write_text(dump_config(config))
    return load_config(tmp_path / "again.yaml", [])


def test_another_learning_rate_and_resume(made, tmp_path):
    config = warm(made, tmp_path, made[1].run_dir / "lora", lr=1e-3, steps=2)
    train(config)
    whole = tiny_run.final_tensors(config)
    (tmp_path / "b").mkdir()
    other = warm(made, tmp_path / "b", made[1].run_dir / "lora", lr=1e-3, steps=2)
    train(other)
    newest = sorted((other.run_dir / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    shutil.rmtree(other.run_dir / "lora")
    train(other, resume=True)
    assert tiny_run.policy_gap(whole, tiny_run.final_tensors(other)) == 0
    start = load_file(made[1].run_dir / "lora" / FILE)
    end = load_file(config.run_dir / "lora" / FILE)
    moved = max(float((end[key] - start[key]).abs().max()) for key in start)
    assert 0 < moved < 1e-2


def test_ranks_are_the_files(made, tmp_path):
    _, first = made
    tensors = load_file(first.run_dir / "lora" / FILE)
    few = {key: value for key, value in tensors.items() if "attn.to_q" in key}
    save_file(few, tmp_path / "few.safetensors")
    config = warm(made, tmp_path, tmp_path / "few.safetensors")
    parameters = trainable(config, build_generator(config.generator, config.memory, "cpu"))
    assert len(parameters) == len(few) == 4
    assert all(value.requires_grad and value.dtype == torch.float32 for _, value in parameters)
    assert {min(value.shape) for _, value in parameters} == {4}


def test_a_damaged_start_is_refused(made, tmp_path):
    _, first = made
    tensors = load_file(first.run_dir / "lora" / FILE)
    save_file(dict(list(tensors.items())[1:]), tmp_path / "half.safetensors")
    config = warm(made, tmp_path, tmp_path / "half.safetensors")
    with pytest.raises(LoraError, match=r"1 of 15 pairs are damaged: .* has no A"):
        train(config)


def test_a_lora_is_evaluated_on_the_base(made, tmp_path):
    _, first = made
    base = evaluate_run(first)
    kohya = as_kohya(made, tmp_path)
    found = evaluate_run(first, first.run_dir, lora=kohya)
    own = evaluate_run(first, first.run_dir)
    assert found["role"] == f"lora {kohya}"
    effect = own["scores"]["reward"] - base["scores"]["reward"]
    assert effect != 0
    assert found["scores"]["reward"] - base["scores"]["reward"] == pytest.approx(effect, rel=1e-2)
    with pytest.raises(ConfigError, match="two policies"):
        evaluate_run(first, first.run_dir, first.run_dir / "checkpoints", kohya)
    sample_to_folder(first, tmp_path / "samples", count=1, policy=kohya)
    assert list((tmp_path / "samples").glob("*.png"))


def test_the_header_says_every_rank():
    lora = {"a": (torch.ones(2, 3), torch.ones(4, 2)), "b": (torch.ones(1, 3), torch.ones(4, 1))}
    _, header = as_diffusers(lora)
    assert '"transformer.rank_pattern": {"^b": 1}' in header["lora_adapter_metadata"]
