"""Compare the memory estimate of core.memory with measured peaks, each configuration in a process of its own.

    python benchmarks/memory.py --device cpu        (or cuda; --only NAME NAME for some of the configurations)

Random weights, three steps of core.training, on a GPU with two micro-batches a step. The measure is `torch.cuda.max_memory_allocated` on a
GPU and the peak of resident memory on a CPU. Writes benchmarks/memory_gpu.json or benchmarks/memory_cpu.json.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def shape(kind: str, vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, keys: int, head_dim: int, tied: bool) -> dict:
    """Return the configuration of a model of this shape."""
    return {"model_type": kind, "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": head_dim, "tie_word_embeddings": tied}


LLAMA_8B = shape("llama", 128256, 4096, 14336, 32, 32, 8, 128, False)
LLAMA_1B = shape("llama", 128256, 2048, 8192, 16, 32, 8, 64, True)
QWEN3_4B = shape("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True)
SMOL_135M = shape("llama", 49152, 576, 1536, 30, 9, 3, 64, True)
SMOL_60M = shape("llama", 16384, 512, 1408, 16, 8, 4, 64, True)
BF16, FP32 = {"dtype": "bfloat16", "base_weights": "bfloat16"}, {"dtype": "float32", "base_weights": "float32"}
FP8, NF4 = {"dtype": "bfloat16", "base_weights": "fp8"}, {"dtype": "bfloat16", "base_weights": "nf4"}

# tokens: of one row (a CPU computes one row a core at once)
CONFIGURATIONS = {
    "cuda": {
        "8b-lora-bf16-8k": dict(model=LLAMA_8B, method="lora", tokens=8192, **BF16),
        "8b-lora-fp8-12k": dict(model=LLAMA_8B, method="lora", tokens=12288, **FP8),
        "8b-lora-bf16-checkpointing-16k": dict(model=LLAMA_8B, method="lora", tokens=16384, checkpointing=True, **BF16),
        "8b-qlora-4k": dict(model=LLAMA_8B, method="qlora", tokens=4096, **NF4),
        "qwen3-4b-lora-bf16-8k": dict(model=QWEN3_4B, method="lora", tokens=8192, **BF16),
        "1b-full-bf16-8k": dict(model=LLAMA_1B, method="full", tokens=8192, **BF16),
        "1b-full-bf16-checkpointing-16k": dict(model=LLAMA_1B, method="full", tokens=16384, checkpointing=True, **BF16),
        "135m-lora-bf16-16k": dict(model=SMOL_135M, method="lora", tokens=16384, **BF16),
    },
    "cpu": {
        "135m-lora-bf16-512": dict(model=SMOL_135M, method="lora", tokens=512, **BF16),
        "135m-lora-fp32-512": dict(model=SMOL_135M, method="lora", tokens=512, **FP32),
        "135m-lora-fp32-1k": dict(model=SMOL_135M, method="lora", tokens=1024, **FP32),
        "135m-lora-fp32-checkpointing-1k": dict(model=SMOL_135M, method="lora", tokens=1024, checkpointing=True, **FP32),
        "135m-full-fp32-512": dict(model=SMOL_135M, method="full", tokens=512, **FP32),
        "60m-full-bf16-1k": dict(model=SMOL_60M, method="full", tokens=1024, **BF16),
        "60m-lora-bf16-2k": dict(model=SMOL_60M, method="lora", tokens=2048, **BF16),
        "60m-lora-fp32-1k": dict(model=SMOL_60M, method="lora", tokens=1024, **FP32),
    },
}
SAMPLE, STEPS, RANK = 256, 3, 16


def random_model(fields: dict, dtype, device: str):
    """Return a model of this shape with random weights, made on the device without the library's initialisation."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    fields = dict(fields)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
    model.tie_weights()
    return model


def any_tokenizer():
    """Return a tokenizer for the trainer, which asks for one and reads nothing with it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def measure(device: str, case: dict) -> dict:
    """Train three steps in this process: returns estimate and measured peak in GiB, and seconds."""
    import torch
    from filelock import FileLock
    from transformers import AutoConfig

    from finetune_accel.core.adapters import AdapterPlan
    from finetune_accel.core.memory import cpu_rows, estimate
    from finetune_accel.core.training import TrainingPlan, peak_memory_gib, train

    fields = dict(case["model"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    rows = cpu_rows() if device == "cpu" else 2  # a GPU's two come one after the other: the second adds to the first one's gradients
    batch, adapter = rows * case["tokens"] // SAMPLE, AdapterPlan(rank=RANK)
    guess = estimate(config, case["method"], case["tokens"], longest=SAMPLE, dtype=case["dtype"], base_weights=case["base_weights"],
                     adapter=adapter, checkpointing=case.get("checkpointing", False), device=device)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(3, config.vocab_size, (batch * STEPS, SAMPLE), generator=generator).tolist()
    samples = [{"input_ids": ids, "completion_mask": [1] * SAMPLE} for ids in numbers]
    if device == "cuda":
        turn = FileLock(Path(tempfile.gettempdir()) / "benchmark_memory.lock")
        turn.acquire()  # until the end of this function: one process at a time on the GPU
    started = time.perf_counter()
    model = random_model(case["model"], getattr(torch, case["dtype"]), device)
    storage = "fp8" if case["base_weights"] == "fp8" else "plain"
    plan = TrainingPlan(method=case["method"], adapter=adapter, storage=storage, batch_size=batch, max_steps=STEPS,
                        micro_batch_tokens=case["tokens"], checkpointing=case.get("checkpointing", False))
    with tempfile.TemporaryDirectory() as scratch:
        _, result = train(model, any_tokenizer(), samples, plan, Path(scratch))
    peak = peak_memory_gib()
    parts = {part: round(gib, 3) for part, gib in vars(guess).items()}
    return {"estimate_gib": round(guess.total, 3), "measured_gib": round(peak, 3), "ratio": round(guess.total / peak, 3),
            "halvings": result.halvings, "seconds": round(time.perf_counter() - started, 1), "parts": parts}


def describe(name: str, case: dict) -> dict:
    """Return what a configuration is, for the JSON file."""
    model = case["model"]
    return {"name": name, "shape": f"{model['model_type']} {model['hidden_size']}/{model['intermediate_size']} x {model['num_hidden_layers']}",
            **{key: value for key, value in case.items() if key != "model"}}


def in_its_own_process(device: str, name: str, case: dict) -> dict:
    """Measure one configuration in a new process and return what it found, or its last error line."""
    command = [sys.executable, __file__, "--device", device, "--case", json.dumps(case)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr.strip().splitlines()[-1:]}
    print(name, found, flush=True)
    return describe(name, case) | found


def main() -> None:
    """Measure each configuration in a process of its own and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(CONFIGURATIONS), default="cpu")
    parser.add_argument("--only", nargs="+", default=[], help="names of configurations; their results are printed and not written")
    parser.add_argument("--case", type=json.loads, help="a configuration as JSON, measured in this process (what the others are started with)")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.device, arguments.case)))
        return
    cases = {name: case for name, case in CONFIGURATIONS[arguments.device].items() if not arguments.only or name in arguments.only}
    with ThreadPoolExecutor(len(cases) if arguments.device == "cuda" else 1) as pool:  # for a GPU they import at once and train in turn
        results = list(pool.map(lambda named: in_its_own_process(arguments.device, *named), cases.items()))
    if not arguments.only:
        write_results(arguments.device, results)


def write_results(device: str, results: list[dict]) -> None:
    """Write benchmarks/memory_gpu.json or memory_cpu.json."""
    import torch

    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    ratios = [result["ratio"] for result in results if "ratio" in result]
    summary = {"device": where, "torch": torch.__version__, "measured": "max_memory_allocated" if device == "cuda" else "peak resident memory",
               "within_15_percent": sum(abs(ratio - 1) <= 0.15 for ratio in ratios), "of": len(results), "configurations": results}
    output = Path(__file__).with_name(f"memory_{'gpu' if device == 'cuda' else 'cpu'}.json")
    output.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
