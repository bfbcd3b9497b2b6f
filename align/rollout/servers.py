"""Servers of an HTTP engine: requests, the meaning of refusals, and comparison of their API. No torch.

Servers made with FastAPI describe their routes in ``/openapi.json``. It is read before any weights are loaded, so that
a server of another kind or version is an error in seconds.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignflow.errors import AlignflowError, Problem, TrainingError
from alignflow.lazy import lazy
from rewards.base import RewardError, resolved
from rewards.serving.dispatch import UnansweredError

if TYPE_CHECKING:
    from align.config.engines import HttpEngine
    from align.config.settings import Config
    from rewards.serving import fetch
else:
    fetch = lazy("rewards.serving.fetch")

LARGEST = 2 << 30
"""Bytes of a reply: a video and the latents of its steps, as float32."""
SEEDS = 2**31
"""Seeds of a request are below it, as those of the engines' other clients."""


class OtherProtocolError(AlignflowError):
    """A server with another API than the engine's, or another version of it."""

    exit_code = 1


@dataclass(frozen=True)
class Protocol:
    """The part of a server's description that an engine needs.

    Args:
        path: route of the samples.
        fields: fields of its request that must be there.
        replies: content type of its reply.
        others: further routes.
        words: field -> word that its description must hold.
        start: how such a server is started.
    """

    path: str
    fields: Sequence[str]
    replies: str
    others: Sequence[str]
    start: str
    words: Mapping[str, str] | None = None


SGLANG = Protocol(
    path="/rollout/generate",
    fields=(
        "prompt", "negative_prompt", "seed", "generator_device", "width", "height", "num_frames", "num_inference_steps",
        "num_outputs_per_prompt", "guidance_scale", "rollout", "rollout_sde_type", "rollout_noise_level",
        "rollout_log_prob_no_const", "rollout_debug_mode", "rollout_return_dit_trajectory", "rollout_sde_step_indices",
        "rollout_return_step_indices",
    ),
    replies="application/msgpack",
    others=("/v1/set_lora", "/v1/unmerge_lora_weights", "/v1/list_loras", "/get_weights_checksum"),
    start="sglang serve --model-path MODEL --port 30000",
)  # fmt: skip
VLLM_OMNI = Protocol(
    path="/v1/images/generations",
    fields=(
        "prompt", "n", "size", "response_format", "negative_prompt", "num_inference_steps", "guidance_scale", "seed",
        "lora",
    ),
    replies="application/json",
    others=(),
    start="vllm serve MODEL --omni --port 8000",
    words={"lora": "path"},
)  # fmt: skip
PROTOCOLS = {"sglang": SGLANG, "vllm_omni": VLLM_OMNI}
"""Kind of engine -> protocol."""


class Server:
    """One server.

    Args:
        url: its address, without a slash at the end.
    """

    def __init__(self, url: str, settings: HttpEngine) -> None:
        try:
            self.base = resolved(url, "rollout.engine.url").rstrip("/")
            self.url = fetch.address(self.base)
            self.session = fetch.open_session(self.url, settings.parallel + 1, settings.token_env)
        except RewardError as error:
            raise TrainingError(str(error)) from None
        self.policy, self.checksum, self.plain = "", "", ""
        """Digest of its policy, SHA-256 of its weights with that policy, and without any LoRA."""
        self.changed = False
        """Whether something else than this program changed its weights since they were given to it."""
        self.lock = threading.Lock()

    def call(self, method: str, path: str, timeout: float, body: Any = None) -> tuple[str, bytes]:
        """(content type, body) of a good reply.

        Args:
            body: sent as JSON.

        Raises:
            UnansweredError: there is none.
        """
        url = self.base + path
        reply, content = fetch.fetch(self.session, method, url, timeout, largest=LARGEST, json=body)
        if reply.status_code != 200:
            raise self._refused(path, reply.status_code, content)
        return reply.headers.get("Content-Type", ""), content

    def json(self, method: str, path: str, timeout: float, body: Any = None) -> dict[str, Any]:
        """The mapping of a good JSON reply; raises UnansweredError where there is none."""
        _, content = self.call(method, path, timeout, body)
        found = _json(content)
        if not isinstance(found, dict):
            raise UnansweredError(f"{self.url}{path} did not reply with a JSON object")
        return found

    def readable(self, text: object) -> str:
        """Text of the server for people."""
        return fetch.readable(self.session, text)

    def _refused(self, path: str, status: int, content: bytes) -> UnansweredError:
        said = self.readable(_detail(_json(content)) or f"HTTP status {status}")
        if status in (401, 403):
            said += "; set rollout.engine.token_env to the environment variable that holds the server's token"
        if status == 404:
            said = f"there is no {path} at this address"
        return UnansweredError(f"{self.url}: {said}", again=status in (408, 409, 429) or status >= 500)


class Servers:
    """The servers of an engine; each request goes to one that has fewer than ``parallel``."""

    def __init__(self, settings: HttpEngine) -> None:
        self.all = [Server(url, settings) for url in settings.urls]
        self.idle: queue.Queue[Server] = queue.Queue()
        self.room = settings.parallel * len(self.all)
        for _ in range(settings.parallel):
            for server in self.all:
                self.idle.put(server)

    def __len__(self) -> int:
        """Concurrent requests."""
        return self.room

    @contextmanager
    def one(self) -> Iterator[Server]:
        """The next server that is free."""
        server = self.idle.get()
        try:
            yield server
        finally:
            self.idle.put(server)


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _detail(found: Any) -> Any:
    """The sentence of an error reply: FastAPI's ``detail``, OpenAI's ``error.message`` or SGLang's ``message``."""
    if not isinstance(found, dict):
        return None
    error = found.get("error")
    inner = error.get("message") if isinstance(error, dict) else error
    return found.get("detail") or inner or found.get("message")


# -- the protocol -----------------------------------------------------------------------------------------------------


def greet(config: Config) -> None:
    """Compare the API of every HTTP server of ``rollout.engine`` with the one that its client was written for.

    Raises:
        TrainingError: a server does not answer in time, or its API differs.
    """
    for settings, _, error in _answers(config):
        if error is not None:
            start = f"; start it with: {PROTOCOLS[settings.kind].start}"
            hint = start if isinstance(error, UnansweredError) and error.again else ""
            raise TrainingError(f"rollout.engine '{settings.kind}': {error}{hint}")


def found_out(config: Config) -> tuple[list[tuple[str, str]], list[Problem]]:
    """Lines for the report of ``check``, and problems. A server that is not there yet may start after the check."""
    lines, problems = [], []
    for settings, url, error in _answers(config):
        if isinstance(error, OtherProtocolError):
            problems.append(Problem("rollout.engine.url", str(error)))
        elif error is not None:
            lines.append(("engine", f"{error}; it has to answer when the run starts"))
        else:
            lines.append(("engine", f"{url} has the API of {settings.kind}"))
    return lines, problems


def _answers(config: Config) -> list[tuple[Any, str, AlignflowError | None]]:
    """Settings, address and fault of every server, all of which are asked at once."""
    settings: Any = getattr(config.rollout, "engine", None)
    if settings is None or settings.kind not in PROTOCOLS:
        return []

    def answer(url: str) -> tuple[Any, str, AlignflowError | None]:
        try:
            ask_protocol(Server(url, settings), PROTOCOLS[settings.kind], settings.start_timeout, settings.request)
        except (UnansweredError, OtherProtocolError, TrainingError) as error:
            return settings, fetch.address(url), error
        return settings, fetch.address(url), None

    with ThreadPoolExecutor(min(len(settings.urls), 64)) as pool:
        return list(pool.map(answer, settings.urls))


def ask_protocol(server: Server, protocol: Protocol, timeout: float, more: Iterable[str] = ()) -> None:
    """Compare the server's description with what the engine needs.

    Args:
        more: fields that requests have besides.

    Raises:
        UnansweredError: no answer.
        OtherProtocolError: routes, fields or the reply differ.
    """
    try:
        _, content = server.call("GET", "/openapi.json", timeout)
    except UnansweredError as error:
        if error.again or "there is no /openapi.json" not in str(error):
            raise
        content = b""
    difference = next(_differences(_json(content), protocol, (*protocol.fields, *more)), None)
    if difference:
        said = f"{server.url} does not have the API that this version uses: {difference}"
        raise OtherProtocolError(f"{said}; it should be started with: {protocol.start}")


def _differences(spec: Any, protocol: Protocol, fields: Sequence[str]) -> Iterator[str]:
    paths = spec.get("paths") if isinstance(spec, dict) else None
    if not isinstance(paths, dict):
        yield "it publishes no /openapi.json"
        return
    missing = [path for path in (protocol.path, *protocol.others) if path not in paths]
    if missing:
        yield f"it has no {missing[0]}"
        return
    route = _at(spec, "paths", protocol.path, "post")
    schema = _at(route, "requestBody", "content", "application/json", "schema")
    known = _at(spec, "components", "schemas", str(_at(schema, "$ref")).rpartition("/")[2], "properties")
    known = known if isinstance(known, dict) else {}
    if lacking := [name for name in fields if name not in known]:
        yield f"a request to {protocol.path} has no field {', '.join(lacking[:3])}"
    for name, word in (protocol.words or {}).items():
        if word not in str(_at(known, name)):
            yield f"the field {name} of {protocol.path} has no {word}"
    content = _at(route, "responses", "200", "content")
    if not isinstance(content, dict) or protocol.replies not in content:
        yield f"{protocol.path} does not reply in {protocol.replies}"


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
