"""HyperNoise: what it costs, its gradient, what it learns, and that it leaves the generator as it was."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean, stdev

import pytest
import tiny
import torch

from align.data.prompts import Prompt
from align.policy.layers import LoraError
from align.policy.lora import FILE, add_lora
from align.search import search
from align.search.driver import make, parse
from align.search.methods.hyper_noise import NAME, HyperNoise, Shifter
from alignflow.errors import ConfigError, RunFolderError, SearchError
from generators.adapters.sd3 import SD3
from generators.base import Options
from rewards.base import Reward

PROMPTS = ["a", "b c"]
DARK = Reward("dark", lambda media, prompts, group: -media.flatten(1).mean(1), differentiable=True)


@pytest.fixture
def generator():
    return SD3(tiny.sd3_pipeline(t5=False), Options(size=(32, 32)))


@pytest.fixture
def asked(generator):
    """Rows of every call of the network."""
    rows: list[int] = []
    generator.backbone.register_forward_pre_hook(
        lambda module, args, named: rows.append(len(named["hidden_states"])), with_kwargs=True
    )
    return rows


def hyper(steps=1, guidance=1.0, **settings):
    sampler = {"kind": "ode", "steps": steps, "guidance": guidance}
    return {"kind": "hyper_noise", "rank": 4, "alpha": 4, "lr": 1e-2, "noises": 2, "sampler": sampler, **settings}


def task_of(generator, method, **options):
    settings = parse(method, {"reward_calls": 8})
    return make(generator, DARK, [Prompt(text) for text in PROMPTS], [0, 1], settings, 0, **options)


def velocity(generator):
    with torch.no_grad():
        return generator.velocity(generator.noise([0, 1]), torch.tensor(0.7), generator.encode(PROMPTS))


def test_the_first_samples_are_those_of_unshifted_noise(generator):
    plain = search(generator, DARK, PROMPTS, {"kind": "best_of_n", "sampler": {"steps": 1}}, {"decodes": 4})
    found = search(generator, DARK, PROMPTS, hyper(), {"decodes": 4})
    for a, b in zip(plain, found, strict=True):
        assert b.rewards[:2] == pytest.approx(a.rewards[:2], abs=1e-6)
        assert b.rewards[2:] != pytest.approx(a.rewards[2:], abs=1e-6)  # an update later the noise is another


@pytest.mark.parametrize(("steps", "guidance", "calls"), [(1, 1.0, 3), (2, 1.0, 6), (2, 3.0, 12)])
def test_every_network_call_is_counted(generator, asked, steps, guidance, calls):
    found = search(generator, DARK, PROMPTS, hyper(steps, guidance), {"network_calls": 5 * calls})
    assert [len(one.rewards) for one in found] == [5, 5]
    assert all(one.spent["network_calls"] == 5 * calls for one in found)
    assert all(one.spent["backward_calls"] == 5 * (steps + 1) * (1 if guidance == 1 else 2) for one in found)
    assert sum(asked) == sum(one.spent["network_calls"] for one in found)


@pytest.mark.parametrize("decode_chunk", [16, 3])
def test_its_gradient_is_that_of_the_loss(generator, decode_chunk):
    """Beside automatic differentiation from the LoRA through shift, both steps, decoder and reward at once."""
    task = task_of(generator, hyper(2, strength=3.0, regularise=0.25), decode_chunk=decode_chunk)
    shifter = Shifter(task, HyperNoise.model_validate(hyper(2, strength=3.0, regularise=0.25)))
    with torch.no_grad():
        for value in shifter.parameters:
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(value))))
    again = task_of(generator, hyper(2))
    shifter.learn(2)
    learned = [value.grad.clone() for value in shifter.parameters]

    begun = again.begin(2)
    x, row = begun.x, begun.row
    shift = shifter.shift(x, row)
    data = [value.detach() for value in shifter.parameters]

    fresh = SD3(tiny.sd3_pipeline(t5=False), Options(size=(32, 32)))
    latents = x + shift
    for t, after in pairwise(again.times):
        latents = latents + (after - t) * fresh.velocity(latents, t.expand(len(latents)), again.cond[row])
    value = DARK(fresh.decode(latents), [PROMPTS[b] for b in row]).values
    loss = (0.25 * shift.square().flatten(1).mean(1) - 3.0 * value).mean()
    wanted = torch.autograd.grad(loss, shifter.parameters)
    assert max(float(one.abs().max()) for one in wanted) > 1e-4
    for a, b in zip(learned, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(data, shifter.parameters, strict=True))


@pytest.mark.parametrize("tuned", [False, True])
def test_the_generator_is_left_as_it_was(generator, tuned):
    if tuned:
        for _, value in add_lora(generator, 2, 2):
            value.data += 0.1
        generator.backbone.requires_grad_(False)
    before = velocity(generator)
    search(generator, DARK, PROMPTS, hyper(), {"decodes": 4})
    assert torch.equal(velocity(generator), before)
    assert not any(value.requires_grad for value in generator.backbone.parameters())
    assert not any(f".{NAME}." in name for name, _ in generator.backbone.named_parameters())
    search(generator, DARK, PROMPTS, hyper(), {"decodes": 4})  # and may be asked again


@pytest.mark.slow
def test_what_is_learned_darkens_other_prompts_and_noises(generator, asked, tmp_path):
    """At two network calls more than a plain sample; the folder goes on from batch to batch."""
    folder = str(tmp_path / "noise")
    search(
        generator, DARK, PROMPTS, hyper(folder=folder, lr=2e-2, strength=1e3, regularise=0.1), {"decodes": 80}, batch=1
    )
    assert (tmp_path / "noise" / FILE).is_file()
    others = ["d", "e f"]
    plain = search(generator, DARK, others, {"kind": "best_of_n", "sampler": {"steps": 1}}, {"decodes": 8}, seed=7)
    asked.clear()
    used = search(generator, DARK, others, hyper(folder=folder, lr=0.0), {"decodes": 8}, seed=7)
    assert sum(asked) == 2 * 8 * 3
    for a, b in zip(plain, used, strict=True):
        assert mean(b.rewards) > mean(a.rewards) + stdev(a.rewards)


def test_nothing_to_use_is_said(generator, tmp_path):
    with pytest.raises(
        ConfigError, match=r"search\.folder: name the one that holds the LoRA: with lr 0 none is trained"
    ):
        search(generator, DARK, PROMPTS, hyper(lr=0.0), {"decodes": 4})
    with pytest.raises(LoraError, match=r"no file or folder .*nowhere"):
        search(generator, DARK, PROMPTS, hyper(lr=0.0, folder=str(tmp_path / "nowhere")), {"decodes": 4})
    (tmp_path / FILE).write_bytes(b"broken")
    with pytest.raises(LoraError, match="not a whole safetensors file"):
        search(generator, DARK, PROMPTS, hyper(lr=0.0, folder=str(tmp_path)), {"decodes": 4})
    with pytest.raises(RunFolderError, match="is not a noise LoRA that alignflow made"):
        search(generator, DARK, PROMPTS, hyper(folder=str(tmp_path)), {"decodes": 4})
    assert (tmp_path / FILE).read_bytes() == b"broken"


def test_small_budgets_and_rewards_without_gradients_are_refused(generator, tmp_path):
    folder = tmp_path / "noise"
    with pytest.raises(SearchError, match="a budget of 2 network calls is less than one sample, which takes 3 netw"):
        search(generator, DARK, PROMPTS, hyper(folder=str(folder)), {"network_calls": 2})
    assert not folder.exists()
    flat = Reward("flat", DARK.function)
    with pytest.raises(SearchError, match="hyper_noise follows the gradient of the reward, and 'flat' has none"):
        search(generator, flat, PROMPTS, hyper(), {"decodes": 4})


def test_samples_without_a_score_teach_nothing(generator):
    def function(media, prompts, group):
        values = -media.flatten(1).mean(1)
        return torch.where(torch.tensor([prompt == "a" for prompt in prompts]), values, torch.nan)

    partly = Reward("partly", function, differentiable=True)
    found = search(generator, partly, PROMPTS, hyper(), {"decodes": 6})
    assert found[0].best is not None
    assert found[1].best is None
    assert "nan" in found[1].reason
