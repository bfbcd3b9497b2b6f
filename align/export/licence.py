"""The licence of a base model, as its own folder states it. Nothing is fetched."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from align.report.reading import front_matter, read_yaml
from align.report.usage import model_file
from alignflow.text import printable
from alignflow.worlds.shapes import WORLDS

KEYS = ("license", "license_name", "license_link")
"""Keys of a model card's header on the hub."""
FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE")


@dataclass(frozen=True)
class Licence:
    """A base model's licence.

    Args:
        header: keys and values for the header of a model card; empty if the folder names none.
        sentence: the same in words.
    """

    header: dict[str, str] = field(default_factory=dict)
    sentence: str = ""


def licence_of(path: str, shown: str) -> Licence | None:
    """The licence in the header of the base's ``README.md``, else the first line of its licence file; None for neither.

    Args:
        path: folder of the base model, an embedded world, or a hub id whose card was downloaded.
        shown: what the base is called in the sentence.
    """
    if path in WORLDS:
        return Licence({"license": "apache-2.0"}, f"The licence of the base `{shown}` is apache-2.0.")
    header = read_yaml(front_matter(_text(model_file(path, "README.md"))))
    found = {key: printable(value, 300) for key in KEYS if isinstance(value := header.get(key), str)}
    if "license" in found:
        name = found.get("license_name", found["license"])
        link = f" ({found['license_link']})" if "license_link" in found else ""
        return Licence(found, f"The licence of the base `{shown}` is {name}{link}.")
    for name in FILES:
        lines = [line.strip() for line in _text(model_file(path, name)).splitlines() if line.strip()]
        if lines:
            return Licence(
                {}, f"The base `{shown}` comes with the file {name}, which begins: {printable(lines[0], 200)}."
            )
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
