"""The embedded worlds of edits and fills: instructions, splits, verifier, and the images that prompts bring."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import combinations, islice

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from align.data.inputs import read_inputs
from align.data.prompts import read_prompts
from align.worlds.measure import score_tasks
from align.worlds.train_vae import decode, encode
from alignflow.errors import DataError
from alignflow.worlds.shapes import edits, weights
from alignflow.worlds.shapes.edits import Edit, apply, change, fill, instruction, is_possible, parse_instruction
from alignflow.worlds.shapes.parse import parse_image
from alignflow.worlds.shapes.world import HELD_OUT_PAIRS, Obj, Scene, apart, parse_caption, render
from rewards import parse
from rewards.worlds.shapes_edit import judge_edit, score_edits, score_fills

RED = Obj("circle", "red", "medium", edits.box_at(edits.LATTICE["left"], 16))
BLUE = Obj("square", "blue", "medium", edits.box_at(edits.LATTICE["top right"], 16))
SMALL = Obj("cross", "cyan", "small", edits.box_at(edits.LATTICE["bottom"], 11))
SCENE = Scene((RED, BLUE, SMALL), "white")
GREEN = replace(RED, colour="green")


def some(world: str, split: str, n: int, seed: int = 0) -> list[edits.Task]:
    return list(islice(edits.TASKS[world](split, seed), n))


def pixels(scenes) -> np.ndarray:
    """[n, 3, 64, 64] in [0, 1]."""
    return np.stack([render(scene) for scene in scenes]).transpose(0, 3, 1, 2) / np.float32(255)


# -- the world --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_instructions_are_read_back_and_keep_to_their_split(split):
    tasks = some("shapes-edit", split, 300)
    assert {task.edit.kind for task in tasks} == set(edits.KINDS)
    for task in tasks:
        assert parse_instruction(task.text) == task.edit
        assert is_possible(task.source, task.edit)
        assert apply(task.source, task.edit) == task.target
        assert edits.is_held_out(task.edit) == (split == "heldout")
        named = {(task.edit.colour, task.edit.shape)}
        assert split == "heldout" or not named & HELD_OUT_PAIRS
        for a, b in combinations(task.target.objects, 2):
            assert apart(a.box, b.box)
            assert (a.colour, a.shape) != (b.colour, b.shape)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_holes_tell_place_and_size(split):
    for task in some("shapes-fill", split, 200):
        assert task.hole is not None
        hole = edits.read_mask(edits.draw_mask(task.hole) / 255)
        hidden, target = fill(task.source, hole, parse_caption(task.text).wants[0])
        assert hidden in task.source.objects
        assert target.objects[:-1] == task.target.objects[:-1]
        got, wanted = target.objects[-1], task.target.objects[-1]
        assert (got.shape, got.colour, got.size) == (wanted.shape, wanted.colour, wanted.size)
        assert np.abs(np.subtract(got.box, wanted.box)).max() <= 0.5
        assert edits.is_held_out(task.edit) == (split == "heldout")


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("Make the red circle blue.", Edit("recolour", "red", "circle", to_colour="blue")),
        ("remove the red circle", Edit("remove", "red", "circle")),
        ("add an orange cross at the bottom right", Edit("add", "orange", "cross", place="bottom right")),
        ("add a small red cross at the top", Edit("add", "red", "cross", place="top", size="small")),
        ("move the red circle to the center", Edit("move", "red", "circle", place="center")),
        ("replace the red circle by a cyan cross", Edit("replace", "red", "circle", "cyan", "cross")),
    ],
)
def test_wording(text, edit):
    assert parse_instruction(text) == edit
    assert instruction(edit) == text.lower().rstrip(".")


def test_what_is_no_edit_is_refused():
    with pytest.raises(ValueError, match="instruction 'make it blue' is not one of"):
        parse_instruction("make it blue")
    with pytest.raises(ValueError, match="holds 0 of green circle, an edit needs exactly one"):
        change(SCENE, parse_instruction("remove the green circle"))
    assert not is_possible(SCENE, parse_instruction("move the red circle to the top right"))  # the square is there
    assert not is_possible(SCENE, parse_instruction("make the red circle red"))
    with pytest.raises(ValueError, match="the mask is empty"):
        edits.read_mask(np.zeros((8, 8)))
    with pytest.raises(ValueError, match="unknown split 'test'"):
        some("shapes-edit", "test", 1)


def test_the_same_seed_draws_the_same_tasks():
    assert some("shapes-edit", "train", 40) == some("shapes-edit", "train", 40)
    assert some("shapes-edit", "train", 40) != some("shapes-edit", "train", 40, seed=1)


@pytest.mark.parametrize("world", edits.TASKS)
def test_wrong_prompts_ask_for_something_else_of_the_same_split(world):
    tasks, texts = edits.dataset(world, "train", 200, seed=3, wrong=1.0, each=4)
    changed = [(task, text) for task, text in zip(tasks, texts, strict=True) if text != task.text]
    assert len(changed) > 0.9 * len(tasks)
    wrong = [replace(task, edit=parse_instruction(text)) for task, text in changed if task.hole is None]
    assert not any(edits.is_held_out(task.edit) for task in wrong)
    if wrong:
        assert score_tasks(pixels([task.target for task in wrong]), wrong)["strict"].max() == 0


# -- the verifier -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", edits.TASKS)
def test_targets_pass_and_sources_and_other_targets_do_not(world):
    tasks = some(world, "heldout", 100, seed=4)
    targets, sources = pixels([task.target for task in tasks]), pixels([task.source for task in tasks])
    assert score_tasks(targets, tasks)["strict"].mean() >= 0.99
    assert score_tasks(sources, tasks)["dense"].max() == 0
    assert score_tasks(np.roll(targets, 1, axis=0), tasks)["strict"].mean() <= 0.05
    vae = AutoencoderKL.from_pretrained(weights("sd3") / "vae").eval()
    again = decode(vae, encode(vae, np.stack([render(task.target) for task in tasks])))
    assert score_tasks(again, tasks)["strict"].mean() >= 0.93


def judge(result: Scene, old: Obj | None, new: Obj | None) -> tuple[float, ...]:
    return judge_edit(result, SCENE, old, new)


def test_scores_of_a_recolouring():
    """Shape and colour count double, size once; the source's own likeness to the target is no merit."""

    def after(*objects: Obj, background: str = "white") -> Scene:
        return Scene(objects, background)

    assert judge(after(GREEN, BLUE, SMALL), RED, GREEN) == (1, 1, 1, 1)
    assert judge(SCENE, RED, GREEN) == (0, 0, 0, 1)
    assert judge(after(BLUE, SMALL), RED, GREEN)[1:] == (0, 0, 1)
    assert judge(after(), RED, GREEN)[1:] == (0, 0, 0)
    assert judge(after(GREEN, BLUE), RED, GREEN)[1:] == (0.5, 1, 0.5)
    assert judge(after(GREEN, BLUE, SMALL, replace(RED, box=(40, 40, 56, 56))), RED, GREEN)[1:] == pytest.approx(
        (2 / 3, 1, 2 / 3)
    )
    assert judge(after(GREEN, BLUE, SMALL, background="gray"), RED, GREEN) == (0, 0.7, 1, 0.7)
    recoloured_too = after(GREEN, replace(BLUE, colour="green"), SMALL)
    assert judge(recoloured_too, RED, GREEN)[1:] == pytest.approx((0.8, 1, 0.8))
    small = after(replace(GREEN, size="small"), BLUE, SMALL)
    assert judge(small, RED, GREEN)[2] == pytest.approx((0.8 - 0.6) / (1 - 0.6))


def test_scores_of_moving_adding_and_removing():
    moved = replace(RED, box=edits.box_at(edits.LATTICE["center"], 16))
    assert judge(Scene((moved, BLUE, SMALL), "white"), RED, moved)[1] == 1
    assert judge(Scene((RED, moved, BLUE, SMALL), "white"), RED, moved)[1:] == (0.5, 0.5, 1)
    assert judge(Scene((BLUE, SMALL), "white"), RED, moved)[1] == 0
    near = replace(moved, box=edits.box_at((40.0, 32.0), 16))
    assert judge(Scene((near, BLUE, SMALL), "white"), RED, moved)[1] == pytest.approx(0.5)
    assert judge(SCENE, RED, None)[1] == 0
    assert judge(Scene((BLUE, SMALL), "white"), RED, None)[1] == 1
    assert judge(Scene((SMALL,), "white"), RED, None)[1] == 0.5
    assert judge(SCENE, None, moved)[1] == 0
    assert judge(Scene((RED, BLUE, SMALL, moved), "white"), None, moved)[1] == 1


def test_what_cannot_be_judged_is_nan_with_a_reason():
    image = pixels([SCENE, SCENE])
    found = score_edits(image, image, ["make it blue", "remove the green circle"])
    assert np.isnan(found["dense"]).all()
    assert "is not one of" in found["reasons"][0]
    assert "needs exactly one" in found["reasons"][1]
    mask = np.zeros((2, 1, 64, 64), np.float32)
    mask[1] = 1
    found = score_fills(image, image, mask, ["a red circle", "a circle"])
    assert "the mask is empty" in found["reasons"][0]
    assert "a named colour" in found["reasons"][1]


def test_rewards_are_given_the_source():
    task = some("shapes-edit", "train", 1)[0]
    source, target = (torch.from_numpy(pixels([scene])) for scene in (task.source, task.target))
    reward = parse("shapes_edit").build()
    scores = reward(torch.cat([source, target]), [task.text] * 2, None, {"image": source.expand(2, -1, -1, -1)})
    assert scores.values.tolist() == [0, 1]
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "strict": [0, 1], "dense": [0, 1], "done": [0, 1], "kept": [1, 1],
    }  # fmt: skip


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "names"), [("shapes-edit", {"image"}), ("shapes-fill", {"image", "mask"})])
def test_prompts_bring_their_images(world, names):
    prompts = read_prompts(f"{world}:heldout", 8, seed=2)
    tasks = some(world, "heldout", 8, seed=2)
    assert [prompt.text for prompt in prompts] == [task.text for task in tasks]
    assert {name for prompt in prompts for name in prompt.media} == names
    inputs = read_inputs(prompts, {*names, "metadata"}, (64, 64))
    np.testing.assert_array_equal(inputs["image"].numpy(), pixels([task.source for task in tasks]))
    for i, task in enumerate(tasks):
        assert Scene.from_dict(inputs["metadata"][i]["target"]) == task.target
        assert parse_image(inputs["image"][i].permute(1, 2, 0).numpy()).background == task.source.background
        if task.hole:
            np.testing.assert_array_equal(inputs["mask"][i, 0].numpy() * 255, edits.draw_mask(task.hole))


def test_unknown_worlds_and_splits_name_those_there_are():
    for source in ("shapes-edits:train", "shapes-edit:test"):
        with pytest.raises(
            DataError, match="the embedded worlds are shapes, shapes-edit, shapes-fill, shapes-video, each with"
        ):
            read_prompts(source)


def test_the_world_needs_no_torch():
    code = "import sys, rewards.worlds.shapes_edit, align.data.prompts as p; p.read_prompts('shapes-edit:train', 1)"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
