"""Images that come with prompts reach the generator and the rewards that want them, and mistakes name their row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_flux2
import tiny_image
import tiny_run
import torch
import written
from PIL import Image
from safetensors.torch import load_file

from align.config.sections import Evaluate
from align.data.inputs import encode, read_inputs
from align.data.media import fit, read_pixels, to_tensor
from align.data.prompts import Prompt, read_prompts
from align.evaluation.evaluate import evaluate, evaluate_run, sample_media
from align.policy.lora import FILE
from align.training.trainer import train
from alignflow.errors import DataError
from generators.base import Options
from generators.load import adapter
from rewards.base import Reward, RewardError
from rewards.call import CallableReward
from rewards.wrappers.mixture import Mixture

run = written.run
KINDS = {
    "flux_kontext": lambda: tiny_image.flux("FluxKontextPipeline"),
    "flux_fill": tiny_image.flux_fill,
    "flux2_edit": tiny_flux2.dev,
    "flux2_klein_edit": tiny_flux2.klein,
}
SIZE = (32, 32)


def likeness(media, prompts, image):
    """Less the distance from the source: a reward for leaving the image alone."""
    return -(media - image).abs().mean(dim=(1, 2, 3))


def inside(media, prompts, image, mask, metadata, group):
    """Distance from the source where the mask is, times the weight of the prompt's row."""
    assert media.shape == image.shape
    assert mask.shape == (len(media), 1, *media.shape[2:])
    weight = torch.tensor([float(row["weight"]) for row in metadata])
    assert [float(prompt.rsplit(" ", 1)[1]) for prompt in prompts] == weight.tolist()
    return weight * ((media - image).abs() * mask).mean(dim=(1, 2, 3))


@pytest.fixture
def edits(tmp_path):
    """A table of six edits with images and masks of several sizes; its rows."""
    rows, source = [], np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(6):
        height, width = 40, 40 + 8 * (i % 3)
        Image.fromarray(source.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"images/{i}.png")
        mask = np.zeros((height, width), np.uint8)
        mask[10:30, 10:30] = 255
        Image.fromarray(mask).save(tmp_path / f"images/mask{i}.png")
        rows.append({"prompt": f"edit {i}", "image": f"images/{i}.png", "mask": f"images/mask{i}.png", "weight": i})
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return rows


def config_of(folder: Path, kind: str, prompts: str = "edits.jsonl", reward: str = "inside"):
    model = folder / "model"
    if not model.is_dir():
        KINDS[kind]().save_pretrained(model)
    return tiny_run.settings(
        folder,
        model,
        generator={"kind": kind, "path": str(model), "size": SIZE, "device": "cpu"},
        prompts={"train": str(folder / prompts), "heldout": str(folder / prompts)},
        rollout={"prompts": 2, "group": 2, "sampler": {"steps": 2}},
        reward={"kind": f"tests.test_editors:{reward}"},
        evaluate={
            "every": 0,
            "prompts": 3,
            "sampler": {"steps": 2},
            "rewards": {"gold": {"kind": "tests.test_editors:likeness"}},
            "gold": "gold",
        },
        train={"steps": 1},
    )


@pytest.fixture
def generator():
    return adapter("flux_fill")(KINDS["flux_fill"](), Options(size=SIZE))


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_config_trains_an_editor_from_a_table(kind, edits, tmp_path):
    config = config_of(tmp_path, kind)
    summary = train(config)
    assert summary["status"] == "finished"
    assert summary["gold_before"] < 0
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["missing"] == 0 for row in rows if row["event"] == "train")
    assert next(row for row in rows if row["event"] == "eval")["missing"] == {"gold": 0}  # inside compares a group
    lora = load_file(config.run_dir / "lora" / FILE)
    assert max(float(value.abs().max()) for name, value in lora.items() if "lora_B" in name) > 0  # it starts at 0


def test_an_editor_learns_from_stored_pairs(edits, tmp_path):
    pairs = [{**row, "chosen": edits[0]["image"], "rejected": edits[1]["image"]} for row in edits]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    config = config_of(tmp_path, "flux_fill")
    rollout = {"kind": "pairs", "file": str(tmp_path / "pairs.jsonl"), "prompts": 2}
    tree = {**config.model_dump(mode="json"), "rollout": rollout, "recipe": {"kind": "flow_dpo", "timesteps": 2}}
    config = type(config).model_validate({**tree, "reward": None})
    assert train(config)["status"] == "finished"


def test_sample_takes_images_by_name_or_from_a_table(edits, tmp_path, run):
    config = config_of(tmp_path, "flux_fill")
    file = tmp_path / "run.yaml"
    from align.config.load import dump_config

    file.write_text(dump_config(config))
    images = ["--image", str(tmp_path / edits[4]["image"]), "--mask", str(tmp_path / edits[4]["mask"])]
    one, table = str(tmp_path / "one"), str(tmp_path / "table")
    assert run("sample", str(file), "--prompt", "edit 4", *images, "--out", one)[0] == 0
    assert run("sample", str(file), "--prompts-file", str(tmp_path / "edits.jsonl"), "--out", table)[0] == 0
    assert json.loads(Path(table, "prompts.json").read_text())["prompts"] == [row["prompt"] for row in edits]
    code, _, err = run("sample", str(file), "--prompt", "edit 4", *images[:2], "--out", str(tmp_path / "none"))
    assert code == 2, err
    assert "--prompt 'edit 4': FluxFillPipeline needs 'mask' with every prompt" in err
    assert not (tmp_path / "none").exists()


def test_score_gives_rewards_what_they_want(edits, tmp_path, run):
    files = [str(tmp_path / row["image"]) for row in edits[:2]]
    kind = "tests.test_editors:likeness"
    table = ["--prompts-file", str(tmp_path / "two.jsonl")]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, edits[:2])))
    code, out, _ = run("score", *files, *table, "--reward", kind, "--json")
    assert code == 0
    assert [row["scores"][kind] for row in json.loads(out)] == [0.0, 0.0]  # each is its own source
    code, _, err = run("score", *files, "--prompt", "a", "--reward", kind)
    assert code == 1
    assert "likeness score: --prompt 'a': reward 'likeness' needs 'image' with every prompt" in err


def test_evaluate_reads_a_table(edits, tmp_path):
    config = config_of(tmp_path, "flux_kontext", reward="likeness")
    row = evaluate_run(config)
    assert row["prompts"] == 3
    assert -1 < row["scores"]["gold"] < 0


# -- what reaches whom ------------------------------------------------------------------------------------------------


def test_inputs_are_read_at_the_generators_size(edits, tmp_path):
    prompts = read_prompts(str(tmp_path / "edits.jsonl"))
    inputs = read_inputs(prompts, ["image", "mask", "metadata"], SIZE)
    assert inputs["image"].shape == (6, 3, *SIZE)
    assert inputs["mask"].shape == (6, 1, *SIZE)
    assert set(inputs["mask"][:, :, 16, 16].flatten().tolist()) == {1.0}
    assert set(inputs["mask"][:, :, 0, 0].flatten().tolist()) == {0.0}
    assert inputs["metadata"] == [{"weight": i} for i in range(6)]
    source = fit(read_pixels(tmp_path / edits[2]["image"]), SIZE)
    assert torch.equal(inputs["image"][2], to_tensor(source))
    assert read_inputs(prompts, [], SIZE) == {}


def test_a_prompt_met_twice_is_encoded_once(edits, tmp_path, generator, monkeypatch):
    one, two = read_prompts(str(tmp_path / "edits.jsonl"), 2)
    seen = []
    inner = generator.encode
    monkeypatch.setattr(generator, "encode", lambda texts, inputs: seen.append(texts) or inner(texts, inputs))
    cond, inputs = encode(generator, [one, two, one], ["metadata"])
    assert seen == [["edit 0", "edit 1"]]
    assert [row["weight"] for row in inputs["metadata"]] == [0, 1, 0]
    for value in cond.tensors.values():
        assert torch.equal(value[0], value[2])
    assert not torch.equal(cond.tensors["beside"][0], cond.tensors["beside"][1])


def test_a_sample_depends_on_its_seed_and_number_alone(edits, tmp_path, generator):
    prompts = read_prompts(str(tmp_path / "edits.jsonl"))
    settings = Evaluate(sampler={"steps": 2})
    reward = {"likeness": CallableReward(kind="tests.test_editors:likeness").build()}

    def media(**changes):
        some = settings.model_copy(update=changes.pop("settings", {}))
        return evaluate(generator, prompts, reward, some, show=6, **changes)

    whole, parts, few = media(), media(settings={"chunk": 4}), media(indices=[2, 5])
    torch.testing.assert_close(whole.media, parts.media, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.media[[2, 5]], few.media, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.scores["likeness"][[2, 5]], few.scores["likeness"], atol=1e-5, rtol=0)
    again = sample_media(generator, prompts, whole.seeds, settings.sampler)
    torch.testing.assert_close(whole.media, again, atol=1e-5, rtol=0)
    assert not torch.equal(whole.media, media(settings={"seed": 1}).media)


# -- rewards ----------------------------------------------------------------------------------------------------------

MEDIA = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_a_reward_gets_what_it_wants_and_no_more():
    plain = Reward("plain", lambda media, prompts, group: [1.0, 2.0])
    assert plain(MEDIA, ["a", "b"], None, {"image": MEDIA}).values.tolist() == [1, 2]
    given = {}

    def function(media, prompts, group, **inputs):
        given.update(inputs)
        return [1.0, 2.0]

    wanting = Reward("wanting", function, wants=("image",))
    wanting(MEDIA, ["a", "b"], None, {"image": MEDIA, "mask": MEDIA[:, :1]})
    assert list(given) == ["image"]
    with pytest.raises(RewardError, match="reward 'wanting' needs 'image' with every prompt, but there is none"):
        wanting(MEDIA, ["a", "b"])
    with pytest.raises(RewardError, match="2 prompts, but 1 of 'image'"):
        wanting(MEDIA, ["a", "b"], None, {"image": MEDIA[:1]})


def test_callables_and_mixtures_pass_their_wishes_on():
    kinds = {name: {"kind": f"tests.test_editors:{name}"} for name in ("likeness", "inside")}
    assert CallableReward(**kinds["likeness"]).build().wants == ("image",)
    mixture = Mixture(parts={name: {"reward": reward} for name, reward in kinds.items()}).build()
    assert set(mixture.wants) == {"image", "mask", "metadata"}
    inputs = {"image": MEDIA + 0.25, "mask": torch.ones(2, 1, 4, 4), "metadata": [{"weight": 1}, {"weight": 3}]}
    scores = mixture(MEDIA, ["edit 1", "edit 3"], None, inputs)
    torch.testing.assert_close(scores.values, torch.tensor([0.0, 0.5]))


# -- messages ---------------------------------------------------------------------------------------------------------


def test_images_that_do_not_serve_name_their_row(edits, tmp_path, generator):
    def says(message, **media):
        prompt = Prompt("x", media, place="edits.jsonl line 7")
        with pytest.raises(DataError, match=message) as caught:
            encode(generator, [prompt])
        assert str(caught.value).startswith("edits.jsonl line 7: ")

    image, mask = (tmp_path / edits[0][name] for name in ("image", "mask"))
    other = tmp_path / edits[1]["mask"]
    says("images of one prompt must be of one size.* image 40 x 40, mask 40 x 48", image=image, mask=other)
    (tmp_path / "bad.png").write_text("no")
    says("'mask': .*bad.png is not an image that can be read", image=image, mask=tmp_path / "bad.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(
        tmp_path / "two.gif", save_all=True, append_images=[Image.new("L", (8, 8), 255)]
    )
    says("'image' is a video of 2 frames; give an image", image=tmp_path / "two.gif", mask=mask)


@pytest.mark.parametrize(
    ("missing", "kind", "says"),
    [
        ("mask", "flux_fill", "edits.jsonl line 2: FluxFillPipeline needs 'mask' with every prompt"),
        ("mask", "flux_kontext", "edits.jsonl line 2: the reward needs 'mask' with every prompt"),
        ("image", "flux_kontext", "edits.jsonl line 2: FluxKontextPipeline needs 'image' with every prompt"),
    ],
)
def test_training_refuses_prompts_without_images_before_any_work(edits, tmp_path, missing, kind, says):
    del edits[1][missing]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, edits)))
    config = config_of(tmp_path, kind)
    with pytest.raises(DataError, match=says):
        train(config)
    assert not config.run_dir.exists()
    without = config.model_copy(update={"prompts": config.prompts.model_copy(update={"heldout": None})})
    with pytest.raises(DataError, match=says):
        train(without)


def test_prompts_of_the_embedded_world_have_no_images(generator):
    with pytest.raises(DataError, match="shapes:heldout, prompt 0: FluxFillPipeline needs 'image' with every prompt"):
        sample_media(generator, read_prompts("shapes:heldout", 1), [0], Evaluate().sampler)
    with pytest.raises(DataError, match="'a cat': FluxFillPipeline needs 'image'"):
        sample_media(generator, ["a cat"], [0], Evaluate().sampler)
