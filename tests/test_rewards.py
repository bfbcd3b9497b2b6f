"""Rewards: exact numbers, and every failure either a reason beside a NaN or an error that says what to do."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError

import rewards
from alignflow.errors import ConfigError
from rewards.base import Reward, RewardError, Scores
from rewards.call import CallableReward
from rewards.encoders.clip import ClipReward

MEDIA = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "b"]


def scored(function, media=MEDIA, prompts=PROMPTS, group=None, **options):
    return Reward("test", lambda media, prompts, group: function(media), **options)(media, prompts, group)


# -- checked scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    [[1, 2.5, 3], (1, 2.5, 3), np.array([1, 2.5, 3]), torch.tensor([1, 2.5, 3], dtype=torch.float64),
     [torch.tensor(1.0), torch.tensor(2.5), torch.tensor(3.0)], Scores(torch.tensor([1, 2.5, 3]))],
)  # fmt: skip
def test_numbers_of_any_kind(returned):
    scores = scored(lambda media: returned)
    assert scores.values.tolist() == [1, 2.5, 3]
    assert scores.values.dtype == torch.float32
    assert scores.reasons == {}


def test_what_is_no_number_has_a_reason():
    scores = scored(lambda media: [1.0, math.inf, None])
    assert scores.values[0] == 1
    assert scores.values[1:].isnan().all()
    assert scores.reasons == {1: "the reward returned inf", 2: "the reward returned nan"}
    own = scored(lambda media: Scores(torch.tensor([math.nan, 1, 2]), {0: "too dark", 1: "not needed"}))
    assert own.reasons == {0: "too dark"}


def test_an_exception_is_a_reason_for_all():
    def broken(media):
        raise KeyError("server gone")

    scores = scored(broken)
    assert scores.values.isnan().all()
    assert scores.reasons[2].startswith("KeyError: 'server gone' (test_rewards.py, line ")

    def deep(media):
        return torch.stack([])

    line = inspect.getsourcelines(deep)[1] + 1
    assert scored(deep).reasons[0].endswith(f"(test_rewards.py, line {line})")

    def stopped(media):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(stopped)

    def unusable(media):
        raise RewardError("no weights")

    with pytest.raises(RewardError, match="no weights"):
        scored(unusable)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], r"'test': scores should have shape \[3\], got \[2\]"),
        (torch.zeros(3, 1), r"scores should have shape \[3\], got \[3, 1\]"),
        (1.0, r"scores should have shape \[3\], got \[\]"),
        ("abc", r"scores should be 3 numbers, got str"),
        ({"a": 1}, r"scores should be 3 numbers, got dict"),
        (["a", "b", "c"], r"scores should be 3 numbers, got list"),
        (None, r"scores should be 3 numbers, got NoneType"),
        (Scores(torch.zeros(3), parts={"x": torch.zeros(2)}), r"part 'x' should have shape \[3\], got \[2\]"),
    ],
)
def test_wrong_answers_are_errors(returned, message):
    with pytest.raises(RewardError, match=message):
        scored(lambda media: returned)


@pytest.mark.parametrize(
    ("media", "prompts", "group"),
    [
        (MEDIA[0], ["a"], None),
        (MEDIA[:, :1], PROMPTS, None),
        (MEDIA.to(torch.uint8), PROMPTS, None),
        (MEDIA.numpy(), PROMPTS, None),
        (MEDIA, ["a"], None),
        (MEDIA, PROMPTS, torch.zeros(2)),
    ],
)
def test_wrong_questions_are_errors(media, prompts, group):
    with pytest.raises(RewardError, match="'test': media"):
        scored(lambda media: [0.0] * 3, media, prompts, group)


def test_graph_is_kept_for_differentiable_rewards_only():
    media = MEDIA.clone().requires_grad_()
    loose = scored(lambda media: media.mean((1, 2, 3)), media)
    assert not loose.values.requires_grad
    tied = scored(lambda media: media.mean((1, 2, 3)), media, differentiable=True)
    tied.values.sum().backward()
    torch.testing.assert_close(media.grad, torch.full_like(media, 1 / 192))


def test_video_passes():
    assert scored(lambda media: media.mean((1, 2, 3, 4)), torch.ones(3, 2, 3, 8, 8)).values.tolist() == [1, 1, 1]


# -- settings -------------------------------------------------------------------------------------------------------


def test_settings_are_read_without_torch():
    code = """
        import sys, rewards
        kinds = rewards.kinds()
        assert {"clip", "mixture", "shapes"} <= set(kinds), kinds
        rewards.parse({"kind": "mixture", "parts": {"a": {"reward": {"kind": "clip"}}, "b": {"reward": "my.py:fn"}}})
        assert all(cls.__doc__ and cls.model_json_schema() for cls in kinds.values())
        heavy = {"torch", "numpy", "transformers"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def where(data):
    """(loc, message) of every complaint about ``data``."""
    with pytest.raises(ValidationError) as caught:
        rewards.parse(data)
    return [(".".join(map(str, error["loc"])), error["msg"]) for error in caught.value.errors()]


def test_parse():
    assert rewards.parse("shapes") == rewards.parse({"kind": "shapes"})
    settings = rewards.parse({"kind": "clip", "model": "x/y", "chunk": 4})
    assert isinstance(settings, ClipReward)
    assert rewards.parse(settings) is settings
    assert isinstance(rewards.parse({"kind": "a.b:c"}), CallableReward)


def test_parse_says_where_and_what():
    ((path, said),) = where({"kind": "clipp"})
    assert path == "kind"
    assert said.startswith("no such reward 'clipp'; did you mean 'clip'? There are clip, ")
    assert said.endswith(" more, which alignflow recipes lists, or package.module:name")
    assert len(said) < 300
    assert where({"path": "x"})[0][1].startswith("is missing; there are ")
    assert where(3)[0][1].startswith(
        "should be a mapping with a kind (adversarial, adversarial_pick_score, aesthetic, "
    )
    assert where({"kind": "clip", "bach": 3})[0][0] == "bach"
    assert where({"kind": "a:b", "weight": 3})[0][0] == "weight"
    deep = {
        "kind": "mixture",
        "parts": {"a": {"reward": {"kind": "clip", "chunk": 0}}, "b": {"reward": {"kind": "no"}}},
    }
    deep["parts"]["c"] = {"reward": "shapes", "wait": 1}
    deep["parts"]["d"] = {"reward": {"kind": "mixture", "parts": {"e": {"reward": {"kind": "clip", "x": 1}}}}}
    assert [loc for loc, _ in where(deep)] == [
        "parts.a.reward.chunk", "parts.b.reward.kind", "parts.c.wait", "parts.d.reward.parts.e.reward.x",
    ]  # fmt: skip
    assert where({"kind": "mixture", "parts": {}})[0][0] == "parts"


def test_nested_settings_are_written_out_in_full():
    settings = rewards.parse({"kind": "mixture", "parts": {"a": {"reward": {"kind": "clip", "chunk": 4}}}})
    plain = settings.model_dump(mode="json")
    assert plain["parts"]["a"]["reward"]["chunk"] == 4
    assert rewards.parse(plain) == settings

    class Holder(BaseModel):
        reward: rewards.AnyReward

    assert Holder(reward="shapes").model_dump()["reward"]["score"] == "dense"


# -- callables ------------------------------------------------------------------------------------------------------

CODE = '''
"""Rewards of a user."""
from __future__ import annotations
from dataclasses import dataclass
from rewards.base import Reward, RewardSettings

level = 3

def brightness(media, prompts, factor=1.0):
    return factor * media.mean((1, 2, 3))

def same(media, prompts, group):
    return [float((group == g).sum()) for g in group]

@dataclass
class Model:
    bias: float
    device: str = "nowhere"
    def __call__(self, media, prompts):
        return [self.bias + len(str(self.device))] * len(prompts)

class Silent:
    pass

class Plugin(RewardSettings):
    kind: str
    value: float
    def build(self, device="cpu"):
        return Reward("plugin", lambda media, prompts, group: [self.value] * len(prompts))
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_test.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("my_rewards_for_test", "alignflow_plugin_my_rewards_for_test"):
        sys.modules.pop(name, None)


def call(kind, media=MEDIA, group=None, **settings):
    return rewards.parse({"kind": kind, **settings}).build("cpu")(media, PROMPTS, group)


@pytest.mark.parametrize("place", ["my_rewards_for_test", "my_rewards_for_test.py", "./my_rewards_for_test.py"])
@pytest.mark.usefixtures("mine")
def test_callables(place):
    torch.testing.assert_close(call(f"{place}:brightness").values, MEDIA.mean((1, 2, 3)))
    doubled = call(f"{place}:brightness", options={"factor": 2.0}).values
    torch.testing.assert_close(doubled, 2 * MEDIA.mean((1, 2, 3)))
    assert call(f"{place}:same", group=torch.tensor([0, 1, 1])).values.tolist() == [1, 2, 2]
    assert call(f"{place}:Model", options={"bias": 1.0}).values.tolist() == [4, 4, 4]  # len("cpu") = 3
    assert call(f"{place}:Plugin", options={"value": 7}).values.tolist() == [7, 7, 7]


@pytest.mark.usefixtures("mine")
def test_callable_with_gradient_and_range():
    settings = {"kind": "my_rewards_for_test:brightness", "differentiable": True, "range": [0, 1]}
    reward = rewards.parse(settings).build()
    assert reward.range == (0, 1)
    assert reward.name == "brightness"
    media = MEDIA.clone().requires_grad_()
    reward(media, PROMPTS).values.sum().backward()
    assert media.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("no_such_module:fn", {}, r"cannot import 'no_such_module'.*path/to/file\.py:name"),
        ("no/such/file.py:fn", {}, r"no file no/such/file\.py"),
        ("my_rewards_for_test:nope", {}, r"has no 'nope'; it has .*brightness, same, Model"),
        ("my_rewards_for_test:level", {}, r"is a int, which cannot be called"),
        ("my_rewards_for_test:brightness", {"facto": 2}, r"is brightness\(media, prompts, factor=1.0\).*'facto'"),
        ("my_rewards_for_test:Model", {}, r"Model\(bias.*missing a required argument: 'bias'"),
        ("my_rewards_for_test:Silent", {}, r"is a Silent, which cannot be called"),
        ("collections:OrderedDict", {}, r"no signature found.*call it from your own function"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_callables_that_are_not(kind, options, message):
    with pytest.raises(RewardError, match=message):
        call(kind, options=options)


def test_callable_kinds_have_a_module_and_a_name():
    for kind in (":fn", "module:", "module:2x", "plain"):
        with pytest.raises(ConfigError, match=r"^kind \(CallableReward\): "):
            CallableReward(kind=kind)


@pytest.mark.usefixtures("mine")
def test_mixture_keeps_the_gradient():
    bright = {"kind": "my_rewards_for_test:brightness", "differentiable": True, "range": [0, 2]}
    reward = rewards.parse({"kind": "mixture", "parts": {
        "a": {"reward": bright, "weight": 4, "normalise": "range"}, "b": {"reward": bright}}}).build()  # fmt: skip
    assert reward.differentiable
    media = MEDIA.clone().requires_grad_()
    reward(media, PROMPTS).values.sum().backward()
    torch.testing.assert_close(media.grad, torch.full_like(media, 3 / 192))  # 4 / 2 + 1 per mean of 192 numbers


# -- the embedded world's verifier ----------------------------------------------------------------------------------


def test_verifier_prefers_the_right_image():
    from alignflow.worlds.shapes import world

    rng = np.random.default_rng(0)
    specs = world.sample_specs("train", 4, seed=0)
    captions = [world.caption(spec) for spec in specs]
    images = np.stack([world.render(world.sample_scene(spec, rng)) for spec in specs])
    media = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    reward = rewards.parse("shapes").build()
    right = reward(media, captions)
    assert right.values.tolist() == [1, 1, 1, 1]
    assert right.parts["strict"].tolist() == [1, 1, 1, 1]
    blank = reward(torch.zeros_like(media), captions)
    assert blank.values.max() < 0.5
    assert blank.parts["strict"].tolist() == [0, 0, 0, 0]
    strict = rewards.parse({"kind": "shapes", "score": "strict"}).build()
    assert strict(torch.zeros_like(media), captions).values.tolist() == [0, 0, 0, 0]
    swapped = reward(media, [captions[1], *captions[1:3], "not a caption of this world"])
    assert swapped.values[0] < 1
    assert set(swapped.reasons) == {3}
    assert swapped.parts["dense"][3].isnan()
    with pytest.raises(RewardError, match="got video"):
        reward(media[:, None], captions)
