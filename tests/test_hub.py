"""The hub that does not answer: said within seconds by every command that would download, with advice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from align.checking.reachable import away, within_reach
from align.config.load import load_config
from align.data import tables
from align.rewriting.settings import load_evolve
from alignflow import hub
from alignflow.errors import ConfigError, DataError
from generators.base import GeneratorError
from generators.load import load
from rewards.base import RewardError
from rewards.networks.hub import from_pretrained, weight_file

ROOT = Path(__file__).parent.parent
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the hub's address and forgets what was known of it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_said", {})

    def set_to(address: str) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)

    return set_to


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str], list[int]]]:
    """A hub that counts requests; its address, the paths it was asked for, and the status it replies with."""
    asked: list[str] = []
    status = [200]

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked, status
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers_is_asked_once(at, answering):
    address, asked, _ = answering
    at(address)
    assert [hub.silent() for _ in range(3)] == ["", "", ""]
    assert hub.unavailable("owner/name") == ""
    assert asked == ["/"]


@pytest.mark.parametrize(("status", "said"), [(404, ""), (503, "HTTP status 503"), (407, "HTTP status 407")])
def test_a_proxy_without_a_way_to_the_hub_is_no_answer(at, answering, status, said):
    address, _, reply = answering
    reply[0] = status
    at(address)
    assert hub.silent() == (said and f"{address}: {said}")


def test_a_hub_that_takes_connections_and_says_nothing(at):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        at(f"http://127.0.0.1:{listener.getsockname()[1]}")
        start = time.monotonic()
        assert "Timeout" in hub.silent(patience=0.2)
        assert time.monotonic() - start < 2


def test_name_servers_that_do_not_answer_are_not_waited_for(at, monkeypatch):
    at("https://hub.example")
    monkeypatch.setattr(hub, "_head", lambda endpoint, patience: time.sleep(30))
    start = time.monotonic()
    assert hub.silent(patience=0.1) == "https://hub.example: no answer within 0.1 s"
    assert time.monotonic() - start < 2


def test_offline_mode_is_named_and_not_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_asked", lambda *args: pytest.fail("asked"))
    assert hub.silent() == "HF_HUB_OFFLINE is set"


def test_offline_holds_inside_the_block_only(at):
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE
    with hub.offline():
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert before == datasets.config.HF_HUB_OFFLINE


@pytest.mark.timeout(30)  # the libraries' own retries take 24 s
def test_everything_that_downloads_says_so_at_once(at, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    at(NOBODY)
    cases = [
        (GeneratorError, r"^no folder 'owner/name', not in the", "owner/name", lambda: load("sd3", "owner/name")),
        (RewardError, r"^owner/name does not load as AutoTokenizer: not in the", "owner/name",
         lambda: from_pretrained(AutoTokenizer, "owner/name")),
        (RewardError, r"^no file owner/name/a/b.pt here, and not from the hub: not in the", "owner/name",
         lambda: weight_file("owner/name/a/b.pt", "hint")),
        (DataError, r"^hub:owner/name:test: split 'test' cannot be loaded: not in the",
         "owner/name --repo-type dataset",
         lambda: list(tables.read_rows("hub:owner/name:test"))),
    ]  # fmt: skip
    start = time.monotonic()
    for error, begins, named, run in cases:
        with pytest.raises(error, match=begins) as found:
            run()
        said = str(found.value)
        assert f"local hub cache, and the hub cannot be reached: {NOBODY}: ConnectError: " in said
        assert f"run: hf download {named} --local-dir FOLDER; then copy the folder here" in said
        assert hub.SETTINGS in said
    assert time.monotonic() - start < 10


def test_a_run_lists_all_that_it_lacks(at, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    at(NOBODY)
    config = load_config([ROOT / "configs/sd35-medium/nft.yaml"], ["prompts.train=hub:owner/prompts:test"])
    assert list(away(config)) == [
        ("generator.path", "stabilityai/stable-diffusion-3.5-medium"),
        ("prompts.train", "hub:owner/prompts:test"),
        ("reward.model", "yuvalkirstain/PickScore_v1"),
        ("evaluate.rewards.pickscore.model", "yuvalkirstain/PickScore_v1"),
    ]
    with pytest.raises(ConfigError, match=r"(?s)^the hub cannot be reached \(http://127.0.0.1:9: .*lacks\n  generator"):
        within_reach(config)
    (tmp_path / "hub" / "models--stabilityai--stable-diffusion-3.5-medium").mkdir(parents=True)
    (tmp_path / "hub" / "datasets--owner--prompts").mkdir()
    assert [where for where, _ in away(config)] == ["reward.model", "evaluate.rewards.pickscore.model"]
    assert within_reach(config, "generator") is config  # sampling reads no reward


def test_what_a_run_does_not_read_here_is_not_asked_for(at, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    at(NOBODY)
    embedded = load_config([ROOT / "configs/shapes/nft.yaml"])
    assert within_reach(embedded) is embedded
    pooled = load_config([ROOT / "configs/shapes/nft.yaml"], ["reward={kind: pool, reward: {kind: pick_score}}"])
    assert list(away(pooled)) == []
    evolve = load_evolve([ROOT / "configs/rewriting/evolve.yaml"], ["writer={kind: local, model: owner/writer}"])
    assert list(away(evolve)) == [("writer.model", "owner/writer")]


@pytest.mark.timeout(60)
def test_training_says_so_before_torch_is_imported(tmp_path):
    code = "import sys; from align.cli.app import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    words = ["train", "configs/sd35-medium/nft.yaml", "--out", str(tmp_path / "run")]
    environment = os.environ | {"HF_ENDPOINT": NOBODY, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
    assert "generator.path stabilityai/stable-diffusion-3.5-medium" in done.stderr
    assert not (tmp_path / "run").exists()
