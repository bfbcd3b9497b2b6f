"""Options of Flow-DPO, its soft labels (RPO), and flow matching weighted by regions (SRUM)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_pair_weights import table
from test_training import stored_pairs_config
from tiny_run import settings
from torch import Tensor

from align.checking.check import check_files
from align.config.load import load_config
from align.maths import losses, regions
from align.recipes.flow_dpo import FlowDPO, PairTerms
from align.recipes.rpo import RPO
from align.training.trainer import train
from alignflow.errors import ConfigError, TrainingError
from alignflow.worlds.shapes.world import Obj, Scene, render
from rewards.worlds import shapes

CONFIGS = Path(__file__).parent.parent / "configs"


def first_row(config: Any) -> dict[str, Any]:
    """The first training step of a run."""
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["event"] == "train")


# -- errors inside a mask ---------------------------------------------------------------------------------------------


def test_a_weighted_mean_counts_what_has_weight():
    a = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 5.0], [5.0, 5.0]]]]).repeat(1, 3, 1, 1)
    mask = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    found = losses.mse(a, torch.zeros_like(a), mask)
    assert found.tolist() == [(1 + 9) / 2, 0.0]
    torch.testing.assert_close(losses.mse(a, 0 * a, torch.ones_like(mask)), losses.mse(a, 0 * a))


def test_maps_at_the_size_of_latents_keep_constants():
    image, video = torch.zeros(2, 4, 5, 6), torch.zeros(2, 4, 3, 5, 6)
    constant = torch.full((2, 1, 40, 48), 0.7)
    assert torch.allclose(regions.at_latents(constant, image), torch.full((2, 1, 5, 6), 0.7))
    assert regions.at_latents(constant, video).shape == (2, 1, 1, 5, 6)
    half = torch.cat([torch.ones(1, 1, 8, 4), torch.zeros(1, 1, 8, 4)], 3)
    assert regions.at_latents(half, torch.zeros(1, 4, 2, 2))[0, 0].tolist() == [[1, 0], [1, 0]]
    with pytest.raises(ValueError, match="have no height and width"):
        regions.at_latents(constant, torch.zeros(2, 7, 64))


def test_the_masked_loss_sees_the_hole_alone(tmp_path: Path) -> None:
    """On the embedded inpainter: prompts bring masks to the loss, whose gradient is 0 elsewhere."""
    seen: list[tuple[Tensor, Tensor]] = []
    real = losses.mse

    def spied(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
        if weight is not None and a.requires_grad:
            (gradient,) = torch.autograd.grad(real(a, b, weight).sum(), a, retain_graph=True)
            seen.append((gradient.detach(), weight))
        return real(a, b, weight)

    few = ["train.steps=1", "train.updates=1", "rollout.prompts=2", "rollout.group=3", "recipe.timesteps=1"]
    quiet = ["evaluate.every=0", "evaluate.at_start=false", "evaluate.prompts=2", "samples.count=0", "train.ema=0"]
    config = load_config(CONFIGS / "shapes-fill/flow_dpo.yaml", [*few, *quiet, f"out={tmp_path / 'run'}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "mse", spied)
        train(config)
    gradient, mask = seen[0]
    outside = (mask == 0).expand_as(gradient)
    assert outside.any()
    assert not outside.all()
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside] != 0).any()


# -- options that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "sections", "says"),
    [
        ({"region": "mask"}, {}, "recipe.region: generator sd3 has no masks"),
        ({"choose": "all"}, {"rollout": {"kind": "pairs", "file": "pairs.jsonl"}}, "recipe.choose: all pairs samples"),
        ({"kind": "srum"}, {"reward": {"kind": "compressibility"}}, "srum needs scores of regions, .* shapes does"),
        ({"kind": "srum"}, {"rollout": {"kind": "samples", "file": "x.jsonl"}}, "srum scores regions of samples"),
    ],
)
def test_options_that_do_not_fit_are_named(recipe, sections, says, model, tmp_path):
    with pytest.raises(ValueError, match=says.split(": ")[-1]):
        settings(tmp_path, model, {"kind": "flow_dpo", **recipe}, **sections)


def test_dominance_without_parts_ends_at_the_first_batch(model, tmp_path):
    with pytest.raises(TrainingError, match="dominance needs a reward with two named parts"):
        train(settings(tmp_path, model, {"kind": "flow_dpo", "choose": "dominance"}))
    (tmp_path / "other").mkdir()
    config = settings(tmp_path / "other", model, "srum")
    tree = {**config.model_dump(mode="json"), "reward": {"kind": "tiny_run:redness"}}
    with pytest.raises(TrainingError, match="srum needs a reward with scores of regions"):
        train(type(config).model_validate(tree))


# -- pairs of a group -------------------------------------------------------------------------------------------------

PARTS = {
    "kind": "mixture",
    "parts": {name: {"reward": {"kind": f"tiny_run:{name}"}} for name in ("redness", "brightness")},
}


@pytest.mark.parametrize(("choose", "terms"), [("best_worst", 2), ("all", 12), ("dominance", 12)])
def test_a_group_is_paired_as_asked(choose: str, terms: int, model: Path, tmp_path: Path) -> None:
    recipe = {"kind": "flow_dpo", "choose": choose, "timesteps": 2}
    config = settings(tmp_path, model, recipe, reward=PARTS, train={"steps": 1})
    assert config.recipe.terms_per_sample(config) * 4 == terms
    assert math.isfinite(first_row(config)["loss"])


# -- flow matching beside the preference ------------------------------------------------------------------------------


def test_flow_matching_on_the_winner_is_added(model, tmp_path):
    recipe = {"kind": "flow_dpo", "timesteps": 2, "flow_weight": 0.5}
    row = first_row(settings(tmp_path, model, recipe, train={"steps": 1}))
    assert row["loss"] == pytest.approx(math.log(2) + 0.5 * row["fm"], abs=1e-4)  # the policy is the reference
    assert row["fm"] > 0.1


def test_labels_are_the_sigmoid_of_the_gap():
    scores = torch.tensor([[0.9, 0.4], [0.5, 0.5]])
    label = RPO(sharpness=2.0).preference(scores)["label"]
    torch.testing.assert_close(label, torch.tensor([1 / (1 + math.exp(-1.0)), 0.5]))
    zero = torch.zeros(2)
    for label in (0.0, 0.3, 1.0):  # at the reference the label does not count
        value = losses.pair_pref(zero, zero, zero, zero, 2.0, label=label).value
        torch.testing.assert_close(value, torch.full((2,), math.log(2)))
    error_w, error_l, before = torch.tensor([0.2]), torch.tensor([0.5]), torch.tensor([0.4])
    difference = (0.4 - 0.2) - (0.4 - 0.5)  # the paper's, with its beta of 1
    found = losses.pair_pref(error_w, error_l, before, before, RPO().beta, label=0.7).value
    sigmoid = 1 / (1 + math.exp(-difference))
    assert found.item() == pytest.approx(-(0.7 * math.log(sigmoid) + 0.3 * math.log(1 - sigmoid)), abs=1e-6)


def test_the_chosen_sample_of_a_file_is_imitated_whatever_it_scores():
    class Stored:
        sampler = None

    class Online:
        sampler = object()

    where = torch.tensor([0, 3])
    terms = PairTerms(
        sample=where, slot=where, weight=torch.ones(2), t=torch.zeros(2), loser=torch.tensor([1, 2]),
        scores=torch.zeros(2, 2),
    )  # fmt: skip
    won, lost = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])
    assert RPO().to_imitate(terms, Stored(), won, lost).tolist() == [1.0, 2.0]  # row 2 stands before row 3
    assert RPO().to_imitate(terms, Online(), won, lost).tolist() == [1.0, 1.0]
    assert FlowDPO().to_imitate(terms, Stored(), won, lost).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("scores", [(0.2, 0.9), (0.5, 0.5), (0.9, 0.2)])
def test_scores_of_references_may_be_in_any_order(scores: Any, model: Path, tmp_path: Path) -> None:
    config = stored_pairs_config(tmp_path / "run", model, table(tmp_path, *[scores] * 4), {"kind": "rpo"})
    row = first_row(config)
    assert row["loss"] == pytest.approx(math.log(2) + row["fm"], abs=1e-3)
    config = stored_pairs_config(tmp_path / "dpo", model, table(tmp_path, scores), {"kind": "flow_dpo"})
    if scores[0] <= scores[1]:
        with pytest.raises(ConfigError, match="should be higher"):
            check_files(config)


# -- regions ----------------------------------------------------------------------------------------------------------


def test_maps_of_rewards_are_srums():
    local = torch.tensor([1.0, -1.0, math.nan, 0.4]).reshape(1, 1, 2, 2)
    one = torch.ones(1)
    assert regions.reward_map(local, one)[0, 0].tolist() == [[1.0, 0.5], [0.5, pytest.approx(0.7)]]
    assert regions.reward_map(local, one, signed=True)[0, 0].tolist() == [[1.0, -1.0], [0.0, pytest.approx(0.4)]]
    assert (regions.reward_map(local, -one) == 0).all()
    assert regions.reward_map(local, 0 * one)[0, 0, 0, 0] == 0.5


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 2, 4, 4)])
def test_weights_of_one_are_supervised_flow_matching(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    v = torch.randn(shape, generator=draw).requires_grad_()
    one = torch.ones(2, 1, *shape[2:])
    plain = losses.weighted_fm(v, x0, eps, torch.ones(2)).value
    torch.testing.assert_close(regions.region_fm(v, x0, eps, one, 0.0).value, plain)
    torch.testing.assert_close(regions.region_fm(v, x0, eps, 0 * one, 0.5).value, 0.5 * plain)  # the constraint alone
    (pushed,) = torch.autograd.grad(regions.region_fm(v, x0, eps, -one, 0.0).value.sum(), v)
    (pulled,) = torch.autograd.grad(plain.sum(), v)
    torch.testing.assert_close(pushed, -pulled)


def test_the_verifier_scores_the_boxes_of_objects():
    right, wrong = Obj("circle", "red", "large", (4, 4, 24, 24)), Obj("square", "blue", "large", (38, 38, 58, 58))
    image = np.moveaxis(render(Scene((right, wrong), "gray")).astype(np.float32) / 255, -1, 0)[None]
    found = shapes.regions(image, ["a red circle on a gray background"])
    side = image.shape[-1]
    at = lambda x, y: float(found[0, 0, int(y * side / 64), int(x * side / 64)])  # noqa: E731
    assert at(14, 14) == 1.0
    assert at(48, 48) == -1.0
    assert math.isnan(at(50, 10))
    half = shapes.regions(image, ["a red circle and a green square"])
    assert half[0, 0, int(48 * side / 64), int(48 * side / 64)] == pytest.approx(2 * 2 / 3 - 1)
    assert np.isnan(shapes.regions(image, ["no caption of this world"])).all()
