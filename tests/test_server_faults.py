"""What the server does when its engine dies or hangs, its readers are slow or leave, and when it is killed itself."""
from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time

import httpx
import psutil
import pytest
from deltalake import DeltaTable
from serving import HELLO, running, wait_until

LONG = {"messages": HELLO, "max_tokens": 900}
SHORT = {"messages": HELLO, "max_tokens": 4}


@pytest.fixture(scope="module")
def own(server, tmp_path_factory):
    """A server that may be hurt; a step that takes 3 seconds counts as stuck."""
    with running({"tuned": server.folders["tuned"]}, tmp_path_factory.mktemp("own"), token=None, table=True,
                 before="import finetune_accel.core.live as live; live.STUCK_SECONDS = 3.0") as started:
        yield started


def engine_of(server) -> psutil.Process:
    """Return the process in which the server's engine runs."""
    return next(child for child in psutil.Process(server.process.pid).children(recursive=True) if "spawn_main" in " ".join(child.cmdline()))


def memory(server) -> float:
    """Return the MiB that the server and its engine hold."""
    return sum(process.memory_info().rss for process in (psutil.Process(server.process.pid), engine_of(server))) / 2**20


def raw_request(server, body: dict) -> socket.socket:
    """Return a connection on which a request has been sent."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    return connection


def test_a_reader_that_never_reads_holds_nobody_up(own):
    slow = [raw_request(own, {**LONG, "stream": True, "logprobs": True, "top_logprobs": 20}) for _ in range(4)]
    started = time.monotonic()
    assert httpx.post(f"{own.url}/v1/chat/completions", json=SHORT, timeout=30).status_code == 200
    assert time.monotonic() - started < 10
    wait_until(lambda: not own.writing(), 60)  # what they do not read is written, and their places are free
    for connection in slow:
        connection.close()


def test_a_thousand_readers_leave(own):
    before = memory(own)
    expected = httpx.post(f"{own.url}/v1/chat/completions", json=SHORT).json()["choices"][0]["message"]["content"]
    for number in range(1000):
        connection = raw_request(own, {**LONG, "stream": number % 2 == 0})
        if number % 6 == 0:
            connection.recv(1)  # the answer has begun
        connection.close()
    wait_until(lambda: not own.writing(), 30)
    assert httpx.post(f"{own.url}/v1/chat/completions", json=SHORT).json()["choices"][0]["message"]["content"] == expected
    assert memory(own) < before + 150


def test_an_engine_that_hangs_and_one_that_dies(own):
    events, ended = [], threading.Event()

    def read_along():
        with httpx.stream("POST", f"{own.url}/v1/chat/completions", json={**LONG, "stream": True}, timeout=60) as response:
            events.extend(line for line in response.iter_lines() if line)
        ended.set()

    threading.Thread(target=read_along).start()
    wait_until(lambda: own.writing(), 10)
    engine = engine_of(own)
    engine.suspend()
    wait_until(lambda: httpx.get(f"{own.url}/healthz").status_code == 503, 10)
    assert "no step for" in httpx.get(f"{own.url}/healthz").json()["status"] and httpx.get(f"{own.url}/ping").status_code == 503
    assert ended.wait(10), "who waits is told"
    assert "error" in json.loads(events[-1].removeprefix("data: ")) and "data: [DONE]" not in events
    assert httpx.post(f"{own.url}/v1/chat/completions", json=SHORT).status_code == 503
    assert own.metric("finetune_accel_engine_up") == 0
    engine.resume()
    wait_until(lambda: httpx.get(f"{own.url}/healthz").status_code == 200, 10)
    assert httpx.post(f"{own.url}/v1/chat/completions", json=SHORT).status_code == 200
    engine.kill()
    wait_until(lambda: httpx.post(f"{own.url}/v1/chat/completions", json=SHORT).status_code == 503, 10)
    assert httpx.get(f"{own.url}/healthz").status_code == httpx.get(f"{own.url}/readyz").status_code == 503


def test_killed_under_load_callers_see_it_no_engine_stays_and_the_table_is_whole(server, tmp_path):
    with running({"tuned": server.folders["tuned"]}, tmp_path, token=None, table=True) as victim:
        first = httpx.post(f"{victim.url}/v1/chat/completions", json=SHORT)
        wait_until(lambda: victim.metric('finetune_accel_inference_table_rows_total{fate="written"}') >= 1, 20)
        engine = engine_of(victim)

        async def crowd():
            async with httpx.AsyncClient(base_url=victim.url, timeout=30) as client:
                asked = [asyncio.create_task(client.post("/v1/chat/completions", json=LONG)) for _ in range(16)]
                await asyncio.sleep(1)
                os.kill(victim.process.pid, signal.SIGKILL)
                return await asyncio.gather(*asked, return_exceptions=True)

        assert all(isinstance(answer, httpx.TransportError) for answer in asyncio.run(crowd())), "nobody takes a part for the whole"
        wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 20)
        rows = DeltaTable(victim.table).to_pyarrow_table().to_pylist()
        assert first.headers["x-request-id"] in {row["databricks_request_id"] for row in rows}
