"""VideoReward from a tiny checkpoint in the authors' layout, LoRA and all."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_qwen2_vl import WORDS, save_base, tiny_config
from torch import nn
from transformers import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import rewards
from rewards.base import RewardError
from rewards.networks.qwen2_vl import LARGEST, SMALLEST, fitting, frames_at, patched
from rewards.video.video_reward import DEVIATIONS, MEANS, TOKENS

TEMPLATE = "judge: <|VQ_reward|> and <|MQ_reward|> of {text_prompt} so <|TA_reward|> END"
MEDIA = torch.rand(2, 5, 3, 40, 40, generator=torch.Generator().manual_seed(0))
PROMPTS = ["red circle", "circle"]


class Judge(Qwen2VLForConditionalGeneration):
    """The authors' network: a head of one mark, read at three tokens, and plain positions."""

    def __init__(self, config, outputs):
        super().__init__(config)
        self.rm_head = nn.Linear(config.text_config.hidden_size, outputs, bias=False)

    def marks(self, ids, patches, grid, tokens):
        embeddings = self.get_input_embeddings()(ids)[None]
        seen = self.model.visual(patches, grid_thw=grid).pooler_output
        embeddings[:, ids == 4] = seen
        states = self.model.language_model(inputs_embeds=embeddings).last_hidden_state
        logits = self.rm_head(states)[0, torch.isin(ids, tokens)]
        return logits.diagonal() if logits.shape[1] == 3 else logits[:, 0]


def tuned(outputs):
    """A network with a LoRA that changes it, as PEFT wraps it."""
    torch.manual_seed(outputs)
    model = Judge(tiny_config(), outputs).eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "language_model" in n]
    wrapped = get_peft_model(model, LoraConfig(target_modules=names, r=4, lora_alpha=8))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                value.normal_(0, 0.2)
    return wrapped.eval()


def authors_names(state):
    """Keys as saved under the transformers of the time."""
    old = {}
    for key, value in state.items():
        key = key.replace("base_model.model.model.language_model.", "base_model.model.model.")
        old[key.replace("base_model.model.model.visual.", "base_model.model.visual.")] = value.clone()
    return old


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("qwen"), "video", TEMPLATE)


def build(base, file, **options):
    settings = {"template": str(base / "template.txt"), "base": str(base), "weights": str(file), "dtype": "float32"}
    return rewards.parse({"kind": "video_reward", "lora_alpha": 8, **settings, **options}).build()


def expected(model, frames, prompt):
    patches, grid = patched(frames, model.config.vision_config)
    texts = TEMPLATE.replace("{text_prompt}", prompt).split()
    vocabulary = [*WORDS, *TOKENS]
    chat = ["<|im_start|>", "user", "<|vision_start|>", *["<|video_pad|>"] * (len(patches) // 4), "<|vision_end|>"]
    ids = torch.tensor([vocabulary.index(word) for word in [*chat, *texts, "<|im_end|>"]])
    with torch.no_grad():
        return model.base_model.model.marks(ids, patches, grid, torch.tensor([15, 16, 17]))


@pytest.mark.parametrize(("outputs", "names"), [(1, authors_names), (3, dict)])
def test_marks_are_those_of_the_authors_network(base, tmp_path, outputs, names):
    model = tuned(outputs)
    torch.save(names(model.state_dict()), tmp_path / "model.pth")
    reward = build(base, tmp_path / "model.pth", fps=2, normalise=False)
    scores = reward(MEDIA, PROMPTS)
    found = torch.stack([scores.parts[name] for name in ("visual_quality", "motion_quality", "text_alignment")], 1)
    for video, prompt, marks in zip(MEDIA, PROMPTS, found, strict=True):
        assert torch.allclose(
            marks, expected(model, video[[0, 1, 3, 4]], prompt), atol=1e-5
        )  # two a second, an even number
    assert torch.allclose(scores.values.detach(), found.sum(1), atol=1e-5)
    assert found.std(0).min() > 1e-5
    plain = copy.deepcopy(model).unload()
    assert not torch.allclose(found[0], expected_of(plain, prompt=PROMPTS[0]), atol=1e-3)  # the LoRA counts
    z = build(base, tmp_path / "model.pth", fps=2, score="motion_quality")(MEDIA, PROMPTS)
    assert torch.allclose(z.values.detach(), (found[:, 1] - MEANS[1]) / DEVIATIONS[1], atol=1e-5)


def expected_of(model, prompt):
    class Holder:
        config = model.config
        base_model = type("Inner", (), {"model": model})

    return expected(Holder, MEDIA[0, [0, 1, 3, 4]], prompt)


def test_frames_are_an_even_number_as_the_network_sees_them_in_pairs():
    for count, seen in ((2, 2), (3, 4), (5, 4), (6, 6), (7, 8), (99, 20)):
        assert len(frames_at(20, 16.0, count)) == seen
    assert frames_at(20, 16.0, 3) == frames_at(20, 16.0, 4) == [0, 6, 13, 19]


def test_gradients_reach_the_frames_that_are_seen(base, tmp_path):
    torch.save(authors_names(tuned(1).state_dict()), tmp_path / "model.pth")
    reward = build(base, tmp_path / "model.pth", frames=2)
    leaf = MEDIA[:1].clone().requires_grad_()
    reward(leaf, PROMPTS[:1]).values.sum().backward()
    assert leaf.grad.abs().sum((0, 2, 3, 4)).gt(0).tolist() == [True, False, False, False, True]
    lost = reward(MEDIA, ["<|TA_reward|>", "circle"])
    assert lost.values.isnan().tolist() == [True, False]
    assert "holds a control token" in lost.reasons[0]


def test_patches_and_sizes_are_those_of_the_processor():
    for height, width in [(480, 832), (64, 64), (1080, 1920), (336, 300), (30, 900)]:
        assert fitting(height, width, 28) == smart_resize(height, width, 28, SMALLEST, LARGEST)
    image = torch.randint(0, 256, (1, 3, 336, 364), generator=torch.Generator().manual_seed(0))
    processor = Qwen2VLImageProcessorPil()
    theirs = processor(image[0].permute(1, 2, 0).numpy().astype("uint8"), do_resize=False, return_tensors="pt")
    rows, grid = patched(image / 255, tiny_config().vision_config)
    assert grid.tolist() == theirs.image_grid_thw.tolist()
    assert torch.allclose(rows, theirs.pixel_values, atol=1e-5)
    small = image[..., :50, :90]
    floats = torch.nn.functional.interpolate(small.float(), fitting(50, 90, 28), mode="bicubic", antialias=True)
    assert floats.max() > 255  # an edge overshoots; bytes do not
    rows, _ = patched(small / 255, tiny_config().vision_config)
    expected, _ = patched(floats.clamp(0, 255).round() / 255, tiny_config().vision_config)
    assert torch.allclose(rows, expected, atol=1e-5)


def test_what_does_not_fit_is_named(base, tmp_path):
    state = authors_names(tuned(1).state_dict())
    file = tmp_path / "model.pth"
    some = {key: value for key, value in state.items() if "layers.1.mlp.up_proj" not in key}
    torch.save(some, file)
    with pytest.raises(RewardError, match=r"reward 'video_reward': .*language_model.layers.1.mlp.up_proj.weight"):
        build(base, file)
    torch.save({key: value for key, value in state.items() if "lora_B" not in key}, file)
    with pytest.raises(RewardError, match="has no lora_B"):
        build(base, file)
    torch.save({key: value for key, value in state.items() if "rm_head" not in key}, file)
    with pytest.raises(RewardError, match="is not a checkpoint of VideoReward"):
        build(base, file)
    with pytest.raises(RewardError, match="KwaiVGI/VideoAlign"):
        build(base, file, template=str(tmp_path / "none.py"))


def test_the_authors_template_is_read_and_not_run(tmp_path):
    from rewards.networks.published_template import read_template

    def read(file):
        return read_template(file, ["QUESTION", "TAIL"], (*TOKENS[:2], "{text_prompt}", TOKENS[2]), "their repository")

    file = tmp_path / "prompt_template.py"
    first, tail = TEMPLATE[:60], TEMPLATE[60:]
    file.write_text(f'raise SystemExit\nTAIL = "{tail}\\n"\nQUESTION = """\n{first}"""\n')
    assert read(file) == f"\n{TEMPLATE}\n"
    file.write_text("OTHER = 1")
    with pytest.raises(RewardError, match="does not define QUESTION"):
        read(file)
    file.write_text("not python at all")
    with pytest.raises(RewardError, match="is not Python"):
        read(file)
    text = tmp_path / "question.txt"
    text.write_text("<|VQ_reward|> {text_prompt} <|MQ_reward|> <|TA_reward|>")
    with pytest.raises(RewardError, match="once, in this order"):
        read(text)
    with pytest.raises(RewardError, match=r"cannot be read .* it is in their repository"):
        read(tmp_path / "none.py")
