"""Tokenizers of the embedded models: CLIP's byte-pair ones, with one token per word of the world, and a T5's."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5TokenizerFast

from alignflow.worlds.shapes.world import BACKGROUNDS, COLOURS, COUNTS, RELATIONS, SHAPES, SIZES

MAX_LENGTH = 20  # the longest caption after 'a photo of' has 17 words; start and end make 19
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_WORDS = ("a", "an", "the", "and", "of", "on", "to", "photo", "picture", "image", "drawing", "background")


def words() -> list[str]:
    """All words a caption may hold, sorted."""
    groups = (SHAPES, SHAPES.values(), COLOURS, BACKGROUNDS, SIZES, COUNTS, " ".join(RELATIONS).split(), OTHER_WORDS)
    return sorted({word for group in groups for word in group})


def learn_merges(corpus: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first and ties by the alphabet, until every word is one piece."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in corpus]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for p in pieces for pair in pairwise(p))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(p, best) for p in pieces]


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(pieces):
        hit = tuple(pieces[i : i + 2]) == pair
        out.append(pieces[i] + pieces[i + 1] if hit else pieces[i])
        i += 2 if hit else 1
    return out


def clip_tokenizer(
    pad_token: str = "<|endoftext|>", known: list[str] | None = None, length: int = MAX_LENGTH
) -> CLIPTokenizer:
    """A CLIPTokenizer over 256 bytes and the world's words; a foreign word falls back to pieces and letters.

    Args:
        known: other words than those of captions.
        length: tokens that texts are padded to.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(known or words())
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=length)


def t5_tokenizer(known: Sequence[str] = (), length: int = 256) -> T5TokenizerFast:
    """A T5 tokenizer of letters, and of the words it should know as one token each; by default for a silent encoder."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces = [*((f"\u2581{word}", -1.0) for word in known), *((c, -3.0) for c in string.ascii_letters)]
    return T5TokenizerFast(vocab=[*special, *pieces], extra_ids=0, model_max_length=length)


def qwen_tokenizer(texts: Sequence[str]) -> Qwen2Tokenizer:
    """Qwen's tokenizer, in which every word of the world and of `texts` is one token; others are pieces and bytes."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    known = [*texts, *words(), *(f" {word}" for word in words()), "user\nassistant\n"]
    bytewise = Qwen2Tokenizer(vocab=alphabet, merges=[], unk_token=None)
    made = bytewise.train_new_from_iterator(known, vocab_size=10_000, min_frequency=1, show_progress=False)
    made.add_special_tokens(
        {"additional_special_tokens": list(CONTROL), "pad_token": CONTROL[0], "eos_token": CONTROL[2]}
    )
    made.chat_template = CHAT
    return made
