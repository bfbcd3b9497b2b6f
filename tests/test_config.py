"""Settings: what is refused and in which words, layers, and that a resolved config runs again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from align import registry
from align.config import Config, dump_config, json_schema, load_config, load_reward, read_yaml, settings_of
from align.errors import ConfigError
from align.recipes.base import Recipe
from align.settings import LEVELS, FullPolicy, LoRAPolicy, Sampler

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").glob("**/*.yaml"))

BASE = """\
generator: {path: some/folder}
prompts: {train: shapes:train, heldout: shapes:heldout}
rollout: {kind: pairs, file: pairs.jsonl}
recipe:
  kind: nft
  beta: 0.5
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into the working directory and return its name."""
    monkeypatch.chdir(tmp_path)

    def writer(text: str = BASE, name: str = "run.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return writer


def refused(path, overrides=()) -> str:
    """The message of the ConfigError that loading raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# -- what is accepted -------------------------------------------------------------------------------------------------


def test_defaults_and_name_come_from_the_classes_and_the_file(write):
    config = load_config(write(name="first.yaml"))
    assert (config.name, str(config.run_dir)) == ("first", "runs/first")
    assert config.policy == LoRAPolicy(rank=16)
    assert config.recipe.kind == "nft"
    assert config.recipe.beta == 0.5
    assert config.train.steps == 100


def test_values_are_read_as_yaml_1_2(write):
    config = load_config(write(BASE + "train: {lr: 1e-5, precision: no, steps: 012}\n"))
    assert (config.train.lr, config.train.precision, config.train.steps) == (1e-5, "no", 12)


def test_overrides_reach_any_depth_and_the_last_one_wins(write):
    overrides = ["train.lr=1e-4", "evaluate.sampler.steps=20", "train.betas=[0.8, 0.9]", "train.lr=2e-4", "out="]
    config = load_config(write(), overrides)
    assert (config.train.lr, config.evaluate.sampler.steps, config.train.betas) == (2e-4, 20, (0.8, 0.9))
    assert config.out is None


def test_resolved_config_loads_to_an_equal_one(write):
    config = load_config(write(), ["out=elsewhere", "recipe.kl=0.1", "trackers=[tensorboard]", "seed=7"])
    again = load_config(write(dump_config(config), "resolved.yaml"))
    assert again == config
    assert read_yaml("resolved.yaml") == settings_of(config)
    assert dump_config(again) == dump_config(config)


@pytest.mark.parametrize("kind", LEVELS)
def test_level_defaults_per_kind(kind):
    sampler = Sampler(kind=kind)
    assert sampler.level == LEVELS[kind]
    assert sampler.stochastic == (LEVELS[kind] is not None)
    assert sampler.stochastic_count == (9 if sampler.stochastic else 0)


def test_window_counts_the_stochastic_steps():
    window = {"strategy": "random", "size": 2, "start": [0, 5]}
    assert Sampler.model_validate({"kind": "flow_sde", "window": window}).stochastic_count == 2


def test_config_is_frozen(write):
    with pytest.raises(ValidationError, match="frozen"):
        load_config(write()).train.lr = 1.0


# -- layers -----------------------------------------------------------------------------------------------------------


def test_extends_merges_deeply_and_relative_to_the_file(write):
    write("train: {lr: 1e-3, steps: 5}\nseed: 3\n", "shared/base.yaml")
    write("extends: ../shared/base.yaml\ntrain: {steps: 7}\n", "middle/more.yaml")
    config = load_config(write("extends: middle/more.yaml\n" + BASE))
    assert (config.train.lr, config.train.steps, config.seed) == (1e-3, 7, 3)


def test_extends_takes_a_list_later_over_earlier(write):
    write("seed: 1\ntrain: {steps: 1}\n", "a.yaml")
    write("seed: 2\n", "b.yaml")
    config = load_config(write("extends: [a.yaml, b.yaml]\n" + BASE))
    assert (config.seed, config.train.steps) == (2, 1)


def test_the_same_base_twice_is_no_cycle(write):
    write("seed: 1\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    assert load_config(write("extends: [a.yaml, b.yaml]\n" + BASE)).seed == 1


def test_changing_kind_drops_settings_of_the_old_kind(write):
    path = write(BASE + "policy: {kind: lora, rank: 4}\n")
    config = load_config(path, ["recipe.kind=flow_rwr", "recipe.temperature=0.1", "policy.kind=full"])
    assert (config.recipe.kind, config.recipe.temperature) == ("flow_rwr", 0.1)
    assert config.policy == FullPolicy()


def test_changing_kind_in_a_file_drops_settings_of_the_base(write):
    write(BASE, "base.yaml")
    config = load_config(write("extends: base.yaml\nrecipe: {kind: flow_rwr}\n"))
    assert config.recipe == registry.recipes()["flow_rwr"]()


def test_naming_the_same_kind_keeps_its_settings(write):
    path = write(BASE + "policy: {rank: 4}\n")
    config = load_config(path, ["recipe.kind=nft", "policy.kind=lora"])
    assert config.recipe.beta == 0.5
    assert config.policy.rank == 4


def test_the_kind_alone_stands_for_its_defaults(write):
    text = BASE.partition("recipe:")[0] + "recipe: nft\nreward: clip\n"
    config = load_config(write(text), ["reward.variant=percent", "policy=full"])
    assert config.recipe == registry.recipes()["nft"]()
    assert (config.reward.kind, config.reward.variant, config.policy) == ("clip", "percent", FullPolicy())
    assert load_config(write(), ["recipe=nft"]).recipe.beta == 0.5


def test_changing_the_sampler_keeps_what_every_kind_has(write):
    path = write(BASE + "evaluate: {sampler: {kind: cps, steps: 7, guidance: 2, level: 0.5}}\n")
    sampler = load_config(path, ["evaluate.sampler.kind=ode"]).evaluate.sampler
    assert (sampler.steps, sampler.guidance, sampler.level) == (7, 2.0, None)


def test_files_are_found_beside_the_config_or_from_the_working_directory(write):
    write("a red circle\n", "deep/prompts.txt")
    path = write(BASE.replace("shapes:train", "prompts.txt"), "deep/run.yaml")
    assert load_config(path).prompts.train == "deep/prompts.txt"
    write("a blue circle\n", "prompts.txt")
    assert load_config(path).prompts.train == "prompts.txt"


# -- what is refused --------------------------------------------------------------------------------------------------


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
        ("train.betas=[0.9, 1.5]", "both should lie in [0, 1)"),
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
        ("recipe=3", "should be a kind (flow_dpo"),
        ("recipe.kind=ntf", "recipe.kind (override 'recipe.kind=ntf'): no such recipe 'ntf'; did you mean 'nft'?"),
        ("recipe.kind=no.such.module:Mine", "cannot import 'no.such.module:Mine'"),
        ("recipe.kind=align.seeds:derive", "is not a class derived from align.recipes.base.Recipe"),
        ("policy.kind=lroa", "no such policy 'lroa'; did you mean 'lora'?; there are lora, full"),
        ("rollout.kind=3", "no such rollout 3; there are online, pairs"),
        ("rollout.group=4", "only valid for kind=online; here kind is pairs"),
        ("recipe.clip_range=1", "only valid for kind=grpo; here kind is nft"),
        ("evaluate.gold=best", "no such reward in evaluate.rewards 'best'; there are none"),
        ("evaluate.sampler.level=0.5", "ode is deterministic"),
        ("evaluate.sampler={kind: cps, level: 2}", "levels of cps lie in (0, 1]"),
        ("evaluate.sampler={kind: cps, steps: 1}", "needs at least 2"),
        ("evaluate.sampler={kind: cps, window: {strategy: random}}", "window.size"),
        ("evaluate.sampler={kind: cps, window: {strategy: random, size: 11}}", "do not fit into 10 steps"),
        ("evaluate.sampler={kind: cps, window: {strategy: random, size: 2, start: [5, 9]}}", "steps - size = 8"),
        ("evaluate.sampler={kind: cps, window: {size: 2}}", "only for strategy random or progressive"),
        ("evaluate.sampler={window: {strategy: random, size: 2}}", "ode has no stochastic steps"),
        ("train.warmup=101", "101 updates, but the run has 100"),
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
    assert "in a circle: run.yaml -> b.yaml -> run.yaml" in refused(write("extends: b.yaml\n" + BASE))


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
    assert "an alias (*name) stands inside" in refused(write(BASE + "train: &train {lr: *train}\n"))


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


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_unknown_reward_anywhere_lists_the_kinds(write):
    message = refused(write(), ["reward={kind: shapess}", "evaluate.rewards={gold: {kind: shapess}}"])
    assert "reward.kind" in message
    assert "evaluate.rewards.gold.kind" in message
    assert message.count("did you mean 'shapes'?") == 2


def test_unknown_reward_option(write):
    assert "reward.nonsense" in refused(write(), ["reward={kind: shapes, nonsense: 1}"])


def test_a_problem_deep_in_a_mixture_is_found(write):
    mixture = "{kind: mixture, parts: {a: {reward: {kind: clip, variannt: percent}}, b: {reward: clp, weigth: 1}}}"
    message = refused(write(), [f"reward={mixture}"])
    assert "reward.parts.a.reward.variannt" in message
    assert "did you mean 'variant'?" in message
    assert "reward.parts.b.reward" in message
    assert "did you mean 'clip'?" in message
    assert "reward.parts.b.weigth" in message
    assert "did you mean 'weight'?" in message


def test_changing_the_kind_inside_a_mixture(write):
    mixture = "{kind: mixture, parts: {a: {weight: 2, reward: {kind: clip, variant: percent}}}}"
    config = load_config(write(), [f"reward={mixture}", "reward.parts.a.reward.kind=shapes"])
    assert settings_of(config)["reward"]["parts"]["a"]["reward"]["kind"] == "shapes"
    assert config.reward.parts["a"].weight == 2


def test_reward_for_the_command_line(write):
    assert load_reward("shapes") == load_reward("{kind: shapes}")
    path = write("reward: {kind: shapes}\n", "reward.yaml")
    assert load_reward(str(path)) == load_reward("shapes")
    with pytest.raises(ConfigError, match="did you mean 'shapes'"):
        load_reward("shape")
    with pytest.raises(ConfigError, match="no config file"):
        load_reward("gone.yaml")


# -- plug-ins ---------------------------------------------------------------------------------------------------------


class OutsideRecipe(Recipe):
    """A recipe of another package"""

    strength: float = 1.0


def test_recipe_from_outside_round_trips(write):
    kind = f"{__name__}:OutsideRecipe"
    config = load_config(write(), [f"recipe.kind={kind}", "recipe.strength=2"])
    assert isinstance(config.recipe, OutsideRecipe)
    assert (config.recipe.kind, config.recipe.strength) == (kind, 2.0)
    assert load_config(write(dump_config(config))) == config
    assert "recipe.strenght" in refused(write(), [f"recipe.kind={kind}", "recipe.strenght=2"])


# -- schema and shipped configs ---------------------------------------------------------------------------------------


def test_every_setting_is_described():
    def walk(cls: type[BaseModel]):
        for name, field in cls.model_fields.items():
            assert field.description or name == "kind", f"{cls.__name__}.{name} has no description"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation)

    for cls in (Config, LoRAPolicy, FullPolicy, *registry.recipes().values(), *registry.rewards().values()):
        walk(cls)


def test_schema_accepts_configs_and_refuses_wrong_types(write):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    json.dumps(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    validator.validate(settings_of(load_config(write())))
    validator.validate({"extends": "base.yaml", "prompts": {"heldout": "x"}})
    for wrong in ({"train": {"lr": "fast"}}, {"train": {"stepps": 1}}, {"recipe": {"kind": "ntf"}}, {"extends": 3}):
        assert not validator.is_valid(wrong), wrong


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configs_are_valid_and_resolve(path, write, monkeypatch):
    schema = json_schema()
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(schema).validate(read_yaml(path))
    if "recipe" not in settings_or_none(path):
        pytest.skip("a base for others")
    config = load_config(path)
    assert load_config(write(dump_config(config), "resolved.yaml")) == config


def settings_or_none(path: Path) -> dict:
    """What a shipped file and its bases say, unvalidated."""
    from align.config import merge, read_layers

    data: dict = {}
    for layer in read_layers(path):
        data = merge(data, layer.data, [Config])
    return data
