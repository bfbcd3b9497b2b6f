"""Code of one's own: found without being run, loaded the same way for rewards, recipes, searches and generators."""

from __future__ import annotations

import sys

import pytest
import written

from align.config.load import load_config
from alignflow.errors import ConfigError
from alignflow.plugins import PluginError, find, load
from generators.errors import GeneratorError
from rewards import RewardError, parse

write, run = written.write, written.run

LOUD = "raise SystemExit(0)\ndef red(media, prompts): ...\nclass Mine: ...\nif True:\n    also = 1\n"
SHAPES = "generator: {path: shapes}\nprompts: {train: 'shapes:train'}\nrollout: {prompts: 2, group: 2}\n"


@pytest.fixture(autouse=True)
def _fresh():
    yield
    for name in [name for name in sys.modules if "plugin" in name or name.startswith("own_")]:
        if name != "alignflow.plugins":
            del sys.modules[name]


@pytest.mark.parametrize("place", ["loud_plugin", "loud_plugin.py", "./loud_plugin.py", "pack_plugin.loud"])
def test_find_runs_nothing(write, place):
    write(LOUD, "loud_plugin.py")
    write("raise SystemExit(0)\n", "pack_plugin/__init__.py")
    write(LOUD, "pack_plugin/loud.py")
    for name in ("red", "Mine", "also", "red.attribute"):
        assert find(f"{place}:{name}").name in ("loud_plugin.py", "loud.py")
    with pytest.raises(PluginError, match="has no 'blue'; it has Mine, also, red"):
        find(f"{place}:blue")
    with pytest.raises(PluginError, match=r"raised SystemExit: 0 \(.*py:1\)"):
        load(f"{place}:red")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no_such_plugin:x", "cannot import 'no_such_plugin'"),
        ("json.nothing:x", "cannot import 'json.nothing'"),
        ("zipimport.x.y:x", "cannot import 'zipimport.x.y'"),
        ("gone.py:x", "no file gone.py"),
        (".x:y", "should read package.module:name"),
        ("a..b:y", "should read package.module:name"),
        ("a b:y", "should read package.module:name"),
        (":y", "should read package.module:name"),
        ("a:", "should read package.module:name"),
        ("a" * 3000 + ":y", "cannot import"),
        ("a" * 3000 + ".py:y", "no file"),
        ("~no_such_user_here/x.py:y", "not the home folder of a user of this machine"),
    ],
)
def test_what_is_not_there_is_told_by_both(write, kind, says):
    write()
    for ask in (find, load):
        with pytest.raises(PluginError) as caught:
            ask(kind)
        assert says in str(caught.value)
        assert len(str(caught.value)) < 7000


def test_a_module_of_the_package_hides_ones_own(write):
    write("def red(media, prompts): ...\n", "rewards.py")
    with pytest.raises(PluginError, match=r"rewards is a package of alignflow, .* write rewards.py:name"):
        load("rewards:red")
    assert callable(load("rewards.py:red"))


def test_errors_of_the_module_name_its_line(write):
    write("import math\n\nmath.sqrt(-1)\n", "broken_plugin.py")
    write("x = (\n", "unfinished_plugin.py")
    write("import no_such_package_at_all\n", "needy_plugin.py")
    with pytest.raises(PluginError, match=r"raised ValueError: .*broken_plugin.py:3\)"):
        load("broken_plugin:x")
    with pytest.raises(PluginError, match=r"unfinished_plugin.py:1 is not Python"):
        find("unfinished_plugin:x")
    with pytest.raises(PluginError, match=r"needs no_such_package_at_all, which is not installed \(.*py:1\)"):
        load("needy_plugin:x")


@pytest.mark.parametrize("place", ["own_parts", "own_parts.py"])
def test_everything_is_found_in_the_working_folder(write, place):
    write(
        "from align.recipes.nft import NFT\nfrom generators.base import Generator\n"
        "class Mine(NFT):\n    kind: str\n    more: int = 0\n"
        "class Draws(Generator): ...\n"
        "def red(media, prompts): return [0.0] * len(prompts)\n",
        "own_parts.py",
    )
    from generators.load import adapter

    config = load_config(write(f"{SHAPES}recipe: {{kind: '{place}:Mine', more: 3}}\nreward: {{kind: '{place}:red'}}\n"))
    assert config.recipe.more == 3
    assert config.reward.build().name == "red"
    assert adapter(f"{place}:Draws").__name__ == "Draws"
    with pytest.raises(GeneratorError, match=r"not a subclass of generators.base.Generator"):
        adapter(f"{place}:red")


def test_check_runs_code_only_when_told(write, run):
    write(
        "open('ran', 'w').close()\nfrom align.recipes.nft import NFT\nclass Mine(NFT):\n    kind: str\n",
        "own_recipe.py",
    )
    write("open('ran', 'w').close()\ndef red(media, prompts): return [0.0] * len(prompts)\n", "own_reward.py")
    path = str(
        write(f"{SHAPES}recipe: {{kind: 'own_recipe:Mine', timesteps: 2}}\nreward: {{kind: 'own_reward.py:red'}}\n")
    )
    code, out, err = run("check", path)
    assert (code, err) == (0, "")
    assert not (written.Path("ran")).exists()
    assert "own_recipe:Mine, found in" in out
    assert out.count("was not imported by check; use --import to try it") == 2
    assert "ready to run" not in out
    code, out, err = run("check", path, "--import")
    assert (code, err) == (0, "")
    assert written.Path("ran").exists()
    assert "is ready to run" in out


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("reward.kind=no_such_module:red", "reward.kind: cannot import 'no_such_module'"),
        ("reward.kind=gone.py:red", "reward.kind: no file gone.py"),
        ("recipe.kind=no_such_module:Red", "recipe.kind (override 'recipe.kind=no_such_module:Red'): cannot import"),
        ("recipe.kind=align.recipes.nft:Gone", "has no 'Gone'"),
        ("generator.kind=no_such_module:Red", "generator.kind: cannot import 'no_such_module'"),
        ("reward={kind: trained, path: gone}", "reward.path: no file or folder gone"),
        ("reward={kind: clip, model: ./gone}", "reward.model: no file or folder ./gone"),
        ("reward={kind: adversarial, references: gone}", "reward.references: no file or folder gone"),
        ("reward={kind: video_reward, template: gone.py}", "reward.template: no file or folder gone.py"),
        ("reward={kind: hpsv2, weights: gone.pt}", "reward.weights: no file or folder gone.pt"),
        (
            "reward={kind: mixture, parts: {a: {reward: shapes, normalise: reference, reference: gone.json}}}",
            "reward.parts.a.reference: no file or folder gone.json",
        ),
        ("evaluate.rewards={a: {kind: 'gone:x'}}", "evaluate.rewards.a.kind: cannot import 'gone'"),
    ],
)
def test_check_names_what_is_not_there(write, run, override, says):
    path = str(write(f"{SHAPES}recipe: nft\nreward: shapes\n".replace("train'}", "train', heldout: 'shapes:heldout'}")))
    code, out, err = run("check", path, override)
    assert code == 2, out
    assert says in err
    assert "ready to run" not in out


def test_the_reward_says_what_the_loader_says(write):
    write()
    with pytest.raises(RewardError, match="cannot import 'no_such_module'"):
        parse("no_such_module:x").build()
    with pytest.raises(ConfigError, match=r"should read package.module:name"):
        load_config(write(f"{SHAPES}recipe: .x:y\nreward: shapes\n"))
