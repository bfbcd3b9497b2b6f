"""Reward servers for tests: one in a thread, one in a process that is started again when it dies, one that corrupts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import uvicorn

import rewards
from rewards.serving.server import create_app, serve


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def in_thread(settings: Any, port: int | None = None, **options: Any) -> Iterator[str]:
    """A server in this process; yields its address."""
    parsed = rewards.parse(settings)
    app = create_app(parsed, parsed.build(), **options)
    port = port or free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@contextlib.contextmanager
def page(make: Callable[[int], Any], token: str) -> Iterator[Any]:
    """A page of this machine in a thread; yields ``ask(path, body, **headers) -> (status, JSON or bytes)``."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(make(port), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)

    def ask(path: str, body: Any = None, token: str | None = token, **more: str) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", **{name.capitalize(): value for name, value in more.items()}}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request) as reply:
                content, ask.headers = reply.read(), reply.headers  # type: ignore[attr-defined]
                return reply.status, json.loads(content) if "json" in reply.headers["Content-Type"] else content
        except urllib.error.HTTPError as error:
            content = error.read()
            return error.code, json.loads(content) if "json" in error.headers["Content-Type"] else content

    yield ask
    server.should_exit = True
    thread.join(10)


@contextlib.contextmanager
def in_process(settings: str, folder: Path) -> Iterator[str]:
    """A server in a process of its own, forked again when it dies unless ``folder / "stay_down"`` is there."""
    code = "import sys, served; served.supervise(sys.argv[1], int(sys.argv[2]), sys.argv[3])"
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code, settings, str(port), str(folder)], env=environment)
    url = f"http://127.0.0.1:{port}"
    wait_for(url)
    yield url
    process.terminate()
    process.wait(10)


def wait_for(url: str, seconds: float = 120) -> None:
    """Until the server answers."""
    for _ in range(int(seconds / 0.05)):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.05)
    raise TimeoutError(url)


def supervise(settings: str, port: int, folder: str) -> None:
    """Serve in a child, and again when it has died; ``folder / "starts"`` grows a byte each time."""
    child, down = 0, Path(folder) / "stay_down"

    def stop(*_: Any) -> None:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    while True:
        while down.exists():
            time.sleep(0.02)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            serve(rewards.parse(settings), port=port, say=lambda line: None, window=0)
            os._exit(0)
        with (Path(folder) / "starts").open("ab") as file:
            file.write(b".")
        os.waitpid(child, 0)


@contextlib.contextmanager
def corrupting(url: str, mangle: Callable[[bytes], bytes], times: int) -> Iterator[tuple[str, list[int]]]:
    """A proxy before ``url`` that mangles the first replies to /score; yields its address and what it did."""
    done: list[int] = []

    class Proxy(BaseHTTPRequestHandler):
        def relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            try:
                with urllib.request.urlopen(urllib.request.Request(url + self.path, body, headers)) as reply:
                    content, kept = reply.read(), dict(reply.headers)
            except OSError:
                return  # the server's lost connection is passed on
            if self.path == "/score" and len(done) < times:
                content = mangle(content)
                done.append(len(content))
            self.send_response(200)
            for name, value in {**kept, "Content-Length": str(len(content))}.items():
                if name.lower() != "content-length" or value == str(len(content)):
                    self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):  # who asked may have given up
                self.wfile.write(content)

        do_GET = do_POST = relay  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", done
    server.shutdown()


def asked(app: Any, body: bytes, headers: dict[str, str] | None = None, path: str = "/score") -> tuple[int, bytes]:
    """(status, body) of a POST to an application in this process, without a socket."""
    sent: list[dict[str, Any]] = []

    async def exchange() -> None:
        answered = asyncio.Event()
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for part in parts:
                return part
            await answered.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        given = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "headers": given, "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80), "root_path": "",
        }  # fmt: skip
        await app(scope, receive, send)

    asyncio.run(exchange())
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@contextlib.contextmanager
def answering(*pieces: bytes, every: float = 0.0) -> Iterator[str]:
    """A server that answers each connection with ``pieces``, ``every`` seconds apart, and then says nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def talk(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.recv(1 << 16)
            for piece in pieces:
                connection.sendall(piece)
                if over.wait(every):
                    return
            over.wait()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    over.set()
    listener.shutdown(socket.SHUT_RDWR)  # wakes up who accepts
    listener.close()
