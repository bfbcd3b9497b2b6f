"""What single video adapters promise beyond the checks that all of them share."""

from __future__ import annotations

import pytest
import tiny_hunyuan
import tiny_run
import tiny_video
import torch
from adapter_cases import PROMPTS, moved
from adapter_cases_video import bytes_of
from safetensors.torch import load_file

from align.maths import samplers
from align.policy.lora import add_lora, file_of, load_lora, save_lora
from align.training.trainer import train
from generators.base import Generator, GeneratorError, Options
from generators.load import adapter

# -- Wan, image to video ------------------------------------------------------------------------------------------

SMALL = Options(size=(32, 64), frames=5)
IMAGES = bytes_of(32, 64)


def first_frame() -> Generator:
    return adapter("wan_i2v")(tiny_video.wan_i2v(first_frame=True), SMALL)


@pytest.mark.parametrize("kind", samplers.KINDS)
def test_every_sampler_ends_on_the_image(kind):
    """All kinds of stochastic step, and none in the last: some add noise there that nothing removes."""
    generator = first_frame()
    cond = generator.encode(PROMPTS, IMAGES)
    times = generator.times(4)
    noise = generator.noise([1, 2])
    with torch.no_grad():
        x, _ = samplers.sample(
            lambda x, t: generator.velocity(x, t, cond), noise, times, kind=kind,
            noise_level=0.0 if kind in ("ode", "dpm2") else 0.7, steps=() if kind in ("ode", "dpm2") else (0, 1, 2),
            noise=lambda step: generator.noise([10 + step, 20 + step]),
        )  # fmt: skip
    torch.testing.assert_close(x[:, :, :1], cond.tensors["first"], atol=1e-5, rtol=0)
    assert (x[:, :, 1:] - noise[:, :, 1:]).abs().max() > 0.05


def test_the_forward_process_agrees_on_the_images_frame():
    """``v = eps - x0`` there for any video that begins with the image, at any time: nothing to learn, no loss."""
    generator = first_frame()
    cond = generator.encode(PROMPTS, IMAGES)
    x0, eps, t = generator.noise([3, 4]), generator.noise([5, 6]), torch.tensor([0.3, 0.8])
    x0[:, :, :1] = cond.tensors["first"]
    x = (1 - t.view(-1, 1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1, 1) * eps
    with torch.no_grad():
        v = generator.velocity(x, t, cond)
    torch.testing.assert_close(v[:, :, :1], (eps - x0)[:, :, :1], atol=1e-5, rtol=1e-5)


def test_a_text_that_would_be_taken_for_the_image_is_refused():
    with pytest.raises(GeneratorError, match=r"generator\.text_length 40: .* takes exactly 512 tokens"):
        adapter("wan_i2v")(tiny_video.wan_i2v(), Options(size=(32, 64), frames=5, text_length=40))


def test_a_lora_without_the_images_branch_loads(tmp_path):
    """diffusers adds zeros to it, for LoRA of text to video; ours reads it to the same values."""
    trained, fresh = (adapter("wan_i2v")(tiny_video.wan_i2v(), SMALL) for _ in range(2))
    for _, value in add_lora(trained, 4, 8, targets=["to_q", "to_k"]):
        value.data += 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    save_lora(trained, tmp_path)
    cond, noise = trained.encode(PROMPTS, IMAGES), trained.noise([1, 2])
    with torch.no_grad():
        base = fresh.velocity(noise, torch.tensor(0.7), cond)
        load_lora(fresh, tmp_path)
        ours, theirs = (one.velocity(noise, torch.tensor(0.7), cond) for one in (trained, fresh))
    assert (ours - base).abs().max() > 1e-3
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)


# -- Wan 2.2, two experts -----------------------------------------------------------------------------------------


def experts() -> Generator:
    return adapter("wan")(tiny_video.wan(2), Options(size=(32, 32), frames=5))


def test_every_row_goes_to_the_expert_of_its_time():
    generator = experts()
    noise, cond, t = generator.noise([1, 2, 3]), generator.encode(["a", "b", "c"]), torch.tensor([0.95, 0.2, 0.9])
    with torch.no_grad():
        mixed = generator.velocity(noise, t, cond)
        alone = [generator.velocity(noise[i : i + 1], t[i], cond[torch.tensor([i])]) for i in range(3)]
        generator.backbone.transformer_2 = generator.backbone.transformer
        one = generator.velocity(noise, t, cond)
    torch.testing.assert_close(mixed, torch.cat(alone), atol=1e-5, rtol=0)
    assert [bool((mixed[i] - one[i]).abs().max() > 1e-3) for i in range(3)] == [False, True, False]


@pytest.mark.parametrize(("time", "learns"), [(0.95, "transformer"), (0.2, "transformer_2")])
def test_the_expert_of_its_time_learns_and_the_other_waits_with_zero(time, learns):
    """Zero, not None: processes that average gradients wait for one of every parameter."""
    generator = experts()
    parameters = moved(generator)
    v = generator.velocity(generator.noise([1, 2]), torch.tensor(time), generator.encode(PROMPTS))
    v.square().mean().backward()
    for expert in ("transformer", "transformer_2"):
        largest = max(float(value.grad.abs().max()) for name, value in parameters if name.startswith(f"{expert}."))
        assert (largest > 0) == (expert == learns)


def test_the_lora_of_both_experts_comes_back(tmp_path):
    trained, fresh, half = experts(), experts(), experts()
    moved(trained)
    save_lora(trained, tmp_path)
    cond, noise, times = trained.encode(PROMPTS), trained.noise([1, 2]), torch.tensor([0.95, 0.2])
    with torch.no_grad():
        base = fresh.velocity(noise, times, cond)
        load_lora(fresh, tmp_path)
        (tmp_path / file_of("transformer_2")).unlink()
        load_lora(half, tmp_path)
        ours, theirs, first = (one.velocity(noise, times, cond) for one in (trained, fresh, half))
    assert ((ours - base).abs().amax((1, 2, 3, 4)) > 1e-3).all()
    assert torch.equal(theirs, ours)
    assert torch.equal(first[0], ours[0])
    assert torch.equal(first[1], base[1])


def test_a_config_trains_both_experts(tmp_path):
    model = tmp_path / "model"
    tiny_video.wan(2).save_pretrained(model)
    tree = {"kind": "wan", "path": str(model), "device": "cpu", "size": [32, 32], "frames": 5, "text_length": 40}
    config = tiny_run.settings(
        tmp_path, model, generator=tree, reward={"kind": "tiny_run:mean_pixel"}, recipe={"kind": "nft", "timesteps": 3},
        train={"steps": 3, "gradient_checkpointing": True}, evaluate={"every": 0},
    )  # fmt: skip
    assert train(config)["status"] == "finished"
    for expert in ("transformer", "transformer_2"):
        lora = load_file(config.run_dir / "lora" / file_of(expert))
        assert max(float(value.abs().max()) for name, value in lora.items() if "lora_B" in name) > 0, expert


# -- LTX ----------------------------------------------------------------------------------------------------------


def test_a_decoder_that_adds_noise_adds_the_same_to_every_video():
    generator = adapter("ltx")(tiny_video.ltx(told_time=True), Options(size=(32, 64), frames=9))
    latents = generator.noise([1, 2])
    with torch.no_grad():
        silent = generator.decode(latents)
        for name, value in generator.pipeline.vae.named_parameters():
            if name.endswith("per_channel_scale1"):
                value.fill_(0.5)
        state = torch.get_rng_state()
        both, second = generator.decode(latents), generator.decode(latents[1:])
    assert (both - silent).abs().max() > 1e-3
    assert torch.equal(both[1:], second)
    assert torch.equal(torch.get_rng_state(), state)


# -- Mochi --------------------------------------------------------------------------------------------------------


def test_an_empty_prompt_blanks_no_other():
    generator = adapter("mochi")(tiny_video.mochi(blank_empty=True), Options(size=(32, 32), frames=7))
    alone, empty, both = (generator.encode(prompts).tensors for prompts in (["a cat"], [""], ["a cat", ""]))
    assert alone["mask"].any()
    assert not empty["mask"].any()
    for name in ("embeds", "mask"):
        assert torch.equal(both[name], torch.cat([alone[name], empty[name]]))


def test_a_grid_of_two_parts_needs_two_steps():
    generator = adapter("mochi")(tiny_video.mochi(), Options(size=(32, 32), frames=7))
    torch.testing.assert_close(generator.times(2), torch.tensor([1.0, 0.975, 0.0]))
    with pytest.raises(GeneratorError, match="1 sampling steps: Mochi's grid needs at least 2"):
        generator.times(1)


# -- CogVideoX ----------------------------------------------------------------------------------------------------

COG = Options(size=(32, 32), frames=5)


def test_the_velocity_of_a_variance_preserving_network():
    """A network that knows x0 and eps: it is shown a x0 + s eps, answers a eps - s x0, and v is eps - x0."""
    generator = adapter("cogvideox")(tiny_video.cogvideox(), COG)
    cond, t = generator.encode(PROMPTS), torch.tensor([0.15, 0.8])
    x0, eps = generator.noise([1, 2]), generator.noise([3, 4])
    column = t.view(-1, 1, 1, 1, 1)
    angle = torch.atan2(column, 1 - column)  # s / a = t / (1 - t)
    seen = []

    def network(hidden_states, **told):
        seen.append(hidden_states.transpose(1, 2))
        return ((angle.cos() * eps - angle.sin() * x0).transpose(1, 2),)

    with generator.trained_by(network):
        v = generator.velocity((1 - column) * x0 + column * eps, t, cond)
    torch.testing.assert_close(seen[0], angle.cos() * x0 + angle.sin() * eps, atol=1e-5, rtol=0)
    torch.testing.assert_close(v, eps - x0, atol=1e-5, rtol=0)


def test_time_is_an_index_of_the_schedulers_table():
    generator = adapter("cogvideox")(tiny_video.cogvideox(), COG)
    table = generator.flow_times
    assert torch.equal(generator.timestep(table), torch.arange(1000.0))
    torch.testing.assert_close(
        generator.timestep(torch.tensor([0.0, float(table[500:502].mean()), 1.0])), torch.tensor([0.0, 500.5, 999.0])
    )
    power = generator.pipeline.scheduler.alphas_cumprod[500]
    torch.testing.assert_close(table[500] / (1 - table[500]), (1 / power - 1).sqrt().float())
    assert generator.times(4).tolist() == [*table[[999, 749, 499, 249]].tolist(), 0.0]


def test_schedulers_that_are_no_such_diffusion_are_refused():
    with pytest.raises(GeneratorError, match=r"starts at t = 0\.\d+, not at pure noise: it needs rescale_betas_zero"):
        adapter("cogvideox")(tiny_video.cogvideox(spacing="leading"), COG).times(4)
    pipeline = tiny_video.cogvideox()
    pipeline.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(
        GeneratorError, match="the scheduler's prediction_type is epsilon; this adapter reads only v_prediction"
    ):
        adapter("cogvideox")(pipeline, COG)


def test_the_released_scheduler_gives_the_same_grid():
    from diffusers import CogVideoXDPMScheduler

    pipeline = tiny_video.cogvideox()
    grid = adapter("cogvideox")(pipeline, COG).times(5)
    pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    assert torch.equal(adapter("cogvideox")(pipeline, COG).times(5), grid)


def test_positions_end_where_the_network_has_no_more():
    with pytest.raises(GeneratorError, match=r"size \[64, 64\]: this network has positions for 48 x 64"):
        adapter("cogvideox")(
            tiny_video.cogvideox(rotary=True, frames_a_patch=2), Options(size=(64, 64), frames=5)
        )  # fmt: skip


# -- HunyuanVideo-1.5 ---------------------------------------------------------------------------------------------

HY15 = Options(size=(32, 32), frames=5)


def test_a_lora_of_a_pipeline_without_a_reader_of_its_own_loads(tmp_path):
    trained, fresh = (adapter("hunyuan_video15")(tiny_hunyuan.hunyuan_video15(), HY15) for _ in range(2))
    for _, value in add_lora(trained, 4, 8):
        value.data += 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    save_lora(trained, tmp_path)
    cond, noise = trained.encode(PROMPTS), trained.noise([1, 2])
    with torch.no_grad():
        base = fresh.velocity(noise, torch.tensor(0.7), cond)
        load_lora(fresh, tmp_path)
        ours, theirs = (one.velocity(noise, torch.tensor(0.7), cond) for one in (trained, fresh))
    assert (ours - base).abs().max() > 1e-3
    assert torch.equal(theirs, ours)


def test_texts_are_cut_behind_their_last_token():
    generator = adapter("hunyuan_video15")(tiny_hunyuan.hunyuan_video15(), HY15)
    with pytest.raises(GeneratorError, match=r"has 616 tokens, the model reads 615"):
        generator.encode(["x" * 616])
    plain, sign = (generator.encode([prompt]).tensors for prompt in ("a cat", 'a sign "stop"'))
    assert sign["mask"].shape[1] - plain["mask"].shape[1] == len('a sign "stop"') - len("a cat")
    assert plain["mask"].bool().all()
    assert plain["glyph_mask"].tolist() == [[0]]
    assert sign["glyph_mask"].tolist() == [[1] * (len('Text "stop". ') + 1)]
