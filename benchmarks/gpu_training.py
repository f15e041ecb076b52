"""Compare training speed on one NVIDIA GPU with TRL and Unsloth: as they come and at their best, on the same random samples.

    pip install --target /opt/unsloth unsloth xformers         (a folder of its own: its versions of the others are not ours)
    python benchmarks/gpu_training.py --unsloth-path /opt/unsloth
    python benchmarks/gpu_training.py --only lora-ours lora-ours-fp8     (adds to the results of the others in --out)

Two pieces of work with random weights in bfloat16, built on the device, as speed does not depend on what they say: LoRA
(rank 16, all linear layers) of the shape of Llama-3.1-8B, and all parameters of the shape of Llama-3.2-1B. Samples have
lognormal lengths (mean 280 tokens, at most 2,048), and every token bears loss. Each side runs in a process of its own; its
first steps are discarded, and tokens are real ones, without padding. Give Unsloth xformers or FlashAttention
that can be loaded (it says so when it is imported). A side that fails is recorded with its error. MFU is
tokens/s x operations a token (4 a weight with adapters, 6 where all are trained, embedding left out) / the rate of an
8192 x 8192 x 8192 bfloat16 product, the best measured before any side. `--shape tiny` is a test of this script on the CPU.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1"}

SHAPES = {  # Llama-3.1-8B, Llama-3.2-1B, and one for a CPU
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "vocab_size": 128256, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 1024},
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
SAMPLES, WORDS, MAX_LENGTH = 6000, 1000, 4096
ROWS = 4  # of ours a step, so that most are full
WARM_UP = 3

PACKED = {"packing": True, "max_length": MAX_LENGTH}
TRL_BEST = PACKED | {"per_device_train_batch_size": 4, "use_liger_kernel": True, "dataloader_num_workers": 2}
SIDES = {  # name: (who, shape, what the side needs to know)
    "lora-ours": ("ours", "8b", {"tokens": 12288}),
    "lora-ours-fp8": ("ours", "8b", {"tokens": 16384, "storage": "fp8"}),
    "lora-ours-nf4": ("ours", "8b", {"tokens": 12288, "method": "qlora"}),
    "lora-ours-checkpointing": ("ours", "8b", {"tokens": 16384, "checkpointing": True}),
    "lora-trl": ("trl", "8b", {"attention": "sdpa", "per_device_train_batch_size": 8}),
    "lora-trl-best": ("trl", "8b", {"attention": "flex_attention"} | TRL_BEST),
    "lora-unsloth-best": ("unsloth", "8b", {"rows": 2, "checkpointing": False}),
    "lora-unsloth-checkpointing": ("unsloth", "8b", {"rows": 4, "checkpointing": "unsloth"}),
    "full-ours": ("ours", "1b", {"tokens": 16384, "method": "full"}),
    "full-trl": ("trl", "1b", {"attention": "sdpa", "method": "full", "per_device_train_batch_size": 8}),
    "full-trl-best": ("trl", "1b", {"attention": "flex_attention", "method": "full", "gradient_checkpointing": False} | TRL_BEST),
}


def token_rows() -> list[list[int]]:
    """Return the samples: random words, of lengths that are the same on every machine."""
    rng = random.Random(0)
    lengths = [min(2048, max(24, int(rng.lognormvariate(5.3, 0.8)))) for _ in range(SAMPLES)]
    return [[rng.randrange(WORDS) for _ in range(length)] for length in lengths]


def word_tokenizer():
    """Return a tokenizer of as many words as samples are made of."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(WORDS)} | {"<pad>": WORDS, "<eos>": WORDS + 1, "<bos>": WORDS + 2}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>",
                                   eos_token="<eos>", bos_token="<bos>", unk_token="<pad>")


def random_model(shape: str, attention: str = "sdpa"):
    """Build a Llama model of `shape` on the device: bfloat16 on a GPU, float32 on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
                         pad_token_id=WORDS, eos_token_id=WORDS + 1, bos_token_id=WORDS + 2, **SHAPES[shape])
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    finally:
        torch.set_default_dtype(torch.float32)


def matmul_teraflops() -> float:
    """Measure a large matrix product in the dtype that is trained in: returns 10^12 operations a second."""
    import torch

    cuda = torch.cuda.is_available()
    size, wait = (8192, torch.cuda.synchronize) if cuda else (512, lambda: None)
    left, right = (torch.randn(size, size, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32) for _ in range(2))
    for _ in range(5):
        left @ right
    wait()
    started = time.perf_counter()
    for _ in range(20):
        left @ right
    wait()
    return 2 * size**3 * 20 / (time.perf_counter() - started) / 1e12


class StepClock:
    """Tokens, seconds and loss of each step of a trainer; begins when the trainer is about to be built.

    The GPU is waited for at the end of each step. Training is stopped when `deadline` (a time.time()) is near.
    """

    def __init__(self, deadline: float):
        import psutil
        import torch

        self.cuda, self.deadline, self.process_started = torch.cuda.is_available(), deadline, psutil.Process().create_time()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.tokens, self.ends, self.losses, self.started = [], [], [], time.time()
        self.micro_batches, self.counted = [], 0  # a step may have several: Unsloth has two unless told otherwise

    def as_callback(self):
        """Return the TrainerCallback that records."""
        import torch
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if clock.cuda:
                    torch.cuda.synchronize()
                clock.ends.append(time.time())
                if clock.micro_batches:
                    clock.tokens.append(sum(clock.micro_batches[clock.counted:]))
                    clock.counted = len(clock.micro_batches)
                if clock.ends[-1] > clock.deadline:
                    control.should_training_stop = True

            def on_log(self, args, state, control, logs=None, **kwargs):
                if "loss" in logs:
                    clock.losses.append(round(float(logs["loss"]), 4))

        return Callback()

    def count_in(self, trainer) -> None:
        """Count the real tokens of each micro-batch of TRL's `trainer`, whose packed rows have no attention mask and no padding."""
        step = trainer.training_step

        def counted(model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")
            self.micro_batches.append(int(mask.sum()) if mask is not None and mask.dim() == 2 else inputs["input_ids"].numel())
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = counted

    def measured(self) -> dict:
        """Return what the steps after the warm-up say. Raises ValueError if there was none."""
        import torch

        if len(self.ends) <= WARM_UP:
            raise ValueError(f"{len(self.ends)} steps in the time limit, of which {WARM_UP} are warm-up")
        tokens = self.tokens[WARM_UP:len(self.ends)]
        seconds = [end - begin for begin, end in zip(self.ends[WARM_UP - 1:], self.ends[WARM_UP:], strict=False)]
        rates = [count / duration for count, duration in zip(tokens, seconds, strict=True)]
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
        else:
            import resource
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
        return {
            "tokens_per_second": round(sum(tokens) / sum(seconds)), "median_step_tokens_per_second": round(statistics.median(rates)),
            "steps": len(tokens), "tokens_a_micro_batch": round(statistics.mean(self.micro_batches or tokens)),
            "largest_micro_batch": max(self.micro_batches or tokens),
            "peak_gib": round(peak / 2**30, 1), "seconds_from_trainer_to_first_step": round(self.ends[0] - self.started, 1),
            "seconds_from_process_to_first_step": round(self.ends[0] - self.process_started, 1), "first_losses": self.losses[:4],
        }


def measure_ours(shape: str, steps: int, deadline: float, tokens: int, processes: int = 1, make_trainer=None, **plan) -> dict:
    """Train with finetune_accel in rows of at most `tokens` tokens, as many whole samples a step as fill ROWS of them on average.

    Of `processes` that train together (`make_trainer` is `core.together`'s trainer) each has ROWS rows of a step.
    """
    from transformers import TrainerCallback

    from finetune_accel.core import training
    from finetune_accel.core.adapters import AdapterPlan

    rows = token_rows()
    batch_size = max(1, round(0.97 * processes * ROWS * tokens * len(rows) / sum(map(len, rows))))  # rows do not come out quite full
    model = random_model(shape)
    clock = StepClock(deadline)

    class TokenCounter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "num_tokens" in logs:
                clock.tokens.append(logs["num_tokens"] - sum(clock.tokens))

    samples = [{"input_ids": row, "completion_mask": [1] * len(row)} for row in rows]
    plan = training.TrainingPlan(adapter=AdapterPlan(RANK, ALPHA), learning_rate=LEARNING_RATE, batch_size=batch_size, micro_batch_tokens=tokens,
                                 max_steps=steps, **plan)
    with tempfile.TemporaryDirectory() as scratch:
        _, result = training.train(model, word_tokenizer(), samples, plan, Path(scratch), callbacks=[clock.as_callback(), TokenCounter()],
                                   make_trainer=make_trainer or training.PackedSFTTrainer)
    measured = clock.measured()
    a_row = {name: round(measured[name] / ROWS / processes) for name in ("tokens_a_micro_batch", "largest_micro_batch")}
    return measured | a_row | {"rows_a_step": ROWS, "batch_size": batch_size, "halvings": result.halvings}


def measure_trl(shape: str, steps: int, deadline: float, attention: str, method: str = "lora", **settings) -> dict:
    """Train with TRL's SFTTrainer with `settings` besides its defaults."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    adapters = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, task_type="CAUSAL_LM") if method == "lora" else None
    dataset, model = Dataset.from_dict({"input_ids": token_rows()}), random_model(shape, attention)
    clock = StepClock(deadline)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=scratch, max_steps=steps, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                           learning_rate=LEARNING_RATE, bf16=cuda, use_cpu=not cuda, eos_token=None, pad_token="<pad>", **settings),
            train_dataset=dataset, processing_class=word_tokenizer(), peft_config=adapters, callbacks=[clock.as_callback()],
        )
        clock.count_in(trainer)
        trainer.train()
    return clock.measured()


def measure_unsloth(shape: str, steps: int, deadline: float, rows: int, checkpointing: str | bool, folder: str) -> dict:
    """Train with Unsloth on packed rows of 4,096 tokens; `folder` holds the model, which Unsloth loads by itself."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=MAX_LENGTH, dtype=torch.bfloat16, load_in_4bit=False,
                                                         local_files_only=True)
    model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=LINEAR,
                                             use_gradient_checkpointing=checkpointing, random_state=0)
    samples = token_rows()
    dataset = Dataset.from_dict({"input_ids": samples, "labels": samples, "attention_mask": [[1] * len(sample) for sample in samples]})
    clock = StepClock(deadline)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=scratch, max_steps=steps, logging_steps=1, save_strategy="no", report_to="none", bf16=True,
                           learning_rate=LEARNING_RATE, per_device_train_batch_size=rows, dataset_num_proc=1, optim="adamw_torch_fused", **PACKED),
            train_dataset=dataset, processing_class=tokenizer, callbacks=[clock.as_callback()],
        )
        clock.count_in(trainer)
        trainer.train()
    return clock.measured()


def write_model(folder: str, shape: str) -> None:
    """Write the model for Unsloth, which only loads from a folder."""
    random_model(shape).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def parameters_without_embedding(shape: str) -> int:
    """Count the weights that are multiplied: all but an embedding that is not also the output layer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPES[shape])
    with torch.device("meta"):
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    return weights - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


MEASURE = {"ours": measure_ours, "trl": measure_trl, "unsloth": measure_unsloth}


def measure_side(args: argparse.Namespace) -> dict:
    """Measure one side in this process, after the rate of a matrix product."""
    who, shape, settings = SIDES[args.side]
    if who == "unsloth":
        import unsloth  # noqa: F401 (first: it changes the other libraries as they are imported)
        settings = settings | {"folder": args.model}
    if who == "ours" and args.tokens:
        settings = settings | {"tokens": args.tokens}
    import torch

    rate = matmul_teraflops()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    measured = MEASURE[who](args.shape or shape, WARM_UP + args.steps, args.deadline, **settings)
    return measured | {"matmul_teraflops": round(rate, 3), "settings": settings, "machine": machine()}


def machine() -> dict:
    """Describe this machine and the versions that matter to this process."""
    import torch

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "liger-kernel", "unsloth", "xformers")
    return {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "cores": os.cpu_count(),
            "python": platform.python_version(), **{name: installed(name) for name in packages}}


def in_process(name: str, options: list[str], limit: float, folder: Path, pythonpath: str | None) -> dict:
    """Run this script with `options` in a fresh process, ended after `limit` seconds: returns its record, or its error."""
    out, log = folder / f"{name}.json", folder / f"{name}.log"
    out.unlink(missing_ok=True)
    paths = os.pathsep.join(str(Path(path).resolve()) for path in (pythonpath or os.environ.get("PYTHONPATH", "")).split(os.pathsep) if path)
    with open(log, "w") as stream:
        process = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), "--out", str(out), *options], cwd=folder, stdout=stream,
                                   stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": paths}, start_new_session=True)
        try:
            ended = f"ended with {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            ended = f"took more than {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its data loaders and compilers
                process.wait()
    return json.loads(out.read_text()) if out.exists() else {"error": f"{ended}: {log.read_text()[-1500:].strip()}"}


def run_side(side: str, args: argparse.Namespace, folder: Path) -> dict:
    """Measure one side in a fresh process; Unsloth's first needs a model folder."""
    who, shape, _ = SIDES[side]
    pythonpath = args.unsloth_path if who == "unsloth" else None
    model = folder / "model"
    if who == "unsloth" and not model.exists():
        written = in_process("write-model", ["--write-model", str(model), "--shape", args.shape or shape], args.limit, folder, pythonpath)
        if "error" in written:
            return {"side": side} | written
    options = ["--side", side, "--steps", str(args.steps), "--deadline", str(time.time() + args.limit - 20), "--model", str(model)]
    options += ["--shape", args.shape] if args.shape else []
    options += ["--tokens", str(args.tokens)] if args.tokens else []
    return {"side": side} | in_process(side, options, args.limit, folder, pythonpath)


def summarise(runs: list[dict]) -> dict:
    """Return for each side its median speed, its MFU and how many times as fast the fastest of ours is at the same work."""
    done = [run for run in runs if "error" not in run]
    if not done:
        return {}
    if len(gpus := {run["machine"]["gpu"] for run in done}) > 1:
        sys.exit(f"results of several GPUs do not compare ({gpus}): give another --out")
    best_rate = max(run["matmul_teraflops"] for run in done)
    speed = {side: statistics.median(run["tokens_per_second"] for run in done if run["side"] == side)
             for side in SIDES if any(run["side"] == side for run in done)}
    summary = {}
    for side, rate in speed.items():
        work = side.split("-")[0]
        run = next(run for run in done if run["side"] == side)
        weights = parameters_without_embedding(run["shape"])
        ours = max((other for name, other in speed.items() if name.startswith(f"{work}-ours")), default=None)
        summary[side] = {"tokens_per_second": round(rate), "mfu": round(rate * (4 if work == "lora" else 6) * weights / best_rate / 1e12, 3),
                         "ours_is_times_as_fast": ours and round(ours / rate, 2),
                         **{key: run[key] for key in ("tokens_a_micro_batch", "peak_gib", "seconds_from_trainer_to_first_step")}}
    return summary


def compare(args: argparse.Namespace) -> dict:
    """Measure the sides one after the other, `args.rounds` times, writing what is known after each."""
    runs = []
    if args.only and Path(args.out).exists():
        runs = [run for run in json.loads(Path(args.out).read_text())["runs"] if run["side"] not in args.only]
    with tempfile.TemporaryDirectory() as folder:
        for side in (args.only or [side for side in SIDES if SIDES[side][0] != "unsloth" or args.unsloth_path]) * args.rounds:
            runs.append(run_side(side, args, Path(folder)) | {"shape": args.shape or SIDES[side][1]})
            print({key: value for key, value in runs[-1].items() if key not in ("machine", "settings")}, flush=True)
            result = {
                "parameters": {"steps": args.steps, "warm_up": WARM_UP, "rounds": args.rounds, "limit_seconds": args.limit, "rank": RANK,
                               "alpha": ALPHA, "samples": SAMPLES, "shapes": SHAPES},
                "summary": summarise(runs), "runs": runs,
            }
            Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    return result


def main() -> None:
    """Run one side (`--side`), or all and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SIDES, metavar="NAME", help=f"sides to measure, of: {', '.join(SIDES)}")
    parser.add_argument("--unsloth-path", help="folder with Unsloth and what it needs, or several as in PYTHONPATH; without it Unsloth is left out")
    parser.add_argument("--rounds", type=int, default=1, help="how often to measure all")
    parser.add_argument("--steps", type=int, default=12, help="measured steps")
    parser.add_argument("--tokens", type=int, help="tokens a micro-batch of ours, instead of each side's own")
    parser.add_argument("--shape", choices=SHAPES, help="instead of each side's own; tiny is for a test on the CPU")
    parser.add_argument("--limit", type=float, default=330, help="seconds a side may take")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    for internal in ("--side", "--write-model", "--model"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(SIDES[side][0] == "unsloth" for side in args.only or []) and not args.unsloth_path:
        parser.error("Unsloth needs --unsloth-path")
    if args.write_model:
        write_model(args.write_model, args.shape)
        Path(args.out).write_text("{}")
    elif args.side:
        Path(args.out).write_text(json.dumps(measure_side(args)))
    else:
        print(f"{'side':28}{'tokens/s':>10}{'MFU':>8}{'GiB':>8}{'ours is':>10}")
        for side, row in compare(args)["summary"].items():
            times = row["ours_is_times_as_fast"]
            print(f"{side:28}{row['tokens_per_second']:10,}{row['mfu']:8.3f}{row['peak_gib']:8.1f}{f'{times} x' if times else '':>10}")


if __name__ == "__main__":
    main()
