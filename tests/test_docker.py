"""The Dockerfile by its text, and built where a builder works: sources exist, packages pinned, no root, no secret."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from alignflow import secrets

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs/docker/Dockerfile"
KNOWN = ("ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD")


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) in the order of the file; continued lines are one."""
    lines = [line for line in FILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in whole.splitlines() if line)]


def words_of(name: str) -> list[str]:
    return [words for instruction, words in instructions() if instruction == name]


def test_every_instruction_is_known_and_arguments_are_declared_before_they_are_used():
    declared = set()
    for name, words in instructions():
        assert name in KNOWN
        used = set(re.findall(r"\$\{?([A-Z_]+)", words))
        assert used <= declared, f"{name} {words}"
        declared |= {words.partition("=")[0]} if name == "ARG" else set()
    assert dict(words.split("=", 1) for words in words_of("ARG"))["DEVICE"] == "cuda"


def test_sources_exist_and_reach_the_build():
    listed = (ROOT / "docs/docker/Dockerfile.dockerignore").read_text().splitlines()
    sources = [source for words in words_of("COPY") for source in words.split()[:-1]]
    assert {f"!{source}" for source in sources} == {line for line in listed if line.startswith("!")}
    assert listed[0] == "*"
    for source in sources:
        assert (ROOT / source).exists()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} <= set(sources)


def test_packages_are_pinned_and_the_image_does_not_run_as_root():
    [base] = words_of("FROM")
    assert re.fullmatch(r"python:\$\{PYTHON\}-slim-bookworm", base)
    python = next(words for words in words_of("ARG") if words.startswith("PYTHON")).partition("=")[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f">={python}" == project["requires-python"]
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    installs = [words for words in words_of("RUN") if "pip install" in words]
    assert all('"$torch"' in words or "-c constraints.txt" in words for words in installs)
    extras = next(words for words in words_of("ARG") if words.startswith("EXTRAS")).partition("=")[2].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    assert json.loads(words_of("ENTRYPOINT")[0])[0] in project["scripts"]
    assert json.loads(words_of("CMD")[0]) == ["--help"]


@pytest.mark.parametrize("device", ["cpu", "cuda", "tpu"])
def test_the_device_chooses_the_wheels_of_torch(device, tmp_path):
    """The shell of the first RUN, with a pip that writes down what it is given."""
    (tmp_path / "constraints.txt").write_text("numpy==1\ntorch==2.0\n")
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$@" > given\n')
    pip.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DEVICE": device, "CPU_INDEX": "INDEX"}
    done = subprocess.run(["sh", "-c", words_of("RUN")[0]], cwd=tmp_path, env=env, capture_output=True, text=True)
    if device == "tpu":
        assert (done.returncode, done.stderr) == (2, "DEVICE=tpu: choose cpu or cuda\n")
        return
    index = "--index-url INDEX " if device == "cpu" else ""
    assert (done.returncode, (tmp_path / "given").read_text()) == (0, f"install {index}torch==2.0\n")


def test_no_secret_is_built_in():
    declared = [word for name in ("ARG", "ENV") for words in words_of(name) for word in words.split()]
    named = {name: value for name, _, value in (word.partition("=") for word in declared)}
    assert list(secrets.find(named)) == []
    assert not [word for word in declared if re.search("token|secret|password|credential|_key", word, re.IGNORECASE)]
    listed = (ROOT / "docs/docker/Dockerfile.dockerignore").read_text().splitlines()
    assert listed[0] == "*"  # so no file of the checkout gets in that is not named


def builder() -> str | None:
    """A program that builds images and works here."""
    for name in ("docker", "podman", "buildah"):
        if shutil.which(name) and not subprocess.run([name, "info"], capture_output=True, timeout=60).returncode:
            return name
    return None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_builds_and_runs():
    if (program := builder()) is None:
        pytest.skip("neither docker, podman nor buildah works here")
    tag = "alignflow-test:cpu"
    file = ["-f", str(FILE), "-t", tag, "--build-arg", "DEVICE=cpu", "--build-arg", "EXTRAS=data", str(ROOT)]
    subprocess.run([program, "build", *file], check=True)
    try:
        if program != "buildah":
            done = subprocess.run(
                [program, "run", "--rm", tag, "--version"], capture_output=True, text=True, check=True
            )
            assert "alignflow" in done.stdout
    finally:
        subprocess.run([program, "rmi", tag], capture_output=True)
