"""The command: exit codes, messages without tracebacks, and that light commands stay light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import written
from safetensors.torch import save_file

from align.config.load import merge, read_layers
from align.config.settings import Config
from alignflow.errors import CheckpointError, RunFolderError, TrainingError
from rewards.base import RewardError

run = written.run
ROOT = Path(__file__).parent.parent
SHIPPED = sorted(
    path for path in (ROOT / "configs").glob("**/*.yaml") if path.parent.name != "shared" and path.name != "base.yaml"
)

PAIRS = """\
generator: {path: pipeline}
prompts: {train: prompts.txt, heldout: shapes:heldout}
rollout: {kind: pairs, file: pairs.jsonl, prompts: 4}
recipe: {kind: nft, timesteps: 6}
train: {chunk: 20}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a config and the files it names."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(PAIRS)
    Path("prompts.txt").write_text("a red circle\n")
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "a.png", "rejected": "b.png"}\n')
    for name in ("a.png", "b.png"):
        Path(name).touch()
    Path("pipeline").mkdir()
    Path("pipeline/model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    return tmp_path


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


# -- light commands ---------------------------------------------------------------------------------------------------

LIGHT = {
    "help": ["--help"],
    "train help": ["train", "--help"],
    "search help": ["search", "--help"],
    "export help": ["export", "--help"],
    "export of nothing": ["export", "nowhere", "--to", "merged"],
    "recipes": ["recipes"],
    "check": ["check", "run.yaml"],
    "check online": ["check", "run.yaml", "rollout.kind=online", "reward={kind: shapes}"],
    "check grpo": [
        *("check", "run.yaml", "rollout.kind=online", "reward={kind: shapes}", "recipe.kind=grpo"),
        "rollout.sampler.kind=flow_sde",
    ],
    "env": ["env"],
    "schema": ["schema"],
    "report": ["report", "nowhere"],
    "compare": ["compare", "nowhere", "elsewhere"],
    "sweep help": ["sweep", "--help"],
}


HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "scipy", "pandas", "pyarrow", "datasets"}


@pytest.mark.parametrize("arguments", LIGHT.values(), ids=LIGHT.keys())
def test_light_commands_import_little(folder, arguments):
    """What a command costs before it does anything is what it imports; ``benchmarks/start.py`` has the seconds."""
    code = (
        "import sys\nfrom align.cli.app import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    print('exit', end.code)\n"
        "print('\\nmodules', *sys.modules)"
    )
    done = fresh(code)
    assert done.stderr == "" or "error:" in done.stderr, done.stderr
    modules = set(done.stdout.rsplit("\nmodules ", 1)[1].split())
    assert "align.cli.app" in modules
    assert not HEAVY & modules
    assert len(modules) < 700, f"{len(modules)} modules"


def test_recipes_lists_everything_with_a_line(run):
    code, out, _ = run("recipes", "--json")
    rooms = json.loads(out)
    assert code == 0
    assert set(rooms) >= {"generators", "recipes", "rewards", "samplers"}
    assert "sd3" in rooms["generators"]
    assert {"nft", "grpo"} <= set(rooms["recipes"])
    for entries in rooms.values():
        assert all(entries.values()), entries
    listed = run("recipes")[1]
    assert all(kind in listed for entries in rooms.values() for kind in entries)


def test_version_env_and_schema(run):
    assert run("--version")[1].startswith("alignflow ")
    assert json.loads(run("env", "--json")[1])["python"] == sys.version.split()[0]
    assert "train" in json.loads(run("schema")[1])["properties"]


@pytest.mark.parametrize(
    "command",
    [
        *("train", "check", "sample", "score", "pairs", "evaluate", "export", "report", "compare", "sweep", "recipes"),
        *("env", "schema"),
    ],
)
def test_every_command_shows_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: alignflow {command}" in out


def test_no_arguments_shows_help(run):
    assert "Usage" in "".join(run()[1:])


# -- check ------------------------------------------------------------------------------------------------------------


def test_check_tells_the_batch_in_words(folder, run):
    code, out, err = run("check", "run.yaml")
    assert (code, err) == (0, "")
    assert (
        "4 rows x 2 samples = 8 samples per rollout; 6 x each = 48 terms; 1 optimizer step per rollout, in 3 chunks of "
        "20 terms on one process; 100 rollouts = 100 optimizer steps in all"
    ) in out
    assert "run.yaml is ready to run" in out


def test_check_geometry_online_over_processes(folder, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    online = ["rollout={kind: online, prompts: 16, group: 12, sampler: {steps: 5, guidance: 2}}"]
    code, out, err = run("check", "run.yaml", *online, "reward={kind: shapes}", "train.chunk=192", "train.updates=2")
    assert (code, err) == (0, "")
    assert "16 prompts x 12 samples = 192 samples per rollout; 6 x each = 1152 terms" in out
    assert "2 optimizer steps per rollout, in 2 chunks of 192 terms on 2 processes" in out
    assert "1920 network calls per rollout" in out


def test_check_reads_pairs(folder, run):
    Path("b.png").unlink()
    code, _, err = run("check", "run.yaml")
    assert code == 2
    assert "rollout.file: pairs.jsonl line 1: no rejected b.png" in err
    Path("b.png").touch()
    code, _, err = run("check", "run.yaml", "generator.kind=flux_kontext")
    assert code == 2
    assert "rollout.file: pairs.jsonl line 1: generator flux_kontext needs 'image' with every prompt" in err
    assert "prompts.train" not in err


def test_check_finds_missing_files(folder, run):
    for name in ("prompts.txt", "pairs.jsonl", "pipeline/model_index.json"):
        Path(name).unlink()
    code, _, err = run("check", "run.yaml", "prompts.heldout=shapes:other", "trackers=[clearml]")
    assert code == 2
    for path in ("prompts.train", "prompts.heldout", "rollout.file", "generator.path", "trackers"):
        assert f"  {path}: " in err
    assert "5 problems" in err


@pytest.mark.parametrize("path", ["gone/away/now", "./gone", "gone"])
def test_check_refuses_a_generator_that_is_nowhere(folder, run, path):
    code, _, err = run("check", "run.yaml", f"generator.path={path}")
    assert code == 2
    assert "generator.path: no folder" in err


def test_check_leaves_hub_ids_to_the_hub(folder, run):
    assert run("check", "run.yaml", "generator.path=owner/model")[0] == 0


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configs_pass_check(path, run, tmp_path, monkeypatch):
    """From the repository's root, where their prompts are; tables of pairs and samples are the user's."""
    monkeypatch.chdir(ROOT)
    for name in ("a", "b"):
        (tmp_path / f"{name}.webp").touch()
    table = tmp_path / "table.jsonl"
    media = {"chosen": "a.webp", "rejected": "b.webp", "sample": "a.webp", "image": "a.webp", "mask": "b.webp"}
    table.write_text(json.dumps({"prompt": "a", **media}) + "\n")
    made = {name: tmp_path / name for name in ("references.jsonl", "newton.jsonl")}
    for file in made.values():
        file.write_text(json.dumps({"prompt": "a", "image": "a.webp", "reference": "a.webp"}) + "\n")
    own = {"rollout.file": table, "data.train": table, "data.heldout": table}
    save_file(
        {"transformer.a.lora_A.weight": torch.ones(1, 2), "transformer.a.lora_B.weight": torch.ones(2, 1)},
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    keys = {
        f"{part}.{name}"
        for layer in read_layers(path)
        for part in ("rollout", "data")
        for name, value in layer.data.get(part, {}).items()
        if value is not None
    }
    theirs = [f"{key}={file}" for key, file in own.items() if key in keys]
    rewards = {
        "prompt_template.py": f"evaluate.rewards.video.template={table}",
        '"kind": "adversarial", "references": "references"': f"reward.parts.likeness.reward.references={tmp_path}",
        '"references": "references.jsonl"': f"reward.references={table}",
        '"train": "references.jsonl"': f"prompts.train={made['references.jsonl']}",
        '"heldout": "references.jsonl"': f"prompts.heldout={made['references.jsonl']}",
        '"train": "newton.jsonl"': f"prompts.train={made['newton.jsonl']}",
        '"heldout": "newton.jsonl"': f"prompts.heldout={made['newton.jsonl']}",
        '"kind": "mass_conservation", "references": "references"': f"reward.parts.mass.reward.references={tmp_path}",
        '"newton": {"kind"': f"evaluate.rewards.newton.parts.mass.reward.references={tmp_path}",
        '"kind": "trained"': f"reward.path={tmp_path}",
        '/lora"': "policy.init=null",
        '"writer": {"model": "shapes"': f"backbone.thought.writer.lora={tmp_path}",
    }
    merged: dict[str, Any] = {}
    for layer in read_layers(path):
        merged = merge(merged, layer.data, [Config])
    texts = json.dumps(merged)
    theirs += [f"policy.experts.{name}.lora={tmp_path}" for name in merged.get("policy", {}).get("experts", {})]
    if merged.get("policy", {}).get("kind") == "users":
        save_file({"ann": torch.ones(2, 3)}, tmp_path / "users.safetensors")
        theirs += [f"policy.embeddings={tmp_path / 'users.safetensors'}", "policy.user=ann"]
    theirs += [f"judge.lora={tmp_path}"] if merged.get("judge", {}).get("lora") else []
    theirs += [override for words, override in rewards.items() if words in texts]
    code, out, err = run("check", str(path), *theirs, "--import")
    assert code == 0, err
    assert "ready to run" in out


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "gone.yaml"],
        ["check", "."],
        ["check", "run.yaml", "train.lr=fast"],
        ["check", "run.yaml", "--nonsense"],
        ["check"],
        ["chekc"],
        ["train", "run.yaml", "train.stepz=1"],
        ["train", "run.yaml", "train.steps"],
        ["sample", "."],
        ["sample", "run.yaml", "--count", "0"],
        ["evaluate", "gone"],
        ["evaluate", "run.yaml", "evaluate.promts=1"],
        ["report", "gone"],
        ["score", "a.png", "--prompt", "a red circle", "--reward", "shapess"],
        ["score", "a.png", "--prompt", "a red circle", "--reward", "gone.yaml"],
        ["score", "a.png", "--prompts-file", "gone.txt", "--reward", "shapes"],
        ["score", "a.png", "--prompt", "a red circle"],
    ],
    ids=" ".join,
)
def test_user_mistakes_exit_2_without_traceback(folder, run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "error" in err.lower() or "Usage" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (RunFolderError("run folder x exists"), 2),
        (CheckpointError("checkpoint x is incomplete"), 1),
        (TrainingError("the loss is nan"), 1),
        (RewardError("no weights"), 1),
        (KeyError("a fault"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_commands(run, monkeypatch, raised, code):
    def fail(*_args, **_kwargs):
        raise raised

    monkeypatch.setattr("align.config.registry.summary", fail)
    found, _, err = run("recipes")
    assert found == code
    known = not isinstance(raised, KeyError)
    assert ("Traceback" not in err) == known
    assert f"error: {raised if known else 'this is a bug'}" in err
    assert "Traceback" in run("recipes", "--debug")[2]


def test_generator_errors_and_out_of_memory(run, monkeypatch):
    import torch

    from generators.base import GeneratorError

    for raised, says in (
        (GeneratorError("no such pipeline"), "error: no such pipeline"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "error: out of memory: CUDA out of memory. Tried\n"),
    ):

        def fail(raised=raised):
            raise raised

        monkeypatch.setattr("align.config.registry.summary", fail)
        code, _, err = run("recipes")
        assert code == 1
        assert says in err
        assert "Traceback" not in err


# -- train ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """Replace training by a function that notes how it was called, and may raise."""
    import align.training.trainer

    calls: list = []

    def train(config, *, resume, overwrite):
        calls.append((config, resume, overwrite))
        if config.seed == 13:
            raise KeyboardInterrupt
        return {"gold_before": 0.25, "gold_after": 0.5, "status": "done", "reward_after": None}

    monkeypatch.setattr(align.training.trainer, "train", train)
    return calls


def test_train_passes_the_config_and_prints_the_summary(folder, run, trained):
    code, out, _ = run("train", "run.yaml", "train.lr=1e-4", "--overwrite", "--out", "here: there")
    config, resume, overwrite = trained[0]
    assert (code, resume, overwrite) == (0, False, True)
    assert (config.train.lr, config.out) == (1e-4, "here: there")
    assert "gold_after   0.5" in out
    assert "here: there" in out


def test_train_says_nothing_on_other_processes(folder, run, trained, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("train", "run.yaml")[1] == ""


def test_interrupted_training_says_how_to_go_on(folder, run, trained):
    code, _, err = run("train", "run.yaml", "seed=13", "train.betas=[0.9, 0.95]", "--out", "x")
    assert code == 130
    assert "alignflow train run.yaml seed=13 'train.betas=[0.9, 0.95]' --out x --resume" in err
    assert run("train", "run.yaml", "--resume")[0] == 0
    assert trained[-1][1] is True


# -- sample and evaluate ----------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(monkeypatch):
    """Replace sampling and evaluation by functions that note how they were called."""
    import align.evaluation.evaluate

    calls: list = []

    def sample_to_folder(config, out, **options):
        calls.append((config, out, options))
        return out

    def evaluate_run(config, **options):
        calls.append((config, options))
        scores = {"scores": {"gold": 0.25}, "stderr": {"gold": float("nan")}, "missing": {"gold": 1}}
        return {**scores, "prompts": 4, "seconds": 1.5}

    monkeypatch.setattr(align.evaluation.evaluate, "sample_to_folder", sample_to_folder)
    monkeypatch.setattr(align.evaluation.evaluate, "evaluate_run", evaluate_run)
    return calls


@pytest.fixture
def run_folder(folder):
    """A run folder as far as these commands look."""
    (folder / "done" / "lora").mkdir(parents=True)
    Path("done/config.yaml").write_text("name: done\n" + PAIRS)
    return Path("done")


def test_sample_from_a_config_or_a_run(run, run_folder, evaluated):
    words = ["--prompt", "a", "--prompt", "b", "--count", "2", "--seed", "5", "--out", "here"]
    assert run("sample", "run.yaml", *words, "evaluate.sampler.steps=3")[:2] == (0, "here\n")
    config, out, options = evaluated[-1]
    assert (config.evaluate.sampler.steps, out) == (3, Path("here"))
    assert [prompt.text for prompt in options.pop("prompts")] == ["a", "b"]
    assert options == {"count": 2, "seed": 5, "policy": None}
    assert run("sample", str(run_folder), "--prompts-file", "prompts.txt")[0] == 0
    options = evaluated[-1][2]
    assert [prompt.text for prompt in options.pop("prompts")] == ["a red circle"]
    assert options == {"count": 1, "seed": 0, "policy": run_folder / "lora"}


def test_sample_from_a_run_with_nothing_trained_does_not_draw_the_base_silently(run, run_folder, evaluated):
    (run_folder / "lora").rmdir()
    code, _, err = run("sample", str(run_folder))
    assert code == 1
    assert "done has nothing trained yet" in err
    assert not evaluated


def test_evaluate_prints_a_table_or_json(run, run_folder, evaluated):
    code, out, _ = run("evaluate", str(run_folder), "--checkpoint", "step", "evaluate.prompts=4")
    assert code == 0
    assert evaluated[-1][0].evaluate.prompts == 4
    assert evaluated[-1][1] == {"run_dir": run_folder, "checkpoint": Path("step"), "lora": None}
    assert out.splitlines()[1].split() == ["gold", "0.25", "nan", "1"]
    assert json.loads(run("evaluate", "run.yaml", "--json")[1])["stderr"] == {"gold": None}


def test_openmp_threads_wait_passively_unless_the_user_says_otherwise() -> None:
    """OpenMP reads its variable when torch is imported, so it must be set before."""
    code = """
import atexit, os, sys
from align.cli.app import main
print("torch" in sys.modules)
atexit.register(lambda: print(os.environ["OMP_WAIT_POLICY"]))
main(["schema"])
"""
    for given, expected in ((None, "passive"), ("active", "active")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        environment |= {"PYTHONPATH": str(ROOT)} | ({"OMP_WAIT_POLICY": given} if given else {})
        said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        lines = said.stdout.splitlines()
        assert (lines[0], lines[-1]) == ("False", expected)
