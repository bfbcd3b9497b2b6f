"""Table of diffusers' flow pipelines and the generic adapter: ``python -m benchmarks.generic_table CHECKOUT``.

CHECKOUT is a checkout of the diffusers repository, whose tests say how a tiny pipeline of each class is built (they
need ``parameterized`` and ``requests-mock``); tokenizers, text encoders and processors they would download are replaced
by the tiny ones of our own tests. Prints Markdown.
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

from generators.adapters.generic import Generic
from generators.base import GeneratorError, Options

SECONDS = 120  # for one pipeline
SCHEDULERS = ("FlowMatch", "UniPC", "DPMSolver")  # schedulers of flow pipelines


OURS = {  # arguments that the adapter itself passes; a dummy's other inputs are passed too
    *(
        "prompt",
        "negative_prompt",
        "generator",
        "num_inference_steps",
        "guidance_scale",
        "true_cfg_scale",
        "output_type",
    ),
    *("height", "width", "num_frames", "max_sequence_length", "image", "mask_image", "return_dict", "latents"),
}


def stand_ins() -> dict[str, Any]:
    """Class in transformers -> what its ``from_pretrained`` answers."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    modules = ("tiny", "tiny_flux2", "tiny_image", "tiny_sana")
    tiny, tiny_flux2, tiny_image, tiny_sana = (importlib.import_module(name) for name in modules)
    t5 = transformers.T5Config(
        vocab_size=1103, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    umt5 = transformers.UMT5Config(**{k: v for k, v in t5.to_dict().items() if k != "model_type"})

    def tokenizer(name: str = "", *_: Any, **__: Any) -> Any:
        families = {"gemma": tiny_sana.gemma_tokenizer, "llama": tiny_sana.gemma_tokenizer}
        families |= {"Qwen": tiny_image.qwen_tokenizer, "cosmos3": tiny_image.qwen_tokenizer}
        return next((make() for word, make in families.items() if word in name), None) or tiny.t5_tokenizer()

    def processor(*_: Any, **__: Any) -> Any:
        pixels = {"shortest_edge": 28 * 28, "longest_edge": 4 * 56 * 56}
        images = transformers.Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=pixels)
        return tiny_image.ImageOnlyProcessor(images, tiny_image.qwen_tokenizer())

    def text_processor(*_: Any, **__: Any) -> Any:
        return tiny_flux2.TextProcessor(tiny_image.qwen_tokenizer(), tiny_flux2.CHAT)

    answers: dict[str, Any] = {
        "AutoProcessor": text_processor,
        "AutoConfig": lambda *_, **__: t5,
        "CLIPTokenizer": lambda *_, **__: tiny.clip_tokenizer(),
        "T5EncoderModel": lambda *_, **__: transformers.T5EncoderModel(t5).eval(),
        "UMT5EncoderModel": lambda *_, **__: transformers.UMT5EncoderModel(umt5).eval(),
    }
    qwen, gemma = (lambda *_, **__: tiny_image.qwen_tokenizer()), (lambda *_, **__: tiny_sana.gemma_tokenizer())
    answers["LlamaForCausalLM"] = lambda *_, **__: tiny.language_model("LlamaForCausalLM", gemma(), hidden_size=16)
    answers |= dict.fromkeys(("AutoTokenizer", "T5Tokenizer", "T5TokenizerFast"), tokenizer)
    answers |= dict.fromkeys(("Qwen2Tokenizer", "Qwen2TokenizerFast"), qwen)
    answers |= dict.fromkeys(("GemmaTokenizer", "GemmaTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast"), gemma)
    return answers | dict.fromkeys(("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"), processor)


def fit(pipeline: Any) -> None:
    """Give text encoders as many tokens as our tokenizers have; everything draws the same at every call."""
    for name in [name for name in pipeline.components if name.startswith("text_encoder")]:
        encoder, tokenizer = getattr(pipeline, name), getattr(pipeline, name.replace("text_encoder", "tokenizer"), None)
        tokens = len(getattr(tokenizer, "tokenizer", tokenizer) or ())
        if encoder is not None and tokens > encoder.get_input_embeddings().num_embeddings:
            encoder.resize_token_embeddings(tokens, mean_resizing=False)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part.eval()
        if name == "controlnet":  # as built it adds nothing, which would be read as a constant
            for value in part.parameters():
                if not value.any():
                    torch.nn.init.normal_(value, std=0.1)


def size_of(inputs: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) that a dummy's inputs ask for, or those of its image."""
    if inputs.get("height"):
        return inputs["height"], inputs["width"]
    image = inputs.get("image")
    while isinstance(image, list):  # a list of images or of lists
        image = image[0]
    if isinstance(image, torch.Tensor):
        return image.shape[-2], image.shape[-1]
    return None if image is None else (image.height, image.width)


@contextmanager
def offline() -> Iterator[None]:
    """Replaces what would be downloaded inside the block."""
    with ExitStack() as stack:
        for name, answer in stand_ins().items():
            stack.enter_context(unittest.mock.patch.object(getattr(transformers, name), "from_pretrained", answer))
        yield


def told(pipeline: type, **how: Any) -> type:
    """A pipeline class whose call always gets ``how`` as well; it has the same name and arguments."""
    original: Any = pipeline.__call__
    inner = getattr(original, "__wrapped__", original)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(self, *args, **{**how, **kwargs})

    call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return type(pipeline.__name__, (pipeline,), {"__call__": call, "__module__": pipeline.__module__})


def testers(checkout: Path) -> Iterator[type]:
    """Every test class of the checkout that builds a pipeline, one for each pipeline class."""
    sys.path.insert(0, str(checkout))
    seen = set()
    for file in sorted(checkout.glob("tests/pipelines/*/test_*.py")):
        if not any(name in file.read_text(encoding="utf-8") for name in SCHEDULERS):
            continue
        try:
            module = importlib.import_module(".".join(file.relative_to(checkout).with_suffix("").parts))
        except Exception as error:  # another version of diffusers, or a package that its tests want
            print(f"{file} is not read: {error}", file=sys.stderr)
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
    if not type(getattr(pipeline, "scheduler", None)).__name__.startswith(SCHEDULERS):
        return "no flow", type(pipeline).__name__
    pipeline.set_progress_bar_config(disable=True)
    fit(pipeline)
    pipeline.__class__ = told(type(pipeline), **{name: value for name, value in inputs.items() if name not in OURS})
    options = Options(
        size=size_of(inputs), frames=inputs.get("num_frames"), text_length=inputs.get("max_sequence_length")
    )
    try:
        generator = Generic(pipeline, options)
    except GeneratorError as error:
        return "fails", str(error)
    guidance = "classifier-free guidance" if generator.unconditional else "no guidance"
    return "works", f"{guidance}, {' and '.join(('prompt', *generator.inputs))}, media {tuple(generator.size)}"


def row(tester: type) -> tuple[str, str, str]:
    """Pipeline, outcome, remark."""

    def late(*_: Any) -> None:
        raise GeneratorError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        outcome, remark = watch(tester)
    except NameError as error:  # how diffusers fails without torchvision
        outcome, remark = "not built", f"needs a package that is not installed: {error}"
    except Exception as error:
        outcome, remark = "fails", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return tester.pipeline_class.__name__.removesuffix("Wrapper"), outcome, remark.splitlines()[0] if remark else ""  # type: ignore[attr-defined]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generic_table", description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of the diffusers repository")
    parser.add_argument("--only", default="", help="pipelines whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    rows = []
    with offline():
        for tester in testers(args.checkout):
            if args.only in tester.pipeline_class.__name__:  # type: ignore[attr-defined]
                rows.append(row(tester))
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    shown = [cells for cells in rows if cells[1] != "no flow"]
    counts = ", ".join(f"{sum(cells[1] == word for cells in shown)} {word}" for word in ("works", "fails", "not built"))
    print(f"diffusers {diffusers.__version__}: {len(shown)} pipelines, {counts}\n\n| pipeline | | |\n|---|---|---|")
    for cells in shown:
        print("| {} | {} | {} |".format(*cells))


if __name__ == "__main__":
    main()
