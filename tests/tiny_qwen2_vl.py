"""A tiny Qwen2-VL: its config, and a tokenizer of whole words with a chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

CHAT = (
    "{% for m in messages %}<|im_start|> user {% for c in m.content %}{% if c.type == 'MEDIUM' %}<|vision_start|> "
    "<|MEDIUM_pad|> <|vision_end|> {% else %}{{ c.text }}{% endif %}{% endfor %} <|im_end|> {% endfor %}"
)
WORDS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>", "?"]
WORDS += ["user", "judge:", "and", "of", "so", "END", "red", "circle"]


def tiny_config() -> Qwen2VLConfig:
    """Two layers of 32, ids as in WORDS."""
    text = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1}
    ids = {"vision_start_token_id": 2, "vision_end_token_id": 3, "video_token_id": 4, "image_token_id": 5}
    return Qwen2VLConfig(text_config=text, vision_config=vision, **ids)


def save_base(folder: Path, medium: str, template: str) -> Path:
    """Config and tokenizer of a base whose chats hold a ``medium`` (image or video), and a question."""
    tiny_config().save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    chat = CHAT.replace("MEDIUM", medium)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", chat_template=chat)
    tokenizer.add_special_tokens({"additional_special_tokens": WORDS[:6]})
    tokenizer.save_pretrained(folder)
    (folder / "template.txt").write_text(template)
    return folder
