"""A policy in every published layout: read back as what was trained, or refused and nothing left behind."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import written
from adapter_cases import CASES, Case, moved
from adapter_cases_video import CASES as VIDEOS
from diffusers.loaders import lora_conversion_utils, lora_pipeline, single_file_utils
from image_cases import CASES as IMAGES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from align.export import check, export, layouts, sentence
from align.policy.layers import LoraError
from align.policy.layouts import ExportError
from align.policy.lora import FILE, NETWORK, save_lora
from align.runs import manifest
from align.runs.trained import find_policy, load_policy
from alignflow.errors import CheckpointError, RunFolderError
from generators.base import Generator, Options
from generators.load import adapter, load

run = written.run
SD3 = Case("sd3", "sd3", lambda: tiny.sd3_pipeline(t5=False), options=Options(size=(32, 32)))
EVERY = {case.name: case for case in (SD3, *CASES, *VIDEOS, *IMAGES)}
SINGLE = r"single_transformer_blocks\.\d\.(attn\.to_[qkv]|proj_mlp|proj_out)"
DEEP = {
    "flux-dev": rf"(transformer_blocks\.\d\.(attn\.to_[qv]|ff\.net\.2)|{SINGLE})",
    "wan21": r".*(ffn\.net\.2|attn2\.to_k)",
}


@pytest.fixture(autouse=True)
def tiny_widths(monkeypatch):
    """diffusers' readers of FLUX and HunyuanVideo know the width of the real models alone; ours are 32 wide."""
    for module, names in (
        (lora_conversion_utils, ["_convert_kohya_flux_lora_to_diffusers"]),
        (single_file_utils, ["convert_hunyuan_video_transformer_to_diffusers"]),
    ):
        for name in names:
            source = inspect.getsource(getattr(module, name))
            narrow = source.replace("12288", "128").replace("3072", "32")
            assert narrow != source
            exec(compile(narrow, name, "exec"), space := {**vars(module)})
            for place in (module, lora_pipeline):
                if hasattr(place, name):
                    monkeypatch.setattr(place, name, space[name])
    for network in ("FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"):
        layout = layouts.LAYOUTS[network]
        blocks = tuple(replace(one, fixed=dict.fromkeys(one.fixed, 32)) for one in layout.blocks)
        monkeypatch.setitem(layouts.LAYOUTS, network, replace(layout, blocks=blocks))


@pytest.fixture
def in_memory(monkeypatch):
    """Fresh pipelines are built, not read: what is exported is on disk all the same."""
    monkeypatch.setattr("align.export.Job.load", lambda job, path=None: generator_of(EVERY[job.config.name]))


def generator_of(case: Case) -> Generator:
    return adapter(case.kind)(case.build(), case.options)


def trained(
    folder: Path,
    case: Case,
    targets: str | list[str] | None = None,
    model: bool = False,
    policy: str = "lora",
    parts: tuple[str, ...] = NETWORK,
) -> Path:
    """A run folder as training leaves it: its config and a LoRA far from zero, for a pipeline that may lie beside."""
    if model:
        case.build().save_pretrained(folder / "model")
    generator = generator_of(case)
    if policy == "lora":
        moved(generator, targets, parts)
        save_lora(generator, folder / "run" / "lora")
    else:
        generator.backbone.proj_out.weight.data *= 1.5
        generator.backbone.save_pretrained(folder / "run" / "transformer")
    given = {key: value for key, value in vars(case.options).items() if value not in (None, "", 0.0)}
    tree = {
        "name": case.name,
        "generator": {"kind": case.kind, "path": str(folder / "model"), "device": "cpu", **given},
        "prompts": {"train": "shapes:train"},
        "reward": {"kind": "shapes"},
        "policy": {"kind": policy},
        "recipe": {"kind": "nft"},
    }
    (folder / "run" / "config.yaml").write_text(json.dumps(tree))
    return folder / "run"


FAMILIES = [
    ("sd3", "comfyui kohya"), ("flux-dev", "comfyui kohya"), ("flux-fill", "kohya"), ("flux2-klein", "comfyui kohya"),
    ("wan21", "comfyui kohya"), ("wan22-two-experts", "kohya"), ("wan21-i2v", "comfyui"),
    ("qwen-image", "comfyui kohya"), ("z-image", "comfyui kohya"), ("ltx", "comfyui"), ("hunyuan-video", "comfyui"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "formats"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_published_layouts_read_back_exactly(tmp_path, in_memory, name, formats):
    source = find_policy(trained(tmp_path, EVERY[name], DEEP.get(name)))
    for to in formats.split():
        found = export(source, to, tmp_path / to)
        assert found["difference"] <= 1e-5 * max(1.0, found["velocity"])
        assert found["effect"] > 100 * found["difference"]
        weights = [file for file in found["files"] if file.endswith(".safetensors")]
        assert len(weights) == (2 if "two" in name else 1)
        keys = load_file(tmp_path / to / weights[0])
        assert all(key.startswith("diffusion_model." if to == "comfyui" else "lora_unet_") for key in keys)
        assert any(key.endswith(".alpha") for key in keys) == (to == "kohya")


@pytest.mark.parametrize("name", ["sd3", "wan22-two-experts"])
def test_a_merged_pipeline_is_the_policy(tmp_path, name):
    case = EVERY[name]
    source = find_policy(trained(tmp_path, case, model=True))
    found = export(source, "merged")
    assert 100 * found["difference"] < found["effect"]
    policy, merged = generator_of(case), load(case.kind, found["folder"], options=case.options)
    assert not [key for network in merged.backbones().values() for key in network.state_dict() if "lora" in key]
    load_policy(policy, source.folder)
    theirs, ours = (check.answers(generator, decode=True) for generator in (policy, merged))
    assert ours.difference(theirs) < 1e-4


@pytest.mark.parametrize("name", ["wan22-two-experts", "mochi"])
def test_diffusers_has_its_own(tmp_path, in_memory, name):
    found = export(find_policy(trained(tmp_path, EVERY[name])), "diffusers")
    assert FILE in found["files"]
    assert found["difference"] == 0 < found["effect"]


@pytest.mark.parametrize(("world", "kind"), [("shapes-edit", "flux_kontext"), ("shapes-fill", "flux_fill")])
def test_an_editor_that_reads_few_words_is_asked_few(tmp_path, world, kind):
    generator = load(kind, world, options=Options(size=(32, 32)))
    assert generator.too_long([check.PROMPT])
    moved(generator)
    save_lora(generator, tmp_path / "run" / "lora")
    tree = {
        "generator": {"kind": kind, "path": world, "device": "cpu", "size": [32, 32]},
        "prompts": {"train": f"{world}:train"},
        "reward": {"kind": world.replace("-", "_")},
        "recipe": {"kind": "nft"},
    }
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(tree))
    found = export(find_policy(tmp_path / "run"), "diffusers", tmp_path / "out")
    assert found["difference"] <= 1e-5 * max(1.0, found["velocity"])
    assert found["effect"] > 100 * found["difference"]


def test_half_precision_is_rounded_and_no_more(tmp_path):
    source = find_policy(trained(tmp_path, SD3, model=True))
    exact, rounded = export(source, "kohya", tmp_path / "a"), export(source, "kohya", tmp_path / "b", "bfloat16")
    assert exact["difference"] < rounded["difference"] < 0.05 * rounded["effect"]
    values = load_file(tmp_path / "b" / "sd3.safetensors")
    assert {value.dtype for key, value in values.items() if "alpha" not in key} == {torch.bfloat16}
    merged = export(source, "merged", tmp_path / "c", "bfloat16")
    assert 0 < merged["difference"] <= merged["tolerance"] * max(1.0, merged["velocity"])
    with safe_open(tmp_path / "c/transformer/diffusion_pytorch_model.safetensors", "pt") as opened:
        assert opened.get_tensor("proj_out.weight").dtype == torch.bfloat16


def test_how_much_of_the_training_rounding_takes(tmp_path, capsys):
    folder = trained(tmp_path, SD3, model=True)
    file = folder / "lora" / FILE
    good, share = load_file(file), export(find_policy(folder), "merged", tmp_path / "a", "bfloat16")["share"]
    assert 0 < share < 0.1

    def weaker(times):  # rounding stays what it is, the effect of the LoRA falls
        save_file({key: value * times if "lora_B" in key else value for key, value in good.items()}, file)

    weaker(share / 0.15)
    found = export(find_policy(folder), "merged", tmp_path / "b", "bfloat16")
    assert 0.1 < found["share"] == found["moved"] / found["effect"] < 0.5
    assert (
        f"to bfloat16 loses {found['share']:.0%} of what training changed. Use merged with --dtype" in found["warning"]
    )
    assert f"of which this is {found['share']:.1%})" in sentence(found)
    exact = export(find_policy(folder), "merged", tmp_path / "c", "float32")
    assert exact["share"] < 1e-3
    assert exact["warning"] is None
    weaker(share / 2)
    with pytest.raises(ExportError, match=r"loses \d+% of what training changed .*nothing was kept\. Use merged with"):
        export(find_policy(folder), "merged", tmp_path / "d", "bfloat16")
    assert not (tmp_path / "d").exists()
    weaker(0)
    nothing = export(find_policy(folder), "merged", tmp_path / "e", "float32")
    assert nothing["share"] is None
    assert "training changed none of them" in sentence(nothing)


def test_fused_layers_are_blocks_of_ranks():
    source = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(r, 5, generator=source), torch.randn(n, r, generator=source)) for n, r in ((3, 2), (4, 3))]
    a, b = layouts.fuse([(3, pairs[0]), (2, None), (4, pairs[1])])
    assert (a.shape, b.shape) == ((5, 5), (9, 5))
    wanted = torch.cat([pairs[0][1] @ pairs[0][0], torch.zeros(2, 5), pairs[1][1] @ pairs[1][0]])
    torch.testing.assert_close(b @ a, wanted, atol=1e-6, rtol=0)


def test_all_weights_trained_become_a_pipeline(tmp_path, run):
    folder = trained(tmp_path, SD3, model=True, policy="full")
    found = export(find_policy(folder), "merged")
    assert found["difference"] < 1e-5 < found["effect"]
    whole, base = (load("sd3", place, options=SD3.options) for place in (found["folder"], str(tmp_path / "model")))
    assert torch.equal(whole.backbone.proj_out.weight, 1.5 * base.backbone.proj_out.weight)
    with pytest.raises(ExportError, match="trained all weights, there is no LoRA; use --to merged"):
        export(find_policy(folder), "kohya", tmp_path / "no")
    words = ["--prompt", "a", "evaluate.sampler.steps=1", "--seed", "3", "--out"]
    assert run("sample", str(folder), *words, str(tmp_path / "drawn"))[0] == 0
    assert run("sample", str(folder / "config.yaml"), *words, str(tmp_path / "base"))[0] == 0
    assert (tmp_path / "drawn/000.png").read_bytes() != (tmp_path / "base/000.png").read_bytes()
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoraError, match="does not load as this SD3Transformer2DModel"):
        export(find_policy(folder), "merged", tmp_path / "no")
    assert not (tmp_path / "no").exists()


# -- what must not pass -----------------------------------------------------------------------------------------------


MISTAKES = [
    ("sd3", "comfyui", ("x_block.attn.qkv", "x_block.attn.kqv")),
    ("sd3", "kohya", ("context_block_attn_qkv", "context_block_attn_kqv")),
    ("qwen-image", "kohya", ("to_q", "to_r")),
    ("wan21", "comfyui", ("blocks.1", "blocks.9")),
]


@pytest.mark.parametrize(("name", "to", "mistake"), MISTAKES, ids=["sd3", "sd3-kohya", "qwen-image", "wan21"])
def test_a_layout_with_a_mistake_is_caught_and_leaves_nothing(tmp_path, in_memory, monkeypatch, name, to, mistake):
    source = find_policy(trained(tmp_path, EVERY[name]))
    write = getattr(layouts, to)
    monkeypatch.setattr(
        layouts, to, lambda *given: {key.replace(*mistake): value for key, value in write(*given).items()}
    )
    with pytest.raises(ExportError, match=r"does not read .*; nothing was kept|reads back as another LoRA"):
        export(source, to, tmp_path / "out" / "here")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_wrong_strength_is_caught(tmp_path, in_memory, monkeypatch):
    source = find_policy(trained(tmp_path, SD3))
    write = layouts.kohya
    twice = lambda lora: {k: v * 2 if k.endswith("alpha") else v for k, v in write(lora).items()}  # noqa: E731
    monkeypatch.setattr(layouts, "kohya", twice)
    for dtype in (None, "bfloat16"):
        with pytest.raises(ExportError, match=r"0 layers are not read, 15 differ, first transformer_blocks\.0\.attn"):
            export(source, "kohya", tmp_path / "out", dtype)


def test_what_has_no_published_layout_is_refused_with_what_there_is(tmp_path, in_memory):
    source = find_policy(trained(tmp_path, EVERY["mochi"]))
    with pytest.raises(
        ExportError, match=r"no such layout of it is known \(MochiTransformer3DModel\).*diffusers, merged"
    ):
        export(source, "comfyui")
    with pytest.raises(
        ExportError, match=r"diffusers reads no such file of it .* there are diffusers, comfyui, merged"
    ):
        layouts.layout_of("LTXVideoTransformer3DModel", "kohya")
    with pytest.raises(ExportError, match=r"1 trained layers have no name in this layout, first proj_out; use --to"):
        layouts.published({"proj_out": (torch.zeros(1, 1), torch.zeros(1, 1))}, {}, layouts.FLUX)


# -- what is exported -------------------------------------------------------------------------------------------------


def test_a_damaged_lora_is_refused(tmp_path, in_memory):
    folder = trained(tmp_path, SD3)
    file = folder / "lora" / FILE
    good = load_file(file)
    for name, content, message in (
        ("cut", file.read_bytes()[:-40], "not a whole safetensors file: it is cut short"),
        ("nan", {key: value * float("nan") for key, value in good.items()}, "NaN or infinity in 15 of 15 pairs"),
        (
            "other",
            {f"transformer.other.lora_{half}.weight": torch.ones(2, 2) for half in "AB"},
            "was not made for this",
        ),
    ):
        file.write_bytes(content) if isinstance(content, bytes) else save_file(content, file)
        with pytest.raises((LoraError, ExportError), match=message):
            export(find_policy(folder), "comfyui", tmp_path / name)
        assert not (tmp_path / name).exists()


def checkpoint(folder: Path, step: int) -> Path:
    """What ``find_policy`` looks at of a checkpoint."""
    path = folder / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    seal(path, step)
    return path


def seal(path: Path, step: int) -> None:
    """Write the manifest of a checkpoint whose weights nobody reads."""
    for name in manifest.NEEDED:
        (path / name).write_bytes(b"")
    learners = {"policy": {"updates": step, "skipped": 0}}
    counters = {"step": step, "seconds": 0.0, "network_calls": 0, "learners": learners}
    manifest.write(path, {"step": step, "counters": counters, "roles": {"policy": {"policy": 0}}})


def test_which_weights_a_folder_stands_for(tmp_path):
    with pytest.raises(RunFolderError, match="does not exist"):
        find_policy(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="neither a run folder nor a checkpoint"):
        find_policy(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="nothing trained yet"):
        find_policy(tmp_path)
    first, second = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    assert (find_policy(tmp_path).folder, find_policy(tmp_path).checkpoint) == (second, True)
    assert (find_policy(first).folder, find_policy(first).step, find_policy(first).run) == (first, 2, tmp_path)
    (tmp_path / "lora").mkdir()
    (tmp_path / "summary.json").write_text('{"steps": 4}')
    assert (find_policy(tmp_path).folder, find_policy(tmp_path).checkpoint) == (tmp_path / "lora", False)
    third = checkpoint(tmp_path, 6)  # resumed after it had finished
    assert find_policy(tmp_path).folder == third


def test_the_command(tmp_path, run, in_memory):
    folder = trained(tmp_path, SD3)
    (folder / "lora").rename(checkpoint(folder, 3).parent / "step-000003" / "lora")
    made = folder / "checkpoints" / "step-000003"
    (made / "lora" / FILE).rename(made / FILE)
    code, out, err = run("export", str(folder), "--to", "diffusers", "--out", str(tmp_path / "out"))
    assert (code, err) == (0, f"{folder} is not finished: its newest checkpoint is step 3\n")
    assert "read back and compared: velocities differ by at most 0 " in out
    assert "not finished" in (tmp_path / "out" / "README.md").read_text()
    (made / "manifest.json").unlink()
    seal(made, 3)
    (made / FILE).write_bytes(b"damaged")
    code, _, err = run("export", str(made), "--to", "kohya")
    assert (code, f"checkpoint {made}: {FILE} is damaged or missing" in err) == (1, True)
    for words, message in (
        (
            (str(folder), "--to", "diffusers", "--out", str(tmp_path / "out")),
            "exists and is not empty; choose another folder with --out",
        ),
        ((str(tmp_path / "no"), "--to", "merged"), "no does not exist; name a folder"),
        ((str(folder), "--to", "a1111"), "--to a1111: choose one of diffusers, comfyui, kohya, merged"),
        ((str(folder), "--to", "kohya", "--dtype", "int8"), "--dtype int8: choose one of float32"),
    ):
        code, _, err = run("export", *words)
        assert code == 2
        assert message in err
