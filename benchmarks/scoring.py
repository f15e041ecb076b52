"""Rows and tokens a second of `finetune-accel score` beside a plain loop over transformers' pipeline, and its answers beside the server's.

    python benchmarks/scoring.py runs/home-intents              (20,000 rows: half an hour on two cores)
    python benchmarks/scoring.py runs/home-intents --rows 2000 --rounds 1

The rows are sentences of the stand-in, made by more draws a template than the run was trained with, so most of them are new. Every side answers
rows of the same shuffled list with the run's own model, greedily, at most 64 tokens, in a process of its own; sides alternate, figures are
medians, ratios are of medians. `loop` is `pipeline("text-generation")` as it comes, one conversation after the other, on few rows because it
takes so long. Loading the model is not counted on any side. Then all rows are scored once with the fastest engine, loading counted, and
`--equal` rows are asked from a server with the reference engine by 16 callers: each answer must be the table's. Writes benchmarks/scoring.json.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROWS_A_ROUND = {"loop": 30, "reference": 300, "openvino": 500, "openvino-bf16": 800}


def sentences(count: int) -> list[str]:
    """Return `count` different sentences in random order, always the same."""
    from finetune_accel.core.readers import open_source

    found: dict[str, None] = {}
    for per_template in (5, 10, 20, 40, 80):
        found = dict.fromkeys(row["prompt"] for block in open_source("pypi:home-assistant-intents", per_template=per_template).blocks()
                              for _, row in block.rows())
        if len(found) >= count:
            break
    return random.Random(17).sample(list(found), min(count, len(found)))


def loop(run: Path, prompts: list[str]) -> dict:
    """Answer `prompts` by a loop over transformers' pipeline."""
    from transformers import pipeline

    from finetune_accel.core.score_job import form_of
    from finetune_accel.core.targets import resolve_target

    system = [{"role": "system", "content": form_of(str(run)).system_prompt}]
    answer = pipeline("text-generation", model=str(resolve_target(str(run)).folder), device="cpu")
    answer([*system, {"role": "user", "content": "hello"}], max_new_tokens=2, do_sample=False)
    started, written, tokens = time.perf_counter(), [], 0
    for prompt in prompts:
        (reply,) = answer([*system, {"role": "user", "content": prompt}], max_new_tokens=64, do_sample=False)
        written.append(reply["generated_text"][-1]["content"])
    seconds = time.perf_counter() - started
    tokens = sum(len(answer.tokenizer(text)["input_ids"]) + 1 for text in written)
    return {"seconds": seconds, "tokens": tokens, "answers": dict(zip(prompts, written)), "dtype": str(answer.model.dtype)}


def ours(run: Path, engine: str, prompts: list[str]) -> dict:
    """Answer `prompts` as a scoring job with `engine` does, without its tables."""
    from finetune_accel.core.predictor import Predictor
    from finetune_accel.core.questions import question
    from finetune_accel.core.requests import TableParameters
    from finetune_accel.core.score_job import form_of

    predictor, form = Predictor(str(run), engine, TableParameters(max_tokens=64)), form_of(str(run))
    list(predictor.answers([("warm", predictor.ask(question({"prompt": "hello"}, form)))]))
    started = time.perf_counter()
    found = dict(predictor.answers((prompt, predictor.ask(question({"prompt": prompt}, form))) for prompt in prompts))
    seconds = time.perf_counter() - started
    predictor.close()
    return {"seconds": seconds, "tokens": sum(one.completion_tokens for one in found.values()), "answers": {key: one.text for key, one in found.items()}}


def side(run: Path, name: str, prompts: list[str]) -> dict:
    """Run a side in a process of its own and return what it found."""
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "asked.json", Path(folder) / "told.json"
        asked.write_text(json.dumps(prompts))
        subprocess.run([sys.executable, __file__, str(run), "--side", name, "--asked", str(asked), "--told", str(told)], check=True)
        return json.loads(told.read_text())


def whole(run: Path, prompts: list[str], engine: str, folder: Path) -> dict:
    """Score all rows by the command line and return rows, tokens and seconds of the command."""
    from deltalake import DeltaTable

    source, out = folder / "asked.jsonl", folder / f"answers-{engine}"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    command = [sys.executable, "-m", "finetune_accel.core.cli", "score", str(source), "--model", str(run), "--out", str(out), "--engine", engine]
    estimated = subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True).stdout.strip()
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    table = DeltaTable(str(out)).to_pandas()
    return {"engine": engine, "rows": len(table), "errors": int(table["error"].notna().sum()), "seconds": round(seconds, 1),
            "completion_tokens": int(table["completion_tokens"].sum()), "prompt_tokens": int(table["prompt_tokens"].sum()), "dry_run": estimated,
            "rows_per_second": round(len(table) / seconds, 2), "tokens_per_second": round(int(table["completion_tokens"].sum()) / seconds, 1)}


def equal_to_server(run: Path, prompts: list[str]) -> dict:
    """Ask the server, reference engine, by 16 callers what the scoring engine was asked; return how many answers are the same."""
    from concurrent.futures import ThreadPoolExecutor

    import httpx

    from finetune_accel.core.score_job import form_of
    from finetune_accel.serve import running_server

    mine, system = ours(run, "reference", prompts)["answers"], {"role": "system", "content": form_of(str(run)).system_prompt}
    with tempfile.TemporaryDirectory() as folder, running_server(run, "reference", Path(folder) / "log", 300) as url, \
            httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(16) as callers:
        replies = list(callers.map(lambda prompt: client.post("/v1/chat/completions", json={
            "messages": [system, {"role": "user", "content": prompt}], "max_tokens": 64}).json()["choices"][0]["message"]["content"], prompts))
    return {"asked": len(prompts), "equal": sum(mine[prompt] == reply for prompt, reply in zip(prompts, replies))}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--equal", type=int, default=500)
    parser.add_argument("--engines", nargs="+", default=["reference", "openvino", "openvino-bf16"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    for hidden in ("--side", "--asked", "--told"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    run = options.run.absolute()
    if options.side:
        prompts = json.loads(Path(options.asked).read_text())
        Path(options.told).write_text(json.dumps(loop(run, prompts) if options.side == "loop" else ours(run, options.side, prompts)))
        return
    prompts, sides = sentences(options.rows), ["loop", *options.engines]
    rounds: dict[str, list[dict]] = {name: [] for name in sides}
    for turn in range(options.rounds):
        for name in sides if turn % 2 == 0 else reversed(sides):
            first = turn * ROWS_A_ROUND[name] % len(prompts)
            found = side(run, name, prompts[first:first + ROWS_A_ROUND[name]])
            rows = len(found["answers"])
            rounds[name].append({"rows": rows, "seconds": round(found["seconds"], 2), "rows_per_second": round(rows / found["seconds"], 3),
                                 "tokens_per_second": round(found["tokens"] / found["seconds"], 2)} | ({"dtype": found["dtype"]} if "dtype" in found else {}))
            print(turn + 1, name, rounds[name][-1], flush=True)
    medians = {name: {key: statistics.median(one[key] for one in found) for key in ("rows_per_second", "tokens_per_second")} for name, found in rounds.items()}
    fastest = max(options.engines, key=lambda name: medians[name]["rows_per_second"])
    with tempfile.TemporaryDirectory() as folder:
        everything = whole(run, prompts, fastest, Path(folder))
    result = {"machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
              "versions": {name: version(name) for name in ("torch", "transformers", "openvino-genai", "deltalake")},
              "rounds": rounds, "medians": medians,
              "times_the_loop": {name: round(medians[name]["rows_per_second"] / medians["loop"]["rows_per_second"], 2) for name in options.engines},
              "whole": everything | {"times_the_loop": round(everything["rows_per_second"] / medians["loop"]["rows_per_second"], 2)},
              "equal_to_the_server": equal_to_server(run, prompts[:options.equal])}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("medians", "times_the_loop", "whole", "equal_to_the_server")}, indent=2))


if __name__ == "__main__":
    main()
