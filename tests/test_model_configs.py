"""The configs of real models: every recipe is there, says where its numbers come from, and names what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from align.config.load import load_config

ROOT = Path(__file__).parent.parent
OURS = {"prompts", "rewards", "rewriting", "shapes", "shapes-edit", "shapes-fill", "shapes-video", "shared"}
"""Folders of configs that are no model's."""
RECIPES = ("nft", "grpo", "flow_dpo", "flow_rwr")
MODELS = sorted(folder for folder in (ROOT / "configs").iterdir() if folder.is_dir() and folder.name not in OURS)
FILES = sorted(path for folder in (*MODELS, ROOT / "configs/shared") for path in folder.glob("*.yaml"))
VIDEO = {"hunyuan-video", "ltx", "wan21-1.3b", "wan22-i2v"}


def files_of(folder: Path, recipe: str) -> list[Path]:
    """The config of a recipe for a model: its own file, or a file of the model and one that models share."""
    if (own := folder / f"{recipe}.yaml").exists():
        return [own]
    if folder.name in VIDEO:
        return [folder / "base.yaml", ROOT / f"configs/shared/video_{recipe}.yaml"]
    return [folder / "nft.yaml", ROOT / f"configs/shared/{recipe}.yaml"]


TRAINED = [(folder, recipe) for folder in MODELS for recipe in RECIPES]

SOURCE = re.compile(r"arXiv \d{4}\.\d{5}|[\w-]+/[\w-]+, [\w./-]+\.(py|sh|toml|yaml|md)")
HARDWARE = re.compile(r"Not run\.|Run on \d")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def head(path: Path) -> str:
    """The comment a file begins with, as one line."""
    text = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))
    assert text is not None
    return re.sub(r"\n?# ?", " ", text[0])


def test_there_are_models() -> None:
    assert len(MODELS) >= 7


@pytest.mark.parametrize("folder", MODELS, ids=name)
def test_every_model_has_a_file_of_its_own_where_it_differs(folder: Path) -> None:
    assert {"base.yaml", "nft.yaml", "grpo.yaml"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name != "shared"], ids=name)
def test_a_file_says_more_than_which_files_it_extends(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert len(lines) > 1


@pytest.mark.parametrize("path", FILES, ids=name)
def test_heads_say_the_source_and_what_it_was_run_on(path: Path) -> None:
    assert SOURCE.search(head(path))
    assert HARDWARE.search(head(path))


@pytest.mark.parametrize(("folder", "recipe"), TRAINED, ids=lambda part: getattr(part, "name", part))
def test_every_model_has_every_recipe_and_evaluates_it(folder: Path, recipe: str) -> None:
    files = files_of(folder, recipe)
    config = load_config(files)
    assert config.recipe.kind == recipe
    assert config.name.startswith(folder.name)
    assert config.prompts.heldout is not None
    assert config.evaluate.rewards
    if config.rollout.kind == "online":
        assert config.reward is not None
    else:
        assert f"`{config.rollout.file}`" in head(files[-1]), "a file to bring, and the head does not say so"


NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1}),
    "flux2_klein": ("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1}),
    "qwen_image": ("QwenImageTransformer2DModel", {"num_layers": 1}),
    "wan": ("WanTransformer3DModel", {"num_layers": 1}),
    "wan_i2v": ("WanTransformer3DModel", {"num_layers": 1}),
    "z_image": ("ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1}),
}
"""Generator whose LoRA a config places -> its network with one block of each sort."""


@pytest.mark.parametrize("path", [folder / "nft.yaml" for folder in MODELS], ids=name)
def test_lora_targets_are_layers_of_the_network(path: Path) -> None:
    import diffusers
    import torch

    config = load_config(path)
    assert config.policy.kind == "lora"
    if config.policy.targets is None:
        return
    cls, sizes = NETWORKS[config.generator.kind]
    with torch.device("meta"):
        network = getattr(diffusers, cls)(**sizes)
    layers = [f".{place}" for place, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in config.policy.targets:
        assert any(layer.endswith(f".{target}") for layer in layers), target
