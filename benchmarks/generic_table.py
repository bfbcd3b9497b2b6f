"""Which flow pipelines of diffusers the generic adapter reads: ``python -m benchmarks.generic_table CHECKOUT``.

CHECKOUT is a checkout of the diffusers repository, whose tests say how a tiny pipeline of each class is built;
tokenizers and text encoders they would download are replaced by the tiny ones of our own tests. Prints Markdown.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import signal
import sys
import unittest.mock
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from generators.base import GeneratorError, Options
from generators.generic import Generic

SECONDS = 120  # for one pipeline
SCHEDULERS = ("FlowMatch", "UniPC", "DPMSolver")  # those a flow pipeline may come with


def stand_ins() -> dict[str, Any]:
    """Class in transformers -> what its ``from_pretrained`` answers."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    tiny, tiny_image, tiny_sana = (importlib.import_module(name) for name in ("tiny", "tiny_image", "tiny_sana"))
    t5 = transformers.T5Config(
        vocab_size=1103, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    umt5 = transformers.UMT5Config(**{k: v for k, v in t5.to_dict().items() if k != "model_type"})

    def tokenizer(name: str, **_: Any) -> Any:
        families = {"gemma": tiny_sana.gemma_tokenizer, "Qwen": tiny_image.qwen_tokenizer}
        return next((make() for word, make in families.items() if word in name), None) or tiny.t5_tokenizer()

    return {
        "AutoTokenizer": tokenizer,
        "AutoConfig": lambda name, **_: t5,
        "CLIPTokenizer": lambda name, **_: tiny.clip_tokenizer(),
        "T5Tokenizer": tokenizer,
        "T5TokenizerFast": tokenizer,
        "T5EncoderModel": lambda name, **_: transformers.T5EncoderModel(t5),
        "UMT5EncoderModel": lambda name, **_: transformers.UMT5EncoderModel(umt5),
        "Qwen2Tokenizer": lambda name, **_: tiny_image.qwen_tokenizer(),
        "GemmaTokenizer": lambda name, **_: tiny_sana.gemma_tokenizer(),
        "GemmaTokenizerFast": lambda name, **_: tiny_sana.gemma_tokenizer(),
        "LlamaTokenizer": lambda name, **_: tiny_sana.gemma_tokenizer(),
        "LlamaTokenizerFast": lambda name, **_: tiny_sana.gemma_tokenizer(),
    }


@contextmanager
def offline() -> Iterator[None]:
    """Replaces what would be downloaded inside the block."""
    with ExitStack() as stack:
        for name, answer in stand_ins().items():
            stack.enter_context(unittest.mock.patch.object(getattr(transformers, name), "from_pretrained", answer))
        yield


def testers(checkout: Path) -> Iterator[type]:
    """Every test class of the checkout that builds a pipeline, one for each pipeline class."""
    sys.path.insert(0, str(checkout))
    seen = set()
    for file in sorted(checkout.glob("tests/pipelines/*/test_*.py")):
        try:
            module = importlib.import_module(".".join(file.relative_to(checkout).with_suffix("").parts))
        except Exception as error:  # another version of diffusers than the installed one
            logging.info("%s is not read: %s", file, error)
            continue
        for value in vars(module).values():
            if not isinstance(value, type) or value.__module__ != module.__name__:
                continue  # what it imports; some of that stands for packages that are not there
            built = getattr(value, "pipeline_class", None)
            if hasattr(value, "get_dummy_components") and isinstance(built, type) and built not in seen:
                seen.add(built)
                yield value


def watch(tester: type) -> tuple[str, str]:
    """("works" | "fails" | "not built", what to say about it) for one tester's pipeline."""
    test: Any = tester()
    try:
        pipeline = test.pipeline_class(**test.get_dummy_components())
        inputs = test.get_dummy_inputs(*(["cpu"] if inspect.signature(test.get_dummy_inputs).parameters else []))
    except Exception as error:
        return "not built", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not type(pipeline.scheduler).__name__.startswith(SCHEDULERS):
        return "no flow", type(pipeline.scheduler).__name__
    pipeline.set_progress_bar_config(disable=True)
    size = (inputs["height"], inputs["width"]) if "height" in inputs else None
    options = Options(size=size, frames=inputs.get("num_frames"), text_length=inputs.get("max_sequence_length"))
    try:
        generator = Generic(pipeline, options)
    except GeneratorError as error:
        return "fails", str(error)
    guidance = "classifier-free guidance" if generator.unconditional else "no guidance"
    return "works", f"{guidance}, media {tuple(generator.size)}"


def row(tester: type) -> tuple[str, str, str]:
    """Pipeline, outcome, remark."""

    def late(*_: Any) -> None:
        raise GeneratorError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        outcome, remark = watch(tester)
    except Exception as error:
        outcome, remark = "error", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return tester.pipeline_class.__name__, outcome, remark.splitlines()[0] if remark else ""  # type: ignore[attr-defined]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generic_table", description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of the diffusers repository")
    parser.add_argument("--only", default="", help="pipelines whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    print(f"diffusers {diffusers.__version__}\n\n| pipeline | | |\n|---|---|---|")
    with offline():
        for tester in testers(args.checkout):
            if args.only in tester.pipeline_class.__name__:  # type: ignore[attr-defined]
                cells = row(tester)
                if cells[1] != "no flow":
                    print("| {} | {} | {} |".format(*cells), flush=True)


if __name__ == "__main__":
    main()
