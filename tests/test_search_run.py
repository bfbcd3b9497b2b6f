"""``alignflow search``: the run folder, interrupts, results as data, the page, with a tiny SD3."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_video
import torch
import written
from tiny_run import experts_beside

from align.config import registry
from align.data.inputs import encode, read_sample
from align.data.media import read_media
from align.data.prompts import PAIR, Prompt, read_stored
from align.report.search import write_search_report
from align.search import run as runs
from align.search.export import write_as
from align.search.settings import SearchConfig, load_search
from alignflow.errors import ConfigError, DataError, RunFolderError

run = written.run

CONFIG = """\
generator: {{path: {model}, device: cpu, size: [32, 32]}}
prompts: {{source: prompts.txt, limit: null}}
reward: {{kind: "tiny_run:redness"}}
gold: {{bright: {{kind: "tiny_run:brightness"}}}}
search: {{kind: best_of_n, sampler: {{steps: 2}}}}
budget: {{network_calls: 6}}
batch: 1
"""


@pytest.fixture
def folder(model, tmp_path, monkeypatch) -> Path:
    """A working directory with a config and three prompts."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red cube\na blue ball\na cat\n")
    Path("search.yaml").write_text(CONFIG.format(model=model))
    return tmp_path


def found(folder: Path) -> list[dict]:
    rows = json.loads((folder / "results.json").read_text())["found"]
    for row in rows:
        row.pop("busy")
        row["spent"].pop("seconds")
        for point in row["curve"]:
            point.pop("seconds")
    return rows


def test_search_writes_what_it_found_and_runs_again_to_the_same(folder, run):
    code, out, err = run("search", "search.yaml", "--out", "one", "--as", "pairs", "pairs")
    assert code == 0, err
    assert "network calls a prompt" in out
    assert re.search(r"^[2-9] pairs in pairs$", out, re.MULTILINE)
    one = Path("one")
    summary = json.loads((one / "results.json").read_text())
    assert (summary["status"], summary["prompts"], summary["method"]) == ("finished", 3, "best_of_n")
    assert summary["reward"]["best"] >= summary["reward"]["plain"]
    assert summary["spent"]["network_calls"] == 6
    assert set(summary["gold"]["bright"]) == {"plain", "best", "rise", "stderr"}
    for number in range(3):
        row = json.loads((one / f"candidates/{number:04d}/found.json").read_text())
        assert len(row["rewards"]) == 3
        assert row["rewards"][0] == pytest.approx(row["plain"], abs=1e-6)  # the first sample is the plain one
        assert all((one / f"candidates/{number:04d}" / kept["file"]).is_file() for kept in row["kept"])
    assert (one / "samples/best/grid.png").is_file()
    pairs = read_stored("pairs/pairs.jsonl", PAIR)
    assert [pair.text for pair in pairs] == ["a red cube", "a blue ball", "a cat"]
    code, _, err = run("search", "one/config.yaml", "--out", "two")
    assert code == 0, err
    assert found(one) == found(Path("two"))
    code, _, err = run("search", "search.yaml", "--out", "one")
    assert code == 2
    assert "add --resume to continue" in err


def test_interrupt_keeps_prompts_and_resume_goes_on_to_the_same(folder, run, monkeypatch):
    assert run("search", "search.yaml", "--out", "whole")[0] == 0
    real, calls = runs.search_batch, []

    def stopped(*arguments):
        real(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "search_batch", stopped)
    code, _, err = run("search", "search.yaml", "--out", "part")
    assert code == 130
    assert "alignflow search search.yaml --out part --resume" in err
    assert len(list(Path("part/candidates").glob("*/found.json"))) == 2
    (Path("part/candidates") / ".0002.alignflow-0123456789ab").mkdir()
    (Path("part/candidates") / ".DS_Store").write_bytes(b"theirs")
    assert run("search", "search.yaml", "--out", "part", "--resume")[0] == 0
    assert len(calls) == 3
    assert found(Path("part")) == found(Path("whole"))
    assert not list(Path("part/candidates").glob(".0*"))
    assert Path("part/candidates/.DS_Store").is_file()  # no litter of ours
    code, _, err = run("search", "search.yaml", "budget.network_calls=8", "--out", "part", "--resume")
    assert code == 2
    assert "budget.network_calls: 6 then, 8 now" in err


def test_results_become_data_or_say_why_not(folder, run):
    assert run("search", "search.yaml", "--out", "one", "prompts.limit=2")[0] == 0
    code, out, _ = run("search", "one", "--as", "finetune", "set")
    assert (code, out.split("\n")[0]) == (0, "2 samples in set")
    lines = [json.loads(line) for line in Path("set/samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a red cube", "a blue ball"]
    assert all((Path("set") / line["sample"]).is_file() for line in lines)
    with pytest.raises(RunFolderError, match="not empty"):
        write_as(Path("one"), "finetune", Path("set"))
    with pytest.raises(ConfigError, match="written as pairs or finetune"):
        write_as(Path("one"), "parquet", Path("other"))
    code, _, err = run("search", "one")
    assert code == 2
    assert "--as pairs FOLDER" in err
    assert run("search", "search.yaml", "--out", "single", "search.n=1")[0] == 0
    with pytest.raises(DataError, match="no prompt has samples with"):
        write_as(Path("single"), "pairs", Path("none"))
    assert not Path("none").exists()


def test_a_missing_score_is_told_and_written(folder, run):
    code, _, err = run("search", "search.yaml", "reward.kind=tiny_run:all_infinite", "--out", "bad")
    assert code == 1
    assert "no sample of 3 prompts has a score: the reward returned inf" in err
    assert json.loads(Path("bad/results.json").read_text())["missing"] == 3


CLIP = "reward: {kind: clip, model: shapes}"


MIXED = f"{{kind: mixture, parts: {{a: {{{CLIP}}}, b: {{reward: ssim}}, c: {{reward: %s}}}}}}"


@pytest.mark.parametrize(
    ("method", "reward", "place", "why"),
    [
        ("reno", "{kind: shapes}", "reward", "reno follows the gradient of the reward, and 'shapes' has none"),
        ("das", "{kind: placed, reward: shapes}", "reward.reward", "das follows the gradient"),
        ("psi", "{kind: cached, reward: {kind: clip}}", "reward", "and 'cached' has none"),
        ("guidance", MIXED % "shapes", "reward.parts.c.reward", "and 'shapes' has none"),
        ("fk", "{kind: pairwise}", "reward", "compares samples of a group"),
        ("fk", MIXED % "pairwise", "reward", "compares samples of a group"),
        ("nrg", "{kind: shapes}", "latent_reward", "nrg needs a latent reward"),
    ],
)  # fmt: skip
def test_check_refuses_rewards_that_a_method_cannot_use(folder, run, method, reward, place, why):
    code, _, err = run("check", "search.yaml", f"search={{kind: {method}, sampler: null}}", f"reward={reward}")
    assert code == 2
    assert err.startswith((f"error: {place} ", f"error: {place}:"))
    assert why in err


def test_check_accepts_a_gradient_where_it_can_be_one(folder, run):
    for reward in (f"{{kind: mixture, parts: {{a: {{{CLIP}}}, g: {{reward: shapes, gate: 0}}}}}}", "tiny_run:redness"):
        code, _, err = run("check", "search.yaml", "search={kind: reno, sampler: {steps: 2}}", f"reward={reward}")
        assert code == 0, err


def test_mistakes_come_before_any_work(folder, run):
    code, _, err = run("search", "search.yaml", "search.kind=reno")
    assert code == 1
    assert "'redness' has none; take a reward that has one" in err
    assert not Path("runs").exists()
    code, _, err = run("check", "search.yaml", "search.m=4", "budget={}")
    assert code == 2
    assert "search.m (override 'search.m=4'): no such setting" in err
    part = "{reward: {kind: shapes}, normalise: group}"
    code, _, err = run("check", "search.yaml", f"reward={{kind: mixture, parts: {{a: {part}}}}}")
    assert code == 2
    assert "group compares samples scored together; take none or range" in err
    for setting, name in (
        ("reward", "reward={kind: pairwise}"),
        ("gold.g", "gold={g: {kind: placed, reward: pairwise}}"),
    ):
        code, _, err = run("check", "search.yaml", name)
        assert code == 2
        assert setting in err
        assert "compares samples of a group with one another" in err
    code, out, _ = run("check", "search.yaml")
    assert code == 0
    assert "6 network calls per prompt" in out
    code, _, err = run("check", "search.yaml", "prompts.source=none.txt")
    assert code == 2
    assert "none.txt does not exist" in err
    code, _, err = run("check", "search.yaml", "lora=runs/none")
    assert code == 2
    assert "lora: no file or folder runs/none" in err


@pytest.mark.parametrize("kind", registry.searches())
def test_every_setting_is_described_and_survives_the_file(kind, folder):
    latent = "tiny_run:latent" if registry.searches()[kind].latent else "null"
    config = load_search(
        Path("search.yaml"), [f"search={{kind: {kind}}}", "budget.decodes=3", f"latent_reward={latent}"]
    )
    again = SearchConfig.model_validate(json.loads(config.model_dump_json()))
    assert again == config
    assert all(field.description for field in type(config.search).model_fields.values())


def test_the_page_shows_every_prompt_and_needs_nothing_else(folder, run):
    assert run("search", "search.yaml", "--out", "one")[0] == 0
    assert run("report", "one")[0] == 0
    page = write_search_report(Path("one")).read_text()
    assert all(text in page for text in ("a red cube", "a blue ball", "a cat", "Reward against network calls"))
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/png") == 2 * 3 + 2 * 3
    with pytest.raises(RunFolderError, match=r"no results\.json"):
        write_search_report(Path())


def test_a_lora_goes_onto_the_generator(folder, model):
    from align.policy.build import build_generator
    from align.policy.lora import add_lora, save_lora

    config = load_search(Path("search.yaml"))
    trained = build_generator(config.generator, config.memory, "cpu")
    for name, value in add_lora(trained, 2, 2):
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.5, generator=torch.Generator().manual_seed(0))
    save_lora(trained, "run/lora")
    prompts = runs.read_prompts("prompts.txt")
    plain, _ = runs.load(config, prompts)
    tuned, _ = runs.load(load_search(Path("search.yaml"), ["lora=run"]), prompts)
    x, t, cond = plain.noise([0]), torch.tensor(0.5), plain.encode(["a cat"])
    assert not torch.allclose(tuned.velocity(x, t, cond), plain.velocity(x, t, cond), atol=1e-3)
    assert torch.allclose(tuned.velocity(x, t, cond), trained.velocity(x, t, cond), atol=1e-5)


def test_a_policy_that_is_no_lora_goes_onto_the_generator(folder, model, run):
    """A gate over experts, and attention to users, whose prompts say for whom they are drawn."""
    from align.policy import gated, users
    from align.policy.added import added_parameters
    from align.policy.build import build_generator

    config = load_search(Path("search.yaml"))
    trained = [build_generator(config.generator, config.memory, "cpu") for _ in range(2)]
    gated.add_gates(trained[0], gated.read_experts(trained[0], experts_beside(model)), 4)
    gated.save_gated(Path("gate/lora"), gated.gated_tensors(trained[0]), ["one", "two"])
    users.add_users(trained[1], users.Users({"ann": torch.ones(1, 3)}), 0)
    for name, value in added_parameters(trained[1]):
        value.data += name.endswith("to_v")
    users.save_users(Path("users/lora"), users.user_tensors(trained[1]), ["ann"])
    prompts = runs.read_prompts("prompts.txt")
    for name, one in zip(("gate", "users"), trained, strict=True):
        code, _, err = run("check", "search.yaml", f"lora={name}")
        assert code == 0, err
        loaded, _ = runs.load(load_search(Path("search.yaml"), [f"lora={name}"]), prompts)
        cond, _ = encode(one, [Prompt("a cat", metadata={"user": "ann"})])
        x, t = one.noise([0]), torch.tensor(0.5)
        assert torch.equal(loaded.velocity(x, t, cond), one.velocity(x, t, cond))
        plain, _ = runs.load(config, prompts)
        assert not torch.allclose(plain.velocity(x, t, cond), one.velocity(x, t, cond), atol=1e-3)


def test_videos_are_searched_written_and_read_back(folder, run):
    """A tiny Wan: particles with guidance, the results as videos beside their middle frames, pairs that read."""
    tiny_video.wan().save_pretrained("wan")
    Path("clips.yaml").write_text(
        "generator: {kind: wan, path: wan, device: cpu, size: [32, 32], frames: 5}\n"
        "prompts: {source: prompts.txt, limit: 2}\n"
        'reward: {kind: "tiny_run:mean_pixel"}\n'
        "search: {kind: fk, particles: 3, sampler: {steps: 3, guidance: 2.0}}\n"
        "budget: {network_calls: 18}\n"
    )
    code, _, err = run("search", "clips.yaml", "--out", "one", "--as", "pairs", "pairs")
    assert code == 0, err
    row = json.loads(Path("one/candidates/0001/found.json").read_text())
    assert row["spent"]["network_calls"] == 18
    video = Path("one/candidates/0001") / row["kept"][0]["file"]
    assert read_media(video).shape == (5, 3, 32, 32)
    assert video.with_suffix(".png").is_file()
    pairs = read_stored("pairs/pairs.jsonl", PAIR)
    assert read_sample(pairs[0], "chosen", (32, 32), 5).shape == (5, 3, 32, 32)


def test_memory_settings_that_a_generator_cannot_have_are_found_before_it_loads(folder):
    with pytest.raises(ConfigError, match=r"memory\.offload.*group needs a CUDA card, and generator\.device is cpu"):
        load_search(Path("search.yaml"), ["memory.offload=group"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("pairs", "one"), "that is the run folder of the search"),
        (("tables", "set"), "results are written as pairs or finetune"),
        (("pairs", "full"), "not empty"),
    ],
)
def test_a_folder_for_the_data_that_cannot_be_used_is_refused_before_the_search(given, says, folder, run):
    Path("full").mkdir()
    Path("full/a.txt").write_text("kept")
    code, _, err = run("search", "search.yaml", "--out", "one", "--as", *given)
    assert code == 2
    assert says in err
    assert not Path("one").exists()
