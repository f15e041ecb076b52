"""Walk a newcomer's path and time it: clone, first verdict, the served model, data of one's own, a second engagement.

    python benchmarks/newcomer.py [first serve own second]        (all of them need what the first leaves)

Everything happens in `--folder` (default newcomer/), with nothing but the README's commands: what a person types is typed by this script, what a person
edits is edited by it, and what a person reads is not counted. The own data are 600 requests to a smart home in German with what they mean, as a CSV file
with columns of its own, as a customer might send it; the second engagement is the shipped chat in a short form. Writes benchmarks/newcomer.json.
"""
from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
PORT = 8123


def typed(command: str, folder: Path, codes: tuple[int, ...] = (0,)) -> dict[str, float]:
    """Run a command line as typed in `folder`; return the seconds after which each phase was done, and "end"."""
    print(f"$ {command}", flush=True)
    started, seen = time.monotonic(), {}
    with subprocess.Popen(command, shell=True, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            words = line.split()
            if len(words) > 1 and words[1] == "done":
                seen[words[0]] = time.monotonic() - started
    if process.returncode not in codes:
        sys.exit(f"{command}: exit {process.returncode}")
    return seen | {"end": time.monotonic() - started}


def first(home: Path, clone: Path) -> dict[str, float]:
    """Clone and `make demo`, until the verdict is printed."""
    cloned = typed(f"git clone -q {HERE.parent} {clone.name}", home)["end"]
    done = typed("make demo", clone)
    return {"minutes": (cloned + done["evaluate"]) / 60, "all phases": (cloned + done["end"]) / 60}


def serve(home: Path, clone: Path) -> dict[str, float]:
    """Serve the model of the first run, until the first answer is there."""
    started, question = time.monotonic(), json.dumps({"messages": [{"role": "user", "content": "turn on the lights in the kitchen"}]}).encode()
    server = subprocess.Popen([".venv/bin/finetune-accel", "serve", "runs/home-intents", "--port", str(PORT)], cwd=clone)
    try:
        while server.poll() is None:
            try:
                asked = urllib.request.Request(f"http://127.0.0.1:{PORT}/invocations", question, {"Content-Type": "application/json"})
                print(urllib.request.urlopen(asked).read().decode())
                return {"minutes": (time.monotonic() - started) / 60}
            except OSError:
                time.sleep(0.2)
        sys.exit("the server ended")
    finally:
        server.terminate()
        server.wait(30)


def own(home: Path, clone: Path) -> dict[str, float]:
    """From a CSV file of the customer's to its verdict: init, edit, check, run. A criterion that is not met ends it with 1."""
    write_csv(clone)
    started = typed(".venv/bin/finetune-accel init my-bot", clone)["end"]
    file = clone / "my-bot.yaml"
    text = file.read_text()
    for old, new in [("source: rows.jsonl # beside this file", "source: requests.csv\n  columns: {prompt: Anfrage, response: Bedeutung}"),
                     ("system_prompt: null #", "system_prompt: Answer with the intent and its slots as JSON. #")]:
        assert old in text, f"my-bot.yaml has no {old}"
        text = text.replace(old, new)
    file.write_text(text)
    started += typed(".venv/bin/finetune-accel check my-bot.yaml", clone)["end"]
    done = typed(".venv/bin/finetune-accel run my-bot.yaml", clone, (0, 1))
    return {"minutes": (started + done["end"]) / 60, "verdict": (started + done["evaluate"]) / 60}


def write_csv(clone: Path) -> None:
    """Write 600 German requests and their meanings as somebody's CSV file; not a step of the walk, so not timed."""
    from finetune_accel.core.sources import fetch_package
    from finetune_accel.core.standins import home_intents

    rows = list(home_intents(fetch_package("pypi:home-assistant-intents"), 10, 17, "de"))
    with open(clone / "requests.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Nummer", "Anfrage", "Bedeutung"])
        writer.writerows([number, row["prompt"], row["response"]] for number, row in enumerate(random.Random(17).sample(rows, 600), 1))


def second(home: Path, clone: Path) -> dict[str, float]:
    """A second engagement from the same clone: chats, in a short form."""
    begun = typed(".venv/bin/finetune-accel init chitchat --to talk.yaml", clone)["end"]
    done = typed(".venv/bin/finetune-accel run talk.yaml --set prepare.limit=400", clone, (0, 1))
    return {"minutes": (begun + done["end"]) / 60, "verdict": (begun + done["evaluate"]) / 60}


STEPS = {"first": (first, 25), "serve": (serve, 2), "own": (own, 30), "second": (second, 60)}  # what is walked, and the minutes it may take


def main() -> None:
    """Walk the steps that are named, and keep their minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--folder", type=Path, default=Path("newcomer"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    clone = options.folder.absolute() / "finetune-accel"
    for step in options.steps:
        (walk, limit), load = STEPS[step], os.getloadavg()[0]
        found = walk(options.folder.absolute(), clone)
        kept = json.loads(options.out.read_text()) if options.out.exists() else {}
        kept[step] = {"limit_minutes": limit, **{name: round(value, 2) for name, value in found.items()}, "cores": len(os.sched_getaffinity(0)),
                      "load_before": round(load, 2), "processor": platform.processor() or platform.machine(), "on": time.strftime("%Y-%m-%d")}
        options.out.write_text(json.dumps(kept, indent=1) + "\n")
        print(step, kept[step], flush=True)


if __name__ == "__main__":
    main()
