"""Heads of trained rewards: unit features of images and prompts -> outputs ``[n, K]``, the score first."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.training.losses import standard_normal_kl
from rewards.training.settings import (
    CosineSettings,
    DimensionsSettings,
    HeadSettings,
    IdealPointSettings,
    MLPSettings,
    MoESettings,
    UncertainSettings,
    VariationalSettings,
)


def joint(image: Tensor, text: Tensor) -> Tensor:
    """Unit rows ``[n, D]`` -> ``[n, 3 D]`` of variance about 1: both, and their product, which sums to the cosine."""
    image, text = (rows * rows.shape[-1] ** 0.5 for rows in (image, text))
    return torch.cat([image, text, image * text], -1)


def perceptron(width: int, hidden: int, out: int) -> nn.Module:
    """A hidden layer and an output layer, or with ``hidden`` 0 the latter alone."""
    if not hidden:
        return nn.Linear(width, out)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


class Head(nn.Module):
    """Base: ``head(image [n, D], text [n, D], user) -> [n, K]``.

    ``user`` is ``[n]`` numbers of known users, whatever :meth:`infer` returned, or None for nobody in particular.

    Args:
        width: D.
        apart: whether image and prompt were read apart. Else ``image`` holds both, and ``text`` is ``[n, 0]`` for heads
            that do not read the prompt alone.
    """

    def __init__(self, width: int, apart: bool = True) -> None:
        super().__init__()
        self.apart, self.wide = apart, 3 * width if apart else width

    def join(self, image: Tensor, text: Tensor) -> Tensor:
        """``[n, wide]`` of variance about 1: :func:`joint`, or the image alone where it was read with its prompt."""
        return joint(image, text) if self.apart else image * image.shape[-1] ** 0.5

    def features(self, image: Tensor, text: Tensor) -> Tensor:
        """``[n, F]`` features in which samples are compared: what the last layer reads, where there is one for all."""
        return self.join(image, text)

    def infer(self, chosen: Tensor, rejected: Tensor, user: Tensor) -> tuple[Tensor, Tensor]:
        """(user as the head takes it, penalty ``[M]`` of the loss) of pairs with joint features ``[M, 3 D]``."""
        return user, chosen.new_zeros(len(chosen))

    def remember(self, chosen: Tensor, rejected: Tensor, user: Tensor) -> None:
        """Keep what is to be known of the users after training, from their pairs."""


class MLP(Head):
    """See :class:`~rewards.training.settings.MLPSettings`."""

    def __init__(self, settings: MLPSettings, width: int, users: int, apart: bool = True) -> None:
        super().__init__(width, apart)
        self.score = perceptron(self.wide, settings.hidden, 1)

    def features(self, image: Tensor, text: Tensor) -> Tensor:
        rows = self.join(image, text)
        return self.score[:-1](rows) if isinstance(self.score, nn.Sequential) else rows

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Tensor:
        return self.score(self.join(image, text))


class Cosine(Head):
    """See :class:`~rewards.training.settings.CosineSettings`."""

    def __init__(self, settings: CosineSettings, width: int, users: int, apart: bool = True) -> None:
        super().__init__(width, apart)
        self.project = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.project.weight)

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Tensor:
        return F.cosine_similarity(self.project(image), text, dim=-1)[:, None]


class Uncertain(MLP):
    """``[n, 2]``: mean and standard deviation."""

    def __init__(self, settings: UncertainSettings, width: int, users: int, apart: bool = True) -> None:
        Head.__init__(self, width, apart)
        self.score = perceptron(self.wide, settings.hidden, 2)

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Tensor:
        mean, log_std = self.score(self.join(image, text)).unbind(-1)
        return torch.stack([mean, log_std.clamp(-5, 3).exp()], -1)


class Dimensions(MLP):
    """``[n, 1 + K]``: the sum of K scores, and the scores."""

    def __init__(self, settings: DimensionsSettings, width: int, users: int, apart: bool = True) -> None:
        Head.__init__(self, width, apart)
        self.score = perceptron(self.wide, settings.hidden, len(settings.names))

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Tensor:
        scores = self.score(self.join(image, text))
        return torch.cat([scores.sum(-1, keepdim=True), scores], -1)


class MoE(Head):
    """``sum_j softmax(aspect gate)_j sum_{c in j} softmax(criterion gate)_c r_c``; both gates read the prompt.

    The outputs are ``[n, 1 + 2 A + 2 C]``: the score, A aspects, C criteria, the criteria's gates and the aspects'.
    """

    def __init__(self, settings: MoESettings, width: int, users: int, apart: bool = True) -> None:
        super().__init__(width, apart)
        self.groups, self.temperature = settings.sizes, settings.temperature
        self.criteria = nn.Linear(self.wide, sum(self.groups), bias=False)
        self.criterion_gate = perceptron(width, settings.hidden, sum(self.groups))
        self.aspect_gate = perceptron(width, settings.hidden, len(self.groups))

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Tensor:
        scores = self.criteria(self.join(image, text)).split(self.groups, -1)
        gates = [gate.softmax(-1) for gate in self.criterion_gate(text).split(self.groups, -1)]
        aspects = torch.stack([(g * r).sum(-1) for g, r in zip(gates, scores, strict=True)], -1)
        share = (self.aspect_gate(text) / self.temperature).softmax(-1)
        return torch.cat([(share * aspects).sum(-1, keepdim=True), aspects, *scores, *gates, share], -1)


class IdealPoint(Head):
    """``-|f(x) - softmax(w_u) P|^2``, or ``<f(x) / |f(x)|, softmax(w_u) P>``.

    Nobody in particular has the users' mean mixture. A user may be given as mixtures ``[n, K]`` in place of numbers.
    """

    def __init__(self, settings: IdealPointSettings, width: int, users: int, apart: bool = True) -> None:
        super().__init__(width, apart)
        self.form = settings.form
        self.project = nn.Linear(self.wide, settings.dim)
        self.prototypes = nn.Parameter(torch.randn(settings.prototypes, settings.dim))
        self.mixture = nn.Parameter(0.01 * torch.randn(max(users, 1), settings.prototypes))

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Tensor:
        known = self.mixture.softmax(-1)
        if user is None:
            share = known.mean(0).expand(len(image), -1)
        else:
            share = user if user.is_floating_point() else known[user]
        point, place = share @ self.prototypes, self.project(self.join(image, text))
        if self.form == "angle":
            return (F.normalize(place, dim=-1) * point).sum(-1, keepdim=True)
        return -(place - point).square().sum(-1, keepdim=True)


class Variational(Head):
    """``r(x, z)`` with z inferred from pairs; without a user, z is the prior's mean, 0.

    Half of a user's pairs in a batch tell who judged the other half and the other way round, so that no pair is
    explained by itself.
    """

    known: Tensor

    def __init__(self, settings: VariationalSettings, width: int, users: int, apart: bool = True) -> None:
        super().__init__(width, apart)
        hidden, self.dim = settings.hidden, settings.dim
        self.pair = perceptron(2 * self.wide, hidden, hidden)
        heads = next(count for count in (4, 2, 1) if hidden % count == 0)
        self.attend = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.posterior = nn.Linear(hidden, 2 * settings.dim)
        self.score = perceptron(self.wide + settings.dim, hidden, 1)
        self.register_buffer("known", torch.zeros(max(users, 1), settings.dim))

    def encode(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, ``[dim]`` each, of the user who judged these pairs, in any order."""
        pairs = self.pair(torch.cat([chosen, rejected], -1))[None]
        seen = self.attend(pairs, pairs, pairs, need_weights=False)[0].mean(1)[0]
        mean, log_variance = self.posterior(seen).chunk(2)
        return mean, log_variance.tanh()

    def infer(self, chosen: Tensor, rejected: Tensor, user: Tensor) -> tuple[Tensor, Tensor]:
        latent, penalty = chosen.new_zeros(len(chosen), self.dim), chosen.new_zeros(len(chosen))
        for number in user.unique():
            mine = (user == number).nonzero().flatten()
            for told, asked in ((mine[0::2], mine[1::2]), (mine[1::2], mine[0::2])):
                if len(told) and len(asked):
                    mean, log_variance = self.encode(chosen[told], rejected[told])
                    drawn = mean + (log_variance / 2).exp() * torch.randn_like(mean) if self.training else mean
                    latent[asked], penalty[asked] = drawn, standard_normal_kl(mean, log_variance)
        return latent, penalty

    @torch.no_grad()
    def remember(self, chosen: Tensor, rejected: Tensor, user: Tensor) -> None:
        for number in user.unique():
            mine = user == number
            self.known[number] = self.encode(chosen[mine][:256], rejected[mine][:256])[0]

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Tensor:
        if user is None:
            user = image.new_zeros(len(image), self.dim)
        latent = user if user.is_floating_point() else self.known[user]
        return self.score(torch.cat([self.join(image, text), latent], -1))


HEADS: dict[type[HeadSettings], type[Head]] = {
    MLPSettings: MLP,
    CosineSettings: Cosine,
    UncertainSettings: Uncertain,
    DimensionsSettings: Dimensions,
    MoESettings: MoE,
    IdealPointSettings: IdealPoint,
    VariationalSettings: Variational,
}


def build_head(settings: HeadSettings, width: int, users: int, apart: bool = True) -> Head:
    """An untrained head for features of ``width`` numbers and pairs of ``users`` users.

    Args:
        apart: whether image and prompt were read apart.
    """
    return HEADS[type(settings)](settings, width, users, apart)  # type: ignore[call-arg, arg-type]
