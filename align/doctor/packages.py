"""Packages: those that alignflow requires, attention kernels, and extras with the command that installs each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Any

from packaging.requirements import Requirement

from align.config.memory import CARDS, INSTALL
from align.doctor.findings import Finding
from alignflow.extras import EXTRAS, remedy

KERNELS = {
    "flash_attn": ("flash", (8, 0)),
    "flash_attn_interface": ("flash3", (9, 0)),
    "xformers": ("xformers", (7, 0)),
    "sageattention": ("sage", (8, 0)),
    "kernels": ("flash_hub", (8, 0)),
}
"""Package -> (value of memory.attention, least compute capability)."""

Version = Callable[[str], str | None]


def installed(package: str) -> str | None:
    """Version of a distribution; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def core(wanted: list[str] | None = None, of: Version = installed) -> Iterator[Finding]:
    """Requirements of alignflow that are missing or too old; one finding where all are met.

    Args:
        wanted: requirements as in pyproject.toml; default: those of the installed alignflow.
        of: version of a package, None if it is missing.
    """
    texts = (requires("alignflow") or [] if installed("alignflow") else []) if wanted is None else wanted
    needed = [one for one in map(Requirement, texts) if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = 0
    for one in needed:
        have = of(one.name)
        if have is None or not one.specifier.contains(have, prereleases=True):
            wrong += 1
            said = "is not installed" if have is None else f"{have} is installed, alignflow needs {one.specifier}"
            yield Finding(one.name, "blocks", said, f"pip install '{one}'")
    if not wrong:
        yield Finding("packages", "ok", f"{len(needed)} requirements of alignflow are met")


def attention(seen: Mapping[str, Any], find: Callable[[str], Any] = find_spec) -> Iterator[Finding]:
    """Attention kernels: installed, and for these cards."""
    least = min((tuple(card["capability"]) for card in seen.get("cards", ())), default=None)
    if least is None:
        yield Finding("attention", "ok", f"torch's own; {', '.join(KERNELS)} need a CUDA card")
        return
    for package, (value, needs) in KERNELS.items():
        there = find(package) is not None
        if least < needs:
            yield Finding(package, "ok", f"not for this card: it needs {CARDS.get(value, 'a newer card')}")
        elif there:
            yield Finding(package, "ok", f"installed: memory.attention={value}")
        else:
            yield Finding(package, "note", f"not installed, for memory.attention={value}", INSTALL[package])


def extras(find: Callable[[str], Any] = find_spec) -> Iterator[Finding]:
    """Optional packages by extra."""
    kernels = {module for module in EXTRAS if module in KERNELS}
    for extra in dict.fromkeys(extra for module, (extra, _) in EXTRAS.items() if module not in kernels):
        modules = [module for module, (other, _) in EXTRAS.items() if other == extra]
        missing = [module for module in modules if find(module) is None]
        if missing:
            commands = " ".join(remedy(module).removeprefix("pip install ") for module in missing)
            yield Finding(f"extra {extra}", "note", f"{', '.join(missing)} not installed", f"pip install {commands}")
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(modules))
