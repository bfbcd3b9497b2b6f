"""Peak memory of one training step of SD3.5 medium with its real shapes on the CPU, beside the estimate of ``check``.

    python -m benchmarks.full_size --folder sd35-random --load     # 6.3 GB on disk, about 8 GB of memory
    python -m benchmarks.full_size --folder sd35-random            # a whole step: minutes

The folder is a diffusers pipeline with random bfloat16 weights: the transformer, the VAE and both CLIP encoders have
the published shapes, and T5 is left out, as the adapter allows. ``alignflow train configs/sd35-medium/nft.yaml`` runs
for one step of 128 x 128 pixels in another process, which samples its resident memory every 20 ms. What the imports
take is subtracted. The estimate is that of ``check``, without the allowances for CUDA and fragmentation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from align.checking.architectures import KNOWN
from align.checking.estimate import GB, Estimate, estimate
from align.config.load import load_config
from align.config.settings import Config
from align.data.files import new_folder
from benchmarks.helpers import random_weights

CONFIG, MODEL = "configs/sd35-medium/nft.yaml", "stabilityai/stable-diffusion-3.5-medium"
SHORT = (
    "generator.device=cpu", "generator.size=[128, 128]", "rollout.prompts=1", "rollout.group=2",
    "rollout.sampler.steps=2", "recipe.timesteps=1", "train.steps=1", "reward={kind: compressibility}",
    "evaluate.rewards.pickscore={kind: compressibility}", "evaluate.rewards.hpsv2=null", "evaluate.gold=null",
    "evaluate.at_start=false", "evaluate.prompts=1",
    "evaluate.sampler.steps=2", "samples.count=1",
)  # fmt: skip
PHASES = {
    "build_generator": "load", "add_trained": "add LoRA", "build_roles": "roles", "draw": "sampling",
    "decode_to_cpu": "decoding", "__call__ learning.py": "updating", "save checkpoint.py": "checkpoint",
    "export": "export", "look": "evaluation",
}  # fmt: skip
"""Function, with its file where the name is common -> what the run is doing."""


def write_folder(folder: Path, path: str = MODEL) -> None:
    """Write the pipeline ``path`` of ``KNOWN`` with random bfloat16 weights and CLIP encoders, without T5."""
    import transformers

    from align.worlds.tokenizer import clip_tokenizer

    pipeline = random_weights.pipeline("sd3", path, "bfloat16", "cpu")
    tokenizer = clip_tokenizer(length=77)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    encoders = {}
    for name in ("text_encoder", "text_encoder_2"):
        part = KNOWN[path][name]
        cls = getattr(transformers, part.name)
        encoders[name] = cls(cls.config_class(**part.config, **ids)).to(torch.bfloat16)
    pipeline.register_modules(**encoders, tokenizer=tokenizer, tokenizer_2=tokenizer)
    with new_folder(folder) as staging:
        pipeline.save_pretrained(staging)


def config_of(folder: Path, out: Path, words: Sequence[str] = ()) -> Config:
    """The shipped config, one short step of it."""
    return load_config(CONFIG, [f"generator.path={folder}", f"out={out}", *SHORT, *words])


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Resident memory of this process, sampled in a thread while the block runs.

    Args:
        every: seconds between samples.
        peaks: phase -> its most bytes, (anonymous, of mapped files).
        where: functions that ran at the largest sum, the innermost last.
    """

    every: float = 0.02
    peaks: dict[str, tuple[int, int]] = field(default_factory=dict)
    where: list[str] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self._main, self._ended = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        most = 0
        while not self._ended.wait(self.every):
            anonymous, mapped = resident()
            stack = functions(sys._current_frames().get(self._main))
            phase = phase_of(stack)
            if anonymous + mapped > sum(self.peaks.get(phase, (0, 0))):
                self.peaks[phase] = (anonymous, mapped)
            if anonymous + mapped > most:
                most, self.where = anonymous + mapped, stack[-12:]


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: its own, and pages of files that it maps."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped, shared = (1024 * int(lines[key].split()[0]) for key in ("RssAnon", "RssFile", "RssShmem"))
    return own + shared, mapped


def functions(frame: FrameType | None) -> list[str]:
    """``function file`` of a stack, the innermost last."""
    found = []
    while frame is not None:
        found.append(f"{frame.f_code.co_name} {Path(frame.f_code.co_filename).name}")
        frame = frame.f_back
    return found[::-1]


def phase_of(stack: Sequence[str]) -> str:
    """The innermost phase of a stack; ``other`` if there is none."""
    for call in reversed(stack):
        found = PHASES.get(call) or PHASES.get(call.partition(" ")[0])
        if found:
            return found
    return "other"


def measure(config: Config, load_only: bool = False) -> dict[str, Any]:
    """Train in this process, or load and add the LoRA with its roles alone; GB of the imports, and of each phase."""
    import diffusers
    import peft  # noqa: F401
    import transformers

    from align.training.trainer import train

    _ = diffusers.StableDiffusion3Pipeline, transformers.CLIPTextModelWithProjection
    before = sum(resident())
    with Watch() as watch:
        kept = loaded(config) if load_only else train(config, overwrite=True)
    del kept
    found = {name: [round(one / GB, 3) for one in peak] for name, peak in watch.peaks.items()}
    peak = (max(map(sum, watch.peaks.values())) - before) / GB
    return {"imports": before / GB, "peak": peak, "phases": found, "where": watch.where}


def loaded(config: Config) -> Any:
    """The generator on the CPU with the policy's LoRA, and the roles of its learners."""
    from align.policy.build import add_trained, build_generator, build_roles, sampling_kinds

    generator = build_generator(config.generator, config.memory, "cpu", training=True, kinds=sampling_kinds(config))
    add_trained(config, generator)
    roles = build_roles(config, generator)
    time.sleep(0.1)  # a sample with everything there
    return generator, roles


def expected(config: Config, load_only: bool = False) -> float:
    """GB of the estimate, without CUDA and fragmentation; without what training adds where nothing is trained."""
    found = estimate(config)
    later = ("optimizer", "gradients", "rollout")
    kept = tuple(item for item in found.kept if item.name not in later)
    return (bytes_of(replace(found, kept=kept, phases={"": ()})) if load_only else bytes_of(found)) / GB


def bytes_of(found: Estimate) -> float:
    """The kept parts and the largest phase."""
    phase = max(sum(item.bytes for item in items) for items in found.phases.values())
    return sum(item.bytes for item in found.kept) + phase


def main() -> None:
    """Write the folder if it is not there, train in another process and print both numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides of the config")
    parser.add_argument("--folder", type=Path, required=True, help="pipeline with random weights, written once")
    parser.add_argument("--out", type=Path, default=Path("runs/full-size"), help="run folder, overwritten")
    parser.add_argument("--load", action="store_true", help="load and add the LoRA alone: seconds instead of minutes")
    parser.add_argument("--measure", action="store_true", help="train in this process and print JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(config_of(options.folder, options.out, options.words), options.load)))
        return
    if not options.folder.is_dir():
        write_folder(options.folder)
    command = [sys.executable, "-m", "benchmarks.full_size", *sys.argv[1:], "--measure"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        sys.exit(ended.returncode)
    found = json.loads(ended.stdout.splitlines()[-1])
    config = config_of(options.folder, options.out, options.words)
    told = estimate(config)
    for item in [*told.kept, *(replace(one, name=f"{name}: {one.name}") for name, some in told.phases.items()
                              for one in some)]:  # fmt: skip
        print(f"{item.name:24} {item.bytes / GB:6.2f} GB  {item.how}")
    for name, (own, mapped) in found["phases"].items():
        print(f"measured, {name:14} {own:6.2f} GB and {mapped:.2f} GB of mapped files")
    print(f"at the peak: {' > '.join(found['where'])}")
    wanted = expected(config, options.load)
    print(f"imports {found['imports']:.2f} GB; peak beyond them {found['peak']:.2f} GB; estimate {wanted:.2f} GB;"
          f" difference {100 * (found['peak'] / wanted - 1):+.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
