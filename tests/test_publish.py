"""An export on the hub: the card, the dry run, the upload to a stand-in of the hub, and every way in which it fails."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import written
from huggingface_hub import constants
from PIL import Image
from tiny_run import settings

from align.export.licence import licence_of
from align.report.reading import front_matter, read_yaml
from align.training.trainer import train
from alignflow import upload
from alignflow.upload import PublishError, Target

run = written.run
MINUS = "\u2212"


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The tests run offline; here that is the subject."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on a base whose folder states its licence."""
    folder = tmp_path_factory.mktemp("publish")
    tiny.sd3_pipeline(t5=False).save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny-community\nlicense_link: https://example.org/terms\n---\n# Base\n"
    )
    config = settings(
        folder,
        folder / "base",
        train={"steps": 2, "lr": 0.3, "ema": 0},
        evaluate={"every": 1, "prompts": 4, "sampler": {"steps": 3, "guidance": 2.5}, "gold": "gold",
                  "rewards": {"gold": {"kind": "tiny_run:brightness"}}},
    )  # fmt: skip
    train(config)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    from align.export import export
    from align.runs.trained import find_policy

    out = tmp_path_factory.mktemp("exported") / "nft"
    export(find_policy(trained), "diffusers", out)
    return out


class Hub:
    """What is asked of ``HfApi``, in order; a repository that exists has a visibility."""

    def __init__(self, private: bool | None = None, fails: Exception | None = None) -> None:
        self.private, self.fails, self.calls = private, fails, []

    def create_repo(self, repo, *, private, exist_ok):
        self.calls.append(("create", repo, private, exist_ok))
        self.private = private if self.private is None else self.private

    def repo_info(self, repo):
        return SimpleNamespace(private=self.private)

    def create_branch(self, repo, *, branch, exist_ok):
        self.calls.append(("branch", repo, branch, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, allow_patterns):
        if self.fails is not None:
            raise self.fails
        self.calls.append(("upload", repo_id, folder_path, revision, commit_message, tuple(allow_patterns)))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*given, **named):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# -- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_trained_on_what_and_how_far_it_came(trained, exported):
    card = (exported / "README.md").read_text()
    header = read_yaml(front_matter(card))
    assert [header[key] for key in ("license", "license_name", "license_link")] == [
        "other", "tiny-community", "https://example.org/terms",
    ]  # fmt: skip
    assert header["widget"][1] == {"text": "a blue ball", "output": {"url": "samples/001.png"}}
    assert "The licence of the base `base` is tiny-community (https://example.org/terms)." in card
    assert "| recipe | `nft` |\n| reward | `tiny_run:redness` |\n" in card
    for label in ("time", "training steps", "network calls", "seed"):
        assert re.search(rf"\| {label} \| [\d.,]+", card)
    gold = re.search(r"\| gold \| [\d.]+ ± [\d.]+ \| [\d.]+ ± [\d.]+ \| (\S+) \((\S+) to (\S+)\) \|", card)
    delta, low, high = (float(text.replace(MINUS, "-")) for text in gold.groups())
    assert low <= delta <= high
    assert str(trained.parent) not in card  # where it was trained is nobody's business
    assert {file.name for file in exported.rglob("*.png")} == {"before.png", "after.png", "000.png", "001.png"}


def test_the_card_s_code_generates_every_picture_of_the_card(trained, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported, "here")
    (tmp_path / "here" / "base").symlink_to(trained.parent / "base")  # the card names the base without its folder
    monkeypatch.chdir(tmp_path / "here")
    card = Path("README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0]
    rows = re.findall(r"^\| (\d+) \| (.+) \| (\d+) \|$", card, re.MULTILINE)
    assert len(rows) == 2
    for number, prompt, seed in rows:
        own = re.sub(r'prompt=".*"', f'prompt="{prompt}"', re.sub(r"manual_seed\(\d+\)", f"manual_seed({seed})", lines))
        exec(own, space := {})
        with Image.open(f"samples/{int(number) - 1:03d}.png") as image:
            shown = np.asarray(image.convert("RGB"), np.float32)
        assert np.abs(np.asarray(space["image"], np.float32) - shown).max() <= 2.55


LICENCES = {
    "named": ({"README.md": "---\nlicense: mit\n---\n"}, {"license": "mit"}, "The licence of the base `m` is mit."),
    "file": ({"LICENSE": "\n  Some Licence 2.0\nmore"}, {}, "with the file LICENSE, which begins: Some Licence 2.0."),
    "card without one": ({"README.md": "# Model\nlicense: mit\n", "LICENSE.md": "Own\n"}, {}, "which begins: Own."),
    "damaged": ({"README.md": "---\nlicense: [\n---\n"}, None, ""),
    "nothing": ({}, None, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", LICENCES)
def test_licences_are_those_that_the_folder_states(tmp_path, kind):
    files, header, sentence = LICENCES[kind]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = licence_of(str(tmp_path), "m")
    assert (found and found.header) == header
    assert found is None or sentence in found.sentence
    assert licence_of("shapes", "shapes").header == {"license": "apache-2.0"}


# -- the upload -------------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_files_sizes_and_card_and_opens_no_connection(trained, tmp_path, run, no_network):
    out = tmp_path / "made"
    code, said, err = run("export", str(trained), "--out", str(out), "--push", "alice/tiny", "--dry-run", "--public")
    assert (code, err) == (0, "")
    assert "would be uploaded to alice/tiny, main, public:\n" in said
    for file in out.rglob("*"):
        assert file.is_dir() or f"  {file.relative_to(out).as_posix()}\n" in said
    assert (out / "README.md").read_text() in said
    assert said.endswith(f"nothing was uploaded; upload with: alignflow export {out} --push alice/tiny\n")
    code, again, _ = run("export", str(out), "--push", "alice/tiny", "--dry-run")
    assert code == 0
    assert "main, private:" in again
    code, _, err = run("export", str(trained), "--out", str(out), "--push", "alice/tiny", "--dry-run")
    assert code == 2
    assert f"{out} exists. Upload it with `alignflow export {out} --push alice/tiny`" in err


def test_every_file_is_uploaded_in_one_commit(exported, run, monkeypatch):
    api = Hub()
    monkeypatch.setattr(upload, "connected", lambda: api)
    words = ["--push", "alice/tiny", "--revision", "v2", "--message", "second"]
    code, said, err = run("export", str(exported), *words)
    assert (code, err) == (0, "")
    assert api.calls[:2] == [("create", "alice/tiny", True, True), ("branch", "alice/tiny", "v2", True)]
    files = tuple(sorted(file.relative_to(exported).as_posix() for file in exported.rglob("*") if file.is_file()))
    assert api.calls[2:] == [("upload", "alice/tiny", exported, "v2", "second", files)]
    assert "uploaded to alice/tiny, v2, private: https://huggingface.co/alice/tiny/tree/v2\n" in said


def test_a_public_repository_takes_no_private_upload(exported):
    api = Hub(private=False)
    with pytest.raises(PublishError, match=r"alice/tiny is a public repository\. Add --public to upload to it"):
        upload.push(exported, Target("alice/tiny"), api)
    assert [call[0] for call in api.calls] == ["create"]
    assert upload.push(exported, Target("alice/tiny", public=True), api) == "https://huggingface.co/alice/tiny"


def test_a_failed_upload_says_how_to_go_on(exported):
    for error, said in (
        (ConnectionResetError("peer gone"), "the upload to alice/tiny failed: peer gone; the export stays in"),
        (forbidden(), "the token may not write to alice/tiny. Create one with write access"),
    ):
        with pytest.raises(PublishError, match=f"{re.escape(said)}.*alignflow export .* --push alice/tiny"):
            upload.push(exported, Target("alice/tiny"), Hub(fails=error))


def forbidden() -> Exception:
    error = RuntimeError("403 Forbidden")
    error.response = SimpleNamespace(status_code=403)
    return error


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "a/b c", "alice/.tiny", "alice/a--b"])
def test_names_that_the_hub_does_not_accept(name, run, no_network):
    code, _, err = run("export", "runs/any", "--push", name)
    assert code == 1
    assert err.startswith(f"error: --push {name}: ")


@pytest.mark.parametrize("words", [["--dry-run"], ["--public"], ["--revision", "v2"], ["--message", "m"]])
def test_options_of_an_upload_belong_to_it(words, run):
    code, _, err = run("export", "runs/any", *words)
    assert (code, err) == (2, f"error: {words[0]} belongs to --push OWNER/NAME\n")


# -- the hub does not answer ------------------------------------------------------------------------------------------


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@contextlib.contextmanager
def serving(status: int, seconds: float = 0.0):
    """A hub that answers every request with a status, after some seconds."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(seconds)
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.end_headers()

        def log_message(self, *given):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_missing_token_is_said_before_anything_is_read(run, monkeypatch, no_network):
    monkeypatch.setattr(upload, "get_token", lambda: None)
    code, said, err = run("export", "runs/none", "--push", "alice/tiny")
    assert (code, said) == (1, "")
    assert err.startswith("error: no token of the hub was found. Create one with write access at https://")
    assert "`hf auth login` or set HF_TOKEN" in err


def test_a_hub_that_cannot_be_reached_is_said_at_once(run, monkeypatch, no_proxy):
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr(upload, "get_token", lambda: "hf_PLANTEDPLANTEDPLANTED")
        start = time.monotonic()
        code, said, err = run("export", "runs/none", "--push", "alice/tiny")
    assert time.monotonic() - start < 3
    assert (code, said, "Traceback" in err, "PLANTED" in err) == (1, "", False, False)
    assert re.search(
        r"error: the hub cannot be reached \(http://127\.0\.0\.1:\d+: .*refused.*\)\. Check the network", err
    )


def test_a_hub_that_is_silent_is_given_up(monkeypatch, no_proxy):
    monkeypatch.setattr(upload, "TIMEOUT", 0.2)
    monkeypatch.setattr(upload, "get_token", lambda: "hf_token")
    with serving(200, seconds=1) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with pytest.raises(PublishError, match=r"did not answer: .*timed out.*\. Check the network"):
            upload.connected()


@pytest.mark.parametrize(("status", "said"), [(401, "does not accept the token"), (503, "answered 503"), (200, "")])
def test_what_the_hub_answers_to_the_token(monkeypatch, no_proxy, status, said):
    monkeypatch.setattr(upload, "get_token", lambda: "hf_token")
    with serving(status) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        if said:
            with pytest.raises(PublishError, match=said):
                upload.connected()
        else:
            assert (upload.connected().endpoint, upload.connected().token) == (address, "hf_token")


def test_offline_is_said(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set"):
        upload.connected()
