"""The template of CONTRIBUTING runs as written, old names are explained, settings are read without torch."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toy_search import PROMPTS, Gaussian, Linear, task_of

from align.config import registry
from align.search import search
from align.search.budget import Cost
from align.search.driver import spend
from alignflow.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def test_the_template_of_a_search_method_runs_as_written(tmp_path, monkeypatch):
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a search method")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    (tmp_path / "my_search.py").write_text(code.group(1), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    method = importlib.import_module("my_search").MySearch(width=3, sampler={"steps": 3})
    task = task_of(method, {"network_calls": 30})
    found = spend(method, task)
    for one in found:
        assert len(one.rewards) == 10
        assert one.reward == max(one.rewards)
        assert one.spent["network_calls"] == 30
        assert any("neighbour" in kept.lineage[-1] for kept in one.kept)
    again = spend(method, task_of(method, {"network_calls": 30}, chunk=2, decode_chunk=1))
    assert [one.rewards for one in again] == [one.rewards for one in found]


@pytest.mark.parametrize("kind", ["nrg", "reno", "hyper_noise"])
def test_the_old_name_of_the_strength_is_answered_by_the_new_one(kind):
    with pytest.raises(ConfigError, match=r"search\.weight: no such setting 'weight'; did you mean 'strength'\?"):
        search(Gaussian(), Linear().reward, PROMPTS, {"kind": kind, "weight": 2.0}, {"decodes": 9})


def test_settings_of_every_method_are_read_without_torch():
    code = (
        "import sys; from align.config import registry; from align.search.settings import SearchOnly;"
        "[SearchOnly.model_validate({'search': kind, 'budget': {'decodes': 9}}) for kind in registry.searches()];"
        "print(len(registry.searches()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [str(len(registry.searches())), "False"]


def test_costs_add_up():
    task = task_of({"kind": "best_of_n", "sampler": {"steps": 4, "guidance": 3.0}}, {"decodes": 9})
    cost = task.cost
    assert cost.sample == 4 * cost.velocity + cost.score == Cost(8, 1, 1)
    assert cost.sample_from(3) == Cost(2, 1, 1)
    assert cost.value_and_grad - cost.velocity == Cost(0, 1, 1, 2)
    assert cost.reward_grad_through_ode == Cost(16, 1, 1, 8)
    assert cost.value == cost.score
    latent = task_of("best_of_n", {"decodes": 9}, latent_reward=lambda x, t, prompts: x.flatten(1).sum(1))
    assert latent.cost.value == Cost(0, 0, 1)
    assert str(2 * cost.score) == "2 decodes, 2 reward calls"


def test_one_step_is_enough_for_paths():
    """There is no way to judge on: the copies are samples."""
    found = search(Gaussian(), Linear().reward, PROMPTS, {"kind": "paths", "sampler": {"steps": 1}}, {"decodes": 8})
    assert [len(one.rewards) for one in found] == [8, 8, 8]
