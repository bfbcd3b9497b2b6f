"""What single image adapters do beyond the parity that all share."""

from __future__ import annotations

import pytest
import tiny_flux2
import tiny_image
import tiny_sana
import torch
from image_cases import pil, shades

from align.maths import samplers
from generators.base import GeneratorError, Options
from generators.codec import pack
from generators.load import adapter

FLUX2 = [
    ("flux2", tiny_flux2.dev),
    ("flux2", lambda: tiny_flux2.dev(processor=True)),
    ("flux2_klein", tiny_flux2.klein),
]


@pytest.mark.parametrize(("kind", "build"), FLUX2)
def test_flux2_counts_its_chat_template_among_the_tokens(kind, build):
    pipeline = build()
    tokenizer = getattr(pipeline.tokenizer, "tokenizer", pipeline.tokenizer)
    frame = len(tokenizer(adapter(kind)(pipeline).chat("")).input_ids)
    generator = adapter(kind)(pipeline, Options(size=(32, 32), text_length=frame + 5))
    assert generator.encode(["abcde"]).tensors["embeds"].shape[:2] == (1, frame + 5)
    with pytest.raises(GeneratorError, match=rf"prompt 1 \('abcdef' ...\) has {frame + 6} tokens, the model reads"):
        generator.encode(["abcde", "abcdef"])


EDITORS = [("qwen_image_edit", "QwenImageEditPipeline"), ("qwen_image_edit_plus", "QwenImageEditPlusPipeline")]


@pytest.mark.few(1)
@pytest.mark.parametrize(("kind", "name"), EDITORS)
def test_a_qwen_editor_brings_its_source_to_the_pipelines_areas(kind, name):
    """Sides of the two images the pipeline makes of a 32 x 96 one, and what a step of it draws."""
    generator, pipeline = (
        adapter(kind)(tiny_image.qwen_image(name), Options(size=(32, 96))),
        tiny_image.qwen_image(name),
    )
    image, noise = shades((32, 96))[:1], generator.noise([1])
    cond = generator.encode(["make it blue"], {"image": image})
    assert cond.tensors["source"].shape[-2:] == (576 // 8, 1760 // 8)  # about 1024 ** 2 pixels
    with torch.no_grad():
        latents = noise - generator.velocity(noise, torch.tensor(1.0), cond)
        media = generator.decode(latents)
    expected = pipeline(
        image=pil(image), prompt="make it blue", height=32, width=96, num_inference_steps=1, latents=pack(noise),
        true_cfg_scale=1.0, output_type="pt", return_dict=False,
    )[0]  # fmt: skip
    torch.testing.assert_close(media, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_flux2_shrinks_a_source_beyond_a_megapixel_as_its_pipeline_does():
    options = Options(size=(1040, 1040), text_length=64)
    generator, pipeline = adapter("flux2_klein_edit")(tiny_flux2.klein(), options), tiny_flux2.klein()
    image, noise = shades((1040, 1040))[:1], generator.noise([1])
    cond = generator.encode(["make it blue"], {"image": image})
    assert cond.tensors["source"].shape[-2:] == (
        63,
        63,
    )  # of 1023 pixels: the area is rounded down, then whole tokens are cut
    with torch.no_grad():
        media = generator.decode(noise - generator.velocity(noise, torch.tensor(1.0), cond))
    expected = pipeline(
        image=pil(image), prompt="make it blue", height=1040, width=1040, num_inference_steps=1, latents=noise,
        guidance_scale=1.0, max_sequence_length=64, output_type="pt", return_dict=False,
    )[0]  # fmt: skip
    torch.testing.assert_close(media, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "name"), EDITORS)
def test_a_qwen_editor_reads_both_texts_beside_each_image(kind, name, small_sources):
    generator = adapter(kind)(tiny_image.qwen_image(name), Options(size=(64, 64), negative_prompt="blurry"))
    one = generator.encode(["a", "a"], {"image": shades((64, 64))})
    negative = generator.negative(one)
    for texts in (one.tensors["embeds"], negative.tensors["embeds"]):
        assert (texts[0] - texts[1]).abs().max() > 1e-4  # the prompts are equal, the images are not
    assert negative.tensors["embeds"].shape[1] == one.tensors["embeds"].shape[1] + len("blurry") - len("a")
    assert torch.equal(negative.tensors["source"], one.tensors["source"])


def test_sana_reads_a_prompt_to_its_last_token_and_refuses_a_longer_one():
    generator = adapter("sana")(tiny_sana.sana(), Options(size=(64, 64), text_length=8))
    cond = generator.encode(["abcdef", "abcdeg"])
    assert cond.tensors["mask"].tolist() == [[1] * 8] * 2  # the start, the instruction's last token, the prompt
    changed = (cond.tensors["embeds"][0] - cond.tensors["embeds"][1]).abs().amax(-1) > 0
    assert changed.tolist() == [False] * 7 + [True]
    with pytest.raises(GeneratorError, match=r"prompt 0 \('abcdefg' ...\) has 8 tokens, the model reads 7"):
        generator.encode(["abcdefg"])


def test_sana_counts_time_as_its_scheduler_does():
    """Whole thousandths of the grid that DPM-Solver++ makes, fractions of the one that Euler makes."""
    generator = adapter("sana")(tiny_sana.sana(), Options(size=(64, 64)))
    for steps in range(1, 51):
        generator.pipeline.scheduler.set_timesteps(steps)
        expected = generator.pipeline.scheduler.timesteps
        assert generator.timestep(generator.times(steps)[:-1]).tolist() == expected.tolist(), steps
    euler = adapter("sana")(tiny_sana.sana("FlowMatchEulerDiscreteScheduler"), Options(size=(64, 64)))
    assert euler.timestep(torch.tensor([0.12345])).item() == pytest.approx(123.45)


@pytest.mark.parametrize("steps", [2, 4])
def test_sana_sprint_draws_fresh_noise_between_steps_as_cps_at_level_one_does(steps):
    generator, pipeline = adapter("sana_sprint")(tiny_sana.sprint(), Options(size=(64, 64))), tiny_sana.sprint()
    start, source = generator.noise([1, 2]), torch.Generator().manual_seed(5)
    fresh = [torch.randn(start.shape, generator=source) for _ in range(steps - 1)]
    cond, times = generator.encode(["a", "b"]), generator.times(steps)
    with torch.no_grad():
        latents, _ = samplers.sample(
            lambda x, t: generator.velocity(x, t, cond),
            start,
            times,
            kind="cps",
            noise_level=1.0,
            noise=fresh.__getitem__,
        )
        media = generator.decode(latents)
    expected = pipeline(
        prompt=["a", "b"], height=64, width=64, num_inference_steps=steps, latents=start, output_type="pt",
        generator=torch.Generator().manual_seed(5), use_resolution_binning=False, return_dict=False,
        intermediate_timesteps=1.3 if steps == 2 else None,
    )[0]  # fmt: skip
    torch.testing.assert_close(media, expected, atol=1e-5, rtol=0)
