"""Passwords, keys and tokens: refused in configs, read from the environment, hidden wherever they might be shown."""

from __future__ import annotations

import json

import pytest
import torch
import written
from written import refused

from align.config.load import dump_config, load_config, load_reward
from align.runs.environment import environment
from alignflow.errors import ConfigError, DataError
from alignflow.secrets import HIDDEN, find, names_secret, redact, resolve, shown
from generators.errors import GeneratorError
from rewards.base import Reward, RewardError

write, run = written.write, written.run


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("api_key", True), ("apiKey", True), ("X-Api-Key", True), ("OPENAI_API_KEY", True), ("password", True),
        ("dbPassword", True), ("authorization", True), ("hf_token", True), ("token", True), ("client_secret", True),
        ("key", True), ("token_env", False), ("api_key_env", False), ("max_tokens", False), ("eos_token", False),
        ("keys", False), ("monkey", False), ("keyframes", False), ("tokenizer", False), ("token_length", False),
    ],
)  # fmt: skip
def test_names_of_secrets(key, secret):
    assert names_secret(key) is secret


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://me:PASS@host:80/x", f"http://{HIDDEN}@host:80/x"),
        ("http://me:P@SS@host", f"http://{HIDDEN}@host"),
        ("https://host/x?api_key=PASS&n=1", f"https://host/x?api_key={HIDDEN}&n=1"),
        ("https://host/x?X-Amz-Signature=PASS", f"https://host/x?X-Amz-Signature={HIDDEN}"),
        ("reward.judge.extra.api_key=PASS", f"reward.judge.extra.api_key={HIDDEN}"),
        ("{kind: x, 'password': 'PASS'}", f"{{kind: x, 'password': '{HIDDEN}'}}"),
        ("Authorization: Bearer PASSPASS", f"Authorization: {HIDDEN} {HIDDEN}"),
        ("the key is sk-abcdefghijklmnopqrst", f"the key is {HIDDEN}"),
    ],
)
def test_secrets_are_hidden(text, said):
    assert redact(text) == said
    assert redact(said) == said


@pytest.mark.parametrize(
    "text",
    [
        "an override reads key=value, such as train.lr=1e-4",
        "max_tokens: 12",
        "http://host/a@b",
        "token_env: NAME",
        "a@b",
    ],
)
def test_ordinary_text_stays(text):
    assert redact(text) == text


def test_values_of_the_environment_are_hidden(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "swordfish-1")
    monkeypatch.setenv("SOME_NAME", "seahorse-22")
    assert redact("wrong token swordfish-1") == f"wrong token {HIDDEN}"
    assert redact("seahorse-22") == "seahorse-22"
    assert resolve({"a": ["x ${SOME_NAME}"]}) == {"a": ["x seahorse-22"]}
    assert redact("seahorse-22") == HIDDEN


@pytest.mark.parametrize(
    ("reward", "path"),
    [
        ("{kind: remote, url: 'http://me:PLANTED@host:1'}", "reward.url"),
        ("{kind: remote, url: 'http://host:1/?token=PLANTED'}", "reward.url"),
        ("{kind: rubric, judge: {url: 'http://h', model: m, extra: {key: {a: PLANTED}}}}", "reward.judge.extra.key.a"),
        ("{kind: 'my:fn', options: {deep: [{password: PLANTED}]}}", "reward.options.deep.0.password"),
        (
            "{kind: mixture, parts: {a: {reward: {kind: remote, url: 'http://me:PLANTED@h'}}}}",
            "reward.parts.a.reward.url",
        ),
    ],
)  # fmt: skip
def test_a_config_may_not_hold_a_secret(write, reward, path):
    rollout = "rollout={kind: online, prompts: 2, group: 2}"
    message = refused(write(), [rollout, f"reward={reward}"])
    assert "PLANTED" not in message
    assert f"{path} (override" in message
    assert "write ${NAME} here" in message or "token_env" in message
    with pytest.raises(ConfigError, match=r"holds a secret|token_env") as caught:
        load_reward(reward)
    assert "PLANTED" not in str(caught.value)


def test_a_reference_is_kept_in_the_config_and_read_where_it_is_used(write, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "PLANTED-KEY")
    config = load_config(
        write(), ["rollout={kind: online}", "reward={kind: 'my:fn', options: {api_key: '${JUDGE_KEY}'}}"]
    )
    assert "PLANTED" not in dump_config(config)
    assert "${JUDGE_KEY}" in dump_config(config)
    write(
        "def fn(media, prompts, api_key):\n    assert api_key == 'PLANTED-KEY'\n    return [1.0] * len(prompts)\n",
        "my.py",
    )
    assert config.reward.build()(torch.zeros(1, 3, 8, 8), ["a"]).values.tolist() == [1.0]
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(RewardError, match="environment variable JUDGE_KEY is not set"):
        config.reward.build()


def test_a_misspelt_setting_beside_a_secret_does_not_show_it(write):
    assert "PLANTED" not in refused(write(), ["reward.api_key=PLANTED", "train.password=PLANTED"])


def test_the_command_line_is_kept_without_secrets(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["alignflow", "train", "c.yaml", "reward.url=http://me:PLANTED@h", "x.api_key=PLANTED"]
    )
    said = json.dumps(environment()["command"])
    assert "PLANTED" not in said
    assert "reward.url" in said


@pytest.mark.parametrize("kind", [DataError, ConfigError, RewardError, GeneratorError])
def test_errors_hold_neither_secrets_nor_escapes(kind):
    message = str(kind("at http://me:PLANTED@host: \x1b]0;title\x07\x1b[31mred\x1b[0m\nnext"))
    assert message == f"at http://{HIDDEN}@host: red\nnext"


def test_reasons_hold_neither_secrets_nor_escapes(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "swordfish-1")

    def fails(media, prompts, group):
        raise RuntimeError("\x1b[31mno swordfish-1 here")

    reasons = Reward("r", fails)(torch.zeros(2, 3, 8, 8), ["a", "b"]).reasons
    assert reasons[1].startswith(f"RuntimeError: no {HIDDEN} here (test_secrets.py, line ")


def test_the_terminal_is_printed_to_without_escapes_and_secrets(write, run):
    code, out, err = run("check", str(write("nonsense: '\x1b[31m'\nurl: http://me:PLANTED@h\n".replace("\x1b", "\\e"))))
    assert code == 2
    assert "PLANTED" not in out + err
    code, out, err = run("check", "no\x1b[31mfile?token=PLANTED.yaml")
    assert code == 2
    assert "\x1b" not in out + err
    assert "PLANTED" not in out + err


def test_find_reads_every_depth():
    tree = {"a": {"b": [{"secret": "x"}]}, "c": "http://u:p@h", "d": {"token": "${T}"}, "e": {"token": None}}
    assert list(find(tree)) == [("a", "b", "0", "secret"), ("c",)]
    assert shown("\x1b[31mx") == "x"


@pytest.mark.slow
def test_no_file_of_a_run_and_no_output_holds_a_secret(write, run, monkeypatch, tmp_path):
    """Secrets planted in the environment, in a reward's options, reasons and exceptions, and on the command line."""
    monkeypatch.setenv("REWARD_TOKEN", "PLANTED-in-the-environment")
    monkeypatch.setenv("OWN_KEY", "PLANTED-in-options")
    write(
        "import os, torch\nfrom rewards.base import Scores\n"
        "def red(media, prompts, api_key):\n"
        "    assert api_key == 'PLANTED-in-options'\n"
        "    values = media.mean(dim=(1, 2, 3))\n    values[0] = float('nan')\n"
        "    said = f'\\x1b[31mno {api_key} {os.environ[\"REWARD_TOKEN\"]} http://me:PLANTED-user@h'\n"
        "    return Scores(values, {0: said})\n",
        "own.py",
    )
    write(
        "generator: {path: shapes}\nprompts: {train: 'shapes:train', heldout: 'shapes:heldout'}\nrecipe: nft\n"
        "rollout: {prompts: 2, group: 3, sampler: {steps: 2}}\ntrain: {steps: 2, threads: 1}\n"
        "evaluate: {prompts: 3, sampler: {steps: 2}}\nsamples: {count: 2}\n"
        "reward: {kind: 'own.py:red', options: {api_key: '${OWN_KEY}'}}\n"
    )
    monkeypatch.setattr("sys.argv", ["alignflow", "train", "run.yaml", "x.password=PLANTED-in-words"])
    said = []
    for words in (
        ("check", "run.yaml", "--import"),
        ("train", "run.yaml"),
        ("report", "runs/run"),
        ("export", "runs/run", "--to", "diffusers"),
        ("train", "run.yaml", "--overwrite", "reward.options.api_key=PLANTED-override"),
    ):
        code, out, err = run(*words)
        said += [out, err]
        assert code == (2 if "PLANTED" in words[-1] else 0), err
    assert not any("PLANTED" in text or "\x1b[31m" in text for text in said)
    files = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert {"config.yaml", "metrics.jsonl", "report.html", "README.md", "environment.json"} <= {f.name for f in files}
    assert [file for file in files if b"PLANTED" in file.read_bytes()] == []
    assert "${OWN_KEY}" in (tmp_path / "runs/run/config.yaml").read_text()
    assert HIDDEN in (tmp_path / "runs/run/metrics.jsonl").read_text()
