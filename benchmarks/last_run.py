"""Keep what the last full run of an engagement showed: `make demo`, then `python benchmarks/last_run.py runs/home-intents`.

Writes benchmarks/home_intents.json and home_intents.md (or those of another engagement's name): scores with intervals, verdicts, what it
cost, seconds and memory of each phase, machine.
"""
import json
import os
import platform
import sys
from pathlib import Path

from finetune_accel.core.report import score_lines, verdict_sentences
from finetune_accel.core.runs import RunFolder

HERE = Path(__file__).parent
run = RunFolder(Path(sys.argv[1]).absolute())
phases = {name: run.need(name) for name in ("plan", "prepare", "benchmark", "train", "evaluate", "serve")}
train, evaluated, name = phases["train"], phases["evaluate"], phases["plan"]["settings"]["name"]
target = HERE / name.replace("-", "_")
costs = [part["in_words"] for part in (evaluated["forgetting"], evaluated["memorisation"], evaluated["cost"]) if part]
processor = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
kept = {
    "machine": {"processor": processor, "cores": os.cpu_count(), "matmul_gflops": train["matmul_gflops"]},
    "settings": {name: phase["settings"] for name, phase in phases.items()},
    "rows": phases["prepare"]["rows"], "groups": phases["prepare"]["groups"],
    "seconds": {name: phase["seconds"] for name, phase in phases.items()},
    "training": {key: train[key] for key in ("tokens", "supervised_tokens", "steps", "training_seconds", "tokens_per_second",
                                             "peak_memory_gib", "dtype", "loss", "dev")},
    "benchmark_on_dev": phases["benchmark"]["scores"],
    "scores_on_test": evaluated["scores"], "verdicts": evaluated["verdicts"], "criteria": evaluated["criteria"],
    "in_words": evaluated["in_words"], "slices": evaluated["slices"], "test_openings": evaluated["test_openings"], "changed": evaluated["changed"],
    "forgetting": evaluated["forgetting"], "memorisation": evaluated["memorisation"], "cost": evaluated["cost"],
    "answering": evaluated["answering"], "engines": evaluated["engines"], "recommended": [phases["benchmark"]["recommended"], phases["benchmark"]["why"]],
    "parity": {key: phases["serve"][key] for key in ("engine", "engines", "routes", "registered", "in_words")}, "versions": train["versions"],
}
target.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
header, *lines = score_lines(evaluated["scores"])
table = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(line) + " |" for line in lines)]
target.with_suffix(".md").write_text("\n".join([
    f"# {name}, the last full run", "", f"`finetune-accel run {name}`, then `python benchmarks/last_run.py runs/{name}`. {processor}, "
    f"{os.cpu_count()} cores. Phases took " + ", ".join(f"{name} {phase['seconds']:.0f} s" + (" (answers kept from an earlier run)" if "asked" in phase and not any(phase["asked"].values()) else "")
                                       for name, phase in phases.items())
    + f"; training {train['tokens_per_second']:.0f} tokens a second, peak memory {train['peak_memory_gib']:.1f} GiB.", "",
    f"Scores on {evaluated['scores'][0]['n']} test items, 95 % intervals clustered by template; the test split was opened "
    f"{evaluated['test_openings']} time(s):", "", *table, "", *(f"- {sentence}" for sentence in verdict_sentences(evaluated)), "", evaluated["in_words"], "", *costs, "",
    phases["serve"]["in_words"], ""]))
print(target.with_suffix(".md").read_text())
