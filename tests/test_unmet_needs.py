"""Runs that cannot work are refused before they start: what a recipe, a launch or a card does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import written

from align.checking.estimate import estimate
from align.config.load import load_config
from align.recipes.base import Learns
from align.recipes.re_dmd import ReDMD
from alignflow.errors import ConfigError

run, write = written.run, written.write
SHIPPED = Path(__file__).parent.parent / "configs"

BACKPROP = """\
generator: {kind: sd3, path: shapes}
prompts: {train: shapes:train, heldout: shapes:heldout}
reward:
  kind: mixture
  parts:
    clip: {reward: clip}
    strict: {reward: shapes, gate: 0.5}
    inner:
      reward:
        kind: mixture
        parts:
          clip: {reward: clip}
          size: {reward: compressibility}
    dense: {reward: shapes}
recipe: {kind: reward_backprop}
"""


def test_a_member_without_gradient_is_named_by_its_place(write, run):
    """Only members that are added need a gradient: neither the gate nor the members with one are reported."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(BACKPROP))
    found = {problem.path: (problem.place, problem.message) for problem in caught.value.problems}
    said = "reward_backprop follows the reward's gradient, and {} has none; `alignflow recipes` lists those that do"
    assert found == {
        "reward.parts.inner.reward.parts.size.reward": ("run.yaml:13", said.format("compressibility")),
        "reward.parts.dense.reward": ("run.yaml:14", said.format("shapes")),
    }
    code, _, err = run("check", "run.yaml")
    assert code == 2
    assert f"reward.parts.dense.reward (run.yaml:14): {said.format('shapes')}" in err


def test_a_reward_without_gradient_is_refused(write, run):
    code, _, err = run("check", str(write(BACKPROP)), "reward=shapes")
    assert code == 2
    place = "reward (override 'reward=shapes')"
    assert f"{place}: reward_backprop follows the reward's gradient, and shapes has none" in err


def test_a_quantised_base_is_not_sharded(write, run, monkeypatch):
    """``accelerate launch --use_fsdp --fsdp_version 2`` sets these variables."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    write("generator: {kind: sd3, path: shapes, device: auto}\nmemory: {quantise: nf4}\n", "card.yaml")
    code, _, err = run("check", str(SHIPPED / "shapes/nft.yaml"), "card.yaml")
    assert code == 2
    assert "memory.quantise: nf4 weights cannot be sharded (FSDP2): use none, or launch without FSDP" in err
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert "FSDP" not in run("check", str(SHIPPED / "shapes/nft.yaml"), "card.yaml")[2]


def test_a_critic_counts_for_the_card(run, monkeypatch):
    """A card that holds the student alone is refused; the lines name what the critic takes."""
    files = ("check", str(SHIPPED / "sd35-medium/re_dmd.yaml"), "policy.rank=256", "--card")
    config = load_config(files[1], [files[2]])
    with_critic = estimate(config).bytes
    monkeypatch.setattr(ReDMD, "learners", lambda recipe: {"policy": Learns(recipe)})
    without = estimate(config).bytes
    monkeypatch.undo()
    assert with_critic - without > 2**30
    card = f"{(with_critic + without) / 2 / 2**30:.2f}gb"
    code, out, err = run(*files, card)
    assert code == 2
    assert f"re_dmd.yaml does not fit in {card.removesuffix('gb')} GB" in err
    assert "  roles " in out
    assert "policy, ema, critic: " in out
    assert ", of critic and policy" in out
    assert "savings of each change by itself, largest first:\n  " in out
    monkeypatch.setattr(ReDMD, "learners", lambda recipe: {"policy": Learns(recipe)})
    assert f"fits in {card.removesuffix('gb')} GB" in run(*files, card)[1]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("recipe.times=2", "recipe.times (override 'recipe.times=2'): is now recipe.timesteps"),
        ("evaluate.sampler.level=1", "evaluate.sampler.level (override 'evaluate.sampler.level=1'): is now"),
        ("train.micro_batch=4", "train.micro_batch (override 'train.micro_batch=4'): is now train.chunk"),
    ],
)
def test_old_names_of_settings_give_the_new_ones(old, new, run):
    for command in ("check", "train"):
        code, _, err = run(command, str(SHIPPED / "shapes/nft.yaml"), old)
        assert code == 2
        assert new in err


MINE = """\
from align.maths import losses
from align.recipes.base import ForwardRecipe


class Mine(ForwardRecipe):
    \"\"\"The velocity of a role that the recipe does not declare\"\"\"

    kind: str = "mine"

    def credit(self, scores, group):
        return scores.values.nan_to_num()

    def loss(self, terms, rollout, bench):
        x0, eps, point = self.noised(terms, rollout)
        return losses.weighted_fm(bench.velocity("behaviour", point), x0, eps, terms.credit)


class Misspelt(Mine):
    needs = ("trajectories",)

    def roles(self, config):
        return ("behavior", *super().roles(config))
"""


def test_declarations_of_a_recipe_that_no_run_has(write, run):
    write(MINE, "mine.py")
    config = str(SHIPPED / "shapes/nft.yaml")
    code, _, err = run("check", config, "recipe={kind: mine.py:Misspelt}", "--import")
    assert code == 2
    place = "recipe.kind (override 'recipe={kind: mine.py:Misspelt}'): mine.py:Misspelt declares the"
    assert f"{place} need 'trajectories'; did you mean 'trajectory'? There are trajectory, predictions, " in err
    assert f"{place} role 'behavior'; did you mean 'behaviour'? There are behaviour, reference, anchor" in err


def test_a_role_that_a_recipe_of_your_own_does_not_declare(write, run):
    write(MINE, "mine.py")
    small = ("train.steps=1", "rollout.prompts=2", "rollout.group=2", "evaluate.prompts=2", "samples.count=0")
    config = (str(SHIPPED / "shapes/nft.yaml"), "recipe={kind: mine.py:Mine}", *small)
    code, _, err = run("train", *config)
    assert code == 1
    assert "error: the recipe's loss uses the role 'behaviour': its method roles() should return that name" in err
