"""Every adapter draws what its pipeline draws, trains what it says it trains, and gives its LoRA back."""

from __future__ import annotations

from typing import Any

import adapter_cases
import adapter_cases_video
import image_cases
import pytest
import tiny_image
import tiny_run
import tiny_video
import torch
from adapter_cases import PROMPTS, Case, moved
from adapter_cases_video import KINDS as VIDEO_KINDS
from image_cases import pil
from safetensors.torch import load_file
from torch import Tensor

from align.evaluation.evaluate import images
from align.maths import samplers
from align.policy.lora import FILE, file_of, save_lora
from align.training.trainer import train
from generators.base import Conditioning, Generator, GeneratorError, Options
from generators.load import adapter, load

pytestmark = pytest.mark.usefixtures("small_sources")
CASES = [*adapter_cases.CASES, *image_cases.CASES, *adapter_cases_video.CASES]
each = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def generator_of(case: Case) -> Generator:
    return adapter(case.kind)(case.build(), case.options)


def ours(case: Case, generator: Generator, noise: Tensor) -> Tensor:
    """Latents after our deterministic sampler."""
    cond = generator.encode(PROMPTS, case.inputs)
    rows = torch.arange(len(noise))
    with torch.no_grad():  # in the pipeline's batches: the last bits of a matrix product depend on them
        parts = [draw(generator, cond[i], noise[i], case) for i in rows.split(1 if case.single else len(rows))]
    return torch.cat(parts)


def draw(generator: Generator, cond: Conditioning, noise: Tensor, case: Case) -> Tensor:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return generator.velocity(x, t, cond, case.guidance)

    return samplers.sample(velocity, noise, generator.times(case.steps), kind=case.solver)[0]


def theirs(case: Case, pipeline: Any, generator: Generator, noise: Tensor) -> Tensor:
    """Media ``[N, (F,) 3, H, W]`` of the untouched pipeline's own call."""
    if not case.single:
        return call(case, pipeline, generator, noise, slice(None))
    return torch.cat([call(case, pipeline, generator, noise, slice(i, i + 1)) for i in range(len(noise))])


def call(case: Case, pipeline: Any, generator: Generator, noise: Tensor, rows: slice) -> Tensor:
    given = {name: value[rows] for name, value in case.inputs.items()}
    told = {
        {"mask": "mask_image"}.get(name, name): pil(value) if case.single else value for name, value in given.items()
    }
    height, width = generator.size
    frames = {"num_frames": generator.frames} if hasattr(generator, "frames") else {}
    return pipeline(
        prompt=PROMPTS[rows],  # a copy: Z-Image writes into the list it is given
        height=height,
        width=width,
        num_inference_steps=case.steps,
        latents=case.latents(generator, noise[rows]),
        output_type="pt",
        return_dict=False,
        **frames,
        **case.call,
        **told,
    )[0]


@each
def test_equals_pipeline(case):
    generator, pipeline = generator_of(case), case.build()
    noise = generator.noise([3, 4])
    latents = ours(case, generator, noise)
    assert latents.shape == noise.shape == (2, *generator.latent_shape())
    assert (latents - noise).abs().max() > 0.05
    media = generator.decode(latents)
    assert media.shape[-3:] == (3, *generator.size)
    expected = theirs(case, pipeline, generator, noise)
    assert media.std() > 1e-3
    torch.testing.assert_close(media, expected, atol=1e-5, rtol=0)


@each
def test_guidance_and_rows_matter(case):
    """Another prompt gives another velocity, and a row does not depend on the rows beside it."""
    generator = generator_of(case)
    noise, t = generator.noise([3, 3]), torch.tensor(0.7)
    cond = generator.encode(PROMPTS, case.inputs)
    with torch.no_grad():
        both = generator.velocity(noise, t, cond, case.guidance)
        alone = generator.velocity(noise[1:], t, cond[torch.tensor([1])], case.guidance)
    assert (both[0] - both[1]).abs().max() > 1e-6
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-4)


@each
def test_encoding_inverts_decoding_but_for_the_vae(case):
    """Coded and decoded by us, media come back as from the bare VAE; that decoding is right, parity has shown."""
    generator = generator_of(case)
    with torch.no_grad():
        media = generator.decode(generator.noise([0]))
        latents = generator.encode_media(media)
        pixels = (media.transpose(1, 2) if media.ndim == 5 else media) * 2 - 1
        if case.kind.startswith("qwen_image"):  # its VAE knows videos only
            pixels = pixels.unsqueeze(2)
        vae = generator.pipeline.vae
        told = {"temb": torch.zeros(1)} if vae.config.get("timestep_conditioning") else {}
        code = vae.encode(pixels)
        bare = vae.decode(code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latent, **told).sample
        ours = generator.decode(latents)
    assert latents.shape == (1, *generator.latent_shape())
    bare = bare.transpose(1, 2) if media.ndim == 5 else bare.reshape(media.shape)
    torch.testing.assert_close(ours, (bare / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


@each
def test_gradients_reach_every_lora_target(case):
    generator = generator_of(case)
    parameters = moved(generator)
    for target in generator.lora_targets:
        assert any(f".{target}." in f".{name}" for name, _ in parameters), target
    cond = generator.encode(PROMPTS, case.inputs)
    for t in (0.98, 0.02):  # of either expert
        generator.velocity(generator.noise([0, 1]), torch.tensor(t), cond, case.guidance).square().mean().backward()
    assert [name for name, value in parameters if value.grad is None or not value.grad.abs().max() > 0] == []
    dropped = [name for name, layer in generator.backbone.named_modules() if name.startswith(generator.idle() or "-")]
    assert not any(hasattr(generator.backbone.get_submodule(name), "lora_A") for name in dropped)
    assert bool(dropped) == bool(generator.idle())


@each
def test_lora_reloads_in_the_untouched_pipeline(case, tmp_path):
    generator, pipeline = generator_of(case), case.build()
    noise = generator.noise([3, 4])
    base = generator.decode(ours(case, generator, noise))
    moved(generator)
    save_lora(generator, tmp_path)
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(tmp_path)
        for expert in list(generator.backbones())[1:]:
            pipeline.load_lora_weights(tmp_path, weight_name=file_of(expert), **{f"load_into_{expert}": True})
    else:  # HunyuanVideo-1.5's pipeline leaves it to the network
        pipeline.transformer.load_lora_adapter(tmp_path, prefix="transformer", weight_name=FILE)
    media = generator.decode(ours(case, generator, noise))
    assert (media - base).abs().max() > 1e-4
    torch.testing.assert_close(media, theirs(case, pipeline, generator, noise), atol=1e-5, rtol=0)


def test_an_option_the_model_does_not_know_is_refused():
    with pytest.raises(GeneratorError, match=r"generator\.frames: FluxPipeline has none; it has size, text_length"):
        adapter("flux")(tiny_image.flux(), Options(frames=9))


def test_a_guidance_scale_for_a_network_without_one_is_refused():
    with pytest.raises(GeneratorError, match=r"generator\.embedded_guidance: this network takes no guidance scale"):
        adapter("flux")(tiny_image.flux(guidance_embeds=False), Options(embedded_guidance=3.5))


@pytest.mark.few(5)
@pytest.mark.parametrize(
    "kind", ["flux", "flux2", "flux2_klein", "qwen_image", "sana", "sana_sprint", "z_image", *VIDEO_KINDS]
)
def test_a_config_trains_it(kind, tmp_path):
    case = next(case for case in CASES if case.kind == kind)
    case.build().save_pretrained(tmp_path / "model")
    options = {name: value for name, value in case.options.model_dump().items() if value}
    tree = {"kind": kind, "path": str(tmp_path / "model"), "device": "cpu", **options}
    config = tiny_run.settings(
        tmp_path, tmp_path / "model", generator=tree, reward={"kind": "tiny_run:mean_pixel"}, train={"steps": 1}
    )
    summary = train(config)
    assert summary["status"] == "finished"
    lora = load_file(config.run_dir / "lora" / FILE)
    assert max(float(value.abs().max()) for name, value in lora.items() if "lora_B" in name) > 0  # it starts at 0
    assert (config.run_dir / "report.html").stat().st_size > 1000


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow) if kind in ("mochi", "hunyuan_video15") else kind
        for kind in sorted({case.kind for case in CASES})
    ],
)
def test_bfloat16_is_float32_but_for_rounding(kind, tmp_path):
    """Loaded as users load it: some classes keep a few of their weights in float32."""
    case = next(case for case in CASES if case.kind == kind)
    exact = generator_of(case)
    exact.pipeline.save_pretrained(tmp_path)
    rounded = load(kind, str(tmp_path), dtype="bfloat16", options=case.options)
    assert rounded.dtype == torch.bfloat16
    noise, t = exact.noise([3, 4]), torch.tensor([0.95, 0.4])
    with torch.no_grad():
        v, near = (one.velocity(noise, t, one.encode(PROMPTS, case.inputs)) for one in (exact, rounded))
        media, latents = rounded.decode(noise), rounded.encode_media(exact.decode(noise))
    assert near.dtype == media.dtype == latents.dtype == torch.float32
    assert 0 < (near - v).abs().max() < 0.1 * v.abs().max()
    assert (media - exact.decode(noise)).abs().mean() < 0.02


def test_inputs_are_asked_for_and_their_size_is_checked():
    generator = adapter("flux_fill")(tiny_image.flux_fill(), Options(size=(64, 64)))
    with pytest.raises(GeneratorError, match="FluxFillPipeline needs 'image' with every prompt"):
        generator.encode(["a"])
    small = {"image": torch.zeros(1, 3, 64, 64), "mask": torch.zeros(1, 1, 32, 32)}
    with pytest.raises(GeneratorError, match=r"mask: shape \(1, 1, 32, 32\), need 1 of 64 x 64"):
        generator.encode(["a"], small)


@pytest.mark.parametrize(("frames", "near"), [(8, "5 or 9"), (10, "9 or 13")])
def test_frames_that_the_vae_cannot_code(frames, near):
    with pytest.raises(
        GeneratorError, match=rf"generator\.frames {frames}: one more than a multiple of 4, such as {near}"
    ):
        adapter("wan")(tiny_video.wan(), Options(size=(32, 32), frames=frames))


def test_texts_of_unequal_length_are_padded():
    short, long = Conditioning({"x": torch.ones(1, 2, 3)}), Conditioning({"x": torch.ones(2, 4, 3)})
    both = Conditioning.cat([short, long]).tensors["x"]
    assert both.shape == (3, 4, 3)
    assert both[0].sum() == 6
    assert both[0, 2:].abs().max() == 0
    flat = Conditioning.cat([Conditioning({"n": torch.tensor([1.0])}), Conditioning({"n": torch.tensor([2.0])})])
    assert flat.tensors["n"].tolist() == [1.0, 2.0]


def test_a_video_is_shown_by_its_middle_frame():
    media = torch.rand(2, 5, 3, 4, 6)
    shown = images(media)
    assert [image.shape for image in shown] == [(4, 6, 3)] * 2
    assert torch.equal(torch.from_numpy(shown[1]), (media[1, 2] * 255).round().byte().permute(1, 2, 0))
