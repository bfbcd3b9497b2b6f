"""Settings: defaults, layers, plug-ins, and that a resolved config runs again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import written
from pydantic import BaseModel, ValidationError
from written import BASE, refused

from align.config import registry
from align.config.load import Config, dump_config, json_schema, load_config, load_reward, read_yaml, settings_of
from align.config.model import FullPolicy, LoRAPolicy
from align.config.sampling import LEVELS, Sampler
from align.config.sections import Evaluate
from align.recipes.base import Recipe
from alignflow.errors import ConfigError
from generators.base import Options

write = written.write

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(
    path
    for path in (ROOT / "configs").glob("**/*.yaml")
    if not path.name.startswith("search") and path.parent.name not in ("rewards", "rewriting")
)

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
    assert again == config.model_copy(update={"out": str(Path.cwd() / "elsewhere")})
    assert read_yaml("resolved.yaml") == settings_of(again)
    assert dump_config(again) == dump_config(config)


@pytest.mark.parametrize("kind", LEVELS)
def test_level_defaults_per_kind(kind):
    sampler = Sampler(kind=kind)
    assert sampler.noise_level == LEVELS[kind]
    assert sampler.stochastic == (LEVELS[kind] is not None)
    assert sampler.stochastic_count == (9 if sampler.stochastic else 0)


def test_window_counts_the_stochastic_steps():
    window = {"strategy": "random", "size": 2, "start": [0, 5]}
    assert Sampler.model_validate({"kind": "flow_sde", "window": window}).stochastic_count == 2


def test_config_is_frozen(write):
    with pytest.raises(ValidationError, match="frozen"):
        load_config(write()).train.lr = 1.0


def test_wrong_settings_made_in_python_read_as_those_of_a_config():
    """Settings in data keep pydantic's error, so that a part's problems have their place in the whole."""
    with pytest.raises(ConfigError) as caught:
        Options(size=(7, 64), frame_rate=16, sise=3)
    assert {problem.path: problem.message for problem in caught.value.problems} == {
        "size.0": "should be a multiple of 8, given 7",
        "frame_rate": "is now fps",
        "sise": "no such setting 'sise'; did you mean 'size'? Known here: " + ", ".join(Options.model_fields),
    }
    assert str(caught.value).startswith("3 problems in Options\n  size.0 (Options): should be")
    with pytest.raises(ConfigError, match=r"^window\.size \(Sampler\): is needed for strategy random"):
        Sampler(kind="cps", window={"strategy": "random"})
    with pytest.raises(ValidationError) as plain:
        Evaluate.model_validate({"sampler": {"steps": 0}})
    assert plain.value.errors()[0]["loc"] == ("sampler", "steps")


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
    path = write(BASE + "evaluate: {sampler: {kind: cps, steps: 7, guidance: 2, noise_level: 0.5}}\n")
    sampler = load_config(path, ["evaluate.sampler.kind=ode"]).evaluate.sampler
    assert (sampler.steps, sampler.guidance, sampler.noise_level) == (7, 2.0, None)


def test_files_are_found_beside_the_config_or_from_the_working_directory(write):
    write("a red circle\n", "deep/prompts.txt")
    path = write(BASE.replace("shapes:train", "prompts.txt"), "deep/run.yaml")
    assert load_config(path).prompts.train == "deep/prompts.txt"
    write("a blue circle\n", "prompts.txt")
    assert load_config(path).prompts.train == "prompts.txt"


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

    for cls in (
        Config,
        LoRAPolicy,
        FullPolicy,
        *registry.recipes().values(),
        *registry.rewards().values(),
        *registry.searches().values(),
    ):
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


def test_schema_knows_the_rewards_a_reward_is_made_of():
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json_schema())
    inner = {"kind": "mixture", "parts": {"a": {"reward": "shapes"}, "b": {"reward": {"kind": "clip", "chunk": 4}}}}
    check.validate({"reward": {"kind": "cached", "reward": inner}})
    for wrong in ({"kind": "clipp"}, {"kind": "clip", "bach": 4}):
        with pytest.raises(jsonschema.ValidationError):
            check.validate({"reward": {"kind": "cached", "reward": wrong}})


@pytest.fixture(scope="module")
def validator():
    """Of config files, by the schema editors are given."""
    return pytest.importorskip("jsonschema").Draft202012Validator(json_schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configs_are_valid_and_resolve(path, write, validator):
    validator.validate(read_yaml(path))
    if not {"generator", "recipe"} <= settings_or_none(path).keys():
        pytest.skip("a base for others")
    config = load_config(path)
    assert load_config(write(dump_config(config), "resolved.yaml")) == config


def settings_or_none(path: Path) -> dict:
    """What a shipped file and its bases say, unvalidated."""
    from align.config.load import merge, read_layers

    data: dict = {}
    for layer in read_layers(path):
        data = merge(data, layer.data, [Config])
    return data
