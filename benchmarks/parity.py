"""Every engine on the whole test set of a finished run, through the server: equal answers, effect on the criteria, speed.

    finetune-accel run home-intents && python benchmarks/parity.py runs/home-intents            (all engines)
    python benchmarks/parity.py runs/home-intents vllm vllm-bf16                                 (these)

The serve phase stops at the first engine that is let in and asks the rows that evaluate asked; here all are tried on all test rows. Each
engine is started as `finetune-accel serve RUN_DIR --engine NAME` and asked by 16 callers at a time; what it answers is compared with the
reference engine (`core.generate`, float32, in this process), character for character. The test split is opened once more, and that is
written down.
Writes benchmarks/parity.json, or parity_NAME.json after the first of the engines that are named, and prints the table.
"""
from __future__ import annotations

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads must not burn a shared core
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from finetune_accel.core.answering import ENGINES
from finetune_accel.core.asking import ask
from finetune_accel.core.criteria import Criterion
from finetune_accel.core.kept_answers import KeptAnswers
from finetune_accel.core.parity import AT_ONCE, effect, engine_versions, judge_engine, machine, rows_digest
from finetune_accel.core.prompting import bare
from finetune_accel.core.records import read_records
from finetune_accel.core.runs import RunFolder
from finetune_accel.serve import try_engine

HEADER = "| engine | verdict | equal answers | change in each criterion, 95 % interval | tokens a second | median wait | 95 % wait at most |"


def line(found: dict) -> str:
    """Return a row of the table in Markdown."""
    if "equal" not in found:
        return f"| {found['engine']} | {found['verdict']} | | {found['reason']} | | | |"
    return (f"| {found['engine']} | {found['verdict']} | {found['equal']} of {found['asked']} | {effect(found)} | {found['tokens_per_second']:.0f} "
            f"| {found['p50_seconds']:.2f} s | {found['p95_seconds']:.2f} s |")


def main() -> None:
    """Try each engine on all test rows of the run folder that is named."""
    engines, here = sys.argv[2:] or ENGINES, Path(__file__)
    run = RunFolder(Path(sys.argv[1]).absolute())
    evaluated, model, merged = run.need("evaluate"), run.need("train")["outputs"]["merged"]["sha256"], run.output("train/merged")
    criteria = [Criterion(**one) for one in json.loads(run.output("plan/criteria.json").read_text())]
    form, limit, seed = json.loads(run.output("prepare/format.json").read_text()), evaluated["max_new_tokens"], evaluated["settings"]["seed"]
    run.note_opening("parity of each engine with the reference", model)
    rows = [{**row, "messages": bare(row)} for row in read_records(run.output("prepare/test.parquet"))]
    kept = KeptAnswers(run.path / "answers", model, limit)
    reference = ask(merged, [row["messages"] for row in rows], rows, "reference", str(merged), form["approach"], kept).texts
    tried = []
    with tempfile.TemporaryDirectory() as logs:
        for engine in engines:
            judge = partial(judge_engine, engine, rows, reference, criteria=criteria, approach=form["approach"], seed=seed)
            found = try_engine(engine, run.path, rows, limit, form["system_prompt"], judge, Path(logs) / engine, 300)
            answers = found.pop("answers", [])
            found.pop("seconds", None)
            differing = [{"prompt": row["prompt"], "wanted": row["response"], "reference": expected, "served": answer}
                         for row, expected, answer in zip(rows, reference, answers) if expected != answer]
            tried.append(found | {"differing": differing})
            print(line(found), flush=True)
    facts = {"engagement": run.need("plan")["settings"]["name"], "model": model, "rows": {"asked": len(rows), "sha256": rows_digest(rows)},
             "at_once": AT_ONCE, "engines": tried, "versions": engine_versions(), "machine": machine()}
    here.with_name(f"parity_{engines[0]}.json" if sys.argv[2:] else "parity.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(["", HEADER, "|" + "---|" * 7, *map(line, tried)]))


if __name__ == "__main__":
    main()
