"""The structure that docs/architecture.md draws: which package may import which, how large files and folders may be."""

from __future__ import annotations

import ast
import builtins
from collections import Counter
from collections.abc import Iterator, Mapping, Set
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


DOTTED = {dotted(file) for file in FILES}


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


def modules_of(file: Path) -> set[str]:
    """The files that a file imports, as dotted names; also late, for type checkers, and by ``lazy``."""
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    late = [node.args[0] for node in calls if ast.unparse(node.func) == "lazy"]
    names = [*imports(file), *(str(one.value).replace(":", ".") for one in late if isinstance(one, ast.Constant))]
    found = set()
    for name in names:
        while name and name not in DOTTED:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", dotted(file)}


def circle(arrows: Mapping[str, Set[str]]) -> list[str]:
    """Names of which each leads to the next, and the last to the first; empty if there are none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        found = next((found for other in sorted(arrows[name]) if (found := walk(other, [*path, name]))), [])
        done.add(name)
        return found

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


def test_no_files_import_each_other():
    assert circle({dotted(file): modules_of(file) for file in FILES}) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": {"d"}, "d": set()}) == []
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": {"d"}, "d": {"b"}}) == ["b", "c", "d"]


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


def test_imports_stand_at_the_top():
    """Fewer than 2 first-party imports inside functions per 1,000 lines; ``alignflow/lazy.py`` delays the others."""
    lines, inside = 0, set()
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        lines += len(text.splitlines())
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                found = (node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom))
                inside |= {f"{dotted(file)} line {node.lineno}" for node in found if is_first_party(node)}
    assert len(inside) < 2 * lines / 1000, sorted(inside)


def is_first_party(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in PACKAGES for alias in node.names)
    return node.level > 0 or (node.module or "").split(".")[0] in PACKAGES


def code_lines(text: str) -> list[tuple[int, str]]:
    """(number, line with single spaces) of every line of code: no imports, docstrings, comments or blank lines."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            spans = node.body[:1] if ast.get_docstring(node) is not None else []
        else:
            spans = [node] if isinstance(node, ast.Import | ast.ImportFrom) else []
        left_out.update(line for span in spans for line in range(span.lineno, (span.end_lineno or span.lineno) + 1))
    numbered = ((number, " ".join(line.split())) for number, line in enumerate(text.splitlines(), 1))
    return [(n, line) for n, line in numbered if line and not line.startswith("#") and n not in left_out]


def repeats(sources: dict[str, str], run: int = 8) -> list[str]:
    """Places where ``run`` lines of code in a row stand that stand elsewhere too."""
    first: dict[tuple[str, ...], str] = {}
    found = []
    for name, text in sources.items():
        lines = code_lines(text)
        for start in range(len(lines) - run + 1):
            place = f"{name} line {lines[start][0]}"
            before = first.setdefault(tuple(line for _, line in lines[start : start + run]), place)
            if before != place:
                found.append(f"{before} and {place}")
    return found


def test_no_run_of_lines_is_written_twice():
    assert repeats({dotted(file): file.read_text(encoding="utf-8") for file in FILES}) == []


def test_a_run_of_lines_written_twice_is_found():
    lines = [f"x{i} = {i}" for i in range(8)]
    copied = "\n    # why\n\n".join(["def f():", *(f"    {line}" for line in lines)])
    assert repeats({"a": "\n".join(lines), "b": copied}) == ["a line 1 and b line 4"]
    assert repeats({"a": "\n".join(lines[1:]), "b": copied}) == []


def test_lazy_imports_are_those_that_type_checkers_see():
    wrong = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.If) or ast.unparse(node.test) != "TYPE_CHECKING" or not node.orelse:
                continue
            seen = {pair for one in node.body for pair in imported(one)}
            late = {pair for one in node.orelse for pair in lazily(one)}
            wrong += [f"{dotted(file)}: {name} = lazy({place!r})" for name, place in late - seen]
    assert not wrong


def imported(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """(name, what ``lazy`` takes for it) of every name that an import binds."""
    if isinstance(node, ast.Import):
        yield from ((alias.asname or alias.name, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            if (node.module or "").split(".")[0] not in PACKAGES:
                marks = ":."  # a module or a name of another package
            else:
                marks = "." if is_module(f"{node.module}.{alias.name}") else ":"
            yield from ((alias.asname or alias.name, f"{node.module}{mark}{alias.name}") for mark in marks)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def lazily(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """(name, place) of every name that is assigned from ``lazy(place)``."""
    if not isinstance(node, ast.Assign):
        return
    targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else [node.targets[0]]
    values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
    for target, value in zip(targets, values, strict=True):
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "lazy":
            yield ast.unparse(target), ast.literal_eval(value.args[0])
