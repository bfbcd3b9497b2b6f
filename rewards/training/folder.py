"""A trained reward on disk: ``reward.json``, ``head.safetensors``, ``gram.safetensors`` with the sum of ``z z^T`` over
its training features and, if trained, ``backbone.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError
from torch import Tensor

from alignflow.files import tensor_files
from alignflow.paths import expanded
from alignflow.text import first_line
from rewards.base import RewardError
from rewards.networks.state_dicts import check_keys, read_state_dict, skeleton
from rewards.training.heads import build_head
from rewards.training.scorer import Scorer, load_backbone
from rewards.training.settings import AnyBackbone, HeadSettings, VLMBackbone, parse_backbone, parse_head
from rewards.training.vlm import VLMScorer

M = TypeVar("M", bound=BaseModel)
FORMAT: Literal["alignflow-trained-reward/1"] = "alignflow-trained-reward/1"


class Manifest(BaseModel):
    """Contents of ``reward.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["alignflow-trained-reward/1"] = Field(FORMAT, description="version of the folder format")
    backbone: Annotated[AnyBackbone, BeforeValidator(parse_backbone)] = Field(
        description="model that provides the features"
    )
    head: Annotated[SerializeAsAny[HeadSettings], BeforeValidator(parse_head)] = Field(
        description="head on the features"
    )
    width: int = Field(ge=1, description="length of the feature vectors")
    users: list[str] = Field([], description="users in the training table, in the order of the head's outputs")


def save(
    folder: Path, manifest: Manifest, head: Mapping[str, Tensor], backbone: Mapping[str, Tensor], gram: Tensor
) -> None:
    """Write the files into a folder that exists; of the backbone, what differs from what it was made from."""
    tensor_files.save(
        folder / "head.safetensors", {key: value.detach().cpu().contiguous() for key, value in head.items()}
    )
    tensor_files.save(folder / "gram.safetensors", {"gram": gram.float().contiguous()})
    if backbone:
        kept = {name: value.detach().cpu().contiguous() for name, value in backbone.items()}
        tensor_files.save(folder / "backbone.safetensors", kept)
    (folder / "reward.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(path: Path, cls: type[M], form: str, command: str) -> M:
    """Manifest of a reward folder; raises RewardError, which names the problem or the ``command`` that writes it."""
    try:
        return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RewardError(f"{path.parent} has no {path.name} ({error.strerror}); {command} writes one") from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise RewardError(f"{path} is not of format {form}: {first_line(error)}") from None


def new_scorer(
    backbone: AnyBackbone, head: HeadSettings, device: torch.device | str, dtype: str | None = None,
    chunk: int | None = None,
) -> Scorer:  # fmt: skip
    """The frozen backbone, still without its head.

    Args:
        dtype: of its weights; by default as in training.
        chunk: questions to a vision-language model per network call; by default as in training.

    Raises:
        RewardError: it cannot be loaded.
    """
    if isinstance(backbone, VLMBackbone):
        return VLMScorer.load(backbone, device, head.reads_prompt, dtype, chunk)
    return Scorer(load_backbone(backbone, device, dtype or "float32"))


def load(path: str, device: torch.device | str, dtype: str, chunk: int | None = None) -> tuple[Manifest, Scorer]:
    """The reward that :func:`save` wrote, ready to score; arguments as for :func:`new_scorer`.

    Raises:
        RewardError: not there, not such a folder, or weights that do not fit.
    """
    folder = expanded(path, RewardError)
    manifest = read_manifest(folder / "reward.json", Manifest, FORMAT, "alignflow reward train")
    scorer = new_scorer(manifest.backbone, manifest.head, device, dtype, chunk)
    if scorer.width != manifest.width:
        raise RewardError(
            f"{folder} was trained on features of {manifest.width}, those of {manifest.backbone.model} have "
            f"{scorer.width} numbers"
        )
    changed = folder / "backbone.safetensors"
    if changed.is_file() or manifest.backbone.tune != "none":
        scorer.take(manifest.backbone, read_state_dict(changed), str(changed))
    users, apart = len(manifest.users), manifest.backbone.apart
    state = read_state_dict(folder / "head.safetensors")
    expected = skeleton(lambda: build_head(manifest.head, manifest.width, users, apart))
    check_keys(state, expected, str(folder / "head.safetensors"), f"a head of kind {manifest.head.kind}")
    head = build_head(manifest.head, manifest.width, users, apart)
    head.load_state_dict(state)
    scorer.head = head.requires_grad_(False).eval().to(device)
    return manifest, scorer


def load_gram(path: str) -> Tensor | None:
    """``[F, F]`` the sum of ``z z^T`` over the training features; None in a folder from before they were kept.

    Raises:
        RewardError: a file that holds something else.
    """
    file = expanded(path, RewardError) / "gram.safetensors"
    if not file.is_file():
        return None
    found = read_state_dict(file)
    gram = found.get("gram")
    if gram is None or gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise RewardError(f"{file} should hold a square matrix named gram; train the reward again")
    return gram
