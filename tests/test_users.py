"""Attention to users: the base at the start and for nobody, two users who disagree, files, embeddings (PPD)."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import PROMPTS, Case
from safetensors.torch import load_file, save_file
from test_adapters import CASES, generator_of
from test_learners import bench_of
from tiny_run import final_tensors, settings
from torch import Tensor

from align.checking.check import check_files
from align.checking.estimate import estimate
from align.cli.app import app
from align.data.inputs import encode
from align.data.media import write_media
from align.data.prompts import Prompt
from align.export import ExportError, export
from align.maths.attention import decoupled
from align.policy.added import added_off, added_parameters
from align.policy.build import add_trained, build_generator
from align.policy.layers import LoraError
from align.policy.users import ROWS, Users, add_users, layers, load_users, read_embeddings
from align.preference.user_embeddings import embed_users
from align.recipes.base import Scores
from align.rollout.rollout import Scored
from align.runs.trained import find_policy, load_policy
from align.training.trainer import train
from alignflow.errors import ConfigError, DataError, TrainingError
from alignflow.files import tensor_files
from generators.base import Generator
from generators.load import adapter, load

pytestmark = pytest.mark.usefixtures("small_sources")
ANN, BOB = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), torch.tensor([[0.0, -1.0, 0.0], [0.5, 0.0, 1.0]])


def test_decoupled_attention_is_a_softmax_of_its_own() -> None:
    q, k, v = torch.tensor([[[2.0]]]), torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[3.0], [5.0]]])
    share = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(decoupled(q, k, v, 1), torch.tensor([[[3 + 2 * share]]]))
    q, k, v = torch.randn(3, 2, 5, 8).unbind(0)
    heads = [decoupled(*(x[..., part] for x in (q, k, v)), 1) for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(decoupled(q, k, v, 2), torch.cat(heads, -1))
    assert not decoupled(q, k, torch.zeros_like(v), 2).any()


def prompts(*users: Any) -> list[Prompt]:
    return [Prompt("a cat", metadata={} if user is None else {"user": user}, place=f"row {n}")
            for n, user in enumerate(users)]  # fmt: skip


def velocities(generator: Generator, *users: Any, guidance: float = 1.0) -> Tensor:
    cond, _ = encode(generator, prompts(*users))
    with torch.no_grad():
        return generator.velocity(generator.noise([1] * len(users)), torch.tensor(0.6), cond, guidance)


def attending(model: Path) -> Generator:
    """The tiny SD3 with random values for two users."""
    generator = load("sd3", str(model))
    add_users(generator, Users({"ann": ANN, "bob": BOB}), 0)
    for seed, (name, value) in enumerate(added_parameters(generator)):
        if name.endswith("to_v"):
            value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    return generator


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_base_is_there_at_the_start_and_for_nobody(guidance: float, model: Path) -> None:
    base = velocities(load("sd3", str(model)), None, None, None, guidance=guidance)
    generator = load("sd3", str(model))
    add_users(generator, Users({"ann": ANN, "bob": BOB}), 0)
    assert torch.equal(velocities(generator, "ann", "bob", None, guidance=guidance), base)  # values of zero
    generator = attending(model)
    found = velocities(generator, "ann", "bob", None, guidance=guidance)
    assert torch.equal(found[2], base[2])
    assert (found[:2] - base[:2]).abs().amin(0).max() > 1e-2
    assert (found[0] - found[1]).abs().max() > 1e-2
    with added_off(generator):
        assert torch.equal(velocities(generator, "ann", "bob", None, guidance=guidance), base)


def test_users_mix_linearly(model: Path) -> None:
    generator = attending(model)
    assert isinstance(generator.users, Users)
    cond, _ = encode(generator, prompts({"ann": 0.25, "bob": 0.75}, {"ann": 1.0}, "ann", ""))
    rows = cond.tensors[ROWS]
    torch.testing.assert_close(rows[0], 0.25 * ANN + 0.75 * BOB)
    assert torch.equal(rows[1], rows[2])
    assert not rows[3].any()
    path = torch.cat([velocities(generator, {"ann": 1 - w, "bob": w}) for w in (0.0, 0.499, 0.5, 1.0)])
    ends = (path[0] - path[3]).abs().max()
    assert (path[1] - path[2]).abs().max() < 0.02 * ends  # continuous
    generator.users.default = "bob"
    assert torch.equal(velocities(generator, None), velocities(generator, "bob"))


def test_a_user_without_an_embedding_is_named(model: Path) -> None:
    with pytest.raises(DataError, match="row 1: no embedding of user 'bo'; there are ann, bob"):
        velocities(attending(model), "ann", "bo")


def test_queries_are_those_of_the_layer(model: Path) -> None:
    """The attention of a layer, by diffusers' own module, plus the decoupled part on its normalised queries."""
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    generator = attending(model)
    attn = generator.backbone.get_submodule(layers(generator)[0])
    added = attn.user_attention
    x, text = torch.randn(2, 5, attn.to_q.in_features), torch.randn(2, 3, attn.to_q.in_features)
    seen: dict[str, Tensor] = {}
    attn.to_out[0].register_forward_hook(lambda layer, given, out: seen.update(z=given[0]))
    cond, _ = encode(generator, prompts("ann", "bob"))
    generator.velocity(generator.noise([1, 2]), torch.tensor(0.6), cond)
    with added_off(generator), torch.no_grad():
        JointAttnProcessor2_0()(attn, x, text)
        plain = seen["z"]
    with torch.no_grad():
        JointAttnProcessor2_0()(attn, x, text)
        q = attn.to_q(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        q = (q if attn.norm_q is None else attn.norm_q(q)).transpose(1, 2).flatten(2)
        users = torch.stack([ANN, BOB])
        wanted = plain + decoupled(q, users @ added.to_k.T, users @ added.to_v.T, attn.heads)
    torch.testing.assert_close(seen["z"], wanted)


def test_only_the_new_weights_are_trained(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "ppd")
    generator = build_generator(config.generator, config.memory, "cpu", training=True)
    add_trained(config, generator)
    trained = {name: value for name, value in generator.backbone.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * len(layers(generator)) > 0
    assert all("user_attention.to_" in name for name in trained)
    counted = {item.name: item.bytes for item in estimate(config).kept}
    assert counted["roles"] == 2 * sum(value.nbytes for value in trained.values())


def opposed(config: Any, generator: Generator) -> Scored:
    """One pair of samples, which one user prefers in one order and the other in the other."""
    cond, _ = encode(generator, prompts("user0", "user1"))
    latents = generator.noise([1, 2]).repeat(2, 1, 1, 1)
    group = torch.tensor([0, 0, 1, 1])
    return Scored(
        prompts=["a cat"] * 4, group=group, seeds=[5, 5, 5, 5], cond=cond, row=group, latents=latents,
        media=torch.empty(0), scores=Scores(torch.tensor([1.0, 0.0, 0.0, 1.0])),
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ["ppd", "flow_dpo"])
def test_users_who_disagree_are_told_apart(recipe: str, model: Path, tmp_path: Path) -> None:
    """Without users the mean of the two losses is at least ln 2, by convexity; with them it falls below."""
    options = {"timesteps": 4, "beta": 50}
    config = settings(tmp_path, model, {"kind": recipe, **options})
    generator, bench = bench_of(config)
    rollout = opposed(config, generator)
    terms = config.recipe.terms(rollout, rollout.scores.values)
    optimizer = torch.optim.Adam([value for _, value in bench.learners["policy"].parameters], 1e-2)
    found = []
    for _ in range(8):
        with bench.acting("policy"):
            loss = config.recipe.loss(terms, rollout, bench).value.mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        bench.learners["policy"].policy_changed()
        found.append(float(loss.detach()))
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    if recipe == "ppd":
        assert found[-1] < 0.9 * math.log(2)
    else:
        assert min(found) > math.log(2) - 1e-6


def test_learning_rate_zero_is_the_base(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "ppd", train={"steps": 2, "lr": 0.0})
    summary = train(config)
    assert summary["reward_after"] == summary["reward_before"]
    assert not any(value.any() for name, value in final_tensors(config).items() if name.endswith("to_v"))


def test_a_run_is_sampled_for_a_user(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "ppd", train={"steps": 2, "lr": 0.1, "ema": 0.0})
    train(config)
    tensors = final_tensors(config)
    generator = build_generator(config.generator, config.memory, "cpu", training=True)
    add_trained(config, generator)
    for name, value in added_parameters(generator):
        value.data = tensors[f"policy/{name}"]
    wanted = velocities(generator, "user0", "user1", None)
    for place in (config.run_dir, config.run_dir / "checkpoints" / "step-000002"):
        again = build_generator(config.generator, config.memory, "cpu")
        load_policy(again, find_policy(place).folder)
        assert torch.equal(velocities(again, "user0", "user1", None), wanted)
    again = build_generator(config.generator, config.memory, "cpu")
    load_users(again, config.run_dir / "lora" / "user_attention.safetensors", {"user0": 0.5, "user1": 0.5})
    assert torch.equal(velocities(again, None), velocities(generator, {"user0": 0.5, "user1": 0.5}))
    with pytest.raises(ExportError, match="attention to users, which neither a LoRA nor a pipeline can hold"):
        export(find_policy(config.run_dir), "diffusers")


def test_sample_draws_for_the_user_that_is_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, model, "ppd", train={"steps": 2, "lr": 0.3, "ema": 0.0}, prompts={"heldout": None})
    train(config)
    save_file({"cleo": torch.full((2, 3), 3.0)}, tmp_path / "cleo.safetensors")
    drawn = {}
    given = {"nobody": [], "user0": ["policy.user=user0"], "both": ["policy.user={user0: 0.5, user1: 0.5}"]}
    given["cleo"] = [f"policy.embeddings={tmp_path / 'cleo.safetensors'}", "policy.user=cleo"]
    for name, overrides in given.items():
        out = tmp_path / name
        app(["sample", str(config.run_dir), *overrides, "--prompt", "a cat", "--out", str(out)], standalone_mode=False)
        drawn[name] = (out / "000.png").read_bytes()
    assert len(set(drawn.values())) == 4


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"policy": {"kind": "lora", "rank": 4}}, "ppd trains attention to users: use users, with embeddings"),
        (
            {"generator": {"kind": "mochi", "path": "m", "device": "cpu"}},
            "mochi names no layers that can attend to a user; flux, .* do",
        ),
        ({"policy": {"kind": "users"}}, "policy.embeddings"),
    ],
)
def test_what_does_not_go_together_is_said(sections: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        settings(tmp_path, model, "ppd", **sections)


def test_users_without_embeddings_are_found_by_check(model: Path, tmp_path: Path) -> None:
    def problems(**sections: Any) -> str:
        with pytest.raises(ConfigError) as error:
            check_files(settings(tmp_path, model, "ppd", **sections))
        return str(error.value)

    check_files(settings(tmp_path, model, "ppd"))
    plain = str(tmp_path / "prompts.txt")
    assert "has no user, so it would teach nothing" in problems(prompts={"train": plain})
    with pytest.raises(TrainingError, match=r"ppd: prompt 'a .*' has no user: give its row a column user"):
        train(settings(tmp_path, model, "ppd", prompts={"train": plain}))
    check_files(settings(tmp_path, model, "ppd", prompts={"train": plain}, policy={"user": "user0"}))
    assert "no embedding of user 'user9'" in problems(policy={"user": "user9"})
    other = tmp_path / "other.safetensors"
    save_file({"user0": torch.ones(2, 3)}, other)
    assert "no embedding of user 'user1'; did you mean 'user0'?" in problems(policy={"embeddings": str(other)})
    save_file({"user0": torch.ones(2, 3), "user1": torch.ones(1, 3)}, other)
    assert "of one shape" in problems(policy={"embeddings": str(other)})
    with pytest.raises(DataError, match="of one shape"):
        read_embeddings(other)
    assert "cannot be read" in problems(policy={"embeddings": str(tmp_path / "gone")})


def test_a_file_of_another_model_is_named(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "ppd", train={"steps": 1}, prompts={"heldout": None})
    train(config)
    file = config.run_dir / "lora" / "user_attention.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("to_k"))
    about = tensor_files.header(file)[1]
    tensor_files.save(tmp_path / file.name, {**tensors, name: torch.ones(3, 3)}, about)
    with pytest.raises(LoraError, match="was not made for this SD3Transformer2DModel"):
        load_policy(load("sd3", str(model)), tmp_path)
    (tmp_path / file.name).write_bytes(file.read_bytes()[:-5])
    with pytest.raises(LoraError, match="is not a file of user attention"):
        load_policy(load("sd3", str(model)), tmp_path)


def table(folder: Path, users: list[str]) -> Path:
    rows = []
    for n, user in enumerate(users):
        bright, dark = (f"{n}-{name}.png" for name in ("bright", "dark"))
        for file, level in ((bright, 0.9), (dark, 0.1)):
            noise = 0.1 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(n))
            write_media(folder / file, (level + noise).clamp(0, 1))
        won, lost = (bright, dark) if user == "ann" else (dark, bright)
        rows.append({"prompt": "a red circle", "chosen": won, "rejected": lost, "user": user})
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_embeddings_point_where_a_user_prefers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = table(tmp_path, ["ann", "bob", "ann", "bob", "ann"])
    found = embed_users(str(pairs), 2, "shapes", None, "cpu")
    ann, bob = found["ann"], found["bob"]
    assert ann.shape == bob.shape
    assert ann.shape[0] == 2
    width = ann.shape[1] // 2
    torch.testing.assert_close(ann.square().mean(1), torch.ones(2))
    assert float(torch.cosine_similarity(ann[:, :width], bob[:, :width]).max()) < -0.9
    torch.testing.assert_close(ann[:, width:], bob[:, width:])
    with pytest.raises(DataError, match="user 'bob' has 2 pairs, but --shots 3 needs more; lower --shots"):
        embed_users(str(pairs), 3, "shapes", None, "cpu")
    out = tmp_path / "out" / "users.safetensors"
    app(["reward", "users", str(pairs), "--shots", "2", "--out", str(out)], standalone_mode=False)
    assert f"2 users, 2 tokens of {2 * width} numbers each" in capsys.readouterr().out
    assert torch.equal(read_embeddings(out)["ann"], ann)
    with pytest.raises(ConfigError, match="exists; name another file"):
        app(["reward", "users", str(pairs), "--out", str(out)], standalone_mode=False)


ABLE = [case for case in CASES if adapter(case.kind).user_attention and "two-experts" not in case.name]


@pytest.mark.parametrize("case", ABLE, ids=[case.name for case in ABLE])
def test_adapters_that_can_attend_to_a_user(case: Case) -> None:
    """The base at the start and for nobody, and a gradient to the new values of every layer."""
    generator = generator_of(case)
    cond, x, t = generator.encode(PROMPTS, case.inputs), generator.noise([1, 2]), torch.tensor(0.6)
    with torch.no_grad():
        base = generator.velocity(x, t, cond, case.guidance)
    add_users(generator, Users({"ann": ANN, "bob": BOB}), 0)
    rows = {"ann": torch.stack([ANN, BOB]), "nobody": torch.stack([ANN, 0 * BOB])}
    told = {name: replace(cond, tensors={**cond.tensors, ROWS: value}) for name, value in rows.items()}
    found = generator.velocity(x, t, told["ann"], case.guidance)
    assert torch.equal(found.detach(), base)
    found.square().sum().backward()
    values = {name: value for name, value in added_parameters(generator) if name.endswith("to_v")}
    assert values
    idle = generator.idle()
    assert [name for name, value in values.items() if not value.grad.any() and not name.startswith(idle)] == []
    for value in values.values():
        value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = generator.velocity(x, t, told["nobody"], case.guidance)
    assert torch.equal(found[1], base[1])
    assert (found[0] - base[0]).abs().max() > 1e-4
