"""README and docs say what is there: numbers, links, commands, and the pages that are written from the code."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import alignflow
from align.checking.commands import examine
from align.cli.app import app
from align.config.registry import summary
from align.sweeps.members import members_of
from align.sweeps.words import axes_of
from alignflow.errors import ConfigError
from benchmarks.pages import PAGES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [
    str(page.relative_to(ROOT)) for page in WRITTEN if re.search(r"^```(sh|yaml|python)", page.read_text(), re.M)
]

ELSEWHERE = re.compile("does not exist|no folder|no file|is not installed|needs the package|cannot import")
"""Problems of configs that name files and packages of the reader."""


@pytest.mark.parametrize("name", PAGES)
def test_pages_from_the_code_are_current(name):
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "run python -m benchmarks.pages"


def test_pages_from_the_code_show_the_bench_whole_results_and_visible_commands():
    page = PAGES["reference/python.md"]()
    assert "#### Bench.velocity" in page
    assert "Stands for a function or a class of a module" not in page
    assert "## alignflow recipes" in PAGES["reference/commands.md"]()
    assert "## alignflow list" not in PAGES["reference/commands.md"]()  # a hidden name of recipes
    assert "`difference` (largest\n  absolute one of velocities and media)" in page


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


def commands(text: str) -> list[list[str]]:
    """Words of every alignflow command in the sh blocks of a page, without what stands before ``alignflow``."""
    shell = "".join(part for language, _, part in blocks(text) if language == "sh").replace("\\\n", " ")
    starts = re.split(r"^(?=(?:[A-Z_2]+=\S+ )*(?:\.venv/bin/)?alignflow )", shell, flags=re.MULTILINE)[1:]
    split = [shlex.split(line.replace(".venv/bin/", ""), comments=True) for line in map(whole_line, starts)]
    return [words[words.index("alignflow") + 1 :] for words in split]


def whole_line(text: str) -> str:
    """The first line, and those after it until its quotes are closed."""
    lines = text.splitlines()
    return next("\n".join(lines[:n]) for n in range(1, len(lines) + 1) if "\n".join(lines[:n]).count("'") % 2 == 0)


def blocks(text: str) -> list[tuple[str, str, str]]:
    """(language, file name or "", text) of every block of code of a page."""
    found = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    return [(language, name or file_name(part), part) for language, name, part in found]


def file_name(text: str) -> str:
    found = re.match(r"# (\w+\.(?:py|yaml)): ", text)
    return found[1] if found else ""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that has the repository's configs."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write_files(page: Path, folder: Path) -> str:
    """Write the blocks of a page that have a file name; return its text."""
    text = page.read_text()
    for _, name, part in blocks(text):
        if name:
            (folder / name).write_text(part)
    return text


def wrong_with(files: list[str], overrides: list[str]) -> list[str]:
    """Problems of a config other than files of the reader's that are not here."""
    try:
        list(examine([Path(file) for file in files], overrides, False, None, False))
    except ConfigError as error:
        return [str(problem) for problem in error.problems if not ELSEWHERE.search(str(problem))]
    return []


@pytest.mark.parametrize("page", WITH_CODE, ids=str)
def test_commands_exist_with_their_options_and_their_configs_pass_check(page, folder):
    for words in commands(write_files(ROOT / page, folder)):
        given = words
        if words[0] == "launch":
            options = {option for parameter in COMMANDS["launch"].params for option in parameter.opts}
            assert {word for word in words[:7] if word.startswith("--") and word in options}
            words = words[next(n for n, word in enumerate(words) if word in COMMANDS and n) :]
        name, *rest = words
        if name.startswith("--"):
            continue
        command = COMMANDS[name]
        if hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= options, given
        if name == "sweep":
            axes = axes_of(rest[0], [word for word in rest[1:] if "=" in word])
            assert all(wrong_with(list(one.files), list(one.overrides)) == [] for one in members_of(axes)), given
            continue
        configs = [word for word in rest if word.endswith(".yaml") and (folder / word).is_file()]
        missing = [word for word in rest if word.startswith("configs/") and word.endswith(".yaml")]
        assert all((folder / word).is_file() for word in missing), given
        if configs and rest[0] in configs and name not in ("schema", "reward"):
            overrides = [word for word in rest if re.match(r"[a-z_.]+=", word)]
            assert wrong_with(configs, overrides) == [], given


@pytest.mark.parametrize("page", WITH_CODE, ids=str)
def test_configs_in_pages_pass_check(page, folder):
    for language, name, part in blocks(write_files(ROOT / page, folder)):
        if language != "yaml" or page == "docs/nodes.md":
            continue
        if not name:
            name = "part.yaml"
            base = "extends: configs/shapes/nft.yaml\n" if "extends:" not in part else ""
            (folder / name).write_text(base + part)
        assert wrong_with([name], []) == [], part


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page != "CONTRIBUTING.md"], ids=str)
def test_python_in_pages_runs(page, folder, monkeypatch):
    text = write_files(ROOT / page, folder)
    if page != "docs/tutorials/first.md":  # which trains in seconds
        monkeypatch.setattr(alignflow, "train", lambda config: {"steps": config.train.steps}, raising=False)
    names: dict = {"__name__": page}
    for language, _, part in blocks(text):
        if language == "python":
            imports = re.findall(r"^(?:import|from) .*$", part, re.MULTILINE)
            weights = "from_pretrained" in part
            exec(compile("\n".join(imports) if weights else part, page, "exec"), names)
            compile(part, page, "exec")


def test_the_daily_commands_are_seven():
    assert len(commands(README)) == 8  # and the quickstart


def test_scripts_for_clusters_can_be_parsed(tmp_path):
    page = (ROOT / "docs/nodes.md").read_text()
    one_machine = re.compile("docker build|parallel.context")
    scripts = [text for text in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if not one_machine.search(text)]
    manifests = [
        part for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) for part in yaml.safe_load_all(text)
    ]
    scripts += manifests[1]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert [part["kind"] for part in manifests] == ["Service", "Job"]
    assert len(scripts) == 4
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)
        assert re.search(r"alignflow launch .*--node |torchrun .*--nnodes", script, re.DOTALL)
