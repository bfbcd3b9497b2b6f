"""Scores of rewrites: a frozen generator renders them, and rewards score the media for the user's own prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from align.data.inputs import check_needs, encode, take
from align.data.prompts import Prompt
from align.maths.seeds import derive
from align.policy.build import build_generator, build_rewards
from align.rewriting.table import Judged, wanted_text
from align.rewriting.words import rouge_l
from align.rollout.rollout import decode, draw
from align.runs import devices
from align.runs.trained import load_policy
from generators.base import Generator
from rewards.base import Reward, wanted

if TYPE_CHECKING:
    from align.rewriting.settings import Caption, Rendering, RewritingSettings


@dataclass(frozen=True)
class Rewrite:
    """A rewrite of a prompt.

    Args:
        prompt: the user's.
        number: the prompt's number, from which the noise of its samples follows.
        text: what the generator is given.
    """

    prompt: Prompt
    number: int
    text: str


class Environment:
    """Generator and rewards.

    Args:
        rewards: ``reward``, which is optimised, and others by name.
    """

    def __init__(
        self,
        generator: Generator,
        rewards: Mapping[str, Reward],
        rendering: Rendering,
        seed: int,
        caption: Caption | None = None,
    ) -> None:
        self.generator, self.rewards, self.rendering, self.seed = generator, dict(rewards), rendering, seed
        self.caption = caption

    @classmethod
    def build(cls, config: RewritingSettings) -> Environment:
        """Generator and rewards of a config; AlignflowError if one cannot be loaded."""
        device = devices.chosen(config.generator.device)
        rewards = build_rewards({"reward": config.reward, **config.gold}, device, config.memory)
        how = config.rendering
        generator = build_generator(config.generator, config.memory, device, kinds=[how.sampler.kind])
        if config.generator_lora is not None:
            place = Path(config.generator_lora).expanduser()
            load_policy(generator, place / "lora" if (place / "lora").is_dir() else place)
        return cls(generator, rewards, how, config.seed, config.caption)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise DataError for a prompt without the images or the wanted text that are needed."""
        check_needs(prompts, self.generator, self.rewards)
        for prompt in prompts:
            self._wanted(prompt)

    def _wanted(self, prompt: Prompt) -> str:
        """Reference text of a prompt; "" if rewrites are not compared."""
        return "" if self.caption is None else wanted_text(prompt, self.caption.column)

    @torch.no_grad()
    def judge(self, rewrites: Sequence[Rewrite], noise: Sequence[int | str], gold: bool = False) -> list[Judged]:
        """Scores of rewrites; those of one prompt share their noise, so that they differ by their words alone.

        Args:
            noise: what the noise is for; other noise for another purpose.
            gold: whether all rewards score, or the optimised one alone.
        """
        found = [Judged() for _ in rewrites]
        too_long = self.generator.too_long([one.text for one in rewrites]) if rewrites else {}
        for row, one in enumerate(rewrites):
            found[row].reason = "the rewrite is empty" if not one.text.strip() else too_long.get(row, "")
            found[row].invalid = bool(found[row].reason)
        fitting = [row for row in range(len(rewrites)) if not found[row].reason]
        rewards = self.rewards if gold else {"reward": self.rewards["reward"]}
        step = max(1, self.rendering.chunk // self.rendering.samples)
        for start in range(0, len(fitting), step):
            rows = fitting[start : start + step]
            self._judge([rewrites[row] for row in rows], [found[row] for row in rows], rewards, noise)
        if self.caption is not None:
            for row in fitting:
                judged, how = found[row], self.caption
                alike = rouge_l(rewrites[row].text, self._wanted(rewrites[row].prompt))
                judged.parts["rouge_l"] = alike
                judged.scores["reward"] = (how.media * judged.score if how.media else 0.0) + how.rouge * alike
        return found

    def _judge(
        self,
        rewrites: Sequence[Rewrite],
        found: Sequence[Judged],
        rewards: Mapping[str, Reward],
        noise: Sequence[int | str],
    ) -> None:
        how = self.rendering
        asked = [replace(one.prompt, text=one.text) for one in rewrites]
        cond, inputs = encode(self.generator, asked, wanted(rewards))
        row = torch.arange(len(rewrites)).repeat_interleave(how.samples)
        seeds = [derive(self.seed, *noise, one.number, k) for one in rewrites for k in range(how.samples)]
        x0, _ = draw(self.generator, cond, seeds, how.sampler, row=row, steps=(), chunk=how.chunk)
        media = decode(self.generator, x0, how.chunk)
        texts = [rewrites[i].prompt.text for i in row.tolist()]
        for name, reward in rewards.items():
            scores = reward(media, texts, None, take(inputs, row))
            columns = {
                name: scores.values,
                **({f"/{k}": v for k, v in scores.parts.items()} if name == "reward" else {}),
            }
            means = {k: v.float().view(-1, how.samples).mean(1).tolist() for k, v in columns.items()}
            for i, one in enumerate(found):
                one.scores[name] = means[name][i]
                one.parts |= {k[1:]: v[i] for k, v in means.items() if k.startswith("/")}
                why = (scores.reasons.get(i * how.samples + k) for k in range(how.samples))
                if name == "reward":
                    one.reason = next(filter(None, why), "")
