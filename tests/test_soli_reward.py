"""SoliReward from a tiny checkpoint in the authors' layout, beside a network written after their code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

import rewards
from rewards.base import RewardError
from rewards.networks.internvl import DEVIATION, MEAN, frames_at
from rewards.networks.query_attention import QueryAttention

SPECIAL = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
WORDS = [
    "?",
    *SPECIAL,
    "system",
    "user",
    "assistant",
    "judge",
    "of",
    *(f"Frame{i}:" for i in (1, 2, 3)),
    "red",
    "circle",
]
CHAT = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
QUESTIONS = {
    "phy_deform": {"system_prompt": "judge", "user_prompt": "judge of "},
    "text_alignment": {"system_prompt": "judge", "user_prompt": "of {prompt} of "},
}
MEDIA = torch.rand(3, 5, 3, 40, 52, generator=torch.Generator().manual_seed(0))
PROMPTS = ["red circle", "circle", "red red red circle"]
WIDTH, DEPTH, READ, SHOWN = 16, 4, (2, 4), [0, 1, 3]


class Query(nn.Module):
    """A learned query and its attention, called as in the authors' code."""

    def __init__(self):
        super().__init__()
        self.query = nn.Embedding(1, WIDTH)
        self.attention = nn.ModuleList([nn.MultiheadAttention(WIDTH, 8, batch_first=True)])


class Authors(nn.Module):
    """The authors' modules around transformers' InternVL."""

    def __init__(self):
        super().__init__()
        vision = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
                  "image_size": 28, "patch_size": 7, "attention_bias": True}  # fmt: skip
        text = {"model_type": "qwen2", "vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": DEPTH,
                "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
        config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=5, image_seq_length=4)
        self.net = InternVLForConditionalGeneration(config)
        self.attention_query_first_layer, self.attention_query_final_layer = Query(), Query()
        others = (nn.MultiheadAttention(WIDTH, 8, batch_first=True) for _ in READ[1:])
        self.attention_query_other_layers = nn.ModuleList(others)
        self.reward_head = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Dropout(0.0), nn.Linear(WIDTH, 1, bias=False)
        )

    def score(self, ids, pixels):
        states = self.net(input_ids=ids, pixel_values=pixels, output_hidden_states=True).hidden_states
        first, final = self.attention_query_first_layer, self.attention_query_final_layer
        query = attend(first.attention[0], first.query.weight, states[READ[0]][0])
        for layer, attention in zip(READ[1:], self.attention_query_other_layers, strict=True):
            query = attend(attention, query, states[layer][0])
        return self.reward_head(query + attend(final.attention[0], final.query.weight, states[-1][0])).squeeze()


def attend(attention, query, rows):
    """Attention of eight heads by hand: ``query [1, D]``, ``rows [L, D]``."""
    parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), (query, rows, rows), strict=True)
    q, k, v = ((x @ weight.T + bias).view(len(x), 8, -1).transpose(0, 1) for weight, bias, x in parts)
    mixed = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return attention.out_proj(mixed.transpose(0, 1).reshape(1, -1))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = Authors().eval()
    with torch.no_grad():
        for value in network.parameters():
            value.normal_(0, 0.3)
    return network


def state_of(network):
    """Keys as InternVL's own code calls them, queries, keys and values of the vision tower in one."""
    names = [("net.lm_head.", "language_model.lm_head."), ("net.model.language_model.", "language_model.model."),
             ("net.model.vision_tower.", "vision_model."), ("encoder.layer.", "encoder.layers."),
             ("embeddings.cls_token", "embeddings.class_embedding"), ("position_embeddings", "position_embedding"),
             ("patch_embeddings.projection", "patch_embedding"), (".lambda_", ".ls"),
             ("attention.projection_layer", "attn.proj"), ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
             ("net.model.multi_modal_projector.layer_norm", "mlp1.0"), ("linear_1", "mlp1.1"),
             ("linear_2", "mlp1.3"), ("net.model.multi_modal_projector.", "")]  # fmt: skip
    found = {}
    for key, value in network.state_dict().items():
        name = key
        for old, new in names:
            name = name.replace(old, new)
        if "vision_model" in name and ".q_proj." in name:
            parts = [network.state_dict()[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            found[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif "vision_model" not in name or not any(f".{part}_proj." in name for part in "kv"):
            found[name] = value.clone()
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory, network):
    folder = tmp_path_factory.mktemp("internvl")
    network.net.config.save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", chat_template=CHAT)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder)
    (folder / "template.json").write_text(json.dumps(QUESTIONS))
    save_file(state_of(network), folder / "published.safetensors")
    return folder


def build(base, **options):
    settings = {"template": str(base / "template.json"), "base": str(base), "dtype": "float32", "frames": 3}
    weights = str(base / "published.safetensors")
    return rewards.parse({"kind": "soli_reward", "weights": weights, **settings, **options}).build()


def expected(network, video, user):
    """Of one video, alone, with Pillow's pixels."""
    frames = [video[i].mul(255).round().byte().permute(1, 2, 0).numpy() for i in SHOWN]
    pixels = np.stack(
        [np.asarray(Image.fromarray(frame).resize((28, 28), Image.Resampling.BICUBIC)) for frame in frames]
    )
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    text = ["<|im_start|>", "system", "judge", "<|im_end|>", "<|im_start|>", "user", *user.split()]
    for i in (1, 2, 3):
        text += [f"Frame{i}:", "<img>", *["<IMG_CONTEXT>"] * 4, "</img>"]
    ids = torch.tensor([[WORDS.index(word) for word in [*text, "<|im_end|>", "<|im_start|>", "assistant"]]])
    with torch.no_grad():
        return network.score(ids, pixels)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("task", ["phy_deform", "text_alignment"])
def test_scores_are_those_of_the_authors_network(base, network, task, batch):
    media = (MEDIA * 255).round() / 255
    assert frames_at(5, 3) == SHOWN
    scores = build(base, task=task, chunk=batch)(media, PROMPTS).values
    users = [QUESTIONS[task]["user_prompt"].replace("{prompt}", prompt) for prompt in PROMPTS]
    wanted = torch.stack([expected(network, video, user) for video, user in zip(media, users, strict=True)])
    assert torch.allclose(scores.detach(), wanted, atol=1e-5)
    assert scores.std() > 1e-3


def test_layers_are_equally_far_apart_unless_they_are_given(base, network):
    default = build(base)(MEDIA, PROMPTS).values
    assert torch.equal(default, build(base, layers=READ)(MEDIA, PROMPTS).values)
    assert not torch.allclose(default, build(base, layers=(1, 4))(MEDIA, PROMPTS).values, atol=1e-4)
    for layers in [(2,), (0, 4), (2, 5)]:
        with pytest.raises(RewardError, match=r"layers .* should be 2 of 1 to 4, as many as the weights have"):
            build(base, layers=layers)


def test_padding_is_not_read():
    torch.manual_seed(0)
    head = QueryAttention(16, 2)
    for value in head.parameters():
        nn.init.normal_(value, std=0.5)
    states, real = torch.randn(3, 1, 6, 16), torch.ones(1, 6, dtype=torch.bool)
    longer, more = torch.cat([states, torch.randn(3, 1, 2, 16)], 2), torch.nn.functional.pad(real, (0, 2))
    short = head(list(states[:2]), states[2], real)
    assert torch.allclose(head(list(longer[:2]), longer[2], more), short, atol=1e-6)
    assert not torch.allclose(head(list(longer[:2]), longer[2], torch.ones_like(more)), short, atol=1e-3)


def test_gradients_reach_the_frames_that_are_seen(base):
    leaf = MEDIA[:1].clone().requires_grad_()
    build(base)(leaf, PROMPTS[:1]).values.sum().backward()
    assert leaf.grad.abs().sum((0, 2, 3, 4)).gt(0).tolist() == [i in SHOWN for i in range(5)]


def test_an_image_is_a_video_of_one_frame_and_a_control_token_costs_that_sample(base):
    reward = build(base, task="text_alignment")
    still = MEDIA[:, :1]
    assert torch.equal(reward(still[:, 0], PROMPTS).values, reward(still.expand(-1, 5, -1, -1, -1), PROMPTS).values)
    lost = reward(MEDIA, ["a <IMG_CONTEXT>", "circle", "<|im_end|> red"])
    assert lost.values.isnan().tolist() == [True, False, True]
    assert "control token" in lost.reasons[0]
    assert build(base)(MEDIA, ["a <IMG_CONTEXT>"] * 3).values.isfinite().all()  # the prompt is not read


def test_weights_that_do_not_fit_are_named(base, network, tmp_path):
    state, file = state_of(network), tmp_path / "wrong.safetensors"
    for change, said in (
        ({"vision_model.encoder.layers.1.ls2": None}, r"1 weights missing \(vision_tower.encoder.layer.1.lambda_2\)"),
        ({"reward_head.3.weight": torch.zeros(2, WIDTH)}, r"score.2.weight \[2, 16\] for \[1, 16\]"),
        ({"attention_query_other_layers.0.in_proj_bias": None}, "chain.1.in_proj_bias"),
        ({key: None for key in state if "query" in key or "head.0" in key}, "missing"),
        ({"good.weight": torch.zeros(2)}, r"unexpected \(good.weight\)"),
        ({"language_model.model.embed_tokens.weight": torch.zeros(8, WIDTH)}, "has .* tokens"),
    ):
        save_file({key: value for key, value in {**state, **change}.items() if value is not None}, file)
        with pytest.raises(RewardError, match=rf"reward 'soli_reward': .*{said}"):
            build(base, weights=str(file))
    file.write_bytes((base / "published.safetensors").read_bytes()[:2000])
    with pytest.raises(RewardError, match="or is incomplete"):
        build(base, weights=str(file))


def test_the_authors_questions_are_read_and_not_run(base, tmp_path):
    file = tmp_path / "arguments.py"
    file.write_text(f"raise SystemExit\nDEFAULT_PROMPTS = dict()\nDEFAULT_PROMPTS = {QUESTIONS!r}\n")
    assert torch.equal(build(base, template=str(file))(MEDIA, PROMPTS).values, build(base)(MEDIA, PROMPTS).values)
    told = tmp_path / "told.json"
    for text, said in (
        ("{", "is not JSON"),
        ("[]", "holds list, not a dictionary"),
        ('{"phy_deform": {"system_prompt": "a"}}', "no system_prompt and user_prompt of phy_deform"),
        ('{"phy_deform": {"system_prompt": "a", "user_prompt": "{prompt}"}}', "should not hold {prompt}"),
    ):
        told.write_text(text)
        with pytest.raises(RewardError, match=said):
            build(base, template=str(told))
    with pytest.raises(RewardError, match="it is in the repository lian700/SoliReward"):
        build(base, template=str(tmp_path / "none.py"))
