"""Stand-ins for engines over HTTP: the routes that our clients use, over a real generator, and faults."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgpack
import torch
from safetensors.torch import load_file, save

from align.config.sampling import Sampler
from align.rollout.engine import boundaries
from align.rollout.paths import states_of
from align.rollout.rollout import decode_to_cpu, draw
from align.rollout.servers import SGLANG, Protocol
from generators.base import Generator


def description(protocol: Protocol = SGLANG, **changes: Any) -> dict[str, Any]:
    """``/openapi.json`` as FastAPI writes it.

    Args:
        changes: ``without`` names a field or route that is not there, ``replies`` the content type of samples,
            ``words`` what the descriptions of fields hold.
    """
    without, words = changes.get("without"), changes.get("words", "name or path")
    fields = {name: {"title": name, "description": words} for name in protocol.fields if name != without}
    reference = {"$ref": "#/components/schemas/RolloutRequest"}
    route = {
        "requestBody": {"content": {"application/json": {"schema": reference}}},
        "responses": {"200": {"content": {changes.get("replies", protocol.replies): {}}}},
    }
    paths = {protocol.path: {"post": route}, **{path: {} for path in protocol.others}}
    return {
        "paths": {path: value for path, value in paths.items() if path != without},
        "components": {"schemas": {"RolloutRequest": {"properties": fields}}},
    }


def wire(value: torch.Tensor) -> dict[str, Any]:
    """A tensor as the server sends it."""
    raw = save({"t": value.detach().cpu().contiguous()})
    return {"__tensor__": True, "data": raw, "shape": [*value.shape], "dtype": str(value.dtype)}


class Fake:
    """A server that answers requests by :meth:`routes`.

    Args:
        token: that requests must carry.
    """

    protocol = SGLANG

    def __init__(self, token: str | None = None) -> None:
        self.token, self.closed = token, False
        self.spec: Any = description(self.protocol)
        self.asked: list[tuple[str, Any]] = []
        self.faults: list[str] = []
        """Of the next samples; "" for none."""
        self.lock = threading.Lock()

    def routes(self, body: Any) -> dict[str, Callable[[], Any]]:
        """``METHOD path`` -> what makes the reply."""
        return {"GET /openapi.json": lambda: self.spec}

    def sent(self, found: Any, fault: str) -> tuple[str, bytes]:
        """(content type, body) of a sample."""
        raise NotImplementedError


class StandIn(Fake):
    """SGLang-diffusion's server.

    Args:
        generator: samples, without a LoRA; None = samples are constant.
    """

    def __init__(self, generator: Generator | None = None, token: str | None = None) -> None:
        super().__init__(token)
        self.generator = generator
        self.latents, self.media = (4, 2, 2), (3, 16, 16)
        self.loaded: dict[str, str] = {}  # network -> path
        self.weights = "base"
        self.deaf = False

    def routes(self, body: Any) -> dict[str, Callable[[], Any]]:
        return {
            **super().routes(body),
            "GET /v1/list_loras": self.list_loras,
            "POST /v1/set_lora": lambda: self.set_lora(body),
            "POST /v1/unmerge_lora_weights": self.restart,
            "POST /get_weights_checksum": lambda: self.checksum(body),
            f"POST {SGLANG.path}": lambda: self.sample(body),
        }

    def sent(self, found: Any, fault: str) -> tuple[str, bytes]:
        return getattr(Faults, fault)(self, found) if fault else (SGLANG.replies, msgpack.packb([found]))

    def set_lora(self, body: dict[str, Any]) -> dict[str, Any]:
        """Read a LoRA, unless it is in use."""
        path = Path(body["lora_path"])
        with self.lock:
            if not self.deaf and self.loaded.get(body["target"]) != str(path):
                self._read(path)
                self.loaded = {body["target"]: str(path)}
        return {"status": "ok", "message": "set"}

    def _read(self, path: Path) -> None:
        if not path.is_file():
            raise LookupError(f"Failed to set LoRA adapter: no file {path}")
        tensors = load_file(path)
        changes = any(bool(value.any()) for name, value in tensors.items() if ".lora_B." in name)
        self.weights = hashlib.sha256(path.read_bytes()).hexdigest() if changes else "base"
        if self.generator is not None:
            with contextlib.suppress(ValueError):
                self.generator.pipeline.unload_lora_weights()
            self.generator.pipeline.load_lora_weights(str(path.parent), weight_name=path.name)

    def restart(self) -> None:
        """Lose the LoRA."""
        self.loaded, self.weights = {}, "base"

    def list_loras(self) -> dict[str, Any]:
        active = {
            name: [{"nickname": "x", "path": path, "merged": True, "strength": 1.0}]
            for name, path in self.loaded.items()
        }
        return {"loaded_adapters": [], "active": active}

    def checksum(self, body: dict[str, Any]) -> dict[str, str]:
        return {name: hashlib.sha256(self.weights.encode()).hexdigest() for name in body["module_names"]}

    @torch.no_grad()
    def sample(self, body: dict[str, Any]) -> dict[str, Any]:
        """One sample as the server describes it."""
        steps = tuple(body["rollout_sde_step_indices"])
        count = body["num_inference_steps"]
        if self.generator is None:
            final, times = torch.full((1, *self.latents), 0.25), torch.linspace(1, 0, count + 1)
            media = torch.full((1, *self.media), 128, dtype=torch.uint8)
            known = {index: torch.full((1, *self.latents), float(index)) for index in boundaries(steps)}
        else:
            kind = {"sde": "flow_sde", "cps": "cps", "ode": "ode"}[body["rollout_sde_type"]]
            level = {} if kind == "ode" else {"noise_level": body["rollout_noise_level"]}
            sampler = Sampler(kind=kind, steps=count, guidance=body["guidance_scale"], **level)
            with self.lock:
                cond = self.generator.encode([body["prompt"]])
                final, path = draw(self.generator, cond, [body["seed"]], sampler, steps=steps, keep=bool(steps))
                media, _ = decode_to_cpu(self.generator, final, 1)
            times = self.generator.times(count)
            known = dict(zip(boundaries(steps), states_of(path).unbind(1), strict=True)) if path is not None else {}
        known[count] = final
        latents = torch.stack([known[index][0] for index in body["rollout_return_step_indices"]])
        return {
            "request_id": "r", "prompt": body["prompt"], "seed": body["seed"],
            "generated_output": wire(media[0].float() / 255),
            "rollout_log_probs": wire(torch.zeros(count)),
            "dit_trajectory": {"latents": wire(latents), "timesteps": None, "sigmas": wire(times.float())},
        }  # fmt: skip


class Faults:
    """What may be wrong with a reply: a function of the server and the sample -> (content type, body)."""

    @staticmethod
    def truncated(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        return SGLANG.replies, msgpack.packb([row])[:-9]

    @staticmethod
    def damaged(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        row["generated_output"]["data"] = row["generated_output"]["data"][:40]
        return SGLANG.replies, msgpack.packb([row])

    @staticmethod
    def pickled(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        row["dit_trajectory"]["latents"]["data"] = b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."
        return SGLANG.replies, msgpack.packb([row])

    @staticmethod
    def json(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        return "application/json", b"[]"

    @staticmethod
    def none(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        return SGLANG.replies, msgpack.packb([])

    @staticmethod
    def shape(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        row["dit_trajectory"]["latents"] = wire(torch.zeros(1, 4, 3, 3))
        return SGLANG.replies, msgpack.packb([row])

    @staticmethod
    def pixels(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        row["generated_output"] = wire(torch.full(server.media, -1.0))
        return SGLANG.replies, msgpack.packb([row])

    @staticmethod
    def nan(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        row["dit_trajectory"]["latents"] = wire(torch.full((1, *server.latents), torch.nan))
        return SGLANG.replies, msgpack.packb([row])

    @staticmethod
    def seed(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        return SGLANG.replies, msgpack.packb([row | {"seed": 5}])

    @staticmethod
    def prompt(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        return SGLANG.replies, msgpack.packb([row | {"prompt": "another"}])

    @staticmethod
    def grid(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        row["dit_trajectory"]["sigmas"] = wire(torch.tensor([1.0, 0.9, 0.8, 0.0]))
        return SGLANG.replies, msgpack.packb([row])

    @staticmethod
    def declared(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        row["generated_output"]["dtype"] = "torch.float64"
        return SGLANG.replies, msgpack.packb([row])

    @staticmethod
    def stale(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        server.restart()
        return SGLANG.replies, msgpack.packb([row])

    @staticmethod
    def swapped(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        server.weights = "others"  # by another client, which left the name of the LoRA as it was
        return SGLANG.replies, msgpack.packb([row])

    @staticmethod
    def slow(server: StandIn, row: dict[str, Any]) -> tuple[str, bytes]:
        time.sleep(1.0)
        return SGLANG.replies, msgpack.packb([row])


def _handler(server: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            server.asked.append((self.path, body))
            sample = self.path == server.protocol.path
            fault = server.faults.pop(0) if sample and server.faults else ""
            if server.closed or fault == "dead":
                self.connection.shutdown(socket.SHUT_RDWR)
            elif server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
                self._send(401, "application/json", b'{"error": "Unauthorized"}')
            elif (route := server.routes(body).get(f"{self.command} {self.path}")) is None:
                self._send(404, "application/json", b'{"detail": "Not Found"}')
            elif fault == "refused":
                self._send(400, "application/json", b'{"detail": "Invalid sampling params: width"}')
            else:
                self._reply(route, sample, fault)

        do_POST = do_GET  # noqa: N815

        def _reply(self, route: Callable[[], Any], sample: bool, fault: str) -> None:
            try:
                found = route()
            except LookupError as error:
                return self._send(500, "application/json", json.dumps({"detail": str(error)}).encode())
            plain = "application/json", json.dumps(found).encode() if not sample else b""
            return self._send(200, *(server.sent(found, fault) if sample else plain))

        def _send(self, status: int, kind: str, content: bytes) -> None:
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    return Handler


@contextlib.contextmanager
def serving(server: Fake) -> Iterator[str]:
    """The server in a thread; yields its address."""
    listener = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    listener.daemon_threads = True
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}"
    finally:
        server.closed = True
        listener.shutdown()
        listener.server_close()
