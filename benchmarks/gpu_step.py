"""Show where the time of one row goes on an NVIDIA GPU: its kernels by time, and tokens a second without the profiler.

    python benchmarks/gpu_step.py                      (LoRA of the 8B shape of gpu_training.py, frozen weights in FP8)
    python benchmarks/gpu_step.py --storage plain

Random weights and samples as in benchmarks/gpu_training.py; forward and backward pass of full rows, without the optimiser, which takes no
time that could be seen. `--shape tiny --storage plain` is a test of this script on the CPU.
"""
from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from gpu_training import ALPHA, RANK, SHAPES, machine, random_model, token_rows
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from finetune_accel.core.adapters import AdapterPlan
from finetune_accel.core.fast_layers import fast_layers
from finetune_accel.core.packing import rows_of_step
from finetune_accel.core.training import TrainingPlan, add_gradients, trainable

WARM_UP, MEASURED = 3, 6  # rows


def full_rows(tokens: int) -> list[list[dict]]:
    """Return WARM_UP + MEASURED rows of whole samples, each nearly of `tokens` tokens."""
    samples = [{"input_ids": row, "labels": row} for row in token_rows()]
    rows = rows_of_step(samples[: 2 * (WARM_UP + MEASURED) * tokens // 250], tokens)
    return rows[: WARM_UP + MEASURED]


def measure(shape: str, storage: str, tokens: int) -> dict:
    """Return the speed of MEASURED rows, and what the kernels of one take."""
    cuda = torch.cuda.is_available()
    wait = torch.cuda.synchronize if cuda else lambda: None
    model = random_model(shape)
    trained = trainable(model, TrainingPlan(adapter=AdapterPlan(RANK, ALPHA), storage=storage)).train()
    rows = full_rows(tokens)
    counts = [sum(len(sample["input_ids"]) for sample in row) for row in rows]
    with fast_layers(model):
        add_gradients(trained, rows[:WARM_UP], sum(counts))
        wait()
        started = time.perf_counter()
        add_gradients(trained, rows[WARM_UP:], sum(counts))
        wait()
        seconds = time.perf_counter() - started
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
            add_gradients(trained, rows[WARM_UP:][:1], sum(counts))
            wait()
    kernels = defaultdict(lambda: [0, 0.0])
    for event in profiler.events():
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU):
            kernel = kernels[event.name[:80]]
            kernel[0] += 1
            kernel[1] += (event.device_time if cuda else event.self_cpu_time_total) / 1e3
    return {"shape": shape, "storage": storage, "tokens_a_row": counts[WARM_UP:], "tokens_per_second": round(sum(counts[WARM_UP:]) / seconds),
            "milliseconds_a_row": round(1e3 * seconds / MEASURED, 1), "kernel_milliseconds": round(sum(ms for _, ms in kernels.values()), 1),
            "kernels": {name: {"calls": calls, "milliseconds": round(ms, 2)}
                        for name, (calls, ms) in sorted(kernels.items(), key=lambda item: -item[1][1])[:30]}, "machine": machine()}


def main() -> None:
    """Measure, print and add the result to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--storage", choices=["plain", "fp8", "nf4"], default="fp8")
    parser.add_argument("--tokens", type=int, default=16384, help="of a row")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    args = parser.parse_args()
    result, out = measure(args.shape, args.storage, args.tokens), Path(args.out)
    known = json.loads(out.read_text()) if out.exists() else {"runs": []}
    out.write_text(json.dumps(known | {"runs": [*known["runs"], result]}, indent=2) + "\n")
    print(f"{result['tokens_per_second']:,} tokens/s, {result['milliseconds_a_row']} ms a row, of one row's kernels {result['kernel_milliseconds']} ms:")
    for name, kernel in result["kernels"].items():
        print(f"{kernel['milliseconds']:9.2f} ms {kernel['calls']:6} x  {name}")


if __name__ == "__main__":
    main()
