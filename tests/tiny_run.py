"""A run small enough for a test: a tiny SD3 of random weights, a callable reward, a few updates."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from align.config.settings import Config
from rewards.base import Reward, RewardSettings, Scores

SOURCE = Path(__file__).parent.parent / "configs/prompts/sources/edit-01.webp"
"""The source image of every prompt of an editor."""


def redness(media: Tensor, prompts: list[str]) -> Tensor:
    """Red minus the other channels, a reward any model can learn."""
    mean = media.mean(dim=(-1, -2))
    return mean[:, 0] - mean[:, 1:].mean(dim=1)


def brightness(media: Tensor, prompts: list[str]) -> Tensor:
    """Mean of all pixels: on the embedded world mostly the background, free where the prompt does not name it."""
    return media.mean(dim=(1, 2, 3))


def mean_pixel(media: Tensor, prompts: list[str]) -> Tensor:
    """Mean of all pixels, of images and videos."""
    return media.flatten(1).mean(dim=1)


def compared_in_secret(media: Tensor, prompts: list[str], group: Tensor | None = None) -> Tensor:
    """``redness``, by code that asks for the group, which settings do not show."""
    return redness(media, prompts)


def missing_in_the_last(media: Tensor, prompts: list[str]) -> Tensor:
    """``mean_pixel``, missing for the prompt "a blue ball" in process 1 or where there is no other."""
    lost = [os.environ.get("RANK", "1") == "1" and prompt == "a blue ball" for prompt in prompts]
    return torch.where(torch.tensor(lost), torch.nan, mean_pixel(media, prompts))


def with_distance(media: Tensor, prompts: list[str]) -> Scores:
    """``mean_pixel`` with a distance from training features as a trained reward has."""
    return Scores(mean_pixel(media, prompts), parts={"distance": 10 * media.flatten(1).std(dim=1)})


def apart(media: Tensor, prompts: list[str], group: Tensor) -> Tensor:
    """Squared distance of ``redness`` from the mean of a prompt's samples, with a gradient to all of them."""
    values = redness(media, prompts)
    means = torch.stack([values[group == number].mean() for number in group])
    return (values - means).square()


def sometimes_missing(media: Tensor, prompts: list[str]) -> Tensor:
    """``redness`` without a score for every third sample."""
    values = redness(media, prompts)
    values[::3] = float("nan")
    return values


def missing_by_content(media: Tensor, prompts: list[str]) -> Tensor:
    """``redness`` without a score for about every third sample, the same ones in any batch."""
    values = redness(media, prompts)
    return values.masked_fill((values * 1000).long() % 3 == 0, float("nan"))


def raises(media: Tensor, prompts: list[str]) -> Tensor:
    """A reward with a bug."""
    raise RuntimeError("the judge fell asleep")


def all_infinite(media: Tensor, prompts: list[str]) -> Tensor:
    """Not one finite score."""
    return torch.full((len(media),), float("inf"))


class BrightRegions(RewardSettings):
    """``brightness`` to three digits, which no batch size changes, and that of every pixel as a region of its own."""

    gives_regions: ClassVar[bool] = True
    kind: Literal["bright_regions"] = "bright_regions"
    after: int | None = None
    """Number of calls with scores; the later ones have none."""

    def build(self, device: torch.device | str = "cpu") -> Reward:
        calls = itertools.count()

        def score(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            if self.after is not None and next(calls) >= self.after:
                return torch.full((len(media),), torch.nan)
            return (1000 * brightness(media, prompts)).round() / 1000

        def regions(media: Tensor, prompts: list[str]) -> Tensor:
            return 2 * media.mean(1, keepdim=True) - 1

        return Reward("bright_regions", score, (0.0, 1.0), regions=regions)


def wrong_shape(media: Tensor, prompts: list[str]) -> Tensor:
    """One number too many."""
    return torch.zeros(len(media) + 1)


RECIPES: dict[str, dict[str, Any]] = {
    "nft": {"kind": "nft", "timesteps": 2},
    "grpo": {"kind": "grpo"},
    "flow_rwr": {"kind": "flow_rwr", "timesteps": 2},
    "flow_dpo": {"kind": "flow_dpo", "timesteps": 2, "pairs": 2},
    "gapo": {"kind": "gapo", "timesteps": 2},
    "mm_dpo": {"kind": "mm_dpo", "timesteps": 2},
    "rpo": {"kind": "rpo", "timesteps": 2},
    "srum": {"kind": "srum", "timesteps": 2},
    "prdp": {"kind": "prdp"},
    "reward_backprop": {"kind": "reward_backprop"},
    "instruct_video": {"kind": "instruct_video", "start": 0.7},
    "srpo": {"kind": "srpo", "t_range": [0.1, 0.9], "positive": ["big"], "negative": ["small"], "margin": None},
    "re_dmd": {"kind": "re_dmd", "critic": {"updates": 2, "timesteps": 2}},
    "np_edit": {"kind": "np_edit", "span": [-1, 1], "critic": {"updates": 2, "timesteps": 2}},
    "opd": {"kind": "opd"},
    "texforce": {"kind": "texforce"},
    "tlpo": {"kind": "tlpo", "timesteps": 2},
    "ppd": {"kind": "ppd", "timesteps": 2, "beta": 50},
    "awm": {"kind": "awm", "timesteps": 2},
    "dgpo": {"kind": "dgpo", "timesteps": 2},
    "crd": {"kind": "crd", "timesteps": 2, "guidance": 1.0},
    "edit_r1": {"kind": "edit_r1", "timesteps": 2},
    "vgpo": {"kind": "vgpo"},
    "vpo": {"kind": "vpo", "draws": 8, "share": "marginal"},
    "prefpaint": {"kind": "prefpaint", "part": "level/distance"},
    "paco": {"kind": "paco"},
    "adv_grpo": {"kind": "adv_grpo"},
}
STOCHASTIC = ("grpo", "opd", "prdp", "re_dmd", "texforce", "vgpo", "vpo", "prefpaint", "paco", "adv_grpo")
"""Those that train the stochastic steps of a sampler."""
EDITORS = ("edit_r1",)
"""Those that train an editor: a tiny FLUX Kontext beside the tiny SD3 takes its place."""
DIRECT = ("reward_backprop", "instruct_video", "np_edit", "srpo")
"""Those that follow the reward's gradient."""
LORA_ONLY = ("np_edit", "re_dmd", "texforce", "tlpo", "ppd")
"""Those that cannot train all weights."""
POLICIES = {"tlpo": "gate", "ppd": "users"}
"""Those that train a policy of a kind of their own."""
ZERO_AT_FIRST = ("lora_B", "experts_gate", "user_attention.to_v")
"""Parts of the names of trained parameters that are zero until the first update."""


def settings(folder: Path, model: Path, recipe: str | dict[str, Any] = "nft", **sections: Any) -> Config:
    """Config of a tiny run in ``folder / "run"``; arguments extend sections, or replace them by a new kind."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a red cube\na blue ball\na cat\ntwo dogs\na small hat\na tree\n")
    kind = recipe if isinstance(recipe, str) else recipe["kind"]
    sampler: dict[str, Any] = {"kind": "flow_sde" if kind in STOCHASTIC else "ode", "steps": 3}
    tree: dict[str, Any] = {
        "name": "tiny",
        "out": str(folder / "run"),
        "generator": {"path": str(model), "device": "cpu", "size": [32, 32]},
        "policy": {"kind": "lora", "rank": 4},
        "prompts": {"train": str(prompts), "heldout": str(prompts)},
        "rollout": {"prompts": 2, "group": 4, "sampler": sampler},
        "reward": {"kind": "tiny_run:redness"},
        "recipe": RECIPES[recipe] if isinstance(recipe, str) else recipe,
        "train": {"steps": 3, "lr": 1e-2, "ema": 0.9},
        "evaluate": {"every": 2, "prompts": 4, "sampler": {"steps": 3}},
        "samples": {"every": 0, "count": 2},
        "checkpoint": {"every": 1, "keep": 2},
    }
    if kind in EDITORS:
        table = folder / "edits.jsonl"
        rows = [{"prompt": text, "image": str(SOURCE)} for text in prompts.read_text().splitlines()]
        table.write_text("\n".join(map(json.dumps, rows)))
        tree["generator"] |= {"kind": "flux_kontext", "path": str(editor_beside(model))}
        tree["prompts"] = {"train": str(table), "heldout": str(table)}
        tree["rollout"]["filter"] = {"ban": False}
    if kind == "tlpo":
        experts = {name: {"lora": str(path)} for name, path in experts_beside(model).items()}
        tree["policy"] = {"kind": "gate", "experts": experts, "features": 8}
    if kind == "ppd":
        tree["policy"] = {"kind": "users", "embeddings": str(users_in(folder))}
        rows = [{"prompt": text, "user": f"user{n % 2}"} for n, text in enumerate(prompts.read_text().splitlines())]
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tree["prompts"] = dict.fromkeys(("train", "heldout"), str(folder / "prompts.jsonl"))
    for name, value in sections.items():
        extends = isinstance(tree.get(name), dict) and isinstance(value, dict) and "kind" not in value
        tree[name] = {**tree[name], **value} if extends else value
    if tree["recipe"]["kind"] in DIRECT and ":" in tree["reward"]["kind"]:
        tree["reward"] = {"differentiable": True, **tree["reward"]}
    if kind == "srum" and ":" in tree["reward"]["kind"] and not tree["reward"]["kind"].endswith("Regions"):
        tree["reward"] = {"kind": "tiny_run:BrightRegions"}
    if kind in ("vpo", "prefpaint", "tlpo") and ":" in tree["reward"]["kind"]:
        second = "redness" if kind == "tlpo" else "with_distance"  # which agrees with most rewards of the tests
        members = {"given": tree["reward"], "level": {"kind": f"tiny_run:{second}"}}
        tree["reward"] = {"kind": "mixture", "parts": {name: {"reward": one} for name, one in members.items()}}
    return Config.model_validate(tree)


def editor_beside(model: Path) -> Path:
    """A tiny FLUX Kontext in the folder of the tiny SD3.

    The first process makes it and others wait, because transformers writes weights in the first process alone.
    """
    from tiny_image import flux

    editor = model.parent / "editor"
    first, until = os.environ.get("RANK", "0") == "0", time.monotonic() + 120
    while not first and not editor.is_dir() and time.monotonic() < until:
        time.sleep(0.1)
    if not editor.is_dir():
        with tempfile.TemporaryDirectory(dir=model.parent) as folder, contextlib.suppress(OSError):
            flux("FluxKontextPipeline").save_pretrained(Path(folder) / "editor")
            (Path(folder) / "editor").rename(editor)
    return editor


def users_in(folder: Path) -> Path:
    """Embeddings of two users, two tokens of three numbers each."""
    from align.preference.user_embeddings import save_embeddings

    source = torch.Generator().manual_seed(0)
    path = folder / "users.safetensors"
    if not path.exists():
        save_embeddings(path, {f"user{n}": torch.randn(2, 3, generator=source) for n in range(2)})
    return path


def experts_beside(model: Path) -> dict[str, Path]:
    """Two random LoRAs for the tiny SD3, in its folder. Processes that start together may both write them."""
    from align.policy.lora import add_lora, save_lora
    from generators.load import load

    found = {name: model.parent / "experts" / name for name in ("one", "two")}
    for seed, (name, path) in enumerate(found.items()):
        if not path.is_dir():
            generator = load("sd3", str(model))
            for _, value in add_lora(generator, 2 + seed, 2 + seed, seed=seed):
                value.data = 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
            path.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder, contextlib.suppress(OSError):
                save_lora(generator, Path(folder) / name)
                (Path(folder) / name).rename(path)
    return found


def final_tensors(config: Config, learner: str = "policy") -> dict[str, Tensor]:
    """All roles of a learner as the run's last checkpoint holds them."""
    from safetensors.torch import load_file

    from align.runs import checkpoint

    path = checkpoint.latest(config.run_dir / "checkpoints")
    assert path is not None
    stored = load_file(path / "roles.safetensors")
    start = f"{learner}/"
    return {name.removeprefix(start): value for name, value in stored.items() if name.startswith(start)}


def policy_gap(a: dict[str, Tensor], b: dict[str, Tensor], role: str = "policy") -> float:
    """Largest absolute difference between two runs' weights of a role."""
    names = [name for name in a if name.startswith(f"{role}/")]
    assert names
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in names)


def some_slow(recipes: Iterable[str]) -> list[Any]:
    """The recipes, of which every run of the tests tries one of each kind of loss and the slow tests the others."""
    quick = ("nft", "grpo", "flow_dpo", "reward_backprop", "re_dmd")
    return [recipe if recipe in quick else pytest.param(recipe, marks=pytest.mark.slow) for recipe in recipes]
