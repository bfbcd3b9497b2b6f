"""``alignflow doctor``: every probe on stand-ins of machines that are not here, and the command on this one."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from align.cli.app import main
from align.doctor import cards, examine, machine, network, packages, torch_probe
from align.doctor.cards import Smi
from align.doctor.findings import Finding
from align.doctor.machine import Load
from alignflow.extras import EXTRAS

CARD = {"name": "A100", "capability": [8, 0], "free": 79e9, "total": 80e9, "right": True, "bfloat16": True}


def seen(**more: Any) -> dict[str, Any]:
    """What torch says on a machine without a card."""
    return {
        "version": "2.13.0",
        "cuda": None,
        "hip": None,
        "threads": 2,
        "mps": False,
        "cards": [],
        "gloo": True,
    } | more


def only(found: Iterable[Finding]) -> Finding:
    (one,) = found
    return one


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# -- torch and cards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch", "smi", "state", "found", "advice"),
    [
        ({}, None, "note", "no NVIDIA driver", "embedded worlds train on the CPU"),
        ({}, Smi("580.65.06", ("A100", "A100")), "blocks", "580.65.06 with A100, but torch is built for the CPU",
         "build of torch for CUDA"),
        ({"cuda": "13.0"}, Smi("535.104.05", ("A100",)), "blocks", "535.104.05 is too old for CUDA 13.0 of torch",
         "update the driver to 580 or newer, or install a build of torch for CUDA 12"),
        ({"cuda": "12.6"}, Smi("390.1", ("K80",)), "blocks", "390.1 is too old", "update the driver to 525 or newer"),
        ({"cuda": "12.6"}, Smi("535.104.05", ("A100",)), "blocks", "535.104.05 with A100: torch sees no card",
         "CUDA_VISIBLE_DEVICES"),
        ({"cuda": "12.6", "errors": {"available": "RuntimeError: busy"}}, Smi("535.1", ("A100",)), "blocks",
         "RuntimeError: busy", "CUDA_VISIBLE_DEVICES"),
        ({"cuda": "12.6"}, Smi(error="couldn't communicate"), "blocks", "nvidia-smi fails: couldn't communicate",
         "docker run --gpus all"),
        ({"cuda": "12.6", "cards": [CARD]}, Smi("535.1", ("A100",)), "ok", "535.1, runs CUDA 12.6", ""),
        ({"cuda": "12.6", "cards": [CARD]}, None, "ok", "runs CUDA 12.6", ""),
        ({"hip": "6.2", "cards": [CARD]}, None, "ok", "1 cards by ROCm", ""),
        ({"mps": True}, None, "ok", "mps", ""),
    ],
)  # fmt: skip
def test_a_driver_against_torch(torch, smi, state, found, advice):
    one = only(cards.driver(seen(**torch), smi))
    assert one.state == state
    assert found in one.found
    assert advice in one.advice
    assert bool(one.advice) == (state != "ok")


@pytest.mark.parametrize(
    ("card", "state", "advice"),
    [
        ({}, "ok", ""),
        ({"free": 40e9}, "note", "nvidia-smi lists them"),
        ({"bfloat16": False}, "note", "generator.dtype=float32"),
        ({"right": False}, "blocks", "faulty"),
    ],
)
def test_each_card_is_tried(card, state, advice):
    one = only(cards.memory(seen(cards=[CARD | card]), None))
    assert (one.name, one.state) == ("card 0", state)
    assert advice in one.advice


def test_a_card_without_kernels_of_this_build_blocks():
    wrong = seen(cuda="12.6", errors={"card 0": "RuntimeError: CUDA error: no kernel image is available"})
    one = only(cards.memory(wrong, None))
    assert (one.state, "no kernel image" in one.found) == ("blocks", True)


def test_backends_are_asked_of_machines_that_use_them():
    assert [one.state for one in cards.backends(seen())] == ["ok"]
    wrong = seen(gloo=None, errors={"gloo": "RuntimeError: unable to resolve"}, cards=[CARD], nccl=True)
    gloo, nccl = cards.backends(wrong)
    assert (gloo.state, "unable to resolve" in gloo.found, nccl.state) == ("note", True, "ok")
    assert "torch is built without it" in only(cards.backends({"cards": []})).found


def test_nvidia_smi_is_read(tmp_path):
    assert cards.read_smi(str(tmp_path / "none")) is None
    works = script(tmp_path / "works", "echo '580.65.06, NVIDIA H200'; echo '580.65.06, NVIDIA H200'")
    assert cards.read_smi(works) == Smi("580.65.06", ("NVIDIA H200", "NVIDIA H200"))
    fails = script(tmp_path / "fails", "echo 'Failed to initialize NVML'; exit 18")
    assert cards.read_smi(fails) == Smi(error="Failed to initialize NVML")


def test_torch_that_does_not_import_or_ends_its_process():
    broken = torch_probe.read("import json; print(json.dumps({'error': 'ImportError: libcudart.so'}))")
    assert cards.torch_finding(broken).state == "blocks"
    assert list(cards.driver(broken, None)) == list(cards.backends(broken)) == []
    killed = torch_probe.read("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert killed["error"].startswith("the process that imports torch ended with code -4: ")
    assert "took more than 0.2 s" in torch_probe.read("import time; time.sleep(9)", patience=0.2)["error"]


# -- machine ----------------------------------------------------------------------------------------------------------


def test_memory_counts_the_limit_of_a_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       62500000 kB\nMemAvailable:   31250000 kB\n")
    assert machine.read_memory(meminfo, tmp_path) == (32.0, 64.0)
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    assert machine.read_memory(meminfo, tmp_path) == (1.0, 4.0)
    assert [only(machine.memory((free, 64.0))).state for free in (1.0, 4.0, 32.0)] == ["blocks", "note", "ok"]
    assert list(machine.memory(machine.read_memory(tmp_path / "none", tmp_path / "none"))) == []


def test_room_on_a_disk(tmp_path, monkeypatch):
    states = [machine.room("disk", tmp_path, free, "move", blocks=True).state for free in (0.1, 10, 100)]
    assert states == ["blocks", "note", "ok"]
    assert machine.room("disk", tmp_path, 0.1, "move", blocks=False).state == "note"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "made"))
    runs, models = machine.disk(tmp_path)
    assert (runs.name, models.name) == ("disk of runs", "disk of models")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    assert [one.state for one in machine.disk(tmp_path)] == ["blocks", "note"]


def test_shared_memory_of_a_container_is_small():
    assert [machine.shared_memory(free).state for free in (None, 0.064, 8.0)] == ["ok", "note", "ok"]
    assert "64 MB free" in machine.shared_memory(0.064).found
    assert "--shm-size=8g" in machine.shared_memory(0.064).advice


def test_a_busy_machine_and_too_many_threads(tmp_path):
    busy = machine.load(Load(cores=4, load=8.0), seen())
    assert (busy.state, busy.found) == ("note", "4 cores, load 8.0, 2 threads of torch")
    assert "about 3.0 times as long" in busy.advice
    assert machine.load(Load(cores=4, load=0.1), seen(threads=1)).found.endswith("1 thread of torch")
    assert "OMP_NUM_THREADS=2" in machine.load(Load(cores=2, load=0.1), seen(threads=64)).advice
    assert machine.load(Load(cores=2, load=0.1), seen()).state == "ok"
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.read_load(tmp_path).cores == 0.5


# -- packages and hub -------------------------------------------------------------------------------------------------


def test_requirements_that_are_not_met_block():
    have = {"torch": "2.9.0", "numpy": "2.1"}
    found = list(packages.core(["torch>=2.10", "numpy", "peft>=0.21", "ray; extra == 'ray'"], have.get))
    assert [(one.name, one.state) for one in found] == [("torch", "blocks"), ("peft", "blocks")]
    assert found[0].found == "2.9.0 is installed, alignflow needs >=2.10"
    assert [one.advice for one in found] == ["pip install 'torch>=2.10'", "pip install 'peft>=0.21'"]
    assert only(packages.core(["numpy"], have.get)).state == "ok"


def test_kernels_are_for_cards_that_run_them():
    assert only(packages.attention(seen())).state == "ok"
    found = {one.name: one for one in packages.attention(seen(cards=[CARD]), {"xformers": 1}.get)}
    assert found["flash_attn"].advice == "pip install 'flash-attn'"
    assert found["flash_attn_interface"].found == "not for this card: it needs Hopper"
    assert found["xformers"].found == "installed: memory.attention=xformers"
    assert found["kernels"].advice.startswith("pip install 'kernels")


def test_every_extra_is_there_or_has_a_command():
    there = list(packages.extras(lambda module: module))
    missing = list(packages.extras(lambda module: None))
    assert {one.state for one in there} == {"ok"}
    assert {one.state for one in missing} == {"note"}
    said = " ".join(one.advice for one in missing)
    assert all(f"'{EXTRAS[module][1]}'" in said for module in EXTRAS if module not in packages.KERNELS)


def test_the_hub_answers_is_away_or_is_not_asked():
    assert network("").state == "ok"
    assert "HF_ENDPOINT" in network("https://hub: ConnectError: no").advice
    assert network("HF_HUB_OFFLINE is set").found == "offline mode: HF_HUB_OFFLINE is set"


# -- the command ------------------------------------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, **torch: Any) -> None:
    monkeypatch.setattr(torch_probe, "read", lambda: seen(**torch))
    monkeypatch.setattr(cards, "read_smi", lambda: None)
    monkeypatch.setattr(machine, "read_memory", lambda: (16.0, 32.0))


def test_the_command_ends_with_0_where_nothing_blocks(monkeypatch, tmp_path, capsys):
    stand_in(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--folder", str(tmp_path)])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "nothing blocks training on this machine"
    assert all(line.startswith(("ok ", "note ", " " * 28 + " -> ")) for line in lines[:-1])


def test_the_command_ends_with_1_where_something_blocks(monkeypatch, tmp_path, capsys):
    stand_in(monkeypatch, error="ImportError: no torch")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--folder", str(tmp_path), "--json"])
    assert ended.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ready"], found["blocks"]) == (False, ["torch"])
    assert {"name": "torch", "state": "blocks", "found": "ImportError: no torch",
            "advice": "install torch again: pip install --force-reinstall torch"} in found["findings"]  # fmt: skip


@pytest.mark.timeout(200)
def test_this_machine():
    found = {one.name: one for one in examine()}
    assert found["torch"].state == found["packages"].state == found["gloo"].state == "ok"
    assert found["hub"].found == "offline mode: HF_HUB_OFFLINE is set"
    assert all(one.advice for one in found.values() if one.state != "ok")
