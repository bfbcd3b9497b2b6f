"""Tiny Qwen-VL models of the real classes, and a server that speaks like an OpenAI-compatible one."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip
WORDS = ["Yes", "yes", "No", "no", "ĠYes", "Ġyes", "ĠNo"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """Qwen's byte-level tokenizer: a token per byte, and the spellings of yes and no."""
    from transformers import Qwen2Tokenizer

    pieces, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in WORDS:
        halves = [(word[: end - 1], word[end - 1]) for end in range(2, len(word) + 1)]
        for left, right in [("Ġ", word[1:])] if word[0] == "Ġ" else halves:
            if left + right not in pieces:
                pieces.append(left + right)
                merges.append((left, right))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    made = Qwen2Tokenizer(vocab=vocab, merges=merges, unk_token=None)
    made.add_special_tokens({"additional_special_tokens": CONTROL, "pad_token": CONTROL[0], "eos_token": CONTROL[2]})
    made.chat_template = TEMPLATE
    return made


def save(folder: Path, family: str = "Qwen3VL", seed: int = 0) -> Path:
    """Model, tokenizer and image settings of Qwen2VL, Qwen2_5_VL or Qwen3VL in ``folder``; a patch is 4 x 4."""
    import transformers

    tokens = tokenizer()
    ids = {name: tokens.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end")}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}  # fmt: skip
    vision |= {
        "Qwen3VL": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        "Qwen2_5_VL": {"window_size": 16, "fullatt_block_indexes": [1]},
        "Qwen2VL": {"embed_dim": 32, "mlp_ratio": 1, "hidden_size": 32},
    }[family]
    text = {"vocab_size": len(tokens), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096,
            "bos_token_id": None, "eos_token_id": tokens.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}  # fmt: skip
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=vision, **{f"{name.removesuffix('_pad')}_token_id": ids[name] for name in ids}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
        for weight in model.parameters():  # larger than at the start of a training, so that images make a difference
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.4 / weight[0].numel() ** 0.25)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    ).save_pretrained(folder)
    return folder


Answer = Callable[[dict[str, Any]], tuple[int, Any]]


@contextlib.contextmanager
def endpoint(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose chat completions are ``answer(body) -> (status, JSON or bytes)``; yields url and what it was sent.

    Every recorded body has the request's ``Authorization`` header under that name.
    """
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({**body, "Authorization": self.headers.get("Authorization"), "path": self.path})
            status, reply = answer(body)
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen
    server.shutdown()
    server.server_close()


def said(text: str, listed: dict[str, float] | None = None) -> tuple[int, Any]:
    """A chat completion of ``text``, with log-probabilities where ``listed`` has some."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "logprobs": None}
    if listed is not None:
        top = [{"token": token, "logprob": value} for token, value in listed.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    return 200, {"choices": [choice]}
