"""The embedded world without models: captions, splits, renderer, parser and verifier."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

from alignflow.worlds.shapes import weights, world
from alignflow.worlds.shapes.parse import UNKNOWN, parse_image
from alignflow.worlds.shapes.world import Obj, Scene, Spec, Want
from rewards.worlds.shapes import judge, score, score_batch


@pytest.fixture(scope="module")
def rendered() -> tuple[list[Spec], list[Scene], np.ndarray]:
    rng = np.random.default_rng(0)
    specs = world.sample_specs("train", 360, seed=5) + world.sample_specs("heldout", 360, seed=6)
    scenes = [world.sample_scene(s, rng) for s in specs]
    return specs, scenes, np.stack([world.render(s) for s in scenes])


def chw(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).astype(np.float32) / 255


def place(o: Obj) -> tuple[int, int]:
    """Which of the world's places an object is at, to order objects by."""
    return round((o.box[0] + o.box[2]) / 20), round((o.box[1] + o.box[3]) / 20)


def test_rendered_scenes_are_read_back_and_satisfy_their_captions(rendered):
    specs, scenes, images = rendered
    result = score_batch(chw(images), [world.caption(s) for s in specs])
    assert result["strict"].mean() >= 0.99
    assert result["reasons"] == {}
    for scene, image in zip(scenes[:60], images, strict=False):
        seen = sorted(parse_image(image).objects, key=place)
        for a, b in zip(seen, sorted(scene.objects, key=place), strict=True):
            assert (a.shape, a.colour, a.size) == (b.shape, b.colour, b.size)
            assert np.abs(np.subtract(a.box, b.box)).max() < 1.5  # a triangle's tip is thinner than a pixel


def test_images_of_other_prompts_score_low(rendered):
    specs, _, images = rendered
    order = np.random.default_rng(1).permutation(len(specs))
    result = score_batch(chw(images[order]), [world.caption(s) for s in specs])
    assert result["strict"].mean() <= 0.05
    assert result["dense"].mean() <= 0.25


def test_dense_is_one_exactly_where_strict_is(rendered):
    specs, scenes, _ = rendered
    rng = np.random.default_rng(2)
    for _ in range(3000):
        scene, spec = scenes[rng.integers(len(scenes))], specs[rng.integers(len(specs))]
        strict, dense = judge(scene, spec)
        assert 0 <= dense <= 1
        assert (dense == 1) == (strict == 1)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_parsing_does_not_depend_on_the_pixel_size(rendered, size):
    specs, scenes, _ = rendered
    right = [score(world.render(s, size), world.caption(p))[0] for s, p in zip(scenes[:60], specs, strict=False)]
    assert np.mean(right) == 1


def scene(*objects: tuple[str, str, str, float, float], background: str = "white") -> Scene:
    def box(size: str, x: float, y: float) -> tuple[float, float, float, float]:
        half = world.SIZES[size] / 2
        return (x - half, y - half, x + half, y + half)

    return Scene(tuple(Obj(shape, colour, size, box(size, x, y)) for shape, colour, size, x, y in objects), background)


RED_LEFT = scene(("circle", "red", "medium", 16, 32), ("square", "blue", "medium", 48, 34))


@pytest.mark.parametrize(
    ("prompt", "dense"),
    [
        ("a red circle left of a blue square", 1.0),
        ("a circle right of a square", 0.5),
        ("a circle above a square", None),
        ("a red circle", 0.5),
        ("two red circles", 0.5),
        ("a blue circle and a red square", 2 / 3),
        ("a red circle and a blue square on a gray background", 0.7),
        ("a small circle and a square", (2 / 3 + 1) / 2),
        ("three red circles", 1 / 3),
    ],
)
def test_partial_credit(prompt, dense):
    strict, got = judge(RED_LEFT, world.parse_caption(prompt))
    assert strict == float(got == 1.0)
    if dense is None:
        assert 0.5 <= got < 0.75
    else:
        assert got == pytest.approx(dense)


def test_more_of_the_request_never_scores_less():
    spec = world.parse_caption("three green crosses")
    places = [(16, 16), (48, 16), (16, 48), (48, 48)]
    dense = [judge(scene(*[("cross", "green", "medium", *p) for p in places[:n]]), spec)[1] for n in range(5)]
    assert dense == [*sorted(dense[:4]), dense[4]]
    assert dense[0] == 0
    assert dense[3] == 1
    assert dense[4] < 1


def test_relation_counts_in_the_best_of_equal_matchings():
    twins = scene(("circle", "red", "medium", 48, 32), ("circle", "red", "medium", 16, 32))
    assert judge(twins, world.parse_caption("a circle left of a red circle"))[0] == 1


def test_a_garbled_object_is_of_no_shape():
    image = np.full((64, 64, 3), 250, np.uint8)
    image[20:44, 20:23] = image[20:23, 20:44] = world.COLOURS["red"]
    assert [o.shape for o in parse_image(image).objects] == [UNKNOWN]
    assert score(image, "a square")[0] == 0


def test_touching_objects_of_two_colours_are_two():
    image = np.full((64, 64, 3), 250, np.uint8)
    image[20:36, 10:26], image[20:36, 26:42] = world.COLOURS["red"], world.COLOURS["green"]
    assert score(image, "a red square left of a green square")[0] == 1


def test_foreign_prompts_are_nan_with_a_reason(rendered):
    images = chw(rendered[2][:3])
    images[2, 0, 0, 0] = np.nan
    result = score_batch(images, ["a photo of a dog", "a circle", "a circle"])
    assert np.isnan(result["strict"]).tolist() == np.isnan(result["dense"]).tolist() == [True, False, True]
    assert set(result["reasons"]) == {0, 2}
    assert "dog" in result["reasons"][0]
    with pytest.raises(ValueError, match="3 media for 1 prompts"):
        score_batch(images, ["a circle"])


def random_spec(rng: np.random.Generator) -> Spec:
    def maybe(options) -> str | None:
        return str(rng.choice(list(options))) if rng.random() < 0.5 else None

    def want() -> Want:
        shape = str(rng.choice(list(world.SHAPES)))
        return Want(shape, maybe(world.COLOURS), maybe(world.SIZES), int(rng.integers(1, 5)))

    wants = (want(), want()) if rng.random() < 0.6 else (want(),)
    return Spec(wants, maybe(world.RELATIONS) if len(wants) == 2 else None, maybe(world.BACKGROUNDS))


def test_caption_and_parse_caption_are_inverse():
    rng = np.random.default_rng(3)
    for _ in range(3000):
        spec = random_spec(rng)
        kinds = {(w.shape, w.colour, w.size) for w in spec.wants}
        if len(kinds) < len(spec.wants) and spec.relation is None:
            continue
        text = world.caption(spec)
        assert world.parse_caption(text) == spec
        assert world.parse_caption(f"A photo of {text.upper()}.") == spec
        assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("An image of the red circle, to the left of a blue square!", "a red circle left of a blue square"),
        ("a orange cross on a grey background", "an orange cross on a gray background"),
        ("3 small triangles", "three small triangles"),
    ],
)
def test_lenient_captions(text, same):
    assert world.caption(world.parse_caption(text)) == same


@pytest.mark.parametrize("text", ["", "a dog", "a pink circle", "two circle", "a circles", "a circle and a circle"])
def test_captions_outside_the_grammar_are_refused(text):
    with pytest.raises(ValueError, match="caption"):
        world.parse_caption(text)


def test_held_out_combinations_are_not_in_train():
    train, held = world.sample_specs("train", 6000, 0), world.sample_specs("heldout", 1200, 0)
    assert not any(world.is_held_out(s) for s in train)
    assert all(world.is_held_out(s) for s in held)
    assert not {world.caption(s) for s in train} & {world.caption(s) for s in held}
    assert not world.HELD_OUT_PAIRS & {(w.colour, w.shape) for s in train for w in s.wants}
    assert {w.colour for s in train for w in s.wants} == {None, *world.COLOURS}


def test_the_split_does_not_depend_on_wording():
    a, b = (
        world.parse_caption("a red circle left of a blue square"),
        world.parse_caption("a blue square right of a red circle"),
    )
    assert world.is_held_out(a) == world.is_held_out(b)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_prompts_are_balanced_and_repeatable(split):
    texts = world.prompts(split, 60, seed=1)
    tasks = [world.parse_caption(t).task for t in texts]
    assert all(tasks.count(task) == 10 for task in world.TASKS)
    assert texts == world.prompts(split, 60, seed=1)
    assert texts != world.prompts(split, 60, seed=2)
    with pytest.raises(ValueError, match="known: train, heldout"):
        world.prompts("test", 1, seed=0)


def test_rendering_is_deterministic_and_scenes_are_json(rendered):
    _, scenes, images = rendered
    again = Scene.from_dict(json.loads(json.dumps(scenes[0].to_dict())))
    assert again == scenes[0]
    assert np.array_equal(world.render(again), images[0])
    assert world.render(scenes[0], 128).shape == (128, 128, 3)


def test_a_caption_without_room_is_an_error():
    crowd = Spec((Want("circle", None, "large", 4), Want("cross", None, "large", 4)))
    with pytest.raises(ValueError, match="no room"):
        world.sample_scene(crowd, np.random.default_rng(0))


def test_world_and_verifier_need_no_torch():
    code = "import sys, rewards.worlds.shapes, alignflow.worlds.shapes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_weights_name_what_exists():
    with pytest.raises(FileNotFoundError, match="no embedded weights 'sdxl'"):
        weights("sdxl")


def test_a_crowd_keeps_its_distance():
    rng = np.random.default_rng(0)
    crowds = [world.crowd(rng).objects for _ in range(200)]
    assert {len(objects) for objects in crowds} == set(range(1, 9))
    assert all(world.apart(a.box, b.box) for objects in crowds for a, b in combinations(objects, 2))
    assert {o.size for objects in crowds for o in objects} == set(world.SIZES)


def test_wrong_captions_are_wrong_and_of_their_split():
    rendered, right = world.dataset("train", 300, seed=1)
    same, said = world.dataset("train", 300, seed=1, wrong=0.6)
    assert np.array_equal(rendered, same)
    changed = [i for i in range(300) if right[i] != said[i]]
    assert 0.6 < len(changed) / 300 < 0.9
    assert not any(world.is_held_out(world.parse_caption(text)) for text in said)
    fits = [judge(parse_image(rendered[i]), world.parse_caption(said[i]))[0] for i in changed]
    assert np.mean(fits) < 0.05  # a second change may undo the first, and one word may say the same image
