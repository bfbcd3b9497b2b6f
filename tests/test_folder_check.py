"""``check`` reads a local pipeline folder and a LoRA's header, without torch: class, size, targets, scheduler."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import adapter_cases
import adapter_cases_video
import image_cases
import pytest
import tiny
import torch
from safetensors.torch import save_file

from align.checking.check import check_files, essentials
from align.checking.folder_check import _unit
from align.config.load import load_config
from alignflow.errors import ConfigError
from generators.folder import read_index
from generators.load import adapter

CASES = {case.name: case for module in (adapter_cases, adapter_cases_video, image_cases) for case in module.CASES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd3")
    tiny.sd3_pipeline(t5=False).save_pretrained(path)
    return path


@pytest.fixture
def config(tmp_path, folder):
    def make(path=folder, *overrides):
        file = tmp_path / "run.yaml"
        file.write_text(
            f"generator: {{kind: sd3, path: {path}, size: [32, 32], device: cpu}}\n"
            "prompts: {train: 'shapes:train'}\nreward: {kind: shapes}\nrecipe: {kind: nft}\n"
        )
        return load_config(file, list(overrides))

    return make


def said(config):
    with pytest.raises(ConfigError) as caught:
        check_files(config)
    return [str(problem) for problem in caught.value.problems]


def test_an_intact_folder_is_ready(config):
    check_files(config())
    assert not [name for name, _ in essentials(config()) if name == "scheduler"]


def test_another_class_names_the_kind_that_reads_it(config, folder):
    (line,) = said(config(folder, "generator.kind=flux"))
    assert f"flux reads FluxPipeline, {folder} holds a StableDiffusion3Pipeline; use generator.kind sd3" in line


def test_sizes_that_cannot_be_drawn(config, folder):
    (line,) = said(config(folder, "generator.size=[72,40]"))
    assert "[72, 40]: height and width must be multiples of 16; the nearest is [64, 32]" in line


@pytest.mark.parametrize("name", sorted({case.kind: name for name, case in CASES.items()}.values()))
def test_the_unit_is_the_adapters(tmp_path, name):
    case = CASES[name]
    pipeline = case.build()
    pipeline.save_pretrained(tmp_path)
    unit = _unit(tmp_path, read_index(tmp_path))
    assert unit in (None, adapter(case.kind)(pipeline, case.options).size_multiple())
    assert unit is not None or case.kind not in ("sd3", "flux", "flux2", "qwen_image", "sana", "wan")


def test_targets_that_are_no_layer(config, folder):
    (line,) = said(config(folder, "policy.targets=[to_q,to_qq]"))
    assert "policy.targets" in line
    assert "to_qq match no linear layer; there are 0.proj, attn.add_k_proj" in line
    check_files(config(folder, "policy.targets=[to_q,attn.to_k]"))


SCHEDULERS = [
    ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "dpm2 is nearer"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, r"kind: cps, noise_level: 1"),
    ({"_class_name": "FlowMatchLCMScheduler"}, r"kind: cps, noise_level: 1"),
    ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "replaced by Euler steps"),
]


@pytest.mark.parametrize(("settings", "message"), SCHEDULERS)
def test_the_scheduler_in_one_line(config, folder, tmp_path, settings, message):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    found = dict(essentials(config(other)))
    assert message in found["scheduler"]
    check_files(config(other))


@pytest.mark.parametrize("name", ["DDPMScheduler", "EDMEulerScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_that_is_no_flow(config, folder, tmp_path, name):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    (line,) = said(config(other))
    assert f"holds a {name} that is not configured for a flow" in line


@pytest.mark.parametrize("content", ["[1]", "[" * 100_000, "{", '{"_class_name": 3}'])
def test_hostile_folders(config, folder, tmp_path, content):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "model_index.json").write_text(content)
    (line,) = said(config(other))
    assert "generator.path" in line


def test_a_single_file(config, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (line,) = said(config(tmp_path / "model.safetensors"))
    assert "is a single file; a pipeline is a folder" in line


def test_the_lora_that_training_starts_from(config, folder, tmp_path):
    (line,) = said(config(folder, f"policy.init={tmp_path / 'none'}"))
    assert line.startswith("policy.init: no file or folder")
    key = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({key.format("A"): torch.ones(4, 32)}, tmp_path / "half.safetensors")
    (line,) = said(config(folder, f"policy.init={tmp_path / 'half.safetensors'}"))
    assert "holds only the A of its 1 pair," in line
    whole = {key.format("A"): torch.ones(4, 32), key.format("B"): torch.ones(32, 4)}
    save_file(whole, tmp_path / "whole.safetensors")
    check_files(config(folder, f"policy.init={tmp_path / 'whole.safetensors'}"))
    with pytest.raises(ConfigError, match=r"policy\.rank.*comes from the file of policy\.init"):
        config(folder, f"policy.init={tmp_path / 'whole.safetensors'}", "policy.rank=4")
    shown = dict(essentials(config(folder, f"policy.init={tmp_path / 'whole.safetensors'}")))["policy"]
    assert "rank" not in shown


def test_no_torch(config, folder):
    made = config(folder, "policy.targets=[to_q]", "generator.size=[48,48]")
    code = (
        "import sys\nfrom align.checking.check import check_files, essentials\n"
        "from align.config.load import load_config\n"
        f"made = load_config({str(folder.parent / 'x.yaml')!r}, [])\n"
        "essentials(made); check_files(made); assert 'torch' not in sys.modules"
    )
    from align.config.load import dump_config

    (folder.parent / "x.yaml").write_text(dump_config(made))
    subprocess.run([sys.executable, "-c", code], check=True)
