"""The templates of CONTRIBUTING run exactly as written: from a user's folder, and as one new file in their rooms."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from adapter_cases import PROMPTS
from torch import Tensor

from align.config.load import load_config, load_reward
from align.maths import samplers
from align.policy.lora import add_lora
from align.training.trainer import train
from generators.base import GeneratorError
from generators.load import load
from rewards.base import Scores

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "my_model": ("Add a model", "generators/adapters"),
    "my_reward": ("Add a reward", "rewards/verifiers"),
    "my_search": ("Add a search method", "align/search/methods"),
    "my_recipe": ("Add an algorithm", "align/recipes"),
}
"""Kind -> section of the page, room of the file."""

CONFIG = """\
generator: {{kind: {model}, path: {folder}, device: cpu, size: [32, 32]}}
policy: {{kind: lora, rank: 4}}
prompts: {{train: prompts.txt, heldout: prompts.txt}}
rollout: {{prompts: 2, group: 4, sampler: {{steps: 2}}}}
reward: {{kind: '{reward}', {options}}}
recipe: {{kind: '{recipe}', timesteps: 2, kl: 0.1}}
train: {{steps: 1, lr: 1e-2}}
evaluate: {{prompts: 2, sampler: {{steps: 2}}}}
out: run
"""
SHARED = "generator: {{kind: my_model, path: {folder}, device: cpu, size: [32, 32]}}\nreward: my_reward\n"
SEARCH = "{prompts: {source: prompts.txt}, search: my_search, budget: {network_calls: 40}}\n"


def template(kind: str) -> str:
    """The Python block of a kind's section; each section has one."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.split(f"## {ROOMS[kind][0]}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny SD3 with T5 on disk."""
    folder = tmp_path_factory.mktemp("model") / "sd3"
    tiny.sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A user's folder with the four templates and prompts."""
    for kind in ROOMS:
        (tmp_path / f"{kind}.py").write_text(template(kind), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a red cube\na blue ball\na cat\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_adapter_equals_its_pipeline(folder, model, guidance):
    generator = load("my_model.py:MyModel", str(model))
    noise, cond = generator.noise([3, 4]), generator.encode(PROMPTS)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return generator.velocity(x, t, cond, guidance)

    with torch.no_grad():
        ours = generator.decode(samplers.sample(velocity, noise, generator.times(3), kind="ode")[0])
    theirs = tiny.sd3_pipeline()(
        PROMPTS, negative_prompt=["", ""], guidance_scale=guidance, latents=noise, num_inference_steps=3,
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_adapter_trains_its_targets_and_refuses_long_prompts(folder, model):
    generator = load("my_model.py:MyModel", str(model))
    parameters = add_lora(generator, 4, 8)
    for target in generator.lora_targets:
        assert any(f".{target}." in f".{name}" for name, _ in parameters), target
    cond = generator.encode(PROMPTS)
    generator.velocity(generator.noise([0, 1]), torch.tensor(0.5), cond).square().mean().backward()
    assert all(value.grad is not None for _, value in parameters)
    with pytest.raises(GeneratorError, match="tokens, the model reads 256"):
        generator.encode(["a " * 300])


def test_the_reward_scores_two_images(folder):
    reward = load_reward("my_reward.py:MyReward").build()
    media = torch.zeros(2, 3, 4, 4)
    media[0, 0], media[1, 1] = 1.0, 0.5  # red, dark green
    assert reward(media, ["a", "b"]).values.tolist() == [1.0, -0.25]
    videos = media.unsqueeze(1).expand(2, 5, 3, 4, 4)
    assert reward(videos, ["a", "b"]).values.tolist() == [1.0, -0.25]
    green = load_reward("{kind: 'my_reward.py:MyReward', options: {channel: 1}}").build()
    assert green(media, ["a", "b"]).values.tolist() == [-0.5, 0.5]
    media.requires_grad_()
    (slope,) = torch.autograd.grad(reward(media, ["a", "b"]).values.sum(), media)
    assert (slope != 0).all()


def test_the_recipe_trains_a_step_through_a_config(folder, model):
    names = {"model": "my_model.py:MyModel", "reward": "my_reward.py:MyReward", "recipe": "my_recipe.py:MyRecipe"}
    text = CONFIG.format(**names, options="options: {channel: 2}", folder=model)
    Path("mine.yaml").write_text(text)
    config = load_config("mine.yaml")
    assert config.recipe.kind == names["recipe"]
    credit = config.recipe.credit(
        Scores(torch.tensor([1.0, 3.0, float("nan"), 5.0, 5.0])), torch.tensor([0, 0, 0, 1, 1])
    )
    assert credit.tolist() == [0, 1, 0, 0, 0]
    assert train(config)["status"] == "finished"
    again = load_config("run/config.yaml").recipe  # with the whole path of the file
    assert again.model_dump() == {**config.recipe.model_dump(), "kind": f"{folder}/my_recipe.py:MyRecipe"}
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["grad_norm"] > 0 for row in rows if row["event"] == "train"] == [True]


@pytest.mark.slow
def test_a_file_in_its_room_is_all_it_takes(tmp_path, model):
    for package in ("align", "alignflow", "generators", "rewards"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, copy_function=os.symlink, ignore=skip)
    for kind, (_, room) in ROOMS.items():
        (tmp_path / room / f"{kind}.py").write_text(template(kind), encoding="utf-8")
    names = {"model": "my_model", "reward": "my_reward", "recipe": "my_recipe"}
    (tmp_path / "prompts.txt").write_text("a red cube\na blue ball\na cat\n")
    (tmp_path / "mine.yaml").write_text(CONFIG.format(**names, options="channel: 2", folder=model))
    (tmp_path / "search.yaml").write_text(SEARCH)
    (tmp_path / "shared.yaml").write_text(SHARED.format(folder=model))

    def alignflow(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-m", "align", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    rooms = json.loads(alignflow("recipes", "--json"))
    listed = {kind: line for room in rooms.values() for kind, line in room.items() if kind in ROOMS}
    assert list(listed) == ["my_model", "my_recipe", "my_reward", "my_search"]
    assert listed["my_reward"].startswith("Mean of one colour channel")
    assert "mine.yaml is ready to run" in alignflow("check", "mine.yaml")
    assert "folder" in alignflow("train", "mine.yaml")
    assert "prompts" in alignflow("search", "shared.yaml", "search.yaml")
