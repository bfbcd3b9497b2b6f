"""RewardDance (arXiv 2509.08826): P(yes) that a sample is better than a reference of the same prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from rewards.base import Scope, Scores
from rewards.combine import groups_of
from rewards.judges.asking import Judge, Question, answered, per_sample, two
from rewards.judges.models import Needs
from rewards.judges.settings import JudgeRewardSettings
from rewards.judges.verdicts import best, share

if TYPE_CHECKING:
    from torch import Tensor

TEMPLATE = (
    'Both were made for "{prompt}". Is {medium} 1 better than {medium} 2, in what it shows and in how it is made? '
    "Answer yes or no."
)


class RewardDance(JudgeRewardSettings):
    """P(yes, better than a reference): the best of the prompt's samples, or the prompt's image.

    References are without gradient. ``best`` of a group are those that win most of all comparisons in both orders.
    """

    needs: ClassVar[Needs] = "answers"
    taught: ClassVar[bool] = True
    kind: Literal["reward_dance"] = Field("reward_dance", description="P(better than a reference)")
    template: str = Field(TEMPLATE, description="question, with {prompt}; the sample is shown first")
    reference: Literal["group", "image"] = Field(
        "group",
        description="group = the best of the prompt's own samples | image = the image that comes with the prompt",
    )
    best: int = Field(2, ge=1, description="references taken from a group; a sample is never compared with itself")

    @property
    def scope(self) -> Scope:
        """A group chooses its references together."""
        return "group" if self.reference == "group" else "sample"

    @property
    def wants(self) -> tuple[str, ...]:
        """The reference, where it comes with the prompt."""
        return ("image",) if self.reference == "image" else ()

    def score(
        self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None, image: Tensor | None = None
    ) -> Scores:
        """One question per sample and reference, after those that choose the references."""
        if image is None:
            pairs = self._chosen(judge, media, prompts, group)
            references = [media[j].detach() for _, j in pairs]
        else:
            pairs = [(i, i) for i in range(len(prompts))]
            references = [one.detach() for one in image]
        owners = [i for i, _ in pairs]
        asked = [self._ask(media[i], other, prompts[i]) for i, other in zip(owners, references, strict=True)]
        found = answered(judge, asked, self.answers)
        return per_sample(
            share(found.values),
            owners,
            len(prompts),
            found.reasons,
            {"answered": found.values.exp().sum(1)},
            alone="no other sample of its prompt to be the reference",
        )

    def _chosen(self, judge: Judge, media: Tensor, prompts: list[str], group: Tensor | None) -> list[tuple[int, int]]:
        """(sample, reference), for every sample and every reference of its group but itself."""
        import torch

        numbers = groups_of(prompts, group)
        chosen = []
        for number in numbers.unique().tolist():
            rows = (numbers == number).nonzero().flatten().tolist()
            meet = [(a, b) for a in range(len(rows)) for b in range(len(rows)) if a != b]
            with torch.no_grad():
                asked = [self._ask(media[rows[a]], media[rows[b]], prompts[rows[a]]) for a, b in meet]
                first = torch.full((len(rows), len(rows)), torch.nan)
                if meet:
                    first[tuple(torch.tensor(meet).T)] = share(answered(judge, asked, self.answers).values).cpu()
            tops = [rows[place] for place in best(first, self.best)]
            # a lone reference has none but the runner-up to be compared with
            spare = [rows[place] for place in best(first, self.best + 1)][self.best :]
            chosen += [(i, j) for i in rows for j in ([top for top in tops if top != i] or spare)]
        return chosen

    def lessons(self, prompt: str, chosen: Tensor, rejected: Tensor) -> list[tuple[Question, int]]:
        """Yes with the chosen first, no with the rejected first."""
        return [(self._ask(chosen, rejected, prompt), 0), (self._ask(rejected, chosen, prompt), 1)]

    def _ask(self, sample: Tensor, reference: Tensor, prompt: str) -> Question:
        return two(self.template, sample, reference, prompt, self.frames)
