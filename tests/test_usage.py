"""The code that a page and a model card print draws the page's own first sample; where it cannot, the page says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_image
from adapter_cases import CASES, Case
from adapter_cases_video import CASES as VIDEOS
from image_cases import CASES as IMAGES
from PIL import Image
from tiny_run import settings

from align.config.load import load_config, settings_of
from align.config.sampling import Sampler
from align.evaluation.evaluate import sample_media
from align.export import export
from align.maths.seeds import derive
from align.report.reading import read_run
from align.report.usage import Shot, Weights, code, differences, scheduler_of
from align.report.using import snippet
from align.runs.trained import find_policy
from align.training.trainer import train
from generators.load import adapter

EVERY = [case for case in (*CASES, *VIDEOS, *IMAGES) if not case.inputs and case.kind != "cogvideox"]


def run_folder(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> Path:
    """A finished run of two steps whose LoRA has moved."""
    if base == "shapes":
        config = load_config(
            Path(__file__).parents[1] / "configs" / "quickstart.yaml",
            [
                *("train.steps=1", "rollout.prompts=4", "rollout.group=8", "evaluate.prompts=2", "evaluate.rewards={}"),
                *("evaluate.gold=null", "samples.count=2", "train.ema=0", "train.lr=0.01", f"out={tmp_path / 'run'}"),
            ],
        )
    else:
        build = {"sd3": lambda: tiny.sd3_pipeline(t5=False), "flux": tiny_image.flux}[base]
        build().save_pretrained(tmp_path / base)
        size = [32, 32] if base == "sd3" else [64, 64]
        generator = {"kind": base, "path": str(tmp_path / base), "device": "cpu", "size": size}
        evaluate = {"every": 1, "prompts": 2, "sampler": {"steps": 3, "guidance": 1.0 if base == "flux" else 2.5}}
        parts: dict[str, Any] = {"generator": generator, "evaluate": evaluate, "train": {"steps": 2, "lr": 0.05}}
        config = settings(tmp_path, Path(), **{**parts, **sections})
    train(config)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("base", ["sd3", "flux", "shapes"])
def test_the_page_s_code_draws_the_page_s_image(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path, base, monkeypatch)
    found = snippet(read_run(folder))
    assert found is not None
    assert found.differences == []
    exec(found.code, space := {})
    drawn = np.asarray(space["image"], np.float32) / 255
    last = sorted((folder / "samples").glob("step-*"))[-1]
    with Image.open(last / "000.png") as image:
        shown = np.asarray(image.convert("RGB"), np.float32) / 255
    with Image.open(last.parent / "step-000000" / "000.png") as image:
        before = np.asarray(image.convert("RGB"), np.float32) / 255
    assert np.abs(drawn - shown).max() <= 0.01
    assert np.abs(before - shown).max() > 0.01  # what training changed is seen
    assert f"# run/samples/{last.name}/000.png" in found.code


def test_a_card_s_code_draws_the_page_s_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path, "sd3", monkeypatch)
    export(find_policy(folder), "diffusers", tmp_path / "exported")
    monkeypatch.chdir(tmp_path / "exported")
    Path("sd3").symlink_to(tmp_path / "sd3")  # the card names the base without the folder it lies in
    text = Path("README.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], space := {})
    last = sorted((folder / "samples").glob("step-*"))[-1]
    with Image.open(last / "000.png") as image:
        shown = np.asarray(image.convert("RGB"), np.float32) / 255
    assert np.abs(np.asarray(space["image"], np.float32) / 255 - shown).max() <= 0.01
    assert f"this code generates the run's first sample of step {int(last.name[5:])} with plain diffusers.\n" in text


def test_weights_without_samples_of_their_own_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest samples were drawn before the last step: what the code draws is not what the page shows."""
    folder = run_folder(tmp_path, "sd3", monkeypatch)
    shutil.rmtree(sorted((folder / "samples").glob("step-*"))[-1])
    found = snippet(read_run(folder))
    assert found is not None
    assert found.differences == ["The weights are those of step 2, the newest samples those of step 1."]


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_adapter_s_call(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments, whichever way a pipeline takes guidance, draw what our own sampler draws."""
    generator = adapter(case.kind)(case.build(), case.options)
    sampler = Sampler(kind=case.solver, steps=case.steps, guidance=case.guidance)
    ours = sample_media(generator, ["a red circle"], [5], sampler)[0]
    options = case.options
    tree = {
        "generator": {
            "kind": case.kind, "path": "nowhere", "device": "cpu", "size": options.size, "frames": options.frames,
            "text_length": options.text_length, "embedded_guidance": options.embedded_guidance,
            "negative_prompt": options.negative_prompt, "guidance_rescale": options.guidance_rescale,
            "fps": options.fps,
        },
        "evaluate": {"sampler": sampler.model_dump()},
    }  # fmt: skip
    shot = Shot("a red circle", derive(5, "start"), "000.png")
    text = code(tree, None, shot, video=ours.ndim == 4)
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pipeline)
    scheduler = type(pipeline.scheduler).__name__
    exec(text, space := {})
    result = space["video"] if ours.ndim == 4 else space["image"]
    theirs = np.asarray([np.asarray(one) for one in result] if ours.ndim == 4 else result, np.float32)
    theirs = theirs / 255 if theirs.max() > 1 else theirs
    expected = ours.permute(0, 2, 3, 1).numpy() if ours.ndim == 4 else ours.permute(1, 2, 0).numpy()
    assert differences(tree, scheduler) == []
    assert np.abs(theirs - expected).max() <= 0.01


def test_what_the_code_cannot_repeat_is_said(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path)
    tree = settings_of(config)
    euler = "FlowMatchEulerDiscreteScheduler"
    assert differences(tree, euler) == []
    tree["evaluate"]["sampler"]["kind"] = "flow_sde"
    assert "adds noise at every step; diffusers has no such steps" in differences(tree, euler)[0]
    tree["evaluate"]["sampler"] |= {"kind": "cps", "noise_level": 1.0}
    assert "does so with stochastic_sampling=True" in differences(tree, euler)[0]
    tree["evaluate"]["sampler"] |= {"noise_level": 0.8}
    assert "no such steps" in differences(tree, euler)[0]
    tree["evaluate"]["sampler"]["kind"] = "ode"
    assert "scheduler is UniPCMultistepScheduler" in differences(tree, "UniPCMultistepScheduler")[0]
    tree["evaluate"]["sampler"]["guidance"] = 0.5
    assert differences(tree, euler) == ["diffusers applies no guidance below 1."]
    assert scheduler_of("shapes", "sd3") == euler
    assert scheduler_of("owner/nobody-has-this") is None


def test_code_of_whole_networks_and_of_a_merged_pipeline() -> None:
    tree = {"generator": {"kind": "sd3", "path": "owner/name", "dtype": "bfloat16"}}
    whole = code(tree, Weights("run", None, ["transformer"]), None)
    assert (
        'transformer = AutoModel.from_pretrained("run", subfolder="transformer", torch_dtype=torch.bfloat16)' in whole
    )
    assert 'from_pretrained("owner/name", transformer=transformer, torch_dtype=torch.bfloat16)' in whole
    assert 'from_pretrained(".", torch_dtype=torch.bfloat16)' in code(tree, None, None)
    for text in (whole, code(tree, None, None)):
        compile(text, "code", "exec")


def test_the_samples_of_a_command_are_all_of_its_folder_s_images(tmp_path: Path) -> None:
    from align.data.grids import save_samples

    grey = [np.full((32, 32, 3), value, np.uint8) for value in (10, 200)]
    noise = [derive(seed, "start") for seed in (1, 2)]
    folder = save_samples(tmp_path / "out", grey, ["a", "b"], [1, 2], sources=grey, noise=noise, apart=True)
    assert sorted(path.name for path in folder.glob("*.png")) == ["000.png", "001.png"]
    assert sorted(path.name for path in (folder / "sheet").iterdir()) == [
        "000-source.png",
        "001-source.png",
        "grid.png",
    ]
    assert json.loads((folder / "prompts.json").read_text())["noise_seeds"] == noise


@pytest.mark.parametrize("text", ["a" * 90, "word " * 60, "short", "reward 0.333  gold 0.333  strict 0.125  clip 0.25"])
def test_captions_of_the_grid_are_not_cut(text: str) -> None:
    from PIL import ImageFont

    from align.data.grids import FONT_SIZE, MAX_LINES, _wrap

    font = ImageFont.load_default(size=FONT_SIZE)
    prompt, scores = _wrap(text, font, 128), _wrap(f"a\n{text}", font, 128)[1:]
    assert all(font.getlength(line) <= 128 for line in [*prompt, *scores])
    assert "".join(scores).replace(" ", "") == text.replace(" ", "")
    assert len(prompt) <= MAX_LINES
    assert prompt[-1].endswith("...") or "".join(prompt).replace(" ", "") == text.replace(" ", "")


def test_a_caption_whose_letters_no_font_has_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from align.data import grids

    pillow = grids._fonts()[0]
    monkeypatch.setattr(grids, "_fonts", lambda: [pillow])
    assert grids._legible("a red circle", 3, grids.font_of(["a red circle"])) == "a red circle"
    for text in ("一只红色的猫", "قطة حمراء", "a cat \N{CAT FACE}"):
        assert grids._legible(text, 3, grids.font_of([text, "a cat"])) == "003.png, text in prompts.json"
