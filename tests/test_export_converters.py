"""Exports that diffusers' converters read as they are: text encoders, and the sizes that converters only know."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import moved
from diffusers.loaders import lora_conversion_utils, single_file_utils
from safetensors.torch import load_file
from test_export import EVERY, generator_of, trained

from align.export import check, export, layouts
from align.policy.layers import LoraError
from align.policy.layouts import ExportError
from align.policy.lora import continue_lora, load_lora, lora_of, loras_of
from align.runs.trained import find_policy
from alignflow.files import lora_files

DOUBLE = r"(transformer_blocks\.\d\.(attn\.to_[qv]|ff\.net\.2)|.*layers\.\d\.self_attn\.(q_proj|out_proj)|.*mlp\.fc1)"
SINGLE = r"single_transformer_blocks\.\d\.(attn\.to_[qkv]|proj_mlp|proj_out)"


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh pipelines are built, not read: what is exported is on disk all the same."""
    monkeypatch.setattr("align.export.Job.load", lambda job, path=None: generator_of(EVERY[job.config.name]))


# -- text encoders ----------------------------------------------------------------------------------------------------

LAYER = "text_model.encoder.layers.0.self_attn.q_proj"
KEYS = {
    "kohya": {
        name: f"lora_te{number}_{LAYER.replace('.', '_')}"
        for number, name in ((1, "text_encoder"), (2, "text_encoder_2"))
    },
    "comfyui": {
        name: f"text_encoders.{clip}.transformer.{LAYER}"
        for name, clip in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g"))
    },
}  # fmt: skip
"""Names in sd-scripts' networks/lora_sd3.py and lora_flux.py, and in ComfyUI's comfy/lora.py."""


@pytest.mark.parametrize("parts", [("text",), ("network", "text")], ids=["text", "both"])
@pytest.mark.parametrize("to", ["comfyui", "kohya"])
@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_text_encoders_are_exported_and_read_back(name: str, to: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    targets = ["q_proj", "out_proj", "fc1"] if parts == ("text",) else DOUBLE
    source = find_policy(trained(tmp_path, EVERY[name], targets, parts=parts))
    found = export(source, to, tmp_path / to)
    assert found["difference"] <= 1e-5 * max(1.0, found["velocity"])
    assert found["effect"] > 100 * found["difference"]
    encoders = ["text_encoder", "text_encoder_2"] if name == "sd3" else ["text_encoder"]
    file = tmp_path / to / f"{name}.safetensors"
    keys = load_file(file)
    starts = {key.split(".lora_")[0].removesuffix(".alpha") for key in keys}
    assert {KEYS[to][one] for one in encoders} <= starts
    assert len(keys) % (3 if to == "kohya" else 2) == 0
    assert any(key.startswith(("lora_unet_", "diffusion_model.")) for key in keys) == ("network" in parts)

    policy, fresh = generator_of(EVERY[name]), generator_of(EVERY[name])
    load_lora(policy, source.folder)
    assert lora_files.encoders(file) == {*encoders, *([""] if "network" in parts else [])}
    continue_lora(fresh, file, parts=parts)  # as policy.init does, and load_lora as `sample --lora` does
    ours, theirs = loras_of(policy), loras_of(fresh)
    assert {*ours} == {*theirs} == {*encoders, *(["transformer"] if "network" in parts else [])}
    for component, lora in ours.items():
        assert {*lora} == {*theirs[component]}
        for layer, pair in lora.items():
            assert all(torch.equal(one, other) for one, other in zip(pair, theirs[component][layer], strict=True))


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_diffusers_reads_the_published_names_of_clip(to: str, tmp_path: Path) -> None:
    """FLUX's own ``load_lora_weights``: it knows ``lora_te1_`` and ``text_encoders.clip_l.``."""
    source = find_policy(trained(tmp_path, EVERY["flux-dev"], DOUBLE, parts=("network", "text")))
    export(source, to, tmp_path / to)
    policy, stock = generator_of(EVERY["flux-dev"]), generator_of(EVERY["flux-dev"])
    load_lora(policy, source.folder)
    stock.pipeline.load_lora_weights(str(tmp_path / to), weight_name="flux-dev.safetensors")
    ours, theirs = (lora_of(one.pipeline.text_encoder) for one in (policy, stock))
    assert {*ours} == {*theirs}
    for layer, (a, b) in ours.items():
        torch.testing.assert_close(theirs[layer][1] @ theirs[layer][0], b @ a, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layers", [["q_proj"], ["fc1", "fc2"], ["v_proj", "fc2"]])
def test_flux_reads_text_encoders_of_any_targets(layers: list[str], tmp_path: Path) -> None:
    found = export(
        find_policy(trained(tmp_path, EVERY["flux-dev"], layers, parts=("text",))), "kohya", tmp_path / "out"
    )
    assert found["effect"] > 0
    assert found["difference"] <= 1e-5 * max(1.0, found["velocity"])


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_a_mistake_in_a_text_encoder_is_caught(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_policy(trained(tmp_path, EVERY["sd3"], parts=("text",)))
    write = layouts.encoder

    def mistaken(*given: Any) -> Any:
        return {re.sub("q(.)proj", r"k\1proj", key) if "0" in key else key: one for key, one in write(*given).items()}

    monkeypatch.setattr(layouts, "encoder", mistaken)
    with pytest.raises(ExportError, match=r"reads back as another LoRA: .* layers are not read, .* differ, first .*"):
        export(source, to, tmp_path / "out" / "here")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_layout_without_names_for_text_encoders_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = "SD3Transformer2DModel"
    monkeypatch.setitem(layouts.LAYOUTS, network, replace(layouts.SD3, text=False))
    source = find_policy(trained(tmp_path, EVERY["sd3"], parts=("network", "text")))
    said = f"trained text_encoder and text_encoder_2 too, for which this layout of {network} has no names; use --to dif"
    with pytest.raises(ExportError, match=said):
        export(source, "kohya", tmp_path / "out")


def test_training_of_other_parts_than_the_file_has_is_refused(tmp_path: Path) -> None:
    export(find_policy(trained(tmp_path, EVERY["sd3"], parts=("text",))), "kohya", tmp_path / "out")
    file = tmp_path / "out" / "sd3.safetensors"
    with pytest.raises(LoraError, match="changes text encoders, and the network and text encoders would be trained"):
        continue_lora(generator_of(EVERY["sd3"]), file, parts=("network", "text"))


def test_a_t5_of_another_trainer_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = generator_of(EVERY["sd3"])
    moved(generator)
    network = layouts.published(lora_of(generator.backbone), _rows(generator), layouts.SD3)
    stem = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    t5 = {f"{stem}.lora_down.weight": torch.ones(2, 32), f"{stem}.lora_up.weight": torch.ones(32, 2)}
    save_file(
        {**{key: one.contiguous() for key, one in layouts.kohya(network).items()}, **t5}, tmp_path / "a.safetensors"
    )
    with pytest.raises(LoraError, match="changes a text encoder, which is not trained here"):
        load_lora(generator_of(EVERY["sd3"]), tmp_path / "a.safetensors")


def _rows(generator: Any) -> dict[str, int]:
    return {name: shape[0] for name, shape in check.linear_layers(generator.backbone).items()}


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "to"),
    [("flux-dev", "comfyui"), ("flux-dev", "kohya"), ("flux-fill", "kohya"), ("hunyuan-video", "comfyui")],
)
def test_a_width_that_diffusers_does_not_know_is_said_first(
    name: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_policy(trained(tmp_path, EVERY[name], SINGLE))
    monkeypatch.setattr("align.export.tensor_files.save", lambda *_: pytest.fail("a file was written"))
    said = (
        r"only knows the width 3072 of the published model, and single_transformer_blocks\.0\.\S+ has a width of 32; "
        "nothing was written. Use --to diffusers or merged"
    )
    with pytest.raises(ExportError, match=said):
        export(source, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()


def test_a_narrow_flux_without_fused_layers_of_that_width_is_exported(tmp_path: Path) -> None:
    source = find_policy(trained(tmp_path, EVERY["flux-dev"], r"transformer_blocks\.\d\.(attn\.to_[qv]|ff\.net\.2)"))
    assert export(source, "comfyui", tmp_path / "out")["effect"] > 0


def test_more_blocks_than_diffusers_reads_are_said() -> None:
    pair = (torch.zeros(1, 1), torch.zeros(1, 1))
    for name, known in (("transformer_blocks.19.attn.to_q", 19), ("single_transformer_blocks.38.proj_out", 38)):
        rows = {f"single_transformer_blocks.{n}.attn.to_q": 3072 for n in (37, 38)}
        blocks, number = name.split(".")[:2]
        with pytest.raises(
            ExportError, match=f"only knows {known} of them, and {name} has block {number} of {blocks};"
        ):
            layouts.check_sizes({name: pair}, rows, "FluxTransformer2DModel", "kohya")
        before = name.replace(number, str(known - 1), 1)
        layouts.check_sizes({before: pair}, rows, "FluxTransformer2DModel", "kohya")


def test_the_sizes_are_those_in_diffusers() -> None:
    flux = inspect.getsource(lora_conversion_utils._convert_kohya_flux_lora_to_diffusers)
    assert "dims=[3072, 3072, 3072, 12288]" in flux
    assert re.findall(r"range\((\d+)\)", flux) == ["19", "38"]
    hunyuan = inspect.getsource(single_file_utils.convert_hunyuan_video_transformer_to_diffusers)
    assert re.findall(r"hidden_size = (\d+)", hunyuan) == ["3072"]
    assert {b.fixed.get("linear1") for one in (layouts.FLUX, layouts.HUNYUAN) for b in one.blocks} == {None, 3072}
    assert [blocks.most for blocks in layouts.FLUX.blocks] == [19, 38]


def test_no_other_converter_is_used_that_knows_one_size() -> None:
    """Those of the layouts without ``fixed``: SD3's, and diffusers' LoRA readers of the others."""
    readers = [name for name in dir(lora_conversion_utils) if re.match("_convert_.*(flux2|wan|ltx|qwen|z_image)", name)]
    assert len(readers) >= 5
    sources = [inspect.getsource(getattr(lora_conversion_utils, name)) for name in readers]
    sources.append(inspect.getsource(single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers))
    for source in sources:
        assert not re.findall(r"\b(?:1536|2048|3072|3584|3840|5120|6144|12288|15360)\b", source)


def test_an_error_without_words_says_where_it_was_raised() -> None:
    def converter(rows: int) -> None:
        if rows != 3072:
            raise AssertionError

    said = (
        r"a check of converter in its test_export_converters\.py, line \d+, failed without a message \(AssertionError: "
    )
    with (
        pytest.raises(
            ExportError, match=said + r"raise AssertionError\)\. It may only know .* Use --to diffusers; noth"
        ),
        check._explained(Path("narrow.safetensors")),
    ):
        converter(32)
