"""The result that a search has to beat: best-of-N with as many network calls as the search spent on each prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from align.config.sampling import Sampler
from align.search.budget import Budget
from align.search.driver import spend
from align.search.methods.best_of_n import BestOfN
from align.search.results import Found
from align.search.settings import SearchOnly
from align.search.task import Task


def plain_sampler(sampler: Sampler) -> Sampler:
    """A search's sampler without noise between its steps: that of plain samples and of best-of-N."""
    return sampler.model_copy(update={"kind": "ode", "noise_level": None}) if sampler.stochastic else sampler


def samples_for(calls: float, each: int, limit: int | None) -> int:
    """Samples that ``calls`` network calls pay for, rounded to whole samples within the budget, at least one.

    Args:
        calls: what the search spent on a prompt.
        each: network calls of one sample.
        limit: network calls in the budget of a prompt; None = no limit.
    """
    wanted = max(1, int(calls / each + 0.5)) if calls else 0
    return wanted if limit is None else min(wanted, limit // each)


def best_of_n(
    task_of: Callable[[Sequence[int], SearchOnly], Task], found: Sequence[Found], sampler: Sampler, budget: Budget
) -> list[Found]:
    """Independent samples of the noises after each prompt's first, which is the plain sample's.

    The plain sample is a candidate of both sides and counted on neither, so both have the same network calls.

    Args:
        task_of: makes the task of some of the prompts, by their places in ``found``.
        found: what the search found; says how much each prompt cost.
        sampler: of the plain samples.
        budget: of the search.

    Returns:
        one result per prompt, in order; one whose search spent nothing has no candidate.
    """
    calls = sampler.steps * (1 if sampler.guidance == 1.0 else 2)
    groups: dict[int, list[int]] = {}
    for place, one in enumerate(found):
        groups.setdefault(samples_for(one.spent["network_calls"], calls, budget.network_calls), []).append(place)
    results = {place: Found(one.prompt, one.number) for place, one in enumerate(found)}
    for count, places in groups.items():
        if count:
            settings = SearchOnly(search=BestOfN(n=count, sampler=sampler), budget=Budget(network_calls=count * calls))
            task = task_of(places, settings)
            task.begin(1)  # the plain sample's noise
            results |= dict(zip(places, spend(settings.search, task), strict=True))
    return [results[place] for place in range(len(found))]
