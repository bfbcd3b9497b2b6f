"""The estimate against what torch really keeps, on networks of the real classes; presets; what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import written
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from live import Live, saved_bytes
from tiny_run import settings

from align.checking import estimate, fitting, remedies
from align.checking.architectures import KNOWN, count, parts_of
from align.config import memory
from align.config.load import json_schema, load_config, overridden
from align.policy import build
from align.policy.lora import add_lora
from align.rollout.rollout import Drawn
from align.rollout.sources import OnlineSource, Share
from align.training.trainer import train
from alignflow.errors import ConfigError, TrainingError
from generators.load import load
from generators.settings import Options

run, write = written.run, written.write
ROOT = Path(__file__).parent.parent
GB = estimate.GB
IMAGE, TEXT, HALF = 256, 64, torch.bfloat16


# -- activations ------------------------------------------------------------------------------------------------------


def sd3(dual: bool = False, blocks: int = 3) -> tuple[Any, dict[str, Any]]:
    """Blocks as wide as four heads, their shape that of the real ones."""
    network = SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=16, out_channels=16, num_layers=blocks, attention_head_dim=64,
        num_attention_heads=4, joint_attention_dim=512, caption_projection_dim=256, pooled_projection_dim=64,
        pos_embed_max_size=64, qk_norm="rms_norm", dual_attention_layers=tuple(range(blocks)) if dual else (),
    )  # fmt: skip
    told = {
        "hidden_states": torch.randn(1, 16, 32, 32, dtype=HALF),
        "pooled_projections": torch.randn(1, 64, dtype=HALF),
    }
    return network.to(HALF), told


def flux(blocks: int = 3) -> tuple[Any, dict[str, Any]]:
    network = FluxTransformer2DModel(
        num_layers=1, num_single_layers=blocks - 1, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=512, pooled_projection_dim=64, axes_dims_rope=(8, 28, 28), guidance_embeds=True,
    )  # fmt: skip
    told = {
        "hidden_states": torch.randn(1, IMAGE, 64, dtype=HALF),
        "pooled_projections": torch.randn(1, 64, dtype=HALF),
        "guidance": torch.ones(1),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.zeros(IMAGE, 3),
    }
    return network.to(HALF), told


def wan(blocks: int = 3) -> tuple[Any, dict[str, Any]]:
    network = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, num_layers=blocks, ffn_dim=1280, text_dim=512
    )
    return network.to(HALF), {"hidden_states": torch.randn(1, 16, 4, 16, 16, dtype=HALF)}


NETWORKS = {"sd3": sd3, "sd35": lambda **how: sd3(True, **how), "flux": flux, "wan": wan}
each = pytest.mark.parametrize("name", NETWORKS)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def ready(name: str, **how: Any) -> tuple[Any, Any, int]:
    """A network, its forward pass, and the estimate's width of its blocks."""
    network, told = NETWORKS[name](**how)
    told |= {"timestep": torch.ones(1), "encoder_hidden_states": torch.randn(1, TEXT, 512, dtype=HALF)}
    widths = estimate.block_widths(network, IMAGE, TEXT)
    return network, lambda: network(**told, return_dict=False), widths


@each
@pytest.mark.parametrize("way", estimate.SAVED)
def test_what_a_graph_keeps(name: str, way: str) -> None:
    network, forward, widths = ready(name)
    if way != "full":
        from peft import LoraConfig

        network.requires_grad_(False)
        network.add_adapter(LoraConfig(r=4, target_modules=list(TARGETS)))
        for value in network.parameters():
            value.data = value.data.float() if value.requires_grad else value.data
    with torch.autocast("cpu", HALF, enabled=way.endswith("autocast")):
        found = saved_bytes(forward, list(network.parameters()))
    expected = sum(widths) * estimate.SAVED[way] * HALF.itemsize
    assert found == pytest.approx(expected, rel=0.3)


@each
def test_what_a_checkpointed_graph_keeps_of_a_block(name: str) -> None:
    found = []
    for blocks in (2, 4):
        network, forward, _ = ready(name, blocks=blocks)
        network.enable_gradient_checkpointing()
        network.train()
        found.append(saved_bytes(forward, list(network.parameters())))
    assert (found[1] - found[0]) / 2 == pytest.approx((IMAGE + TEXT) * 256 * HALF.itemsize, rel=0.3)


@each
def test_what_lives_in_a_pass_without_gradient(name: str) -> None:
    _, forward, widths = ready(name)
    with torch.no_grad(), Live() as live:
        forward()
    expected = max(widths) * estimate.FORWARD * HALF.itemsize
    assert 0.6 * expected < live.peak < 1.3 * expected


@pytest.mark.parametrize("frames", [1, *(pytest.param(count, marks=pytest.mark.slow) for count in (5, 9))])
def test_what_lives_while_decoding_videos(frames: int) -> None:
    vae = AutoencoderKLWan(base_dim=16).to(HALF)
    latents = torch.randn(1, 16, (frames - 1) // 4 + 1, 8, 8, dtype=HALF)
    with torch.no_grad(), Live() as live:
        vae.decode(latents)
    kind, channels = estimate.decoder_maps(vae.config, frames)
    assert live.peak == pytest.approx(estimate.DECODED[kind] * channels * 64 * 64 * HALF.itemsize, rel=0.3)


def image_vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
    ).requires_grad_(False)  # fmt: skip


@pytest.mark.slow
def test_what_lives_while_decoding_images() -> None:
    vae = image_vae().to(HALF)
    with torch.no_grad(), Live() as live:
        vae.decode(torch.randn(2, 16, 16, 16, dtype=HALF))
    kind, channels = estimate.decoder_maps(vae.config, 1)
    assert live.peak == pytest.approx(2 * estimate.DECODED[kind] * channels * 128 * 128 * HALF.itemsize, rel=0.3)


@pytest.mark.parametrize("frames", [0, 1, 5])
def test_what_the_graph_of_a_decode_keeps(frames: int) -> None:
    """In float32, of an image where there are 0 frames."""
    vae = AutoencoderKLWan(base_dim=8).requires_grad_(False) if frames else image_vae()
    shape = (1, 16, (frames - 1) // 4 + 1, 4, 4) if frames else (1, 16, 4, 4)
    latents = torch.randn(shape, requires_grad=True)
    found = saved_bytes(lambda: vae.decode(latents), list(vae.parameters()))
    kind, channels = estimate.decoder_maps(vae.config, max(frames, 1))
    expected = estimate.GRAPH[kind] * channels * 32 * 32 * max(frames, 1) * 4
    assert found == pytest.approx(expected, rel=0.3)


# -- what is counted --------------------------------------------------------------------------------------------------


def test_weights_and_learning_are_counted_exactly(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "grpo", evaluate={"rewards": {}})
    kept = {item.name: item.bytes for item in estimate.estimate(config).kept}
    generator = load("sd3", str(model), options=Options(size=(32, 32)))
    for name, part in generator.modules().items():
        assert kept[name] == sum(value.numel() * value.itemsize for value in part.state_dict().values())
    parameters = [value for _, value in add_lora(generator, 4, 4)]
    trained = sum(value.numel() * value.itemsize for value in parameters)
    assert kept["gradients"] == trained
    assert kept["roles"] == 2 * trained  # the policy and ema
    optimizer = build.build_optimizer(config.train, parameters)
    for value in parameters:
        value.grad = torch.ones_like(value)
    optimizer.step()
    states = [state for entry in optimizer.state.values() for state in entry.values() if state.ndim]
    assert kept["optimizer"] == sum(state.numel() * state.itemsize for state in states)
    rollout = OnlineSource(config, generator, Share(), config.recipe.needs)(0)
    assert kept["rollout"] == held(rollout, staged=False)
    staged = settings(tmp_path, model, "grpo", evaluate={"rewards": {}}, memory={"trajectories": "cpu"})
    staged = staged.model_copy(update={"rollout": staged.rollout.model_copy(update={"chunk": 1})})
    assert {item.name: item.bytes for item in estimate.estimate(staged).kept}["rollout"] == held(rollout, staged=True)


def held(rollout: Drawn, staged: bool) -> float:
    """Bytes of a rollout's latents and trajectory on the device; staged, the trajectory of one sample."""
    path = rollout.trajectory
    assert path is not None
    steps = sum(x.numel() * x.itemsize for x in (path.x, path.x_next, path.mean))
    return rollout.latents.numel() * 4 + (steps / len(rollout.latents) if staged else steps)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2028),
        ("stabilityai/stable-diffusion-3.5-medium", 2243),
        ("stabilityai/stable-diffusion-3.5-large", 8057),
        ("black-forest-labs/FLUX.1-dev", 11901),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1419),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14288),
        ("Qwen/Qwen-Image", 20430),
    ],
)
def test_published_networks_have_their_published_size(name: str, millions: int) -> None:
    assert round(count(KNOWN[name]["transformer"]) / 1e6) == millions


def test_the_embedded_world_is_read_from_its_files() -> None:
    parts = parts_of("sd3", "shapes")
    assert parts is not None
    assert count(parts["transformer"]) == sum(v.numel() for v in load("sd3", "shapes").backbone.parameters())


# -- settings that save -----------------------------------------------------------------------------------------------


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Any:
    """FLUX.1 dev at 512 x 512 with a LoRA of rank 32, eight prompts a rollout."""
    monkeypatch.chdir(ROOT)
    sizes = ("generator.size=[512, 512]", "policy.rank=32", "rollout.prompts=8")
    return lambda *overrides: load_config(ROOT / "configs/flux-dev/nft.yaml", (*sizes, *overrides))


def phase(config: Any, name: str) -> float:
    return sum(item.bytes for item in estimate.estimate(config).phases[name])


def kept(config: Any, name: str) -> float:
    return next(item.bytes for item in estimate.estimate(config).kept if item.name == name)


def test_every_setting_saves_what_it_says(large: Any) -> None:
    plain = large()
    network = kept(plain, "transformer")
    assert kept(overridden(plain, "memory.quantise=nf4"), "transformer") == pytest.approx(network * 0.53 / 2, rel=0.01)
    fp8 = overridden(plain, "memory.quantise=fp8")
    assert kept(fp8, "transformer") == pytest.approx(network / 2, rel=0.01)
    assert kept(fp8, "transformer") > network / 2  # a scale for every row
    assert kept(overridden(fp8, "memory.compute=fp8"), "transformer") == kept(fp8, "transformer")
    assert kept(overridden(plain, "generator.dtype=float32"), "transformer") == 2 * network
    assert kept(overridden(plain, "memory.cache_prompts=disk"), "text_encoder_2") == 0
    assert kept(overridden(plain, "memory.offload=model"), "text_encoder_2") == 0
    assert kept(overridden(plain, "train.optimizer=adamw8bit"), "optimizer") == kept(plain, "optimizer") / 4
    assert phase(overridden(plain, "train.chunk=2"), "updating") == phase(plain, "updating") / 2
    assert phase(overridden(plain, "train.gradient_checkpointing=false"), "updating") > 5 * phase(plain, "updating")
    assert phase(overridden(plain, "memory.vae_slicing=true"), "decoding") == phase(plain, "decoding") / 4
    full = overridden(plain, "policy={kind: full}")
    assert kept(full, "gradients") == network
    assert kept(full, "optimizer") == 2 * network


@pytest.mark.parametrize("name", memory.PRESETS)
def test_presets_fit_their_cards(name: str, large: Any) -> None:
    config = large(f"memory={name}")
    assert config.memory.rewards == ("cpu" if name == "12gb" else "device")
    assert config.memory.cache_prompts == "memory"
    assert config.train.gradient_checkpointing
    assert estimate.estimate(config).bytes < fitting.card_bytes(name)


def test_a_preset_wins_over_what_is_extended_and_loses_to_its_own_file(large: Any, tmp_path: Path) -> None:
    mine = f"extends: {ROOT / 'configs/flux-dev/nft.yaml'}\nmemory: 12gb\ntrain: {{chunk: 3}}\n"
    (tmp_path / "mine.yaml").write_text(mine)
    config = load_config(tmp_path / "mine.yaml", ["memory.quantise=fp8"])
    assert (config.train.chunk, config.rollout.chunk) == (3, 1)
    assert (config.memory.quantise, config.memory.vae_tiling) == ("fp8", True)
    assert large("memory=12gb", "memory=48gb").memory.quantise == "none"


def test_editors_know_the_presets() -> None:
    known = json_schema()["properties"]["memory"]
    assert known["anyOf"] == [{"enum": list(memory.PRESETS)}, {"$ref": "#/$defs/Memory"}]


def test_a_preset_for_stored_pairs(tmp_path: Path, write: Any) -> None:
    config = load_config(write(), ["memory=24gb"])
    assert config.rollout.kind == "pairs"
    assert config.train.chunk == 2


# -- check ------------------------------------------------------------------------------------------------------------


def test_check_says_what_fits(large: Any, run: Any) -> None:
    config = str(ROOT / "configs/flux-dev/nft.yaml")
    code, out, _ = run("check", config, "--memory")
    assert code == 0
    assert "11.9 billion weights, bfloat16" in out
    assert "fit" not in out.split("nothing was loaded")[1].replace("is ready", "")
    assert "fits in 80 GB" in run("check", config, "--card", "80gb")[1]
    out = run("check", config, "--card", "24")[1]
    listed = out.split("largest first:\n")[1].split("together these fit: ")
    saved = [float(line.split()[-2]) for line in listed[0].splitlines() if line.startswith("  ")]
    assert saved == sorted(saved, reverse=True)
    assert saved[0] > 15
    overrides = listed[1].splitlines()[0].split()
    assert "fits in 24 GB" in run("check", config, *[o for o in overrides if "adamw" not in o], "--card", "24")[1]


def test_check_refuses_what_it_does_not_know(large: Any, run: Any) -> None:
    config = str(ROOT / "configs/flux-dev/nft.yaml")
    code, _, err = run("check", config, "--card", "a lot")
    assert (code, err) == (2, "error: --card a lot: a size in GB, such as 24gb\n")
    code, _, err = run("check", config, "generator.path=nobody/nothing", "--memory")
    assert code == 2
    assert "nobody/nothing is not on this machine and its networks are unknown" in err


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["memory=25gb"], "memory (override 'memory=25gb'): no such preset '25gb'; did you mean '24gb'?"),
        (["memory.quantise=nf4", "policy={kind: full}"], "nf4 weights cannot be trained; use policy.kind=lora"),
        (
            ["memory.offload=group", "generator.device=cpu"],
            "memory.offload (override 'memory.offload=group'): group needs",
        ),
        (["memory.quantise=int8", "generator.device=cpu"], "int8 needs a CUDA card, and generator.device is cpu"),
        (["memory.attention=xformers", "generator.device=cpu"], "xformers needs a CUDA card"),
        (["train.optimizer=paged_adamw", "generator.device=cpu"], "train.optimizer (override"),
        (["memory.attention=flash"], "flash does not support float32; use generator.dtype=bfloat16"),
        (["memory.cache_prompts=disk", "generator.kind=generic"], "runs whole, with its encoders; use none"),
        (["memory.cache_prompt=disk"], "did you mean 'cache_prompts'?"),
        (["train.optimizer=adam8bit"], "'adamw8bit'"),
    ],
)
def test_what_does_not_go_together_is_said(overrides: list[str], said: str, write: Any) -> None:
    assert said in written.refused(write(), overrides)


def test_check_names_missing_packages(large: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.config.memory.find_spec", lambda package: None)
    config = str(ROOT / "configs/flux-dev/nft.yaml")
    code, _, err = run("check", config, "memory=16gb", "memory.attention=sage")
    assert code == 2
    assert "memory.quantise: nf4 needs the package bitsandbytes: pip install 'bitsandbytes'" in err
    assert "train.optimizer: paged_adamw8bit needs the package bitsandbytes" in err
    assert "memory.attention: sage has no gradient" in err


# -- out of memory ----------------------------------------------------------------------------------------------------

ERRORS = {
    "card": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation"),
    "driver": RuntimeError("CUDA error: out of memory"),
    "allocator": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    "python": MemoryError(),
}


@pytest.mark.parametrize("error", [ERRORS["card"], ERRORS["allocator"]], ids=["card", "allocator"])
def test_a_run_out_of_memory_ends_with_three_settings_and_goes_on(
    error: Exception, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief: dict[str, Any] = {"prompts": {"heldout": None}}
    config = settings(tmp_path, model, train={"steps": 2, "chunk": 4}, **brief)
    velocity, calls = load("sd3", str(model)).velocity.__func__, []

    def full(self: Any, *given: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 15:
            raise error
        return velocity(self, *given)

    monkeypatch.setattr("generators.adapters.sd3.SD3.velocity", full)
    with pytest.raises(TrainingError) as caught:
        train(config)
    text = str(caught.value)
    assert text.startswith("out of memory while learning: ")
    assert "See documentation" not in text
    tries = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert tries == ["train.chunk=2", "train.gradient_checkpointing=true", "memory.cache_prompts=memory"]
    assert "keeps the checkpoint of step 1: --resume continues from it, with these too" in text
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    smaller = overridden(config, tries[0])
    assert train(smaller, resume=True)["status"] == "finished"


def test_what_counts_as_running_out() -> None:
    assert all(remedies.out_of_memory(error) for error in ERRORS.values())
    assert remedies.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""


def test_remedies_leave_out_what_is_on(large: Any) -> None:
    assert [remedy.change for remedy in remedies.remedies(large("memory=12gb"))[:3]] == [
        "reward.chunk=16",
        "rollout.group=8",
        "policy.rank=16",
    ]


def test_remedies_change_something(tmp_path: Path, model: Path) -> None:
    """8 samples and 16 terms: neither a chunk of 128 samples nor 96 terms a pass is less than there is already."""
    config = settings(tmp_path, model, train={"chunk": 192})
    changes = {one.path: one.change for one in remedies.remedies(config)}
    assert changes["train.chunk"] == "train.chunk=8"
    assert (changes["rollout.chunk"], changes["rollout.decode_chunk"]) == ("rollout.chunk=4", "rollout.decode_chunk=4")
    assert changes["evaluate.chunk"] == "evaluate.chunk=2"
    assert not {"memory.vae_tiling", "generator.size", "train.optimizer", "generator.device"} & changes.keys()
    learning = {one.path for one in remedies.remedies(config, "update")}
    assert {"train.chunk", "train.gradient_checkpointing"} <= learning
    assert not {"rollout.chunk", "rollout.decode_chunk", "evaluate.chunk"} & learning
    assert "train.chunk" not in {one.path for one in remedies.remedies(config, "evaluate")}


@pytest.mark.parametrize("place", ["generators.adapters.sd3.SD3.velocity", "align.training.state.build_generator"])
def test_out_of_memory_before_the_first_checkpoint(
    place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **named: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = settings(tmp_path, model, train={"chunk": 4})
    monkeypatch.setattr(place, full)
    with pytest.raises(TrainingError) as caught:
        train(config)
    text = str(caught.value)
    doing = "evaluating" if "velocity" in place else "loading the model"
    assert text.startswith(f"out of memory while {doing}: CUDA out of memory")
    assert "has no checkpoint yet" in text
    assert "keeps" not in text
    assert "train.chunk" not in text


def test_a_card_size_is_positive(large: Any) -> None:
    with pytest.raises(ConfigError):
        fitting.card_bytes("-3")
