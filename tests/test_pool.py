"""Rewards in Ray actors: the same scores in order, and workers that die or hang are replaced."""

from __future__ import annotations

import os
import sys

import pytest
import torch

# read when Ray is imported; on a busy machine its processes start slowly, and workers that are nice never
os.environ |= {"RAY_raylet_start_wait_time_s": "240", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
pytest.importorskip("ray", reason="the pool needs: pip install 'alignflow[ray]'")

import ray
from test_overlap import config, flaky, folder_of_flaws, model, rows  # noqa: F401
from tiny_run import final_tensors, policy_gap, settings

import rewards
from align.training.trainer import train
from rewards.base import RewardError

MEDIA = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = list("aaabbbcccc")


def pool(settings, **options):
    plain = {"kind": "pool", "reward": settings, "workers": 2, "chunk": 2, "backoff": 0.05}
    return rewards.parse({**plain, **options})


@pytest.fixture(scope="module", autouse=True)
def cluster(folder_of_flaws):  # noqa: F811
    """Ray on this machine; workers find the flaky rewards, and their folder, where this process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        memory = 80 << 20
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=memory)
    yield
    ray.shutdown()


def test_scores_come_back_in_order():
    reward = pool("flaky:grouped", cpus=0.5).build()
    group = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    here = rewards.parse("flaky:grouped").build()(MEDIA, PROMPTS, group)
    assert reward.scope == "group"
    assert torch.equal(reward(MEDIA, PROMPTS, group).values, here.values)


def test_a_reward_that_cannot_be_built_or_refuses():
    with pytest.raises(RewardError, match=r"a worker could not start: .*no_such_module"):
        pool("no_such_module:judge", cpus=0.5).build()
    with pytest.raises(RewardError, match="reads videos, got images"):
        pool("flaky:refuses", cpus=0.5).build()(MEDIA, PROMPTS)
    with pytest.raises(RewardError, match=r"no worker was ready after 0.1 s; does the cluster have 99 CPUs"):
        pool("flaky:judge", cpus=99, start_timeout=0.1).build()


def test_a_run_outlives_a_killed_and_a_hanging_worker(model, tmp_path, flaky):  # noqa: F811
    undisturbed = config(tmp_path / "here", model, "none")
    train(undisturbed)
    (flaky / "kill").write_text("2")
    (flaky / "hang").write_text("6")
    disturbed = config(tmp_path / "there", model, "chunks", reward=pool("flaky:judge", cpus=0.5, timeout=3))
    train(disturbed)
    assert not list(flaky.iterdir())
    assert [row["missing"] for row in rows(disturbed)] == [0, 0, 0]
    assert policy_gap(final_tensors(undisturbed), final_tensors(disturbed)) == 0


def test_samples_of_a_worker_that_keeps_dying_are_reported(flaky):  # noqa: F811
    reward = pool("flaky:judge", cpus=0.5, workers=1, retries=0).build()
    (flaky / "kill").write_text("1")
    scores = reward(MEDIA, PROMPTS)
    assert scores.values.isnan().tolist() == [False] * 2 + [True] * 2 + [False] * 6
    assert set(scores.reasons) == {2, 3}
    assert scores.reasons[2].startswith("a worker of the pool died: ")


def test_rollouts_of_a_pool_outlive_a_killed_worker(model, tmp_path, monkeypatch):  # noqa: F811
    from align.rollout import pool_engine

    draw, killed = pool_engine.RayPool.draw, []

    def killing(self, order, policy):
        if not killed:
            worker = self.crew.idle.get()
            ray.kill(worker.actor)
            killed.append(worker)
            self.crew.idle.put(worker)
        return draw(self, order, policy)

    monkeypatch.setattr(pool_engine.RayPool, "draw", killing)
    reward = {"kind": "tiny_run:redness"}
    here = config(tmp_path / "here", model, "none", reward=reward, rollout={"chunk": 8})
    train(here)
    engine = {"kind": "pool", "workers": 1, "cpus": 0.5, "backoff": 0.05}
    there = config(tmp_path / "there", model, "none", reward=reward, rollout={"chunk": 8, "engine": engine})
    train(there)
    assert killed
    assert [row["engine/lost"] for row in rows(there)] == [0, 0, 0]
    assert policy_gap(final_tensors(here), final_tensors(there)) == 0


@pytest.mark.slow
def test_grpo_trains_on_the_steps_of_a_pool(model, tmp_path):  # noqa: F811
    engine = {"kind": "pool", "workers": 1, "cpus": 0.5, "backoff": 0.05}
    found = []
    for name, more in (("here", {}), ("there", {"engine": engine})):
        (tmp_path / name).mkdir()
        run = settings(tmp_path / name, model, "grpo", rollout={"chunk": 8, "recompute": True, **more})
        train(run)
        found.append(final_tensors(run))
    assert policy_gap(*found) == 0
