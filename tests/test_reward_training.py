"""Rewards trained from tables: heads in closed form, every loss and head learns, folders load to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from align.config.load import load_reward
from align.data.media import read_media
from align.policy.users import read_embeddings
from align.preference.settings import load_latent_training, load_reward_training
from align.preference.train import train_reward
from align.preference.user_embeddings import embed_users, save_embeddings
from alignflow.errors import ConfigError, DataError, RunFolderError
from rewards.base import RewardError
from rewards.training import heads, latent
from rewards.training.heads import build_head
from rewards.training.newcomer import mixture_of
from rewards.training.scorer import load_backbone
from rewards.training.settings import HEADS, Backbone, parse_head

WIDTH = 6


def features(count: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of images and prompts."""
    rows = torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(seed))
    image, text = torch.nn.functional.normalize(rows, dim=-1)
    return image, text


def head(**settings):
    torch.manual_seed(0)
    return build_head(parse_head(settings), WIDTH, 2)


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_heads_have_a_row_for_each_sample_that_does_not_depend_on_the_others(kind):
    model, (image, text) = head(kind=kind), features()
    together = model(image, text, None)
    assert len(together) == 5
    assert together.shape[1] >= 1 + len(parse_head({"kind": kind}).parts)
    assert torch.allclose(together[2:3], model(image[2:3], text[2:3], None), atol=1e-6)


def test_an_untrained_cosine_head_is_the_cosine():
    image, text = features()
    assert torch.allclose(head(kind="cosine")(image, text)[:, 0], (image * text).sum(-1), atol=1e-6)


def test_a_mixture_of_equal_criteria_is_that_criterion_and_gates_forget_a_shift():
    model, (image, text) = head(kind="moe", groups=[2, 3]), features()
    with torch.no_grad():
        before = model(image, text)
        for gate in (model.criterion_gate, model.aspect_gate):
            gate[-1].bias += 3.0
        assert torch.allclose(model(image, text), before, atol=1e-6)
        model.criteria.weight[:] = model.criteria.weight[0].clone()
        expected = heads.joint(image, text) @ model.criteria.weight[0]
        assert torch.allclose(model(image, text)[:, 0], expected, atol=1e-5)


def test_an_ideal_point_is_a_mixture_of_prototypes():
    model, (image, text) = head(kind="ideal_point", dim=2), features(2)
    with torch.no_grad():
        model.prototypes[:] = torch.eye(2)
        model.mixture[:] = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])
        model.project.weight[:] = 0
        model.project.bias[:] = torch.tensor([1.0, 0.0])  # every image lies on the first prototype
        assert torch.allclose(model(image, text, torch.tensor([0, 1]))[:, 0], torch.tensor([0.0, -2.0]))
        assert torch.allclose(model(image, text, None)[:, 0], torch.tensor([-0.5, -0.5]))


def test_a_latent_user_is_inferred_from_other_pairs_in_any_order():
    model = head(kind="variational").eval()
    a, b = (heads.joint(*features(6, seed)) for seed in (1, 2))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for there, shuffled in zip(model.encode(a, b), model.encode(a[order], b[order]), strict=True):
        assert torch.allclose(there, shuffled, atol=1e-5)
    latent, penalty = model.infer(a, b, torch.tensor([0, 0, 0, 0, 1, 0]))
    assert latent[4].tolist() == [0.0] * model.dim  # alone: nothing tells who judged, so the prior's mean
    assert penalty[4] == 0
    changed = a.clone()
    changed[0] = 0
    others, _ = model.infer(changed, b, torch.tensor([0, 0, 0, 0, 1, 0]))
    assert torch.equal(others[0], latent[0])  # a pair does not tell about itself
    assert not torch.equal(others[1], latent[1])


# -- training ---------------------------------------------------------------------------------------------------------


def table(folder: Path, name: str, count: int, seed: int, single: bool = False) -> str:
    """Plain images; ``red`` prefers the redder of two, ``blue`` the bluer; their images' number is the red."""
    rng, rows = np.random.default_rng(seed), []

    def draw(level: int, number: int, side: str) -> str:
        file = f"{name}-{number}-{side}.png"
        Image.new("RGB", (8, 8), (level, 60, 255 - level)).save(folder / file)
        return file

    for number in range(count):
        low, high = sorted(rng.choice(250, 2, replace=False).tolist())
        if single:
            rows.append({"prompt": "a circle", "image": draw(high, number, "x"), "score": high / 255})
            continue
        red, blue = draw(high, number, "red"), draw(low, number, "blue")
        user = ("red", "blue")[number % 2]
        chosen, rejected = (red, blue) if user == "red" else (blue, red)
        rows.append(
            {"prompt": "a circle", "chosen": chosen, "rejected": rejected, "user": user, "tie": high - low < 20}
        )
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(folder: Path, *overrides: str, single: bool = False, only: str = "red"):
    """A config on 48 rows to learn from and 24 held out, all of ``only`` unless that is empty."""
    names = []
    for name, count, seed in (("train", 48, 0), ("heldout", 24, 1)):
        path = Path(table(folder, name, count, seed, single))
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if single or not only or f'"user": "{only}"' in line))
        names.append(path.name)
    file = folder / "mine.yaml"
    file.write_text(f"data: {{train: {names[0]}, heldout: {names[1]}}}\nfit: {{steps: 40, batch: 16, lr: 0.003}}\n")
    return load_reward_training(file, [f"out={folder / 'reward'}", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        ("loss.kind=bt",),
        ("loss.kind=rao_kupper", "head={kind: mlp, hidden: 16}"),
        ("loss.kind=win_tie", "head.kind=moe"),
        ("loss.kind=triplet", "head.kind=cosine"),
        ("loss.kind=gaussian", "head.kind=uncertain"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_loss_learns_a_preference(overrides, tmp_path):
    settings = config(tmp_path, *overrides)
    summary = train_reward(settings)
    assert summary["after"]["value"] > 0.9  # the redder of two images never seen
    still = train_reward(config(tmp_path, *overrides, "fit.lr=1e-12", "fit.steps=2", f"out={tmp_path / 'still'}"))
    assert still["after"]["value"] == still["before"]["value"]


@pytest.mark.parametrize(("kind", "steps"), [("ideal_point", 200), ("variational", 60)])
def test_two_tastes_are_told_apart(kind, steps, tmp_path):
    settings = config(tmp_path, f"head.kind={kind}", f"fit.steps={steps}", "fit.batch=32", only="")
    assert train_reward(settings)["after"]["value"] > 0.8  # one score for all would be right for half of the pairs
    path = settings.run_dir
    images = torch.stack([torch.full((3, 64, 64), 0.2) for _ in range(2)])
    images[0, 0], images[1, 2] = 0.9, 0.9
    gaps = {}
    for user in ("red", "blue"):
        reward = load_reward(f"{{kind: trained, path: {path}, user: {user}}}").build()
        red, blue = reward(images, ["a circle"] * 2).values.tolist()
        gaps[user] = red - blue
    assert gaps["red"] > 0 > gaps["blue"]
    with pytest.raises(RewardError, match="has no user 'green'; it has blue, red"):
        load_reward(f"{{kind: trained, path: {path}, user: green}}").build()


@pytest.mark.parametrize(("kind", "steps"), [("ideal_point", 200), ("variational", 60)])
def test_a_newcomer_is_known_by_a_few_pairs(kind, steps, tmp_path):
    settings = config(tmp_path, f"head.kind={kind}", f"fit.steps={steps}", "fit.batch=32", only="")
    train_reward(settings)
    images = torch.stack([torch.full((3, 64, 64), 0.2) for _ in range(2)])
    images[0, 0], images[1, 2] = 0.9, 0.9
    gaps = {}
    for user in ("red", "blue"):
        rows = Path(table(tmp_path, "few", 12, seed=5)).read_text().splitlines(keepends=True)
        few = tmp_path / f"few-{user}.jsonl"
        few.write_text("".join(row for row in rows if f'"user": "{user}"' in row))
        reward = load_reward(f"{{kind: trained, path: {settings.run_dir}, pairs: {few}}}").build()
        red, blue = reward(images, ["a circle"] * 2).values.tolist()
        gaps[user] = red - blue
    assert gaps["red"] > 0 > gaps["blue"]
    users = embed_users(table(tmp_path, "both", 24, seed=5), 6, "shapes", str(settings.run_dir), "cpu")
    assert [*users] == ["red", "blue"]
    assert users["red"].shape == users["blue"].shape == (1, len(users["red"][0]))
    assert (users["red"] - users["blue"]).abs().max() > 0.05
    save_embeddings(tmp_path / "users.safetensors", users)
    assert torch.equal(read_embeddings(tmp_path / "users.safetensors")["blue"], users["blue"])


def test_a_newcomer_needs_readable_pairs_and_a_head_that_knows_users(tmp_path):
    settings = config(tmp_path, "loss.kind=bt", "fit.steps=1")
    train_reward(settings)
    few = tmp_path / "few.jsonl"
    for text, message in (
        (None, "there is no file"),
        ('{"prompt": "a"}', "few.jsonl line 1 should have a prompt, a chosen and a rejected image"),
        ('{"prompt": "a", "chosen": "no.png", "rejected": "no.png"}', "few.jsonl line 1: .*no.png cannot be read"),
        ('{"prompt": "a", "chosen": "x.png", "rejected": "x.png", "tie": true}', "holds no pair with a preference"),
        ('{"prompt": "a", "chosen": "train-0-red.png", "rejected": "train-0-blue.png"}', "head has no users"),
    ):
        if text is not None:
            few.write_text(text + "\n")
        with pytest.raises(RewardError, match=message):
            load_reward(f"{{kind: trained, path: {settings.run_dir}, pairs: {few}}}").build()
    with pytest.raises(ConfigError, match="give only one of them"):
        load_reward(f"{{kind: trained, path: {settings.run_dir}, pairs: {few}, user: red}}")


def test_the_mixture_of_a_newcomer_explains_the_pairs_best():
    model, width = head(kind="ideal_point", dim=2), WIDTH
    with torch.no_grad():
        model.prototypes[:] = torch.eye(2)
        model.project.weight[:] = 0

    # margins by hand: with share (p, 1 - p) and images on e1 and e2 the margin is 2 (2p - 1)
    with torch.no_grad():
        model.project.weight[:, 0] = torch.tensor([1.0, -1.0]) / (2 * width**0.5)
        model.project.bias[:] = 0.5
    one = torch.zeros(1, width)
    chosen, rejected = one.clone(), one.clone()
    chosen[0, 0], rejected[0, 0] = 1, -1  # placed on e1 and on e2
    assert torch.allclose(model.project(heads.joint(chosen, 0 * one)), torch.tensor([[1.0, 0.0]]), atol=1e-6)
    for ridge, pairs in ((0.1, 1), (0.01, 4)):
        share = mixture_of(model, chosen.repeat(pairs, 1), rejected.repeat(pairs, 1), 0 * one.repeat(pairs, 1), ridge)
        w = torch.linspace(0, 8, 80001, dtype=torch.float64)  # w = (a, -a) by symmetry
        p = torch.sigmoid(2 * w)
        loss = torch.nn.functional.softplus(-2 * (2 * p - 1)) + ridge * 2 * w**2 / pairs
        assert share[0].item() == pytest.approx(p[loss.argmin()].item(), abs=1e-3)
    swapped = mixture_of(model, rejected, chosen, 0 * one)
    assert torch.allclose(swapped.flip(0), mixture_of(model, chosen, rejected, 0 * one), atol=1e-5)


def test_the_angle_of_an_ideal_point_ignores_the_length_of_a_place():
    model, (image, text) = head(kind="ideal_point", dim=2, form="angle"), features(2)
    with torch.no_grad():
        model.prototypes[:] = torch.eye(2)
        model.mixture[:] = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])
        model.project.weight[:] = 0
        model.project.bias[:] = torch.tensor([3.0, 4.0])
        found = model(image, text, torch.tensor([0, 1]))[:, 0]
    assert torch.allclose(found, torch.tensor([0.6, 0.8]))


def test_regression_learns_a_number(tmp_path):
    summary = train_reward(config(tmp_path, "loss.kind=regression", "fit.steps=150", single=True))
    assert summary["after"]["correlation"] > 0.9
    assert summary["after"]["mean_squared_error"] < 0.3 * summary["before"]["mean_squared_error"]


@pytest.mark.parametrize("tune", ["lora", "last"])
def test_a_tuned_backbone_comes_back_from_its_folder(tune, tmp_path):
    settings = config(
        tmp_path, f"backbone={{tune: {tune}, layers: 1}}", "head.kind=cosine", "loss.kind=triplet",
        "fit={steps: 2, batch: 2, lr: 1e-12, backbone_lr: 1e-3}",
    )  # fmt: skip
    train_reward(settings)
    plain, tuned = load_reward("clip").build(), load_reward(f"{{kind: trained, path: {settings.run_dir}}}").build()
    media = torch.stack([read_media(tmp_path / f"train-{n}-red.png") for n in (0, 2)])
    prompts = ["a circle", "a red circle"]
    before, after = plain(media, prompts).values, tuned(media, prompts).values
    assert not torch.allclose(before, after, atol=1e-4)  # the head stood still, so this is the backbone
    again = train_reward(settings.model_copy(update={"out": str(tmp_path / "again")}))
    assert again["rows"] > 0
    same = load_reward(f"{{kind: trained, path: {tmp_path / 'again'}}}").build()
    assert torch.equal(same(media, prompts).values, after)
    assert same.fingerprint() == tuned.fingerprint() != plain.fingerprint()


def test_a_trained_reward_has_gradients_and_its_deviation(tmp_path):
    settings = config(tmp_path, "head.kind=uncertain", "loss.kind=gaussian", "fit.steps=2")
    train_reward(settings)
    reward = load_reward(f"{{kind: trained, path: {settings.run_dir}}}").build()
    media = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = reward(media, ["a", "b"])
    scores.values.sum().backward()
    assert float(media.grad.abs().sum()) > 0
    assert (scores.parts["deviation"] > 0).all()
    clip = torch.stack([media.detach()] * 3, 1)  # a video that does not move scores as its image
    assert torch.allclose(reward(clip, ["a", "b"]).values, scores.values.detach(), atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.kind=triplet"], "made for head cosine, not mlp"),
        (["head.kind=moee"], "did you mean 'moe'"),
        (["fit.lr=-1"], "fit.lr"),
        (["head={kind: variational, per_user: 9}"], "should hold two users, 18 pairs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, *overrides)


def test_tables_and_folders_that_do_not_serve_are_named(tmp_path):
    settings = config(tmp_path)
    train_reward(settings)
    with pytest.raises(RunFolderError, match="--overwrite"):
        train_reward(settings)
    (settings.run_dir / "head.safetensors").write_bytes(b"")
    with pytest.raises(RewardError, match=r"head\.safetensors"):
        load_reward(f"{{kind: trained, path: {settings.run_dir}}}").build()
    with pytest.raises(RewardError, match=r"has no reward\.json"):
        load_reward(f"{{kind: trained, path: {tmp_path}}}").build()
    rows = [{"prompt": "a", "chosen": "train-0-red.png", "rejected": "train-0-blue.png", "tie": "maybe"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match='line 1: "tie" should be true or false'):
        train_reward(settings, overwrite=True)
    rows[0].pop("tie")
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    other = settings.model_copy(update={"head": parse_head({"kind": "ideal_point"})})
    with pytest.raises(DataError, match="needs who judged"):
        train_reward(other, overwrite=True)


# -- latent rewards ---------------------------------------------------------------------------------------------------


def latent_reward(channels: int = 4, motion: bool = False) -> latent.LatentReward:
    """An untrained one."""
    clip = load_backbone(Backbone(), "cpu")
    manifest = latent.Manifest(
        text=Backbone(),
        channels=channels,
        text_width=clip.model.config.projection_dim,
        width=8,
        motion=motion,
        mean=2.0,
        std=0.5,
    )
    torch.manual_seed(0)
    return latent.LatentReward(manifest, manifest.build().eval(), clip)


def test_a_latent_reward_judges_each_sample_alone_at_its_time_and_comes_back_from_its_folder(tmp_path):
    reward, x = latent_reward(), torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t, prompts = torch.tensor([0.1, 0.5, 0.9]), ["a circle", "a square", "a circle"]
    values = reward(x, t, prompts)
    assert values.shape == (3,)
    assert torch.allclose(reward(x[1:2], t[1:2], prompts[1:2]), values[1:2], atol=1e-6)
    assert not torch.allclose(reward(x, t.flip(0), prompts)[0], values[0])
    assert not torch.allclose(reward(x[:1], t[:1], ["a square"])[0], values[0])
    still = x[:, :, None].expand(-1, -1, 3, -1, -1)  # a video that does not move
    assert torch.allclose(reward(still, t, prompts), values, atol=1e-6)
    latent.save(tmp_path, reward)
    assert torch.equal(latent.load(tmp_path)(x, t, prompts), values)
    with pytest.raises(RewardError, match="trained on 4 channels"):
        reward(torch.randn(1, 16, 8, 8), t[:1], prompts[:1])
    with pytest.raises(RewardError, match=r"no latent\.json"):
        latent.load(tmp_path / "nowhere")


def test_fitting_a_latent_reward_ranks_samples_it_has_not_seen(tmp_path):
    from align.preference.latent import Drawn, fit_latent, ranking

    def drawn(count: int, seed: int) -> Drawn:
        """Latents whose score is their first channel's mean."""
        generator = torch.Generator().manual_seed(seed)
        x0 = torch.randn(count, 4, 4, 8, 8, generator=generator) * 0.3
        score = torch.rand(count, 4, generator=generator)
        x0[:, :, 0] += 4 * score[..., None, None]
        score[0, 0] = torch.nan  # one has none
        return Drawn(x0, score, ["a circle", "a square"] * (count // 2))

    settings = load_latent_training(
        Path(__file__).parents[1] / "configs" / "rewards" / "latent_shapes.yaml",
        ["fit={steps: 40, batch: 32, lr: 5e-3}", f"out={tmp_path}"],
    )
    reward = latent_reward()
    before = ranking(reward, drawn(8, 1), 0)
    fit_latent(settings, reward, drawn(16, 0), lambda line: None)
    after = ranking(reward, drawn(8, 1), 0)
    assert after["0.2"]["value"] > 0.9 > before["0.2"]["value"]
    assert after["0.2"]["count"] == 8 * 6 - 3  # pairs with the one that has no score are left out


def test_a_search_takes_a_folder_of_a_latent_reward(tmp_path):
    from align.search.run import latent_reward as found
    from align.search.settings import load_search

    latent.save(tmp_path, latent_reward(16))
    config = Path(__file__).parents[1] / "configs" / "shapes" / "search.yaml"
    settings = load_search(config, ["search={kind: prune}", f"latent_reward={tmp_path}"])
    assert found(settings).manifest.channels == 16
    with pytest.raises(ConfigError, match="no folder nowhere"):
        load_search(config, ["search={kind: prune}", "latent_reward=nowhere"])


def test_a_latent_reward_of_clips_sees_the_order_of_frames(tmp_path):
    """What brightens and what darkens have the same frames; only one that sees neighbours can tell them apart."""
    from align.preference.latent import Drawn, fit_latent, ranking

    def drawn(count: int, seed: int) -> Drawn:
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(count, 4, generator=generator).round()
        ramp = torch.linspace(-1, 1, 3)[:, None, None] * (2 * score[..., None, None, None] - 1)
        x0 = torch.randn(count, 4, 4, 3, 8, 8, generator=generator) * 0.3
        x0[:, :, 0] += 2 * ramp
        return Drawn(x0, score, ["a circle"] * count)

    settings = load_latent_training(
        Path(__file__).parents[1] / "configs" / "rewards" / "latent_shapes_video.yaml",
        ["fit={steps: 40, batch: 32, lr: 5e-3}", f"out={tmp_path}"],
    )
    right = {}
    for motion in (False, True):
        reward = latent_reward(motion=motion)
        fit_latent(settings, reward, drawn(16, 0), lambda line: None)
        right[motion] = ranking(reward, drawn(16, 1), 0)["0.2"]["value"]
    assert right[True] > 0.9
    assert right[False] < 0.7
