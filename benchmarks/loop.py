"""The whole loop once, without anybody at the screen: serve, other questions come, an alert, labels, training again, promotion, the alert is over.

    python benchmarks/loop.py --folder runs/loop                          (trains home-intents first; writes benchmarks/loop.md)
    python benchmarks/loop.py --folder runs/loop --run runs/home-intents   (a copy of a finished run, with its store, serves first)
    python benchmarks/loop.py --folder runs/loop --steps train evaluate    (some of the steps; each goes on from the files of those before it)

`champion`: home-intents, with the weights and the verdict of its full run, becomes champion. `shift`: a server answers `models:/...@champion` and leaves
each request in an inference table; a client (the openai package) asks what the model was judged on, then every sixth question is in German. The monitor,
run as a schedule would run it, raises an alert; the sheet of questions that it wants labelled is filled in. `train` and `evaluate`: the labelled rows, and
German ones that people wrote meanwhile, go into training by `prepare.mended`. `promote`: the server of the first champion runs; the new model passes the
same gates and becomes champion; the server changes to it without a restart, and the alert is over.

Questions: home-intents is divided by template, so its test questions are of templates that are in no other split. Traffic is of these templates too, with
other names and numbers: what the model was judged on, and nothing that it has seen. German questions are of the same package, with English names of rooms
and devices. "People" are the package: it knows the right answer. German is a sixth of all rows of the second model, as it is of the traffic. Windows have
one minute and SHORT says what of the second run is shorter than it would be; it trains on from the first model's adapter.
"""
from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import openai
import pyarrow.parquet as pq
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from serving import free_port  # noqa: E402

STEPS = ("champion", "shift", "train", "evaluate", "promote")
SYSTEM = "Answer with the intent as JSON."
NEW = 6  # each NEWth question is German
A_MINUTE, AT_ONCE = 48, 8
MONITOR = {"window": "1 minute", "fewest_rows": 30, "retrain_rows": 80}
SHORT = {"train": {"max_steps": 300, "evaluations": 1, "dev_items": 32}, "evaluate": {"engine": "openvino", "items": 220, "general_texts": 0, "reason": "German rows joined"}}


@functools.cache
def rows_of(language: str) -> dict[str, list[dict]]:
    """Return {template: different sentences with their answers, template and intent} of a language, others than those of the engagement."""
    from finetune_accel.core.sources import fetch_package
    from finetune_accel.core.standins import home_intents

    found: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in home_intents(fetch_package("pypi:home-assistant-intents"), 20, 99, language):
        found[row["template"]][row["prompt"]] = row
    return {template: list(rows.values()) for template, rows in found.items()}


class Loop:
    """The folder in which all of it happens: run folder, store, inference table, and a diary of what happened."""

    def __init__(self, folder: Path):
        self.folder, self.run, self.payload = folder, folder / "runs/home-intents", folder / "payload"
        self.asked, self.diary, self.adapter = folder / "asked.jsonl", folder / "diary.jsonl", folder / "first_adapter"
        self.environment = {**os.environ, "COLUMNS": "150", "OMP_WAIT_POLICY": "PASSIVE", "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'runs/mlflow.db'}"}

    def say(self, text: str, block: str = "") -> None:
        """Note what happened, and what a command printed."""
        text, block = (part.replace(f"{self.folder}/", "") for part in (text, block))
        with open(self.diary, "a") as file:
            file.write(json.dumps({"when": time.strftime("%H:%M:%S"), "text": text, "block": block.strip()}) + "\n")
        print(text, block, sep="\n", flush=True)

    def command(self, *arguments: str, code: int = 0) -> str:
        """Run finetune-accel and return what it printed; any other exit code than `code` ends the loop."""
        command, started = [sys.executable, "-m", "finetune_accel.core.cli", *arguments], time.monotonic()
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode != code:
            raise SystemExit(f"finetune-accel {' '.join(arguments)}: exit {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}")
        self.say(f"`finetune-accel {' '.join(arguments)}` (exit {code}, {time.monotonic() - started:.0f} s)", done.stdout)
        return done.stdout

    def judged(self) -> list[dict]:
        """Return the test items whose answers by the tuned model the verdict rests on."""
        return [row for row in pq.read_table(self.run / self.output("evaluate", "answers.parquet")).to_pylist() if row["system"] == "tuned"]

    def output(self, phase: str, name: str) -> str:
        """Return where a phase left a file, in the run folder."""
        return json.loads((self.run / f"{phase}.json").read_text())["outputs"][name]["path"]

    def scores(self) -> str:
        """Return the tuned model's scores, all and German ones, as a line."""
        found = json.loads((self.run / "evaluate.json").read_text())["scores"]
        every = ", ".join(f"{row['criterion']} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}] of {row['n']}" for row in found if row["system"] == "tuned")
        german = [row["answer"] == row["response"] for row in self.judged() if row["group"] not in rows_of("en")]
        return f"{every}; {len(german)} of the items are German" + (f", {sum(german) / len(german):.2f} of them answered to the letter" if german else "")

    def traffic(self, count: int, new: dict[str, list[dict]], rng: random.Random) -> list[dict]:
        """Return `count` questions as the model was judged on, each NEWth of `new` templates (none if it is empty)."""
        usual, drawn = rows_of("en"), []
        groups = [row["group"] for row in self.judged() if row["group"] in usual]
        for number in range(count):
            pool = new[rng.choice(sorted(new))] if new and number % NEW == 0 else usual[rng.choice(groups)]
            drawn.append(rng.choice(pool))
        return drawn


def version(port: int) -> str | None:
    """Return the version that answers at a port, None while none does."""
    try:
        (model,) = httpx.get(f"http://127.0.0.1:{port}/api/2.0/serving-endpoints", timeout=5).json()["endpoints"]
        return str(model["config"]["served_entities"][0]["entity_version"])
    except (httpx.HTTPError, KeyError, ValueError):
        return None


@contextmanager
def served(loop: Loop) -> Iterator[int]:
    """Serve the champion with an inference table; yields the port when it answers."""
    name, port = json.loads((loop.run / "promote.json").read_text())["model"], free_port()
    words = ["serve", f"models:/{name}@champion", "--port", str(port), "--engine", "openvino", "--table", str(loop.payload)]
    with open(loop.folder / "server.log", "a") as out:
        server = subprocess.Popen([sys.executable, "-m", "finetune_accel.core.cli", *words], cwd=loop.folder, env=loop.environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 600
        while (answers := version(port)) is None:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((loop.folder / "server.log").read_text()[-2000:])
            time.sleep(1)
        loop.say(f"`finetune-accel {' '.join(words)}`: version {answers} answers")
        yield port
    finally:
        server.terminate()
        server.wait(60)


def ask(loop: Loop, port: int, rows: list[dict]) -> None:
    """Ask rows in their order, A_MINUTE of them in each minute of the clock, AT_ONCE at once; note what was asked under which name."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
    model, noted = client.models.list().data[0].id, open(loop.asked, "a")
    time.sleep(60 - time.time() % 60)
    started = time.time()

    def one(row: dict) -> None:
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}]
        client.chat.completions.create(model=model, messages=turns, max_tokens=64, temperature=0)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for place in range(0, len(rows), AT_ONCE):
            minute, within = divmod(place, A_MINUTE)
            time.sleep(max(0, started + 60 * minute + 56 * within / A_MINUTE - time.time()))
            list(pool.map(one, rows[place:place + AT_ONCE]))
    noted.write("".join(json.dumps(row) + "\n" for row in rows))
    noted.close()
    late = time.time() - started - 60 * (len(rows) / A_MINUTE)
    time.sleep(max(0, 60 - time.time() % 60) + 8)  # the last window closes, and the server has written its rows
    german = sum(row["template"] not in rows_of("en") for row in rows)
    loop.say(f"{len(rows)} questions asked in {len(rows) // A_MINUTE} minutes, {german} of them in German" + (f"; {late:.0f} s late" if late > 0 else ""))


def copy_run(run: Path, to: Path) -> None:
    """Copy a run folder with its decisions and its local MLflow store, in which paths are absolute, into the folder `to`."""
    for name in (run.name, "decisions", "mlartifacts"):
        shutil.copytree(run.parent / name, to / name)
    shutil.copy(run.parent / "mlflow.db", to)
    with closing(sqlite3.connect(to / "mlflow.db")) as store, store:
        for (table,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for _, column, kind, *_ in store.execute(f"PRAGMA table_info({table})").fetchall():
                if "CHAR" in kind or "TEXT" in kind:
                    store.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE {column} LIKE ?", (str(run.parent), str(to), f"%{run.parent}%"))


def champion(loop: Loop, run: Path | None) -> None:
    """Let home-intents be champion: a copy of a finished run, or one that is made now."""
    if run:
        copy_run(run.absolute(), loop.run.parent)
        loop.say(f"a copy of {run.name}, a finished run: the test split was opened {json.loads((run / 'evaluate.json').read_text())['test_openings']} time(s)")
    else:
        loop.command("run", "home-intents", "--run-dir", str(loop.run), "--to", "promote")
    file = loop.run / "engagement.yaml"
    content = yaml.safe_load(file.read_text())
    kept = {key: value for key, value in content.items() if key not in ("benchmark", "score", "handover")}
    file.write_text(yaml.safe_dump({**kept, "promote": {"to": "champion", "why": "German rows joined"}, "monitor": MONITOR}, sort_keys=False, allow_unicode=True))
    shutil.copytree((loop.run / loop.output("train", "adapter")), loop.adapter)
    loop.command("promote", str(loop.run), "--why", "the first one")
    loop.say(f"the first model: {loop.scores()}")


def shift(loop: Loop) -> None:
    """Ask the usual, then also in German; look; fill in the sheet; write down the rows with which to train again."""
    rng, look = random.Random(17), ("monitor", str(loop.run), "--table", str(loop.payload))
    german = {template: rows for template, rows in rows_of("de").items() if template not in rows_of("en")}
    with served(loop) as port:
        ask(loop, port, loop.traffic(2 * A_MINUTE, {}, rng))
        loop.command(*look)
        ask(loop, port, loop.traffic(3 * A_MINUTE, german, rng))
        said = loop.command(*look, code=1)
    sheet = next(Path(line.partition(": ")[2]).parent for line in said.splitlines() if line.startswith("dashboard: ")) / "to_label.csv"
    right = {row["prompt"]: row for line in loop.asked.read_text().splitlines() for row in [json.loads(line)]}
    told = [{"request_id": row["request_id"], **{key: right[row["prompt"]][key] for key in ("response", "template", "intent")}}
            for row in csv.DictReader(sheet.open(encoding="utf-8-sig", newline=""))]
    labels = loop.folder / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in told))
    loop.say(f"people filled in {sheet.name}: {len(told)} right answers")
    said = loop.command(*look, "--labels", str(labels), code=1)
    again = next(line for line in said.splitlines() if line.startswith("finetune-accel run"))
    new = Path(again.rpartition("prepare.mended=")[2]).read_text().splitlines()
    there = sum(json.loads((loop.run / "prepare.json").read_text())["rows"]["kept"].values()) + len(new)
    written = [rng.choice(german[template]) for template in rng.sample(sorted(german), there // (NEW - 1))]
    lines = [*new, *(json.dumps(row) for row in written if row["prompt"] not in right)]
    (loop.folder / "mended.jsonl").write_text("".join(line + "\n" for line in lines))
    loop.say(f"{len(new)} rows of new_rows.jsonl and {len(lines) - len(new)} German ones that people wrote will join {there - len(new)}")


def again(loop: Loop, last: str) -> None:
    """Train again with the new rows, as far as the phase `last`."""
    short = {**SHORT, "train": {**SHORT["train"], "start_from": str(loop.adapter)}, "prepare": {"mended": str(loop.folder / "mended.jsonl")}}
    words = [word for phase, values in short.items() for key, value in values.items() for word in ("--set", f"{phase}.{key}={value}")]
    loop.command("run", str(loop.run / "engagement.yaml"), "--run-dir", str(loop.run), "--to", last, *words)


def promote(loop: Loop) -> None:
    """Serve the first champion, let the second pass the gates and be followed, ask, and look."""
    rng, english = random.Random(18), rows_of("en")
    every = {row["group"] for row in loop.judged() if row["group"] not in english}
    with served(loop) as port:
        first = version(port)
        again(loop, "promote")
        deadline = time.monotonic() + 180
        while version(port) in (first, None) and time.monotonic() < deadline:
            time.sleep(1)
        if version(port) == first:
            raise SystemExit("the server did not change to the new champion")
        loop.say(f"the server, not restarted, answers with version {version(port)} instead of {first}")
        ask(loop, port, loop.traffic(3 * A_MINUTE, {template: rows for template, rows in rows_of("de").items() if template in every}, rng))
        loop.command("monitor", str(loop.run), "--table", str(loop.payload))


def page(loop: Loop, told: str) -> str:
    """Return the diary as a page."""
    lines = [json.loads(line) for line in loop.diary.read_text().splitlines()]
    body = "\n".join(f"**{line['when']}** {line['text']}\n" + (f"\n```\n{line['block']}\n```\n" if line["block"] else "") for line in lines)
    return f"# The loop, once\n\n`{told}`; how questions and labels are made stands at the head of `benchmarks/loop.py`.\n\n{body}"


def main() -> None:
    """Go through the wanted steps in a folder; after each one the diary is a page."""
    options = argparse.ArgumentParser()
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--run", type=Path, help="a finished run of home-intents, which is copied")
    options.add_argument("--steps", nargs="*", default=list(STEPS), choices=STEPS)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    given = options.parse_args()
    loop = Loop(given.folder.absolute())
    loop.run.parent.mkdir(parents=True, exist_ok=True)
    go = {"champion": lambda: champion(loop, given.run), "shift": lambda: shift(loop), "train": lambda: again(loop, "train"),
          "evaluate": lambda: again(loop, "evaluate"), "promote": lambda: promote(loop)}
    for step in given.steps:
        go[step]()
        if step == "evaluate":
            loop.say(f"the second model: {loop.scores()}")
        given.out.write_text(page(loop, f"python benchmarks/loop.py{f' --run runs/{given.run.name}' if given.run else ''}"))


if __name__ == "__main__":
    main()
