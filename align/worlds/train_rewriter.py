"""Trains the world's rewriter, a `Qwen2ForCausalLM` that paraphrases prompts.

It knows the language and nothing of the generator: a prompt in a user's wording becomes a random wording of the same
caption. Where earlier rewrites are shown, it changes the best of them a little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from align.rewriting.words import EVOLVE, REWRITE, history, instruction
from align.worlds.tokenizer import qwen_tokenizer
from align.worlds.train_common import Log, Losses, Plan, minimise
from alignflow.worlds.shapes import wordings, world

NOTED = 0.35  # share of the steps that show earlier rewrites
MOST = 3  # earlier rewrites that are shown
IGNORED = -100  # label without a loss


@dataclass(frozen=True)
class Lesson:
    """An instruction, and a reply that is right."""

    asked: str
    reply: str


def new_rewriter() -> tuple[Qwen2ForCausalLM, Any]:
    """An untrained rewriter of about 0.4 M parameters, and its tokenizer."""
    texts = [REWRITE, EVOLVE, history([("", 0.0)]), *(str(digit) for digit in range(10)), *wordings.LEADS]
    tokens = qwen_tokenizer(texts)
    config = Qwen2Config(
        vocab_size=len(tokens), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, use_sliding_window=False,
        bos_token_id=None, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(config), tokens


def lesson(rng: np.random.Generator, noted: bool) -> Lesson:
    """A training prompt in a user's wording; with ``noted``, earlier rewrites whose scores are random."""
    task = world.TASKS[rng.integers(len(world.TASKS))]
    spec = next(s for s in iter(lambda: world.sample_spec(task, rng), None) if not world.is_held_out(s))
    prompt = wordings.worded(spec, wordings.users(rng))
    if not noted:
        return Lesson(instruction(REWRITE, prompt), wordings.worded(spec, wordings.rewriters(rng)))
    styles = [wordings.rewriters(rng) for _ in range(rng.integers(1, MOST + 1))]
    scores = sorted(float(value) for value in rng.random(len(styles)))
    earlier = [(wordings.worded(spec, style), score) for style, score in zip(styles, scores, strict=True)]
    return Lesson(
        instruction(EVOLVE, prompt, history=history(earlier)), wordings.worded(spec, wordings.mutated(styles[-1], rng))
    )


def encoded(tokens: Any, one: Lesson) -> tuple[list[int], int]:
    """Tokens of a lesson in the chat format, and how many of them are the instruction's."""
    chat = [{"role": "user", "content": one.asked}]
    asked = tokens(tokens.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids
    return [*asked, *tokens(one.reply).input_ids, tokens.eos_token_id], len(asked)


def train_rewriter(plan: Plan, seed: int, log: Log) -> tuple[Qwen2ForCausalLM, Any]:
    """Cross-entropy of the replies; every lesson is drawn once."""
    torch.manual_seed(seed)
    model, tokens = new_rewriter()
    model.set_attn_implementation("eager")  # on a CPU its backward pass takes less time

    def losses(rng: np.random.Generator) -> Losses:
        noted = bool(rng.random() < NOTED)
        rows = [encoded(tokens, lesson(rng, noted)) for _ in range(plan.batch)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [tokens.pad_token_id] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([[IGNORED] * start + ids[start:] + [IGNORED] * (width - len(ids)) for ids, start in rows])
        logits = model(input_ids=ids).logits  # padded behind, where a causal model does not look
        return {"noted" if noted else "plain": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}

    minimise("rewriter", model, losses, plan, seed, log)
    return model, tokens
