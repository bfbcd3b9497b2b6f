"""MJ-Video's head and loss: criteria, aspects and gates with exact numbers, and what they learn from a table."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nan

from align.config.load import load_reward
from align.preference.settings import load_reward_training
from align.preference.train import train_reward
from alignflow.errors import ConfigError, DataError
from benchmarks import judged_pairs
from rewards.training.heads import build_head
from rewards.training.losses import criterion_error, idle_gates, part_order
from rewards.training.objectives import Criteria
from rewards.training.settings import MoESettings, parse_head

ASPECTS = {"content": ["objects", "count"], "layout": ["relation", "background"]}
NAMES = ["content", "layout", "objects", "count", "relation", "background"]
HEAD = f"head={{kind: moe, aspects: {json.dumps(ASPECTS)}, hidden: 16}}"


def rows(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_errors_of_criteria_are_means_over_those_that_apply():
    scores, labels = rows([0.5, 3.0, 0.0], [2.0, 0.0, 0.0]), rows([1.0, nan, 1.0], [nan, nan, nan])
    assert criterion_error(scores, labels).tolist() == pytest.approx([(0.25 + 1.0) / 2, 0.0])
    logistic = criterion_error(rows([0.0, 9.0]), rows([1.0, nan]), "logistic")
    assert logistic.tolist() == pytest.approx([math.log(2)])
    half = criterion_error(rows([math.log(3)]), rows([0.25]), "logistic")  # sigmoid = 0.75
    assert half.item() == pytest.approx(-(0.25 * math.log(0.75) + 0.75 * math.log(0.25)))


def test_parts_are_ordered_by_their_labels():
    first, second = rows([1.0, 0.0, 5.0], [0.0, 2.0, 0.0]), rows([0.0, 1.0, 0.0], [0.0, 0.0, 0.0])
    labels = rows([1.0, 0.0, 0.5], [1.0, 0.2, nan]), rows([0.0, 1.0, 0.5], [1.0, 0.9, 0.0])
    win, lose = math.log1p(math.exp(-1)), math.log1p(math.exp(2))
    assert part_order(first, second, labels).tolist() == pytest.approx([win, lose])
    assert part_order(second, first, labels[::-1]).tolist() == pytest.approx([win, lose])


def test_gates_that_do_not_apply_cost_their_surprise():
    gates = rows([0.5, 0.5, 0.25, 0.75], [0.0, 1.0, 0.25, 0.75])
    labels = rows([1.0, nan, 1.0, nan], [nan, 1.0, nan, nan])
    found = idle_gates(gates, labels, [2, 2])
    assert found.tolist() == pytest.approx([math.log(2) + math.log(4), 0.0])  # of the last group nothing applies
    assert idle_gates(rows([1.0, 0.0]), rows([nan, 1.0]), [2]).item() == pytest.approx(-math.log(1e-5), rel=1e-5)


def head(**settings):
    torch.manual_seed(0)
    return build_head(parse_head({"kind": "moe", "aspects": ASPECTS, **settings}), 6, 0)


def test_equal_gates_average_and_one_hot_gates_select():
    model = head(hidden=1)
    text = torch.nn.functional.normalize(torch.ones(1, 6), dim=-1)
    with torch.no_grad():
        for gate in (model.criterion_gate, model.aspect_gate):
            for value in gate.parameters():
                value.zero_()
        model.criteria.weight.zero_()
        model.criteria.weight[:, 0] = rows(1, 2, 3, 4) / 6**0.5  # the first feature is 1 / sqrt(6)
        image = torch.zeros(1, 6)
        image[0, 0] = 1.0
        found = model(image, text)[0]
        assert found.tolist() == pytest.approx([2.5, 1.5, 3.5, 1, 2, 3, 4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
        model.criterion_gate[-1].bias[:] = rows(60, 0, 0, 60)
        model.aspect_gate[-1].bias[:] = rows(0, 60)
        assert model(image, text)[0, :3].tolist() == pytest.approx([4.0, 1.0, 4.0])


def test_the_terms_of_the_loss_add_up():
    """A pair that is right in everything, at known distances: every term by hand."""
    settings = MoESettings.model_validate({"aspects": {"a": ["x", "y"], "b": ["z"]}})
    #            score  a    b    x    y    z    gates x, y, z    gates a, b
    first = rows([1.0, 0.5, 0.0, 1.0, 0.0, 0.0, 0.25, 0.75, 1.0, 0.5, 0.5])
    second = rows([0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.25, 0.75, 1.0, 0.5, 0.5])
    labels = rows([1.0, nan, 1.0, nan, nan]), rows([0.0, nan, 0.0, nan, nan])
    one = math.log1p(math.exp(-1))
    criteria = 0.0 + 0.0  # x is labelled and exact on both sides
    aspects = 0.25 + 0.25 + math.log(2)  # errors of a, and the order of a at equal scores
    gates = 2 * (math.log(4) + math.log(2))  # y beside x, and b beside a, on both sides
    found = Criteria(kind="criteria").pair_loss(first, second, torch.ones(1), labels, settings)
    assert found.item() == pytest.approx(0.3 * criteria + aspects + 0.5 * gates + one, rel=1e-6)
    alone = Criteria(kind="criteria", aspects=0, gates=0, criteria=0)
    assert alone.pair_loss(first, second, torch.ones(1), labels, settings).item() == pytest.approx(one)
    nothing = (torch.full((1, 5), nan), torch.full((1, 5), nan))
    unlabelled = Criteria(kind="criteria").pair_loss(first, second, torch.ones(1), nothing, settings)
    assert unlabelled.item() == pytest.approx(one)  # a pair without labels has its order alone


def test_gates_learn_which_criteria_apply():
    """On prompts of two kinds, each with one criterion of its own."""
    model = build_head(parse_head({"kind": "moe", "aspects": {"a": ["x", "y"]}, "hidden": 8}), 4, 0)
    text = torch.eye(4)[:2]
    labels = rows([0.5, 1.0, nan], [0.5, nan, 1.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(150):
        gates = model(torch.eye(4)[2:], text)[:, 4:6]
        loss = idle_gates(gates, labels[:, 1:], [2]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gates[0, 0] > 0.9
    assert gates[1, 1] > 0.9


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    return {split: judged_pairs.write(folder, split, count, seed)
            for split, count, seed in (("train", 96, 0), ("heldout", 48, 1))}  # fmt: skip


def config(tables, folder, *overrides: str):
    file = folder / "mine.yaml"
    file.write_text(
        f"data: {{train: {tables['train']}, heldout: {tables['heldout']}}}\nloss: {{kind: criteria}}\n"
        "fit: {steps: 150, batch: 48, lr: 3e-3}\n"
    )
    return load_reward_training(file, [f"out={folder / 'reward'}", HEAD, *overrides])


def test_criteria_are_learned_and_reported(tables, tmp_path):
    """The world's CLIP knows what is there: the score orders more held-out pairs, and so do its parts."""
    found = train_reward(config(tables, tmp_path))
    assert found["after"]["value"] > 0.65
    assert found["after"]["order/content"] > found["before"]["order/content"]
    media = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    told = load_reward(f"{{kind: trained, path: {tmp_path / 'reward'}}}").build()(media, ["a red circle", "a cross"])
    assert {*NAMES, "distance"} == set(told.parts)
    still = train_reward(config(tables, tmp_path, "fit={lr: 0, steps: 2}", f"out={tmp_path / 'still'}"))
    assert still["after"] == still["before"]


def test_labels_of_the_embedded_world_say_what_is_wrong(tables):
    found = [json.loads(line) for line in tables["train"].read_text().splitlines()]
    for row in found:
        asked = [name for name in NAMES[2:] if row[f"chosen_score.{name}"] is not None]
        assert {row[f"chosen_score.{name}"] for name in asked} == {1.0}
        assert min(row[f"rejected_score.{name}"] for name in asked) < 1
        assert (row["chosen_score.relation"] is None) == (not any(w in row["prompt"] for w in ("of", "above", "below")))
        assert row["chosen_critique"] == f"Yes, {row['prompt']}"
        assert row["rejected_critique"].startswith("No, ")
        assert row["prompt"] != row["rejected_critique"].removeprefix("No, ")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["head={kind: moe, groups: [2, 2]}"], r"loss criteria needs names; give head\.aspects"),
        (["head.kind=mlp"], "made for head moe, not mlp"),
        (["head={kind: moe, aspects: {a: [x], b: [x]}}"], "names x twice"),
        (["head={kind: moe, aspects: {a: []}}"], "a criterion in each"),
        (["head={kind: moe, groups: [0]}"], r"head\.groups"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, said, tables, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"data: {{train: {tables['train']}}}\nloss: {{kind: criteria}}\n")
    with pytest.raises(ConfigError, match=said):
        load_reward_training(file, overrides)


def test_a_criterion_that_nobody_labelled_is_named(tables, tmp_path):
    settings = config(tables, tmp_path, "head={kind: moe, aspects: {content: [objects, taste]}}")
    with pytest.raises(DataError, match=r'no row has a number under "chosen_score\.taste"'):
        train_reward(settings)
