"""The client of SGLang-diffusion against a stand-in that speaks its protocol, and that misbehaves."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from tiny_run import settings
from torch import nn

pytest.importorskip("msgpack", reason="the client needs: pip install 'alignflow[sglang]'")

from standin import Faults, StandIn, description, serving

from align.checking.commands import examine
from align.config.engines import SglangEngine
from align.config.load import load_config
from align.config.sampling import Sampler
from align.rollout.engine import Order, Remote
from align.rollout.lora_folder import LoraFolder
from align.rollout.sglang_engine import Sglang
from align.training.trainer import train
from alignflow.errors import ConfigError, TrainingError

LATENTS = (4, 2, 2)
ORDER = Order(["a cat", "a dog"], [1, 2], [3, 4], ())


@pytest.fixture
def server() -> StandIn:
    return StandIn()


@pytest.fixture
def url(server: StandIn) -> Iterator[str]:
    with serving(server) as address:
        yield address


def weights(b: float = 0.5, a: float = 1.0) -> bytes:
    name = "pytorch_lora_weights.safetensors/transformer.blocks.0.attn.to_q.lora_{}.weight"
    return save({name.format("A"): torch.full((2, 4), a), name.format("B"): torch.full((4, 2), b)})


def stub(sampler: Sampler | None = None) -> tuple[Any, Any]:
    """A generator without a network, and the config of its run."""
    sampler = sampler or Sampler(kind="ode", steps=3)
    generator: Any = SimpleNamespace(
        network_calls=0, size=(16, 16), options=SimpleNamespace(negative_prompt=""), latent_shape=lambda: LATENTS,
        backbones=lambda: {"transformer": nn.Identity()}, times=lambda steps: torch.linspace(1, 0, steps + 1),
    )  # fmt: skip
    return generator, SimpleNamespace(rollout=SimpleNamespace(sampler=sampler, engine=None))


def remote(url: Any, folder: Path, sampler: Sampler | None = None, **changes: Any) -> tuple[Remote, Sglang]:
    quick = {"retries": 0, "backoff": 0.0, "timeout": 5.0, "start_timeout": 2.0}
    engine = SglangEngine(url=url, folder=str(folder), **{**quick, **changes})
    generator, config = stub(sampler)
    config.rollout.engine = engine
    made = Sglang(engine, config, generator)
    return Remote(made, generator, {}, engine.retries, engine.backoff), made


def asked(server: StandIn, path: str) -> list[Any]:
    return [body for route, body in server.asked if route == path]


# -- samples ----------------------------------------------------------------------------------------------------------


def test_a_rollout(server: StandIn, url: str, tmp_path: Path) -> None:
    made, _ = remote(url, tmp_path)
    [reply] = made([ORDER], weights())
    assert reply.lost == {}
    assert reply.seeds == [1, 2]
    assert reply.latents.shape == (2, *LATENTS)
    assert reply.latents.unique().tolist() == [0.25]
    assert reply.media.unique().tolist() == [128]
    assert made.generator.network_calls == 6
    assert made.take() == {"stale": 0, "wrong": 0, "lost": 0}
    first, second = asked(server, "/rollout/generate")
    assert (first["prompt"], first["seed"], second["prompt"], second["seed"]) == ("a cat", 1, "a dog", 2)
    assert (first["width"], first["height"], first["num_inference_steps"], first["guidance_scale"]) == (16, 16, 3, 1.0)
    assert (first["rollout_sde_type"], first["rollout_sde_step_indices"]) == ("ode", [])
    assert first["rollout_return_step_indices"] == [3]
    [lora] = asked(server, "/v1/set_lora")
    assert (lora["target"], lora["merge_mode"]) == ("transformer", "merge")
    assert lora["lora_path"] == str(tmp_path / made.policy / "pytorch_lora_weights.safetensors")
    assert load_file(lora["lora_path"]).keys() == {
        f"transformer.blocks.0.attn.to_q.lora_{part}.weight" for part in "AB"
    }
    assert len(asked(server, "/get_weights_checksum")) == 2  # before and after


def test_each_policy_is_a_file_and_the_oldest_go(server: StandIn, url: str, tmp_path: Path) -> None:
    made, _ = remote(url, tmp_path, checksum=False)
    policies = []
    for value in (0.1, 0.2, 0.3, 0.3):
        assert made([ORDER], weights(value))[0].lost == {}
        policies.append(made.policy)
    assert {path.name for path in tmp_path.iterdir()} == set(policies[1:])
    assert len(asked(server, "/v1/set_lora")) == 3  # the same policy is not sent again
    assert not asked(server, "/get_weights_checksum")


def test_steps_that_are_trained_return_with_the_sample(server: StandIn, url: str, tmp_path: Path) -> None:
    made, _ = remote(url, tmp_path, Sampler(kind="flow_sde", steps=3, noise_level=0.7))
    [reply] = made([Order(["a"], [2**40 + 7], [1], (0, 1), keep=True)], weights())
    assert reply.lost == {}
    assert reply.states is not None
    assert reply.states[0, :, 0, 0, 0].tolist() == [0, 1, 2]  # before and after both steps
    assert reply.latents.unique().tolist() == [0.25]
    [body] = asked(server, "/rollout/generate")
    assert body["seed"] == (2**40 + 7) % 2**31
    assert (body["rollout_sde_type"], body["rollout_noise_level"]) == ("sde", 0.7)
    assert (body["rollout_sde_step_indices"], body["rollout_return_step_indices"]) == ([0, 1], [0, 1, 2, 3])


def test_fields_of_ones_own_and_the_mounted_folder(server: StandIn, url: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.symlink_to(here)
    changes = {"folder_there": str(there), "request": {"true_cfg_scale": 4, "guidance_scale": 3.5}}
    with pytest.raises(TrainingError, match="a request to /rollout/generate has no field true_cfg_scale"):
        remote(url, here, **changes)
    server.spec["components"]["schemas"]["RolloutRequest"]["properties"]["true_cfg_scale"] = {}
    made, _ = remote(url, here, **changes)
    assert made([ORDER], weights())[0].lost == {}
    assert asked(server, "/v1/set_lora")[0]["lora_path"].startswith(str(there))
    body = asked(server, "/rollout/generate")[0]
    assert (body["true_cfg_scale"], body["guidance_scale"]) == (4, 3.5)


def test_several_servers_share_the_samples(tmp_path: Path) -> None:
    servers = [StandIn(), StandIn()]
    with serving(servers[0]) as first, serving(servers[1]) as second:
        made, _ = remote([first, second], tmp_path)
        order = Order(["a"] * 8, [*range(8)], [*range(8)], ())
        assert made([order], weights())[0].lost == {}
        servers[1].restart()
        assert made([order], weights(0.7))[0].lost == {}
    assert sum(len(asked(one, "/rollout/generate")) for one in servers) == 16
    assert all(len(asked(one, "/v1/set_lora")) == 2 for one in servers)


def test_the_folder_names_policies(tmp_path: Path) -> None:
    folder = LoraFolder(str(tmp_path), "/mnt/policies")
    folder.write(weights(), "abc")
    assert folder.paths("abc") == {"transformer": "/mnt/policies/abc/pytorch_lora_weights.safetensors"}
    assert folder.policy_of(folder.paths("abc")) == "abc"
    assert folder.policy_of({"transformer": None}) == ""
    assert folder.policy_of({"transformer": "/elsewhere/abc/pytorch_lora_weights.safetensors"}) == ""
    assert folder.changes
    folder.write(weights(b=0.0), "new")
    assert not folder.changes


# -- misbehaviour -----------------------------------------------------------------------------------------------------

WRONG = {
    "truncated": "incomplete input",
    "damaged": "the reply is not usable",
    "pickled": "the reply is not usable",
    "json": "it is application/json and not application/msgpack, so the server is another version",
    "none": "it does not hold one sample",
    "shape": r"the engine replied with latents \[1, 4, 3, 3\], not \[1, 4, 2, 2\]",
    "pixels": r"pixels are in \[-1.00, -1.00\], not in \[0, 1\]",
    "nan": "NaN or infinity in latents",
    "seed": "other seeds than it was given",
    "prompt": "it is the sample of another prompt",
    "grid": r"its times \[1.0, 0.9, 0.8, 0.0\] ... are not the generator's \[1.0, 0.667, 0.333, 0.0\]",
    "declared": "a tensor is torch.float32",
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_reply_is_counted_asked_again_and_then_lost(
    server: StandIn, url: str, tmp_path: Path, fault: str
) -> None:
    made, _ = remote(url, tmp_path, retries=1)
    server.faults = [fault, "", ""]
    assert made([ORDER], weights())[0].lost == {}
    assert made.take() == {"stale": 0, "wrong": 1, "lost": 0}
    server.faults = [fault, fault]
    reply = made([Order(["a"], [1], [2], ())], weights())[0]
    assert made.take() == {"stale": 0, "wrong": 2, "lost": 1}
    assert re.search(WRONG[fault] + r".*\(2 attempts\)", reply.lost[0]), reply.lost
    assert not reply.latents.any()


def test_every_fault_is_tested() -> None:
    assert {name for name in vars(Faults) if not name.startswith("_")} == {*WRONG, "stale", "swapped", "slow"}


def test_a_server_that_restarts_is_given_the_weights_again(server: StandIn, url: str, tmp_path: Path) -> None:
    made, _ = remote(url, tmp_path, retries=1)
    server.faults = ["stale"]
    assert made([ORDER], weights())[0].lost == {}
    assert made.take() == {"stale": 1, "wrong": 0, "lost": 0}
    assert len(asked(server, "/v1/set_lora")) == 2
    server.faults = ["stale"] * 9
    lost = made([Order(["a"], [1], [2], ())], weights())[0].lost
    assert "the engine sampled with weights , not" in lost[0]
    assert made.take() == {"stale": 2, "wrong": 0, "lost": 1}


def test_weights_that_change_under_the_same_name_cost_the_rollout(server: StandIn, url: str, tmp_path: Path) -> None:
    made, _ = remote(url, tmp_path)
    server.faults = ["", "swapped"]
    assert made([ORDER], weights())[0].lost == {}  # asked again as a whole, after the LoRA was sent again
    assert made.take() == {"stale": 2, "wrong": 0, "lost": 0}
    assert len(asked(server, "/rollout/generate")) == 4
    server.faults = ["", "swapped", "swapped", ""]
    lost = made([ORDER], weights(0.9))[0].lost
    assert lost.keys() == {0, 1}
    assert "the weights changed while it sampled" in lost[0]
    assert made.take() == {"stale": 4, "wrong": 0, "lost": 2}


def test_slow_dead_and_refusing_servers(server: StandIn, url: str, tmp_path: Path) -> None:
    made, _ = remote(url, tmp_path, timeout=0.3)
    begun = time.monotonic()
    for fault, says in (
        ("slow", "took more than 0.3 s"),
        ("dead", "cannot be reached"),
        ("refused", "Invalid sampling"),
    ):
        server.faults = [fault]
        lost = made([Order(["a"], [1], [2], ())], weights())[0].lost
        assert says in lost[0], lost
    assert time.monotonic() - begun < 5
    assert made.take() == {"stale": 0, "wrong": 0, "lost": 3}


def test_a_server_that_went_away(server: StandIn, tmp_path: Path) -> None:
    with serving(server) as url:
        made, _ = remote(url, tmp_path, retries=1)
        assert made([ORDER], weights())[0].lost == {}
    lost = made([ORDER], weights(0.8))[0].lost
    assert lost.keys() == {0, 1}
    assert "cannot be reached" in lost[0]


def test_loras_that_the_server_does_not_take(server: StandIn, url: str, tmp_path: Path) -> None:
    made, _ = remote(url, tmp_path, folder_there="/nowhere")
    assert "Failed to set LoRA adapter: no file /nowhere/" in made([ORDER], weights())[0].lost[0]
    server.deaf = True
    made, _ = remote(url, tmp_path)
    assert "accepted the policy's LoRA, but does not list it as active" in made([ORDER], weights())[0].lost[0]


def test_a_lora_without_effect_is_found(server: StandIn, url: str, tmp_path: Path, monkeypatch: Any) -> None:
    made, _ = remote(url, tmp_path)
    assert made([ORDER], weights(b=0.0))[0].lost == {}  # a new LoRA changes nothing
    taken = server.set_lora

    def unmatched(body: dict[str, Any]) -> dict[str, Any]:
        found = taken(body)
        server.weights = "base"
        return found

    monkeypatch.setattr(server, "set_lora", unmatched)
    assert "its layers have other names" in made([ORDER], weights())[0].lost[0]


def test_networks_that_the_server_does_not_know(server: StandIn, url: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(server, "checksum", lambda body: {"transformer": "not_found"})
    made, _ = remote(url, tmp_path)
    assert "no checksum of its weights: it has no network transformer" in made([ORDER], weights())[0].lost[0]


# -- the protocol, before any weights are loaded ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (description(without="rollout_sde_step_indices"), "has no field rollout_sde_step_indices"),
        (description(without="/rollout/generate"), "it has no /rollout/generate"),
        (description(without="/v1/list_loras"), "it has no /v1/list_loras"),
        (description(replies="application/json"), "does not reply in application/msgpack"),
        ({"paths": []}, "publishes no /openapi.json"),
        ([[[]]], "publishes no /openapi.json"),
    ],
)
def test_another_version_is_an_error(server: StandIn, url: str, tmp_path: Path, spec: Any, says: str) -> None:
    server.spec = spec
    with pytest.raises(TrainingError, match=f"does not have the API that this version uses: .*{says}"):
        remote(url, tmp_path)
    words = [f"rollout.engine={{kind: sglang, url: '{url}', folder: '{tmp_path}'}}"]
    with pytest.raises(ConfigError, match=rf"rollout.engine.url: http\S+ does not have the API .*{says}"):
        list(examine(Path("configs/shapes/nft.yaml"), words))


def test_check_says_whether_the_server_answers(server: StandIn, url: str, tmp_path: Path) -> None:
    words = f"rollout.engine={{kind: sglang, url: '{url}', folder: '{tmp_path}'}}"
    lines = "\n".join(examine(Path("configs/shapes/nft.yaml"), [words]))
    assert f"{url} has the API of sglang" in lines
    lines = "\n".join(examine(Path("configs/shapes/nft.yaml"), [words.replace(url, "http://127.0.0.1:9")]))
    assert "http://127.0.0.1:9 cannot be reached: Connection refused; it has to answer when the run starts" in lines


def test_a_run_ends_before_it_loads_weights(tmp_path: Path) -> None:
    engine = {"kind": "sglang", "url": "http://127.0.0.1:9", "folder": str(tmp_path)}
    config = settings(tmp_path, Path("no/such/model"), rollout={"engine": engine})
    with pytest.raises(TrainingError, match=r"cannot be reached.*start it with: sglang serve"):
        train(config)


def test_a_silent_server_costs_seconds(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        begun = time.monotonic()
        with pytest.raises(TrainingError, match=r"took more than 0.2 s"):
            remote(f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path, start_timeout=0.2)
    assert time.monotonic() - begun < 2


def test_the_token_is_sent_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "s3cret-of-the-engine"
    server = StandIn(token=secret)
    caplog.set_level(logging.DEBUG)
    with serving(server) as url:
        with pytest.raises(TrainingError, match=r"Unauthorized; set rollout.engine.token_env"):
            remote(url, tmp_path)
        with pytest.raises(TrainingError, match=r"environment variable ENGINE_KEY is not set"):
            remote(url, tmp_path, token_env="ENGINE_KEY")
        monkeypatch.setenv("ENGINE_KEY", secret)
        made, _ = remote(url, tmp_path, token_env="ENGINE_KEY", retries=1)
        monkeypatch.setattr(server, "set_lora", lambda body: (_ for _ in ()).throw(LookupError(f"bad key {secret}")))
        lost = made([ORDER], weights())[0].lost
    assert "bad key ***" in lost[0]
    assert secret not in caplog.text + str(lost)


def test_without_msgpack_the_command_that_installs_it(tmp_path: Path, url: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "msgpack", None)
    with pytest.raises(
        TrainingError, match=r"rollout.engine 'sglang' needs the package msgpack, .*pip install 'msgpack=="
    ):
        remote(url, tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rollout.sampler.kind=dpm2"], "sglang has no sampler dpm2: use one of ode, flow_sde, cps"),
        (
            ["rollout.sampler={kind: flow_sde}", "rollout.same_noise=true"],
            "samples cannot share the initial noise alone",
        ),
        (["rollout.engine.url=127.0.0.1"], "is not an address of a server"),
        (["rollout.engine.url=[]"], "url"),
        (["rollout.engine.checksums=false"], "checksum"),
    ],
)
def test_settings_that_are_refused(words: list[str], says: str) -> None:
    engine = "rollout.engine={kind: sglang, url: 'http://127.0.0.1:30000', folder: /tmp/policies}"
    with pytest.raises(ConfigError, match=says):
        load_config("configs/shapes/nft.yaml", [engine, *words])
