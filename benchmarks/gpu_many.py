"""Compare training on one GPU with training on two of the same machine: tokens a second, with the same work a GPU.

    python benchmarks/gpu_many.py                       (about three minutes; writes benchmarks/gpu_many.json)
    python benchmarks/gpu_many.py --only full-2-fsdp2 lora-2-fsdp2      (adds to the results of the others)

The two pieces of work of gpu_training.py: all parameters of the shape of Llama-3.2-1B, and LoRA on the shape of Llama-3.1-8B, random weights. A step
of two processes has twice the samples, so that each GPU computes as many rows of as many tokens as one alone does; what two do
beside it is to add up their gradients (ddp), or to gather each other's weights (fsdp2). Each side runs in fresh processes. `--shape tiny --tokens 512` is a test of this script
on the CPU, where two processes share its cores.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import gpu_training as one_gpu

SIDES = {  # name: (shape, processes, sharding, what the side needs to know)
    "full-1": ("1b", 1, None, {"tokens": 16384, "method": "full"}),
    "full-2": ("1b", 2, "ddp", {"tokens": 16384, "method": "full"}),
    "lora-1": ("8b", 1, None, {"tokens": 12288}),
    "lora-2": ("8b", 2, "ddp", {"tokens": 12288}),
    "full-2-fsdp2": ("1b", 2, "fsdp2", {"tokens": 16384, "method": "full"}),
    "lora-2-fsdp2": ("8b", 2, "fsdp2", {"tokens": 12288}),
}
FIRST = ("full-1", "full-2", "lora-1", "lora-2")


def measure(args: argparse.Namespace) -> None:
    """Be one process of a side; the first one writes what was measured."""
    shape, processes, sharding, settings = SIDES[args.side]
    settings = settings | ({"tokens": args.tokens} if args.tokens else {})
    make_trainer, rank = None, 0
    if processes > 1:
        from finetune_accel.core.group import join_group
        from finetune_accel.core.together import GroupTrainer, Heart

        group = join_group(sharding)
        assert group.size == processes, f"{group.size} processes, expected {processes}"
        make_trainer, rank = partial(GroupTrainer, group=group, heart=Heart(Path(args.out).with_suffix(f".rank-{group.rank}")), plain=None), group.rank
        settings |= {"sharded": sharding == "fsdp2"}
    measured = one_gpu.measure_ours(args.shape or shape, one_gpu.WARM_UP + args.steps, args.deadline, processes=processes, make_trainer=make_trainer, **settings)
    if rank == 0:
        Path(args.out).write_text(json.dumps(measured | {"settings": settings, "machine": one_gpu.machine()}))
    if processes > 1:
        import torch

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run_side(side: str, args: argparse.Namespace, folder: Path, limit: float) -> dict:
    """Measure one side in fresh processes, ended after `limit` seconds: returns its record, or its error."""
    shape, processes, sharding, _ = SIDES[side]
    out, log = folder / f"{side}.json", folder / f"{side}.log"
    launcher = ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
                "--local-addr=127.0.0.1"] if processes > 1 else []
    options = ["--side", side, "--steps", str(args.steps), "--deadline", str(time.time() + limit - 15), "--out", str(out)]
    options += ["--shape", args.shape] if args.shape else []
    options += ["--tokens", str(args.tokens)] if args.tokens else []
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    with open(log, "w") as stream:
        process = subprocess.Popen([sys.executable, *launcher, str(Path(__file__).resolve()), *options], cwd=folder, env=environment, stdout=stream,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ended = f"ended with {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            ended = f"took more than {limit:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    measured = json.loads(out.read_text()) if out.exists() else {"error": f"{ended}: {log.read_text()[-3000:].strip()}"}
    return {"side": side, "shape": args.shape or shape, "processes": processes, "sharding": sharding} | measured


def summarise(runs: list[dict]) -> dict:
    """Return for each side its speed, and how many times that of one GPU it is."""
    speed = {run["side"]: run["tokens_per_second"] for run in runs if "error" not in run}
    return {side: {"tokens_per_second": rate, "times_one": round(rate / speed[alone], 3) if (alone := side.split("-")[0] + "-1") in speed else None,
                   "peak_gib_a_gpu": next(run["peak_gib"] for run in runs if run["side"] == side)} for side, rate in speed.items()}


def compare(args: argparse.Namespace) -> dict:
    """Measure the sides one after the other while there is time, writing what is known after each."""
    deadline, out = time.time() + args.limit, Path(args.out)
    wanted = args.only or FIRST
    runs = [run for run in json.loads(out.read_text())["runs"] if run["side"] not in wanted] if args.only and out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for side in wanted:
            left = deadline - time.time()
            runs.append(run_side(side, args, Path(folder), left) if left > 30 else {"side": side, "error": f"not measured: {left:.0f} s were left"})
            print({key: value for key, value in runs[-1].items() if key not in ("machine", "settings")}, flush=True)
            result = {"parameters": {"steps": args.steps, "warm_up": one_gpu.WARM_UP, "rows_a_step_and_gpu": one_gpu.ROWS, "samples": one_gpu.SAMPLES},
                      "summary": summarise(runs), "runs": runs}
            out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    """Be one process of a side (`--side`), or run all and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SIDES, metavar="NAME", help=f"sides to measure, of: {', '.join(SIDES)}; default: {', '.join(FIRST)}")
    parser.add_argument("--steps", type=int, default=6, help="measured steps")
    parser.add_argument("--limit", type=float, default=230, help="seconds for all sides")
    parser.add_argument("--tokens", type=int, help="tokens a micro-batch, instead of each side's own")
    parser.add_argument("--shape", choices=one_gpu.SHAPES, help="instead of each side's own; tiny is for a test on the CPU")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return measure(args)
    print(f"{'side':16}{'tokens/s':>10}{'of one':>8}{'GiB':>8}")
    for side, row in compare(args)["summary"].items():
        print(f"{side:16}{row['tokens_per_second']:10,}{row['times_one'] or 0:8.2f}{row['peak_gib_a_gpu']:8.1f}")


if __name__ == "__main__":
    main()
