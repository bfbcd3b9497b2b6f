"""A run in one file: repeated to the bit in another folder, and unpacked without leaving that folder."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import written
from PIL import Image
from tiny_run import settings

from align.bundles import archive, pack, repeat
from align.bundles.archive import MANIFEST, BundleError
from align.config.load import load_config, read_yaml
from align.training.trainer import train

run = written.run
JUDGE = "def judge(media, prompts):\n    return media.mean(dim=(1, 2, 3))\n"


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A run of one step with its own reward file and a local base model."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "judge.py").write_text(JUDGE)
    shutil.copytree(model, folder / "base")
    config = settings(
        folder, folder / "base", reward={"kind": f"{folder}/judge.py:judge"}, train={"steps": 1, "lr": 1e-2}
    )
    train(config)
    return config.run_dir


@pytest.fixture(scope="module")
def bundle(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("tar") / "tiny.tar"
    pack.pack(finished, out)
    return out


def test_a_run_is_repeated_to_the_bit_in_another_folder(bundle, finished, tmp_path, monkeypatch, run):
    """Everything is read from the bundle: the folder of the first run has gone."""
    monkeypatch.chdir(tmp_path)
    away = finished.parent.rename(tmp_path / "away")
    try:
        assert run("repeat", str(bundle), "--unpack")[0] == 0
        code, said, err = run("repeat", "tiny")
        assert code == 2
        assert f"the bundle contains code: {Path('tiny/files')}/" in err
        assert "judge.py. Read it, then add --import to run it" in err
        code, said, err = run("repeat", "tiny", "--import")
        assert (code, "warning" in err) == (0, False)
        assert said.endswith("the weights are those of the first run, bit for bit\n")
        name = "lora/pytorch_lora_weights.safetensors"
        assert (tmp_path / "tiny/run" / name).read_bytes() == (away / "run" / name).read_bytes()
        text = (tmp_path / "tiny/run/config.yaml").read_text()
        assert str(finished.parent) not in text
        code, said, err = run("repeat", str(bundle), "train.lr=0.02", "--import", "--out", "other")
        assert said.endswith("the weights differ from the first run's\n")
    finally:
        away.rename(finished.parent)


def test_what_a_bundle_holds(bundle, finished, tmp_path):
    with tarfile.open(bundle) as opened:
        names = opened.getnames()
        manifest, config = (opened.extractfile(name).read().decode() for name in (MANIFEST, "config.yaml"))
    manifest = json.loads(manifest)
    assert names == [MANIFEST, *sorted(manifest["files"])]
    assert {"config.yaml", "record/environment.json", "record/metrics.jsonl", "record/summary.json"} <= set(names)
    assert (manifest["name"], manifest["seed"], manifest["modules"], manifest["changed"]) == ("tiny", 0, [], [])
    assert [name.rpartition("/")[2] for name in names if name.endswith(".py")] == ["judge.py"]
    assert manifest["packages"]["torch"] == json.loads((finished / "environment.json").read_text())["packages"]["torch"]
    assert list(manifest["result"]) == ["lora/pytorch_lora_weights.safetensors"]
    assert str(finished.parent) not in config
    assert "\nout:" not in config
    pack.pack(finished, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == bundle.read_bytes()


def test_models_above_the_limit_are_named_instead(finished, tmp_path, run):
    out = tmp_path / "small.tar"
    code, _, err = run("bundle", str(finished), str(out), "--limit", "0.1")
    assert code == 0
    assert "left out, " in err
    assert out.stat().st_size < 100_000
    found = repeat.opened(out, tmp_path / "small")
    with pytest.raises(
        BundleError, match=r"^base \(\S+ [kM]B\) was too large for the bundle: name it with generator\.path"
    ):
        repeat.config_of(found, code=True)
    base = finished.parent / "base"
    config = repeat.config_of(found, [f"generator.path={base}"], code=True)
    assert repeat.differences(found, config) == []
    other = repeat.config_of(found, ["generator.path=shapes"], code=True)
    assert repeat.differences(found, other) == ["shapes is not the base model of the first run"]


def test_media_of_tables_come_with_them(finished, tmp_path):
    """Files that cells name beside a table; names that lead elsewhere are left as they are."""
    (tmp_path / "media").mkdir()
    for place in ("media/a.png", "outside.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / place)
    table = tmp_path / "table" / "pairs.jsonl"
    shutil.move(tmp_path / "media", tmp_path / "table")
    rows = [{"prompt": "a.png", "image": "a.png"}, {"prompt": "b", "image": "../outside.png"},
            {"prompt": "c", "image": str(tmp_path / "outside.png")}]  # fmt: skip
    table.write_text("\n".join(map(json.dumps, rows)))
    packing = pack.Packing(1_000_000)
    assert packing.name(str(table)) == packing.name(str(table)) == "files/0/pairs.jsonl"
    assert sorted(packing.files) == ["files/0/a.png", "files/0/pairs.jsonl"]
    small = pack.Packing(10)
    small.name(str(table))
    assert list(small.files) == ["files/0/pairs.jsonl"]
    assert [(one["name"], one["media"]) for one in small.left_out] == [("files/0/pairs.jsonl", 1)]


def test_what_cannot_be_bundled(finished, tmp_path, run):
    for words, said in (
        ((tmp_path, tmp_path / "a.tar"), "is not a training run; name a folder that `alignflow train` wrote"),
        ((finished, finished / "config.yaml"), "exists; choose another file"),
    ):
        code, _, err = run("bundle", *map(str, words))
        assert code == 2
        assert said in err
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "summary.json").unlink()
    with pytest.raises(BundleError, match="is not finished"):
        pack.pack(copy, tmp_path / "a.tar")


# -- unpacking --------------------------------------------------------------------------------------------------------


def made(path: Path, *entries: tuple[tarfile.TarInfo, bytes], listed: dict[str, bytes] | None = None) -> Path:
    """A tar with a manifest that lists ``listed``, then the entries."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in (listed or {}).items()}
    text = json.dumps({"format": archive.FORMAT, "files": digests}).encode()
    with tarfile.open(path, "w") as opened:
        for entry, content in (plain(MANIFEST, text), *entries):
            opened.addfile(entry, io.BytesIO(content))
    return path


def plain(name: str, content: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    return entry, content


def typed(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry, b""


OUTSIDE = "would lie outside the folder"
ATTACKS = {
    "parent": (plain("../evil"), OUTSIDE),
    "parent inside": (plain("files/../../evil"), OUTSIDE),
    "absolute": (plain("/tmp/evil"), OUTSIDE),
    "backslash": (plain("..\\evil"), OUTSIDE),
    "drive": (plain("C:evil"), OUTSIDE),
    "symlink": (typed("link", tarfile.SYMTYPE, "/etc/passwd"), "is not a plain file"),
    "hard link": (typed("link", tarfile.LNKTYPE, "bundle.json"), "is not a plain file"),
    "device": (typed("device", tarfile.CHRTYPE), "is not a plain file"),
    "folder": (typed("folder", tarfile.DIRTYPE), "is not a plain file"),
    "not listed": (plain("other"), "the manifest does not list"),
    "manifest again": (plain(MANIFEST), "the manifest does not list"),
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_nothing_is_written_outside(tmp_path, kind):
    entry, said = ATTACKS[kind]
    names = {entry[0].name: b"x"} if said == OUTSIDE else {}
    path = made(tmp_path / "a.tar", plain("good"), entry, listed={"good": b"x", **names})
    with pytest.raises(BundleError, match=f"{said}.*nothing was unpacked"):
        archive.unpack(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_damaged_bundles(tmp_path):
    cases = {
        "differs from the packed file": made(tmp_path / "a.tar", plain("good", b"y"), listed={"good": b"x"}),
        "it lacks good": made(tmp_path / "b.tar", listed={"good": b"x"}),
        "which comes twice": made(tmp_path / "c.tar", plain("good"), plain("good"), listed={"good": b"x"}),
        "is not a bundle of alignflow": tmp_path / "d.tar",
        "does not exist": tmp_path / "e.tar",
    }
    (tmp_path / "d.tar").write_bytes(b"no tar")
    for said, path in cases.items():
        with pytest.raises(BundleError, match=said):
            archive.unpack(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with tarfile.open(tmp_path / "f.tar", "w") as opened:
        opened.addfile(plain("other")[0], io.BytesIO(b"x"))
    with pytest.raises(BundleError, match=r"its first entry is not bundle\.json"):
        archive.unpack(tmp_path / "f.tar", tmp_path / "out")


def test_the_config_of_a_bundle_is_valid_where_it_lies(bundle, tmp_path):
    found = repeat.opened(bundle, tmp_path / "here")
    tree = read_yaml(found.folder / "config.yaml")
    assert tree["prompts"]["train"].startswith("files/")
    config = repeat.config_of(found, code=True)
    assert Path(config.prompts.train).read_text().startswith("a red cube\n")
    assert load_config(found.folder / repeat.PLACED) == config
    assert config.run_dir == tmp_path / "here" / "run"
