"""A million requests through the monitor: memory, seconds, and that the day after only the new day is read.

    python benchmarks/monitoring.py                        (seven minutes on one core)
    python benchmarks/monitoring.py --rows 20000 --out /tmp/small.json

An inference table of ten days is made of the sentences of home-intents and their reference answers, as our server writes it, in 200 commits. A process of
its own monitors it: peak memory is of this process (its largest resident size), seconds are of the whole look. Then an eleventh day of a tenth of the
rows comes, and it is monitored again by a new process: what it reads is counted in rows, and in bytes read from the table's files (Linux: rchar of
/proc/self/io is not split by file, so the files of the ten days are moved away meanwhile: a job that opened one of them would fail).
Writes benchmarks/monitoring.json.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from pathlib import Path

DAY = datetime(2026, 1, 1, tzinfo=timezone.utc)
DAYS, COMMITS_A_DAY = 10, 20


def sentences() -> list[dict]:
    """Return prompts and answers of home-intents."""
    from finetune_accel.core.readers import open_source

    return [row for block in open_source("pypi:home-assistant-intents", per_template=20).blocks() for _, row in block.rows()]


def add_day(folder: Path, day: int, rows: int, said: list[dict], rng: random.Random) -> None:
    """Append a day of requests to the inference table in `folder`."""
    import pyarrow as pa

    from finetune_accel.core.inference_table import PAYLOAD, append, check_table, payload

    check_table(folder)
    for commit in range(COMMITS_A_DAY):
        batch = []
        for number in range(rows // COMMITS_A_DAY):
            row = rng.choice(said)
            when = DAY + timedelta(days=day, seconds=86_400 * (commit + rng.random()) / COMMITS_A_DAY)
            tokens = len(row["response"]) // 3
            answer = {"id": f"c{number}", "object": "chat.completion", "created": 0, "model": "home", "choices": [
                {"index": 0, "message": {"role": "assistant", "content": row["response"]}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 40, "completion_tokens": tokens, "total_tokens": 40 + tokens}}
            asked = {"messages": [{"role": "system", "content": "Answer with the intent as JSON."}, {"role": "user", "content": row["prompt"]}]}
            batch.append(payload({"databricks_request_id": f"{day}-{commit}-{number}", "request_time": when, "status_code": 200 if rng.random() > 0.01 else 500,
                                  "execution_duration_ms": round(300 * rng.lognormvariate(0, 0.5)), "request": json.dumps(asked), "response": json.dumps(answer),
                                  "served_entity_id": f"home:{1 + day // 5}"}))
        append(folder, pa.RecordBatch.from_pylist(batch, schema=PAYLOAD))


def look(payload: Path, folder: Path) -> None:
    """Monitor the table once and print what it took as JSON: the part that is measured."""
    from finetune_accel.core.baseline import make_baseline
    from finetune_accel.core.criteria import Criterion
    from finetune_accel.core.monitoring import Job, monitor

    said = random.Random(1).sample(sentences(), 400)
    exchanges = [{"request_id": str(number), "client_request_id": None, "model": None, "status_code": 200, "latency_ms": None, "finish_reason": "stop",
                  "question": {"prompt": row["prompt"]}, "answer": row["response"], "prompt_tokens": None, "completion_tokens": None}
                 for number, row in enumerate(said)]
    criteria = [Criterion(metric="json_valid", at_least=0.98)]
    started = time.monotonic()
    job = Job("home", str(payload), folder, make_baseline(exchanges, {}, criteria, False, "sentences"), {}, "1 day", 0.05, 2, 3, 50, 17)
    found = monitor(job, 100, "", None)
    print(json.dumps({"seconds": round(time.monotonic() - started, 1), "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
                      "read": found["read"], "windows": found["windows"], "windows_written_again": found["redone"], "alerts": len(found["alerts"]),
                      "rows": found["rows"]}))


def measured(payload: Path, folder: Path) -> dict:
    """Return what `look` printed in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--look", str(payload), str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def hide(payload: Path, aside: Path) -> list[Path]:
    """Move the table's data files of the first ten days away and return where they were."""
    moved = [path for path in payload.glob("*/*.parquet") if f"{DAY + timedelta(days=DAYS):%Y-%m-%d}" not in path.parent.name]
    for number, path in enumerate(moved):
        shutil.move(path, aside / str(number))
    return moved


def main() -> None:
    """Make the table, look at it, add a day, look again, and write what it took."""
    options = argparse.ArgumentParser()
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options.add_argument("--look", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.look:
        return look(*given.look)
    rng, said = random.Random(17), sentences()
    with tempfile.TemporaryDirectory() as scratch:
        payload, folder, aside = (Path(scratch) / name for name in ("payload", "monitored", "aside"))
        aside.mkdir()
        for day in range(DAYS):
            add_day(payload, day, given.rows // DAYS, said, rng)
        size = sum(path.stat().st_size for path in payload.glob("*/*.parquet"))
        first = measured(payload, folder)
        again = measured(payload, folder)
        add_day(payload, DAYS, given.rows // DAYS, said, rng)
        hide(payload, aside)
        day = measured(payload, folder)
    parameters = {"rows": given.rows, "days": DAYS, "commits": DAYS * COMMITS_A_DAY, "table_mib": round(size / 2**20), "cores": len(os.sched_getaffinity(0)),
                  "python": platform.python_version(), "deltalake": version("deltalake"), "load": os.getloadavg()[1]}
    found = {"parameters": parameters, "ten days": first, "again, nothing new": again, "one more day, the files of the ten days away": day}
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
