"""State of this machine for training, for ``alignflow doctor``: what works, what is missing, one line of advice each.

The probes read the machine; every judgement is a function of what they read. Torch is imported in its own process,
because a broken installation can end the process that imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from align.doctor import cards, machine, packages, torch_probe
from align.doctor.findings import Finding
from alignflow import hub

__all__ = ["Finding", "examine"]


def examine(folder: Path | None = None) -> Iterator[Finding]:
    """All findings on this machine, as they are made.

    Args:
        folder: where runs are written; default: the current folder.
    """
    folder = folder or Path()
    seen, smi = torch_probe.read(), cards.read_smi()
    yield from packages.core()
    yield cards.torch_finding(seen)
    yield from cards.driver(seen, smi)
    yield from cards.memory(seen, smi)
    yield from packages.attention(seen)
    yield from machine.memory(machine.read_memory())
    yield from machine.disk(folder)
    yield machine.shared_memory(machine.read_shared_memory())
    yield machine.load(machine.read_load(), seen)
    yield from cards.backends(seen)
    yield network(hub.silent())
    yield from packages.extras()


def network(silent: str) -> Finding:
    """Finding on the hub, from the sentence of :func:`alignflow.hub.silent`."""
    if not silent:
        return Finding("hub", "ok", "answers")
    if silent.startswith("HF_HUB_OFFLINE"):
        return Finding("hub", "note", f"offline mode: {silent}", "unset it to download models; the cache is read")
    advice = f"models must be in the cache or given as folders; {hub.SETTINGS}"
    return Finding("hub", "note", f"cannot be reached: {silent}", advice)
