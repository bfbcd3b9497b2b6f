"""A vision-language model that writes: sampled replies with a seed each, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from align.rewriting.writer import picked, seeded
from alignflow.errors import DataError
from rewards.judges.asking import Question
from rewards.judges.local import LocalJudge


class Reasoner:
    """A local judge as :class:`align.rewriting.learner.Learner` trains it; its questions contain images."""

    def __init__(self, judge: LocalJudge) -> None:
        self.judge, self.model, self.chunk = judge, judge.model, judge.settings.chunk
        added = judge.tokenizer.added_tokens_decoder.items()
        self.banned = [number for number, token in added if token.special and number not in (*judge.ends, self.end)]
        """Control tokens, such as the place of an image, which a reply does not hold: they have no probability."""

    @property
    def end(self) -> int:
        """The token that ends a reply."""
        return int(self.judge.tokenizer.eos_token_id)

    def encode(self, reply: str) -> list[int]:
        """Tokens of a whole reply, its end included; control tokens inside it are plain characters."""
        return [*self.judge.encode(self.judge.plain(reply)), self.end]

    def text(self, reply: Sequence[int]) -> str:
        """The words of a reply's tokens."""
        return str(self.judge.tokenizer.decode(list(reply), skip_special_tokens=True))

    def sample(
        self, asked: Sequence[Question], seeds: Sequence[int], temperature: float, longest: int
    ) -> list[list[int]]:
        """Tokens of a reply to each question, its end included where it was reached; it depends on its own seed alone.

        Raises:
            DataError: a question with its reply is longer than the judge reads.
        """

        def choose(rows: list[int]) -> Drawn:
            device = self.model.device
            chance = torch.stack([torch.rand(longest, generator=seeded(seeds[row])) for row in rows])
            return Drawn(chance.to(device), temperature, self.banned)

        reasons: dict[int, str] = {}
        found = self.judge.reply_tokens(asked, longest, reasons, choose)
        if reasons:
            raise DataError(f"{next(iter(reasons.values()))}; set a smaller reply.longest")
        return [reply or [self.end] for reply in found]

    def logps(
        self, asked: Sequence[Question], replies: Sequence[list[int]], temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See :class:`align.rewriting.learner.Writes`; a temperature of 0 counts as 1.

        Raises:
            DataError: a question with its reply is longer than the judge reads.
        """
        reasons: dict[int, str] = {}
        parts = list(self.judge.reply_logs(asked, replies, reasons, temperature or 1.0, self.banned))
        if reasons:
            raise DataError(next(iter(reasons.values())))
        longest = max(map(len, replies))
        logs = torch.cat([torch.nn.functional.pad(one, (0, longest - one.shape[1])) for _, one, _ in parts])
        lengths = torch.cat([length for _, _, length in parts])
        return logs, torch.arange(longest, device=logs.device) < lengths[:, None]


class Drawn:
    """Picks each next token at ``chance [n, longest]`` of the cumulative distribution, or the likeliest at 0."""

    def __init__(self, chance: Tensor, temperature: float, banned: Sequence[int] = ()) -> None:
        self.chance, self.temperature, self.place = chance, temperature, 0
        self.banned = torch.tensor(list(banned), dtype=torch.long, device=chance.device)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with the picked token alone above minus infinity."""
        allowed = scores.float().index_fill(1, self.banned, -torch.inf)
        token = picked(allowed, self.temperature, self.chance[:, self.place])
        self.place += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)
