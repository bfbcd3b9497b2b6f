"""README and docs say what is there: numbers, links, commands, and the pages that are written from the code."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from align.cli.app import app
from align.config.registry import summary
from benchmarks.pages import PAGES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_pages_from_the_code_are_current(name):
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "run python -m benchmarks.pages"


def test_the_readme_fits_on_a_page():
    assert len(README.splitlines()) <= 130


def test_the_readme_counts_right():
    found = {room: len(kinds) for room, kinds in summary().items()}
    table = dict(re.findall(r"^\| ([a-z ]+) \| ([^|]+?) \|", README, re.MULTILINE))
    assert table["training recipes"] == str(found["recipes"])
    assert table["generators"] == f"{found['generators'] - 1} adapters, and a generic one"
    assert table["rewards"] == str(found["rewards"])
    assert table["search methods"] == str(found["search"])


def test_every_recipe_is_on_one_page_of_methods():
    pages = sorted((ROOT / "docs" / "methods").glob("*.md"))
    described = [name for page in pages for name in re.findall(r"^### (\w+)$", page.read_text(), re.MULTILINE)]
    assert sorted(described) == sorted(summary()["recipes"])


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []
    for link in links:
        file, _, anchor = link.partition("#")
        if anchor and file.endswith(".md"):
            heads = re.findall(r"^#+ (.+)$", (page.parent / file).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, link


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [
        line.removeprefix(".venv/bin/") for line in lines if line.removeprefix(".venv/bin/").startswith("alignflow")
    ]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_readme_exist_with_their_options_and_configs(line):
    _, name, *words = shlex.split(line)
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
    assert all((ROOT / word).is_file() for word in words if word.startswith("configs/"))


def test_the_daily_commands_are_five():
    assert len(commands()) == 6  # and the quickstart


def test_scripts_for_clusters_can_be_parsed(tmp_path):
    page = (ROOT / "docs/nodes.md").read_text()
    scripts = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    manifests = [
        part for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) for part in yaml.safe_load_all(text)
    ]
    scripts += manifests[1]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert [part["kind"] for part in manifests] == ["Service", "Job"]
    assert len(scripts) == 4
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)
        assert re.search(r"alignflow launch .*--node |torchrun .*--nnodes", script, re.DOTALL)
