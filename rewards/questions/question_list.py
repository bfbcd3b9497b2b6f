"""Share of a prompt's own yes-or-no questions that a judge affirms: DSG (arXiv 2310.18235), DPG-Bench (2403.05135)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rewards.base import Scores
from rewards.judges.asking import Judge, Question, answered, question, shown
from rewards.judges.models import Needs
from rewards.judges.settings import JudgeRewardSettings
from rewards.judges.verdicts import share

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from alignflow.lazy import lazy

    torch = lazy("torch")


class QuestionList(JudgeRewardSettings):
    """Mean answer to the questions in a prompt's metadata; a question whose parent is denied counts as denied.

    The key ``questions`` of the metadata holds texts, or objects with ``question`` and optionally ``criterion``,
    ``id``, ``category``, ``parents`` (ids) and ``weight``, 1 if not given. Parts are the means by category; a question
    of weight 0 counts for these alone.
    """

    needs: ClassVar[Needs] = "answers"
    kind: Literal["question_list"] = Field("question_list", description="share of a prompt's questions answered yes")
    template: str = Field(
        "{question} Please answer yes or no.",
        description="question to the judge, with {question}, and {criterion} where questions have one",
    )
    answer: Literal["yes_or_no", "probability", "graded"] = Field(
        "yes_or_no",
        description="value of an answer: yes_or_no = 1 if yes is likelier than no, else 0 | probability = P(yes) | "
        "graded = 1, 1/2 or 0 for the likeliest of the letters A, B and C, which the template must explain",
    )

    @property
    def answers(self) -> tuple[tuple[str, ...], ...]:
        """Yes and no; graded answers from the worst to the best."""
        return (("C",), ("B",), ("A",)) if self.answer == "graded" else super().answers

    @property
    def wants(self) -> tuple[str, ...]:
        """The questions."""
        return ("metadata",)

    def gradient(self) -> bool:
        """Whether gradients flow: only with probabilities."""
        return super().gradient() and self.answer == "probability"

    def score(  # type: ignore[override]
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, metadata: Sequence[Any]
    ) -> Scores:
        """All questions of all samples, in one batch for the judge."""
        lists, reasons = [], {}
        for sample, one in enumerate(metadata):
            try:
                lists.append(questions_of(one))
            except ValueError as error:
                lists.append([])
                reasons[sample] = str(error)
        asked: list[Question] = []
        for one, found in zip(media, lists, strict=True):
            images = shown(one, self.frames)
            asked += [
                question(self.template, "", *images, question=each["question"], criterion=each["criterion"])
                for each in found
            ]
        replies = answered(judge, asked, self.answers)
        values = self.valued(replies.values)
        scores, start = [], 0
        names = sorted({each["category"] for found in lists for each in found if each["category"]})
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for sample, found in enumerate(lists):
            rows = range(start, start + len(found))
            start += len(found)
            if lost := [row for row in rows if row in replies.reasons]:
                reasons[sample] = replies.reasons[lost[0]]
            known = with_parents(values[rows.start : rows.stop], found)
            scores.append(weighted(known, found))
            for name in names:
                own = [row for row, each in enumerate(found) if each["category"] == name]
                parts[name].append(known[own].mean())
        return Scores(torch.stack(scores), reasons, {name: torch.stack(column) for name, column in parts.items()})

    def valued(self, log_probabilities: Tensor) -> Tensor:
        """``[Q, K]`` log-probabilities of the answers -> ``[Q]`` in [0, 1], NaN if there are none."""
        if self.answer == "probability":
            return share(log_probabilities)
        if self.answer == "graded":
            found = log_probabilities.argmax(1).to(log_probabilities) / 2
            return found.masked_fill(log_probabilities.isnan().any(1), torch.nan)
        yes = share(log_probabilities)
        return (yes > 0.5).to(yes).masked_fill(yes.isnan(), torch.nan)


def weighted(values: Tensor, questions: Sequence[dict[str, Any]]) -> Tensor:
    """Mean of ``[Q]`` answers by the questions' weights; answers of weight 0 are left out."""
    counted = [row for row, each in enumerate(questions) if each["weight"] > 0]
    weights = values.new_tensor([questions[row]["weight"] for row in counted])
    return (values[counted] * weights).sum() / weights.sum()


def questions_of(metadata: Any) -> list[dict[str, Any]]:
    """The questions of a prompt, each with ``id``, ``question``, ``criterion``, ``category``, ``parents``, ``weight``.

    Raises:
        ValueError: there are none, or one is malformed; the message names it.
    """
    given = metadata.get("questions") if isinstance(metadata, dict) else None
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError('the prompt has no list of texts under "questions"')
    found: list[dict[str, Any]] = []
    for number, one in enumerate(given, 1):
        row = {"question": one} if isinstance(one, str) else dict(one) if isinstance(one, dict) else {}
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise ValueError(f"question {number} has no text")
        found.append({"id": number, "criterion": "", "category": "", "parents": [], "weight": 1.0, **row})
    weights = [each["weight"] for each in found]
    if not all(isinstance(one, int | float) and 0 <= one < float("inf") for one in weights) or not any(weights):
        raise ValueError("weights of questions are numbers of 0 or more, at least one of them above 0")
    known = {each["id"] for each in found}
    for number, each in enumerate(found, 1):
        if unknown := [parent for parent in each["parents"] if parent not in known]:
            raise ValueError(f"question {number} has the parent {unknown[0]}, which is not a question of the prompt")
    return found


def with_parents(values: Tensor, questions: Sequence[dict[str, Any]]) -> Tensor:
    """Answers ``[Q]`` in [0, 1], each 0 if one of its parents is below 1/2, or is 0 for this reason.

    As in DPG-Bench's ``compute_dpg_bench.py``, in the order of the questions.
    """
    kept: dict[Any, bool] = {}
    yes = {each["id"]: float(value) >= 0.5 for each, value in zip(questions, values, strict=True)}
    for each in questions:
        kept[each["id"]] = all(yes[parent] and kept.get(parent, True) for parent in each["parents"])
    mask = torch.tensor([kept[each["id"]] for each in questions], device=values.device)
    return values * mask.to(values)
