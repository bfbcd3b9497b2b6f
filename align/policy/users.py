"""Attention of a frozen network to the embedding of a user, of which only the new keys and values are trained (PPD).

``Z' = softmax(Q K^T) V + softmax(Q K_u^T) V_u`` with ``K_u = u W_k`` and ``V_u = u W_v`` for an embedding
``u [Lu, Du]`` (PPD, arXiv 2501.06655; the decoupled attention of IP-Adapter). ``W_v`` starts from zero and there are no
biases, so that the base is reproduced exactly at the start, and for ``u = 0``, nobody in particular, ever after. The
embedding of a mixture of users is the same mixture of theirs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from align.data.files import writing
from align.maths.attention import decoupled
from align.maths.seeds import derive
from align.policy.added import Added, added, added_parameters
from align.policy.layers import LoraError
from align.policy.shards import whole
from alignflow.errors import DataError
from alignflow.files import tensor_files
from alignflow.files.policies import USERS as FILE
from alignflow.words import listing
from generators.base import Generator

if TYPE_CHECKING:
    from align.data.prompts import Prompt

NAME = "user_attention"
ROWS = "user"
"""Name of the embeddings ``[N, Lu, Du]`` among the rows of conditioning."""
ABOUT = "users"

Who = str | Mapping[str, float] | None
"""A user, or users with the weights of a mixture; None = nobody in particular."""


class Users:
    """Embeddings of known users, and the one of each prompt.

    Args:
        known: name -> ``[Lu, Du]``.
        default: of prompts without a column ``user``.
    """

    def __init__(self, known: Mapping[str, Tensor], default: Who = None) -> None:
        self.known, self.default = {name: value.float() for name, value in known.items()}, default

    @property
    def width(self) -> int:
        """Du."""
        return next(iter(self.known.values())).shape[1]

    def __call__(self, prompts: Sequence[Prompt]) -> Tensor:
        """Embeddings ``[N, Lu, Du]`` of the prompts' users, zero for nobody.

        Raises:
            DataError: a user who is not known; names the prompt's place.
        """
        return torch.stack([self.of(prompt.metadata.get("user"), prompt.where) for prompt in prompts])

    def of(self, who: Any, where: str) -> Tensor:
        """The embedding ``[Lu, Du]`` of one user, or the mixture of several."""
        given = self.default if who in (None, "") else who
        shares = dict(given) if isinstance(given, Mapping) else {} if given is None else {str(given): 1.0}
        total = torch.zeros_like(next(iter(self.known.values())))
        for name, share in shares.items():
            if name not in self.known:
                raise DataError(f"{where}: no embedding of user {name!r}; there are {listing(self.known, name)}")
            total = total + float(share) * self.known[name]
        return total


def read_embeddings(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """User -> embedding ``[Lu, Du]`` of a safetensors file with one tensor per user, ``[Lu, Du]`` or ``[Du]``.

    Raises:
        DataError: not there, damaged, empty, or of several shapes.
    """
    path = Path(file).expanduser()
    try:
        found = {name: value if value.ndim == 2 else value[None] for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"embeddings of users: {path} cannot be read: {error}") from None
    shapes = {tuple(value.shape) for value in found.values()}
    if len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
        raise DataError(f"{path} should hold embeddings [tokens, width] of one shape, given {sorted(shapes)}")
    return found


class UserAttention(Added):
    """Added attention of one layer.

    Args:
        generator: whose call in progress has the users' rows.
        attention: diffusers' attention module, with ``to_q``, ``to_out`` and ``heads``.
        width: Du.
        seed: of the keys' weights, normal with deviation ``1 / sqrt(Du)``.
    """

    def __init__(self, generator: Generator, attention: Any, width: int, seed: int) -> None:
        super().__init__()
        inner = attention.to_q.out_features
        self.generator, self.heads, self.norms = generator, attention.heads, [getattr(attention, "norm_q", None)]
        source = torch.Generator().manual_seed(seed)
        self.to_k = nn.Parameter(torch.randn(inner, width, generator=source) / width**0.5)
        self.to_v = nn.Parameter(torch.zeros(inner, width))
        self.q: Tensor | None = None

    def see(self, layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        """Hook of ``to_q``: the queries ``[N, L, D]``."""
        self.q = out

    def join(self, layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hook before ``to_out``: its input ``[N, L, D]`` with the added attention."""
        q, self.q = self.q, None
        call = self.generator.call
        user = None if call is None else call.cond.tensors.get(ROWS)
        if q is None or user is None or not self.on:
            return given
        keys, values = (F.linear(user, weight).to(q.dtype) for weight in (self.to_k, self.to_v))
        return given[0] + decoupled(self._normalised(q), keys, values, self.heads).to(given[0].dtype), *given[1:]

    def _normalised(self, q: Tensor) -> Tensor:
        """The queries as the layer normalises them: over all of D, or over each head."""
        norm = self.norms[0]
        weight = getattr(norm, "weight", None)
        if norm is None or weight is None or weight.shape[-1] == q.shape[-1]:
            return q if norm is None else norm(q)
        return norm(q.unflatten(-1, (self.heads, -1))).flatten(-2)


def add_users(generator: Generator, users: Users, seed: int) -> None:
    """Put added attention into every layer that the adapter names (:attr:`~generators.base.Generator.user_attention`).

    Raises:
        LoraError: the adapter names none, or the model has two networks.
    """
    ends, backbones = tuple(f".{end}" for end in generator.user_attention), generator.backbones()
    if not ends or len(backbones) > 1:
        raise LoraError(f"{type(generator.pipeline).__name__} cannot attend to a user: no layers are named for it")
    generator.backbone.requires_grad_(False)
    found: dict[str, Any] = {
        name: module
        for name, module in generator.backbone.named_modules()
        if name.endswith(ends) and getattr(module, "to_out", None) is not None
    }
    for name, module in found.items():
        one = UserAttention(generator, module, users.width, derive(seed, NAME, name)).to(generator.device)
        module.add_module(NAME, one)
        module.to_q.register_forward_hook(one.see)
        module.to_out[0].register_forward_pre_hook(one.join)
    generator.users = users


def user_tensors(generator: Generator) -> dict[str, Tensor]:
    """Weights and embeddings as the file holds them. Where weights are sharded every process must call it."""
    assert isinstance(generator.users, Users)
    weights = {name: whole(value).float().cpu() for name, value in added_parameters(generator)}
    users = {f"user.{number}": value.contiguous() for number, value in enumerate(generator.users.known.values())}
    return {**weights, **users}


def save_users(folder: Path, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Path:
    """Write :func:`user_tensors` into a folder, which :func:`load_users` reads; whole or not at all."""
    path = folder / FILE
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tensor_files.save(path, dict(tensors), {"format": "pt", ABOUT: json.dumps(list(names))})
    return path


def load_users(generator: Generator, file: Path, user: Who = None) -> None:
    """Put the added attention of a file onto a generator, with its users; nothing is trained then.

    Args:
        user: of prompts without a column ``user``.

    Raises:
        LoraError: the file is damaged, or was made for another model.
    """
    try:
        _, about = tensor_files.header(file)
        names, tensors = json.loads(about[ABOUT]), load_file(file)
        known = {name: tensors.pop(f"user.{number}") for number, name in enumerate(names)}
    except (tensor_files.TensorFileError, SafetensorError, OSError, KeyError, ValueError) as error:
        raise LoraError(f"{file} is not a file of user attention: {error}; copy it again") from None
    add_users(generator, Users(known, user), 0)
    own = dict(added_parameters(generator))
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in tensors.items()}:
        raise LoraError(f"{file} was not made for this {type(generator.backbone).__name__}: other layers or sizes")
    for name, value in own.items():
        value.data.copy_(tensors[name])
        value.requires_grad_(False)


def choose(generator: Generator, policy: Any) -> None:
    """Follow a config's ``policy.user`` and the users of its ``policy.embeddings``, where there are such settings."""
    users = generator.users
    if isinstance(users, Users) and policy.kind == "users":
        users.default = policy.user
        if Path(policy.embeddings).expanduser().is_file():
            users.known |= read_embeddings(policy.embeddings)


def layers(generator: Generator) -> list[str]:
    """Names of the layers with added attention."""
    return [name.removesuffix(f".{NAME}") for name, one in added(generator).items() if isinstance(one, UserAttention)]
