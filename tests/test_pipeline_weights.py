"""Every weight of every component is read and is a number, or the folder is refused in words."""

from __future__ import annotations

import json
import pickle
import shutil

import adapter_cases
import adapter_cases_video
import image_cases
import pytest
import tiny
import tiny_video
import torch
from safetensors.torch import load_file, save_file

from align.data.media import to_pixels
from alignflow.errors import DataError
from alignflow.files import weights
from generators.base import GeneratorError, Options
from generators.load import load

CASES = {case.name: case for module in (adapter_cases, adapter_cases_video, image_cases) for case in module.CASES}


def kinds_of_folder():
    """One case for each set of component classes."""
    known = {}
    for name, case in CASES.items():
        known.setdefault((case.kind, case.build.__name__ if case.build.__name__ != "<lambda>" else name), name)
    return sorted(known.values())


@pytest.mark.parametrize("name", kinds_of_folder())
def test_intact_folders_load_and_nothing_is_read_twice(tmp_path, name, monkeypatch):
    case, seen = CASES[name], {}
    pipeline = case.build()
    pipeline.save_pretrained(tmp_path)
    from generators import load as module

    original = module.networks
    monkeypatch.setattr(module, "networks", lambda *given: seen.setdefault("all", original(*given)))
    generator = load(case.kind, str(tmp_path), options=case.options)
    assert set(seen["all"]) == set(generator.modules())
    assert all(generator.modules()[part] is network for part, network in seen["all"].items())
    for part, network in pipeline.components.items():
        if isinstance(network, torch.nn.Module):
            mine = generator.modules()[part].state_dict()
            assert all(torch.equal(value, mine[key]) for key, value in network.state_dict().items()), part


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folders = {}
    for kind, pipeline in (("sd3", tiny.sd3_pipeline()), ("wan", tiny_video.wan(experts=2))):
        folders[kind] = tmp_path_factory.mktemp(kind)
        pipeline.save_pretrained(folders[kind])
    return folders


def damaged(intact, tmp_path, kind, part, change):
    """A copy whose ``part`` went through ``change(tensors) -> tensors``."""
    folder = shutil.copytree(intact[kind], tmp_path / kind)
    file = next((folder / part).glob("*.safetensors"))
    tensors = change(load_file(file))
    save_file(tensors, file, {"format": "pt"})
    return folder


def a_matrix(tensors, tied=("shared.weight", "encoder.embed_tokens.weight")):
    return sorted(key for key, value in tensors.items() if value.ndim == 2 and key not in tied)[3]


def drop(tensors):
    key = a_matrix(tensors)
    return {name: value for name, value in tensors.items() if name != key}


def rename(tensors):
    key = a_matrix(tensors)
    return {f"{name}_old" if name == key else name: value for name, value in tensors.items()}


def cut(tensors):
    key = a_matrix(tensors)
    return {name: value[:-1].clone() if name == key else value for name, value in tensors.items()}


def poison(tensors):
    key = a_matrix(tensors)
    tensors[key][0] = torch.nan
    return tensors


def extra(tensors):
    key = a_matrix(tensors)
    return {**tensors, f"{key.removesuffix('.weight')}_again.weight": torch.zeros(2)}


PARTS = [
    ("sd3", "text_encoder"), ("sd3", "text_encoder_2"), ("sd3", "text_encoder_3"), ("sd3", "transformer"),
    ("wan", "text_encoder"), ("wan", "transformer"), ("wan", "transformer_2"),
]  # fmt: skip
DAMAGE = [
    (drop, r"1 weight is missing"),
    (rename, r"1 weight is missing .*; 1 weight is unexpected \(.*_old\)"),
    (cut, r"size mismatch|of another shape|mismatch"),
    (poison, r"NaN or infinity: 1 weight is not finite"),
    (extra, r"1 weight is unexpected \(.*_again\.weight\)"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE, ids=[change.__name__ for change, _ in DAMAGE])
@pytest.mark.parametrize(("kind", "part"), PARTS, ids=["-".join(pair) for pair in PARTS])
def test_every_component_is_accounted_for(intact, tmp_path, kind, part, change, message):
    folder = damaged(intact, tmp_path, kind, part, change)
    with pytest.raises(GeneratorError, match=rf"(?s)^{part}: .*({message})") as caught:
        load(kind, str(folder))
    key = a_matrix(load_file(next((intact[kind] / part).glob("*.safetensors"))))
    assert change is cut or key.removesuffix(".weight") in str(caught.value)


def test_vae_and_a_head_that_the_class_does_not_have(intact, tmp_path):
    folder = damaged(intact, tmp_path, "sd3", "vae", lambda t: {k: v for k, v in t.items() if "conv_in" not in k})
    with pytest.raises(GeneratorError, match=r"^vae: .* 4 weights are missing \(decoder\.conv_in\.bias"):
        load("sd3", str(folder))
    other = damaged(intact, tmp_path / "other", "sd3", "text_encoder", lambda t: {**t, "logit_scale": torch.ones(1)})
    load("sd3", str(other))  # the whole CLIP was saved: its other tower and its scale belong to no text encoder


@pytest.mark.parametrize("form", ["bin", "sharded"])
def test_other_forms_of_files(intact, tmp_path, form):
    folder = shutil.copytree(intact["sd3"], tmp_path / "whole")
    original = load("sd3", str(folder), options=Options(size=(32, 32)))
    parts = {name: part for name, part in original.modules().items() if name in ("text_encoder", "transformer")}
    for name, part in parts.items():
        next((folder / name).glob("*.safetensors")).unlink()
        if form == "sharded":
            part.save_pretrained(folder / name, max_shard_size="20KB")
            assert len(list((folder / name).glob("*.safetensors"))) > 1
        else:
            file = "diffusion_pytorch_model.bin" if name == "transformer" else "pytorch_model.bin"
            torch.save(part.state_dict(), folder / name / file)
    again = load("sd3", str(folder), options=Options(size=(32, 32)))
    for name, part in parts.items():
        mine = again.modules()[name].state_dict()
        assert all(torch.equal(value, mine[key]) for key, value in part.state_dict().items())
    for name in parts:  # one weight of one shard, or of the pickle
        broken = shutil.copytree(folder, tmp_path / f"broken-{name}")
        if form == "sharded":
            file = max((broken / name).glob("*.safetensors"), key=lambda f: f.stat().st_size)
            save_file(dict(list(load_file(file).items())[1:]), file, {"format": "pt"})
        else:
            file = next((broken / name).glob("*.bin"))
            state = torch.load(file, weights_only=True)
            torch.save(drop(state), file)
        with pytest.raises(GeneratorError, match=rf"^{name}: .*missing"):
            load("sd3", str(broken))


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_would_run_code_does_not(intact, tmp_path):
    folder = shutil.copytree(intact["sd3"], tmp_path / "hostile")
    for part, file in (("transformer", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")):
        next((folder / part).glob("*.safetensors")).unlink()
        (folder / part / file).write_bytes(pickle.dumps({"weight": Runs(tmp_path / "ran")}))
    with pytest.raises(GeneratorError, match=r"^(transformer|text_encoder): .* does not load"):
        load("sd3", str(folder))
    assert not (tmp_path / "ran").exists()


INDEXES = [
    ("[1, 2]", "holds a list, not an object"),
    ("[" * 100_000, "nested too deeply|is not JSON"),
    ('{"a": ' * 100_000, "nested too deeply|is not JSON"),
    (b"\xff\xfe{}", "is not JSON"),
    ('{"_class_name": ' + "9" * 5000 + "}", "is not JSON"),
    ("{}", "_class_name is None"),
    (json.dumps({"_class_name": ["custom", "Pipeline"]}), r"_class_name is \['custom'"),
    (json.dumps({"_class_name": "StableDiffusion3Pipeline", "vae": []}), r"'vae' is \[\], not \[library, class\]"),
    (json.dumps({"_class_name": "StableDiffusion3Pipeline", "../x": ["diffusers", "AutoencoderKL"]}), "'../x' is"),
    (" " * 2_000_000, "2000000 bytes"),
]


@pytest.mark.parametrize(("content", "message"), INDEXES, ids=range(len(INDEXES)))
def test_hostile_indexes(tmp_path, content, message):
    (tmp_path / "model_index.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(GeneratorError, match=message):
        load("sd3", str(tmp_path))


def test_what_is_there_instead_of_a_pipeline(intact, tmp_path):
    single = tmp_path / "sd3.safetensors"
    save_file({"a": torch.zeros(1)}, single)
    with pytest.raises(GeneratorError, match=r"sd3\.safetensors is a single file; .*from_single_file.*save_pretrained"):
        load("sd3", str(single))
    with pytest.raises(GeneratorError, match=r"no model_index\.json; it holds sd3\.safetensors: .*from_single_file"):
        load("sd3", str(tmp_path))
    shutil.copytree(intact["sd3"], tmp_path / "inner")
    with pytest.raises(GeneratorError, match=r"did you mean .*/inner\?"):
        load("sd3", str(tmp_path))
    with pytest.raises(GeneratorError, match=r"config\.json: one component"):
        load("sd3", str(tmp_path / "inner" / "vae"))
    for file in (tmp_path / "inner").glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    with pytest.raises(GeneratorError, match=r"variant fp16 only; .*variant='fp16'\)\.save_pretrained"):
        load("sd3", str(tmp_path / "inner"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_samples_of_nan_are_no_images(value):
    media = torch.rand(3, 3, 4, 4)
    assert len(to_pixels(media)) == 3
    media[1, 2, 0, 3] = value
    with pytest.raises(DataError, match=r"1 of 3 samples hold NaN or infinity, first sample 1: .*float32"):
        to_pixels(media)


def test_finite_of_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn):
        good = torch.linspace(-3, 3, 12).to(dtype)
        assert weights.is_finite(good)
        assert not weights.is_finite(torch.cat([good.float(), torch.tensor([torch.nan])]).to(dtype))
    assert weights.is_finite(torch.tensor([1, 2]))
    assert weights.is_finite(torch.empty(0))
    assert weights.is_finite(torch.empty(3, device="meta"))
