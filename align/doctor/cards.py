"""Cards, their driver and torch's build: whether they are compatible."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from align.doctor.findings import Finding

GB = 1e9
FIRST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Major version of CUDA -> first Linux driver that runs programs built for any of its minor versions (NVIDIA's CUDA
compatibility guide)."""


@dataclass(frozen=True)
class Smi:
    """Reply of nvidia-smi.

    Args:
        driver: its version, ``580.65.06``.
        cards: names of the cards.
        error: what it said where it failed; then there is nothing else.
    """

    driver: str = ""
    cards: tuple[str, ...] = ()
    error: str = ""


def read_smi(command: str = "nvidia-smi") -> Smi | None:
    """Driver and cards as the driver's own tool sees them; None if the tool is not installed."""
    asked = [command, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=20)
    except FileNotFoundError:
        return None
    except (OSError, subprocess.SubprocessError) as error:
        return Smi(error=f"{type(error).__name__}: {error}"[:300])
    rows = [line.split(",", 1) for line in done.stdout.splitlines() if re.match(r"\d+\.\d+[\d.]*,", line)]
    if done.returncode or not rows:
        said = (done.stdout + done.stderr).strip().splitlines()
        return Smi(error=said[0][:300] if said else f"code {done.returncode}")
    return Smi(rows[0][0].strip(), tuple(row[1].strip() for row in rows))


def torch_finding(seen: Mapping[str, Any]) -> Finding:
    """Whether torch imports, and what it was built for."""
    if "error" in seen:
        return Finding(
            "torch", "blocks", str(seen["error"]), "install torch again: pip install --force-reinstall torch"
        )
    build = f"CUDA {seen['cuda']}" if seen.get("cuda") else f"ROCm {seen['hip']}" if seen.get("hip") else "the CPU"
    return Finding("torch", "ok", f"{seen.get('version')}, built for {build}")


def driver(seen: Mapping[str, Any], smi: Smi | None) -> Iterator[Finding]:
    """Whether torch reaches the cards; a card that it does not reach blocks."""
    if "error" in seen:
        return
    if seen.get("hip") or seen.get("mps"):
        yield Finding("device", "ok", "mps" if seen.get("mps") else f"{len(seen['cards'])} cards by ROCm")
        return
    if seen["cards"]:
        yield Finding("driver", "ok", f"{smi.driver}, runs CUDA {seen['cuda']}" if smi else f"runs CUDA {seen['cuda']}")
        return
    yield _unreached(seen, smi)


def _unreached(seen: Mapping[str, Any], smi: Smi | None) -> Finding:
    """The reason why there is no card."""
    if smi is None:
        advice = "the embedded worlds train on the CPU; models such as SD3.5 need a card"
        return Finding("driver", "note", "no NVIDIA driver, so no CUDA card", advice)
    if smi.error:
        advice = "load or install the driver again, and in a container start it with the card: docker run --gpus all"
        return Finding("driver", "blocks", f"nvidia-smi fails: {smi.error}", advice)
    there = f"{smi.driver} with {', '.join(dict.fromkeys(smi.cards))}"
    if not seen.get("cuda"):
        return Finding(
            "driver", "blocks", f"{there}, but torch is built for the CPU", "install a build of torch for CUDA"
        )
    if (first := FIRST_DRIVER.get(_major(seen["cuda"]))) and _major(smi.driver) < first:
        newest = max((cuda for cuda, least in FIRST_DRIVER.items() if _major(smi.driver) >= least), default=None)
        other = f", or install a build of torch for CUDA {newest}" if newest else ""
        found = f"{smi.driver} is too old for CUDA {seen['cuda']} of torch"
        return Finding("driver", "blocks", found, f"update the driver to {first} or newer{other}")
    said = next((text for name, text in seen.get("errors", {}).items() if name == "available"), "torch sees no card")
    advice = "look at CUDA_VISIBLE_DEVICES, which hides cards, and in a container start it with docker run --gpus all"
    return Finding("driver", "blocks", f"{there}: {said}", advice)


def memory(seen: Mapping[str, Any], smi: Smi | None) -> Iterator[Finding]:
    """Each card: a product with its gradient, free memory, and what holds the rest."""
    for index, card in enumerate(seen.get("cards", ())):
        free, total = card["free"] / GB, card["total"] / GB
        name = f"card {index}"
        found = f"{card['name']}, {free:.1f} of {total:.1f} GB free"
        if not card["right"]:
            yield Finding(name, "blocks", f"{found}; a small product is wrong", "the card is faulty: use another one")
        elif free < 0.8 * total:
            advice = "other processes hold the rest: nvidia-smi lists them; CUDA_VISIBLE_DEVICES picks another card"
            yield Finding(name, "note", found, advice)
        elif not card["bfloat16"]:
            yield Finding(name, "note", found, "it has no bfloat16: set generator.dtype=float32 or float16")
        else:
            yield Finding(name, "ok", found)
    for name, said in seen.get("errors", {}).items():
        if name.startswith("card "):
            advice = "the card does not run this build of torch: install a build for its generation, or free its memory"
            yield Finding(name, "blocks", said, advice)


def backends(seen: Mapping[str, Any]) -> Iterator[Finding]:
    """gloo and nccl, each tried with one process."""
    if "error" in seen:
        return
    wanted = {"gloo": "GLOO_SOCKET_IFNAME=lo, and the host's own name in /etc/hosts, are the usual remedies"}
    if seen["cards"]:
        wanted["nccl"] = "NCCL_DEBUG=INFO shows the reason; one process trains without NCCL"
    for name, advice in wanted.items():
        if seen.get(name):
            yield Finding(name, "ok", "one process reduces a tensor")
        else:
            said = seen.get("errors", {}).get(name, "torch is built without it")
            yield Finding(name, "note", f"does not work: {said}", f"alignflow launch needs it; {advice}")


def _major(version: str) -> int:
    return int("0" + version.partition(".")[0])
