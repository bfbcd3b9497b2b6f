"""Warnings about a run: a title and a text for each problem found in its rows."""

from __future__ import annotations

from collections import Counter

from align.report.changes import Change, between, change, comparable, trained_on_gold
from align.report.charts import short
from align.report.intervals import mean
from align.report.reading import Run

MANY_FLAT_GROUPS = 0.3
"""Share of groups without differences in reward above which a warning is shown."""
RATIO_TOLERANCE = 1e-3
KEPT_DIVERSITY = 0.5
"""Share of the first rollouts' diversity below which the samples of a prompt have become alike."""

Warned = tuple[str, str]


def warnings(run: Run, gold: Change | None, reward: Change | None) -> list[Warned]:
    """All of them, most important first."""
    found = [
        _hacking(run, gold, reward),
        _uniform(run, reward),
        _past_best(run, gold),
        _flat(run),
        _ratio(run),
        _lost(run),
        _unscored(run),
    ]
    return [one for one in found if one]


def _hacking(run: Run, gold: Change | None, reward: Change | None) -> Warned | None:
    if gold is None or reward is None or reward.delta <= 0 or gold.delta >= 0 or trained_on_gold(run):
        return None
    sure = gold.direction == "down" and reward.direction == "up"
    up, down = reward.value(reward.delta, True), gold.value(gold.delta, True)
    if not sure:
        within = " and ".join(
            name
            for name, one in (("gold", gold), ("the trained reward", reward))
            if one.direction not in ("up", "down")
        )
        return "Possible reward hacking", (
            f"The trained reward went up ({up}) while gold went down ({down}); the change of {within} is within noise."
        )
    return "Reward hacking", f"The trained reward went up ({up}) while gold went down ({down}). {_against_hacking(run)}"


def _uniform(run: Run, reward: Change | None) -> Warned | None:
    """Samples of a prompt that have become alike while the reward rose."""
    if reward is None or reward.direction != "up":
        return None
    values = [value for value in run.curve("diversity")[1] if value]
    few = max(1, len(values) // 8)
    if len(values) < 2:
        return None
    first, last = mean(values[:few]), mean(values[-few:])
    if last >= KEPT_DIVERSITY * first:
        return None
    return "Diversity collapse", (
        f"The trained reward went up ({reward.value(reward.delta, True)}) while the pixel spread within the groups "
        f"fell from {short(first)} to {short(last)}. {_against_hacking(run)}"
    )


def hacked(run: Run) -> str | None:
    """Signs of reward hacking in the last evaluation: the trained reward rose, and gold fell or diversity collapsed.

    Both changes of scores count where their 95 % intervals exclude zero. None if there is no sign of it.
    """
    gold, reward = change(run, "gold"), change(run, "reward") if comparable(run) else None
    fell = _hacking(run, gold, reward)
    told = fell[1] if fell is not None and fell[0] == "Reward hacking" else None
    alike = _uniform(run, reward)
    return told or (alike[1] if alike else None)


def _against_hacking(run: Run) -> str:
    """Remedies that this run's config has."""
    tries = ["stop earlier"]
    if "kl" in run.section("recipe"):
        tries.append("raise recipe.kl, the penalty towards the base")
    mixed = run.kind_of("reward") == "mixture"
    tries.append("change the weights of the mixture" if mixed else "train on a mixture with a second reward")
    text = ", or ".join([", ".join(tries[:-1]), tries[-1]])
    return f"{text[0].upper()}{text[1:]}."


def _past_best(run: Run, gold: Change | None) -> Warned | None:
    """A middle evaluation better than the last by more than the noise of their difference."""
    if gold is None or gold.steps is None:
        return None
    steps, values = run.held_out(gold.name)
    known = [(value, step) for step, value in zip(steps, values, strict=True) if value is not None]
    _, step = max(known)
    if step in (known[-1][1], known[0][1]):
        return None
    since = between(run, gold.name, int(step), int(known[-1][1]))
    if since is None or since.direction != "down":
        return None
    kept = (run.folder / "checkpoints" / f"step-{int(step):06d}").is_dir()
    where = "Its checkpoint is still in the run." if kept else "Its checkpoint is not in the run any more."
    return "Past its best", (
        f"Gold was best at step {step:,.0f} ({since.value(since.before)}) and is lower now "
        f"({since.value(since.after)}); the 95 % interval of the difference excludes zero. {where}"
    )


def _flat(run: Run) -> Warned | None:
    flat = [value for value in run.flat_groups()[1] if value is not None]
    share = sum(flat) / len(flat) if flat else 0.0
    if not run.groups or share <= MANY_FLAT_GROUPS:
        return None
    online = run.section("rollout").get("kind", "online") == "online"
    if not online or not _compares(run):
        return None
    return (
        "Many groups without contrast",
        f"On average over the training steps, no two samples of {share:.0%} of the groups scored differently, so "
        "they gave no gradient. Use more samples per group, more varied prompts or a finer reward.",
    )


def _compares(run: Run) -> bool:
    """Whether samples of equal reward give no gradient; weighted regression trains on them too."""
    recipe = run.section("recipe")
    return recipe.get("kind") != "flow_rwr" or bool(recipe.get("control_variate"))


def _ratio(run: Run) -> Warned | None:
    ratio = next((value for value in run.curve("ratio")[1] if value is not None), None)
    if ratio is None or abs(ratio - 1) <= RATIO_TOLERANCE:
        return None
    return (
        "Off policy from the start",
        f"The first ratio is {short(ratio, 5)} where it must be 1: the log-probabilities of the rollout and of the "
        "update disagree. Look for a different precision, guidance or dropout between the two.",
    )


def _lost(run: Run) -> Warned | None:
    """Scores that training had to go without."""
    steps, missing = run.curve("missing")
    lost = [value for value in missing if value]
    if not lost:
        return None
    why = Counter(reason.partition(" x ")[2] or reason for row in run.train for reason in _listed(row.get("reasons")))
    return (
        "Scores were missing in training",
        f"{short(sum(lost))} samples in {len(lost):,} of {len(steps):,} training steps had no score and were left out"
        f"{_because(list(why))}.",
    )


def _listed(reasons: object) -> list[str]:
    return [str(one) for one in reasons] if isinstance(reasons, list) else []


def _unscored(run: Run) -> Warned | None:
    """Held-out prompts without a score, by score: how many prompts, at how many evaluations, and why."""
    words: list[str] = []
    why: dict[str, None] = {}
    for name in run.score_names():
        counts = [(int(n), row) for row, n in zip(run.evals, run.held_out(name, "missing")[1], strict=True) if n]
        if not counts:
            continue
        least, most = min(n for n, _ in counts), max(n for n, _ in counts)
        number = f"{most}" if least == most else f"{least} to {most}"
        prompts = {row.get("prompts") for _, row in counts}
        of = f" of {prompts.pop():,}" if len(prompts) == 1 and None not in prompts else ""
        noun = "prompt" if (of or number) in (" of 1", "1") else "prompts"
        words.append(f"{name} for {number}{of} {noun} in {len(counts)} of {len(run.evals)} evaluations")
        for _, row in counts:
            why |= {one.reasons[name]: None for one in run.by_prompt(int(row["step"])) if name in one.reasons}
    if not words:
        return None
    text = "; ".join(words)
    return (
        "Held-out scores were missing",
        f"{text[0].upper()}{text[1:]}{_because(list(why))}. Means are over the prompts that have a score.",
    )


def _because(reasons: list[str], most: int = 2) -> str:
    return f": {'; '.join(reasons[:most])}{'; ...' if len(reasons) > most else ''}" if reasons else ""
