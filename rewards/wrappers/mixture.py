"""Several rewards as one, each normalised to a common scale: sums, means, products, gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from alignflow.strict import Named, Strict
from rewards import AnyReward, combine
from rewards.base import Reward, RewardError, RewardSettings, Scope, Scores, all_known, widest_known
from rewards.combine import standardised, widest
from rewards.reference import Reference, load
from rewards.refresh import together

if TYPE_CHECKING:
    import torch
    from torch import Tensor

POSITIVE = ("harmonic", "geometric", "product")
"""Ways to combine that take no score below 0."""

Span = tuple[float, float]


class Member(Strict):
    """One reward of a mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reward: AnyReward = Field(description="reward of the member: {kind: ...}")
    weight: float = Field(1.0, description="factor or exponent of the normalised score; negative to penalise in a sum")
    normalise: Literal["none", "range", "group", "batch", "reference", "quantile"] = Field(
        "none",
        description="none = raw score | range = declared range mapped to 0..1 | group = (x - mean) / deviation "
        "over the samples of a prompt | batch = the same over all samples scored together | "
        "reference = the same with mean and deviation of a reference sample | quantile = share of "
        "the reference sample below the score",
    )
    reference: str | Reference | None = Field(
        None,
        description="file written by alignflow reward calibrate, or {mean: ..., std: ..., quantiles: [...]}; "
        "null = none",
    )
    uncertainty: str | None = Field(
        None,
        description="name of the reward's part with its standard deviation, of which discount times is "
        "subtracted; null = none",
    )
    gate: float | None = Field(
        None,
        description="minimum normalised score; makes the member a gate, which is not added to the sum; null = "
        "not a gate",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.reference is not None) != (self.normalise in ("reference", "quantile")):
            raise ValueError("reference needs normalise: reference or quantile, and these need reference")
        known = isinstance(self.reference, Reference) and len(self.reference.quantiles) < 2
        if self.normalise == "quantile" and known:
            raise ValueError("normalise: quantile needs at least two quantiles in reference")
        return self

    @property
    def normalised_over(self) -> Scope:
        """Scope over which its scale is computed."""
        return self.normalise if self.normalise in ("group", "batch") else "sample"  # type: ignore[return-value]

    def scope(self, reward: Reward) -> Scope:
        """Scope of samples that must be scored together for this member."""
        return widest([reward.scope, self.normalised_over])


class Mixture(RewardSettings):
    """Several rewards as one: sums, means, products, gates; a sample that one of them cannot score has no score."""

    kind: Literal["mixture"] = Field("mixture", description="several rewards as one")
    parts: Annotated[dict[str, Member], Named] = Field(
        min_length=1, description="members by name: {reward, weight, normalise, gate}"
    )
    how: Literal["weighted", "harmonic", "geometric", "product", "log_tamed", "lower_bound"] = Field(
        "weighted",
        description="weighted = sum of weight times score | harmonic, geometric = weighted means of non-negative "
        "scores | product = product of score to the power of weight | log_tamed = weighted, after "
        "log(1 + x) of members whose spread is large relative to their mean | lower_bound = weighted "
        "mean minus discount times the members' spread",
    )
    discount: float = Field(
        1.0, ge=0, description="standard deviations subtracted by lower_bound and by a member's uncertainty"
    )
    gated: float | None = Field(0.0, description="score of a sample that fails a gate; null = no score")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        added = {name: part for name, part in self.parts.items() if part.gate is None}
        if not added:
            raise ValueError("all parts are gates; at least one must be a score")
        if self.how not in ("weighted", "log_tamed"):
            for name, part in added.items():
                if part.weight <= 0:
                    raise ValueError(f"how: {self.how} needs weights above 0; {name!r} has {part.weight:g}")
        return self

    def compares(self) -> Scope | None:
        """The widest of its parts', and of how they are normalised."""
        scopes = [scope for part in self.parts.values() for scope in (part.reward.compares(), part.normalised_over)]
        return widest_known([*scopes, "batch" if self.how == "log_tamed" else "sample"])

    def gradient(self) -> bool | None:
        """Whether all members that are added have one; gates do not count."""
        return all_known([part.reward.gradient() for part in self.parts.values() if part.gate is None])

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Build every member.

        Raises:
            RewardError: a member to be normalised by its range has none, or its calibration cannot be used.
        """
        import torch

        ready = {name: part.reward.build(device) for name, part in self.parts.items()}
        scales = {name: _scale(name, part, ready[name]) for name, part in self.parts.items()}
        added = [name for name, part in self.parts.items() if part.gate is None]
        differentiable = all(ready[name].differentiable for name in added)

        def function(media: Tensor, prompts: list[str], group: Tensor | None, **inputs: Any) -> Scores:
            groups = combine.groups_of(prompts, group)
            scores = {name: reward(media, prompts, group, inputs) for name, reward in ready.items()}
            where = media.device if differentiable else torch.device("cpu")
            scaled = {name: self._scaled(name, scores[name], scales[name], groups).to(where) for name in ready}
            reasons = _joined(scores)
            total = self._combined({name: scaled[name] for name in added}, reasons)
            return Scores(self._through_gates(total, scaled, reasons), reasons, _named_parts(scores))

        limits = {name: _limits(part, ready[name].range) for name, part in self.parts.items() if name in added}
        scopes: list[Scope] = [part.scope(ready[name]) for name, part in self.parts.items()]
        return Reward(
            "mixture",
            function,
            self._range(limits),
            differentiable,
            wants=tuple(dict.fromkeys(want for reward in ready.values() for want in reward.wants)),
            scope=combine.widest([*scopes, "batch" if self.how == "log_tamed" else "sample"]),
            fingerprint=lambda: " ".join(reward.fingerprint() for reward in ready.values()),
            apart=tuple(part for name, reward in ready.items() for part in _apart(name, reward)),
            refresh=together({name: reward.refresh for name, reward in ready.items()}),
        )

    def _scaled(self, name: str, scores: Scores, scale: Callable[..., Tensor], groups: Tensor) -> Tensor:
        """A member's scores ``[N]`` less its own uncertainty, on the scale it asks for."""
        part, values = self.parts[name], scores.values
        if part.uncertainty is not None and len(scores.parts):
            if part.uncertainty not in scores.parts:
                raise RewardError(f"mixture: {name!r} has no part {part.uncertainty!r}, only {', '.join(scores.parts)}")
            values = values - self.discount * scores.parts[part.uncertainty].to(values.device)
        return scale(values, groups)

    def _combined(self, scaled: Mapping[str, Tensor], reasons: dict[int, str]) -> Tensor:
        """``[N]``; what cannot be combined is NaN and gets its reason."""
        import torch

        values = torch.stack(list(scaled.values()), 1)
        weights = values.new_tensor([self.parts[name].weight for name in scaled])
        if self.how in POSITIVE:
            for name, column in scaled.items():
                for index in (column < 0).nonzero().flatten().tolist():
                    why = f"{name}: {self.how} accepts no scores below 0, got {column[index].item():g}"
                    reasons[index] = "; ".join(filter(None, [reasons.get(index), why]))
        options = {"discount": self.discount} if self.how == "lower_bound" else {}
        return getattr(combine, self.how)(values, weights, **options)

    def _through_gates(self, total: Tensor, scaled: Mapping[str, Tensor], reasons: dict[int, str]) -> Tensor:
        import torch

        gates = {name: part.gate for name, part in self.parts.items() if part.gate is not None}
        for name, threshold in gates.items():
            values = scaled[name].detach()
            failed = values < threshold
            if self.gated is None:
                for index in failed.nonzero().flatten().tolist():
                    why = f"{name}: {values[index].item():g} is below the gate at {threshold:g}"
                    reasons[index] = "; ".join(filter(None, [reasons.get(index), why]))
            missing = total.isnan() | values.isnan()
            replaced = torch.where(failed, math.nan if self.gated is None else self.gated, total)
            total = torch.where(missing, math.nan, replaced)
        return total

    def _range(self, limits: Mapping[str, Span]) -> Span:
        """Lowest and highest value, as far as the members' ranges give them."""
        lows, highs = zip(*limits.values(), strict=True)
        weights = [self.parts[name].weight for name in limits]
        if self.how == "weighted":
            ends = [(w * a, w * b) if w else (0.0, 0.0) for w, a, b in zip(weights, lows, highs, strict=True)]
            span = sum(min(pair) for pair in ends), sum(max(pair) for pair in ends)
        elif self.how == "product":
            span = (
                math.prod(max(low, 0.0) ** w for low, w in zip(lows, weights, strict=True)),
                math.prod(high**w if high >= 0 else math.nan for high, w in zip(highs, weights, strict=True)),
            )
        elif self.how in POSITIVE:
            span = max(min(lows), 0.0), max(highs)
        else:
            span = -math.inf, max(highs) if self.how == "lower_bound" else math.inf
        if self.gated is None or all(part.gate is None for part in self.parts.values()):
            return span
        return min(span[0], self.gated), max(span[1], self.gated)


def _scale(name: str, part: Member, reward: Reward) -> Callable[[Tensor, Tensor], Tensor]:
    """``(values [N], groups [N]) -> [N]`` on the scale a member asks for; NaN stays NaN."""
    low, high = reward.range
    if part.normalise == "range":
        if not all(map(math.isfinite, reward.range)):
            raise RewardError(f"mixture: {name!r} has no finite range; normalise it by group, batch or reference")
        return lambda values, groups: (values - low) / (high - low)
    if part.normalise == "group":
        return lambda values, groups: standardised(values, groups.to(values.device))
    if part.normalise == "batch":
        return lambda values, groups: standardised(values, groups.new_zeros(len(groups)).to(values.device))
    if part.normalise == "none":
        return lambda values, groups: values
    known = part.reference
    found = load(known, part.reward.model_dump(mode="json")) if isinstance(known, str) else known
    assert found is not None
    if part.normalise == "reference":
        return lambda values, groups: found.standardise(values)
    if len(found.quantiles) < 2:
        raise RewardError(f"mixture: {name!r}: {known} holds no quantiles")
    return lambda values, groups: found.rank(values)


def _joined(scores: Mapping[str, Scores]) -> dict[int, str]:
    """The reasons of all members why a sample has no score."""
    reasons: dict[int, str] = {}
    for name, member in scores.items():
        for index, why in member.reasons.items():
            reasons[index] = "; ".join(filter(None, [reasons.get(index), f"{name}: {why}"]))
    return reasons


def _named_parts(scores: Mapping[str, Scores]) -> dict[str, Tensor]:
    """Raw scores of the members, and their parts below their names."""
    raw: dict[str, Tensor] = {}
    for name, member in scores.items():
        raw |= {name: member.values, **{f"{name}/{key}": value for key, value in member.parts.items()}}
    return raw


def _apart(name: str, reward: Reward) -> list[str]:
    """Names of a member's scores that depend on one sample alone."""
    return [name] if reward.scope == "sample" else [f"{name}/{part}" for part in reward.apart]


def _limits(part: Member, span: Span) -> Span:
    """Lowest and highest normalised score of a member."""
    return {"none": span, "range": (0.0, 1.0), "quantile": (0.0, 1.0)}.get(part.normalise, (-math.inf, math.inf))
