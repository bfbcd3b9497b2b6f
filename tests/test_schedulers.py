"""A folder's scheduler: silent where our steps equal its own, one line where ours stand in, refused where no flow."""

from __future__ import annotations

import re

import diffusers
import pytest
import tiny
import tiny_video
import torch

from align.config.load import load_config
from align.policy.build import build_generator, sampling_kinds
from align.policy.solver import remark
from generators.adapters.cogvideox import CogVideoX
from generators.adapters.mochi import Mochi
from generators.adapters.sd3 import SD3
from generators.base import GeneratorError, Options
from generators.spacing import spaced

EULER = "FlowMatchEulerDiscreteScheduler"
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.fixture(scope="module")
def pipeline():
    return tiny.sd3_pipeline(t5=False)


def with_scheduler(pipeline, name, **settings):
    pipeline.scheduler = getattr(diffusers, name)(**settings)
    return SD3(pipeline, Options(size=(32, 32)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"shift": 3.0}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True},
     {"use_dynamic_shifting": True}, {"shift_terminal": 0.1}],
    ids=str,
)  # fmt: skip
def test_eulers_steps_are_silent_on_the_schedulers_own_grid(pipeline, settings):
    generator = with_scheduler(pipeline, EULER, **settings)
    assert remark(generator) == ""
    theirs = getattr(diffusers, EULER)(**settings)
    # 256 tokens are the least that the shift is made for, 0.5; 32 x 32 pixels have 4 of them
    mu = {"mu": 0.5 + (4 - 256) * (1.15 - 0.5) / (4096 - 256)} if "use_dynamic_shifting" in settings else {}
    theirs.set_timesteps(5, **mu)
    torch.testing.assert_close(generator.times(5), theirs.sigmas, atol=1e-6, rtol=0)


STAND_INS = [
    ("UniPCMultistepScheduler", FLOW, r"UniPC.*5\.6 % apart\); sampler\.kind dpm2 is nearer \(0\.61 %\)"),
    ("DPMSolverMultistepScheduler", FLOW, r"DPMSolver.*sampler\.kind dpm2 takes the same steps"),
    ("DPMSolverMultistepScheduler", {**FLOW, "solver_order": 3}, r"dpm2 is nearer"),
    ("DPMSolverSinglestepScheduler", FLOW, r"replaced by Euler steps"),
    ("FlowMatchHeunDiscreteScheduler", {}, r"Heun.*replaced by Euler steps"),
    ("FlowMatchLCMScheduler", {}, r"fresh noise .*sampler \{kind: cps, noise_level: 1\} takes the same steps"),
    (EULER, {"stochastic_sampling": True}, r"fresh noise .*sampler \{kind: cps, noise_level: 1\} takes the same steps"),
    ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}, r"stochastic kinds of sampler"),
]


@pytest.mark.parametrize(("name", "settings", "message"), STAND_INS)
def test_what_stands_in_is_said_in_one_line(pipeline, name, settings, message):
    generator = with_scheduler(pipeline, name, **settings)
    line = remark(generator)
    assert "\n" not in line
    assert re.search(message, line), line
    times, theirs = generator.times(6), getattr(diffusers, name)(**settings)
    theirs.set_timesteps(6)
    assert torch.equal(times, torch.unique_consecutive(theirs.sigmas))


def test_nothing_is_said_where_the_run_takes_those_steps(pipeline):
    assert remark(with_scheduler(pipeline, EULER), ["dpm2", "ode"]) == ""
    assert remark(with_scheduler(pipeline, "DPMSolverMultistepScheduler", **FLOW), ["dpm2"]) == ""
    assert remark(with_scheduler(pipeline, "DPMSolverMultistepScheduler", **FLOW), ["dpm2", "ode"])
    assert remark(with_scheduler(pipeline, "FlowMatchLCMScheduler"), ["cps"]) == ""


NO_FLOW = [
    ("EDMEulerScheduler", {}, r"EDMEulerScheduler has noise levels from 0 to 80, but those of a flow are in \[0, 1\]"),
    ("DDPMScheduler", {}, r"DDPMScheduler has no noise levels"),
    ("EulerDiscreteScheduler", {}, r"noise levels from 0 to 157"),
    ("UniPCMultistepScheduler", {}, r"noise levels from 0 to 157"),
    ("LCMScheduler", {}, r"LCMScheduler has no noise levels"),
    (EULER, {"invert_sigmas": True}, r"its noise levels rise \(invert_sigmas\?\)"),
    ("DPMSolverMultistepScheduler", {**FLOW, "final_sigmas_type": "sigma_min"}, r"from noise level 1 to 0\.0\d+, not"),
    ("SCMScheduler", {}, r"SCMScheduler does not take 8 steps"),
]


@pytest.mark.parametrize(("name", "settings", "message"), NO_FLOW)
def test_what_is_no_flow_is_refused_by_name(pipeline, name, settings, message):
    with pytest.raises(GeneratorError, match=message + r".*scheduler/ folder"):
        remark(with_scheduler(pipeline, name, **settings))


def test_a_scheduler_of_another_process_on_a_flows_levels(pipeline):
    class Backwards(diffusers.FlowMatchEulerDiscreteScheduler):
        def step(self, output, timestep, sample, return_dict=True):
            return (sample * 1.5 + output.pow(2),)

    generator = with_scheduler(pipeline, EULER)
    pipeline.scheduler = Backwards()
    with pytest.raises(GeneratorError, match="Backwards does not step along a flow"):
        remark(generator)


def test_levels_that_rise_where_the_model_counts_so():
    pipeline = tiny_video.mochi()
    generator = Mochi(pipeline, Options(size=(32, 48), frames=7))
    assert remark(generator) == ""
    assert generator.times(4)[0] == 1
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(GeneratorError, match="noise levels"):
        remark(generator)


def test_a_family_with_a_rule_of_its_own():
    pipeline = tiny_video.cogvideox()
    generator = CogVideoX(pipeline, Options(size=(32, 48), frames=9))
    assert remark(generator) == ""
    pipeline.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    assert "CogVideoXDPMScheduler is replaced by" in remark(generator)


def test_a_shift_that_the_pipeline_does_not_give():
    with pytest.raises(GeneratorError, match=r"FlowMatchEulerDiscreteScheduler does not take 4 steps: .*mu"):
        spaced(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4)


def test_the_line_is_printed_when_a_folder_is_loaded(tmp_path, capsys):
    pipeline = tiny_video.wan()
    pipeline.scheduler = diffusers.UniPCMultistepScheduler(**FLOW)  # as every published Wan folder
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"generator: {{kind: wan, path: {tmp_path}, size: [32, 48], frames: 5}}\n"
        "prompts: {train: 'shapes-video:train'}\nreward: {kind: shapes_video}\nrecipe: {kind: nft}\n"
    )
    config = load_config(tmp_path / "run.yaml", [])
    build_generator(config.generator, config.memory, "cpu", kinds=sampling_kinds(config))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(said) == 1
    assert "UniPCMultistepScheduler" in said[0]
