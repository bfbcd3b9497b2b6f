"""Generation benchmarks: the published formats of their prompt sets, the table by category, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import settings

from align.cli.benchmark import FORMATS as LISTED
from align.data.media import read_media, write_media
from align.evaluation.against import lines_of as against_lines
from align.evaluation.against import table
from align.evaluation.benchmark import benchmark, lines_of, summary
from align.evaluation.sets import FORMATS, read_set
from alignflow.errors import ConfigError, DataError, RunFolderError


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_media(path, torch.rand(3, 16, 16))
    return path


def test_geneval(tmp_path: Path) -> None:
    row = {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"}
    written(tmp_path, {"m.jsonl": json.dumps(row) + "\n"})
    (prompt,) = read_set("geneval", str(tmp_path / "m.jsonl"))
    assert (prompt.text, prompt.metadata["category"]) == ("a photo of two clocks", "counting")
    assert prompt.metadata["include"] == [{"class": "clock", "count": 2}]


def test_t2i_compbench(tmp_path: Path) -> None:
    written(
        tmp_path, {"color_val.txt": "a red cat.\na blue dog\n", "shape_val.txt": "a round box\n", "color.txt": "x\n"}
    )
    found = read_set("t2i-compbench", str(tmp_path))
    assert [(one.text, one.metadata["category"]) for one in found] == [
        ("a red cat", "color"), ("a blue dog", "color"), ("a round box", "shape")
    ]  # fmt: skip
    assert len(read_set("t2i-compbench", str(tmp_path), limit=1)) == 2


def test_dpg_bench(tmp_path: Path) -> None:
    head = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    head += "question_natural_language"
    rows = ["0,A cat.,,1,0,entity,whole,entity - whole (cat),Is there a cat?",
            '0,A cat.,,2,"1, 3",attribute,color,attribute - color (cat),Is the cat red?',
            "partiprompts1,A dog.,,1,0,entity,whole,entity - whole (dog),Is there a dog?"]  # fmt: skip
    written(tmp_path, {"dpg.csv": "\n".join([head, *rows])})
    found = read_set("dpg-bench", str(tmp_path / "dpg.csv"))
    assert [one.text for one in found] == ["A cat.", "A dog."]
    assert found[0].metadata["questions"] == [
        {"id": 1, "question": "Is there a cat?", "category": "entity", "parents": []},
        {"id": 2, "question": "Is the cat red?", "category": "attribute", "parents": [1, 3]},
    ]
    written(tmp_path, {"bad.csv": f"{head}\n0,A cat.,,one,0,e,w,t,Is it?"})
    with pytest.raises(DataError, match=r"bad.csv line 2: needs a whole number under 'proposition_id', given 'one'"):
        read_set("dpg-bench", str(tmp_path / "bad.csv"))


def test_t2i_reasonbench(tmp_path: Path) -> None:
    asked = {"q1": "Is it Athens?", "c1": "1: yes; 0: no", "q2": "Are there games?", "c2": {"1": "yes", "0": "no"}}
    one = {"q1": "Is it 1896?", "c1": "1: yes"}
    rows = {
        "idiom_interpretation": ("idiom", {"reason_evaluation": asked, "quality_evaluation": {"aq1": "?", "ac1": "!"}}),
        "textual_image_design": ("textual_image", {"reason_evaluation": one, "quality_evaluation": one}),
        **{
            f"{name}_reasoning": (
                name,
                {f"{name}_evaluation": asked, "other_details_evaluation": one, "quality_evaluation": one},
            )
            for name in ("entity", "scientific")
        },
    }
    for dimension, (name, lists) in rows.items():
        prompt = {"id": 1, "prompt": f"a prompt of {name}", "tag": "x"}
        files = {
            f"prompts/{dimension}.json": [prompt],
            f"deepseek_evaluation_qs/evaluation_{name}.json": [prompt | lists],
        }
        written(tmp_path, {file: json.dumps(content) for file, content in files.items()})
    found = read_set("t2i-reasonbench", str(tmp_path))
    assert [one.metadata["category"] for one in found] == list(rows)
    assert found[0].text == "a prompt of idiom"
    assert [each["weight"] for each in found[0].metadata["questions"]] == [0.5, 0.5, 0]
    assert [each["category"] for each in found[0].metadata["questions"]] == ["reason", "reason", "quality"]
    assert [each["weight"] for each in found[2].metadata["questions"]] == pytest.approx([0.35, 0.35, 0.3, 0])
    assert found[2].metadata["questions"][1] == {
        "question": "Are there games?", "criterion": "1: yes; 0: no", "category": "entity", "weight": 0.35, "id": 2,
    }  # fmt: skip
    written(tmp_path, {"deepseek_evaluation_qs/evaluation_idiom.json": "[]"})
    with pytest.raises(DataError, match=r"idiom_interpretation.json item 1: .*_idiom.json has no questions for id 1"):
        read_set("t2i-reasonbench", str(tmp_path))


def test_densealignbench(tmp_path: Path) -> None:
    written(tmp_path, {"metadata.jsonl": json.dumps({"caption": "This is a close-up of two insects."}) + "\n"})
    (prompt,) = read_set("densealignbench", str(tmp_path / "metadata.jsonl"))
    assert (prompt.text, prompt.metadata["category"]) == ("This is a close-up of two insects.", "all")


def test_tiif(tmp_path: Path) -> None:
    row = {"type": "2d", "short_description": "A cat under a box.", "long_description": "A sleek cat sits ..."}
    written(tmp_path, {"data/2d.jsonl": json.dumps(row)})
    assert read_set("tiif", str(tmp_path / "data"))[0].text == "A cat under a box."
    assert read_set("tiif-long", str(tmp_path / "data" / "2d.jsonl"))[0].text == "A sleek cat sits ..."


def test_imgedit(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "animal" / "1.png")
    rows = {"7": {"id": "animal/1.png", "prompt": "Make it red.", "edit_type": "adjust"}}
    written(tmp_path, {"basic_edit.json": json.dumps(rows)})
    (prompt,) = read_set("imgedit", str(tmp_path / "basic_edit.json"), tmp_path / "images")
    assert (prompt.text, prompt.metadata["category"]) == ("Make it red.", "adjust")
    assert prompt.media["image"] == tmp_path / "images" / "animal" / "1.png"
    with pytest.raises(DataError, match=r"key '7': no image .*--media names the folder"):
        read_set("imgedit", str(tmp_path / "basic_edit.json"))


def test_gedit(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = {"bytes": picture(tmp_path / "a.png").read_bytes(), "path": None}
    rows = {"key": ["a", "b"], "task_type": ["style_change"] * 2, "instruction": ["make it art", "变"],
            "instruction_language": ["en", "cn"], "input_image_raw": [image] * 2}  # fmt: skip
    features = datasets.Features({name: datasets.Value("string") for name in list(rows)[:4]}
                                 | {"input_image_raw": datasets.Image()})  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "g.parquet"))
    (prompt,) = read_set("gedit", str(tmp_path / "g.parquet"))
    assert (prompt.text, prompt.metadata["category"]) == ("make it art", "style_change")
    assert prompt.media["image"].content().startswith(b"\x89PNG")
    assert read_set("gedit-cn", str(tmp_path / "g.parquet"))[0].text == "变"


def test_dreambench(tmp_path: Path) -> None:
    text = (
        "Classes\n\nsubject_name,class\nbackpack,backpack\ncat2,cat\n\nPrompts\n\nObject Prompts\n\nprompt_list = [\n"
        "'a {0} {1} in the snow'.format(unique_token, class_token),\n"
        "'a red {0} {1}'.format(unique_token, class_token)\n]\n"
        "\nLive Subject Prompts\n\nprompt_list = [\n'a {0} {1} wearing a hat'.format(unique_token, class_token)\n]\n"
    )
    written(tmp_path, {"prompts_and_classes.txt": text})
    for name in ("backpack/00.jpg", "backpack/01.jpg", "cat2/03.jpg"):
        picture(tmp_path / name)
    found = read_set("dreambench", str(tmp_path))
    assert [(one.text, one.metadata["category"]) for one in found] == [
        ("a backpack in the snow", "object"), ("a red backpack", "object"), ("a cat wearing a hat", "live")
    ]  # fmt: skip
    assert found[0].media["image"] == tmp_path / "backpack" / "00.jpg"
    assert found[0].metadata["references"] == [str(tmp_path / "backpack" / "01.jpg")]


@pytest.mark.parametrize("kind", FORMATS)
def test_files_of_another_format_are_named(kind: str, tmp_path: Path) -> None:
    written(tmp_path, {"a.jsonl": '{"nothing": 1}\n', "folder/b.txt": ""})
    for source in (tmp_path / "a.jsonl", tmp_path / "folder", tmp_path / "missing.csv"):
        with pytest.raises(DataError):
            read_set(kind, str(source))


def test_a_prompt_counts_once_and_missing_scores_are_counted() -> None:
    def row(number: int, category: str, value: float | None) -> dict[str, Any]:
        return {"number": number, "category": category, "scores": {"r": value}}

    rows = [
        row(0, "a", 1.0),
        row(0, "a", 0.0),
        row(1, "a", 1.0),
        row(1, "a", None),
        row(2, "b", 0.2),
        row(3, "c", None),
    ]
    found = summary(rows)["r"]
    assert found["categories"]["a"] == {"mean": 0.75, "stderr": 0.25, "prompts": 2, "missing": 1}
    assert found["categories"]["b"] == {"mean": 0.2, "stderr": None, "prompts": 1, "missing": 0}
    assert found["categories"]["c"]["mean"] is None
    assert found["prompts"]["mean"] == pytest.approx((0.5 + 1 + 0.2) / 3)
    assert found["mean_of_categories"] == pytest.approx((0.75 + 0.2) / 2)
    lines = lines_of({"set": "s", "samples_per_prompt": 2, "rewards": {"r": found}})
    assert "| a | 2 | 0.750 ± 0.250 |" in lines
    assert "| c | 0 | no score |" in lines


def test_a_benchmark_resumes_and_refuses_another_set(model: Path, tmp_path: Path) -> None:
    config = settings(
        tmp_path,
        model,
        evaluate={"chunk": 2, "sampler": {"steps": 2}, "rewards": {"red": {"kind": "tiny_run:redness"}}},
    )
    written(
        tmp_path, {"p.jsonl": "\n".join(json.dumps({"prompt": f"a cat {n}", "tag": "ab"[n % 2]}) for n in range(3))}
    )
    prompts = read_set("table", str(tmp_path / "p.jsonl"))
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise KeyboardInterrupt

    whole = benchmark(config, prompts, tmp_path / "whole", name="table", count=2, say=lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        benchmark(config, prompts, tmp_path / "out", name="table", count=2, say=stop)
    with (tmp_path / "out" / "samples.jsonl").open("a") as file:
        file.write('{"file": "000')
    assert benchmark(config, prompts, tmp_path / "out", name="table", count=2, say=said.append) == whole
    assert said[2:] == ["6 of 6 samples"]
    for name in ("samples.jsonl", "results.md", "00001-1.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(RunFolderError, match="another model, set or settings"):
        benchmark(config, prompts[:2], tmp_path / "out", name="table", count=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="is not a benchmark"):
        benchmark(config, prompts, tmp_path / "mine", name="table")
    without = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"rewards": {}})})
    with pytest.raises(ConfigError, match=r"evaluate.rewards is empty"):
        benchmark(without, prompts, tmp_path / "new", name="table")


def test_shares_are_won_tied_and_lost() -> None:
    values = [("a", 1.0), ("a", 0.5), ("a", None), ("b", 0.2), ("b", 0.9)]
    found = table([{"category": category, "against": {"r": value}} for category, value in values])["r"]
    assert found["a"] == {"samples": 2, "missing": 1, "won": 0.5, "tied": 0.5, "lost": 0.0, "net": 0.5}
    assert found["b"] == {"samples": 2, "missing": 0, "won": 0.5, "tied": 0.0, "lost": 0.5, "net": 0.0}
    assert found["all"] == {"samples": 4, "missing": 1, "won": 0.5, "tied": 0.25, "lost": 0.25, "net": 0.25}
    lines = against_lines({"r": found}, "old")
    assert lines[1] == "r, against old:"
    assert "| all | 4 | 0.500 | 0.250 | 0.250 | 0.250 |" in lines


JUDGE = """
import torch

def redder(media, prompts, group):
    red = media[:, 0].mean(dim=(1, 2))
    return torch.stack([(red[i] > red[(group == group[i]) & (torch.arange(len(red)) != i)]).float().mean()
                        for i in range(len(red))])
"""


def test_two_benchmarks_of_a_set_are_compared_sample_by_sample(model: Path, tmp_path: Path) -> None:
    written(tmp_path, {"judge.py": JUDGE, "p.jsonl": "\n".join(json.dumps({"prompt": f"cat {n}"}) for n in range(2))})
    red = {"red": {"kind": "tiny_run:redness"}}
    better = {"better": {"kind": f"{tmp_path / 'judge.py'}:redder"}}
    prompts = read_set("table", str(tmp_path / "p.jsonl"))

    def run(out: str, rewards: dict[str, Any], seed: int = 0, **more: Any) -> dict[str, Any]:
        evaluate = {"chunk": 2, "sampler": {"steps": 2}, "rewards": rewards, "seed": seed}
        config = settings(tmp_path, model, evaluate=evaluate)
        return benchmark(config, prompts, tmp_path / out, name="table", count=2, say=lambda line: None, **more)

    first = run("old", red)
    found = run("new", {**red, **better}, seed=1, against=tmp_path / "old")
    assert set(found["rewards"]) == {"red"}
    reds = [
        [float(read_media(tmp_path / out / f"0000{n}-{copy}.png")[0].mean()) for n in (0, 1) for copy in (0, 1)]
        for out in ("new", "old")
    ]
    wins = sum(new > old for new, old in zip(*reds, strict=True)) / 4
    shares = found["against"]["rewards"]["better"]["all"]
    assert (shares["won"], shares["samples"]) == (wins, 4)
    back = run("back", better, against=tmp_path / "new")
    assert back["against"]["rewards"]["better"]["all"]["net"] == -shares["net"]
    assert back["rewards"] == {}
    assert run("new", {**red, **better}, seed=1, against=tmp_path / "old") == found  # all samples are there
    assert "against" not in first
    with pytest.raises(ConfigError, match=r"evaluate\.rewards\.better compares samples; set --against"):
        run("alone", better)
    assert not any((tmp_path / "alone").glob("*.json"))
    with pytest.raises(ConfigError, match="--against needs a reward that compares"):
        run("plain", red, against=tmp_path / "old")
    with pytest.raises(RunFolderError, match="is not the folder of a finished benchmark"):
        run("none", better, against=tmp_path / "nowhere")
    written(tmp_path, {"other.jsonl": json.dumps({"prompt": "dog"}) + "\n" + json.dumps({"prompt": "cat 1"})})
    prompts = read_set("table", str(tmp_path / "other.jsonl"))
    with pytest.raises(RunFolderError, match=r"prompt 0, sample 0: .*old has it of 'cat 0'"):
        run("other", better, against=tmp_path / "old")


def test_the_command_lists_all_formats() -> None:
    assert LISTED.split(", ") == list(FORMATS)
