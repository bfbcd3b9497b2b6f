"""The ground package: lazy modules, text made printable."""

from __future__ import annotations

import subprocess
import sys

import pytest

from alignflow.lazy import lazy
from alignflow.text import first_line, printable


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_a_lazy_module_is_imported_on_first_use_only():
    code = (
        "import sys; from alignflow.lazy import lazy; m = lazy('xml.dom.minidom');"
        "before = 'xml.dom.minidom' in sys.modules;"
        "m.parseString; print(before, 'xml.dom.minidom' in sys.modules, m.parseString.__module__)"
    )
    assert run(code) == "False True xml.dom.minidom"


def test_a_lazy_module_that_is_loaded_is_the_module():
    assert lazy("sys") is sys


def test_a_lazy_module_without_the_attribute_says_so():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lazy("json.scanner").no_such_name


def test_a_lazy_name_is_called_and_read_on_first_use():
    code = (
        "import sys; from alignflow.lazy import lazy; Fraction = lazy('fractions:Fraction');"
        "before = 'fractions' in sys.modules;"
        "print(before, Fraction(1, 2) + Fraction.from_float(0.5))"
    )
    assert run(code) == "False 1"


def test_importing_alignflow_imports_no_torch():
    assert run("import sys, alignflow; print('torch' in sys.modules, callable(alignflow.load_config))") == "False True"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("a\x00b\rc", "a?b?c"),
        ("line\n\ttab", "line\n\ttab"),
        ("\ud83d", "?"),
        ("日本 🎨 é", "日本 🎨 é"),
        ("\u202eabc", "\\u202eabc"),
    ],
)
def test_printable(given, shown):
    assert printable(given) == shown


def test_first_line_of_an_error():
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 5000))) == 300
