"""The structure that docs/architecture.md draws: which package may import which, how large files and folders may be."""

from __future__ import annotations

import ast
import builtins
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("alignflow", "generators", "rewards", "align")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
MAY_IMPORT = {
    "alignflow": {"alignflow"},
    "generators": {"alignflow", "generators"},
    "rewards": {"alignflow", "rewards"},
    "align.maths": {"alignflow", "align.maths"},
    "align": {"alignflow", "generators", "rewards", "align"},
}


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> Iterator[str]:
    """Every first-party module that a file imports: at the top, inside functions, for type checkers."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            here = dotted(file).split(".")[: -node.level] if node.level else []
            module = ".".join([*here, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    allowed = MAY_IMPORT[package]
    wrong = [
        f"{dotted(file)} imports {name}"
        for file in FILES
        if f"{dotted(file)}.".startswith(f"{package}.")
        for name in imports(file)
        if not any(f"{name}.".startswith(f"{one}.") for one in allowed)
    ]
    # the public names of the ground package are handed out from above, as strings
    assert not wrong


def test_no_folder_is_crowded():
    counts = Counter(file.parent for file in FILES)
    assert {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if count > 24} == {}


def test_no_file_is_long():
    lengths = {dotted(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_function_is_long():
    long = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = ast.get_docstring(node) is not None and len(node.body) > 1
                start = node.body[1].lineno if first else node.body[0].lineno
                length = (node.end_lineno or start) - start + 1
                if length > 50:
                    long.append(f"{dotted(file)}.{node.name}: {length} lines")
    assert not long


def test_errors_have_one_root():
    """An exception is an AlignflowError, which a user reads, or an EarlyExit, which the code catches itself."""
    classes = {
        node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }

    def ancestors(name: str) -> set[str]:
        return {name}.union(*(ancestors(base) for base in classes.get(name, []) if base != name))

    exceptions = {
        name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    errors = {name: ancestors(name) for name in classes if ancestors(name) & exceptions}
    assert len(errors) > 15
    assert [name for name, above in errors.items() if not above & {"AlignflowError", "EarlyExit"}] == []
