"""Rows of a preference table with their features, for training a reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from align.data.inputs import pixels_of
from align.data.media import to_tensor
from align.data.pair_table import Judged, labels_of, numbered
from align.data.prompts import PAIR
from alignflow.errors import DataError
from rewards.base import RewardError
from rewards.training.scorer import Scorer

CHUNK = 64
"""Images per pass through the backbone without gradient."""
Side = tuple[Tensor, Tensor]
"""Features of the images ``[M, D]`` and of the prompts of one side of M pairs."""


class Examples:
    """Rows with their features: computed once if the backbone is frozen, else at every use.

    Args:
        labels: names of the scores that the loss learns from.
        needed: whether the table must have all of them.
    """

    def __init__(
        self, scorer: Scorer, rows: Sequence[Judged], users: Sequence[str], *, frozen: bool, labels: Sequence[str] = (),
        needed: bool = True,
    ) -> None:  # fmt: skip
        self.scorer, self.rows = scorer, rows
        self.sides = PAIR if PAIR[0] in rows[0].prompt.media else ("image",)
        across = any(row.rejected_text != row.prompt.text for row in rows)
        first = [row.prompt.text for row in rows]
        self.prompts = [first, [row.rejected_text for row in rows] if across else first][: len(self.sides)]
        self.outcome = torch.tensor([row.outcome for row in rows], device=scorer.device)
        self.user = torch.tensor(numbered(rows, users), device=scorer.device) if users else None
        known = labels_of(rows, labels, needed) if labels else []
        self.labels = [torch.tensor(side, device=scorer.device) for side in known]
        self.text: list[Tensor] | None = None
        if scorer.fixed_text:
            self.text = [scorer.text(first, CHUNK)]
            self.text += [scorer.text(self.prompts[1], CHUNK) if across else self.text[0]] * (len(self.sides) - 1)
        self.kept: list[Side] | None = None
        if frozen:
            with torch.no_grad():
                parts = [self._read(list(range(i, min(i + CHUNK, len(rows))))) for i in range(0, len(rows), CHUNK)]
            sides = [list(zip(*side, strict=True)) for side in zip(*parts, strict=True)]
            self.kept = [(torch.cat(image), torch.cat(text)) for image, text in sides]

    def __len__(self) -> int:
        return len(self.rows)

    def features(self, pick: Tensor) -> list[Side]:
        """Features of the sides: chosen and rejected, or the one image."""
        if self.kept is not None:
            return [(image[pick], text[pick]) for image, text in self.kept]
        return self._read(pick.tolist())

    def labels_at(self, pick: Tensor) -> tuple[Tensor, Tensor] | None:
        """Labels ``[M, L]`` of both sides, NaN if the table has none."""
        return (self.labels[0][pick], self.labels[1][pick]) if self.labels else None

    def _read(self, numbers: Sequence[int]) -> list[Side]:
        found = []
        for number, side in enumerate(self.sides):
            media = [to_tensor(pixels_of(self.rows[row].prompt, side)) for row in numbers]
            prompts = [self.prompts[number][row] for row in numbers]
            try:
                image = self.scorer.embed(media, prompts, CHUNK)
                text = self.scorer.text(prompts, CHUNK) if self.text is None else self.text[number][list(numbers)]
            except RewardError as error:
                places = ", ".join(str(self.rows[row].prompt.where) for row in numbers[:1])
                raise DataError(f"a row of {len(numbers)} from {places} on cannot be read: {error}") from error
            found.append((image, text))
        return found
