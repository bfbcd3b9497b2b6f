"""Weight files that are wrong, cut off or elsewhere, and the authors' packages: an error that says what to do."""

from __future__ import annotations

import math
import os
import sys
import types

import pytest
import tiny
import tiny_rewards
import torch

import rewards
from rewards.base import RewardError
from rewards.networks.hub import is_file, weight_file
from rewards.networks.state_dicts import looks_like, read_state_dict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer for each family, and the state dicts that rewards read."""
    out = tmp_path_factory.mktemp("weights")
    tokens, bert = tiny.clip_tokenizer(), tiny_rewards.bert_tokenizer(out / "bert")
    tokens.save_pretrained(out / "clip")
    tiny.clip_model(out / "pick")
    torch.save(tiny_rewards.OpenClip(len(tokens)).state_dict(), out / "clip.pt")
    torch.save(tiny_rewards.ImageRewardNet(len(bert) + 2).state_dict(), out / "blip.pt")
    torch.save({f"layers.{key}": value for key, value in tiny_rewards.head(32).state_dict().items()}, out / "v2.pth")
    torch.save(torch.nn.Linear(32, 1).state_dict(), out / "v1.pth")
    return out


@pytest.fixture
def hpsv2(folder):
    """The reward that reads a given file."""
    return lambda file: rewards.parse(
        {"kind": "hpsv2", "weights": str(file), "processor": str(folder / "clip")}
    ).build()


@pytest.fixture
def image_reward(folder):
    return lambda file: rewards.parse(
        {"kind": "image_reward", "weights": str(file), "tokenizer": str(folder / "bert")}
    ).build()


def aesthetic(folder, version, head):
    return rewards.parse({"kind": "aesthetic", "version": version, "head": str(head), "model": str(folder / "pick")})


def changed(folder, tmp_path, name, change):
    """A copy of the state dict ``name`` after ``change``."""
    state = torch.load(folder / name)
    change(state)
    torch.save(state, tmp_path / name)
    return tmp_path / name


# -- wrong architectures ----------------------------------------------------------------------------------------------


def test_weights_of_another_architecture_are_named(folder, hpsv2, image_reward):
    cases = [
        (hpsv2, "blip.pt", r"'hpsv2': .*blip.pt is not CLIP in the layout of open_clip: 9 weights missing "
         r"\(visual.conv1.weight, .*looks like ImageReward"),
        (hpsv2, "v2.pth", r"looks like LAION aesthetic head v2"),
        (image_reward, "clip.pt", r"is not ImageReward's weights: .*looks like CLIP in the layout of"),
        (image_reward, "v1.pth", r"looks like one linear layer \(LAION aesthetic head v1\)"),
    ]  # fmt: skip
    for build, file, message in cases:
        with pytest.raises(RewardError, match=message):
            build(folder / file)
    with pytest.raises(RewardError, match=r"aesthetic head v2: 10 weights missing .*2 weights unexpected"):
        aesthetic(folder, "v2", folder / "v1.pth").build()
    with pytest.raises(RewardError, match=r"aesthetic head v1: .*\(bias, weight\).*looks like .*v2 \(MLP\)"):
        aesthetic(folder, "v1", folder / "v2.pth").build()


def test_known_layouts():
    marks = {
        "vision_model.embeddings.class_embedding": "CLIPModel of transformers",
        "visual.trunk.blocks.0.norm1.weight": "open_clip with a timm vision tower",
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA",
        "model.layers.0.x": "nothing known here",
    }
    for key, name in marks.items():
        assert looks_like([key]) == name


def test_every_key_counts(folder, tmp_path, hpsv2, image_reward):
    lost = changed(folder, tmp_path, "clip.pt", lambda state: state.pop("ln_final.bias"))
    with pytest.raises(RewardError, match=r"1 weights missing \(text_model.final_layer_norm.bias\)"):
        hpsv2(lost)
    more = changed(folder, tmp_path, "clip.pt", lambda state: state.update({"visual.extra": torch.zeros(1)}))
    with pytest.raises(RewardError, match=r"1 weights unexpected \(visual.extra\)"):
        hpsv2(more)
    odd = changed(folder, tmp_path, "clip.pt", lambda s: s.update({"visual.ln_pre.bias": torch.zeros(7)}))
    with pytest.raises(
        RewardError, match=r"1 weights of another shape \(vision_model.pre_layrnorm.bias \[7\] for \[128"
    ):
        hpsv2(odd)
    for key in ("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias", "mlp.layers.7.weight"):
        with pytest.raises(
            RewardError, match=r"1 weights missing \([a-z.]*(layer.1.crossattention.self.key.bias|7.weight)"
        ):
            image_reward(changed(folder, tmp_path, "blip.pt", lambda state, key=key: state.pop(key)))
    more = changed(folder, tmp_path, "blip.pt", lambda state: state.update({"blip.itm_head.weight": torch.zeros(2)}))
    with pytest.raises(RewardError, match=r"1 weights unexpected \(blip.itm_head.weight\)"):
        image_reward(more)


def test_what_no_score_needs_may_be_absent(folder, tmp_path, image_reward):
    def drop(state):
        for key in [key for key in state if key.endswith("position_ids") or key.split(".")[1].endswith("_proj")]:
            del state[key]

    media, prompts = torch.rand(2, 3, 32, 32), ["a", "b"]
    whole = image_reward(folder / "blip.pt")(media, prompts).values
    assert torch.equal(image_reward(changed(folder, tmp_path, "blip.pt", drop))(media, prompts).values, whole)


def test_openais_extra_numbers_are_no_weights(folder, tmp_path, hpsv2):
    extra = {key: torch.tensor(7) for key in ("input_resolution", "context_length", "vocab_size")}
    hpsv2(changed(folder, tmp_path, "clip.pt", lambda state: state.update(extra)))


def test_pieces_that_do_not_belong_together(folder, tmp_path, hpsv2):
    torch.save(torch.nn.Linear(768, 1).state_dict(), tmp_path / "wide.pth")
    torch.save(tiny_rewards.OpenClip(100).state_dict(), tmp_path / "small.pt")
    with pytest.raises(RewardError, match=r"the head reads 768 features, .*pick has 32; set the CLIP"):
        aesthetic(folder, "v1", tmp_path / "wide.pth").build()
    with pytest.raises(RewardError, match=r"tokenizer .*clip has 514 tokens, the model .*small.pt only 100"):
        hpsv2(tmp_path / "small.pt")
    with pytest.raises(RewardError, match="a file of weights has no tokenizer"):
        rewards.parse({"kind": "clip", "model": str(folder / "clip.pt")}).build()
    with pytest.raises(RewardError, match="'clip_score': a file of weights has no tokenizer"):
        rewards.parse({"kind": "clip_score", "model": str(folder / "clip.pt")}).build()
    clip = rewards.parse({"kind": "clip", "model": str(folder / "clip.pt"), "processor": str(folder / "pick")}).build()
    assert clip(torch.rand(1, 3, 40, 40), ["a"]).values.isfinite().all()


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit")
def test_damaged_files(folder, tmp_path, hpsv2):
    whole = (folder / "clip.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes(whole[:1000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>not found</html>")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({}, tmp_path / "nothing.pt")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "numbers.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    says = {
        "cut.pt": "is incomplete; download it again",
        "cut.safetensors": "is incomplete; download it again",
        "empty.pt": "is incomplete; download it again",
        "lfs.pt": "Git LFS pointer, not the file itself",
        "page.pt": "not a PyTorch file",
        "list.pt": "holds list, not a state dict",
        "nothing.pt": "not a state dict of tensors",
        "numbers.pt": "not a state dict of tensors",
        "script.pt": "TorchScript archive, which runs code; give a state dict",
    }
    for name, message in says.items():
        with pytest.raises(RewardError, match=message) as caught:
            hpsv2(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_would_run_code_does_not(tmp_path, hpsv2):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Attack()}, tmp_path / "attack.pt")
    with pytest.raises(RewardError, match="holds more than tensors"):
        hpsv2(tmp_path / "attack.pt")
    assert not (tmp_path / "ran").exists()


def test_safetensors_are_read(folder, tmp_path, hpsv2):
    from safetensors.torch import save_file

    save_file(torch.load(folder / "clip.pt"), tmp_path / "clip.safetensors")
    media = torch.rand(2, 3, 32, 32)
    one, other = (hpsv2(path)(media, ["a", "b"]).values for path in (folder / "clip.pt", tmp_path / "clip.safetensors"))
    assert torch.equal(one, other)
    assert set(read_state_dict(tmp_path / "clip.safetensors")) == set(torch.load(folder / "clip.pt"))


# -- where files are --------------------------------------------------------------------------------------------------


def test_files_of_the_hub(folder, monkeypatch):
    asked = []

    def download(repository, file, local_files_only=False):
        asked.append((repository, file, local_files_only))
        if local_files_only:
            raise FileNotFoundError("not cached")
        return str(folder / "clip.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("alignflow.hub.silent", lambda: "")
    settings = {"kind": "hpsv2", "processor": str(folder / "clip")}
    files = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}
    for version, file in files.items():
        reward = rewards.parse({**settings, "version": version}).build()
        assert reward(torch.rand(1, 3, 20, 30), ["a"]).values.isfinite().all()
        assert asked[-2:] == [("xswu/HPSv2", file, True), ("xswu/HPSv2", file, False)]
    assert weight_file("a/b/sub/c.pt") == folder / "clip.pt"
    assert asked[-1] == ("a/b", "sub/c.pt", False)


def test_files_that_are_nowhere(folder, hpsv2):
    with pytest.raises(
        RewardError, match=r"no file o/n/f.pt here, and not from the hub: .*HF_HUB_OFFLINE is set\n.*hf download o/n "
    ):
        hpsv2("o/n/f.pt")
    with pytest.raises(RewardError, match=r"no folder /no/where.pt; model is shapes, a folder, a file"):
        hpsv2("/no/where.pt")
    with pytest.raises(
        RewardError, match=r"no file sa_0_4_vit_l_14_linear.pth; .*LAION-AI/aesthetic-predictor publishes"
    ):
        rewards.parse({"kind": "aesthetic", "version": "v1"}).build()
    assert is_file(str(folder / "clip.pt"))
    assert is_file("owner/name/file.pt")
    assert not is_file("owner/name")
    assert not is_file("owner/name-1.5")
    assert not is_file(str(folder))


# -- the authors' packages --------------------------------------------------------------------------------------------


def test_packages_that_are_not_installed(folder):
    for kind, name in (("hpsv2", "hpsv2"), ("image_reward", "image-reward")):
        settings = {"kind": kind, "backend": "package", "weights": str(folder / "clip.pt")}
        with pytest.raises(
            RewardError, match=rf"package {name} cannot be imported here .*extra {name}, see docs/rewards.md.*native"
        ):
            rewards.parse(settings).build()


def test_hpsv2_by_its_package(folder, monkeypatch):
    def score(image, prompt, cp=None, hps_version="v2.0"):
        if prompt == "broken":
            raise ValueError("no good")
        assert cp == str(folder / "clip.pt")
        return [image.getpixel((0, 0))[0] / 255]

    module = types.ModuleType("hpsv2.img_score")
    module.score = score
    monkeypatch.setitem(sys.modules, "hpsv2", types.ModuleType("hpsv2"))
    monkeypatch.setitem(sys.modules, "hpsv2.img_score", module)
    settings = {"kind": "hpsv2", "backend": "package", "weights": str(folder / "clip.pt"), "variant": "percent"}
    reward = rewards.parse(settings).build()
    media = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    scores = reward(media, ["a", "broken", "c"])
    torch.testing.assert_close(scores.values[[0, 2]], torch.tensor([20.0, 60.0]))
    assert scores.reasons == {1: "ValueError: no good"}
    assert not reward.differentiable
    clip = reward(media[None].expand(2, 3, 3, 8, 8), ["a", "broken"])
    assert clip.values[0].item() == pytest.approx(40)
    assert math.isnan(clip.values[1])


def test_image_reward_by_its_package(folder, monkeypatch):
    class Model:
        def score(self, prompt, image):
            return len(prompt) + image.size[0] / 100

    module = types.ModuleType("ImageReward")
    module.load = lambda name, device, med_config: Model()
    monkeypatch.setitem(sys.modules, "ImageReward", module)
    files = {"weights": str(folder / "clip.pt"), "med_config": str(folder / "v1.pth")}
    reward = rewards.parse({"kind": "image_reward", "backend": "package", **files}).build()
    assert reward(torch.rand(2, 3, 8, 16), ["a", "abc"]).values.tolist() == pytest.approx([1.16, 3.16])

    module.load = lambda *args, **options: (_ for _ in ()).throw(KeyError("model"))
    with pytest.raises(RewardError, match=r"package image-reward does not load: KeyError: 'model'; .*backend: native"):
        rewards.parse({"kind": "image_reward", "backend": "package", **files}).build()
