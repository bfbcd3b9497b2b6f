"""GenEval's rules on hand-made boxes, layouts, and what a detector of transformers is made into."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

import rewards
from rewards.base import RewardError
from rewards.geneval_rules import judge, read_task, relations
from rewards.networks.detector import Box, Detector, Found

NAMES = {0: "dog", 1: "cat", 2: "sofa"}


def at(x, y, size=10.0, score=0.95, mask=None):
    return Found(score, Box(x - size / 2, y - size / 2, x + size / 2, y + size / 2), mask)


def no_colours(name, found):
    raise AssertionError("no color was asked for")


def verdict(objects, include, exclude=(), tag="", colours=no_colours):
    return tuple(judge(objects, read_task(include, exclude, tag), colours))


# GenEval: offset of centres, shortened by 0.1 of both extents, over its own length; above 1/2 it is a relation
@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (30, 30, {"right of", "below"}),  # (30 - 2) / 42.4 = 0.66 on both
        (30, 20, {"right of"}),  # 28 / 36.1 = 0.78, 18 / 36.1 = 0.4992: just not below
        (30, 20.1, {"right of", "below"}),  # 18.1 / 36.11 = 0.5012
        (2, 2, set()),  # nothing is left of either
        (3, 0, set()),  # (3 - 2) / 3 = 1/3
        (4.1, 0, {"right of"}),  # 2.1 / 4.1 = 0.51
        (0, 0, set()),
    ],
)
def test_relations_of_boxes(x, y, said):
    assert relations(at(50 + x, 50 + y).box, at(50, 50).box) == said


def test_counts_are_at_least_or_exactly():
    two = [{"class": "dog", "count": 2}]
    no_third = [{"class": "dog", "count": 3}]
    dogs = [at(10 * i, 0) for i in range(20)]
    assert verdict({"dog": dogs[:2]}, two) == (1, 1, 1)
    assert verdict({"dog": dogs[:3]}, two) == (1, 0, 0.5)
    assert verdict({"dog": dogs[:3]}, two, no_third) == (0, 0, 0.5)
    assert verdict({"dog": dogs[:1]}, two, no_third) == (0, 0, 0.5)
    assert verdict({}, two) == (0, 0, 0)
    assert verdict({"dog": dogs}, two) == (1, 0, 1 - 14 / 2)  # 16 count of 20
    assert verdict({"dog": dogs[:2]}, [*two, {"class": "cat", "count": 1}]) == (0, 0, 0.5)
    # only GenEval itself forbids
    assert verdict({"dog": dogs[:2], "cat": dogs[:1]}, two, [{"class": "cat", "count": 1}]) == (0, 1, 1)


def test_colours_are_asked_for_the_surest():
    asked = []

    def colours(name, found):
        asked.append((name, len(found)))
        return ["red" if one.score > 0.5 else "blue" for one in found]

    want = [{"class": "dog", "count": 1, "color": "red"}]
    assert verdict({"dog": [at(0, 0), at(9, 0, score=0.4)]}, want, colours=colours) == (1, 0, 0.0)
    assert asked == [("dog", 1)]  # the strict count is wrong already
    assert verdict({"dog": [at(0, 0)]}, want, colours=colours) == (1, 1, 1)
    assert verdict({"dog": [at(0, 0, score=0.4)]}, want, colours=colours) == (0, 0, 0.5)
    pair = [{"class": "dog", "count": 2, "color": "red"}]
    assert verdict({"dog": [at(0, 0), at(9, 0, score=0.4)]}, pair, colours=colours) == (0, 0, 0.75)


def test_places_are_from_what_an_earlier_clause_found():
    want = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
    dog = {"dog": [at(50, 50)]}
    assert verdict({**dog, "cat": [at(10, 50)]}, want) == (1, 1, 1)
    assert verdict({**dog, "cat": [at(90, 50)]}, want) == (0, 0, pytest.approx(2 / 3))  # a wrong place counts once
    assert verdict({"cat": [at(10, 50)]}, want) == (0, 0, pytest.approx(1 / 3))
    assert verdict(dog, want) == (0, 0, pytest.approx(1 / 3))
    # a second dog further left: published looks at the surest
    assert verdict({"dog": [at(50, 50), at(0, 50)], "cat": [at(10, 50)]}, want) == (1, 0, pytest.approx(1 / 3))


@pytest.mark.parametrize(
    ("include", "said"),
    [
        ([], "include is empty"),
        (["dog"], r"include\[0\] should be a mapping"),
        ([{"count": 1}], "names no class"),
        ([{"class": "dog", "count": 0}], "count should be 1 or more"),
        ([{"class": "dog", "count": 1, "color": "grey"}], "color 'grey' is not one of red"),
        ([{"class": "dog", "count": 1, "position": ["left of", 0]}], "an earlier clause"),
        (
            [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["near", 0]}],
            r"include\[1\]: position",
        ),
    ],
)
def test_wrong_metadata_are_named(include, said):
    with pytest.raises(ValueError, match=said):
        read_task(include, [])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny networks of both kinds with random weights."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("detectors")
    labels = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=6,
        **labels,
    )
    YolosForObjectDetection(config).save_pretrained(root / "yolos")
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(root / "yolos")
    swin = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = dict.fromkeys(["feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim"], 32)
    few = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 16, "num_queries": 5}
    segmenter = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, **sizes, **few, **labels))
    segmenter.save_pretrained(root / "mask2former")
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(root / "mask2former")
    return root


@pytest.mark.parametrize("kind", ["yolos", "mask2former"])
def test_detectors_of_transformers_give_named_boxes(folders, kind):
    detector = Detector.load(str(folders / kind), "cpu")
    media = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    both = detector(media, 0.0)
    assert len(both) == 2
    for objects in both:
        assert objects
        assert set(objects) <= set(NAMES.values())
        for found in objects.values():
            assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
            for one in found:
                left, top, right, bottom = one.box
                assert 0 <= left <= right <= 48
                assert 0 <= top <= bottom <= 40
                if one.mask is not None:
                    assert one.mask.shape == (40, 48)
                    assert one.mask.any(0).nonzero().aminmax() == (left, right - 1)
                    assert one.mask.any(1).nonzero().aminmax() == (top, bottom - 1)
    highest = max(found[0].score for found in both[0].values())
    assert detector(media[:1], highest) == [{}]  # above, not at, the threshold
    assert detector.known("couch") == "sofa"
    assert detector.unknown(["dog", "couch", "zebra"]) == ["zebra"]


def test_what_is_no_detector_is_refused(folders, tmp_path):
    config = json.loads((folders / "yolos" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(RewardError, match="holds a bert model"):
        Detector.load(str(tmp_path), "cpu")
    nameless = {**config, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    YolosForObjectDetection(YolosConfig.from_dict(nameless)).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="does not name its classes"):
        Detector.load(str(tmp_path), "cpu")
    YolosForObjectDetection.from_pretrained(folders / "yolos").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    some = {key: value for key, value in weights.items() if not key.startswith("class_labels_classifier.layers.0")}
    save_file(some, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"2 weights are missing \(class_labels_classifier.layers.0.bias"):
        Detector.load(str(tmp_path), "cpu")


class Painted:
    """A detector that finds what is one of two plain values: a dog where red is 1, a cat where green is 1."""

    names = NAMES
    model = torch.nn.Linear(1, 1)
    known, unknown = Detector.known, Detector.unknown

    def __call__(self, images, threshold):
        found = []
        for image in images:
            masks = {"dog": image[0] == 1, "cat": image[1] == 1}
            found.append({name: [Found(0.8, outline(mask), mask)] for name, mask in masks.items() if mask.any()})
        return [
            {name: kept for name, many in one.items() if (kept := [f for f in many if f.score > threshold])}
            for one in found
        ]


def outline(mask):
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return Box(float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))


@pytest.fixture
def painted(monkeypatch):
    monkeypatch.setattr(Detector, "load", classmethod(lambda cls, *args: Painted()))


def painting(dog, cat=None):
    image = torch.full((3, 40, 60), 0.2)
    for channel, box in enumerate([dog, cat]):
        if box:
            image[channel, box[1] : box[3], box[0] : box[2]] = 1
    return image


def test_geneval_from_rows_to_scores(painted):
    reward = rewards.parse({"kind": "geneval", "clip": "shapes", "score": "strict"}).build()
    pair = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}]
    media = torch.stack([painting((0, 5, 20, 30), (30, 5, 50, 30))] * 6)
    media[1] = painting((30, 5, 50, 30), (0, 5, 20, 30))
    rows = [
        {"include": pair},
        {"include": pair},
        {"include": json.dumps(pair)},  # as a csv file holds it
        {"include": [{"class": "dog", "count": 1}], "tag": "counting"},  # 0.8 does not count there
        {"include": [{"class": "zebra", "count": 1}]},
        {},
    ]
    scores = reward(media, [""] * 6, None, {"metadata": rows})
    assert scores.values[:4].tolist() == [1, 0, 1, 0]
    assert scores.parts["dense"][:4].tolist() == pytest.approx([1, 2 / 3, 1, 0])
    assert scores.reasons.keys() == {4, 5}
    assert "no class 'zebra'" in scores.reasons[4]
    assert "no 'include'" in scores.reasons[5]
    clip = reward(media[:2][None], [""], None, {"metadata": rows[:1]})
    assert clip.values.item() == 0.5


def test_colours_are_of_the_object_on_grey(painted, monkeypatch):
    import rewards.verifiers.geneval as geneval

    seen = []
    monkeypatch.setattr(
        geneval, "_crop", lambda image, one, crop=geneval._crop: seen.append(crop(image, one)) or seen[-1]
    )
    reward = rewards.parse({"kind": "geneval", "clip": "shapes"}).build()
    media = painting((10, 5, 30, 25))
    media[0, 5:10, 10:15] = 0.2  # a corner that is not the object
    rows = [{"include": [{"class": "dog", "count": 1, "color": "red"}]}]
    dense = reward(media[None], [""], None, {"metadata": rows}).values.item()
    assert dense in (0.5, 1.0)
    crop = seen[0]
    assert crop.shape == (3, 20, 20)
    assert crop[:, 0, 0].tolist() == pytest.approx([0.6] * 3)
    assert crop[:, 10, 10].tolist() == pytest.approx([1, 0.2, 0.2])


def test_a_blind_detector_is_found_at_the_start(painted, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 40), "red").save(tmp_path / "dog.png")
    settings = {"kind": "geneval", "clip": "shapes"}
    rewards.parse({**settings, "probe": [str(tmp_path / "dog.png"), "dog"]}).build()
    with pytest.raises(RewardError, match=r"finds no 'cat' in .*, but dog"):
        rewards.parse({**settings, "probe": [str(tmp_path / "dog.png"), "cat"]}).build()


def test_layout_is_iou_in_shares_of_the_image(painted):
    reward = rewards.parse({"kind": "layout"}).build()
    media = torch.stack([painting((0, 0, 30, 20), (30, 20, 60, 40))] * 4)
    dog, cat = {"class": "dog", "box": [0, 0, 0.5, 0.5]}, {"class": "cat", "box": [0.5, 0, 1, 1]}
    rows = [{"boxes": [dog]}, {"boxes": [dog, cat]}, {"boxes": [dog, dog]}, {"boxes": [{**dog, "box": [0, 0, 60, 40]}]}]
    scores = reward(media, [""] * 4, None, {"metadata": rows})
    assert scores.values[:3].tolist() == pytest.approx([1, 0.75, 0.5])  # a box that is found is used once
    assert scores.reasons.keys() == {3}
    assert "boxes[0] should be" in scores.reasons[3]


def test_genevals_file_is_a_prompt_file(painted, tmp_path):
    from align.data.inputs import read_inputs
    from align.data.prompts import read_prompts

    row = {"tag": "two_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row) + "\n")
    prompts = read_prompts(str(tmp_path / "evaluation_metadata.jsonl"))
    reward = rewards.parse({"kind": "geneval", "clip": "shapes"}).build()
    inputs = read_inputs(prompts, {"metadata"}, (40, 60))
    assert reward(painting((0, 0, 9, 9))[None], [prompts[0].text], None, inputs).values.tolist() == [1]


def test_boxes_are_matched_where_they_overlap_most():
    from rewards.verifiers.layout import iou, mean_iou

    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    assert mean_iou({"dog": [left, right]}, {"dog": [right, left]}) == 1
    # one found box overlaps both: it goes where it is worth most, the other is missing
    assert mean_iou({"dog": [left, right]}, {"dog": [(0.25, 0.0, 1.0, 1.0)]}) == pytest.approx((2 / 3) / 2)
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou(left, right) == 0
