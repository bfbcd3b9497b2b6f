"""Mutated configs of every command: each loads and is examined, or is refused in words."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import failures

from align.checking.commands import examine
from align.config.load import load_config, load_reward, read_overrides
from alignflow.errors import ConfigError, DataError
from rewards.base import RewardError

CASES = 3000
ROOT = Path(__file__).resolve().parent.parent.parent / "configs"
EXPLAINED = (ConfigError, DataError)

SCALARS = [
    "", "null", "true", "false", "0", "-1", "1", "3.5", "1e308", "-1e308", ".nan", ".inf", "1" * 30, "1" * 5000,
    "0x" + "f" * 5000, "0o17", "0b1", "1_000", "2001-99-99", "2001-01-01 25:61:61", "12:30:45", "~", "no", "'3'", "=",
    "[]", "{}", "[1, [2, [3]]]", "{a: {b: c}}", "[" * 60 + "]" * 60, "!!int ''", "!!float ''", "!!int abc", "!!int 0x",
    "!!bool abc", "!!python/object:os.system x", "!foo bar", "!!binary aGk=", "!!set {a}", "!!timestamp x", "!!null x",
    "'a\0b'", '"\\0"', '"\\ud800"', '"\\e[31mred"', "'\U0001f600'", "a" * 3000, "../../../etc/passwd", "/dev/zero",
    "~x/y",
    "http://[::1", "http://u:p@h", ".x:y", "json:loads", "gone.py:x", "[ode]", "{kind: [x]}", "{kind: nft}", "&a [*a]",
    "*gone", "<<: x", "? [a]", "hub:x/y", "shapes:train", "%x", "@", "`", "|", ">", "- a", "# x", "!!str", "\t", "“x”",
]  # fmt: skip
KEYS = [
    "kind",
    "extends",
    "memory",
    "reward",
    "out",
    "name",
    "<<",
    "sampler",
    "parts",
    "Kind",
    "se\u200bed",
    "путь",
    "1",
    "null",
]

LETTERS = "{}[]:,&*#?|-<>=!%@`\"'\\\0\t \ufeff\u202e\x1bé"


def mutated(text: str, chance: random.Random) -> str:
    """A few changes of one config's text: of its lines, its values, its letters."""
    for _ in range(chance.randint(1, 3)):
        lines = text.split("\n")
        row = chance.randrange(len(lines))
        line = lines[row]
        kind = chance.randrange(10)
        if kind < 4 and ":" in line:
            lines[row] = f"{line.split(':')[0]}: {chance.choice(SCALARS)}"
        elif kind == 4:
            lines.insert(row, f"{' ' * chance.randint(0, 5)}{chance.choice(KEYS)}: {chance.choice(SCALARS)}")
        elif kind == 5:
            del lines[row]
        elif kind == 6:
            lines.insert(row, chance.choice(lines))
        elif kind == 7 and line:
            place = chance.randrange(len(line))
            lines[row] = line[:place] + chance.choice(LETTERS) + line[place + 1 :]
        elif kind == 8 and "," in line:
            parts = line.split(",")
            lines[row] = ",".join([*parts[:-1], f" {chance.choice(KEYS)}: {chance.choice(SCALARS)}}}"])
        else:
            lines[row] = " " * chance.randint(1, 4) + line
        text = "\n".join(lines)
    return text


def cases(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Written elsewhere; what a config extends is named by its whole path."""
    chance = random.Random(seed)
    shipped = sorted(file for file in ROOT.rglob("*.yaml"))
    for number in range(count):
        source = chance.choice(shipped)
        text = mutated(source.read_text(encoding="utf-8"), chance)
        text = re.sub(r"(?m)([\w./-]+\.yaml)", lambda match, beside=source.parent: str(beside / match[0]), text)
        path = folder / f"{source.parent.name}-{source.stem}-{number}.yaml"

        def call(path: Path = path, text: str = text) -> object:
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
            return list(examine(path))

        yield f"{path.name} (seed {seed})", call


def test_mutated_configs(tmp_path, monkeypatch, share):
    monkeypatch.chdir(ROOT.parent)  # where the prompts are
    count, found = failures(cases(tmp_path, int(CASES * share), 16), EXPLAINED)
    assert count == int(CASES * share)
    assert not found, "\n".join(found[:20])


def test_overrides_of_every_value(share):
    path, chance = ROOT / "shapes" / "nft.yaml", random.Random(5)
    keys = [
        "train.lr",
        "recipe",
        "recipe.kind",
        "reward",
        "evaluate.rewards.x",
        "rollout.sampler.kind",
        "a.b",
        "generator",
    ]
    every = [(key, value) for key in keys for value in SCALARS]
    chosen = chance.sample(every, int(len(every) * max(share, 0.3)))
    calls = ((f"{k}={v:.40}", lambda k=k, v=v: load_config(path, [f"{k}={v}"])) for k, v in chosen)
    count, found = failures(calls, EXPLAINED)
    assert count == len(chosen)
    assert not found, "\n".join(found[:20])


def test_rewards_in_one_line(share):
    texts = [f"{{kind: {value}}}" for value in SCALARS] + [f"{{kind: clip, chunk: {value}}}" for value in SCALARS]
    count, found = failures(((text[:50], lambda text=text: load_reward(text)) for text in texts), EXPLAINED)
    assert count == len(texts)
    assert not found, "\n".join(found[:20])


BOMB = "a0: &a0 {l: 1}\n" + "".join(f"a{i}: &a{i} {{l: *a{i - 1}, r: *a{i - 1}}}\n" for i in range(1, 40))
HOSTILE = {
    "deep": "a: " + "[" * 5000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(500)),
    "bomb": BOMB,
    "bomb in options": BOMB + "reward: {kind: 'a:b', options: {x: *a39}}\n",
    "bomb as a value": BOMB + "seed: *a39\n",
    "merge bomb": "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)),
    "list bomb": "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
    "ten megabytes": "a: " + "x" * 10_000_000,
    "ten megabytes of lines": "a: 1\n" * 2_000_000,
    "many trackers": "trackers: [" + "x, " * 60_000 + "x]",
    "many keys": "\n".join(f"k{i}: 1" for i in range(15_000)),
    "many quotes": "a: " + "'" * 100_000,
    "many anchors": "\n".join(f"a{i}: &a{i} 1" for i in range(15_000)),
    "flow of keys": "{" * 40 + "a" + "}" * 40,
    "comments": "#" * 200_000,
    "extends NUL": 'extends: "a\\0b"',
    "extends long": "extends: " + "x" * 5000,
    "extends surrogate": 'extends: "\\ud800"',
    "extends itself": "extends: hostile.yaml",
    "extends a folder": "extends: .",
    "extends a loop": "extends: loop.yaml",
    "extends zero": "extends: /dev/zero",
    "extends nobody": "extends: ~nobody_here/x.yaml",
    "extends many": "extends: [" + ", ".join(["other.yaml"] * 5000) + "]",
    "diamonds": "extends: [d0.yaml, d0.yaml]",
    "chain": "extends: c0.yaml",
    "nothing": "",
    "two documents": "a: 1\n---\nb: 2",
    "directive": "%YAML 9.9\n---\na: 1",
    "utf-16": b"\xff\xfea\0:\0 \x001\0",
    "latin": b"a: \xe9",
    "binary": bytes(range(256)) * 100,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_configs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content = HOSTILE[name]
    Path("hostile.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("other.yaml").write_text("seed: 1\n")
    Path("loop.yaml").symlink_to("loop.yaml")
    for i in range(30):
        Path(f"d{i}.yaml").write_text(f"extends: [d{i + 1}.yaml, d{i + 1}.yaml]\n" if i < 29 else "seed: 1\n")
    for i in range(300):
        Path(f"c{i}.yaml").write_text(f"extends: c{i + 1}.yaml\n")
    _, found = failures([(name, lambda: load_config("hostile.yaml"))], EXPLAINED)
    assert not found
    with pytest.raises(ConfigError) as caught:
        load_config("hostile.yaml")
    assert 0 < len(str(caught.value)) < 10_000


@pytest.mark.parametrize("limit", ["SIZE", "DEPTH", "VALUES", "FILES"])
def test_limits_can_be_set(tmp_path, monkeypatch, limit):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("train: {betas: [0.9, 0.99]}\n")
    Path("run.yaml").write_text("extends: base.yaml\n")
    monkeypatch.setenv(f"ALIGNFLOW_CONFIG_{limit}", "1")
    with pytest.raises(ConfigError, match=f"ALIGNFLOW_CONFIG_{limit} changes the limit"):
        load_config("run.yaml")
    monkeypatch.setenv(f"ALIGNFLOW_CONFIG_{limit}", "many")
    with pytest.raises(ConfigError, match="should be a positive whole number, given 'many'"):
        read_overrides(["a=1"])


def test_kinds_that_cannot_be_built_are_told():
    for kind in (".x:y", "a..b:c", "no_such_module:x", "gone.py:x"):
        with pytest.raises((RewardError, ConfigError)):
            load_reward(f"{{kind: '{kind}'}}").build()
