"""LoRA files of other programs: read where that is exact, and refused in words where a pair is damaged."""

from __future__ import annotations

import json
import struct

import adapter_cases
import adapter_cases_video
import image_cases
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save, save_file

from align.policy import layouts
from align.policy.layers import LoraError, linear_layers
from align.policy.lora import FILE, add_lora, as_diffusers, load_lora, lora_of, save_lora
from alignflow.files import lora_files
from alignflow.files.lora_files import LoraFileError
from generators.adapters.sd3 import SD3
from generators.base import Options
from generators.load import adapter

CASES = {case.name: case for module in (adapter_cases, adapter_cases_video, image_cases) for case in module.CASES}
SINGLE = r"single_transformer_blocks\.\d\.(attn\.to_[qkv]|proj_mlp|proj_out)"
DEEP = {
    "flux-dev": rf"(transformer_blocks\.\d\.(attn\.to_[qv]|ff\.net\.2)|{SINGLE})",
    "wan21": r".*(ffn\.net\.2|attn2\.to_k)",
}
FAMILIES = ["sd3", "flux-dev", "flux-fill", "flux2-klein", "wan21", "wan21-i2v", "wan22-two-experts", "qwen-image",
            "z-image", "ltx", "hunyuan-video"]  # fmt: skip


def generator_of(name):
    if name == "sd3":
        return SD3(tiny.sd3_pipeline(t5=False), Options(size=(32, 32)))
    case = CASES[name]
    return adapter(case.kind)(case.build(), case.options)


def trained(name="sd3", rank=4, alpha=8.0):
    generator = generator_of(name)
    source = torch.Generator().manual_seed(1)
    for _, value in add_lora(generator, rank, alpha, DEEP.get(name)):
        value.data += 0.2 * torch.randn(value.shape, generator=source)
    return generator


def changes(generator):
    """Component and layer -> change of its weight."""
    return {
        (component, name): b @ a
        for component, network in generator.backbones().items()
        for name, (a, b) in lora_of(network).items()
    }


def same(one, other):
    assert set(one) == set(other)
    for key, change in one.items():
        torch.testing.assert_close(other[key], change, atol=1e-6 * float(change.abs().max()) + 1e-9, rtol=1e-6)


def write_as(generator, folder, layout):
    """The files of a layout, as :mod:`align.export` writes them."""
    components = list(generator.backbones())
    for component, network in generator.backbones().items():
        mine = layouts.LAYOUTS[type(network).__name__]
        rows = {key: shape[0] for key, shape in linear_layers(network).items()}
        theirs = layouts.published(lora_of(network), rows, mine)
        tensors = layouts.comfyui(theirs, mine) if layout == "comfyui" else layouts.kohya(theirs)
        stage = {"transformer": "_high_noise", "transformer_2": "_low_noise"}[component] if len(components) > 1 else ""
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"mine{stage}.safetensors")


@pytest.mark.parametrize("layout", ["comfyui", "kohya"])
@pytest.mark.parametrize("name", FAMILIES)
def test_published_layouts_come_back_exactly(tmp_path, name, layout):
    generator = trained(name)
    write_as(generator, tmp_path, layout)
    fresh = generator_of(name)
    load_lora(fresh, tmp_path)  # the folder, as export leaves it
    for component, network in generator.backbones().items():  # fused layers are taken apart to the ranks they had
        ours, theirs = lora_of(network), lora_of(fresh.backbones()[component])
        assert set(ours) == set(theirs)
        for key, pair in ours.items():
            assert all(torch.equal(one, other) for one, other in zip(pair, theirs[key], strict=True)), key


@pytest.mark.parametrize(
    "prefix", ["base_model.model.", "base_model.model.transformer.", "diffusion_model.", "transformer.", ""]
)
def test_our_own_names_under_other_prefixes(tmp_path, prefix):
    generator = trained()
    tensors, _ = as_diffusers(lora_of(generator.backbone))
    save_file(
        {prefix + key.removeprefix("transformer."): value for key, value in tensors.items()}, tmp_path / "a.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    fresh = generator_of("sd3")
    load_lora(fresh, tmp_path / "a.safetensors")
    same(changes(generator), changes(fresh))


def test_peft_folders_with_patterns(tmp_path):
    network = generator_of("sd3").backbone
    ends = {"target_modules": ["to_q", "to_v"], "init_lora_weights": False}
    patterns = {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"transformer_blocks.1.attn.to_q": 16}}
    for index, config in enumerate(
        [LoraConfig(r=4, lora_alpha=6, **ends), LoraConfig(r=4, lora_alpha=6, use_rslora=True, **ends),
         LoraConfig(r=4, lora_alpha=6, **ends, **patterns)]
    ):  # fmt: skip
        folder = tmp_path / str(index)
        folder.mkdir()
        network = generator_of("sd3").backbone
        inject_adapter_in_model(config, network, "default")
        state = get_peft_model_state_dict(network, adapter_name="default")
        network.peft_config = {"default": config}
        save_file(
            {f"base_model.model.{key}": value.contiguous() for key, value in state.items()},
            folder / "adapter_model.safetensors",
        )
        config.save_pretrained(folder)
        fresh = generator_of("sd3")
        load_lora(fresh, folder)
        wanted = {("transformer", name): b @ a for name, (a, b) in lora_of(network).items()}
        same(wanted, changes(fresh))


@pytest.mark.parametrize("alpha", [1.0, 4.0, 6.0])
def test_alpha_of_kohya_files_is_folded(tmp_path, alpha):
    generator = trained(alpha=4.0)
    write_as(generator, tmp_path, "kohya")
    file = tmp_path / "mine.safetensors"
    tensors = load_file(file)
    ranks = {key: len(tensors[key.replace(".alpha", ".lora_down.weight")]) for key in tensors if key.endswith(".alpha")}
    save_file({**tensors, **{key: torch.tensor(alpha * rank / 4) for key, rank in ranks.items()}}, file)
    fresh = generator_of("sd3")
    load_lora(fresh, file)
    same({key: value * alpha / 4 for key, value in changes(generator).items()}, changes(fresh))


def test_unequal_ranks_of_layers_are_written_so_that_diffusers_reads_them(tmp_path):
    generator = trained()
    tensors, header = as_diffusers(lora_of(generator.backbone))
    key = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    tensors[key.format("A")], tensors[key.format("B")] = tensors[key.format("A")][:2], tensors[key.format("B")][:, :2]
    del header["lora_adapter_metadata"]
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / FILE, header)
    fresh, untouched = generator_of("sd3"), tiny.sd3_pipeline(t5=False)
    load_lora(fresh, tmp_path)
    save_lora(fresh, tmp_path / "again")
    untouched.load_lora_weights(tmp_path / "again")
    theirs = {("transformer", name): b @ a for name, (a, b) in lora_of(untouched.transformer).items()}
    same(changes(fresh), theirs)
    assert sorted({len(a) for a, _ in lora_of(fresh.backbone).values()}) == [2, 4]


def test_which_file_a_folder_stands_for(tmp_path):
    generator = trained()
    save_lora(generator, tmp_path)
    (tmp_path / FILE).rename(tmp_path / "one.safetensors")
    load_lora(generator_of("sd3"), tmp_path)
    save_lora(generator, tmp_path / "b")
    (tmp_path / "b" / FILE).rename(tmp_path / "two.safetensors")
    with pytest.raises(LoraError, match=r"holds 2 files, one\.safetensors and others; name the file"):
        load_lora(generator_of("sd3"), tmp_path)


# -- damage -----------------------------------------------------------------------------------------------------------

A = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
B = A.replace("lora_A", "lora_B")
PAIR = r"transformer\.transformer_blocks\.0\.attn\.to_q"


def without(key):
    return lambda t, h: ({name: value for name, value in t.items() if name != key}, h)


def put(**given):
    """Replace A, B, or put ``name: value`` beside them."""
    names = {"A": A, "B": B, "alpha": A.replace("lora_A.weight", "alpha")}
    return lambda t, h: ({**t, **{names.get(key, key): value for key, value in given.items()}}, h)


def about(text):
    return lambda t, h: (t, {**h, "lora_adapter_metadata": text})


def spoilt(shape, value):
    tensor = torch.ones(shape)
    tensor[1, 1] = value
    return tensor


DORA = "not a plain LoRA: DoRA .*to_q"
BESIDE = A.removesuffix("lora_A.weight")
FOREIGN = "was not made for this SD3Transformer2DModel: 1 of 16 pairs do not fit, first transformer.x"
AGAIN = "diffusion_model.transformer_blocks.0.attn.to_q.lora_{}.weight"
DAMAGE = {
    "no A": (without(A), rf"1 of 15 pairs are damaged: {PAIR} has no A \(lora_A, lora_down\)"),
    "no B": (without(B), rf"1 of 15 pairs are damaged: {PAIR} has no B \(lora_B, lora_up\)"),
    "only A": (lambda t, h: ({k: v for k, v in t.items() if "lora_A" in k}, h), "holds only the A of its 15 pairs"),
    "only B": (lambda t, h: ({k: v for k, v in t.items() if "lora_B" in k}, h), "holds only the B of its 15 pairs"),
    "ranks": (put(A=torch.ones(2, 32)), rf"{PAIR}: A \[2, 32\] is of rank 2, B \[32, 4\] of rank 4"),
    "rank 0": (put(A=torch.ones(0, 32), B=torch.ones(32, 0)), rf"{PAIR} is empty"),
    "NaN in A": (put(A=spoilt((4, 32), torch.nan)), rf"NaN or infinity in 1 of 15 pairs, first {PAIR}"),
    "inf in B": (put(B=spoilt((32, 4), -torch.inf)), rf"NaN or infinity in 1 of 15 pairs, first {PAIR}"),
    "inputs": (put(A=torch.ones(4, 31)), r"to_q has 31 and 32, the layer 32 inputs and 32 outputs"),
    "outputs": (put(B=torch.ones(33, 4)), r"to_q has 32 and 33, the layer 32 inputs and 32 outputs"),
    "transposed": (put(A=torch.ones(32, 4), B=torch.ones(4, 32)), r"to_q has 4 and 4, the layer|is of rank 32"),
    "one dimension": (put(A=torch.ones(32)), r"A \[32\].* only linear layers"),
    "convolution": (put(A=torch.ones(4, 32, 1, 1)), r"A \[4, 32, 1, 1\].* only linear layers"),
    "integers": (put(A=torch.ones(4, 32, dtype=torch.int8)), rf"{PAIR} is stored as I8"),
    "booleans": (put(B=torch.ones(32, 4, dtype=torch.bool)), rf"{PAIR} is stored as BOOL"),
    "alpha of NaN": (put(alpha=torch.tensor(torch.nan)), rf"alpha of {PAIR} is nan"),
    "alpha of 0": (put(alpha=torch.tensor(0.0)), rf"alpha of {PAIR} is 0\.0"),
    "two alphas": (put(alpha=torch.ones(2)), r"alpha has the shape \[2\]"),
    "alpha alone": (put(**{"transformer.x.alpha": torch.tensor(1.0)}), r"transformer\.x has no A and B"),
    "DoRA": (put(**{f"{BESIDE}lora_magnitude_vector": torch.ones(32)}), DORA),
    "DoRA of kohya": (put(**{f"{BESIDE}dora_scale": torch.ones(32)}), DORA),
    "DoRA in the header": (about('{"transformer.use_dora": true}'), "not a plain LoRA: DoRA"),
    "LoKr": (put(**{"transformer.x.lokr_w1": torch.ones(2, 2)}), "not a plain LoRA: LoKr"),
    "whole weights": (put(**{"transformer.x.diff": torch.ones(2, 2)}), "LoRA: differences of whole weights"),
    "bias": (put(**{B.replace("weight", "bias"): torch.ones(32)}), "not a plain LoRA: LoRA with biases"),
    "twice": (put(**{A.replace("lora_A", "lora_down"): torch.ones(4, 32)}), "1 halves twice"),
    "strangers": (put(**{"transformer.x.weight": torch.ones(2, 2)}), r"1 tensors that are not part of a pair"),
    "another layout": (
        lambda t, h: ({f"double_blocks.0.processor.qkv_lora1.{d}.weight": torch.ones(2, 2) for d in ("up", "down")}, h),
        r"is not a LoRA: 2 tensors, first double_blocks.*; layouts read here: diffusers, peft, kohya, ComfyUI",
    ),
    "no LoRA": (lambda t, h: ({"transformer.x.weight": torch.ones(2, 2)}, h), r"is not a LoRA: 1 tensors"),
    "nothing": (lambda t, h: ({}, h), "is empty: it holds no pair"),
    "text encoder": (
        put(**{f"text_encoder.x.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}),
        "was not made for this CLIPTextModelWithProjection",
    ),
    "third text encoder": (
        put(**{f"text_encoder_3.x.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}),
        "changes text_encoder_3; of a StableDiffusion3Pipeline, a LoRA may change text_encoder and text_encoder_2",
    ),
    "unknown layer": (
        put(**{f"transformer.x.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}),
        f"the diffusers layout, {FOREIGN}",
    ),
    "another layer, another layout": (
        put(**{AGAIN.format("A"): torch.ones(4, 32), AGAIN.format("B"): torch.ones(32, 4)}),
        "changes transformer_blocks.0.attn.to_q twice",
    ),
    "settings no JSON": (about("{"), "lora_adapter_metadata in its header is not JSON"),
    "settings deep": (about("[" * 100_000), "lora_adapter_metadata in its header is not JSON"),
    "settings a list": (about("[1]"), "holds a list, not an object of settings"),
    "settings of another rank": (about('{"transformer.r": 8}'), r"is of rank 4, the settings of the file say 8"),
    "settings with alpha NaN": (about('{"transformer.lora_alpha": NaN}'), "lora_alpha is nan, it should be"),
    "settings with a text": (about('{"transformer.lora_alpha": "4"}'), "lora_alpha is 4, it should be a positive"),
    "settings that never end": (
        about(json.dumps({"transformer.rank_pattern": {"(a+)+$": 2}})), r"rank_pattern holds '\(a\+\)\+\$'",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    return as_diffusers(lora_of(trained().backbone))


@pytest.fixture(scope="module")
def bare():
    return generator_of("sd3")


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_kind_of_damage_names_the_pair(tmp_path, whole, bare, kind):
    change, message = DAMAGE[kind]
    tensors, header = change(dict(whole[0]), dict(whole[1]))
    save_file(tensors, tmp_path / FILE, header)
    with pytest.raises(LoraError, match=message) as caught:
        load_lora(bare, tmp_path)
    assert str(tmp_path / FILE) in str(caught.value)
    assert not getattr(bare.backbone, "peft_config", {})  # nothing of it was put on


BYTES = {
    "empty": (lambda data: b"", "no header of a safetensors file"),
    "cut in the header": (lambda data: data[:40], "no header of a safetensors file"),
    "cut in the tensors": (lambda data: data[:-8], "it is cut short"),
    "more at the end": (lambda data: data + b"\0" * 8, "its header describes"),
    "not JSON": (lambda data: data[:8] + b"[" + data[9:], "is not JSON"),
    "not UTF-8": (lambda data: data[:9] + b"\xff\xff" + data[11:], "is not JSON"),
    "a length beyond all": (lambda data: struct.pack("<Q", 2**63) + data[8:], "no header"),
    "deep": (lambda data: struct.pack("<Q", 200_000) + b"[" * 200_000, "nested too deeply|is not JSON"),
    "LFS pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "pickle": (lambda data: b"\x80\x02}q\x00.", "no header of a safetensors file"),
    "a list": (lambda data: struct.pack("<Q", 4) + b"[1] ", "its header holds a list"),
    "overlap": (lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1), "which cannot be|whole"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BYTES)
def test_damaged_bytes(tmp_path, whole, bare, kind):
    change, message = BYTES[kind]
    (tmp_path / FILE).write_bytes(change(save(*whole)))
    with pytest.raises(LoraError, match=rf"is not a whole safetensors file: .*({message})"):
        load_lora(bare, tmp_path)


def test_a_peft_file_without_its_settings(tmp_path, whole, bare):
    save_file(
        {key.replace("transformer.", "base_model.model.", 1): value for key, value in whole[0].items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(LoraError, match=r"the peft layout, whose alpha is in .*adapter_config\.json, which is missing"):
        load_lora(bare, tmp_path)


def test_a_file_of_another_model_says_whose_layout_it_is(tmp_path):
    write_as(trained("flux-dev"), tmp_path, "kohya")
    with pytest.raises(
        LoraError, match=r"a LoRA in the kohya layout, was not made for this SD3Transformer2DModel: 4 of 4"
    ):
        load_lora(generator_of("sd3"), tmp_path)


def test_pairs_are_checked_without_torch(tmp_path, whole):
    save_file(*whole[:1], tmp_path / FILE)
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from alignflow.files import lora_files\n"
        f"found = lora_files.inspect(Path({str(tmp_path / FILE)!r}))\n"
        "assert found.layout == 'diffusers' and found.ranks == [4] and len(found.pairs) == 15, found\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(LoraFileError, match="No such file"):
        lora_files.inspect(tmp_path / "none.safetensors")
