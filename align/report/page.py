"""A self-contained page from its template: styles, script and everything else are inlined."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from align.report.charts import draw, short, table

_HERE = Path(__file__).parent
SCRIPTS = ("report", "folding", "viewer")


@functools.cache
def _templates() -> jinja2.Environment:
    """Kept, because compiling the templates takes longer than filling them, and a run writes its page at every
    evaluation."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.globals.update(draw=draw, table=table)
    templates.filters.update(short=short)
    return templates


def fill(template: str, **values: Any) -> str:
    """The text of a page.

    Args:
        template: a file beside this one that extends ``frame.html``.
        values: what it shows; ``name`` and ``what`` (run, search, comparison) are the frame's.
    """
    css = Markup((_HERE / "report.css").read_text(encoding="utf-8"))
    js = Markup("".join((_HERE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS))
    return _templates().get_template(template).render(css=css, js=js, **values)
