"""A checkpoint is whole and of this run, or it is refused before anything is changed; the best one stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import final_tensors, policy_gap, settings

from align.cli.app import main
from align.config.load import load_config
from align.config.sections import Train
from align.config.settings import Config
from align.policy.roles import Roles
from align.runs import checkpoint, manifest, owned
from align.runs.best import Best, best_of, checkpoint_of
from align.training.lr import lr_at, new_course
from align.training.trainer import train
from alignflow.errors import CheckpointError, ConfigError, RunFolderError


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of two steps."""
    config = settings(tmp_path_factory.mktemp("whole"), model, train={"steps": 2})
    train(config)
    return config


def copied(run: Config, folder: Path) -> Path:
    shutil.copytree(run.run_dir, folder / "run")
    shutil.copy(run.run_dir.parent / "prompts.txt", folder / "prompts.txt")
    return folder / "run"


class Written:
    """An optimizer whose state is a number."""

    updates = 0

    def __init__(self) -> None:
        self.state = {"optimizer": {"n": 1}}
        self.counters: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = {"optimizer": dict(state["optimizer"])}

    def load_counters(self, counters: dict[str, int]) -> None:
        self.counters = counters


def written(folder: Path, step: int = 1) -> tuple[Path, Roles]:
    """A small checkpoint and the roles that it is of."""
    roles = Roles([("w", torch.nn.Parameter(torch.ones(3)))], ["ema"])
    counters = {"step": step, "seconds": 1.25, "learners": {"policy": {"updates": step, "skipped": 0}}}
    optimizer: Any = Written()
    state = {"policy": roles}, {"policy": optimizer}
    path = checkpoint.save(folder, step, *state, counters, identity={"run": "a", "settings": {"seed": 1}})
    return path, roles


def test_every_flipped_bit_of_the_manifest_is_refused(tmp_path: Path) -> None:
    path, roles = written(tmp_path)
    file = path / "manifest.json"
    whole = file.read_bytes()
    assert checkpoint.load(path, {"policy": roles})["learners"]["policy"]["updates"] == 1
    for place in range(len(whole) * 8):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoint.verify(path)
    file.write_bytes(whole)
    checkpoint.verify(path)


@pytest.mark.parametrize("text", [
    b"", b"[1]", b"\xff", b"null", b"{}", b"[" * 100_000, b'{"format": 2}', b'{"format": [2]}', b'{"format": 1}',
    b'{"format": 1, "step": 1, "files": {}, "counters": {}, "roles": {}}', b'{"format": ' + b"9" * 5000 + b"}",
])  # fmt: skip
def test_no_manifest_is_a_traceback(text: bytes, tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.verify(path)


def test_a_manifest_of_before_is_read(tmp_path: Path) -> None:
    path, roles = written(tmp_path)
    found = manifest.read(path)
    tensors = load_file(path / "roles.safetensors")
    save_file({name.removeprefix("policy/"): value for name, value in tensors.items()}, path / "roles.safetensors")
    counters = {**found["counters"]}
    old = {**found, "format": 1, "counters": counters.pop("learners")["policy"] | counters}
    old |= {"roles": old["roles"]["policy"], "files": {name: manifest.digest(path / name) for name in found["files"]}}
    del old["identity"]
    (path / "manifest.json").write_text(json.dumps(old))
    assert checkpoint.load(path, {"policy": roles}, identity={"run": "b", "settings": {"seed": 2}})["step"] == 1


def as_before_learners(path: Path) -> None:
    """Rewrite a checkpoint as it was written before a run could have several learners."""
    names = {"behaviour": "old", "anchor": "old", "reference": "ref"}
    found, tensors = manifest.read(path), {}
    for key, value in load_file(path / "roles.safetensors").items():
        role, _, name = key.removeprefix("policy/").partition("/")
        tensors[f"{names.get(role, role)}/{name}"] = value
    save_file(tensors, path / "roles.safetensors")
    state = torch.load(path / "optimizer.pt", weights_only=True)
    torch.save({**state.pop("learners")["policy"], **state}, path / "optimizer.pt")
    counters = dict(found["counters"])
    about = {"step": found["step"], "counters": counters.pop("learners")["policy"] | counters}
    versions = {names.get(role, role): version for role, version in found["roles"]["policy"].items()}
    about |= {"roles": versions, "identity": found["identity"]}
    (path / "manifest.json").unlink()
    manifest.write(path, about, version=2)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "recipe", [{"kind": "nft", "timesteps": 2}, {"kind": "flow_dpo", "timesteps": 2, "reference_every": 3}]
)
def test_a_run_of_before_learners_is_resumed_to_the_bit(recipe: dict[str, Any], model: Path, tmp_path: Path) -> None:
    runs = []
    for name, steps in (("whole", 2), ("before", 1)):
        (tmp_path / name).mkdir()
        full = {"policy": {"kind": "full"}, "train": {"steps": steps, "lr": 1e-3}, "prompts": {"heldout": None}}
        runs.append(settings(tmp_path / name, model, recipe, **full))
        train(runs[-1])
    path = checkpoint.latest(runs[1].run_dir / "checkpoints")
    assert path is not None
    as_before_learners(path)
    resumed = settings(tmp_path / "before", model, recipe, **{**full, "train": {"steps": 2, "lr": 1e-3}})
    train(resumed, resume=True)
    whole, again = final_tensors(runs[0]), final_tensors(resumed)
    assert {name.partition("/")[0] for name in whole} >= {
        "policy",
        "anchor" if "reference_every" in recipe else "behaviour",
    }
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    "state", [[], {}, {"optimizer": {}}, {"optimizer": {}, "rng": {}}, {"optimizer": 1, "rng": 2}, b"junk"]
)
def test_nothing_is_changed_by_a_checkpoint_that_does_not_fit(state: Any, tmp_path: Path) -> None:
    path, roles = written(tmp_path)
    with torch.no_grad():
        roles.parameters[0][1].zero_()
    (path / "optimizer.pt").write_bytes(b"junk") if isinstance(state, bytes) else torch.save(
        state, path / "optimizer.pt"
    )
    found = manifest.read(path)
    (path / "manifest.json").unlink()
    manifest.write(path, {key: found[key] for key in ("step", "counters", "roles", "identity")})
    optimizer: Any = Written()
    before = torch.get_rng_state()
    with pytest.raises(CheckpointError):
        checkpoint.load(path, {"policy": roles}, {"policy": optimizer})
    assert roles.parameters[0][1].tolist() == [0, 0, 0]
    assert optimizer.state == Written().state
    assert torch.equal(torch.get_rng_state(), before)


def test_an_intact_checkpoint_before_a_damaged_one_is_named(tmp_path: Path) -> None:
    paths = [written(tmp_path, step)[0] for step in (1, 2, 3)]
    for path in paths[1:]:
        (path / "roles.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"roles\.safetensors is damaged.*delete step-000003.*step-000001"):
        checkpoint.verify(paths[2])
    shutil.rmtree(paths[0])
    with pytest.raises(CheckpointError, match="no earlier checkpoint is intact"):
        checkpoint.verify(paths[2])


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"recipe": {"kind": "flow_rwr", "timesteps": 2}}, {"train": {"steps": 2, "lr": 0.5}}]
)
def test_a_checkpoint_of_another_run_is_refused(
    other: dict[str, Any], run: Config, model: Path, tmp_path: Path
) -> None:
    mine = copied(run, tmp_path)
    (tmp_path / "other").mkdir()
    theirs = settings(tmp_path / "other", model, **{"train": {"steps": 2}, **other})
    train(theirs)
    shutil.rmtree(mine / "checkpoints" / "step-000002")
    shutil.copytree(theirs.run_dir / "checkpoints" / "step-000002", mine / "checkpoints" / "step-000002")
    with pytest.raises(CheckpointError, match=r"another run.*delete step-000002.*step-000001"):
        train(settings(tmp_path, model, train={"steps": 3}), resume=True)


def test_other_prompts_under_the_same_name_are_refused_and_the_same_elsewhere_are_not(
    run: Config, model: Path, tmp_path: Path
) -> None:
    copied(run, tmp_path)
    config = settings(tmp_path, model, train={"steps": 3})
    (tmp_path / "prompts.txt").write_text("something else\nand more\n")
    with pytest.raises(CheckpointError, match="made with other prompts"):
        train(config, resume=True)
    settings(tmp_path, model)  # writes the prompts again
    (tmp_path / "prompts.txt").rename(tmp_path / "moved.txt")
    moved = config.prompts.model_copy(
        update={"train": str(tmp_path / "moved.txt"), "heldout": str(tmp_path / "moved.txt")}
    )
    assert train(config.model_copy(update={"prompts": moved}), resume=True)["steps"] == 3


def test_what_a_resumed_run_changes_is_said_and_kept(
    run: Config, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = copied(run, tmp_path)
    part = settings(tmp_path, model, train={"steps": 3, "lr": 0.002, "schedule": "cosine"}, evaluate={"every": 0})
    train(part, resume=True)
    said = capsys.readouterr()
    assert "train.lr 0.01 -> 0.002" in said.out + said.err
    assert "deviates from the planned curve: the next update has 0.0005 instead of 0.01" in said.out + said.err
    rows = [json.loads(line) for line in (mine / "metrics.jsonl").read_text().splitlines()]
    (changed,) = [row for row in rows if row["event"] == "resumed"]
    assert changed["step"] == 2
    assert changed["changed"]["train.lr"] == [0.01, 0.002]
    assert [row["lr"] for row in rows if row["event"] == "train"] == pytest.approx([0.01, 0.01, 0.0005])
    assert load_config(mine / "config.yaml").train.lr == 0.002
    with pytest.raises(RunFolderError, match=r"seed: 0 then, 1 now \(all samples follow from it\)"):
        train(settings(tmp_path, model, seed=1), resume=True)


def test_a_longer_cosine_says_how_it_goes_on() -> None:
    before, now = (Train(steps=steps, lr=1.0, schedule="cosine") for steps in (4, 8))
    assert lr_at(before, 4) == lr_at(before, 9) == 0.0
    assert "has 0.5 instead of 0," in str(new_course(before, now, 4))
    assert new_course(before, before, 2) is None
    assert new_course(Train(steps=4), Train(steps=8), 4) is None


def test_the_best_checkpoint_stays_beside_the_newest(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny_run

    scores = iter([0.0, 0.9, 0.1, 0.5, 0.3, 0.2])  # of a grey sample, then of the base, which does not count
    monkeypatch.setattr(tiny_run, "brightness", lambda media, prompts: torch.full((len(media),), next(scores)))
    config = settings(
        tmp_path, model, train={"steps": 4},
        evaluate={"every": 1, "rewards": {"gold": {"kind": "tiny_run:brightness"}}},
        checkpoint={"every": 0, "keep": 1, "best": "gold"},
    )  # fmt: skip
    train(config)
    folder = config.run_dir / "checkpoints"
    assert checkpoint.list_steps(folder) == [2, 4]
    assert best_of(config.run_dir) == checkpoint_of(config.run_dir, "best") == folder / "step-000002"
    with pytest.raises(ConfigError, match=r"checkpoint\.best .*no score of held-out prompts has this name"):
        load_config(config.run_dir / "config.yaml", ["checkpoint.best=silver"])


def test_commands_take_a_checkpoint_by_name(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.run_dir / "checkpoints"
    for name in ("1", str(folder / "step-000001")):
        assert checkpoint_of(run.run_dir, name) == folder / "step-000001"
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7; there are 1, 2"):
        checkpoint_of(run.run_dir, "7")
    with pytest.raises(ConfigError, match=r"keeps no best checkpoint: set checkpoint\.best"):
        checkpoint_of(run.run_dir, "best")

    def command(*words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(words)
        said = capsys.readouterr()
        return said.out if not caught.value.code else said.err

    assert json.loads(command("export", str(run.run_dir), "--checkpoint", "1", "--out", f"{tmp_path}/e", "--json"))[
        "from"
    ] == str(folder / "step-000001")
    images = []
    for step in ("1", "2"):
        command("sample", str(run.run_dir), "--checkpoint", step, "--prompt", "a", "--out", f"{tmp_path}/{step}")
        images.append((tmp_path / step / "000.png").read_bytes())
    assert images[0] != images[1]
    assert "goes with neither a config nor --lora" in command(
        "sample", str(run.run_dir / "config.yaml"), "--checkpoint", "1"
    )


def test_what_counts_as_best() -> None:
    best = Best("gold")
    seen = [best.see(step, {"gold": score}) for step, score in enumerate((9.0, 0.1, None, float("nan"), 0.3, 0.3))]
    assert seen == [False, True, False, False, True, False]
    again, other = Best("gold"), Best("silver")
    again.load(best.state())
    other.load(best.state())
    assert (again.step, again.score, other.step) == (4, 0.3, None)
    assert not Best(None).see(1, {"gold": 1.0})


def test_a_finished_run_and_a_resumed_one_have_equal_files(run: Config, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = settings(tmp_path / "a", model, train={"steps": 1})
    train(first)
    train(settings(tmp_path / "a", model, train={"steps": 2}), resume=True)
    lora = "lora/pytorch_lora_weights.safetensors"
    assert (first.run_dir / lora).read_bytes() == (run.run_dir / lora).read_bytes()
    assert policy_gap(final_tensors(first), final_tensors(run)) == 0


def test_all_that_a_run_writes_is_known_as_its_own(run: Config) -> None:
    """What --overwrite may remove: a file that is not in the list is taken for a stranger's."""
    assert owned.entries(run.run_dir) <= set(owned.NAMES[owned.TRAINING])
    owned.check_removable(run.run_dir, owned.TRAINING)
