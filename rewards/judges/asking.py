"""Questions to a judge, and the scores of samples from its replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from alignflow.lazy import lazy
from rewards.base import Scores
from rewards.frames import middles
from rewards.judges.models import Needs
from rewards.judges.replies import ReplyError, fill
from rewards.judges.verdicts import both_orders
from rewards.texts import writable

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


Content: TypeAlias = "str | Tensor"


@dataclass(frozen=True)
class Question:
    """Input of a judge, in order.

    Args:
        content: texts, and images ``[3, H, W]`` in [0, 1] of any size.
        refused: why it cannot be asked, or "".
    """

    content: tuple[Content, ...]
    refused: str = ""


@dataclass(frozen=True)
class Replies:
    """Answers to Q questions.

    Args:
        values: a tensor with Q rows, or Q texts; NaN or None if there is a reason.
        reasons: question -> why there is none.
    """

    values: Any
    reasons: Mapping[int, str] = field(default_factory=dict)


class Judge(Protocol):
    """A vision-language model. Any object with these methods can be a judge."""

    differentiable: bool

    def fingerprint(self) -> str:
        """Digest of its weights, "" where they are not known."""

    def ready(self, needs: Needs, answers: Sequence[Sequence[str]]) -> None:
        """Raises RewardError if it cannot give what is needed."""

    def answers(self, questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> Replies:
        """``[Q, K]`` log-probability that the reply begins with an answer; an answer's spellings are summed."""

    def likelihoods(self, questions: Sequence[Question], replies: Sequence[str]) -> Replies:
        """``[Q, 2]``: log-likelihood of each question's reply, its number of tokens."""

    def write(self, questions: Sequence[Question], longest: int) -> Replies:
        """Q replies, the likeliest token each time, ``longest`` tokens at most."""


def shown(media: Tensor, frames: int | None = None) -> list[Tensor]:
    """The images ``[3, H, W]`` of a sample ``[3, H, W]`` or ``[F, 3, H, W]``."""
    return [media] if media.ndim == 3 else [media[index] for index in middles(len(media), frames)]


def question(template: str, prompt: str, *content: Content, **values: object) -> Question:
    """``content``, then the template with ``{prompt}`` and ``values`` in it.

    Not to be asked: an empty prompt that would be shown, images with NaN or infinity.
    """
    images = [part for part in content if isinstance(part, torch.Tensor)]
    text = fill(template, prompt=writable(prompt), **values)
    if "{prompt}" in template and not prompt.strip():
        return Question((*content, text), "the prompt is empty, and the question is about it")
    if not all(bool(image.isfinite().all()) for image in images):
        return Question((*content, text), "the media hold NaN or infinity")
    return Question((*content, text))


def answered(judge: Judge, questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> Replies:
    """:meth:`Judge.answers` of those that can be asked."""
    return _rows(questions, len(answers), lambda live, numbers: judge.answers(live, answers))


def echoed(judge: Judge, questions: Sequence[Question], replies: Sequence[str]) -> Replies:
    """:meth:`Judge.likelihoods` of those that can be asked."""
    return _rows(questions, 2, lambda live, numbers: judge.likelihoods(live, [replies[i] for i in numbers]))


def written(
    judge: Judge, questions: Sequence[Question], longest: int, read: Callable[[str], float | Sequence[float]]
) -> Replies:
    """``read`` of the reply to each question that can be asked, as ``[Q]`` or ``[Q, K]``; ReplyError is a reason."""
    replies = texts(judge, questions, longest)
    reasons = dict(replies.reasons)
    found: dict[int, Any] = {}
    for i, text in enumerate(replies.values):
        if i not in reasons:
            try:
                found[i] = read(text)
            except ReplyError as error:
                reasons[i] = str(error)
    width = next((len(value) for value in found.values() if isinstance(value, Sequence)), None)
    nothing = torch.nan if width is None else [torch.nan] * width
    return Replies(torch.tensor([found.get(i, nothing) for i in range(len(questions))]), reasons)


def texts(judge: Judge, questions: Sequence[Question], longest: int) -> Replies:
    """:meth:`Judge.write` of those that can be asked."""
    live, reasons = _live(questions)
    replies = judge.write([questions[i] for i in live], longest) if live else Replies([])
    said = dict(zip(live, replies.values, strict=True))
    reasons |= {live[i]: why for i, why in replies.reasons.items()}
    return Replies([said.get(i) for i in range(len(questions))], reasons)


def _rows(questions: Sequence[Question], width: int, ask: Callable[[list[Question], list[int]], Replies]) -> Replies:
    live, reasons = _live(questions)
    values = torch.full((len(questions), width), torch.nan)
    if live:
        replies = ask([questions[i] for i in live], live)
        found = replies.values
        rows = torch.tensor(live, device=found.device)
        values = values.to(found.device).index_copy(0, rows, found.float())
        reasons |= {live[i]: why for i, why in replies.reasons.items()}
    return Replies(values, reasons)


def _live(questions: Sequence[Question]) -> tuple[list[int], dict[int, str]]:
    reasons = {i: asked.refused for i, asked in enumerate(questions) if asked.refused}
    return [i for i in range(len(questions)) if i not in reasons], reasons


def per_sample(
    values: Tensor,
    owners: Sequence[int],
    count: int,
    reasons: Mapping[int, str],
    parts: Mapping[str, Tensor] | None = None,
    alone: str = "there was nothing to ask about it",
) -> Scores:
    """Scores of ``count`` samples: each the mean over its values, missing if one of them is.

    Args:
        values: ``[Q]``; ``owners[q]`` is the sample ``values[q]`` belongs to.
        reasons: index of a value -> why it is NaN.
        parts: name -> ``[Q]``, averaged alike.
        alone: why a sample that owns no value has no score.
    """
    rows = torch.tensor(list(owners), dtype=torch.long, device=values.device)
    shares = torch.zeros(count, device=values.device).index_add(0, rows, torch.ones_like(values))

    def mean(column: Tensor) -> Tensor:
        return torch.zeros(count, device=values.device).index_add(0, rows, column.to(values)) / shares  # 0 / 0 is NaN

    why = dict.fromkeys((shares == 0).nonzero().flatten().tolist(), alone)
    for index, reason in reasons.items():
        why.setdefault(owners[index], reason)
    return Scores(mean(values), why, {name: mean(column.detach()) for name, column in (parts or {}).items()})


def one_each(values: Tensor, reasons: Mapping[int, str], parts: Mapping[str, Tensor] | None = None) -> Scores:
    """:func:`per_sample` of samples that have one value each."""
    return per_sample(values, range(len(values)), len(values), reasons, parts)


def tournament(pairs: Sequence[tuple[int, int]], first: Tensor, reasons: Mapping[int, str], count: int) -> Scores:
    """Scores of samples that met: the mean share of their wins, with the judge's position bias.

    Args:
        pairs: M matches (i, j).
        first: ``[2 M]`` P(the first shown is better), of every match with i first and then with j first.
        reasons: index into ``first`` -> why it is NaN.
    """
    win, bias = both_orders(first[0::2], first[1::2])
    why = {index // 2: reason for index, reason in reasons.items()}
    why |= {len(pairs) + index: reason for index, reason in why.items()}
    owners = [i for i, _ in pairs] + [j for _, j in pairs]
    return per_sample(
        torch.cat([win, 1 - win]),
        owners,
        count,
        why,
        {"position_bias": torch.cat([bias, bias])},
        alone="no other sample of its prompt to compare it with",
    )


def each_sample(
    template: str,
    media: Tensor,
    prompts: Sequence[str],
    frames: int | None,
    image: Tensor | None = None,
    **values: object,
) -> list[Question]:
    """A question per sample, its source first if there is ``image [N, 3, H, W]``; ``{medium}`` is image or video."""
    medium = "image" if media.ndim == 4 else "video"
    return [
        question(template, prompt, *_source(image, i), *shown(media[i], frames), medium=medium, **values)
        for i, prompt in enumerate(prompts)
    ]


def two(
    template: str, first: Tensor, second: Tensor, prompt: str, frames: int | None, source: Sequence[Content] = ()
) -> Question:
    """A question about two samples, images or videos; ``{medium}`` is Image or Video."""
    medium = "Image" if first.ndim == 3 else "Video"
    content: list[Content] = [*source, f"{medium} 1: ", *shown(first, frames), f"{medium} 2: ", *shown(second, frames)]
    return question(template, prompt, *content, medium=medium)


def compared(
    template: str,
    pairs: Sequence[tuple[int, int]],
    media: Tensor,
    prompts: Sequence[str],
    frames: int | None,
    image: Tensor | None = None,
) -> list[Question]:
    """Two questions per pair: with the one first, with the other first."""
    return [
        two(template, media[a], media[b], prompts[i], frames, ["Source: ", *source] if source else ())
        for i, j in pairs
        for source in [_source(image, i)]
        for a, b in ((i, j), (j, i))
    ]


def _source(image: Tensor | None, sample: int) -> list[Tensor]:
    return [] if image is None else [image[sample]]
