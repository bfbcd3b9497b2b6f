"""HPSv3 from a tiny checkpoint in the authors' layout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny_qwen2_vl import WORDS, save_base, tiny_config
from torch import nn
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import rewards
from rewards.base import RewardError
from rewards.encoders.hpsv3 import PIXELS, TOKEN
from rewards.networks.qwen2_vl import fitting, patched

TEMPLATE = "judge: {text_prompt} so <|Reward|> END"
MEDIA = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
PROMPTS = ["red circle", "circle"]


@pytest.fixture(scope="module")
def network():
    """The authors' network: three layers read at one token."""
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(tiny_config()).eval()
    width = model.config.text_config.hidden_size
    model.rm_head = nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    return model.eval()


def state_of(network):
    """Keys as saved under the transformers of the time."""
    names = {key: key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
             for key in network.state_dict()}  # fmt: skip
    return {names[key]: value.clone() for key, value in network.state_dict().items() if key != "lm_head.weight"}


@pytest.fixture(scope="module")
def base(tmp_path_factory, network):
    folder = save_base(tmp_path_factory.mktemp("qwen"), "image", TEMPLATE)
    save_file(state_of(network), folder / "HPSv3.safetensors")
    return folder


def build(base, **options):
    settings = {"template": str(base / "template.txt"), "base": str(base), "dtype": "float32"}
    return rewards.parse({"kind": "hpsv3", "weights": str(base / "HPSv3.safetensors"), **settings, **options}).build()


def expected(network, image, prompt):
    patches, grid = patched(image[None], network.config.vision_config, (PIXELS, PIXELS), "image")
    chat = ["<|im_start|>", "user", "<|vision_start|>", *["<|image_pad|>"] * (len(patches) // 4), "<|vision_end|>"]
    texts = TEMPLATE.replace("{text_prompt}", prompt).split()
    ids = torch.tensor([[*WORDS, TOKEN].index(word) for word in [*chat, *texts, "<|im_end|>"]])
    with torch.no_grad():
        embeddings = network.get_input_embeddings()(ids)[None]
        embeddings[:, ids == 5] = network.model.visual(patches, grid_thw=grid).pooler_output
        states = network.model.language_model(inputs_embeds=embeddings).last_hidden_state
        return network.rm_head(states)[0, ids == len(WORDS)][0]


def test_the_score_is_that_of_the_authors_network(base, network):
    scores = build(base)(MEDIA, PROMPTS)
    wanted = torch.stack([expected(network, image, prompt) for image, prompt in zip(MEDIA, PROMPTS, strict=True)])
    assert torch.allclose(scores.values, wanted[:, 0], atol=1e-5)
    assert torch.allclose(scores.parts["deviation"], wanted[:, 1].exp(), atol=1e-5)
    assert scores.values.std() > 1e-5


def test_of_a_video_the_mean_of_its_frames(base):
    reward = build(base, frames=None)
    video = torch.stack([MEDIA[0], MEDIA[1]])[None]
    each = reward(video[0], ["circle", "circle"])
    whole = reward(video, ["circle"])
    assert torch.allclose(whole.values[0], each.values.mean(), atol=1e-6)
    assert torch.allclose(whole.parts["deviation"][0], each.parts["deviation"].mean(), atol=1e-6)


@pytest.mark.parametrize("token", [TOKEN, "<|image_pad|>", "<|im_end|>"])
def test_gradients_reach_the_pixels_and_a_control_token_in_a_prompt_costs_that_sample(base, token):
    leaf = MEDIA.clone().requires_grad_()
    scores = build(base)(leaf, [f"a {token}", "circle"])
    assert scores.values.isnan().tolist() == [True, False]
    assert "holds a control token" in scores.reasons[0]
    scores.values[1].backward()
    assert leaf.grad[1].abs().sum() > 0


def test_every_image_has_about_as_many_pixels():
    for height, width in [(480, 832), (64, 64), (1080, 1920), (336, 300), (1024, 1024)]:
        assert fitting(height, width, 28, (PIXELS, PIXELS)) == smart_resize(height, width, 28, PIXELS, PIXELS)


@pytest.mark.parametrize("size", [(40, 56), (600, 700)])
def test_pixels_are_those_of_pillow(size):
    image = torch.randint(0, 256, (1, 3, *size), generator=torch.Generator().manual_seed(0))
    sides = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    array = image[0].permute(1, 2, 0).numpy().astype("uint8")
    theirs = Qwen2VLImageProcessorPil(size=sides)(array, return_tensors="pt")
    rows, grid = patched(image / 255, tiny_config().vision_config, (PIXELS, PIXELS), "image")
    assert grid.tolist() == theirs.image_grid_thw.tolist()
    assert torch.allclose(rows, theirs.pixel_values, atol=1e-5)


def test_what_does_not_fit_is_named(base, network, tmp_path):
    state = state_of(network)
    file = tmp_path / "wrong.safetensors"
    for change, said in (
        ({"rm_head.5.weight": torch.zeros(3, 16), "rm_head.5.bias": torch.zeros(3)}, "has 3 outputs; HPSv3 has a mean"),
        ({"rm_head.0.weight": torch.zeros(1024, 8)}, "is not a checkpoint of HPSv3"),
        ({"rm_head.0.weight": torch.zeros(1024)}, "is not a checkpoint of HPSv3"),
        ({"visual.merger.extra": torch.zeros(2)}, "visual.merger.extra"),
    ):
        save_file(state | change, file)
        with pytest.raises(RewardError, match=rf"reward 'hpsv3': .*{said}"):
            build(base, weights=str(file))
    with pytest.raises(RewardError, match="the package hpsv3"):
        build(base, template=str(tmp_path / "none.py"))
