"""LoRA files of other trainers through diffusers' converters: the same outputs as the stock pipeline, nothing lost."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_lora_layouts import generator_of

from align.checking.folder_check import lora_problems
from align.policy.layers import LoraError, linear_layers
from align.policy.lora import continue_lora, load_lora, lora_of
from alignflow.files.foreign_loras import foreign


def pair(source, outputs, inputs, rank=2):
    return 0.3 * torch.randn(rank, inputs, generator=source), 0.3 * torch.randn(outputs, rank, generator=source)


def xlabs(source, layers):
    """XLabs' FLUX: fused query, key and value of a double block, and its output."""
    width = layers["transformer_blocks.0.attn.to_q"][0]
    tensors = {}
    for name, outputs in (("qkv_lora1", 3 * width), ("qkv_lora2", 3 * width), ("proj_lora1", width)):
        down, up = pair(source, outputs, width)
        stem = f"double_blocks.0.processor.{name}"
        tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return tensors


def sd_scripts(source, layers, text=True):
    """kohya's sd-scripts for FLUX: a fused layer, the MLP, and two layers of the CLIP text encoder, each with alpha."""
    width, wide = layers["transformer_blocks.0.attn.to_q"][0], layers["transformer_blocks.0.ff.net.0.proj"][0]
    shapes = {"lora_unet_double_blocks_0_img_attn_qkv": (3 * width, width),
              "lora_unet_double_blocks_0_img_mlp_0": (wide, width)}  # fmt: skip
    if text:
        start = "lora_te1_text_model_encoder_layers_0_self_attn"
        shapes |= {f"{start}_q_proj": (32, 32), f"{start}_out_proj": (32, 32)}
    tensors = {}
    for stem, shape in shapes.items():
        down, up = pair(source, *shape)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    return tensors


def wan(source, layers, norm=0.0):
    """ComfyUI's Wan with changed biases, and a norm's difference of zero, as distilled LoRAs have."""
    width = layers["blocks.0.attn1.to_q"][0]
    tensors = {"diffusion_model.blocks.0.norm3.diff": torch.full((width,), norm)}
    for block in (0, 1):
        for name in ("self_attn.q", "cross_attn.o"):
            down, up = pair(source, width, width)
            stem = f"diffusion_model.blocks.{block}.{name}"
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors |= {f"{stem}.alpha": torch.tensor(1.0), f"{stem}.diff_b": torch.randn(width, generator=source)}
    return tensors


def made(tmp_path, family, write, **options):
    generator = generator_of(family)
    tensors = write(torch.Generator().manual_seed(3), linear_layers(generator.backbone), **options)
    file = tmp_path / "theirs.safetensors"
    save_file(tensors, file)
    return generator, file


def outputs(pipeline, generator):
    """Outputs of the network and of the text encoders that may have a LoRA, on fixed inputs."""
    found, seeds = {}, iter(range(100))

    def hidden(inputs):
        return torch.randn(3, inputs, generator=torch.Generator().manual_seed(next(seeds)))

    networks = {"transformer": pipeline.transformer, **{n: getattr(pipeline, n) for n in generator.text_loras}}
    for component, network in networks.items():
        for name, layer in network.named_modules():
            if hasattr(layer, "lora_A"):
                found[component, name] = layer(hidden(layer.in_features))
    return found


CASES = {"XLabs": ("flux-dev", xlabs), "sd-scripts": ("flux-dev", sd_scripts), "Wan with biases": ("wan21", wan)}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_layers_compute_as_in_the_stock_pipeline(tmp_path, case):
    family, write = CASES[case]
    generator, file = made(tmp_path, family, write)
    assert foreign(file)
    assert lora_problems(str(file), "lora") == []
    load_lora(generator, file)
    stock = generator_of(family)
    stock.pipeline.load_lora_weights(file.parent, weight_name=file.name)
    ours, theirs = outputs(generator.pipeline, generator), outputs(stock.pipeline, generator)
    assert len(ours) >= 4
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=1e-5, rtol=1e-5)
    assert {component for component, _ in ours} >= ({"text_encoder"} if case == "sd-scripts" else set())


def test_a_tensor_that_the_converter_drops_is_refused_by_its_name(tmp_path):
    generator, file = made(tmp_path, "wan21", wan, norm=0.5)
    with pytest.raises(LoraError, match=r"converter would leave out 1 of 17 tensors, first .*blocks\.0\.norm3\.diff"):
        load_lora(generator, file)
    assert not getattr(generator.backbone, "peft_config", {})


def test_zeros_that_are_dropped_are_said(tmp_path, capsys):
    generator, file = made(tmp_path, "wan21", wan)
    load_lora(generator, file)
    assert f"{file}: left out 1 tensors of zeros, first diffusion_model.blocks.0.norm3.diff" in capsys.readouterr().err


def test_training_goes_on_without_a_text_encoder_that_is_not_trained(tmp_path, capsys):
    generator, file = made(tmp_path, "flux-dev", sd_scripts)
    names = [name for name, _ in continue_lora(generator, file)]
    assert len(names) == 8
    assert lora_of(generator.pipeline.text_encoder) == {}
    assert "left out the LoRA of 1 text encoders, which are not trained" in capsys.readouterr().err


def test_changed_biases_are_not_trained_further(tmp_path):
    generator, file = made(tmp_path, "wan21", wan)
    with pytest.raises(LoraError, match="changes 4 biases"):
        continue_lora(generator, file)


def test_a_file_that_diffusers_does_not_read_either_keeps_our_reason(tmp_path):
    _, file = made(tmp_path, "flux-dev", xlabs)
    with pytest.raises(LoraError, match="is not a LoRA: 6 tensors"):
        load_lora(generator_of("sd3"), file)
