"""``alignflow pairs``: preference pairs from a generator, a finished search, or images, videos and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.cli.shared import Prompt, PromptsFile, policies_completed, print_values, prompts_of, settings_of, trained_of
from alignflow.errors import ConfigError
from alignflow.lazy import lazy
from alignflow.terminal import echo
from alignflow.words import count, listing

if TYPE_CHECKING:
    from align.cli import score
    from align.data import prompts as prompt_tables
    from align.evaluation.score_items import items_of
    from align.preference import build_pairs, folder_pairs, pair_sources
    from align.preference.pairing import Pairing
    from rewards.base import RewardSettings
else:
    score, prompt_tables = lazy("align.cli.score"), lazy("align.data.prompts")
    build_pairs, pair_sources = lazy("align.preference.build_pairs"), lazy("align.preference.pair_sources")
    folder_pairs = lazy("align.preference.folder_pairs")
    items_of = lazy("align.evaluation.score_items:items_of")
    Pairing = lazy("align.preference.pairing:Pairing")

POLICY = (
    "best_worst, all, rank_then_sift, agree, threshold_gap, dominance, pass_fail or best_of_n_reference; "
    "docs/howto/tables.md describes them"
)

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE ...",
        help="config or run to sample from (with overrides), folder of a finished search, or images, videos, "
        "folders and tables as for score",
        show_default=False,
    ),
]
Rewards = Annotated[
    list[str] | None,
    typer.Option(help="reward, as for score; may be repeated. Default: the config's, or the scores of the search"),
]
PerPrompt = Annotated[
    int | None,
    typer.Option(min=1, help="maximum number of pairs per prompt; default: all; one for best_worst and pass_fail"),
]
By = Annotated[list[str] | None, typer.Option(help="name of the score that decides: a part of the reward, or a reward")]
Above = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=SCORE", help="threshold_gap: score that a winner has to exceed; may be repeated"),
]
Top = Annotated[
    int, typer.Option(min=1, help="threshold_gap: ranks that may win; best_of_n_reference: samples that win")
]


Chosen = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="folder of the better samples, with --rejected, instead of SOURCE and policy"),
]
Rejected = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="folder of the worse samples, with the names of --chosen")
]


def pairs(
    sources: Sources = None,
    chosen: Chosen = None,
    rejected: Rejected = None,
    policy: Annotated[str, typer.Option(help=POLICY, autocompletion=policies_completed)] = "best_worst",
    reward: Rewards = None,
    prompt: Prompt = None,
    prompts_file: PromptsFile = None,
    count: Annotated[int, typer.Option(min=1, help="samples per prompt, of a config or run")] = 8,
    per_prompt: PerPrompt = None,
    margin: Annotated[float, typer.Option(min=0, help="score gap that a pair has to exceed")] = 0.0,
    by: By = None,
    above: Above = None,
    top: Top = 2,
    passing: Annotated[float | None, typer.Option(help="pass_fail: lowest score that passes")] = None,
    seed: Annotated[int, typer.Option(min=0, help="random seed of samples and random partners")] = 0,
    device: Annotated[str, typer.Option(help="device of the rewards: auto, cpu, cuda, cuda:1 or mps")] = "auto",
    chunk: Annotated[int, typer.Option(min=1, help="samples scored at a time")] = 16,
    copy: Annotated[bool, typer.Option("--copy", help="copy images and videos into the output folder")] = False,
    out: Annotated[Path, typer.Option(help="output folder; an interrupted command continues in it")] = Path("pairs"),
) -> None:
    """Build preference pairs for flow_dpo and reward train: score samples and pair them by a policy.

    The folder holds pairs.parquet, scored.jsonl with the score of every sample, and media/ with generated samples. The
    same command with another --policy forms new pairs from the stored scores.
    """
    how = Pairing(
        policy, tuple(by or ()), per_prompt, margin, dict(_threshold(text) for text in above or ()), top, passing, seed
    )
    how.check()
    asked = prompts_of(prompt, prompts_file)
    if chosen is not None or rejected is not None or not sources:
        _folders(sources, chosen, rejected, asked, how, bool(reward), out, copy)
        return
    source, default = _source(sources, asked, count, seed)
    settings = score.named_rewards(reward) if reward else default
    if not settings and not isinstance(source, pair_sources.Searched):
        raise ConfigError("there is no reward to score with; add --reward KIND")
    try:
        found = build_pairs.build_pairs(
            source, settings, how, out, device=score.device_of(device), chunk=chunk, copy=copy,
            origin=" ".join(sources), say=_say(),
        )  # fmt: skip
    except KeyboardInterrupt:
        echo(f"stopped; run the same command again to continue in {out}", err=True)
        raise typer.Exit(130) from None
    _show(found, out)


def _show(found: dict[str, Any], out: Path) -> None:
    """The counts of a finished command; exit code 2 where files could not be read."""
    unpaired = [f"{number} ({why})" for why, number in found.pop("unpaired").items()]
    shown = {name: value for name, value in found.items() if value or name in ("pairs", "samples")}
    print_values({**shown, "prompts without a pair": ", ".join(unpaired) or None, "table": str(out / "pairs.parquet")})
    if found["unread"]:
        echo(f"error: {found['unread']} of {found['samples']} files could not be read", err=True)
        raise typer.Exit(2)


def _folders(
    sources: list[str] | None, chosen: Path | None, rejected: Path | None, prompts: list[prompt_tables.Prompt],
    how: Pairing, scored: bool, out: Path, copy: bool,
) -> None:  # fmt: skip
    """Pairs of two folders, whose names say which sample is better."""
    if chosen is None or rejected is None:
        lacks = "a SOURCE, or --chosen and --rejected" if chosen is rejected else "both --chosen and --rejected"
        raise ConfigError(f"give {lacks}")
    if sources or scored or how != Pairing(seed=how.seed):
        raise ConfigError("--chosen and --rejected are pairs already: leave out SOURCE, --reward and policies")
    found = folder_pairs.pair_folders(
        chosen, rejected, prompts, out, copy=copy, origin=f"--chosen {chosen} --rejected {rejected}"
    )
    say, alone, unread = _say(), found["alone"], found["unread"]
    for why in unread.values():
        say(why)
    print_values({
        "pairs": found["pairs"],
        "names without a partner": f"{len(alone)} ({listing(alone)})" if alone else None,
        "table": str(out / "pairs.parquet"),
    })  # fmt: skip
    if unread:
        echo(f"error: {count(len(unread), 'file')} could not be read", err=True)
        raise typer.Exit(2)


def _threshold(text: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        if name and equals:
            return name.strip(), float(value)
    except ValueError:
        pass
    raise ConfigError(f"--above {text}: write NAME=SCORE, such as VQ=2.6")


def _source(
    words: Sequence[str], prompts: list[prompt_tables.Prompt], count: int, seed: int
) -> tuple[pair_sources.Source, dict[str, RewardSettings]]:
    """The source that the words name, and the rewards that come with it."""
    first = Path(words[0])
    if (first / "candidates").is_dir():
        if len(words) > 1 or prompts:
            raise ConfigError(f"{first} is the folder of a search, which has its own prompts: give it alone")
        return pair_sources.Searched(first), {}
    if first.suffix.lower() not in (".yaml", ".yml") and not (first / "config.yaml").is_file():
        return pair_sources.Files(list(items_of([Path(word) for word in words], prompts, _say()))), {}
    config, run_dir = settings_of(first, words[1:])
    policy = None if run_dir is None else trained_of(run_dir).folder
    limit = config.prompts.limit
    asked = prompts or [p for one in config.prompts.sources for p in prompt_tables.read_prompts(one.file, limit)]
    return pair_sources.Generated(config, asked, count, seed, policy), {
        "reward": config.reward
    } if config.reward else {}


def _say() -> score.Said:
    return score.Said()
