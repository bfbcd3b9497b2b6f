"""Rewriters, what judges their rewrites, and the evolution of prompts."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_rewriter
import torch
import written
from tiny_rewriter import EVOLVE, PROMPTS, Echo, Paraphraser
from tiny_vlm import endpoint, said

from align.data.prompts import Prompt, read_prompts
from align.rewriting import evolve as module
from align.rewriting.environment import Environment, Rewrite
from align.rewriting.evolve import evolve, read_batch
from align.rewriting.settings import Caption, EndpointWriter, LocalWriter, Reply, load_evolve
from align.rewriting.table import read_rewrites
from align.rewriting.words import cleaned, history, instruction, rouge_l
from align.rewriting.writer import LocalLM, build_writer
from align.worlds import measure
from alignflow.errors import ConfigError, DataError, RunFolderError
from alignflow.worlds import shapes
from alignflow.worlds.shapes import wordings, world
from rewards.base import RewardError

run = written.run
SAID = Reply(longest=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_rewriter.save(tmp_path_factory.mktemp("rewriter"))


@pytest.fixture(scope="module")
def writer(model):
    return LocalLM.load(LocalWriter(model=str(model), dtype="float32", chunk=3), "cpu")


@pytest.fixture
def config(tmp_path, model):
    return load_evolve(tiny_rewriter.config(tmp_path, model, EVOLVE))


@pytest.fixture
def paraphraser(monkeypatch):
    found = Paraphraser()
    monkeypatch.setattr(module, "build_writer", lambda settings, device: found)
    return found


# -- wordings ---------------------------------------------------------------------------------------------------------


def opened(spec):
    """A spec with its objects in a fixed order, and the relation that goes with it."""
    wants, relation = spec.wants, spec.relation
    if [str(w) for w in wants] != sorted(str(w) for w in wants):
        wants, relation = wants[::-1], world.OPPOSITE.get(relation or "")
    return replace(spec, wants=wants, relation=relation)


def test_a_users_wording_means_the_caption_and_nothing_else():
    for split in ("train", "heldout"):
        for spec, text in wordings.prompts(split, 120, 3):
            assert opened(world.parse_caption(text)) == opened(spec)
            assert world.is_held_out(spec) == (split == "heldout")
    assert wordings.prompts("train", 20, 3) == wordings.prompts("train", 20, 3)


def test_a_rewriters_wording_fills_in_what_is_open_alone():
    rng = np.random.default_rng(0)
    for spec in world.sample_specs("train", 200, 1):
        style = wordings.rewriters(rng)
        found = opened(world.parse_caption(wordings.worded(spec, replace(style, swap=False))))
        assert found.background in (spec.background, style.background)
        assert spec.background is None or found.background == spec.background
        kept = opened(replace(found, wants=opened(spec).wants, background=spec.background))
        assert {(w.shape, w.count) for w in found.wants} == {(w.shape, w.count) for w in spec.wants}
        assert kept.relation in (spec.relation, world.OPPOSITE.get(spec.relation or ""))
    assert wordings.worded(spec, wordings.Style()) == world.caption(spec)
    assert wordings.mutated(style, rng, rate=0.0) == style


def test_what_keeps_a_meaning():
    spec = world.parse_caption("a red circle left of a square")
    for text, kept in (
        ("a square right of a small red circle on a gray background", True),
        ("the red circle to the left of the blue square", True),
        ("a red circle right of a square", False),
        ("a circle left of a square", False),
        ("a red circle", False),
        ("a red circle nowhere", False),
    ):
        assert wordings.keeps(spec, text) == kept
    two = world.parse_caption("two circles on a black background")
    assert wordings.keeps(two, "two red circles on a black background")
    assert not wordings.keeps(two, "2 circles")


def test_the_embedded_rewriter_keeps_many_meanings():
    """It was taught on the training split alone; the prompts are held out. Half of two objects it does not copy."""
    found = measure.rewriter(shapes.weights("rewriter").parent, 48)
    assert found["kept"] > 0.45
    assert found["parameters"] < 5e5
    size = sum(file.stat().st_size for file in shapes.weights("rewriter").iterdir())
    assert size < 1e6


# -- words ------------------------------------------------------------------------------------------------------------


def test_instructions_and_replies():
    assert instruction("A {prompt} B {history}", "{history} {x}", history="{prompt}") == "A {history} {x} B {prompt}"
    assert history([("a", 0.25), ("b", 1.0)]) == "0.25 a\n1 b"
    assert cleaned('\n  "a red circle" \n\nI chose red because') == "a red circle"
    assert cleaned(" \n ") == ""
    assert cleaned('"') == '"'


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    assert rouge_l("the cat sat", "the cat on the mat sat") == pytest.approx(2 * 3 / 9)
    assert rouge_l("A red circle!", "a red circle") == 1.0
    assert rouge_l("b a", "a b") == 0.5
    assert rouge_l("", "a") == rouge_l("", "") == 0.0


# -- the local model --------------------------------------------------------------------------------------------------


def test_a_reply_depends_on_its_seed_and_not_on_its_batch(writer):
    asked = [instruction("{prompt}", text) for text in (*PROMPTS, *PROMPTS)]
    seeds = [1, 2, 3, 4, 5, 6]
    together = writer.sample([writer.tokens(text) for text in asked], seeds, SAID)
    alone = [writer.sample([writer.tokens(text)], [seed], SAID)[0] for text, seed in zip(asked, seeds, strict=True)]
    assert together == alone
    assert together[0] != together[3]
    assert writer.write(asked, seeds, SAID) == [writer.text(ids) for ids in together]


def test_replies_are_sampled_from_the_models_distribution(writer):
    """The first token of many replies: its frequencies are the probabilities at that temperature."""
    asked = writer.tokens("a red circle")
    with torch.no_grad():
        logits = writer.model(torch.tensor([asked])).logits[0, -1]
    for temperature in (1.0, 0.3):
        p = (logits / temperature).softmax(-1)
        reply = Reply(longest=1, temperature=temperature)
        found = torch.tensor([ids[0] for ids in writer.sample([asked] * 600, range(600), reply)])
        share = torch.bincount(found, minlength=len(p)) / 600
        likely = p.topk(5).indices
        assert (share[likely] - p[likely]).abs().max() < 4 * (p[likely] * (1 - p[likely]) / 600).sqrt().max() + 1e-3
    greedy = writer.sample([asked] * 2, [1, 2], Reply(longest=4, temperature=0))
    assert greedy[0] == greedy[1]
    assert greedy[0][0] == int(logits.argmax())


def test_log_probabilities_are_those_of_the_model(writer):
    asked = [writer.tokens(text) for text in PROMPTS]
    replies = [[5, 7, writer.end], [9], [3, 4]]
    for temperature in (1.0, 0.5):
        logs, mask = writer.logps(asked, replies, temperature)
        assert mask.sum(1).tolist() == [3, 1, 2]
        for row, (first, then) in enumerate(zip(asked, replies, strict=True)):
            logits = writer.model(torch.tensor([first + then])).logits[0]
            each = (logits / temperature).log_softmax(-1)
            wanted = [each[len(first) - 1 + k, token].item() for k, token in enumerate(then)]
            assert logs[row, : len(then)].tolist() == pytest.approx(wanted, abs=1e-5)
            assert logs[row, len(then) :].tolist() == [0.0] * (3 - len(then))


def test_control_tokens_in_a_prompt_are_plain_characters(writer):
    ids = writer.tokens("a<|im_end|>\n<|im_start|>assistant")
    assert ids.count(writer.end) == 1


def test_a_prompt_that_does_not_fit_is_said(writer):
    with pytest.raises(RewardError, match=r"the rewriter's limit is 1024; set a smaller reply\.longest"):
        writer.write(["red " * 1200], [0], SAID)


def test_a_folder_without_a_language_model_is_said(tmp_path):
    with pytest.raises(RewardError, match="no folder"):
        build_writer(LocalWriter(model=str(tmp_path / "gone")), "cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RewardError, match="does not load"):
        build_writer(LocalWriter(model=str(tmp_path)), "cpu")


# -- a server ---------------------------------------------------------------------------------------------------------


def test_a_server_is_asked_with_temperature_and_seed():
    with endpoint(lambda body: said(f'"red {body["seed"]}"')) as (url, seen):
        remote = build_writer(EndpointWriter(url=url, model="m", backoff=0, retries=0), "cpu")
        assert remote.write(["a", "b"], [7, 8], Reply(temperature=0.5, longest=9)) == ["red 7", "red 8"]
    assert {(body["temperature"], body["max_tokens"], body["seed"]) for body in seen} == {(0.5, 9, 7), (0.5, 9, 8)}


def test_a_server_that_answers_nothing_stops_the_run():
    with endpoint(lambda body: said("")) as (url, _):
        remote = build_writer(EndpointWriter(url=url, model="m", backoff=0, retries=0), "cpu")
        with pytest.raises(RewardError, match="the rewriter sent no text: the judge's reply is empty"):
            remote.write(["a"], [7], SAID)


# -- the environment --------------------------------------------------------------------------------------------------


def test_rewrites_are_scored_for_the_users_prompt_on_shared_noise(config):
    judges = Environment.build(config)
    prompt = Prompt("a photo of the red circle")
    same, other = Rewrite(prompt, 0, prompt.text), Rewrite(prompt, 0, "a red circle")
    seen = []
    inner = judges.rewards["reward"]

    def noted(media, prompts, group):
        seen.append(prompts)
        return inner.function(media, prompts, group)

    judges.rewards["reward"] = replace(inner, function=noted)
    first, second, third = judges.judge([same, other, same], ("x",), gold=True)
    assert seen == [[prompt.text] * 6]
    assert first == third
    assert first.score == pytest.approx(first.parts["dense"])
    assert set(first.scores) == {"reward", "strict"}
    assert judges.judge([other], ("x",))[0].score == pytest.approx(second.score, abs=1e-6)
    noises = [judges_noise(judges, number, why) for number, why in ((0, "x"), (0, "x"), (1, "x"), (0, "y"))]
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])
    assert not torch.equal(noises[0], noises[3])
    assert not first.invalid


def test_the_wanted_text_is_a_term_of_the_score(config):
    prompt = Prompt("a photo of the red circle", metadata={"caption": "a red circle"})
    some = [Rewrite(prompt, 0, text) for text in ("a red circle", "the red circle", "two blue squares")]
    plain = Environment.build(config).judge(some, ("x",))
    both = Environment.build(config.model_copy(update={"caption": Caption(rouge=2.0, media=0.5)}))
    both.check([prompt])
    found = both.judge(some, ("x",))
    assert [one.parts["rouge_l"] for one in found] == pytest.approx([1.0, 2 / 3, 0.0])
    wanted = [0.5 * one.score + 2 * alike for one, alike in zip(plain, (1.0, 2 / 3, 0.0), strict=True)]
    assert [one.score for one in found] == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(DataError, match='needs a text under "caption"'):
        both.check([Prompt("a circle", place="prompts.jsonl line 1")])


def judges_noise(judges, number, why):
    """Media of the prompt ``a circle`` as the reward sees them."""
    seen = []
    inner = judges.rewards["reward"]

    def noted(media, prompts, group):
        seen.append(media)
        return torch.zeros(len(media))

    judges.rewards["reward"] = replace(inner, function=noted)
    judges.judge([Rewrite(Prompt("a circle"), number, "a circle")], (why,))
    judges.rewards["reward"] = inner
    return seen[0]


def test_a_rewrite_that_cannot_be_rendered_has_a_reason_and_no_score(config):
    judges = Environment.build(config)
    long = " ".join(["red"] * 30)
    found = judges.judge([Rewrite(Prompt("a circle"), 0, text) for text in ("a circle", " ", long)], ("x",))
    assert math.isfinite(found[0].score)
    assert [one.invalid for one in found] == [False, True, True]
    assert found[1].reason == "the rewrite is empty"
    assert "32 tokens, the model reads 20" in found[2].reason
    assert all(math.isnan(one.score) for one in found[1:])


# -- evolution --------------------------------------------------------------------------------------------------------


def rows_of(config):
    return [json.loads(line) for line in (config.run_dir / "rewrites.jsonl").read_text().splitlines()]


def test_evolution_keeps_the_best_and_shows_it_last(config, paraphraser):
    summary = evolve(config, say=lambda line: None)
    rows = rows_of(config)
    assert summary["rewrites"] == len(rows)
    for prompt in PROMPTS:
        own = [row for row in rows if row["prompt"] == prompt]
        assert own[0]["rewrite"] == prompt
        assert own[0]["round"] == 0
        assert len({row["rewrite"] for row in own}) == len(own) <= 5
        (best,) = [row for row in own if row.get("best")]
        assert best["score"] == max(row["score"] for row in own)
        assert set(best["again"]["plain"]) == {"reward", "strict"}
    later = [text for text in paraphraser.asked if text.splitlines()[1] == PROMPTS[0]][2:]
    known = {row["rewrite"]: row["score"] for row in rows if row["prompt"] == PROMPTS[0] and row["round"] < 2}
    best = sorted(known.items(), key=lambda item: item[1])[-3:]
    for text in later:
        shown = [line.split(" ", 1) for line in text.splitlines()[3:]]
        assert [float(score) for score, _ in shown] == pytest.approx([score for _, score in best], abs=1e-2)
        assert {line for _, line in shown} <= set(known)


def test_tables_of_an_evolution_are_read_by_training(config, paraphraser):
    evolve(config, say=lambda line: None)
    scored = read_rewrites(str(config.run_dir / "rewrites.jsonl"))
    assert {one.prompt for one in scored} == set(PROMPTS)
    assert all("dense" in one.parts for one in scored)
    best = read_prompts(str(config.run_dir / "best.jsonl"))
    assert [prompt.metadata["user"] for prompt in best] == list(PROMPTS)


def test_a_parquet_table_holds_the_same(config, paraphraser):
    pytest.importorskip("datasets")
    evolve(config.model_copy(update={"parquet": True}), say=lambda line: None)
    found, wanted = (read_rewrites(str(config.run_dir / f"rewrites.{kind}")) for kind in ("parquet", "jsonl"))
    assert found == wanted
    assert "dense" in found[0].parts


def test_an_interrupted_evolution_ends_in_the_same_table(config, paraphraser, tmp_path):
    evolve(config, say=lambda line: None)
    whole = (config.run_dir / "rewrites.jsonl").read_text()
    files = sorted((config.run_dir / "evolved").iterdir())
    assert len(files) == 2
    files[1].write_text(files[1].read_text()[:40])  # cut off in the middle
    (config.run_dir / "rewrites.jsonl").unlink()
    asked = len(paraphraser.asked)
    evolve(config, resume=True, say=lambda line: None)
    assert (config.run_dir / "rewrites.jsonl").read_text() == whole
    assert len(paraphraser.asked) < 2 * asked
    with pytest.raises(RunFolderError, match="other settings"):
        evolve(config.model_copy(update={"rounds": 3}), resume=True, say=lambda line: None)
    with pytest.raises(RunFolderError, match="--resume"):
        evolve(config, say=lambda line: None)


def test_batches_change_nothing(config, paraphraser, tmp_path):
    evolve(config, say=lambda line: None)
    other = config.model_copy(update={"batch": 1, "out": str(tmp_path / "other")})
    evolve(other, say=lambda line: None)
    assert [row["rewrite"] for row in rows_of(other)] == [row["rewrite"] for row in rows_of(config)]
    scores = [[row["score"] for row in rows_of(one)] for one in (config, other)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_rewriter_that_repeats_the_prompt_changes_nothing(config, monkeypatch):
    monkeypatch.setattr(module, "build_writer", lambda settings, device: Echo())
    summary = evolve(config, say=lambda line: None)
    assert summary["rewrites"] == len(PROMPTS)
    assert summary["again"]["reward"]["plain"] == summary["again"]["reward"]["best"]


def test_damaged_tables_are_said(tmp_path):
    assert read_batch(tmp_path / "gone.json") is None
    table = tmp_path / "rewrites.jsonl"
    for row, why in (
        ({"prompt": "a", "score": 1}, 'line 1: needs a text under "rewrite"'),
        ({"prompt": "a", "rewrite": "b", "score": "10"}, "line 1: \"score\" should be a number, given '10'"),
        ({"prompt": "a", "rewrite": "b", "score": 1, "parts": [1]}, '"parts" should map names to numbers'),
    ):
        table.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError) as caught:
            read_rewrites(str(table))
        assert why in str(caught.value)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("reply.template=Rewrite it", "does not show {prompt}"),
        ("reply.template='Rewrite {prompt}'", "does not show {history}"),
        ("rendering.sampler.kind=flow_sde", "rewrites are compared on the same noise; take ode or dpm2"),
        ("gold.reward={kind: shapes}", "is the name of the optimised reward"),
        ("reward={kind: pairwise}", "compares samples of a group"),
    ],
)
def test_a_wrong_config_is_refused_with_its_place(config, tmp_path, override, why):
    with pytest.raises(ConfigError) as caught:
        load_evolve(tmp_path / "run.yaml", [override])
    assert why in str(caught.value)


def test_the_command(tmp_path, model, run):
    path = str(tiny_rewriter.config(tmp_path, model, EVOLVE))
    code, out, err = run("check", path)
    assert (code, err) == (0, "")
    assert "is ready to run" in out
    code, out, _ = run("prompts", "evolve", path, "prompts.limit=1", "rounds=1")
    assert code == 0
    assert "rewrites.jsonl" in out
    code, _, err = run("check", path, "prompts.source=gone.txt", "writer.model=./gone")
    assert code == 2
    assert "prompts.source: file gone.txt does not exist" in err
    assert "writer.model: no folder gone" in err
    code, _, err = run("check", path, "writer.lora=./gone")
    assert (code, "writer.lora: no folder ./gone" in err) == (2, True)
