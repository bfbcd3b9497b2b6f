"""A pipeline without an adapter is understood by watching it, or refused with what was tried."""

from __future__ import annotations

import pytest
import tiny
import tiny_image
import torch
from adapter_cases import CASES, PROMPTS, Case
from adapter_cases_video import CASES as VIDEO_CASES
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

from align.maths import samplers
from align.policy.lora import add_lora
from benchmarks.generic_table import told
from generators.adapters.generic import Generic
from generators.base import GeneratorError, Options
from generators.load import adapter

STEPS = 3
WATCHED = (
    *("flux-dev-wide", "flux-dev-true-cfg", "flux-kontext", "flux-fill", "qwen-image", "qwen-image-cfg", "wan21-cfg"),
    *("z-image", "z-image-cfg", "mochi-cfg"),
)
CHOSEN = [case for case in (*CASES, *VIDEO_CASES) if case.name in WATCHED]
each = pytest.mark.parametrize("case", CHOSEN, ids=[case.name for case in CHOSEN])


def drawn(generator, case, noise):
    """Latents after our deterministic sampler."""
    cond = generator.encode(PROMPTS, case.inputs)
    with torch.no_grad():
        velocity = lambda x, t: generator.velocity(x, t, cond, case.guidance)  # noqa: E731
        return samplers.sample(velocity, noise, generator.times(STEPS), kind="ode")[0]


def test_every_watched_case_is_there():
    assert len(CHOSEN) == len(WATCHED)


@each
def test_equals_the_adapter_somebody_wrote(case: Case):
    """The adapters equal the pipelines' own calls (test_adapters); both see the same noise, packed or not."""
    if case.name == "flux-kontext":  # its image is optional: watched as text to image, it is FLUX
        case = next(c for c in CASES if c.name == "flux-dev")
    written, watched = adapter(case.kind)(case.build(), case.options), Generic(case.build(), case.options)
    noise = written.noise([3, 4])
    theirs = written.decode(drawn(written, case, noise))
    ours = watched.decode(drawn(watched, case, case.latents(written, noise)))
    assert watched.size == written.size
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_gradients_flow_through_velocity_and_decoder():
    generator = Generic(tiny_image.flux(), Options(size=(64, 64)))
    parameters = add_lora(generator, 4, 4)
    x, t = generator.noise([1, 2]).requires_grad_(), torch.tensor([0.4, 0.9])
    media = generator.decode(x - generator.velocity(x, t, generator.encode(PROMPTS)))
    media.square().mean().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert sum(float(value.grad.abs().sum()) for _, value in parameters if value.grad is not None) > 0


@pytest.mark.parametrize("build", [tiny_image.flux, tiny_image.qwen_image, tiny.sd3_pipeline])
def test_half_precision_is_understood_as_well(build):
    generator = Generic(build().to(torch.bfloat16), Options(size=(64, 64)))
    x, cond = generator.noise([1, 2]), generator.encode(PROMPTS)
    with torch.no_grad():
        v = generator.velocity(x, torch.tensor(0.5), cond, 4.0 if generator.unconditional else 1.0)
    assert v.dtype == torch.float32
    assert v.isfinite().all()


def test_a_scale_that_is_no_input_of_the_network_is_refused():
    with pytest.raises(GeneratorError, match=r"classifier-free; use rollout\.sampler\.guidance"):
        Generic(tiny.sd3_pipeline(), Options(size=(64, 64), embedded_guidance=3.0))


def test_the_pipeline_is_left_as_it_was():
    pipeline = tiny_image.flux()
    scheduler = pipeline.scheduler
    Generic(pipeline, Options(size=(64, 64)))
    assert pipeline.scheduler is scheduler
    assert "forward" not in vars(pipeline.transformer)
    assert "step" not in vars(scheduler)


def test_a_scheduler_of_no_flow_is_refused():
    pipeline = tiny.sd3_pipeline()
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(GeneratorError, match="DDIMScheduler counts no noise levels"):
        Generic(pipeline, Options(size=(64, 64)))
    pipeline.scheduler = HeunDiscreteScheduler()
    with pytest.raises(GeneratorError, match=r"HeunDiscreteScheduler has noise levels from 0 to"):
        Generic(pipeline, Options(size=(64, 64)))


class Bent(FlowMatchEulerDiscreteScheduler):
    """Tells the network the square of the time."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        super().set_timesteps(num_inference_steps, device, sigmas, mu)
        self.timesteps = self.timesteps**2 / 1000


def test_an_argument_it_cannot_read_is_named():
    pipeline = tiny_image.flux(guidance_embeds=False)
    pipeline.scheduler = Bent(shift=3.0)
    with pytest.raises(GeneratorError, match="argument timestep changes from step to step"):
        Generic(pipeline, Options(size=(64, 64)))


def test_a_state_altered_between_steps_is_refused():
    pipeline = tiny_image.flux()

    def fade(pipe, step, time, tensors):
        return {"latents": tensors["latents"] * 0.9}

    pipeline.__class__ = told(type(pipeline), callback_on_step_end=fade)
    with pytest.raises(GeneratorError, match="alters its state between steps 0 and 1"):
        Generic(pipeline, Options(size=(64, 64)))


def test_a_velocity_it_does_not_reproduce_is_refused(monkeypatch):
    """Noise inside the network: no replay can equal it."""
    pipeline = tiny_image.flux()
    pipeline.transformer.proj_out.register_forward_hook(lambda m, a, out: out + torch.randn_like(out))
    with pytest.raises(GeneratorError, match="replaying step 0 gives another velocity"):
        Generic(pipeline, Options(size=(64, 64)))


def test_options_the_pipeline_does_not_take_are_refused():
    with pytest.raises(GeneratorError, match=r"generator.frames: FluxPipeline takes no num_frames"):
        Generic(tiny_image.flux(), Options(size=(64, 64), frames=9))


def test_two_experts_need_an_adapter():
    case = next(c for c in CASES if c.name == "wan22-two-experts")
    with pytest.raises(GeneratorError, match="transformer and transformer_2"):
        Generic(case.build(), case.options)
