"""Agreement with preferences: exact numbers, and every published format from a small file with a known answer."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from align.cli.reward import FORMATS as LISTED
from align.preference import agreement as bench
from align.preference.bench import measure
from align.preference.formats import FORMATS, read_set
from alignflow.errors import DataError
from rewards.base import Reward

BRIGHTNESS = Reward("brightness", lambda media, prompts, group: media.flatten(1).mean(1))


def image(path: Path, level: int) -> str:
    """A grey image; its brightness is level / 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level,) * 3).save(path)
    return path.name


@pytest.fixture
def shades(tmp_path):
    """Images dark.png, middle.png and light.png in a folder."""
    for name, level in (("dark", 0), ("middle", 128), ("light", 255)):
        image(tmp_path / f"{name}.png", level)
    return tmp_path


def written(folder: Path, name: str, content) -> str:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


# -- numbers ----------------------------------------------------------------------------------------------------------

GAP = np.array([2.0, -1.0, 0.5, 0.0, np.nan, -0.2])
LABEL = np.array([1, 1, 0, 1, 1, 0])


def test_accuracy_without_ties_counts_equal_scores_as_wrong():
    right = bench.right_without_ties(GAP, LABEL)
    assert np.array_equal(right, [1, 0, np.nan, 0, np.nan, np.nan], equal_nan=True)


def test_accuracy_with_ties_is_of_the_three_way_verdict():
    assert np.array_equal(bench.right_with_ties(GAP, LABEL, 0.5), [1, 0, 1, 0, np.nan, 1], equal_nan=True)
    assert np.array_equal(bench.right_with_ties(GAP, LABEL, 0.0), [1, 0, 0, 0, np.nan, 0], equal_nan=True)


@given(st.lists(st.tuples(st.integers(-4, 4), st.sampled_from([-1, 0, 1])), min_size=1, max_size=12))
def test_the_tuned_threshold_is_the_smallest_of_the_best(rows):
    gap, label = np.array([g / 2 for g, _ in rows]), np.array([t for _, t in rows])
    candidates = sorted({0.0, *np.abs(gap)})
    scores = [bench.right_with_ties(gap, label, value).mean() for value in candidates]
    assert bench.tune(gap, label) == candidates[int(np.argmax(scores))]


def test_intervals_draw_whole_clusters():
    right, cluster = np.array([1.0, 1, 1, 1, 0, 0, 0, 0]), np.array([5, 5, 5, 5, 9, 9, 9, 9])
    both = bench.interval(right, cluster, draws=400)
    assert (both.value, both.low, both.high, both.count) == (0.5, 0.0, 1.0, 8)  # one prompt is all right, one all wrong
    alone = bench.interval(right, np.arange(8), draws=4000)
    assert 0.1 <= alone.low <= 0.25
    assert 0.75 <= alone.high <= 0.9
    assert bench.interval(np.array([np.nan]), np.zeros(1)).value is None
    one = bench.interval(right, np.zeros(8))
    assert (one.value, one.low, one.high) == (0.5, None, None)


def test_order_tells_a_fair_judge_from_one_that_takes_the_first():
    gap = np.array([1.0, -2.0, 3.0])
    assert bench.order(gap, -gap) == bench.Order(pairs=3, consistency=1, position_bias=0, largest_change=0)
    first = bench.order(np.ones(3), np.ones(3))
    assert (first.consistency, first.position_bias) == (0.0, 1.0)


# -- formats ----------------------------------------------------------------------------------------------------------

D, M, L = "dark.png", "middle.png", "light.png"
RANKED = [{"prompt": "a", "rank": [1, 2, 2], "image_path": [L, D, M], "raw_annotations": []}]
MMRB2 = {
    "pairs": [
        {
            "id": "x",
            "prompt_content": [["text", "a"]],
            "response_a": {"model_name": "m", "response_content": [["image", D]]},
            "response_b": {"model_name": "n", "response_content": [["image", L]]},
            "chosen": "B",
        }
    ]
}
SETS = {
    "pairs": ([{"prompt": "a", "chosen": L, "rejected": D, "tie": False}], [1]),
    "hpdv2": (RANKED, [1, 1, 0]),
    "hpdv2-train": ([{"prompt": "a", "file_path": [D, L], "human_preference": [0, 1]}], [-1]),
    "hpdv3": ([{"prompt": "a", "path1": L, "path2": D}], [1]),
    "image-reward": ([{"id": "1-2", "prompt": "a", "generations": [D, L], "ranking": [2, 1]}], [-1]),
    "pick-a-pic": (
        [
            {"caption": "a", "jpg_0": D, "jpg_1": L, "label_0": 0, "label_1": 1, "has_label": True},
            {"caption": "a", "jpg_0": D, "jpg_1": L, "label_0": 0.5, "label_1": 0.5, "has_label": True},
            {"caption": "a", "jpg_0": D, "jpg_1": L, "label_0": 1, "label_1": 0, "has_label": False},
        ],
        [-1, 0],
    ),
    "genai-bench": (
        [
            {"prompt": "a", "left_image": L, "right_image": D, "vote_type": "leftvote"},
            {"instruct_prompt": "a", "source_image": M, "left_output_image": L, "right_output_image": D,
             "vote_type": "bothbad_vote"},
            {"prompt": "a", "left_video": D, "right_video": L, "vote_type": "rightvote"},
        ],
        [1, 0, -1],
    ),
    "mj-bench": ([{"caption": "a", "image0": D, "image1": L, "label": 1, "info": "color"}], [-1]),
    "mmrb2": (MMRB2, [-1]),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETS)
def test_formats_are_read_and_brightness_agrees(kind, shades):
    content, labels = SETS[kind]
    pairs = read_set(kind.removesuffix("-train"), written(shades, "set.json", content))
    assert [pair.label for pair in pairs] == labels
    assert {pair.prompt.text for pair in pairs} == {"a"}
    found = measure(BRIGHTNESS, pairs)
    assert found.without_ties.value == 1  # every set above prefers the lighter
    assert found.pairs == len(labels)


def test_videogen_rewardbench_has_a_judgement_for_each_respect(shades):
    path = shades / "videogen-rewardbench.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "path_A", "path_B", "VQ", "MQ", "TA", "Overall"])
        rows.writerow(["a", L, D, "A", "same", "B", "A"])
        rows.writerow(["a", L, D, "A", "same", "B", ""])
    labels = {
        name: [p.label for p in read_set("videogen-rewardbench", str(path), judgement=name)] for name in ("", "MQ")
    }
    assert labels == {"": [1], "MQ": [0, 0]}
    with pytest.raises(DataError, match="'Quality'"):
        read_set("videogen-rewardbench", str(path), judgement="Quality")


def test_the_command_lists_every_format():
    assert LISTED.split(", ") == list(FORMATS)


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("mj-bench", [{"caption": "a", "image0": D, "image1": L, "label": 7}], "'label' is 7"),
        ("hpdv3", [{"prompt": "a", "path1": L, "path2": "no.png"}], "no file"),
        ("hpdv2", [{"prompt": "a", "rank": [1], "image_path": [L, D]}], "as many ranks"),
        ("pick-a-pic", [{"prompt": "a"}], "entry 1: needs 'label_0'"),
        ("mmrb2", [], "holds no pairs"),
        ("nowhere", [], "no such format"),
    ],
)
def test_what_cannot_be_read_is_named(kind, content, said, shades):
    with pytest.raises(DataError, match=said):
        read_set(kind, written(shades, "set.json", content))


# -- measuring --------------------------------------------------------------------------------------------------------


def test_the_threshold_never_comes_from_the_test_pairs_unless_it_says_so(shades):
    rows = [
        {"prompt": "a", "chosen": L, "rejected": D},
        {"prompt": "a", "chosen": M, "rejected": D, "tie": True},
    ]
    pairs = read_set("pairs", written(shades, "test.json", rows))
    plain, tuned = measure(BRIGHTNESS, pairs), measure(BRIGHTNESS, pairs, tune_on_test=True)
    assert (plain.threshold.source, plain.with_ties.value) == ("zero", 0.5)
    assert (tuned.threshold.source, tuned.with_ties.value) == ("test", 1.0)
    image(shades / "gray.png", 64)
    other = [{"prompt": "b", "chosen": "gray.png", "rejected": D, "tie": True}]
    outside = measure(BRIGHTNESS, pairs, validation=read_set("pairs", written(shades, "validation.json", other)))
    assert outside.threshold.source == "validation"
    assert outside.threshold.value == pytest.approx(64 / 255)
    assert outside.with_ties.value == 0.5
    with pytest.raises(DataError, match="among the test pairs"):
        measure(BRIGHTNESS, pairs, validation=pairs[:1])
    with pytest.raises(DataError, match="choose one"):
        measure(BRIGHTNESS, pairs, threshold=0.1, tune_on_test=True)


def test_a_judge_that_takes_the_first_is_found_out(shades):
    biased = Reward("first", lambda media, prompts, group: [1.0, 0.0], scope="group")
    pairs = read_set("pairs", written(shades, "test.json", [{"prompt": "a", "chosen": L, "rejected": D}]))
    found = measure(biased, pairs)
    assert (found.order.position_bias, found.order.consistency) == (1.0, 0.0)
    assert found.equal_scores == 1  # both orders together say nothing
    assert found.without_ties.value == 0


def test_missing_scores_are_counted_and_not_judged(shades):
    fails_on_light = Reward("sometimes", lambda media, prompts, group: [
        float("nan") if float(one.mean()) > 0.9 else float(one.mean()) for one in media
    ])  # fmt: skip
    rows = [{"prompt": "a", "path1": L, "path2": D}, {"prompt": "a", "path1": M, "path2": D}]
    found = measure(fails_on_light, read_set("hpdv3", written(shades, "test.json", rows)))
    assert (found.missing, found.without_ties.count, found.without_ties.value) == (1, 1, 1.0)


def test_bench_as_a_command(shades, capsys):
    from align.cli import app as cli

    code = shades / "judge.py"
    code.write_text("def bright(media, prompts):\n    return media.flatten(1).mean(1)\n")
    out = shades / "report.json"
    with pytest.raises(SystemExit) as done:
        cli.main([
            "reward", "bench", f"{code}:bright", "hpdv2", written(shades, "test.json", RANKED),
            "--tune-on-test", "--out", str(out),
        ])  # fmt: skip
    assert not done.value.code
    said, report = capsys.readouterr().out, json.loads(out.read_text())
    assert "TUNED ON THE TEST PAIRS" in said
    assert report["threshold"]["source"] == "test"
    assert report["without_ties"] == {"value": 1.0, "low": None, "high": None, "count": 2}  # of one prompt
