"""A search from its config to a run folder; the result of a prompt is written as soon as it is found."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from align.config.load import dump_config
from align.data import tables
from align.data.files import new_folder, write_json
from align.data.grids import save_samples, still
from align.data.inputs import check_needs, encode, pixels_of
from align.data.media import encode as encode_media
from align.data.media import to_pixels
from align.data.prompts import Prompt, read_prompts
from align.data.screening import Needs, recorded, usable
from align.maths.statistics import mean, standard_error
from align.policy.build import build_generator, build_rewards
from align.runs import devices
from align.runs.forecast import clock
from align.runs.identity import data_digest, model_digest
from align.runs.owned import SEARCH
from align.runs.progress import Progress, said
from align.runs.run_folder import RunFolder
from align.runs.stopping import GracefulStop
from align.runs.threads import settle
from align.runs.trained import load_policy
from align.search.baseline import best_of_n, plain_sampler
from align.search.budget import Budget
from align.search.driver import check_alone, check_reward, make, spend
from align.search.methods.best_of_n import BestOfN
from align.search.results import Candidate, Found
from align.search.settings import SearchOnly
from align.search.task import LatentReward, Task
from alignflow.errors import RunFolderError, SearchError
from alignflow.lazy import lazy
from generators.base import Generator
from rewards.base import Reward, wanted
from rewards.call import load_object

if TYPE_CHECKING:
    from align.report.search import write_search_report
    from align.search.settings import SearchConfig
else:
    write_search_report = lazy("align.report.search:write_search_report")


PLAIN = "plain sample"
"""Lineage of a best sample that the search did not find: nothing it found scored higher."""


def run_search(config: SearchConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Search every prompt of a config; returns the contents of ``results.json`` without its rows.

    Raises:
        AlignflowError: the message names the problem and the remedy.
        KeyboardInterrupt: after the prompts under way, when the user stopped the search.
    """
    run = RunFolder(config.run_dir, kind=SEARCH)
    with run.held(dump_config(config), resume=resume, overwrite=overwrite):
        skip, skipped = config.prompts.bad == "skip", dict[str, str]()
        prompts = read_prompts(
            config.prompts.source, config.prompts.limit, config.prompts.seed, skipped=skipped if skip else None
        )
        run.check_content(data=data_digest(prompts), model=model_digest(config.generator.path))
        generator, rewards = load(config, prompts)
        needs = Needs(tuple(dict.fromkeys((*generator.inputs, *wanted(rewards)))))
        bad = usable(prompts, skipped, generator, needs, skip, lambda said: print(said, file=sys.stderr))
        run.begin()
        if skip:
            bad = recorded(config.run_dir, "source", bad, run.before is not None)
        prompts = [prompt for prompt in prompts if prompt.place not in bad]
        return _search(config, run, generator, rewards, prompts)


def _search(
    config: SearchConfig, run: RunFolder, generator: Generator, rewards: dict[str, Reward], prompts: list[Prompt]
) -> dict[str, Any]:
    store = Store(config, prompts)
    done = store.done()
    todo = [number for number in range(len(prompts)) if number not in done]
    progress = Progress(len(prompts), len(done), unit="prompt")
    progress.say(f"run folder {config.run_dir}" + (f", continuing after {len(done)} prompts" if done else ""))
    if run.asked and run.before is None:
        progress.say(f"nothing to resume in {run.path}: the search starts from the beginning")
    for line in _foreseen(config, generator, [prompts[number] for number in todo]):
        progress.say(line)
    with GracefulStop(
        lambda _: progress.say("stopping after the prompts in progress; interrupt again to stop at once")
    ) as stop:
        for first in range(0, len(todo), config.batch):
            search_batch(config, generator, rewards, store, todo[first : first + config.batch])
            means = store.summary("running")["reward"]
            progress.update(len(store.done()), {name: said(means[name]) for name in ("plain", "best")})
            if stop.asked and first + config.batch < len(todo):
                store.close("interrupted")
                raise KeyboardInterrupt
    return store.close("finished")


def _foreseen(config: SearchConfig, generator: Generator, prompts: list[Prompt]) -> list[str]:
    """Lines on the number of threads, which is chosen here, and on the most time that network calls may take."""
    speed, sampler = settle(generator, prompts, config.chunk), config.search.sampler
    lines, each = [speed.said] if speed.said else [], config.budget.network_calls
    if prompts and each is not None:
        plain = sampler.steps * (1 if sampler.guidance == 1.0 else 2)
        calls = len(prompts) * (each * (2 if config.baseline else 1) + plain)
        took = f", {clock(calls * speed.seconds)} here, decoding and scoring not included" if speed.seconds else ""
        lines.append(f"forecast: at most {calls:,} network calls{took}")
    return lines


def load(config: SearchConfig, prompts: Sequence[Prompt]) -> tuple[Generator, dict[str, Reward]]:
    """Generator, with its LoRA, and rewards, the one that is raised among them as ``reward``; checked to fit."""
    device = devices.chosen(config.generator.device)
    followed = config.reward if config.search.gradients else None
    rewards = build_rewards({"reward": config.reward, **config.gold}, device, config.memory, followed=followed)
    check_reward(config.search, rewards["reward"], latent_reward(config))
    for name in config.gold:
        check_alone(rewards[name])
    generator = build_generator(config.generator, config.memory, device, kinds=[config.search.sampler.kind])
    if config.lora is not None:
        folder = Path(config.lora)
        load_policy(generator, folder / "lora" if (folder / "lora").is_dir() else folder)
    if config.prompts.bad == "stop":
        check_needs(prompts, generator, rewards)
    return generator, rewards


def latent_reward(config: SearchConfig) -> LatentReward | None:
    """The reward of unfinished samples; raises RewardError if it does not exist."""
    if config.latent_reward is None:
        return None
    if Path(config.latent_reward).is_dir():
        return _trained_latent(config.latent_reward, str(devices.chosen(config.generator.device)))
    return load_object(config.latent_reward)


@lru_cache(maxsize=1)  # asked for with every batch of prompts
def _trained_latent(folder: str, device: str) -> LatentReward:
    from rewards.training.latent import load

    return load(folder, device)


def search_batch(
    config: SearchConfig, generator: Generator, rewards: dict[str, Reward], store: Store, numbers: Sequence[int]
) -> None:
    """Search some prompts together, and write what each gave beside its plain sample, and best-of-N if it is set."""
    sampler, reward = plain_sampler(config.search.sampler), rewards["reward"]

    def task_of(places: Sequence[int], settings: SearchOnly) -> Task:
        some = [numbers[place] for place in places]
        return make(
            generator, reward, [store.prompts[number] for number in some], some, settings, config.seed,
            chunk=config.chunk, decode_chunk=config.decode_chunk, keep=config.keep,
            latent_reward=latent_reward(config),
        )  # fmt: skip

    everything, outcomes = range(len(numbers)), []
    plain = SearchOnly(search=BestOfN(n=1, sampler=sampler), budget=Budget(decodes=1))
    for settings in (plain, SearchOnly(search=config.search, budget=config.budget)):
        task = task_of(everything, settings)
        outcomes.append((spend(settings.search, task), task.meter))
    (before, _), (found, meter) = outcomes
    busy = {name: seconds / len(numbers) for name, seconds in meter.busy.items()}
    baselines = best_of_n(task_of, found, sampler, config.budget) if config.baseline else [None] * len(found)
    prompts, wants = [store.prompts[number] for number in numbers], wanted(rewards)
    inputs = encode(generator, prompts, wants)[1] if wants else {}
    for place, (start, one, baseline) in enumerate(zip(before, found, baselines, strict=True)):
        given = {name: value[place : place + 1] for name, value in inputs.items()}
        shown = {"plain": start.best, "best": better(start, one).best}
        if baseline is not None:
            shown["best_of_n"] = better(start, baseline).best
        golds = {
            name: {which: _score(judge, sample, one.prompt, given) for which, sample in shown.items()}
            for name, judge in rewards.items()
            if name != "reward"
        }
        store.write(one, start, golds, busy, baseline)


def _kept(folder: Path, prompt: Prompt, name: str) -> str:
    """Path of one of a prompt's media: its own file, or a copy in the folder of one that has none."""
    source = prompt.media[name]
    if not isinstance(source, tables.Cell):
        return str(source.resolve())
    (folder / f"{name}.png").write_bytes(encode_media(pixels_of(prompt, name), ".png"))
    return f"{name}.png"


def plain_wins(plain: Found, found: Found) -> bool:
    """Whether the plain sample scores higher than everything the search found, so that it is the best there is."""
    return plain.best is not None and not found.reward >= plain.reward


def better(plain: Found, found: Found) -> Found:
    """The one of the two with the best sample."""
    return plain if plain_wins(plain, found) else found


def _score(reward: Reward, one: Candidate | None, prompt: str, inputs: dict[str, Any]) -> float:
    """Score of one sample; NaN if there is no sample or it has no score."""
    if one is None:
        return float("nan")
    with torch.no_grad():
        return float(reward(one.media[None], [prompt], None, inputs).values[0])


class Store:
    """The results on disk: ``candidates/0000/`` per prompt, whole or not there, and ``results.json``."""

    def __init__(self, config: SearchConfig, prompts: Sequence[Prompt]) -> None:
        self.config, self.prompts = config, list(prompts)
        self.folder = config.run_dir / "candidates"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()

    def done(self) -> list[int]:
        """Numbers of the prompts whose result is there."""
        return [row["number"] for row in self.rows()]

    def write(
        self,
        found: Found,
        plain: Found,
        golds: dict[str, dict[str, float]],
        busy: dict[str, float],
        baseline: Found | None = None,
    ) -> None:
        """One prompt's result, in one step; ``baseline`` is that of best-of-N."""
        prompt = self.prompts[found.number]
        row = {**found.row(), "plain": plain.reward, "gold": golds, "busy": busy}
        with new_folder(self.folder / f"{found.number:04d}", replaces=True) as staging:
            row["media"] = {name: _kept(staging, prompt, name) for name in prompt.media}
            for one, entry in zip(found.kept, row["kept"], strict=True):
                entry["file"] = self._image(staging, f"{one.number:04d}", one)
            if plain.best is not None:
                row["plain_file"] = self._image(staging, "plain", plain.best)
            if plain_wins(plain, found):
                kept = {"reward": plain.reward, "number": None, "lineage": [PLAIN], "file": row["plain_file"]}
                row |= {"kept": [kept, *row["kept"]], "reward": plain.reward, "lineage": [PLAIN]}
                row["searched"] = found.reward
            if baseline is not None:
                best = better(plain, baseline)
                row["best_of_n"] = {"reward": best.reward, "curve": baseline.curve, "spent": baseline.spent}
                if best.best is not None:
                    row["best_of_n"]["file"] = self._image(staging, "best_of_n", best.best)
            write_json(staging / "found.json", row)

    def _image(self, folder: Path, name: str, one: Candidate) -> str:
        """Write a candidate's media; the name of its file."""
        pixels, how = to_pixels(one.media[None])[0], self.config.samples
        (folder / f"{name}.png").write_bytes(encode_media(np.asarray(still(pixels)), ".png"))
        if pixels.ndim == 3:
            return f"{name}.png"
        (folder / f"{name}.{how.video}").write_bytes(encode_media(pixels, f".{how.video}", how.fps))
        return f"{name}.{how.video}"

    def rows(self) -> list[dict[str, Any]]:
        """Results of every prompt so far."""
        return read_rows(self.config.run_dir)

    def summary(self, status: str) -> dict[str, Any]:
        """Means over the prompts that have a result; ``plain_kept`` counts those whose plain sample nothing beat."""
        rows = self.rows()
        spent = [row["spent"] for row in rows]
        busy = sum(sum(row["busy"].values()) for row in rows)
        seconds = sum(one["seconds"] for one in spent)
        return {
            "status": status,
            "name": self.config.name,
            "method": self.config.search.kind,
            "generator": self.config.generator.path,
            "seed": self.config.seed,
            "budget": self.config.budget.model_dump(exclude_none=True),
            "prompts": len(rows),
            "missing": sum(row["reward"] is None for row in rows),
            "plain_kept": sum(row["lineage"] == [PLAIN] for row in rows),
            "reward": _compared([(row["plain"], row["reward"]) for row in rows]),
            "gold": {
                name: _compared([(row["gold"][name]["plain"], row["gold"][name]["best"]) for row in rows])
                for name in self.config.gold
            },
            **self._baseline(rows),
            "spent": _means(spent),
            "overhead": 1 - busy / seconds if seconds else 0.0,
        }

    def _baseline(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Best-of-N against the search, if the config has it as baseline."""
        if not self.config.baseline:
            return {}
        first, gold = "best_of_n", self.config.gold
        golds = {name: [(row["gold"][name][first], row["gold"][name]["best"]) for row in rows] for name in gold}
        return {
            first: {
                "reward": _compared([(row[first]["reward"], row["reward"]) for row in rows], first),
                "gold": {name: _compared(pairs, first) for name, pairs in golds.items()},
                "spent": _means([row[first]["spent"] for row in rows]),
            }
        }

    def close(self, status: str) -> dict[str, Any]:
        """Write ``results.json``, sample grids and the page; the summary.

        Raises:
            SearchError: no prompt has a score.
        """
        summary, rows = self.summary(status), self.rows()
        write_json(self.config.run_dir / "results.json", {**summary, "found": rows})
        known = [row for row in rows if row["kept"]]
        shown = known[: self.config.samples.count]
        for which in ("plain", "best") if shown else ():
            files = [_still(self.folder / f"{row['number']:04d}", row, which) for row in shown]
            scores = {name: [row["gold"][name][which] for row in shown] for name in self.config.gold}
            rewards = [row["plain"] if which == "plain" else row["reward"] for row in shown]
            images = [np.asarray(_open(file)) for file in files]
            texts, seeds = [row["prompt"] for row in shown], [self.config.seed] * len(shown)
            save_samples(
                self.config.run_dir / "samples" / which,
                images,
                texts,
                seeds,
                {"reward": rewards, **scores},
                replaces=True,
            )
        write_search_report(self.config.run_dir)
        if rows and not known:
            why = next((row["reason"] for row in rows if row["reason"]), "no sample was finished")
            raise SearchError(f"no sample of {len(rows)} prompts has a score: {why}")
        return summary


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """``found.json`` of every prompt of a search's run folder, in order.

    Raises:
        RunFolderError: it is not the folder of a search.
    """
    if not (run_dir / "candidates").is_dir():
        raise RunFolderError(f"{run_dir} is not the run folder of a search: it has no candidates/")
    files = sorted((run_dir / "candidates").glob("[0-9][0-9][0-9][0-9]*/found.json"))
    return [row for file in files if (row := _row(file)) is not None]


def _row(file: Path) -> dict[str, Any] | None:
    """A prompt's result; None if the file is damaged, and the prompt is searched again."""
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and row.get("number") == int(file.parent.name) and "kept" in row else None


def _still(folder: Path, row: dict[str, Any], which: str) -> Path:
    name = row["plain_file"] if which == "plain" and "plain_file" in row else row["kept"][0]["file"]
    return (folder / name).with_suffix(".png")


def _open(file: Path) -> Any:
    from PIL import Image

    with Image.open(file) as image:
        return image.convert("RGB")


def _means(spent: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean costs of some prompts; a prompt without any cost counts as 0."""
    names = dict.fromkeys(name for one in spent for name in one)
    return {name: sum(one.get(name, 0.0) for one in spent) / len(spent) for name in names}


def _compared(pairs: Sequence[tuple[float | None, float | None]], first: str = "plain") -> dict[str, float]:
    """Means of both, and of the difference with its standard error, over prompts that have both."""
    known = torch.tensor([pair for pair in pairs if None not in pair], dtype=torch.float64).view(-1, 2)
    rise = known[:, 1] - known[:, 0]
    return {first: mean(known[:, 0]), "best": mean(known[:, 1]), "rise": mean(rise), "stderr": standard_error(rise)}
