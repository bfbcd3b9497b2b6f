"""The loop around a method: prompts in batches, results as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from align.data.inputs import check_needs, encode
from align.data.prompts import Prompt
from align.search.base import Method
from align.search.budget import BudgetSpent
from align.search.results import Found
from align.search.settings import SearchOnly
from align.search.task import LatentReward, Task
from alignflow.errors import ConfigError, SearchError
from alignflow.explain import explain
from generators.base import Generator
from rewards.base import Reward


def run(
    generator: Generator,
    reward: Reward,
    prompts: Sequence[Prompt | str],
    settings: SearchOnly,
    *,
    seed: int,
    batch: int,
    done: Sequence[int],
    on_found: Callable[[Found], None] | None,
    **options: Any,
) -> list[Found]:
    """Implementation of :func:`align.search.search` with a parsed method and budget."""
    check_reward(settings.search, reward, options.get("latent_reward"))
    asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    check_needs(asked, generator, {"reward": reward})
    todo = [number for number in range(len(asked)) if number not in set(done)]
    results: list[Found] = []
    for first in range(0, len(todo), batch):
        numbers = todo[first : first + batch]
        task = make(generator, reward, [asked[n] for n in numbers], numbers, settings, seed, **options)
        for found in spend(settings.search, task):
            results.append(found)
            if on_found is not None:
                on_found(found)
    if results and all(found.best is None for found in results):
        why = next((found.reason for found in results if found.reason), "no sample was finished")
        raise SearchError(f"no sample of {len(results)} prompts has a score by reward {reward.name!r}: {why}")
    return results


def parse(method: Any, budget: Any) -> SearchOnly:
    """Settings of a method and a budget; raises ConfigError."""
    data = {"search": method, "budget": budget}
    try:
        return SearchOnly.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, SearchOnly, data, {})) from None


def check_reward(method: Method, reward: Reward, latent_reward: LatentReward | None = None) -> None:
    """Raise SearchError for a method that cannot work with this reward."""
    check_alone(reward)
    if method.gradients and not reward.differentiable:
        raise SearchError(method.without_gradient(reward.name))
    if wrong := method.wrong_latent(latent_reward is not None):
        raise SearchError(wrong)


def check_alone(reward: Reward) -> None:
    """Raise SearchError for a reward that compares samples: a search compares scores of separate calls."""
    if reward.scope != "sample":
        raise SearchError(
            f"reward {reward.name!r} compares samples of a {reward.scope} with one another, and a search scores them "
            "apart; take one that scores each sample alone"
        )


def make(
    generator: Generator,
    reward: Reward,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    settings: SearchOnly,
    seed: int,
    **options: Any,
) -> Task:
    """The task of one batch; raises SearchError if its budget does not pay for one plain sample."""
    cond, inputs = encode(generator, prompts, reward.wants)
    texts, sampler = [prompt.text for prompt in prompts], settings.search.sampler
    task = Task(
        generator, reward, cond, texts, numbers, {name: inputs[name] for name in reward.wants}, sampler,
        settings.budget, seed, **options,
    )  # fmt: skip
    task.check(task.cost.sample)
    return task


def spend(method: Method, task: Task) -> list[Found]:
    """Let the method spend the budget; what it found, whatever ended it."""
    try:
        if task.meter.budget.seconds is not None:
            calibrate(task)
        method.search(task)
    except BudgetSpent:
        pass
    for place, found in enumerate(task.found):
        found.close(task.meter.spent(place))
    return task.found


def calibrate(task: Task) -> None:
    """A plain sample: how long things take must be known where time is the limit."""
    task.score(task.sample(task.begin(1), "sample"), alone=True)
