"""Hooks of the site: the page ``contributing.md``; links to files outside ``docs/`` become text."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LABEL = re.compile(r"(?<=\S)\s+(?=\*\*[A-Z][a-z ]+\.\*\* )")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
PAGES = {"../README.md": "index.md", "../CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add CONTRIBUTING.md and the style sheet as if they lay in ``docs/``."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=text))
    files.append(File.generated(config, "site.css", content=(ROOT / "docs/site/site.css").read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files outside ``docs/`` become their paths; labels such as **Source.** begin a paragraph."""
    if page.file.src_uri.startswith("methods/"):
        markdown = LABEL.sub("\n\n", markdown)
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    folder = posixpath.dirname(page.file.src_uri)

    def inside(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
        if target.startswith(("http", "#", "mailto:")) or not path.startswith("../"):
            return match[0]
        if path in PAGES:
            return f"[{text}]({posixpath.relpath(PAGES[path], folder or '.')})"
        return f"{text} (`{path.removeprefix('../')}`)"

    return "".join(part if part.startswith("```") else LINK.sub(inside, part) for part in parts)
