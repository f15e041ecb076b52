"""Compare frozen weights in FP8 and in four bits with bfloat16 on real text and real weights, on one NVIDIA GPU (Hopper for FP8).

    finetune-accel run home-intents --to prepare
    python benchmarks/frozen_weights.py --rows RUN_DIR --model smollm2=MODEL_DIR --model gemma=MODEL_DIR

The engagement home-intents with its own settings, five seeds an arm, `--jobs` runs at once. 100 templates of the training rows are held
out besides the dev split (the test split is never opened here). What is scored is what would be served: the merged model. Differences are paired by item and seed; their intervals resample templates *and* seeds. For four bits 50 prompts
are also answered by the adapter on the four-bit base, and merged into the original weights. Writes frozen_weights.json.
"""
from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ARMS = ("plain", "fp8", "nf4")
HELD_OUT, QLORA_PROMPTS, RESAMPLES = 100, 50, 2000
CRITERIA = ({"metric": "json_valid"}, {"metric": "json_field", "field": "intent"}, {"metric": "exact_match"})


def rows_of(run_dir: Path) -> tuple[list[dict], list[dict]]:
    """Return training rows and held-out rows (dev and 100 training templates) of a run folder's prepare phase."""
    from finetune_accel.core.records import read_records

    folder = next(path.parent for path in sorted(Path(run_dir).rglob("train.parquet")))
    train, dev = (read_records(folder / f"{split}.parquet") for split in ("train", "dev"))
    held = set(random.Random(0).sample(sorted({row["group"] for row in train}), HELD_OUT))
    return [row for row in train if row["group"] not in held], dev + [row for row in train if row["group"] in held]


def answers(model, tokenizer, rows: list[dict], limit: int) -> list[str]:
    """Return the greedy answers to the rows' prompts."""
    from finetune_accel.core.generate import generate

    return [g.text for g in generate(model, tokenizer, [row["messages"][:-1] for row in rows], limit, batch_size=256)]


def scores_of(texts: list[str], rows: list[dict]) -> dict[str, list[float]]:
    """Return each criterion's scores of the answers."""
    from finetune_accel.core.criteria import Criterion
    from finetune_accel.core.metrics import score_all

    scored = score_all([Criterion(**criterion) for criterion in CRITERIA], texts, [row["response"] for row in rows])
    return {name: [float(value) for value in values] for name, values in scored.items()}


def run_one(args: argparse.Namespace) -> dict:
    """Train one arm with one seed and score it."""
    import torch

    from finetune_accel.core.asking import answer_limit
    from finetune_accel.core.generate import load_plain, ready_for_messages
    from finetune_accel.core.saving import merged_model, save_adapter
    from finetune_accel.core.template import encode_records
    from finetune_accel.core.training import TrainingPlan, train

    train_rows, held_out = rows_of(args.rows)
    folder, arm, seed = Path(args.folder), args.arm, args.seed
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, tokenizer = load_plain(folder, dtype)
    tokenizer = ready_for_messages(tokenizer)
    plan = TrainingPlan(seed=seed, max_steps=args.steps)
    plan = replace(plan, method="qlora") if arm == "nf4" else replace(plan, storage=arm)
    limit = answer_limit(tokenizer, train_rows)
    with tempfile.TemporaryDirectory() as scratch:
        tuned, outcome = train(model, tokenizer, encode_records(tokenizer, train_rows, "last"), plan, Path(scratch))
        record = {"arm": arm, "seed": seed, "steps": outcome.steps, "tokens_per_second": round(outcome.tokens_per_second), "loss":
                  [round(entry["loss"], 5) for entry in outcome.history if "loss" in entry]}
        save_adapter(tuned, tokenizer, "base", Path(scratch) / "adapter")
        few = held_out[::max(1, len(held_out) // QLORA_PROMPTS)][:QLORA_PROMPTS]
        if arm == "nf4":
            record["on four bits"] = answers(tuned, tokenizer, few, limit)
            record["merged into original"] = answers(merged_into_original(tuned, folder, Path(scratch)), tokenizer, few, limit)
        merged = merged_model(tuned, Path(scratch) / "adapter", folder).to(tuned.device)
        texts = answers(merged, tokenizer, held_out, limit)
    if arm == "nf4":
        record["merged into four bits written out"] = answers(merged, tokenizer, few, limit)
        record["references"] = [row["response"] for row in few]
    return record | {"scores": scores_of(texts, held_out), "groups": [row["group"] for row in held_out]}


def merged_into_original(tuned, folder: Path, scratch: Path):
    """Return the adapter merged into the original weights, whatever they were kept in for training."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").to(tuned.device)
    return PeftModel.from_pretrained(base, scratch / "adapter").merge_and_unload(safe_merge=True).eval()


def in_process(args: argparse.Namespace, name: str, folder: str, arm: str, seed: int) -> dict:
    """Run one arm in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, __file__, "--rows", str(args.rows), "--arm", arm, "--seed", str(seed), "--folder", folder, "--out", out.name]
        done = subprocess.run(command + (["--steps", str(args.steps)] if args.steps else []), capture_output=True, text=True)
        record = json.loads(Path(out.name).read_text()) if done.returncode == 0 else {"error": done.stderr[-1500:]}
    print({"model": name, "arm": arm, "seed": seed, **{key: record[key] for key in ("tokens_per_second", "error") if key in record}}, flush=True)
    return {"model": name, "arm": arm, "seed": seed} | record


def paired(runs: list[dict], arm: str) -> dict:
    """Return arm - plain for each criterion and for the mean loss, with 95 % intervals over resampled templates and seeds."""
    import numpy as np

    by = {(run["arm"], run["seed"]): run for run in runs if "error" not in run}
    seeds = sorted(seed for a, seed in by if a == arm and ("plain", seed) in by)
    if not seeds:
        return {}
    names, index = np.unique(by["plain", seeds[0]]["groups"], return_inverse=True)
    generator, result = np.random.default_rng(0), {"seeds": len(seeds), "items": len(index), "templates": len(names)}
    counts = np.bincount(index).astype(float)
    for criterion in by["plain", seeds[0]]["scores"]:
        sums = np.array([np.bincount(index, weights=np.subtract(by[arm, s]["scores"][criterion], by["plain", s]["scores"][criterion])) for s in seeds])
        draws = []
        for _ in range(RESAMPLES):
            templates = generator.multinomial(len(names), np.full(len(names), 1 / len(names)))
            chosen = generator.integers(len(seeds), size=len(seeds))
            draws.append((sums[chosen].mean(0) @ templates) / (counts @ templates))
        value, (low, high) = sums.mean(0).sum() / counts.sum(), np.quantile(draws, [0.025, 0.975])
        plain, other = (float(np.mean([np.mean(by[a, s]["scores"][criterion]) for s in seeds])) for a in ("plain", arm))
        result[criterion] = {"plain": round(plain, 4), arm: round(other, 4), "difference": round(float(value), 4), "low": round(float(low), 4),
                             "high": round(float(high), 4), "not worse by a point": bool(low > -0.01)}
    curves = np.array([np.subtract(by[arm, s]["loss"], by["plain", s]["loss"]) for s in seeds])
    plain_curve = np.mean([by["plain", s]["loss"] for s in seeds], axis=0)
    draws = [curves[generator.integers(len(seeds), size=len(seeds))].mean() for _ in range(RESAMPLES)]
    result["loss"] = {"mean difference": round(float(curves.mean()), 5), "low": round(float(np.quantile(draws, 0.025)), 5), "high":
                      round(float(np.quantile(draws, 0.975)), 5), "plain mean": round(float(plain_curve.mean()), 5),
                      "plain by tenth": [round(float(part.mean()), 4) for part in np.array_split(plain_curve, 10)],
                      f"{arm} by tenth": [round(float(part.mean()), 4) for part in np.array_split(plain_curve + curves.mean(0), 10)]}
    return result


def qlora_merges(runs: list[dict]) -> dict:
    """Return how the three ways to serve a QLoRA adapter agree, and how many of their answers are right."""
    ways = ("on four bits", "merged into original", "merged into four bits written out")
    done = [run for run in runs if run["arm"] == "nf4" and "error" not in run]
    total = sum(len(run["references"]) for run in done)
    if not total:
        return {}
    return {"prompts": total} | {way: {
        "right": sum(text == right for run in done for text, right in zip(run[way], run["references"], strict=True)),
        "same as on four bits": sum(a == b for run in done for a, b in zip(run[way], run[ways[0]], strict=True))} for way in ways}


def main() -> None:
    """Run one arm (`--arm`) or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="run folder of home-intents, or a folder with train.parquet and dev.parquet")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=5, help="runs at once")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, help="fewer training steps, to try the script")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    for internal in ("--arm", "--folder"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        Path(args.out).write_text(json.dumps(run_one(args)))
        return
    jobs = [(name, folder, arm, seed) for name, folder in (model.split("=", 1) for model in args.model)
            for seed in range(args.seeds) for arm in args.arms if arm != "nf4" or seed < 2]
    started = time.time()
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda job: in_process(args, *job), jobs))
    result = {"parameters": {"seeds": args.seeds, "jobs": args.jobs, "held_out_templates": HELD_OUT, "criteria": CRITERIA},
              "seconds": round(time.time() - started), "models": {}}
    for name in dict.fromkeys(job[0] for job in jobs):
        of_model = [run for run in runs if run["model"] == name]
        result["models"][name] = {arm: paired(of_model, arm) for arm in args.arms if arm != "plain"} | {"qlora": qlora_merges(of_model)}
    kept = [{key: run[key] for key in run if key not in ("groups",)} | {
        "scores": {name: sum(values) / len(values) for name, values in run.get("scores", {}).items()}} for run in runs]
    Path(args.out).write_text(json.dumps(result | {"runs": kept}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
