"""Heads on a vision-language model: what they read, that they learn, go on exactly, and come back from their folder."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny_vlm
import torch
import written
from PIL import Image
from safetensors.torch import load_file

from align.config.load import load_reward
from align.data.media import read_media
from align.preference.settings import load_reward_training
from align.preference.train import train_reward
from alignflow.errors import CheckpointError, ConfigError, DataError, RunFolderError
from rewards.base import RewardError
from rewards.judges.asking import Replies
from rewards.judges.loading import load_judge
from rewards.networks.query_attention import QueryReader
from rewards.training import vlm
from rewards.training.heads import build_head
from rewards.training.losses import per_dimension
from rewards.training.settings import MLPSettings, Thought, VLMBackbone
from rewards.training.thoughts import Thoughts
from rewards.training.vlm import VLMScorer

run = written.run
NAMES = ("light", "red")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_vlm.save(tmp_path_factory.mktemp("vlm"), "Qwen2VL")


def table(folder, name: str, count: int, seed: int, frames: int = 0, **columns) -> str:
    """Pairs of which the lighter sample is chosen, and the rejected one is redder."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        files, suffix = {}, "webp" if frames else "png"
        for side, level in zip(("rejected", "chosen"), rng.uniform([0.1, 0.5], [0.4, 0.9]), strict=True):
            pixels = np.clip(level + 0.02 * rng.standard_normal((8, 8, 3)), 0, 1)
            pixels[..., 0] += 0.1 * (side == "rejected")
            image = Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8))
            files[side] = f"{name}-{i}-{side}.{suffix}"
            more = {"save_all": True, "append_images": [image] * (frames - 1), "lossless": True} if frames else {}
            image.save(folder / files[side], **more)
        labels = {"chosen_score.light": 1, "rejected_score.light": 0, "chosen_score.red": 0, "rejected_score.red": 1}
        rows.append({"prompt": "light", **files, **labels, **columns})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(folder, model, *overrides: str, frames: int = 0, out: str = "reward", **columns):
    train, heldout = (table(folder, name, n, seed, frames, **columns) for name, n, seed in
                      (("train", 24, 0), ("heldout", 16, 1)))  # fmt: skip
    file = folder / "mine.yaml"
    file.write_text(
        f"data: {{train: {train}, heldout: {heldout}}}\n"
        f"backbone: {{kind: vlm, model: {model}, dtype: float32, chunk: 32, rank: 4, alpha: 8}}\n"
        "fit: {steps: 24, batch: 12, lr: 1e-2, backbone_lr: 1e-2, log_every: 8}\n"
    )
    return load_reward_training(file, [f"out={folder / out}", *overrides])


def scores(folder, media, prompts=None):
    reward = load_reward(f"{{kind: trained, path: {folder}}}").build()
    return reward(media, prompts or ["light"] * len(media))


# -- losses -----------------------------------------------------------------------------------------------------------


def test_every_dimension_has_its_own_order_and_its_own_ties():
    """At equal scores with k = 5: a win ln 6, a tie ln 1.5; an unknown dimension does not count."""
    zero = torch.zeros(4, 2)
    nan = math.nan
    labels = (torch.tensor([[1.0, 3], [1, nan], [1, 0], [nan, nan]]), torch.tensor([[0.0, 3], [0, 1], [2, 0], [1, 2]]))
    found = per_dimension(zero, zero, labels)
    win, tie = math.log(6), math.log(1.5)
    assert found.tolist() == pytest.approx([(win + tie) / 2, win, (win + tie) / 2, 0.0], abs=1e-6)
    apart = per_dimension(zero + math.log(5), zero, (torch.ones(4, 2), torch.zeros(4, 2)))
    assert apart.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)
    turned = per_dimension(zero, zero + math.log(5), (torch.zeros(4, 2), torch.ones(4, 2)))
    assert torch.allclose(apart, turned)


def test_unknown_dimensions_have_no_gradient():
    first = torch.zeros(1, 2, requires_grad=True)
    per_dimension(first, torch.zeros(1, 2), (torch.tensor([[1.0, math.nan]]), torch.zeros(1, 2))).sum().backward()
    assert first.grad[0, 0] < 0
    assert first.grad[0, 1] == 0


# -- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
@pytest.mark.parametrize("read", ["query", "last", "layers"])
def test_features_belong_to_one_sample_and_follow_its_pixels_and_its_prompt(family, read, tmp_path):
    folder = tiny_vlm.save(tmp_path, family)
    settings = VLMBackbone(model=str(folder), dtype="float32", chunk=2, read=read, queries=2, layers=2)
    scorer = VLMScorer.load(settings, "cpu", True)
    media, prompts = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ["a", "a longer one", "b"]
    media.requires_grad_()
    found = scorer.embed(list(media), prompts, 1)
    assert found.shape == (3, scorer.width) == (3, 64 if read == "query" else 32)
    assert torch.allclose(found.norm(dim=-1), torch.ones(3), atol=1e-6)
    assert torch.allclose(scorer.embed([media[1]], [prompts[1]], 1)[0], found[1], atol=1e-5)
    assert not torch.allclose(scorer.embed([media[1]], ["another"], 1)[0], found[1], atol=1e-3)
    found[0].sum().backward()
    assert media.grad[0].abs().sum() > 0
    assert media.grad[1:].abs().sum() == 0
    assert scorer.text(prompts, 1).shape == found.shape
    video = torch.stack([media[0], media[1]]).detach()
    assert not torch.allclose(scorer.embed([video], ["a"], 1), scorer.embed([video.flip(0)], ["a"], 1), atol=1e-4)


def test_the_query_is_read_where_its_embedding_stands(model):
    """With the embedding of the placeholder's own token the hidden state is that of the token."""
    scorer = VLMScorer.load(VLMBackbone(model=str(model), dtype="float32"), "cpu", False)
    words = scorer.judge.model.get_input_embeddings().weight
    media, prompts = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ["a"]
    other = scorer.embed(list(media), prompts, 1)
    with torch.no_grad():
        scorer.queries[:] = words[scorer.judge.encode(".")[0]]
        asked = scorer.question(media[0], "a")
        inputs = scorer.judge.inputs([[*scorer.judge.tokens(asked), *scorer.judge.encode(".")]], [asked])
        state = scorer.judge.model.model(**inputs).last_hidden_state[0, -1]
        found = scorer.embed(list(media), prompts, 1)[0]
    assert torch.allclose(found, torch.nn.functional.normalize(state, dim=-1), atol=1e-5)
    assert not torch.allclose(found, other[0], atol=1e-3)


def test_attention_over_layers_reads_the_hidden_states_of_the_question(model):
    scorer = VLMScorer.load(VLMBackbone(model=str(model), dtype="float32", read="layers", layers=2), "cpu", False)
    assert scorer.layers == (1, 2)
    media = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = scorer.question(media, "a")
    inputs = scorer.judge.inputs([scorer.judge.tokens(asked)], [asked])
    states = scorer.judge.model.model(**inputs, output_hidden_states=True).hidden_states
    rows = scorer.reader.read([states[1], states[2]], states[2], torch.ones(states[2].shape[:2]).bool())
    assert torch.allclose(scorer.embed([media], ["a"], 1), torch.nn.functional.normalize(rows, dim=-1), atol=1e-6)
    again = VLMScorer.load(VLMBackbone(model=str(model), dtype="float32", read="layers", layers=2), "cpu", False)
    assert torch.equal(again.embed([media], ["a"], 1), scorer.embed([media], ["a"], 1))


def test_without_difference_between_tokens_each_query_finds_the_value():
    """Attention over equal rows is the row's value: the chain passes through K value and output matrices."""
    reader = QueryReader(8, 2)
    with torch.no_grad():
        for attention in (*reader.chain, reader.end):
            attention.in_proj_weight[:], attention.in_proj_bias[:] = torch.eye(8).repeat(3, 1), 0
            attention.out_proj.weight[:], attention.out_proj.bias[:] = 2 * torch.eye(8), 1
        row, final = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
        found = reader.read([torch.zeros(1, 3, 8), row.expand(1, 3, 8)], final.expand(1, 3, 8), torch.ones(1, 3).bool())
    assert torch.allclose(found, (2 * row + 1 + 2 * final + 1)[:, 0], atol=1e-6)
    with pytest.raises(RewardError, match="hidden size 12"):
        QueryReader(12, 1)


# -- thoughts ---------------------------------------------------------------------------------------------------------


class Writer:
    """A judge that says how light an image is, and nothing about black ones."""

    def __init__(self):
        self.asked = []

    def ready(self, needs, answers):
        assert needs == "reply"

    def write(self, questions, longest):
        self.asked += [one.content[-1] for one in questions]
        means = [float(one.content[0].mean()) for one in questions]
        said = [None if mean == 0 else "light" if mean > 0.45 else "dark" for mean in means]
        return Replies(said, {row: "silent" for row, text in enumerate(said) if text is None})

    def fingerprint(self):
        return "ab"


def thinking(model, **more) -> tuple[VLMScorer, Writer]:
    settings = VLMBackbone(
        model=str(model), dtype="float32", thought=Thought(template="Say: {prompt} {medium}", **more)
    )
    writer = Writer()
    found = VLMScorer.load(settings.model_copy(update={"thought": None}), "cpu", False)
    return VLMScorer(settings, found.judge, False, thoughts=Thoughts(settings.thought, writer, 2)), writer


def test_a_thought_is_written_once_and_read_as_the_beginning_of_the_reply(model):
    scorer, writer = thinking(model)
    media = torch.stack([torch.full((3, 8, 8), level) for level in (0.9, 0.1, 0.0)])
    said, reasons = scorer.thoughts(media, ["a", "b", "c"])
    assert said == ["light", "dark", ""]
    assert reasons == {2: "the writer: silent"}
    assert scorer.refused(media, ["a", "b", "c"]) == {2: "the writer: silent"}
    found = scorer.embed(list(media[:2]), ["a", "b"], 1)
    assert writer.asked == ["Say: a image", "Say: b image", "Say: c image", "Say: c image"]  # silence is asked again
    asked = scorer.question(media[0], "a")
    rows = [
        [
            *scorer.judge.tokens(asked),
            *scorer.judge.encode("light."),
        ]
    ]
    with scorer._queries():
        state = scorer.judge.model.model(**scorer.judge.inputs(rows, [asked])).last_hidden_state[0, -1]
    assert torch.allclose(found[0], torch.nn.functional.normalize(state, dim=-1), atol=1e-5)
    plain = VLMScorer(scorer.settings, scorer.judge, False).embed([media[0]], ["a"], 1)[0]
    assert not torch.allclose(found[0], plain, atol=1e-3)
    with pytest.raises(RewardError, match="the writer: silent"):
        scorer.embed([media[2]], ["c"], 1)
    assert scorer.thoughts.state_dict()["writer"].tolist() == [97, 98]


def test_thoughts_are_left_out_in_training_alone(model):
    scorer, _ = thinking(model, dropout=0.5)
    scorer.head = build_head(MLPSettings(hidden=0), 32, 0, False).eval()
    media, prompts = [torch.full((3, 8, 8), 0.9)] * 32, ["a"] * 32
    whole = scorer.embed(media, prompts, 1)
    assert (whole - whole[0]).abs().max() < 1e-5
    scorer.head.train()
    torch.manual_seed(0)
    kept = torch.rand(32) >= 0.5
    torch.manual_seed(0)
    same = (scorer.embed(media, prompts, 1) - whole).abs().amax(1) < 1e-5
    assert torch.equal(same, kept)
    scorer.thoughts.settings = Thought(dropout=0)
    assert scorer.thoughts.thinned(["x"] * 4) == ["x"] * 4


def test_a_head_learns_from_what_was_written(model, tmp_path, monkeypatch):
    """The head's own question shows no image, so only the thought can tell the samples apart."""
    monkeypatch.setattr(
        vlm, "load_judge", lambda settings, device: Writer() if settings.longest == 7 else load_judge(settings, device)
    )
    shown = VLMScorer.question
    monkeypatch.setattr(VLMScorer, "question", lambda self, media, prompt: shown(self, None, prompt))
    more = ("backbone.thought={writer: {longest: 7}, template: '{prompt}'}", "fit.steps=30")
    settings = config(tmp_path, model, *more)
    assert train_reward(settings)["after"]["value"] > 0.75
    media = torch.stack([torch.full((3, 8, 8), level) for level in (0.9, 0.1)])
    light, dark = scores(settings.run_dir, media).values
    assert light > dark


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "overrides",
    [
        ("loss.kind=bt",),
        ("loss.kind=rao_kupper", "backbone.read=last", "head={kind: mlp, hidden: 8}"),
        ("loss.kind=gaussian", "head.kind=uncertain", "backbone.tune=none"),
        ("head.hidden=8", "backbone={read: layers, layers: 2}"),
        ("loss.kind=win_tie", "head.kind=moe", "backbone={read: last, tune: none}", "fit.steps=40"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_head_on_a_vlm_learns_a_preference_and_nothing_at_learning_rate_0(overrides, model, tmp_path):
    found = train_reward(config(tmp_path, model, *overrides))
    assert found["after"]["value"] > 0.9
    still = train_reward(config(tmp_path, model, *overrides, "fit={lr: 0, backbone_lr: 0, steps: 2}", out="still"))
    assert still["after"] == still["before"]
    assert still["before"] == found["before"]


def test_dimensions_are_told_apart(model, tmp_path):
    """The chosen sample of every pair is lighter and less red; both scores are reported, and their sum is the score."""
    more = ("head={kind: dimensions, names: [light, red]}", "loss.kind=per_dimension", "fit.steps=40")
    settings = config(tmp_path, model, *more)
    train_reward(settings)
    media = torch.stack([read_media(tmp_path / f"heldout-{i}-{side}.png") for i in range(8)
                         for side in ("chosen", "rejected")])  # fmt: skip
    found = scores(settings.run_dir, media)
    light, red = (found.parts[name].view(8, 2) for name in NAMES)
    assert (light[:, 0] > light[:, 1]).float().mean() > 0.8
    assert (red[:, 0] < red[:, 1]).float().mean() > 0.8
    assert torch.allclose(found.values, (light + red).flatten(), atol=1e-5)


def test_a_video_is_shown_as_its_frames(model, tmp_path):
    settings = config(tmp_path, model, "fit.steps=16", "backbone.frames=2", frames=3)
    assert train_reward(settings)["after"]["value"] > 0.9
    media = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = scores(settings.run_dir, media).values
    same = media.clone()
    same[:, 1] = 0  # of three frames, those in the middles of two halves are shown
    assert torch.equal(scores(settings.run_dir, same).values, found)


@pytest.mark.parametrize(("read", "added"), [("query", "queries"), ("layers", "attention.first")])
def test_the_folder_scores_as_the_run_did_with_gradients_and_reasons(read, added, model, tmp_path):
    settings = config(tmp_path, model, "fit.steps=8", f"backbone={{read: {read}, layers: 2}}")
    train_reward(settings)
    held = load_file(settings.run_dir / "backbone.safetensors")
    assert {name.rpartition(".lora_")[1] for name in held} == {".lora_", ""}
    assert held[added].shape == (1, 32)
    media = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reward = load_reward(f"{{kind: trained, path: {settings.run_dir}}}").build()
    found = reward(media, ["light"] * 3)
    found.values.sum().backward()
    assert (media.grad.abs().amax((1, 2, 3)) > 0).all()
    assert (found.parts["distance"] > 0).all()
    again = train_reward(settings.model_copy(update={"out": str(tmp_path / "again")}))
    assert again["rows"] == 24
    assert torch.equal(scores(tmp_path / "again", media.detach()).values, found.values.detach())
    broken = media.detach().clone()
    broken[1, 0, 0, 0] = math.nan
    told = scores(settings.run_dir, broken, ["light", "light", " "])
    assert told.values.isfinite().tolist() == [True, False, False]
    assert told.reasons == {1: "the media hold NaN or infinity", 2: "the prompt is empty, and the question is about it"}
    assert told.values[0] == pytest.approx(found.values[0].item(), abs=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("kind", ["vlm", "layers", "thought", "clip"])
def test_a_stopped_training_goes_on_to_the_same_bits(kind, stop, model, tmp_path):
    backbone = {
        "layers": ["backbone={read: layers, layers: 2}"],
        "thought": [f"backbone.thought={{writer: {{model: {model}, dtype: float32}}, longest: 4}}"],
        "clip": ["backbone={kind: clip, model: shapes, tune: lora}", "fit.backbone_lr=1e-3"],
    }.get(kind, [])
    more = [*backbone, "fit.steps=7", "fit.checkpoint=1", "fit.log_every=1", "fit.batch=4"]
    if kind == "clip":
        (tmp_path / "mine.yaml").write_text("")
    whole, parts = (_of(tmp_path, model, kind, more, out) for out in ("whole", "parts"))
    train_reward(whole)

    def interrupt(line: str) -> None:
        if line.startswith(f"step {stop + 1}/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_reward(parts, say=interrupt)
    assert {path.name for path in parts.run_dir.iterdir()} >= {"checkpoint"}
    with pytest.raises(RunFolderError, match="exists; --overwrite"):
        train_reward(parts)
    said: list[str] = []
    summary = train_reward(parts, resume=True, say=said.append)
    assert said[0] == f"continuing at step {stop}"
    for name in ("head.safetensors", "backbone.safetensors", "gram.safetensors"):
        found, wanted = (load_file(one.run_dir / name) for one in (parts, whole))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert (parts.run_dir / "metrics.jsonl").read_text() == (whole.run_dir / "metrics.jsonl").read_text()
    assert summary["before"] == json.loads((whole.run_dir / "summary.json").read_text())["before"]
    assert not (parts.run_dir / "checkpoint").exists()
    with pytest.raises(RunFolderError, match="holds a finished reward"):
        train_reward(parts, resume=True)


def _of(folder, model, kind: str, more: list[str], out: str):
    if kind != "clip":
        return config(folder, model, *more, out=out)
    file = folder / "clip.yaml"
    file.write_text(f"data: {{train: {table(folder, 'train', 12, 0)}, heldout: {table(folder, 'heldout', 6, 1)}}}\n")
    return load_reward_training(file, [f"out={folder / out}", *more])


def test_a_checkpoint_that_does_not_serve_is_named(model, tmp_path):
    def interrupt(line: str) -> None:
        if line.startswith("step 3/"):
            raise KeyboardInterrupt

    more = ("fit.steps=4", "fit.checkpoint=1", "fit.log_every=1", "fit.batch=4")
    settings = config(tmp_path, model, *more)
    with pytest.raises(KeyboardInterrupt):
        train_reward(settings, say=interrupt)
    with pytest.raises(RunFolderError, match=r"fit\.lr: 0\.01 then, 0\.02 now"):
        train_reward(config(tmp_path, model, *more, "fit.lr=0.02"), resume=True)
    with pytest.raises(RunFolderError, match=r"other content of data\.train"):
        train_reward(config(tmp_path, model, *more, note="other"), resume=True)
    file = settings.run_dir / "checkpoint" / "state.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="start with --overwrite"):
        train_reward(config(tmp_path, model, *more), resume=True)
    with pytest.raises(RunFolderError, match="give one of the two"):
        train_reward(settings, resume=True, overwrite=True)
    assert train_reward(config(tmp_path, model, *more), overwrite=True)["rows"] == 24


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["head.kind=cosine", "loss.kind=triplet"],
            "cosine compares image and prompt, which a vlm backbone encodes together",
        ),
        (["backbone.tune=last"], "backbone.tune"),
        (["backbone.template=How good is it?"], r"does not show \{prompt\}"),
        (["backbone.kind=vml"], "no such backbone 'vml'; did you mean 'vlm'"),
        (["head={kind: dimensions, names: [a, a]}"], "names a twice"),
        (["loss.kind=per_dimension"], "made for head dimensions, not mlp"),
        (["backbone.quick_gelu=true"], "only valid for kind=clip"),
        (["backbone={read: last, tune: none, thought: {}}"], r"cannot leave thoughts out: use thought\.dropout=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, said, model, tmp_path):
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, model, *overrides)


def test_tables_that_do_not_serve_are_named(model, tmp_path):
    def trained(*overrides: str, **columns) -> None:
        train_reward(config(tmp_path, model, "fit.steps=1", *overrides, **columns))

    many = ("head={kind: dimensions, names: [light, red]}", "loss.kind=per_dimension")
    with pytest.raises(DataError, match=r'line 1: a label is a number under "chosen_score\.light", given \'much\''):
        trained(*many, **{"chosen_score.light": "much"})
    with pytest.raises(DataError, match="given nan"):
        trained(*many, **{"chosen_score.light": math.nan})
    with pytest.raises(DataError, match=r'no row has a number under "chosen_score\.size"'):
        trained("head={kind: dimensions, names: [light, size]}", "loss.kind=per_dimension")
    with pytest.raises(DataError, match=r"gone\.png"):
        trained(chosen="gone.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"line 1: 'chosen': .*broken\.png is n"):
        trained(chosen="broken.png")
    with pytest.raises(DataError, match="chosen and rejected are the same file"):
        trained(chosen="train-0-rejected.png", rejected="train-0-rejected.png")
    with pytest.raises(DataError, match=r"cannot be read: the question has \d+ tokens, the model reads 40"):
        trained("backbone.longest=40")
    with pytest.raises(RewardError, match=r"lora\.targets \['nothing'\] match no linear layer"):
        trained("backbone.targets=[nothing]")
    with pytest.raises(RewardError, match=r"backbone\.layers: 3 is more than the 2 layers of the language model"):
        trained("backbone={read: layers, layers: 3}")
    assert not (tmp_path / "reward").exists()


def test_an_order_between_prompts_may_show_one_image_twice(model, tmp_path):
    settings = config(tmp_path, model, "fit.steps=1", rejected_prompt="dark", rejected="train-0-chosen.png")
    assert train_reward(settings)["rows"] == 24


def test_check_names_what_is_not_there(model, tmp_path, run):
    config(tmp_path, model)
    path = str(tmp_path / "mine.yaml")
    code, out, _ = run("check", path)
    assert code == 0
    assert "backbone   vlm model=" in out
    code, _, err = run("check", path, "backbone.model=./nowhere")
    assert code == 2
    assert "backbone.model: no file or folder ./nowhere" in err
    code, out, _ = run("check", path, "backbone.model=Qwen/Qwen2-VL-2B-Instruct")
    assert "backbone.model Qwen/Qwen2-VL-2B-Instruct is not on this machine" in out


def test_another_model_under_a_trained_head_is_refused(model, tmp_path):
    settings = config(tmp_path, model, "fit.steps=1")
    train_reward(settings)
    manifest = json.loads((settings.run_dir / "reward.json").read_text())
    manifest["backbone"]["rank"] = 2
    (settings.run_dir / "reward.json").write_text(json.dumps(manifest))
    with pytest.raises(RewardError, match="is not of this backbone"):
        load_reward(f"{{kind: trained, path: {settings.run_dir}}}").build()
    manifest["backbone"] |= {"rank": 4, "model": "shapes"}
    (settings.run_dir / "reward.json").write_text(json.dumps(manifest))
    with pytest.raises(RewardError, match="was trained on features of 32, those of shapes have 128"):
        load_reward(f"{{kind: trained, path: {settings.run_dir}}}").build()


def test_the_command_continues(model, tmp_path, run):
    config(tmp_path, model)
    path, out = str(tmp_path / "mine.yaml"), str(tmp_path / "reward")
    code, said, _ = run("reward", "train", path, "fit.steps=2", "--out", out, "--resume")
    assert code == 0
    assert f'reward: {{kind: trained, path: "{out}"}}' in said
    code, _, err = run("reward", "train", path, "fit.steps=2", "--out", out, "--resume")
    assert code != 0
    assert "finished reward" in err
