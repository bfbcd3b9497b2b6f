"""One thread: on a shared machine two threads of torch beside any busy process run far slower than one."""

from __future__ import annotations

import functools
import gc
import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as the command line sets it: both give the same bits

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=float, default=0.1, help="share of the fuzz cases to run; 1 is all of them")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test with the mark ``few(n)``, all parameters but the first n that are not slow become slow."""
    seen = Counter()
    for item in items:
        few = item.get_closest_marker("few")
        if few and not item.get_closest_marker("slow"):
            name = item.nodeid.split("[")[0]
            seen[name] += 1
            if seen[name] > few.args[0]:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Garbage collection, which every run ends with, passes over what the tests' imports made: half a second a time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_command_line():
    """The command line is built once, as in the process of a user: it takes longer than most commands."""
    from typer import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "get_command", functools.cache(main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def declared():
    """Every reward that a test builds here has the gradient and the scope that its settings declare."""
    from rewards import RewardSettings, kinds
    from rewards.call import CallableReward

    def checked(build):
        def build_and_check(settings: RewardSettings, device="cpu"):
            built = build(settings, device)
            assert settings.gradient() in (None, built.differentiable), f"{settings!r} builds {built!r}"
            assert settings.compares() in (None, built.scope), f"{settings!r} builds {built!r}"
            return built

        return build_and_check

    with pytest.MonkeyPatch.context() as patch:
        for cls in (*kinds().values(), CallableReward):
            patch.setattr(cls, "build", checked(cls.build))
        yield


@pytest.fixture
def small_sources(monkeypatch):
    """The Qwen editors bring a source image to a megapixel; here to 64 x 64, by the function that both sides call."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        sides = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, f=sides: f(area / 256, ratio))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 without T5 on disk: its null tokens are folded."""
    from tiny import sd3_pipeline

    folder = tmp_path_factory.mktemp("model") / "sd3"
    sd3_pipeline(t5=False).save_pretrained(folder)
    return folder
