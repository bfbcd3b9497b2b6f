"""Rollouts by an engine elsewhere: the same training, and replies that are refused, counted and asked again."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launched import launch
from safetensors.torch import load, save
from tiny import sd3_pipeline
from tiny_run import final_tensors, policy_gap, settings
from torch import Tensor

from align.config.load import load_config, resolved_settings
from align.config.sampling import Sampler
from align.config.settings import Config
from align.maths.samplers import sample
from align.rollout import elsewhere
from align.rollout.engine import KINDS, Order, RejectedError, Remote, Reply, check, digest
from align.rollout.paths import states_of, trajectory
from align.rollout.pool_engine import RayPool, RolloutWorker
from align.training.trainer import train
from alignflow.errors import ConfigError
from rewards.serving.dispatch import UnansweredError

LATENTS, MEDIA = (4, 2, 2), (3, 16, 16)
ORDER = Order(["a", "b"], [1, 2], [3, 4])
WEIGHTS = b"weights"


def reply(order: Order, policy: str) -> Reply:
    """A reply as it should be; a sample's latents are its seed."""
    count = len(order.seeds)
    latents = torch.tensor(order.seeds, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, *LATENTS)
    return Reply(latents, torch.zeros(count, *MEDIA, dtype=torch.uint8), list(order.seeds), policy, calls=count)


GOOD = reply(ORDER, "p")
FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "stale": ("stale", "sampled with weights older, not p", {"policy": "older"}),
    "no hash": ("stale", "sampled with weights , not p", {"policy": ""}),
    "other seeds": ("wrong", "other seeds", {"seeds": [2, 1]}),
    "too few": ("wrong", r"latents \[1, 4, 2, 2\], not \[2, 4, 2, 2\]", {"latents": GOOD.latents[:1]}),
    "other latents": ("wrong", r"latents \[2, 4, 2, 1\]", {"latents": GOOD.latents[..., :1]}),
    "other media": ("wrong", r"media \[2, 3, 16, 8\]", {"media": GOOD.media[..., :8]}),
    "float media": ("wrong", r"media in torch.float32", {"media": GOOD.media.float()}),
    "whole latents": ("wrong", r"latents in torch.int64", {"latents": GOOD.latents.long()}),
    "NaN": ("wrong", "NaN or infinity in latents", {"latents": GOOD.latents * torch.nan}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_replies_that_are_refused(fault: str) -> None:
    kind, says, changes = FAULTS[fault]
    check(ORDER, GOOD, "p", LATENTS, MEDIA)
    with pytest.raises(RejectedError, match=says) as error:
        check(ORDER, replace(GOOD, **changes), "p", LATENTS, MEDIA)
    assert error.value.kind == kind
    assert error.value.again


def test_lost_samples_may_hold_nan() -> None:
    latents = GOOD.latents.clone()
    latents[1] = torch.nan
    check(ORDER, replace(GOOD, latents=latents, lost={1: "overflow"}), "p", LATENTS, MEDIA)


class Misbehaving:
    """An engine whose calls go wrong as listed: a name of :data:`FAULTS`, ``dead``, or "" for a good reply."""

    parallel, chunk = 1, None

    def __init__(self, faults: list[str]) -> None:
        self.faults, self.pushed = faults, []  # type: list[str], list[str]
        self.changed: list[str] = []

    def pack(self, trained: Mapping[str, Tensor]) -> bytes:
        return save(dict(trained))

    def verify(self, policy: str) -> None:
        if self.changed:
            raise RejectedError("stale", self.changed.pop(0))

    def push(self, weights: bytes, policy: str) -> None:
        assert digest(weights) == policy
        self.pushed.append(policy)

    def draw(self, order: Order, policy: str) -> Reply:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "dead":
            raise UnansweredError("the engine died")
        good = reply(order, policy)
        return replace(good, **FAULTS[fault][2]) if fault else good


def remote(faults: list[str], retries: int) -> tuple[Remote, Misbehaving, Any]:
    generator: Any = SimpleNamespace(network_calls=0, size=(16, 16), latent_shape=lambda: LATENTS)
    engine = Misbehaving(faults)
    trained = {"weight": torch.ones(2)}
    return Remote(engine, generator, trained, retries, 0.0), engine, generator


def test_refused_replies_are_asked_again_and_counted() -> None:
    made, engine, generator = remote(["stale", "", "other seeds", "dead", ""], retries=5)
    orders = [ORDER, Order(["c"], [5], [6])]
    replies = made(orders, WEIGHTS)
    assert [one.seeds for one in replies] == [[1, 2], [5]]
    assert [float(one.latents[0, 0, 0, 0]) for one in replies] == [1.0, 5.0]
    assert made.take() == {"stale": 2, "wrong": 1, "lost": 0}
    assert made.take() == dict.fromkeys(KINDS, 0)
    assert (engine.pushed, generator.network_calls) == ([digest(WEIGHTS)], 3)


def test_what_stays_without_a_reply_is_lost_with_its_reason() -> None:
    made, _, _ = remote(["stale", "stale", "dead", "dead"], retries=1)
    first, second, third = made([ORDER, Order(["c"], [5], [6]), ORDER], WEIGHTS)
    assert first.lost.keys() == {0, 1}
    assert "sampled with weights older" in first.lost[0]
    assert second.lost == {0: "the engine died"}  # once an order is given up, the next is asked once
    assert not third.lost.keys() or third.lost == {0: "the engine died", 1: "the engine died"}
    assert first.latents.shape == (2, *LATENTS)
    assert not first.media.any()
    assert made.take()["stale"] >= 2


def test_weights_that_change_during_a_rollout_cost_it() -> None:
    made, engine, _ = remote([], 0)
    engine.changed = ["other weights now"]
    [again] = made([ORDER], WEIGHTS)
    assert (again.lost, made.take()) == ({}, {"stale": 2, "wrong": 0, "lost": 0})
    assert len(engine.pushed) == 2
    engine.changed = ["other weights now", "others again"]
    [lost] = made([ORDER], WEIGHTS)
    assert lost.lost == {0: "others again", 1: "others again"}
    assert made.take() == {"stale": 4, "wrong": 0, "lost": 2}


def test_weights_that_the_engine_does_not_take() -> None:
    made, engine, _ = remote([], 1)
    refusing = iter([True, False, True, True])

    def push(weights: bytes, policy: str) -> None:
        if next(refusing):
            raise UnansweredError("no room for a LoRA")

    engine.push = push  # type: ignore[method-assign]
    assert made([ORDER], WEIGHTS)[0].lost == {}
    assert made([ORDER], WEIGHTS)[0].lost == dict.fromkeys((0, 1), "no room for a LoRA (2 attempts)")
    assert made.take()["lost"] == 2


def test_orders_are_split_and_replies_joined() -> None:
    made, engine, generator = remote(["", "stale"], 0)
    engine.chunk = 1  # type: ignore[assignment]
    order = Order(["a", "b", "c"], [1, 2, 3], [4, 5, 6], steps=(1,), keep=True)
    asked: list[Order] = []
    draw = engine.draw

    def noted(part: Order, policy: str) -> Reply:
        asked.append(part)
        states = torch.full((1, 2, *LATENTS), float(part.seeds[0]))
        return replace(draw(part, policy), states=states)

    engine.draw = noted  # type: ignore[method-assign]
    [found] = made([order], WEIGHTS)
    assert [(part.prompts, part.seeds, part.starts) for part in asked] == [
        (["a"], [1], [4]), (["b"], [2], [5]), (["c"], [3], [6]),
    ]  # fmt: skip
    assert found.seeds == [1, 2, 3]
    assert found.lost.keys() == {1}
    assert found.latents[:, 0, 0, 0].tolist() == [1, 0, 3]
    assert found.states is not None
    assert found.states[:, 1, 0, 0, 0].tolist() == [1, 0, 3]
    assert generator.network_calls == 2


def test_steps_of_other_shapes_are_refused() -> None:
    order = replace(ORDER, steps=(0, 1), keep=True)
    good = replace(GOOD, states=torch.zeros(2, 3, *LATENTS))
    check(order, good, "p", LATENTS, MEDIA)
    for states in (None, good.states[:, :2], good.states * torch.nan):  # type: ignore[index,operator]
        with pytest.raises(RejectedError, match=r"latents of the steps|NaN or infinity"):
            check(order, replace(good, states=states), "p", LATENTS, MEDIA)


def test_the_weights_are_sent_as_safetensors() -> None:
    made, _, _ = remote([], 0)
    assert {name: value.tolist() for name, value in load(made.weights()).items()} == {"weight": [1.0, 1.0]}


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sd3"
    sd3_pipeline(t5=False).save_pretrained(folder)
    return folder


class InProcess:
    """The worker of the pool without Ray, two steps behind from call ``stale`` on."""

    parallel, chunk = 1, None
    pack, verify = RayPool.pack, RayPool.verify

    def __init__(self, config: Config, stale: int | None = None) -> None:
        self.worker, self.stale, self.calls = RolloutWorker(resolved_settings(config), "cpu"), stale, 0
        self.lock = threading.Lock()

    def push(self, weights: bytes, policy: str) -> None:
        if self.stale is None or self.calls < self.stale:
            self.worker.load(weights, policy)

    def draw(self, order: Order, policy: str) -> Reply:
        with self.lock:
            self.calls += 1
            found = self.worker.draw(order)
        tensors = load(found.pop("tensors"))
        return Reply(tensors["latents"], tensors["media"], states=tensors.get("states"), **found)


def run(
    folder: Path, model: Path, patch: pytest.MonkeyPatch, stale: int | None = None, recipe: Any = "nft", **other: Any
) -> Config:
    folder.mkdir()
    engine = {"kind": "pool", "retries": 0, "backoff": 0.0}
    config = settings(
        folder, model, recipe, prompts={"heldout": None}, evaluate={"rewards": {}},
        rollout={"chunk": 4, "engine": engine, **other}, train={"unscored": 9},
    )  # fmt: skip
    patch.setitem(elsewhere.BUILDERS, "pool", lambda settings, config, generator: InProcess(config, stale))
    train(config)
    return config


def rows(config: Config) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["event"] == "train"]


@pytest.mark.few(1)
@pytest.mark.parametrize("overlap", ["none", "next"])
def test_an_engine_trains_as_this_process_does(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    rollout = {"overlap": overlap, "chunk": 8}  # one order, so that its prompts are encoded in the same batch
    there = run(tmp_path / "there", model, monkeypatch, **rollout)
    here = run(tmp_path / "here", model, monkeypatch, **rollout, engine=None)
    assert policy_gap(final_tensors(there), final_tensors(here)) == 0
    assert [row["reward"] for row in rows(there)] == [row["reward"] for row in rows(here)]
    assert [row["network_calls"] for row in rows(there)] == [row["network_calls"] for row in rows(here)]
    assert [row["engine/stale"] for row in rows(there)] == [0, 0, 0]
    assert "engine/stale" not in rows(here)[0]


@pytest.mark.few(1)
@pytest.mark.parametrize("overlap", ["none", "chunks"])
def test_grpo_trains_on_the_steps_of_an_engine_as_on_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: str
) -> None:
    recipe = {"kind": "grpo", "ratio": "guard", "kl": 0.1}  # reads the rollout's log-probabilities and means
    rollout = {"overlap": overlap, "chunk": 8, "recompute": True}
    there = run(tmp_path / "there", model, monkeypatch, recipe=recipe, **rollout)
    here = run(tmp_path / "here", model, monkeypatch, recipe=recipe, **rollout, engine=None)
    assert policy_gap(final_tensors(there), final_tensors(here)) == 0
    assert [row["loss"] for row in rows(there)] == [row["loss"] for row in rows(here)]
    assert [row["ratio"] for row in rows(there)] == [1, 1, 1]
    assert rows(there)[0]["logp_gap/max"] == 0


def test_grpo_leaves_out_steps_of_a_stale_policy(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run(tmp_path / "stale", model, monkeypatch, stale=4, recipe="grpo", recompute=True)
    found = rows(config)
    assert [row["missing"] for row in found] == [0, 0, 8]
    assert all(value.isfinite().all() for value in final_tensors(config).values())


def test_states_are_the_trajectory() -> None:
    sampler = Sampler(kind="flow_sde", steps=4, noise_level=0.7)
    times, steps = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), (0, 2)
    noises = torch.randn(4, 3, *LATENTS, generator=torch.Generator().manual_seed(0))
    _, path = sample(
        lambda x, t: 0.5 * x, noises[0], times, kind="flow_sde", noise_level=0.7, steps=steps,
        noise=lambda index: noises[index], keep=True,
    )  # fmt: skip
    assert path is not None
    states = states_of(path)
    assert states.shape == (3, 4, *LATENTS)  # before and after steps 0 and 2
    again = trajectory(states, steps, times, sampler)
    for name in ("x", "x_next", "std", "t", "t_next"):
        assert torch.equal(getattr(again, name), getattr(path, name)), name
    assert (again.t_second, again.steps) == (0.75, steps)
    assert again.logp.isnan().all()  # a use of them before they are computed shows
    assert again.mean.isnan().all()


def test_samples_of_a_stale_policy_are_not_trained_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run(tmp_path / "stale", model, monkeypatch, stale=4)  # two orders a rollout: the third is stale
    found = rows(config)
    assert [row["engine/stale"] for row in found] == [0, 0, 8]
    assert [row["engine/lost"] for row in found] == [0, 0, 8]
    assert [row["missing"] for row in found] == [0, 0, 8]
    assert "the engine sampled with weights" in found[2]["reasons"][0]


PROCESSES = """
import sys
from pathlib import Path
sys.path.pop(0)  # this script's folder, where it is called launched
from test_engine import InProcess
from align.config.load import load_config
from align.rollout import elsewhere
from align.training.trainer import train
elsewhere.BUILDERS["pool"] = lambda settings, config, generator: InProcess(config)
train(load_config(Path(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["nft", "grpo"])
def test_each_process_asks_for_its_own_share(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    alone = run(tmp_path / "alone", model, monkeypatch, recipe=recipe, recompute=recipe == "grpo")
    (tmp_path / "both").mkdir()
    file = tmp_path / "both.yaml"
    file.write_text(json.dumps({**alone.model_dump(mode="json"), "out": str(tmp_path / "both" / "run")}))
    launch(2, tmp_path, PROCESSES, str(file))
    one, two = rows(alone), rows(load_config(file))
    assert [row["samples"] for row in two] == [row["samples"] for row in one] == [8, 8, 8]
    assert [row["network_calls"] for row in two] == [row["network_calls"] for row in one]
    assert [row["engine/stale"] + row["engine/lost"] for row in two] == [0, 0, 0]
    assert two[0]["reward"] == pytest.approx(one[0]["reward"], abs=1e-6)
    assert policy_gap(final_tensors(alone), final_tensors(load_config(file))) < 2e-3


def test_a_worker_refuses_damaged_and_foreign_weights(model: Path, tmp_path: Path) -> None:
    worker = RolloutWorker(resolved_settings(settings(tmp_path, model)), "cpu")
    with pytest.raises(ValueError, match="damaged in transit"):
        worker.load(b"", "abc")
    foreign, _, _ = remote([], 0)
    with pytest.raises(ValueError, match="do not fit the LoRA of this worker"):
        worker.load(foreign.weights(), digest(foreign.weights()))


# -- what check refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "words", "says"),
    [
        ("shapes/grpo", [], "grpo compares log-probabilities with those of the rollout, and an"),
        (
            "shapes/prdp",
            ["rollout.recompute=true"],
            "prdp reads log-probabilities of the rollout, and those of an engine",
        ),
        (
            "shapes/vgpo",
            ["rollout.recompute=true"],
            "the clean samples that the sampler's steps predict, which no engine",
        ),
        ("shapes/nft", ["policy.kind=full"], "an engine is sent a LoRA, not a policy of kind full"),
        ("shapes/reward_backprop", [], "needs samples that it generates in its loss"),
        ("shapes/texforce", [], "rollout.engine"),
        ("shapes-edit/nft", [], "reads image with every prompt, and an engine is sent only texts"),
    ],
)
def test_configs_that_are_refused(file: str, words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(f"configs/{file}.yaml", ["rollout.engine=pool", *words])


def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from align.config.sharding import problems

    config = load_config("configs/shapes/nft.yaml", ["rollout.engine=pool"])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert [one.path for one in problems(config)] == ["rollout.engine"]
