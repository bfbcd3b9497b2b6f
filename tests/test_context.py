"""Context parallelism: processes that share the tokens of a video learn what one process learns, and keep the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launched import launch
from pydantic import ValidationError
from test_adapters import CASES
from test_processes import alike
from test_sharding import assert_same_gradients
from tiny_run import final_tensors, policy_gap, settings

from align.checking import context_check
from align.checking.check import check_files
from align.checking.estimate import estimate
from align.config import registry
from align.training.accelerating import accelerator_of
from align.training.trainer import train
from alignflow.errors import ConfigError
from generators.load import adapter

RUN = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import Accelerator, PartialState
from align.training.trainer import train
from tiny_run import settings

folder, model, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
Accelerator.end_training = lambda self: None  # which ends the process group: there is another run after this one
for name, (recipe, sharded, resume, sections) in cases.items():
    os.environ["ACCELERATE_USE_FSDP"] = "true" if sharded else "false"
    if PartialState().is_main_process:
        (folder / name).mkdir(exist_ok=True)
    PartialState().wait_for_everyone()
    train(settings(folder / name, model, recipe, **sections), resume=resume)
torch.distributed.destroy_process_group()
"""
SECTIONS: dict[str, Any] = {
    "reward": {"kind": "tiny_run:mean_pixel"},
    "rollout": {"prompts": 3, "group": 2},
    "train": {"steps": 1, "max_grad_norm": 1e6, "chunk": 2},
    "evaluate": {"every": 1, "prompts": 3, "chunk": 2},
    "samples": {"every": 1, "count": 2},
}
Case = tuple[str, bool, bool, dict[str, Any]]
"""Recipe, whether the launch shards, whether the run resumes, sections of the config."""


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny_video

    folder = tmp_path_factory.mktemp("video") / "wan"
    tiny_video.wan().save_pretrained(folder)
    return folder


def sections(model: Path, context: int = 1, **changed: Any) -> dict[str, Any]:
    """A run on the tiny Wan, 18 tokens a video."""
    generator = {"kind": "wan", "path": str(model), "device": "cpu", "size": [32, 48], "frames": 9, "text_length": 40}
    tree = {**SECTIONS, "generator": generator, "parallel": {"context": context}}
    return tree | {name: {**tree.get(name, {}), **value} for name, value in changed.items()}


def alone(folder: Path, model: Path, recipe: str, tree: dict[str, Any], **how: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = settings(folder, model, recipe, **tree)
    train(config, **how)
    return config.run_dir


def several(count: int, folder: Path, model: Path, cases: dict[str, Case]) -> None:
    launch(count, folder, RUN, str(folder), str(model), json.dumps(cases), timeout=1500)


def rows(run: Path, *without: str) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without times."""
    left_out = ("seconds", "time", "images_per_second", *without)
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in left_out} for row in found]


def assert_same(one: Path, two: Path, *without: str) -> None:
    """Gradients, and all that the log says of samples, scores and losses."""
    assert_same_gradients(one, two)
    for a, b in zip(rows(one, *without), rows(two, *without), strict=True):
        assert alike(a, b), (a, b)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_processes_that_share_a_video_learn_as_one(video: Path, tmp_path: Path) -> None:
    several(2, tmp_path, video, {"two": ("nft", False, False, sections(video, 2))})
    assert_same(alone(tmp_path / "one", video, "nft", sections(video)), tmp_path / "two/run")


FULL = {"policy": {"kind": "full"}, "generator": {"dtype": "float32"}}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all weights": ("nft", FULL),
    "steps of a sampler": ("grpo", {}),
    "through the sampler": ("reward_backprop", {"train": {"gradient_checkpointing": True}}),
    "a second LoRA": ("re_dmd", {}),
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_each_kind_of_loss_has_the_gradient_of_one_process(video: Path, tmp_path: Path) -> None:
    cases = {name: (recipe, False, False, sections(video, 2, **more)) for name, (recipe, more) in KINDS.items()}
    several(2, tmp_path, video, cases)
    for name, (recipe, more) in KINDS.items():
        one = alone(tmp_path / f"{name} alone", video, recipe, sections(video, **more))
        assert_same(one, tmp_path / name / "run")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_score_missing_in_one_process_is_missing_in_its_group(video: Path, tmp_path: Path) -> None:
    missing = {"reward": {"kind": "tiny_run:missing_in_the_last"}, "rollout": {"prompts": 6}}
    several(2, tmp_path, video, {"two": ("reward_backprop", False, False, sections(video, 2, **missing))})
    one = alone(tmp_path / "one", video, "reward_backprop", sections(video, **missing))
    assert_same_gradients(one, tmp_path / "two/run")
    for run in (one, tmp_path / "two/run"):
        assert [row["missing"] for row in rows(run) if row["event"] == "train"] == [2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_what_stands_before_the_network_is_counted_once(tmp_path: Path) -> None:
    """A text encoder and the network of a tiny FLUX are trained together: the gradient of the first is no part."""
    import tiny_image

    tiny_image.flux().save_pretrained(tmp_path / "model")
    generator = {"kind": "flux", "path": str(tmp_path / "model"), "device": "cpu", "size": [64, 64], "text_length": 16}
    tree = {**SECTIONS, "generator": generator}
    recipe: Any = {"kind": "texforce", "trains": "both"}
    several(2, tmp_path, tmp_path, {"two": (recipe, False, False, {**tree, "parallel": {"context": 2}})})
    assert_same(alone(tmp_path / "one", tmp_path, recipe, tree), tmp_path / "two/run")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_four_processes_are_two_groups_of_two(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    cases = {
        "lora": ("nft", False, False, sections(video, 2)),
        "full": ("nft", False, False, sections(video, 2, **FULL)),
        "sharded": ("nft", True, False, sections(video, 2, **FULL)),
        "replicas": ("nft", True, False, sections(video, 2, **FULL, parallel={"context": 2, "replicas": 2})),
    }
    several(4, tmp_path, video, cases)
    lora = alone(tmp_path / "lora alone", video, "nft", sections(video))
    full = alone(tmp_path / "full alone", video, "nft", sections(video, **FULL))
    assert_same(lora, tmp_path / "lora/run")
    assert_same(full, tmp_path / "full/run")
    for name in ("sharded", "replicas"):  # which make calls on terms of weight 0 where a group has fewer samples
        assert_same(full, tmp_path / name / "run", "network_calls")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("policy", ["lora", "full"])
def test_a_run_goes_on_with_other_groups(policy: str, video: Path, tmp_path: Path) -> None:
    """From two processes that share each video to one that does not, and back."""

    def until(steps: int, context: int = 1) -> dict[str, Any]:
        more = {**(FULL if policy == "full" else {}), "train": {"steps": steps, "lr": 1e-3, "max_grad_norm": 1.0}}
        return sections(video, context, **more)

    alone(tmp_path / "whole", video, "nft", until(2))
    alone(tmp_path / "back", video, "nft", until(1))
    several(2, tmp_path, video, {"on": ("nft", False, False, until(1, 2)), "back": ("nft", False, True, until(2, 2))})
    alone(tmp_path / "on", video, "nft", until(2), resume=True)
    whole, on, back = (final_tensors(settings(tmp_path / name, video, **until(2))) for name in ("whole", "on", "back"))
    for role in ("policy", "ema", "behaviour"):
        assert policy_gap(whole, on, role) < 2e-4
        assert policy_gap(whole, back, role) < 2e-4
    calls = [rows(tmp_path / name / "run")[-1].get("network_calls") for name in ("whole", "on", "back")]
    assert len({*calls}) == 1


MODELS = """
import json, sys
from types import SimpleNamespace
import torch
from accelerate import Accelerator
from align.training.context import divide
from align.runs.processes import Processes
from test_adapters import CASES, generator_of

PROMPTS = ["a red cube", "a blue ball to the left of a cat"]


def passed(generator, x, t, cond, weight):
    x = x.clone().requires_grad_(True)
    out = generator.predict(x, t, cond)
    (out * weight).sum().backward()
    return out.detach(), x.grad


def gap(a, b):
    return float((a - b).norm() / b.norm())


processes, found = Processes(Accelerator(cpu=True), 2), {}
for case in CASES:
    if case.name not in sys.argv[1].split(","):
        continue
    generator = generator_of(case)
    source = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(2, *generator.latent_shape(), generator=source) for _ in range(2))
    cond = generator.encode(PROMPTS, {name: value[:2] for name, value in case.inputs.items()})
    parameters = {name: value for name, value in generator.backbone.named_parameters()}
    generator.backbone.requires_grad_(True)
    given = x, torch.tensor([0.2, 0.95]), cond, weight
    whole = passed(generator, *given)
    expected = {name: value.grad for name, value in parameters.items()}
    generator.backbone.zero_grad()
    nowhere = SimpleNamespace(kind=case.kind, path="nowhere")
    divide(SimpleNamespace(parallel=SimpleNamespace(context=2), generator=nowhere), generator, processes)
    shared = passed(generator, *given)
    processes.add_gradients(list(parameters.values()))
    largest = max(value.norm() for value in expected.values() if value is not None)
    gaps = [gap(one, two) for one, two in zip(shared, whole)]
    for name, value in parameters.items():
        if expected[name] is not None:
            gaps.append(float((value.grad - expected[name]).norm() / largest))
    found[case.name] = gaps
if processes.leads:
    print(json.dumps(found))
torch.distributed.destroy_process_group()
"""
EACH = (
    "wan21", "wan22-two-experts", "wan22-times-per-token", "wan22-ti2v", "wan21-i2v", "wan22-i2v-first-frame",
    "flux-dev", "flux-kontext", "flux-fill", "flux2", "flux2-klein", "flux2-edit", "flux2-klein-edit-cfg",
)  # fmt: skip
"""Adapter cases of the kinds that declare ``splits_tokens``."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_model_that_divides_its_tokens_computes_as_whole(tmp_path: Path) -> None:
    """Output, gradient at the input and gradients of all weights."""
    found = json.loads(launch(2, tmp_path, MODELS, ",".join(EACH), timeout=1500).splitlines()[-1])
    assert found.keys() == {*EACH}
    for name, gaps in found.items():
        assert len(gaps) > 20
        assert max(gaps) < 1e-5, name


def test_the_models_that_divide_their_tokens_are_tested() -> None:
    declared = {kind for kind in registry.generators() if registry.declared(kind, "splits_tokens")}
    assert declared == {case.kind for case in CASES if case.name in EACH}
    for kind in declared:
        assert adapter(kind).splits_tokens  # type: ignore[attr-defined]


def problems_of(tmp_path: Path, model: Path, **sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        settings(tmp_path, model, parallel={"context": 2}, **sections)
    return str(caught.value)


def test_a_model_without_a_plan_is_refused_with_the_list_of_those_that_have_one(model: Path, tmp_path: Path) -> None:
    said = problems_of(tmp_path, model)
    assert "parallel.context" in said
    assert "sd3 cannot divide a sample among processes; these can: flux, flux2" in said
    assert "wan, wan_i2v. Use 1" in said


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"memory": {"compile": "blocks"}}, "is not compiled: use none"),
        ({"memory": {"attention": "xformers"}}, "xformers cannot attend to tokens of other processes"),
        ({"memory": {"swap_blocks": 1}, "train": {"gradient_checkpointing": True}}, "are not swapped: use 0"),
    ],
)
def test_settings_that_keep_attention_in_one_process_are_refused(
    changed: Any, words: str, video: Path, tmp_path: Path
) -> None:
    tree = sections(video, 2)
    tree.pop("parallel")
    said = problems_of(
        tmp_path, video, **{**tree, **{name: {**tree.get(name, {}), **one} for name, one in changed.items()}}
    )
    assert words in said


def test_tokens_and_heads_that_do_not_divide_are_said_before_weights_are_loaded(video: Path, tmp_path: Path) -> None:
    """The tiny Wan has 2 heads, and 3 x 2 x 3 tokens of 9 frames; 5 frames are 2 x 3 x 3 in 48 x 48."""
    assert context_check.problems(settings(tmp_path, video, **sections(video, 2))) == []
    heads, tokens = context_check.problems(settings(tmp_path, video, **sections(video, 4)))
    assert (heads.path, tokens.path) == ("parallel.context", "generator.size")
    assert heads.message.endswith(
        f"heads of {video} cannot be divided among 4 processes: use 2, or another divisor of 2"
    )
    assert tokens.message.startswith("the 18 tokens of 32 x 48 x 9 frames cannot be divided among 4 processes")
    odd = settings(tmp_path, video, **sections(video, 2, evaluate={"size": [48, 48]}))
    (found,) = context_check.problems(odd)
    assert found.path == "evaluate.size"
    assert found.message.startswith("the 27 tokens of 48 x 48 x 9 frames")
    with pytest.raises(ConfigError, match="27 tokens"):
        check_files(odd)
    with pytest.raises(ConfigError, match="27 tokens"):
        accelerator_of(odd)


@pytest.mark.parametrize(("kind", "text"), [("wan", 512), ("flux", 128)])
def test_the_estimate_counts_the_tokens_of_one_process(kind: str, text: int, tmp_path: Path, model: Path) -> None:
    """Wan reads its whole text in every process; of FLUX's text each has a part."""
    known = {"wan": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "flux": "black-forest-labs/FLUX.1-dev"}
    size = {"kind": kind, "path": known[kind], "size": [512, 512]}
    found = []
    for ways in (1, 4):
        tree = {"reward": {"kind": "tiny_run:mean_pixel"}, "generator": size, "parallel": {"context": ways}}
        (item,) = estimate(settings(tmp_path, model, **tree)).phases["updating"][:1]
        found.append((item.bytes, int(item.how.split(", ")[-1].split()[0]), int(item.how.split()[-2])))
    (whole, image, words), (part, fewer, left) = found
    assert (words, left) == (512, text)
    assert fewer == image / 4
    assert 0.2 < part / whole < 0.3


@pytest.mark.parametrize(
    ("parallel", "sharded", "words"),
    [
        ({"context": 2}, False, "2 processes compute a sample together, and this launch has 1: start a multiple of 2"),
        ({"replicas": 2}, False, "this launch shards none: launch with FSDP2"),
        ({"replicas": 2}, True, "2 copies cannot be spread evenly over 1 processes: use a divisor of 1"),
    ],
)
def test_processes_that_do_not_divide_are_said_before_weights_are_loaded(
    parallel: Any, sharded: bool, words: str, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(sharded))
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match=words):
        accelerator_of(settings(tmp_path, video, **sections(video, parallel=parallel)))
