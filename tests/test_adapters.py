"""Every adapter draws what its pipeline draws, trains what it says it trains, and gives its LoRA back."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_image
import tiny_video
import torch
from adapter_cases import CASES, PROMPTS, Case
from torch import Tensor

from align import samplers
from align.evaluate import pictures
from align.lora import add_lora, save_lora
from generators.base import Conditioning, Generator, GeneratorError, Options
from generators.load import adapter

STEPS = 3
each = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def generator_of(case: Case) -> Generator:
    return adapter(case.kind)(case.build(), case.options)


def ours(case: Case, generator: Generator, noise: Tensor) -> Tensor:
    """Latents after our deterministic sampler."""
    cond = generator.encode(PROMPTS, case.inputs)
    with torch.no_grad():
        return draw(generator, cond, noise, case.guidance)


def draw(generator: Generator, cond: Conditioning, noise: Tensor, guidance: float) -> Tensor:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return generator.velocity(x, t, cond, guidance)

    return samplers.sample(velocity, noise, generator.times(STEPS), kind="ode")[0]


def theirs(case: Case, pipeline: Any, generator: Generator, noise: Tensor) -> Tensor:
    """Media ``[N, (F,) 3, H, W]`` of the untouched pipeline's own call."""

    def call(rows: slice) -> Tensor:
        told = {name: value[rows] if name == "negative_prompt" else value for name, value in case.call.items()}
        for name, value in case.inputs.items():
            told[{"mask": "mask_image"}.get(name, name)] = value[rows]
        height, width = generator.size
        frames = {"num_frames": generator.frames} if hasattr(generator, "frames") else {}
        return pipeline(
            prompt=PROMPTS[rows],
            height=height,
            width=width,
            num_inference_steps=STEPS,
            latents=case.latents(generator, noise[rows]),
            output_type="pt",
            return_dict=False,
            **frames,
            **told,
        )[0]

    if not case.one_by_one:
        return call(slice(None))
    return torch.cat([call(slice(row, row + 1)) for row in range(len(PROMPTS))])


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
def test_coding_is_its_own_inverse_in_shape(case):
    generator = generator_of(case)
    latents = generator.noise([0])
    with torch.no_grad():
        again = generator.encode_media(generator.decode(latents))
    assert again.shape == latents.shape
    assert again.isfinite().all()


def moved(generator: Generator) -> list[tuple[str, torch.nn.Parameter]]:
    """LoRA parameters, far from where they start."""
    parameters = add_lora(generator, 4, 8)
    source = torch.Generator().manual_seed(1)
    for _, value in parameters:
        value.data += 0.2 * torch.randn(value.shape, generator=source)
    return parameters


@each
def test_gradients_reach_every_lora_target(case):
    generator = generator_of(case)
    parameters = moved(generator)
    for target in generator.lora_targets:
        assert any(f".{target}." in f".{name}" for name, _ in parameters), target
    cond = generator.encode(PROMPTS, case.inputs)
    generator.velocity(generator.noise([0, 1]), torch.tensor(0.95), cond, case.guidance).square().mean().backward()
    reached = {name for name, value in parameters if value.grad is not None and value.grad.abs().max() > 0}
    for target in generator.lora_targets:  # in the last block some go nowhere: the text is dropped after it
        for part in "AB":
            assert any(f".{target}.lora_{part}." in f".{name}" for name in reached), (target, part)


@each
def test_lora_reloads_in_the_untouched_pipeline(case, tmp_path):
    generator, pipeline = generator_of(case), case.build()
    noise = generator.noise([3, 4])
    base = generator.decode(ours(case, generator, noise))
    moved(generator)
    save_lora(generator, tmp_path)
    pipeline.load_lora_weights(tmp_path)
    media = generator.decode(ours(case, generator, noise))
    assert (media - base).abs().max() > 1e-4
    torch.testing.assert_close(media, theirs(case, pipeline, generator, noise), atol=1e-5, rtol=0)


def test_an_option_the_model_does_not_know_is_refused():
    with pytest.raises(GeneratorError, match=r"generator\.frames: FluxPipeline has none; it has size, text_length"):
        adapter("flux")(tiny_image.flux(), Options(frames=9))


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


def test_a_clip_is_shown_by_its_middle_frame():
    media = torch.rand(2, 5, 3, 4, 6)
    shown = pictures(media)
    assert [picture.shape for picture in shown] == [(4, 6, 3)] * 2
    assert torch.equal(torch.from_numpy(shown[1]), (media[1, 2] * 255).round().byte().permute(1, 2, 0))
