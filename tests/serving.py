"""A server in a process of its own, as `finetune-accel serve` starts it, for tests that talk to it over a real socket."""
from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

TOKEN = "a-token-for-this-test"
HELLO = [{"role": "user", "content": "turn on the lights"}]


@dataclass
class Server:
    """A running server: its process, address, the folders of its models by name, and the folder of its inference table."""

    process: subprocess.Popen
    url: str
    folders: dict[str, Path]
    table: Path | None
    log: Path
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {TOKEN}"})

    @property
    def name(self) -> str:
        """The first model's name."""
        return next(iter(self.folders))

    def client(self, **more) -> httpx.Client:
        """Return a client that sends the token."""
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=60, **more)

    def metric(self, line: str) -> float:
        """Return the value of the metric whose line begins with `line`, 0 if there is none."""
        text = httpx.get(f"{self.url}/metrics", headers=self.headers).text
        return sum(float(one.rsplit(" ", 1)[1]) for one in text.splitlines() if one.startswith(line))

    def writing(self) -> float:
        """Return how many answers are being written or wait for a place."""
        return self.metric("finetune_accel_answers_in_progress")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def running(folders: dict[str, Path], scratch: Path, *, token: str | None = TOKEN, table: bool = False, engine: str = "reference",
            before: str = "") -> Iterator[Server]:
    """Start `serve` on the first of `folders`, the others beside it, after the Python statements `before`; stop it at the end."""
    (_, first), *more = folders.items()
    port, log, rows = free_port(), scratch / "server.log", scratch / "table" if table else None
    environment = {key: value for key, value in os.environ.items() if key != "FINETUNE_ACCEL_TOKEN"} | {"OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"FINETUNE_ACCEL_TOKEN": token} if token else {}
    also = {name: str(folder) for name, folder in more}
    code = (f"{before}\nfrom finetune_accel.core.server import serve\n"
            f"serve({str(first)!r}, port={port}, engine={engine!r}, also={also!r}, table={str(rows) if rows else None!r})")
    with open(log, "w") as out:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=out, stderr=subprocess.STDOUT)
    server = Server(process, f"http://127.0.0.1:{port}", folders, rows, log)
    try:
        wait_until(lambda: ready(server), 120)
        yield server
    finally:
        process.kill()
        process.wait()


def ready(server: Server) -> bool:
    """Return whether the server answers /readyz; its end is an error."""
    assert server.process.poll() is None, server.log.read_text()[-3000:]
    try:
        return httpx.get(f"{server.url}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def wait_until(condition, seconds: float) -> None:
    """Return when `condition` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
