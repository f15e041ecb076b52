"""Keep what the last full run of an engagement showed: `make demo`, then `python benchmarks/last_run.py runs/home-intents`.

A run that left out benchmark or serve is kept without them; `--machine` names what it ran on, where that was not this machine. Writes benchmarks/home_intents.json and home_intents.md (or those of another engagement's name): scores with intervals, verdicts, what it
cost, seconds and memory of each phase, machine.
"""
import argparse
import json
import os
import platform
from pathlib import Path

from finetune_accel.core.report import score_lines, verdict_sentences
from finetune_accel.core.runs import RunFolder

HERE = Path(__file__).parent
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", type=Path)
parser.add_argument("--machine")
options = parser.parse_args()
run = RunFolder(options.run.absolute())
phases = {name: run.need(name) for name in ("plan", "prepare", "benchmark", "train", "evaluate", "serve") if (run.path / f"{name}.json").exists()}
train, evaluated, name = phases["train"], phases["evaluate"], phases["plan"]["settings"]["name"]
target = HERE / name.replace("-", "_")
costs = [part["in_words"] for part in (evaluated["forgetting"], evaluated["memorisation"], evaluated["cost"]) if part]
processor = options.machine or next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
kept = {
    "machine": {"processor": processor, **({} if options.machine else {"cores": os.cpu_count()}), "matmul_gflops": train["matmul_gflops"]},
    "settings": {name: phase["settings"] for name, phase in phases.items()},
    "rows": phases["prepare"]["rows"], "groups": phases["prepare"]["groups"],
    "seconds": {name: phase["seconds"] for name, phase in phases.items()},
    "training": {key: train[key] for key in ("tokens", "supervised_tokens", "steps", "training_seconds", "tokens_per_second",
                                             "peak_memory_gib", "dtype", "loss", "dev")},
    **({"benchmark_on_dev": phases["benchmark"]["scores"], "recommended": [phases["benchmark"]["recommended"], phases["benchmark"]["why"]]}
       if "benchmark" in phases else {}),
    "scores_on_test": evaluated["scores"], "verdicts": evaluated["verdicts"], "criteria": evaluated["criteria"],
    "in_words": evaluated["in_words"], "slices": evaluated["slices"], "test_openings": evaluated["test_openings"], "changed": evaluated["changed"],
    "forgetting": evaluated["forgetting"], "memorisation": evaluated["memorisation"], "cost": evaluated["cost"],
    "answering": evaluated["answering"], "engines": evaluated["engines"], "versions": train["versions"],
    **({"parity": {key: phases["serve"][key] for key in ("engine", "engines", "routes", "registered", "in_words")}} if "serve" in phases else {}),
}
target.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
header, *lines = score_lines(evaluated["scores"])
table = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(line) + " |" for line in lines)]
target.with_suffix(".md").write_text("\n".join([
    f"# {name}, the last full run", "", f"`finetune-accel run {name}`, then `python benchmarks/last_run.py runs/{name}`. {processor}"
    f"{'' if options.machine else f', {os.cpu_count()} cores'}. Phases took " + ", ".join(f"{name} {phase['seconds']:.0f} s" + (" (answers kept from an earlier run)" if "asked" in phase and not any(phase["asked"].values()) else "")
                                       for name, phase in phases.items())
    + f"; training {train['tokens_per_second']:.0f} tokens a second, peak memory {train['peak_memory_gib']:.1f} GiB.", "",
    f"Scores on {evaluated['scores'][0]['n']} test items, 95 % intervals clustered by template; the test split was opened "
    f"{evaluated['test_openings']} time(s):", "", *table, "", *(f"- {sentence}" for sentence in verdict_sentences(evaluated)), "", evaluated["in_words"], "", *costs, "",
    phases.get("serve", {}).get("in_words", ""), ""]))
print(target.with_suffix(".md").read_text())
