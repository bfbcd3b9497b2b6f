"""The loop: what must not change a gradient does not, what was stopped goes on, what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_run import POLICIES, RECIPES, ZERO_AT_FIRST, final_tensors, settings, some_slow

from align.config.settings import Config
from align.maths.weights import softmax_weight
from align.rollout.sources import Share, StoredSource
from align.runs import checkpoint
from align.training.trainer import train
from alignflow.errors import AlignflowError, DataError
from alignflow.files.policies import GATED, USERS
from generators.load import load
from rewards.base import RewardError


@pytest.mark.parametrize("recipe", some_slow(RECIPES))
def test_every_recipe_runs_and_moves_the_policy(recipe: str, model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, recipe)
    summary = train(config)
    weights = final_tensors(config)
    assert (
        max(
            float(value.abs().max())
            for name, value in weights.items()
            if "policy/" in name and any(part in name for part in ZERO_AT_FIRST)
        )
        > 1e-3
    )
    assert summary["status"] == "finished"
    assert summary["steps"] == 3
    assert summary["network_calls"] > 0
    assert summary["reward_before"] is not None
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == [1, 2, 3]
    assert [row["step"] for row in rows if row["event"] == "eval"] == [0, 2, 3]
    assert {"kl_velocity", "zero_variance_groups", "diversity", "time"} <= rows[1].keys()
    assert ("contrast" in rows[1]) == ("behaviour" in config.recipe.roles(config))
    assert (config.run_dir / "report.html").stat().st_size > 1000
    file = {"gate": GATED, "users": USERS}.get(POLICIES.get(recipe, ""), "pytorch_lora_weights.safetensors")
    assert (config.run_dir / "lora" / file).is_file()
    assert (config.run_dir / "samples" / "step-000000" / "grid.png").is_file()


@pytest.mark.parametrize("recipe", some_slow(RECIPES))
@pytest.mark.parametrize("chunks", [3, 7])
def test_accumulation_equals_a_large_batch(recipe: str, chunks: int, model: Path, tmp_path: Path) -> None:
    weights = []
    for name, chunk in (("whole", 1000), ("chunked", chunks)):
        (tmp_path / name).mkdir()
        options = {"steps": 1, "chunk": chunk, "max_grad_norm": 1e6}
        config = settings(tmp_path / name, model, recipe, train=options, prompts={"heldout": None})
        train(config)
        weights.append(optimizer_moments(config.run_dir))
    whole, chunked = weights
    gap = max(float((a - b).norm() / (a.norm() + 1e-12)) for a, b in zip(whole, chunked, strict=True))
    assert gap < 1e-4


def optimizer_moments(run: Path, learner: str = "policy") -> list[torch.Tensor]:
    """First moments of a learner's AdamW after one update: the gradient up to a factor."""
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    state = torch.load(path / "optimizer.pt", weights_only=True)["learners"][learner]["optimizer"]["state"]
    return [entry["exp_avg"] for entry in state.values() if float(entry["exp_avg"].norm()) > 1e-9]


def test_zero_learning_rate_changes_nothing(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, train={"lr": 0})
    summary = train(config)
    assert summary["reward_after"] == pytest.approx(summary["reward_before"], abs=1e-7)


def test_no_samples_asked_for_between_evaluations(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, samples={"every": 1, "count": 0}, evaluate={"every": 0}, train={"steps": 2})
    assert train(config)["status"] == "finished"
    assert not list((config.run_dir / "samples").glob("*/*.png"))


def test_missing_scores_are_dropped_and_counted(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, reward={"kind": "tiny_run:sometimes_missing"})
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["missing"] for row in rows if row["event"] == "train"] == [3, 3, 3]


@pytest.mark.parametrize(
    ("reward", "error", "words"),
    [
        ("raises", RewardError, "the judge fell asleep"),
        ("all_infinite", RewardError, "inf"),
        ("wrong_shape", RewardError, "shape"),
    ],
)
def test_a_broken_reward_stops_the_run_with_its_name(
    reward: str, error: type[Exception], words: str, model: Path, tmp_path: Path
) -> None:
    config = settings(tmp_path, model, reward={"kind": f"tiny_run:{reward}"}, prompts={"heldout": None})
    with pytest.raises(error, match=words) as caught:
        train(config)
    assert reward in str(caught.value)


def test_a_reward_that_fails_is_told_by_its_line_before_anything_is_evaluated(model: Path, tmp_path: Path) -> None:
    mixed = {"kind": "mixture", "parts": {"a": {"reward": "shapes"}, "b": {"reward": "tiny_run:raises"}}}
    line = r"fails on a grey sample: RuntimeError: the judge fell asleep \(tiny_run.py, line \d+\); a sample without"
    for name, sections in (
        ("alone", {"reward": {"kind": "tiny_run:raises"}}),
        ("member", {"reward": mixed}),
        ("held_out", {"evaluate": {"rewards": {"gold": {"kind": "tiny_run:raises"}}}}),
    ):
        (tmp_path / name).mkdir()
        config = settings(tmp_path / name, model, **sections)
        with pytest.raises(RewardError, match=line):
            train(config)
        assert not config.run_dir.exists()


def test_bad_prompts_are_said_before_any_work(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match="holds no prompts"):
        train(settings(tmp_path, model, prompts={"train": str(empty)}))
    with pytest.raises(DataError, match="does not exist"):
        train(settings(tmp_path, model, prompts={"train": str(tmp_path / "nowhere.txt")}))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a cat"}\n{"text": "a dog"}\n')
    with pytest.raises(DataError, match=r"broken.jsonl line 2"):
        train(settings(tmp_path, model, prompts={"train": str(broken)}))
    long = tmp_path / "long.txt"
    long.write_text("word " * 500 + "\n")
    with pytest.raises(DataError, match=r"long.txt line 1: the prompt .* tokens, the model reads 77"):
        train(settings(tmp_path, model, prompts={"train": str(long)}))
    assert issubclass(DataError, AlignflowError)


def test_stored_pairs(model: Path, tmp_path: Path) -> None:
    lines = []
    for index in range(4):
        for name, colour in (("chosen", (220, 30, 30)), ("rejected", (30, 30, 220))):
            Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}{index}.png")
        lines.append(
            json.dumps({"prompt": "a cat", "chosen": f"chosen{index}.png", "rejected": f"rejected{index}.png"})
        )
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(lines))
    recipe = {"kind": "flow_dpo", "timesteps": 2, "beta": 100}
    config = stored_pairs_config(tmp_path, model, pairs, recipe)
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["event"] == "train"]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0] - 0.01
    pairs.write_text(lines[0] + "\n" + json.dumps({"prompt": "a cat", "chosen": "no.png", "rejected": "no.png"}))
    with pytest.raises(DataError, match=r"pairs.jsonl line 2: no chosen .*no\.png"):
        train(stored_pairs_config(tmp_path / "b", model, pairs, recipe))


def stored_pairs_config(folder: Path, model: Path, pairs: Path, recipe: dict[str, Any]) -> Config:
    """The tiny run, learning from a file instead of its own samples."""
    folder.mkdir(exist_ok=True)
    tree = settings(folder, model).model_dump(mode="json")
    rollout = {"kind": "pairs", "file": str(pairs), "prompts": 4}
    return Config.model_validate({**tree, "rollout": rollout, "recipe": recipe, "reward": None})


def test_stored_samples_count_alike_or_by_their_rewards(model: Path, tmp_path: Path) -> None:
    lines = []
    for index in range(4):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"prompt": f"cat {index}", "sample": f"{index}.png", "reward": index / 4}))
    table = tmp_path / "samples.jsonl"
    table.write_text("\n".join(lines))
    recipe = {"kind": "flow_rwr", "temperature": 0.1, "kl": 0, "timesteps": 4}

    def config(by_reward: bool) -> Config:
        tree = settings(tmp_path, model, train={"steps": 2}).model_dump(mode="json")
        rollout = {"kind": "samples", "file": str(table), "prompts": 4, "by_reward": by_reward}
        return Config.model_validate({**tree, "rollout": rollout, "recipe": recipe, "reward": None})

    for by_reward in (False, True):
        rollout = StoredSource(config(by_reward), load("sd3", model), Share())(0)
        assert rollout.group.tolist() == ([0] * 4 if by_reward else [0, 1, 2, 3])
        number = [int(prompt[-1]) for prompt in rollout.prompts]
        assert rollout.scores.values.tolist() == ([n / 4 for n in number] if by_reward else [1] * 4)
        weight = config(by_reward).recipe.credit(rollout.scores, rollout.group)
        assert weight.mean().item() == pytest.approx(1)
        assert (weight[number.index(3)] > 3.9) == by_reward
    train(config(False))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0.01 for row in rows if row["event"] == "train")
    table.write_text(json.dumps({"prompt": "a cat", "sample": "0.png", "reward": "good"}))
    with pytest.raises(DataError, match=r"samples.jsonl line 1: .* a number under .reward., given .good."):
        StoredSource(config(True), load("sd3", model), Share())


def test_a_lone_sample_weighs_as_much_as_any() -> None:
    assert softmax_weight(torch.tensor([0.2, 5.0]), torch.tensor([0, 1]), 0.1, standardise=True).tolist() == [1, 1]


@pytest.mark.parametrize("recipe", ["nft", "grpo"])
def test_full_fine_tuning(recipe: str, model: Path, tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    config = settings(
        tmp_path, model, recipe, policy={"kind": "full"}, train={"lr": 1e-3, "ema": 0}, evaluate={"role": "policy"}
    )
    train(config)
    weights = final_tensors(config)
    saved = SD3Transformer2DModel.from_pretrained(config.run_dir / "transformer").state_dict()
    base = SD3Transformer2DModel.from_pretrained(model / "transformer").state_dict()
    trained = [name for name in saved if f"policy/{name}" in weights]  # position embeddings are a buffer
    assert any(not torch.equal(saved[name], base[name]) for name in trained)
    assert all(torch.equal(saved[name], weights[f"policy/{name}"]) for name in trained)
    if recipe == "nft":
        assert all(torch.equal(base[name], weights[f"reference/{name}"]) for name in trained)


def test_gradient_checkpointing_changes_no_gradient(model: Path, tmp_path: Path) -> None:
    moments = []
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        (tmp_path / name).mkdir()
        options = {"steps": 1, "gradient_checkpointing": checkpointing}
        config = settings(tmp_path / name, model, train=options, prompts={"heldout": None})
        train(config)
        moments.append(optimizer_moments(config.run_dir))
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_mixed_precision_trains(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, train={"precision": "bf16"})
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows if row["event"] == "train")
    assert all(value.dtype == torch.float32 for value in final_tensors(config).values())


def test_on_policy_shortcuts_save_the_calls_of_old_and_ref(model: Path, tmp_path: Path) -> None:
    recipe = {"kind": "nft", "timesteps": 2, "behaviour_decay": "on_policy", "kl": 0.0}
    config = settings(tmp_path, model, recipe=recipe, prompts={"heldout": None})
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    drawn, terms = 8 * 3, 8 * 2
    assert rows[0]["network_calls"] == drawn + terms  # policy, old and ref are one
    assert [row["network_calls"] for row in rows[1:]] == [drawn + terms + 16] * 2  # and the drift from the base


def test_checkpoint_lora_loads_in_an_untouched_pipeline(model: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    from align.evaluation.evaluate import sample_media
    from generators.load import load

    config = settings(tmp_path, model, policy={"kind": "lora", "rank": 4, "alpha": 16}, generator={"size": [64, 64]})
    train(config)
    path = checkpoint.latest(config.run_dir / "checkpoints")
    assert path is not None
    untouched = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    untouched.load_lora_weights(path)
    ours = load("sd3", str(model))
    from align.policy.lora import load_lora

    load_lora(ours, path)
    media = sample_media(ours, ["a cat"], [7], config.evaluate.sampler)
    from align.maths.seeds import derive

    latents = ours.noise([derive(7, "start")])
    theirs = untouched(
        "a cat", latents=latents, num_inference_steps=3, guidance_scale=1.0, output_type="pt", height=64, width=64
    ).images
    assert float((media - theirs).abs().max()) <= 1e-5


def test_trackers_by_name(model: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(tmp_path, model, trackers=["tensorboard"])
    train(config)
    folders = {file.parent for file in config.run_dir.rglob("events.out.tfevents*")}
    scalars, images = {}, {}
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"images": 0})
        events.Reload()
        scalars |= {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        images |= {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert set(images) == {f"samples/{row:03d}" for row in range(config.samples.count)}
    assert images["samples/000"] == [int(path.name[5:]) for path in sorted(config.run_dir.glob("samples/step-*"))]
    assert scalars["train/reward"] == [1, 2, 3]
    assert scalars["eval/scores.reward"] == [0, 2, 3]
