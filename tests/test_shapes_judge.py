"""The embedded judge: `model: shapes` answers through every reward that asks, with gradients; how it is taught."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rewards
from align.worlds import judge_data, measure
from align.worlds.judge_data import digit, draw_pairs, first_wrong, judged_words
from align.worlds.tokenizer import words
from align.worlds.train_judge import FEATURES, Pupil, cell_labels, new_judge
from alignflow.worlds.shapes import weights, world
from rewards.base import RewardError
from rewards.judges.local import LocalJudge
from rewards.judges.models import Local
from rewards.worlds.shapes import judge as gold
from rewards.worlds.shapes import score_batch

EXACT = {"model": "shapes", "dtype": "float32", "chunk": 64}


@pytest.fixture(scope="module")
def asked():
    """120 held-out images, their captions, and captions with one thing changed."""
    images, right, wrong = measure.captioned(120)
    return torch.from_numpy(images), right, wrong


def ask(kind, media, prompts, judge=EXACT, **settings):
    return rewards.parse({"kind": kind, "judge": judge, **settings}).build()(media, prompts)


@pytest.fixture(scope="module")
def replies(asked):
    media, right, wrong = asked
    with torch.no_grad():
        return [ask("yes_probability", media, texts) for texts in (right, wrong)]


def test_yes_to_true_captions_and_no_to_others(asked, replies):
    """Relations turned round are the hardest (docs/rewards.md)."""
    yes, no = (scores.values for scores in replies)
    right = torch.stack([yes > 0.5, no <= 0.5]).float().mean(0)
    relations = [[world.parse_caption(text).relation for text in texts] for texts in asked[1:]]
    turned = torch.tensor([a != b for a, b in zip(*relations, strict=True)])
    assert right.mean() >= 0.9
    assert (yes > no).float().mean() >= 0.95
    assert turned.sum() >= 5
    assert (no <= 0.5)[turned].float().mean() >= 0.6


def test_it_answers_with_yes_or_no(replies):
    assert min(scores.parts["answered"].min() for scores in replies) > 0.98


def test_bfloat16_as_by_default_agrees(asked, replies):
    media, right, _ = (part[:24] for part in asked)
    with torch.no_grad():
        half = ask("yes_probability", media, right, judge={"kind": "local", "model": "shapes"}).values
    assert (half - replies[0].values[:24]).abs().median() < 0.02


def test_digits_are_near_the_dense_score(asked):
    media, right, wrong = (part[:48] for part in asked)
    with torch.no_grad():
        found = torch.cat([ask("digit_judge", media, texts).values for texts in (right, wrong)]).numpy()
    dense = np.concatenate([score_batch(media, texts)["dense"] for texts in (right, wrong)])
    assert np.abs(found - dense).mean() < 0.15
    assert np.corrcoef(found, dense)[0, 1] > 0.7


def test_a_true_caption_is_the_likelier_description(asked):
    media, right, wrong = (part[:48] for part in asked)
    with torch.no_grad():
        likely = [ask("prompt_echo", media, texts, reduce="sum").values for texts in (right, wrong)]
    assert (likely[0] > likely[1]).float().mean() > 0.8


def test_gradients_reach_the_pixels_and_lead_upwards(asked):
    media, _, wrong = (part[:12] for part in asked)
    media = (0.02 + 0.96 * media).requires_grad_()
    before = ask("yes_probability", media, wrong).values
    before.log().sum().backward()
    assert (media.grad.abs().amax((1, 2, 3)) > 0).all()
    step = 0.001 * media.grad / media.grad.square().mean((1, 2, 3), keepdim=True).sqrt()
    with torch.no_grad():
        after = ask("yes_probability", (media + step).clamp(0, 1), wrong).values
    assert (after > before).float().mean() > 0.9


def test_images_of_other_sizes_are_seen_alike(asked, replies):
    media, right, _ = (part[:16] for part in asked)
    large = torch.nn.functional.interpolate(media, size=(160, 160), mode="nearest")
    with torch.no_grad():
        scores = ask("yes_probability", large, right).values
    assert (scores - replies[0].values[:16]).abs().median() < 0.1


def test_a_name_that_is_no_model_is_refused():
    with pytest.raises(RewardError, match=r"'yes_probability': no folder shape; model is shapes, a folder"):
        rewards.parse({"kind": "yes_probability", "judge": "shape"}).build()


def test_its_words_are_tokens_and_any_other_text_has_some():
    tokens = LocalJudge.load(Local(model="shapes"), "cpu").tokenizer
    assert all(len(tokens(text).input_ids) == 1 for word in words() for text in (word, f" {word}"))
    odd = "Ein größerer Füchsin, 東京 🦊?"
    assert tokens.decode(tokens(odd).input_ids) == odd
    assert sum(path.stat().st_size for path in weights("judge").iterdir()) < 6e6


@pytest.fixture(scope="module")
def taught():
    """Eight pairs, their images, and an untrained judge whose answers depend on what it sees."""
    pairs = draw_pairs("train", 8, seed=5)
    rows = np.arange(16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge, _ = new_judge()
        for weight in judge.model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.4 / weight[0].numel() ** 0.25)
    return pairs, rows, torch.from_numpy(pairs.images).permute(0, 3, 1, 2) / 255, Pupil(judge)


@pytest.mark.parametrize("kind", judge_data.KINDS)
def test_what_is_learned_is_what_is_asked(taught, kind):
    """The loss, with images looked at once and rows padded behind, is that of the judge's own answers."""
    pairs, rows, media, pupil = taught
    lessons = kind(pairs, rows, media, np.random.default_rng(0))
    with torch.no_grad():
        loss, _ = pupil.reply_loss(media, lessons)
        if isinstance(lessons[0].reply, str):
            found = pupil.judge.likelihoods([one.question for one in lessons], [one.reply for one in lessons]).values
            want = -found[:, 0].sum() / found[:, 1].sum()
        else:
            want = torch.stack([by_hand(pupil.judge, one) for one in lessons]).mean()
    torch.testing.assert_close(loss, want, atol=1e-4, rtol=0)


def by_hand(judge, one):
    batch = next(judge._batches([one.question], [""], {}))
    logs = judge._logits(batch, 1)[0, -1].log_softmax(-1)
    return -sum(share * logs[judge.encode(text)[0]] for text, share in one.reply.items())


def test_pairs_differ_and_each_fits_its_own_caption_alone(taught):
    pairs = draw_pairs("train", 60, seed=6)
    assert not any(world.is_held_out(spec) for spec in pairs.specs)
    fits = [[gold(pairs.scenes[i ^ other], spec)[0] for i, spec in enumerate(pairs.specs)] for other in (0, 1)]
    assert fits == [[1.0] * len(pairs.specs), [0.0] * len(pairs.specs)]


def test_replies_are_the_verifiers(taught):
    pairs, rows, media, _ = taught
    lessons = judge_data.yes_no(pairs, rows, media, np.random.default_rng(1))
    sure = [one.reply["Yes"] for one in lessons]
    assert sum(share == 1 for share in sure) >= len(sure) / 2
    assert max(share for share in sure if share < 1) <= judge_data.DOUBT
    for dense in (0, 0.31, 0.5, 0.97, 1):
        shares = digit(dense, 1, 9)
        assert sum(shares.values()) == pytest.approx(1)
        assert sum((int(name) - 1) / 8 * share for name, share in shares.items()) == pytest.approx(dense)


def test_first_wrong_word():
    spec = world.parse_caption("a red circle and a blue square")
    for text, place in (("a red circle and a blue cross", 6), ("a blue square", 3), ("a green square", 1)):
        assert first_wrong(text, spec) == place
    assert first_wrong("a blue square and a red circle", spec) == 7


def test_words_are_judged_by_themselves_and_so_far():
    scene = world.Scene((world.Obj("circle", "red", "small", (4, 4, 15, 15)),), "gray")
    so_far, there = zip(*judged_words("two red squares on a gray background", scene, 0), strict=True)
    assert so_far == (0.0,) * 7
    assert [value for value in there if value == value] == [0, 1, 0, 1]


def test_cells_show_what_covers_them():
    scene = world.Scene((world.Obj("cross", "blue", "large", (20, 0, 42, 14)),), "black")
    names = [[FEATURES[k][int(n)] for k, n in enumerate(row)] for row in cell_labels(scene)]
    assert names[1] == names[2] == ["cross", "blue", "large", "black"]
    assert names[0] == names[3] == names[5] == ["", "", "", "black"]
