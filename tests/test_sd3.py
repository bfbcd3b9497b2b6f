"""SD3: our velocity on our times is the untouched diffusers pipeline, and what is wrong is said."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import tiny
import torch

import generators
from alignflow.errors import ConfigError
from alignflow.worlds.shapes import weights
from generators.adapters.sd3 import SD3
from generators.base import Conditioning, Generator, GeneratorError, Options
from generators.load import adapter, find, load

PROMPTS = ["a red cube", "two blue circles left of a star", "x"]


def euler(generator, x, cond, steps, guidance):
    """The probability-flow ODE by Euler's method."""
    times = generator.times(steps)
    with torch.no_grad():
        for t, after in pairwise(times):
            x = x + generator.velocity(x, t, cond, guidance) * (after - t)
    return x


@pytest.fixture(scope="module")
def generator():
    return SD3(tiny.sd3_pipeline())


def test_the_dtype_follows_the_network_and_is_not_looked_for_at_every_call(monkeypatch):
    from diffusers.models import modeling_utils

    looked, real = [], modeling_utils.get_parameter_dtype
    monkeypatch.setattr(modeling_utils, "get_parameter_dtype", lambda network: looked.append(1) or real(network))
    generator = SD3(tiny.sd3_pipeline(t5=False))
    cond, noise = generator.encode(["a red cube"]), generator.noise([3])
    looked.clear()
    for t in (0.9, 0.5):
        assert generator.velocity(noise, t, cond).isfinite().all()
    assert len(looked) <= 1
    assert generator.dtype == torch.float32
    generator.pipeline.transformer.to(torch.bfloat16)
    assert generator.dtype == torch.bfloat16
    assert generator.velocity(noise, 0.9, cond).isfinite().all()


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize(
    ("t5", "size", "scheduler"),
    [
        (True, None, {}),
        (False, (64, 32), {}),
        (True, (128, 96), {"shift": 1.0, "use_dynamic_shifting": True}),
        (False, (16, 48), {"shift": 5.0}),
        ("null", None, {}),
    ],
)
def test_equals_pipeline(guidance, t5, size, scheduler):
    pipeline = tiny.sd3_pipeline(t5=t5, **scheduler)
    generator = SD3(pipeline, Options(size=size))
    untouched = tiny.sd3_pipeline(t5=t5, **scheduler)  # its own, since the adapter may change how attention is computed
    height, width = size or (64, 64)
    assert generator.size == (height, width)
    noise = generator.noise([3, 4, 5])
    ours = euler(generator, noise, generator.encode(PROMPTS), 4, guidance)
    call = {
        "prompt": PROMPTS,
        "height": height,
        "width": width,
        "num_inference_steps": 4,
        "guidance_scale": guidance,
        "latents": noise,
    }
    theirs = untouched(**call, output_type="latent").images
    assert (ours - noise).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    media = generator.decode(ours)
    assert media.shape == (3, 3, height, width)
    torch.testing.assert_close(media, untouched(**call, output_type="pt").images, atol=1e-5, rtol=0)


def test_times_leave_the_scheduler_alone():
    pipeline = tiny.sd3_pipeline(shift=3.0)
    before = pipeline.scheduler.timesteps.clone()
    times = SD3(pipeline).times(4)
    # shift s: t -> s t / (1 + (s - 1) t). diffusers' last time is the shifted smallest training time, shifted again.
    assert times.shape == (5,)
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    smallest = 3 * 0.001 / (1 + 2 * 0.001)
    raw = torch.linspace(1, smallest, 4)
    torch.testing.assert_close(times[:4], 3 * raw / (1 + 2 * raw), atol=1e-6, rtol=0)
    assert torch.equal(pipeline.scheduler.timesteps, before)
    with pytest.raises(GeneratorError, match="at least 1"):
        SD3(pipeline).times(0)


def test_noise_belongs_to_its_seed(generator):
    rows = generator.noise([7, 8, 9])
    assert rows.shape == (3, 16, 8, 8)
    assert torch.equal(generator.noise([9])[0], rows[2])
    assert not torch.equal(rows[0], rows[1])


def test_negative_is_the_empty_prompt_and_encoded_once(generator, monkeypatch):
    generator.to("cpu")
    _, theirs, _, theirs_pooled = generator.pipeline.encode_prompt(["x"], None, None, max_sequence_length=256)
    assert torch.equal(generator.negative(generator.encode(["x"])).tensors["embeds"], theirs)
    assert torch.equal(generator.negative(generator.encode(["x"])).tensors["pooled"], theirs_pooled)
    cond, noise = generator.encode(PROMPTS), generator.noise([0, 1, 2])
    monkeypatch.setattr(generator, "encode", None)
    calls = generator.network_calls
    with torch.no_grad():
        generator.velocity(noise, torch.tensor(0.5), cond, 4.5)
        by_tensor = generator.velocity(noise, torch.tensor(0.5), cond)
        assert generator.network_calls == calls + 6 + 3
        assert torch.equal(generator.velocity(noise, 0.5, cond), by_tensor)


def test_rows_do_not_depend_on_their_batch(generator):
    cond, noise = generator.encode(PROMPTS), generator.noise([0, 1, 2])
    alone = generator.encode(PROMPTS[1:2])
    torch.testing.assert_close(alone.tensors["embeds"], cond.tensors["embeds"][1:2], atol=1e-5, rtol=0)
    t = torch.tensor([0.9, 0.5, 0.1])
    with torch.no_grad():
        together = generator.velocity(noise, t, cond, 3.0)
        single = generator.velocity(noise[1:2], t[1:2], alone, 3.0)
    torch.testing.assert_close(single, together[1:2], atol=1e-5, rtol=0)


def test_conditioning_rows():
    cond = Conditioning({"a": torch.arange(3.0)[:, None]})
    assert len(cond) == 3
    assert cond[torch.tensor([2, 2, 0])].tensors["a"].flatten().tolist() == [2, 2, 0]
    assert len(Conditioning.cat([cond, cond])) == 6


def test_decode_and_encode_keep_the_graph(generator, monkeypatch):
    latents = generator.noise([0, 1, 2]).requires_grad_()
    media = generator.decode(latents)
    assert media.dtype == torch.float32
    assert media.min() >= 0
    assert media.max() <= 1
    whole = generator.encode_media(media)
    assert whole.shape == latents.shape
    whole.sum().backward()
    assert latents.grad.abs().sum(dim=(1, 2, 3)).min() > 0
    theirs = generator.pipeline.vae.encode(media * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(whole, (theirs - 0.0609) * 1.5035, atol=1e-5, rtol=0)
    monkeypatch.setattr("generators.codec.VAE_PIXELS_CPU", 64 * 64)  # one image at a time
    torch.testing.assert_close(generator.decode(latents), media, atol=1e-5, rtol=0)
    torch.testing.assert_close(generator.encode_media(media), whole, atol=1e-5, rtol=0)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    generator = SD3(tiny.sd3_pipeline().to(torch.bfloat16))
    noise, cond = generator.noise([0]), generator.encode(["x"])
    with torch.no_grad():
        v = generator.velocity(noise, torch.tensor(0.5), cond, 2.0)
    assert generator.dtype == torch.bfloat16
    assert v.dtype == torch.float32
    assert generator.decode(noise).dtype == torch.float32
    full = SD3(tiny.sd3_pipeline())
    with torch.no_grad():
        exact = full.velocity(noise, torch.tensor(0.5), full.encode(["x"]), 2.0)
    assert 0 < (v - exact).abs().max() < 0.1


def test_one_null_token_stands_for_all_in_the_gradient_too():
    """Without T5 the pipeline's 256 zero tokens are one token here: same velocity, same gradient of the weights."""
    generator, untouched = SD3(tiny.sd3_pipeline(t5=False)), tiny.sd3_pipeline(t5=False)
    noise, t = generator.noise([0, 1]), torch.tensor([0.9, 0.3])
    embeds, _, pooled, _ = untouched.encode_prompt(PROMPTS[:2], None, None, do_classifier_free_guidance=False)
    assert embeds.shape[1] == 77 + 256
    gradients = []
    for transformer, inputs in (
        (generator.backbone, None),
        (untouched.transformer, {"encoder_hidden_states": embeds, "pooled_projections": pooled}),
    ):
        weights = [w for name, w in transformer.named_parameters() if "add_k_proj" in name or "attn.to_v" in name]
        for weight in weights:
            weight.requires_grad_()
        if inputs is None:
            v = generator.velocity(noise, t, generator.encode(PROMPTS[:2]))
        else:
            v = transformer(hidden_states=noise, timestep=1000 * t, return_dict=False, **inputs)[0]
        gradients.append(torch.autograd.grad(v.square().sum(), weights))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * theirs.abs().max().item(), rtol=0)


@pytest.mark.parametrize("size", [(64, 72), (272, 64)])
def test_impossible_sizes(size):
    with pytest.raises(GeneratorError, match=r"multiples of 16, at most 256"):
        SD3(tiny.sd3_pipeline(t5=False), Options(size=size))


@pytest.mark.parametrize("size", [(64, 60), (0, 64), (-64, 64)])
def test_sizes_that_no_pipeline_has(size):
    with pytest.raises(ConfigError, match=r"size\.[01] \(Options\): should be .* 8, given"):
        Options(size=size)


def test_too_long_a_prompt_is_named():
    short = SD3(tiny.sd3_pipeline(t5=False))  # CLIP alone: 77 tokens, of which 2 begin and end
    assert len(short.encode(["a" * 75])) == 1
    with pytest.raises(GeneratorError, match=r"prompt 1 \('aaaa.*78 tokens, the model reads 77"):
        short.encode(["fine", "a" * 76])
    long = SD3(tiny.sd3_pipeline(t5=True))  # T5 reads on to 256
    assert len(long.encode(["a" * 250])) == 1
    with pytest.raises(GeneratorError, match=r"prompt 0 .* tokens, the model reads 256"):
        long.encode(["word " * 80])


def test_text_length_follows_a_shorter_tokenizer():
    pipeline = tiny.sd3_pipeline()
    pipeline.tokenizer_3.model_max_length = 24
    assert SD3(pipeline).encode(["x"]).tensors["embeds"].shape == (1, 77 + 24, 64)
    assert SD3(tiny.sd3_pipeline(t5=False)).encode(["x"]).tensors["embeds"].shape == (1, 77 + 1, 64)


# -- load ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd3")
    tiny.sd3_pipeline(t5=False).save_pretrained(path)
    return path


def copy(folder, tmp_path):
    """The saved pipeline as links, so that a test may break one file."""
    for file in folder.rglob("*"):
        if file.is_file():
            target = tmp_path / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    return tmp_path


def test_load_a_folder(folder):
    generator = load("sd3", str(folder), options=Options(size=(32, 32)))
    fresh = SD3(tiny.sd3_pipeline(t5=False), Options(size=(32, 32)))
    noise = fresh.noise([1])
    with torch.no_grad():
        mine = generator.velocity(noise, torch.tensor(0.5), generator.encode(["x"]))
        same = fresh.velocity(noise, torch.tensor(0.5), fresh.encode(["x"]))
    torch.testing.assert_close(mine, same, atol=1e-5, rtol=0)
    assert load("generators.adapters.sd3:SD3", str(folder), dtype="bfloat16").dtype == torch.bfloat16


def test_embedded_worlds_are_found_by_name():
    assert find("sd3", "shapes") == weights("sd3")
    assert find("flux_kontext", "shapes-edit") == weights("flux_kontext")
    with pytest.raises(GeneratorError, match="embedded world 'shapes' has no 'wan'; it has sd3"):
        find("wan", "shapes")
    with pytest.raises(GeneratorError, match="no folder shapes-gone"):
        find("sd3", "shapes-gone")


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("sd4", "x", r"no generator 'sd4'; there are .*sd3"),
        ("nowhere:X", "x", r"No module named 'nowhere'"),
        ("generators.adapters.sd3:Nope", "x", r"has no 'Nope'; it has .*SD3"),
        ("sd3", "/no/such/folder", r"no folder /no/such/folder"),
        ("sd3", "somewhere", r"no folder somewhere"),
        ("sd3", "owner/name", r"no folder 'owner/name', not in the local hub cache.*HF_HUB_OFFLINE"),
    ],
)
def test_what_is_not_there(kind, path, message):
    with pytest.raises(GeneratorError, match=message):
        load(kind, path)


@pytest.mark.timeout(60)  # no retries
def test_unreachable_hub_is_said_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(GeneratorError, match=r"hub cannot be reached: http://127.0.0.1:9: \w*Connect"):
        load("sd3", "owner/name")


def test_wrong_dtype(folder):
    with pytest.raises(GeneratorError, match="float32, bfloat16, float16"):
        load("sd3", str(folder), dtype="fp8")


def test_other_folders(folder, tmp_path):
    with pytest.raises(GeneratorError, match=r"no model_index\.json"):
        load("sd3", str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(GeneratorError, match=r"holds a FluxPipeline, .*StableDiffusion3Pipeline; adapters: .*sd3 \("):
        load("sd3", str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(GeneratorError, match="is not JSON"):
        load("sd3", str(tmp_path))


def test_missing_component(folder, tmp_path):
    broken = copy(folder, tmp_path)
    (broken / "vae").rename(tmp_path.parent / f"{tmp_path.name}-vae")
    with pytest.raises(GeneratorError, match=r"is incomplete: it lacks vae of model_index\.json"):
        load("sd3", str(broken))


def test_truncated_weights(folder, tmp_path):
    broken = copy(folder, tmp_path)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(GeneratorError, match=r"transformer/diffusion_pytorch_model\.safetensors is damaged"):
        load("sd3", str(broken))
    weights.unlink()
    with pytest.raises(GeneratorError, match=r"^transformer: .* does not load as SD3Transformer2DModel: OSError"):
        load("sd3", str(broken))


def test_trained_by_routes_and_restores(generator):
    seen = []

    def wrapped(**inputs):
        seen.append(inputs["hidden_states"].shape)
        return generator.backbone(**inputs)

    with generator.trained_by(wrapped), torch.no_grad():
        generator.velocity(generator.noise([0]), torch.tensor(1.0), generator.encode(["x"]))
    assert seen == [(1, 16, 8, 8)]
    assert generator.network is generator.backbone


def test_kinds_are_files_and_import_no_torch():
    import subprocess
    import sys

    code = "import sys, generators; print(generators.kinds()); assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'sd3'" in out
    assert "base" not in out
    assert all(issubclass(adapter(kind), Generator) for kind in generators.kinds())
