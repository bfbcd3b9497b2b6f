"""TexForce: LoRAs on text encoders have the policy gradient of both guidance branches, and are kept, read and merged.

A tiny SD3 with two CLIP encoders; a tiny FLUX, of whose encoders diffusers reads a LoRA of the first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import CASES
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from launched import launch
from live import saved_bytes
from peft import LoraConfig
from pydantic import ValidationError
from safetensors.torch import load_file
from test_learners import bench_of, drawn, shake
from test_training import optimizer_moments
from tiny_run import final_tensors, settings
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from align.checking import check, estimate, fitting
from align.config import sharding
from align.config.sampling import Sampler
from align.config.settings import Config
from align.evaluation.evaluate import evaluate_run
from align.export import check as exported
from align.export import export
from align.maths import samplers
from align.maths.seeds import derive
from align.policy.build import add_trained, build_generator
from align.policy.layers import LoraError
from align.policy.lora import add_lora, load_lora, save_lora
from align.rollout.bench import Bench, Point
from align.rollout.rollout import Scored, draw
from align.runs.trained import find_policy
from align.training.trainer import train
from alignflow.errors import ConfigError
from generators.base import Generator
from generators.load import load

BOTH = ("network", "text")
GUIDED = {"sampler": {"kind": "flow_sde", "steps": 3, "guidance": 2.0}}
WAN = {"kind": "wan", "path": "shapes-video"}
PROMPTS = ["a red cube", "a blue ball"]


def texforce(folder: Path, model: Path, trains: str = "text", recipe: Any = None, **sections: Any) -> Config:
    tree = {"kind": "texforce", "trains": trains, **(recipe or {})}
    return settings(folder, model, tree, **{"rollout": GUIDED, **sections})


def ready(config: Config, seed: int | None = 1) -> tuple[Generator, Bench, Scored]:
    """A policy of random weights (of fresh ones where ``seed`` is None), and its rollout."""
    generator, bench = bench_of(config)
    if seed is not None:
        shake(bench, seed)
    return generator, bench, drawn(config, generator)


def gradients(bench: Bench, config: Config, rollout: Scored, credit: Tensor) -> tuple[float, list[Tensor]]:
    """Sum of the loss, and its gradients in the order of the policy's parameters."""
    with bench.acting("policy"):
        loss = config.recipe.loss(config.recipe.terms(rollout, credit), rollout, bench).value.sum()  # type: ignore[arg-type]
        values = [value for _, value in bench.roles.parameters]
        return float(loss.detach()), list(torch.autograd.grad(loss, values))


# -- the network that a LoRA on text encoders makes -------------------------------------------------------------------


@pytest.mark.parametrize("trains", ["text", "both"])
def test_a_new_lora_changes_no_sample(trains: str, model: Path, tmp_path: Path) -> None:
    config = texforce(tmp_path, model, trains)
    generator, _, rollout = ready(config, seed=None)
    plain = build_generator(config.generator, config.memory, "cpu")
    assert torch.equal(drawn(config, plain).latents, rollout.latents)
    names = {name.partition(".")[0] for name, value in generator.backbone.named_parameters() if value.requires_grad}
    assert bool(names) == (trains == "both")


def test_every_role_encodes_with_its_own_weights(model: Path, tmp_path: Path) -> None:
    config = texforce(tmp_path, model)
    generator, bench, _ = ready(config)
    plain = build_generator(config.generator, config.memory, "cpu")
    base, negative = plain.encode(PROMPTS), plain.encode([""])
    found = {role: bench.encode(PROMPTS, role) for role in ("policy", "reference", "ema")}
    for role in ("reference", "ema"):  # both hold what they started from, which is the base
        assert all(torch.equal(value, base.tensors[name]) for name, value in found[role].tensors.items())
        assert torch.equal(found[role].negative.tensors["embeds"], negative.tensors["embeds"])  # type: ignore[union-attr]
        assert not found[role].tensors["embeds"].requires_grad
    own = found["policy"]
    assert own.tensors["embeds"].requires_grad
    assert own.negative is not None
    assert not torch.equal(own.tensors["embeds"], base.tensors["embeds"])
    assert not torch.equal(own.negative.tensors["embeds"], negative.tensors["embeds"])
    with torch.no_grad(), bench.roles.use("ema"):  # as evaluation does
        evaluated = generator.encode(PROMPTS)
    assert torch.equal(evaluated.tensors["embeds"], base.tensors["embeds"])
    assert torch.equal(evaluated.negative.tensors["embeds"], negative.tensors["embeds"])  # type: ignore[union-attr]


def test_no_text_of_older_weights_is_used(model: Path, tmp_path: Path) -> None:
    """Guided velocities follow every change of the encoders, in sampling too, where nothing has a gradient."""
    config = texforce(tmp_path, model)
    generator, bench, _ = ready(config)
    x, t = generator.noise([1, 2]), torch.tensor([0.3, 0.8])
    for seed in (2, 3):
        shake(bench, seed)
        fresh, other = bench_of(config)
        for (_, mine), (_, theirs) in zip(other.roles.parameters, bench.roles.parameters, strict=True):
            mine.data.copy_(theirs)
        with torch.no_grad():
            expected = fresh.velocity(x, t, fresh.encode(PROMPTS), 2.0)
            assert torch.equal(generator.velocity(x, t, generator.encode(PROMPTS), 2.0), expected)
            point = Point(x, t, generator.encode(["a cat", "a cat"]), 2.0, PROMPTS)
            assert torch.equal(bench.velocity("policy", point), expected)


def test_a_loaded_lora_changes_the_negative_prompt_too(model: Path, tmp_path: Path) -> None:
    generator, _, _ = ready(texforce(tmp_path, model))
    save_lora(generator, tmp_path)
    other = load("sd3", str(model), options=generator.options)
    x, t = generator.noise([1]), torch.tensor([0.5])
    other.velocity(x, t, other.encode(["a cat"]), 2.0)  # which keeps the base's negative prompt
    load_lora(other, tmp_path)
    with torch.no_grad():
        expected = generator.velocity(x, t, generator.encode(["a cat"]), 2.0)
        torch.testing.assert_close(other.velocity(x, t, other.encode(["a cat"]), 2.0), expected)


# -- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("trains", ["text", "both"])
def test_the_gradient_is_that_of_stock_encoding(trains: str, guidance: float, model: Path, tmp_path: Path) -> None:
    """The pipeline's own ``encode_prompt`` of every sample, both guidance branches, the surrogate by its formula."""
    sampler = {"kind": "flow_sde", "steps": 3, "guidance": guidance}
    config = texforce(tmp_path, model, trains, {"ratio_clip": 10.0}, rollout={"sampler": sampler})
    generator, bench, rollout = ready(config)
    shake(bench, 2)  # off policy: ratios are not 1
    credit = torch.linspace(-1, 1, len(rollout.seeds))
    _, found = gradients(bench, config, rollout, credit)

    path, total = rollout.trajectory, torch.zeros(())
    assert path is not None
    for step in range(len(path.t)):
        embeds, negative, pooled, negative_pooled = generator.pipeline.encode_prompt(
            rollout.prompts, None, None, negative_prompt=[""] * len(rollout.prompts), max_sequence_length=1
        )
        texts = {"embeds": embeds[:, :78], "pooled": pooled}, {"embeds": negative[:, :78], "pooled": negative_pooled}
        t, t_next = path.t[step].expand(len(embeds)), path.t_next[step].expand(len(embeds))
        conditional, unconditional = (
            generator.predict(path.x[:, step], t, type(rollout.cond)(text)).float() for text in texts
        )
        v = unconditional + guidance * (conditional - unconditional)
        taken = samplers.step(
            "flow_sde", path.x[:, step], v, t, t_next, noise_level=config.rollout.sampler.noise_level or 0.0,  # type: ignore[union-attr]
            t_second=path.t_second, x_next=path.x_next[:, step],
        )  # fmt: skip
        ratio = (taken.logp - path.logp[:, step]).exp()
        total = total - (credit * ratio).sum()  # nothing is clipped
    expected = torch.autograd.grad(total, [value for _, value in bench.roles.parameters])
    largest = max(float(value.norm()) for value in expected)
    assert largest > 1e-4
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine - theirs).norm()) < 1e-3 * float(theirs.norm()) + 1e-5 * largest


def test_the_gradient_is_the_slope_of_the_loss(model: Path, tmp_path: Path) -> None:
    config = texforce(tmp_path, model, recipe={"ratio_clip": 10.0, "kl": 0.5})
    _, bench, rollout = ready(config)
    credit = torch.ones(len(rollout.seeds))
    _, slope = gradients(bench, config, rollout, credit)
    norm = torch.cat([value.flatten() for value in slope]).norm()
    ends = []
    for sign in (0.05, -0.05):
        for (_, value), one in zip(bench.roles.parameters, slope, strict=True):
            value.data += sign * one / norm
        ends.append(gradients(bench, config, rollout, credit)[0])
        for (_, value), one in zip(bench.roles.parameters, slope, strict=True):
            value.data -= sign * one / norm
    assert (ends[0] - ends[1]) / 0.1 == pytest.approx(float(norm), rel=0.02)


def test_a_positive_advantage_raises_the_probability_and_a_negative_one_lowers_it(model: Path, tmp_path: Path) -> None:
    config = texforce(tmp_path, model)
    for sign in (1.0, -1.0):
        _, bench, rollout = ready(config)
        _, slope = gradients(bench, config, rollout, torch.full((len(rollout.seeds),), sign))
        for (_, value), one in zip(bench.roles.parameters, slope, strict=True):
            value.data -= 0.1 * one / torch.cat([other.flatten() for other in slope]).norm()
        terms = config.recipe.terms(rollout, torch.ones(len(rollout.seeds)))
        with bench.acting("policy"):
            ratio = config.recipe.loss(terms, rollout, bench).metrics["ratio"]  # type: ignore[arg-type]
        assert sign * float(ratio.log().sum()) > 0


def test_equal_prompts_are_encoded_once_a_chunk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = texforce(tmp_path, model)
    generator, bench, rollout = ready(config)
    asked: list[list[str]] = []
    encode = type(generator).encode_text

    def counted(self: Any, prompts: Any, inputs: Any) -> Any:
        asked.append(list(prompts))
        return encode(self, prompts, inputs)

    monkeypatch.setattr(type(generator), "encode_text", counted)
    gradients(bench, config, rollout, torch.ones(len(rollout.seeds)))
    assert len(rollout.seeds) == 8
    assert sorted(map(len, asked)) == [1, 2]  # the negative prompt, and two prompts of four samples each
    assert [""] in asked


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", ["text", "both"])
def test_a_run_changes_the_loras_it_trains_and_nothing_else(
    trains: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Generator] = []

    def built(*args: Any, **how: Any) -> Generator:
        made.append(build_generator(*args, **how))
        return made[0]

    monkeypatch.setattr("align.training.state.build_generator", built)
    config = texforce(tmp_path, model, trains)
    train(config)
    plain = build_generator(config.generator, config.memory, "cpu")
    for name, part in plain.modules().items():
        after = {key.replace(".base_layer", ""): value for key, value in made[0].modules()[name].state_dict().items()}
        assert all(torch.equal(value, after[key]) for key, value in part.state_dict().items())
    moved = {name: bool(value.any()) for name, value in final_tensors(config).items() if "lora_B" in name}
    parts = {name.split("/")[1].partition(".")[0] for name in moved}
    assert parts == {"text_encoder", "text_encoder_2", *(["transformer_blocks"] if trains == "both" else [])}
    for part in parts:
        assert any(changed for name, changed in moved.items() if name.split("/")[1].startswith(f"{part}."))


@pytest.mark.few(1)
@pytest.mark.parametrize("trains", ["text", "both"])
def test_a_run_goes_on_to_the_bit(trains: str, model: Path, tmp_path: Path) -> None:
    runs = []
    for name, parts in (("whole", [3]), ("parts", [1, 3])):
        (tmp_path / name).mkdir()
        for steps in parts:
            config = texforce(tmp_path / name, model, trains, train={"steps": steps}, evaluate={"every": 0})
            train(config, resume=steps != parts[0])
        runs.append(config)
    whole, others = (final_tensors(config) for config in runs)
    assert {name.partition("/")[0] for name in whole} == {"policy", "ema"}
    assert whole.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in whole.items())


def test_the_log_compares_with_the_base_and_its_own_text(model: Path, tmp_path: Path) -> None:
    """``kl_velocity`` of a run whose network does not move: the reference has other text, and so another velocity."""
    config = texforce(tmp_path, model, recipe={"kl": 0.1}, evaluate={"every": 0})
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["event"] == "train"]
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert rows[0]["kl_velocity"] == rows[0]["kl_step"] == 0
    assert rows[-1]["kl_velocity"] > 0
    assert rows[-1]["kl_step"] > 0


RUN = """
import json, sys
from pathlib import Path
from align.training.trainer import train
from tiny_run import settings
train(settings(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), **json.loads(sys.argv[4])))
"""
ONE_UPDATE = {
    "rollout": {"prompts": 3, "group": 2, **GUIDED},
    "train": {"steps": 1, "max_grad_norm": 1e6, "chunk": 3},
    "evaluate": {"every": 0},
    "reward": {"kind": "tiny_run:missing_by_content"},
}


def assert_same_moments(first: list[Tensor], second: list[Tensor]) -> None:
    """Moments of one process and of two, up to the order of summation."""
    assert len(first) == len(second) > 0
    largest = max(float(value.norm()) for value in first)
    assert largest > 1e-6
    for one, two in zip(first, second, strict=True):
        assert float((one - two).norm()) < 1e-3 * float(one.norm()) + 1e-5 * largest


@pytest.mark.slow
@pytest.mark.parametrize(("trains", "sharded"), [("text", False), ("both", False), ("text", True)])
def test_two_processes_equal_one(
    trains: str, sharded: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicated, and with the network sharded (FSDP2): the text encoders are whole in every process."""
    moments: dict[int, list[Tensor]] = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        monkeypatch.setenv("ACCELERATE_USE_FSDP", str(sharded and count == 2).lower())
        monkeypatch.setenv("FSDP_VERSION", "2")
        recipe = json.dumps({"kind": "texforce", "trains": trains})
        launch(count, folder, RUN, str(folder), str(model), recipe, json.dumps(ONE_UPDATE))
        moments[count] = list(optimizer_moments(folder / "run"))
    assert_same_moments(moments[1], moments[2])


# -- files ------------------------------------------------------------------------------------------------------------


def stock_samples(pipeline: Any, generator: Generator) -> Tensor:
    """Latents that a pipeline of diffusers draws of the prompts, guided, from our noise."""
    noise = generator.noise([derive(seed, "start") for seed in (1, 2)])
    height, width = generator.size
    return pipeline(
        PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=2.0, output_type="latent", height=height,
        width=width,
    ).images  # fmt: skip


@pytest.mark.parametrize("trains", ["text", "both"])
def test_the_stock_pipeline_reads_both_loras_from_one_folder(trains: str, model: Path, tmp_path: Path) -> None:
    config = texforce(tmp_path, model, trains)
    generator, _, _ = ready(config)
    ours, _ = draw(generator, generator.encode(PROMPTS), [1, 2], Sampler(kind="ode", steps=3, guidance=2.0))
    file = save_lora(generator, tmp_path / "lora")
    starts = {key.partition(".")[0] for key in load_file(file)}
    assert starts == {"text_encoder", "text_encoder_2", *(["transformer"] if trains == "both" else [])}
    assert all(".text_model.encoder." in key for key in load_file(file) if key.startswith("text_encoder"))
    absent = dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"))
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(model, **absent)
    pipeline.set_progress_bar_config(disable=True)
    base = stock_samples(pipeline, generator)
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    torch.testing.assert_close(stock_samples(pipeline, generator), ours, atol=2e-5, rtol=1e-4)
    assert float((base - ours).abs().max()) > 1e-2
    again = load("sd3", str(model), options=generator.options)
    load_lora(again, tmp_path / "lora")
    read, _ = draw(again, again.encode(PROMPTS), [1, 2], Sampler(kind="ode", steps=3, guidance=2.0))
    assert torch.equal(read, ours)


def test_flux_reads_the_lora_of_its_first_encoder(tmp_path: Path) -> None:
    """Its CLIP class has shorter names than SD3's in newer versions of transformers."""
    case = next(case for case in CASES if case.name == "flux-dev")
    case.build().save_pretrained(tmp_path / "model")
    generator = load("flux", str(tmp_path / "model"), options=case.options)
    names = [name for name, _ in add_lora(generator, 4, 8, parts=BOTH)]
    assert {name.partition(".")[0] for name in names} == {
        "transformer_blocks", "single_transformer_blocks", "text_encoder",
    }  # fmt: skip
    source = torch.Generator().manual_seed(0)
    for network in generator.part_networks(BOTH).values():
        for name, value in network.named_parameters():
            if "lora_B" in name:
                value.data = 0.1 * torch.randn(value.shape, generator=source)
    policy = exported.trained_loras(generator)
    save_lora(generator, tmp_path / "lora")
    answers = exported.answers(generator, decode=False)
    stock = load("flux", str(tmp_path / "model"), options=case.options)
    files = dict.fromkeys(policy, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    exported.read_lora(stock, files, policy, 1e-5)
    assert exported.answers(stock, decode=False).moved(answers) < 1e-5
    stock_pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    stock_pipeline.load_lora_weights(str(tmp_path / "lora"))
    assert any("lora" in name for name, _ in stock_pipeline.text_encoder.named_parameters())


@pytest.mark.parametrize("trains", ["text", "both"])
def test_merged_weights_compute_as_both_loras(trains: str, model: Path, tmp_path: Path) -> None:
    generator, _, _ = ready(texforce(tmp_path, model, trains))
    x, t = generator.noise([1, 2]), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        expected = generator.velocity(x, t, generator.encode(PROMPTS), 2.0)
        exported.merge(generator)
        generator.text_changed()
        found = generator.velocity(x, t, generator.encode(PROMPTS), 2.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for part in generator.modules().values():
        assert not [name for name, _ in part.named_parameters() if "lora" in name or "base_layer" in name]


@pytest.mark.few(1)
@pytest.mark.parametrize("trains", ["text", "both"])
def test_a_finished_run_is_exported_evaluated_and_continued(trains: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    config = texforce(tmp_path / "first", model, trains, train={"steps": 2})
    summary = train(config)
    for how in ({"run_dir": config.run_dir}, {"lora": config.run_dir / "lora"}):
        assert evaluate_run(config, **how)["scores"]["reward"] == pytest.approx(summary["reward_after"], abs=1e-6)  # type: ignore[arg-type]
    trained = find_policy(config.run_dir)
    for to in ("diffusers", "merged", "comfyui", "kohya"):
        found = export(trained, to)
        assert found["effect"] > 0
        assert found["share"] < 0.1
    card = (config.run_dir / "export/diffusers/README.md").read_text()
    assert "on the text encoders" in card

    first = {name.removeprefix("ema/"): value for name, value in final_tensors(config).items() if "ema/" in name}
    start = config.run_dir / ("lora" if trains == "text" else "export/kohya")
    more = {"policy": {"kind": "lora", "init": str(start)}, "train": {"steps": 1, "lr": 0.0}}
    continued = texforce(tmp_path, model, trains, recipe={"kl": 0.1}, **more)
    assert check.check_files(continued) is None
    train(continued)
    found_ = final_tensors(continued)
    assert {name.partition("/")[0] for name in found_} == {"policy", "reference", "ema"}
    for name, value in first.items():
        if f"policy/{name}" not in found_:  # published layouts leave out a layer that changes nothing
            assert start.name == "kohya"
            assert not first[name.replace("lora_A", "lora_B")].any()
            continue
        assert torch.equal(found_[f"policy/{name}"], value)
        assert torch.equal(found_[f"reference/{name}"], value)


# -- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "path", "words"),
    [
        ({"memory": {"cache_prompts": "memory"}}, "memory.cache_prompts", "prompts cannot be cached: none"),
        ({"memory": {"offload": "model"}, "generator": {"device": "cuda"}}, "memory.offload", "backward pass: none"),
        ({"policy": {"kind": "full"}}, "policy.kind", "LoRAs on the text encoders: use lora"),
        (
            {"generator": {"kind": "wan", "path": "shapes-video"}},
            "generator.kind",
            "diffusers cannot load a LoRA of those of wan; use one of flux, ",
        ),
        ({"rollout": {"sampler": {"kind": "ode", "steps": 3}}}, "rollout.sampler.kind", "needs a stochastic sampler"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    sections: dict[str, Any], path: str, words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError) as caught:
        texforce(tmp_path, model, **sections)
    assert path in str(caught.value)
    assert words in str(caught.value)


def test_both_parts_beside_a_sharded_network_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding.problems(texforce(tmp_path, model, "text")) == []
    (problem,) = sharding.problems(texforce(tmp_path, model, "both"))
    assert problem.path == "recipe.trains"
    assert "use text, or launch without FSDP" in problem.message


def test_a_lora_of_other_parts_is_not_continued(model: Path, tmp_path: Path) -> None:
    generator, _, _ = ready(texforce(tmp_path, model, "text"))
    save_lora(generator, tmp_path / "text")
    start = {"policy": {"kind": "lora", "init": str(tmp_path / "text")}}
    for config in (texforce(tmp_path, model, "both", **start), settings(tmp_path, model, "nft", **start)):
        with pytest.raises(
            ConfigError, match=r"policy.init.* changes text encoders, and the network.* would be trained"
        ):
            check.check_files(config)
        with pytest.raises(LoraError, match=r"would be trained: train the same parts .*--to merged"):
            add_trained(config, build_generator(config.generator, config.memory, "cpu"))


def test_targets_are_those_of_the_parts_that_are_trained(model: Path, tmp_path: Path) -> None:
    def made(trains: str, *targets: str) -> set[str]:
        config = texforce(tmp_path, model, trains, policy={"targets": list(targets)})
        check.check_files(config)
        generator = build_generator(config.generator, config.memory, "cpu")
        add_trained(config, generator)
        found = [name for part in generator.part_networks(BOTH).values() for name, _ in part.named_parameters()]
        return {".".join(name.split(".lora_")[0].split(".")[-2:]) for name in found if ".lora_" in name}

    assert made("text", "fc1", "self_attn.v_proj") == {"mlp.fc1", "self_attn.v_proj"}
    assert made("both", "fc1", "attn.to_q") == {"mlp.fc1", "attn.to_q"}
    with pytest.raises(ConfigError, match=r"policy.targets.*attn.to_q match no linear layer"):
        made("text", "fc1", "attn.to_q")
    generator = load("sd3", str(model))
    with pytest.raises(LoraError, match=r"\['fc1'\] match no linear layer; there are .*attn.to_q"):
        add_lora(generator, 4, 4, ["fc1"])
    with pytest.raises(LoraError, match=r"\['attn.to_q'\] match no linear layer of the text encoders; .*self_attn.q"):
        add_lora(generator, 4, 4, ["attn.to_q"], parts=("text",))


def test_encoders_without_a_reader_of_their_lora_are_refused(model: Path) -> None:
    generator = load("sd3", str(model))
    generator.text_loras = ()
    with pytest.raises(LoraError, match="of text encoders into a StableDiffusion3Pipeline: train the network alone"):
        add_lora(generator, 4, 4, parts=BOTH)


# -- the estimate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", ["text", "both"])
def test_the_estimate_counts_the_text_encoders(trains: str, model: Path, tmp_path: Path) -> None:
    config = texforce(tmp_path, model, trains)
    _, bench, _ = ready(config)
    trained = sum(value.numel() * value.itemsize for _, value in bench.roles.parameters)
    found = estimate.estimate(config)
    kept = {item.name: item.bytes for item in found.kept}
    assert kept["gradients"] == trained
    assert kept["roles"] == 2 * trained  # the policy and ema
    assert "text activations" in {item.name for item in found.phases["updating"]}
    assert not [change for change, _ in fitting.savings(config) if change.startswith("memory.cache_prompts")]


@pytest.mark.parametrize("way", ["lora", "lora, autocast"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])  # of CLIP L and of CLIP G
def test_what_the_graph_of_a_text_encoder_keeps(way: str, activation: str) -> None:
    encoder: Any = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=64, intermediate_size=256, num_attention_heads=2, projection_dim=64, vocab_size=500,
            hidden_act=activation,
        )
    )  # fmt: skip
    encoder.to(torch.bfloat16).eval().requires_grad_(False)
    width = estimate.text_width(encoder)
    encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]))
    for value in encoder.parameters():
        value.data = value.data.float() if value.requires_grad else value.data
    ids = torch.randint(0, 500, (2, 77))
    with torch.autocast("cpu", torch.bfloat16, enabled=way.endswith("autocast")):
        found = saved_bytes(lambda: encoder(ids, output_hidden_states=True), list(encoder.parameters()))
    assert found == pytest.approx(2 * width * estimate.SAVED[way] * 2, rel=0.3)
