"""Better samples without training: search over noise and paths within a counted budget.

``search(generator, reward, prompts, method, budget)`` is all there is to call; a file of this folder is a method.
Importing the package imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from alignflow.lazy import lazy

if TYPE_CHECKING:
    from align.data.prompts import Prompt
    from align.search.base import Method
    from align.search.budget import Budget
    from align.search.driver import parse
    from align.search.driver import run as drive
    from align.search.results import Found
    from align.search.task import LatentReward
    from generators.base import Generator
    from rewards.base import Reward
else:
    parse, drive = lazy("align.search.driver:parse"), lazy("align.search.driver:run")

__all__ = ["search"]


def search(
    generator: Generator,
    reward: Reward,
    prompts: Sequence[Prompt | str],
    method: Method | str | dict[str, Any],
    budget: Budget | dict[str, Any],
    *,
    seed: int = 0,
    batch: int = 8,
    chunk: int = 64,
    decode_chunk: int = 16,
    keep: int = 4,
    latent_reward: LatentReward | None = None,
    done: Sequence[int] = (),
    on_found: Callable[[Found], None] | None = None,
) -> list[Found]:
    """Search the best sample of every prompt.

    Args:
        reward: reward to optimise; it scores samples one by one, so a mixture may not normalise by group or batch.
        method: settings, their kind alone, or a mapping ``{"kind": ..., ...}``.
        budget: maximum cost per prompt, or a mapping such as ``{"network_calls": 400}``.
        seed: random seed; a prompt's result depends on it and the prompt's place, not on the sizes below.
        batch: prompts searched together; ``chunk`` samples per network call, ``decode_chunk`` per decode, reward call
            and gradient: memory and speed, not results.
        keep: number of best candidates to keep per prompt, in addition to the worst.
        latent_reward: judges unfinished samples, ``(x_t [n, ...], t [n], prompts) -> [n]``, instead of the reward of a
            decoded ``x0_hat``.
        done: numbers of prompts to leave out, as an earlier part of the search found them.
        on_found: called with each result as it comes, so that an interrupt loses only the batch in progress.

    Returns:
        one result per prompt that is not ``done``, in order; without ``best`` where no sample has a score.

    Raises:
        SearchError: a reward without gradients for a method that needs them, a budget below one sample, or not one
            score for any prompt.
        ConfigError: invalid settings of the method or the budget.
        DataError: a prompt lacks an input that the generator or the reward needs.
    """
    return drive(
        generator, reward, prompts, parse(method, budget), seed=seed, batch=batch, chunk=chunk,
        decode_chunk=decode_chunk, keep=keep, latent_reward=latent_reward, done=done, on_found=on_found,
    )  # fmt: skip
