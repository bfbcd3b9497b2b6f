"""Every wrong config is refused with its place, what was given and what is allowed."""

from __future__ import annotations

import pytest
import written
from written import BASE, refused

from align.config.load import load_config
from alignflow.errors import ConfigError

write = written.write


@pytest.mark.parametrize(
    ("override", "path", "suggestion"),
    [
        ("sede=1", "sede", "did you mean 'seed'?"),
        ("train.stepps=1", "train.stepps", "did you mean 'steps'?"),
        ("train.learning_rate=1", "train.learning_rate", "did you mean 'lr'?"),
        ("recipe.betta=1", "recipe.betta", "did you mean 'beta'?"),
        ("evaluate.sampler.guidence=1", "evaluate.sampler.guidence", "did you mean 'guidance'?"),
        ("evaluate.sampler.window.sise=1", "evaluate.sampler.window.sise", "did you mean 'size'?"),
    ],
)
def test_misspelt_keys_name_the_nearest(write, override, path, suggestion):
    message = refused(write(), [override])
    assert message.startswith(f"{path} (override '{override}'): no such setting")
    assert suggestion in message


def test_a_far_off_key_lists_what_there_is(write):
    message = refused(write(), ["checkpoint.zzz=1"])
    assert "did you mean" not in message
    assert "known here: every, keep" in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lr=fast", "train.lr (override 'train.lr=fast'): should be a number, given 'fast'"),
        ("train.steps=1.5", "should be a whole number, given 1.5"),
        ("train.steps=0", "should be greater than or equal to 1, given 0"),
        ("train.schedule=cosin", "should be 'constant', 'cosine' or 'linear', given 'cosin'"),
        ("train=3", "train (override 'train=3'): should be a mapping, given 3"),
        ("train.lr.x=3", "should be a number, given {'x': 3}"),
        ("train.betas=[0.9]", "train.betas.1"),
        ("train.betas=[0.9, 1.5]", "both should be in [0, 1)"),
        ("train.gradient_checkpointing=maybe", "should be true or false, given 'maybe'"),
        ("generator.size=[64]", "generator.size.1"),
        ("generator.kind=sd33", "no such generator 'sd33'; did you mean 'sd3'?"),
        ("name=a/b", "name (override 'name=a/b'): should match pattern"),
        ("name=..", "should match pattern"),
        ("train.lr=.inf", "should be a finite number, given inf"),
        ("train.ema=.nan", "train.ema"),
        ("train=", "train (override 'train='): should be a mapping, given null"),
        ("seed=4294967296", "should be less than 4294967296"),
        ("recipe=:x", "recipe.kind"),
        ("recipe='x:'", "'x:' should read package.module:name"),
        ("policy.targets=x", "should be a list [a, b], given 'x'"),
        ("trackers=[tensorbord]", "trackers.0"),
        ("recipe=3", "should be a kind (adv_grpo"),
        ("recipe.kind=ntf", "recipe.kind (override 'recipe.kind=ntf'): no such recipe 'ntf'; did you mean 'nft'?"),
        ("recipe.kind=no.such.module:Mine", "cannot import 'no.such.module'"),
        ("recipe.kind=align.maths.seeds:derive", "is not a class derived from align.recipes.base.Recipe"),
        ("policy.kind=lroa", "no such policy 'lroa'; did you mean 'lora'? There are lora, full"),
        ("rollout.kind=3", "no such rollout 3; there are online, pairs, samples"),
        ("rollout.group=4", "only valid for kind=online; here kind is pairs"),
        ("rollout={kind: samples, file: x.jsonl}", "rollout.by_reward"),
        ("recipe.control_variate=true", "only valid for kind=flow_rwr; here kind is nft"),
        ("evaluate.gold=best", "no such reward in evaluate.rewards 'best'; there are none"),
        ("evaluate.sampler.noise_level=0.5", "ode is deterministic"),
        ("evaluate.sampler={kind: cps, noise_level: 2}", "levels of cps should be in (0, 1]"),
        ("evaluate.sampler={kind: cps, steps: 1}", "needs at least 2"),
        ("evaluate.sampler={kind: cps, window: {strategy: random}}", "window.size"),
        ("evaluate.sampler={kind: cps, window: {strategy: random, size: 11}}", "do not fit into 10 steps"),
        ("evaluate.sampler={kind: cps, window: {strategy: random, size: 2, start: [5, 9]}}", "steps - size = 8"),
        ("evaluate.sampler={kind: cps, window: {size: 2}}", "only for strategy random or progressive"),
        ("evaluate.sampler={window: {strategy: random, size: 2}}", "ode has no stochastic steps"),
        ("train.warmup=101", "101 optimizer steps, but the run has 100"),
        ("rollout={kind: online, same_noise: true}", "all samples of a group would be equal: ode adds no noise"),
        ("rollout={kind: online}", "reward: is missing; an online rollout needs one of"),
        ("recipe.kind=grpo", "grpo learns from its own samples"),
    ],
)
def test_wrong_values_name_place_and_remedy(write, override, says):
    assert says in refused(write(), [override])


@pytest.mark.parametrize("text", ["train.lr", "=1", "train..lr=1", ".lr=1"])
def test_overrides_that_are_none(write, text):
    assert "an override reads key=value" in refused(write(), [text])


def test_override_that_is_no_yaml(write):
    assert "the value is not YAML" in refused(write(), ["train.betas=[1,"])


def test_all_problems_at_once_with_their_lines(write):
    text = BASE + "train:\n  lr: fast\n  stepps: 3\npolicy: {kind: full, rank: 3}\nevaluate:\n  every: often\n"
    with pytest.raises(ConfigError) as caught:
        load_config(write(text), ["seed=x"])
    found = {problem.path: problem for problem in caught.value.problems}
    assert set(found) == {"train.lr", "train.stepps", "policy.rank", "evaluate.every", "seed"}
    assert found["train.lr"].place == "run.yaml:8"
    assert found["evaluate.every"].place == "run.yaml:12"
    assert found["seed"].place == "override 'seed=x'"
    assert str(caught.value).startswith("5 problems in run.yaml\n  ")


def test_a_problem_in_a_base_names_the_base(write):
    write("seed: 1\ntrain:\n  lr: fast\n", "base.yaml")
    assert refused(write("extends: base.yaml\n" + BASE)).startswith("train.lr (base.yaml:3)")


def test_what_must_be_given_is_asked_for(write):
    message = refused(write("seed: 1\n"))
    for path in ("generator", "prompts", "recipe"):
        assert f"  {path}: is missing" in message
    assert "recipe.kind (run.yaml:1): is missing; recipe kinds:" in refused(write("recipe: {beta: 1}\n"))


def test_missing_file_says_where_it_looked(write):
    write()
    message = refused("runn.yaml")
    assert "no config file runn.yaml (looked in" in message
    assert "run.yaml" in message


def test_missing_base_says_who_wants_it(write):
    assert "no config file gone.yaml, which run.yaml extends" in refused(write("extends: gone.yaml\n" + BASE))


def test_extends_in_a_circle(write):
    write("extends: run.yaml\n", "b.yaml")
    assert "is circular: run.yaml -> b.yaml -> run.yaml" in refused(write("extends: b.yaml\n" + BASE))


def test_extends_of_another_type(write):
    assert "should be a file name or a list of them, given 3" in refused(write("extends: 3\n" + BASE))


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_empty_file(write, text):
    assert "run.yaml: is empty; a config is a mapping" in refused(write(text))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "3\n"])
def test_file_that_is_no_mapping(write, text):
    assert "a config is a mapping of settings" in refused(write(text))


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("seed: 1\ntrain:\n\tlr: 1\n", 3, "indent with spaces"),
        ("seed: 1\ntrain: [1, 2\n", 3, "not readable as YAML"),
        ("seed: 1\nname: a: b\n", 2, "not readable as YAML"),
        ("seed: 1\nname: x\nseed: 2\n", 3, 'found duplicate key "seed"'),
        ("train:\n  lr: 1\n  lr: 2\n", 3, 'found duplicate key "lr"'),
        ("seed: *nowhere\n", 1, "undefined alias"),
        ("a: 1\n---\nb: 2\n", 2, "not readable as YAML"),
    ],
)
def test_broken_yaml_names_the_line(write, text, line, says):
    message = refused(write(text))
    assert message.startswith(f"run.yaml:{line}: ")
    assert says in message
    assert "\n" not in message


def test_alias_inside_itself(write):
    assert "an alias (*train) is inside the value that it names" in refused(
        write(BASE + "train: &train {lr: *train}\n")
    )


def test_merge_keys_and_anchors_work(write):
    config = load_config(write(BASE + "train: &quick {steps: 3}\nevaluate: {sampler: &few {steps: 3}}\n"))
    assert config.train.steps == config.evaluate.sampler.steps == 3


def test_keys_that_are_no_text(write):
    assert "a setting's name should be text" in refused(write(BASE + "1: 2\n"))


def test_binary_file(write):
    path = write()
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "not readable as YAML" in refused(path)


def test_heldout_prompts_are_needed_for_evaluation(write):
    text = BASE.replace(", heldout: shapes:heldout", "")
    message = refused(write(text), ["evaluate.rewards={gold: shapes}"])
    assert message.startswith("prompts.heldout (run.yaml:2): is missing, and evaluate.rewards needs it")
