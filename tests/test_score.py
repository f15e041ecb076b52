"""Scoring: every row once, bad rows set aside, the server's answers, and nothing lost or doubled whatever is killed."""
from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlglot
from conftest import finetune_accel
from deltalake import DeltaTable, write_deltalake
from tiny import tiny_model
from typer.testing import CliRunner

from finetune_accel.core import score_job, scoring
from finetune_accel.core.ai_query import ai_query_sql
from finetune_accel.core.cli import app
from finetune_accel.core.errors import BadInput
from finetune_accel.core.formats import Form
from finetune_accel.core.predictor import Predictor
from finetune_accel.core.requests import TableParameters
from finetune_accel.core.score_job import Job, job_for, known_ids

WORDS = ["turn on the lights in the kitchen", "stop the timer", "close the blinds", "is it cold outside", "what time is it"]
FEED = {"delta.enableChangeDataFeed": "true"}


def prompts(count: int, first: int = 0) -> list[dict]:
    """Return rows that all differ."""
    return [{"prompt": f"{WORDS[number % len(WORDS)]} {number}"} for number in range(first, first + count)]


def write(path, rows: list) -> str:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return str(path)


def table(folder) -> list[dict]:
    return DeltaTable(str(folder)).to_pyarrow_table().to_pylist()


def by_prompt(folder) -> dict[str, str]:
    """Return {prompt: response}; each must stand there once."""
    rows = [(json.loads(row["row"])["prompt"], row["response"]) for row in table(folder)]
    assert len(dict(rows)) == len(rows) == len({row["id"] for row in table(folder)})
    return dict(rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("score") / "tiny", WORDS)


def a_job(model, source, out, max_tokens: int = 8, **more) -> Job:
    return job_for(str(source), str(model), out, max_tokens=max_tokens, **more)


def run_job(job: Job):
    with closing(job.predictor()) as predictor:
        return score_job.run_job(job, predictor)


def command(*arguments):
    """Run the command line in this process: loading a model is enough to wait for."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def follow_job(job: Job, told, stop=None):
    with closing(job.predictor()) as predictor:
        return score_job.follow_job(job, predictor, told, stop, poll_seconds=0.05)


def test_answers_are_the_servers(server, tmp_path):
    rows = prompts(40)
    job = a_job(server.folders["tuned"], write(tmp_path / "in.jsonl", rows), tmp_path / "out", max_tokens=12)
    counts = run_job(job)
    assert (counts.rows, counts.answered, counts.set_aside) == (40, 40, 0)
    scored = {json.loads(row["row"])["prompt"]: row for row in table(job.out)}
    with server.client() as client:
        for row in rows:
            reply = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": row["prompt"]}], "max_tokens": 12}).json()
            mine = scored[row["prompt"]]
            assert (mine["response"], mine["finish_reason"]) == (reply["choices"][0]["message"]["content"], reply["choices"][0]["finish_reason"])
            assert (mine["prompt_tokens"], mine["completion_tokens"]) == (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"])
    assert {(row["model"], row["engine"], row["error"]) for row in scored.values()} == {("tuned", "reference", None)}


BAD = {
    "not JSON": b'{"prompt": "lights"',
    "not UTF-8": b'{"prompt": "caf\xe9"}',
    "not a JSON object": b'["lights"]',
    "missing key": {"question": "lights"},
    "null content": {"prompt": None, "other": 1},
    "empty text": {"prompt": "  "},
    "wrong type": {"prompt": {"text": "lights"}},
    "broken text": b'{"prompt": "half \\ud800 of a pair"}',
    "control character": b'{"prompt": "a\\u0000b"}',
    "cannot be asked": {"prompt": "lights <|im_end|> on"},
    "too long": {"prompt": "lights " * 3000},
    "last not user": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    "unknown role": {"messages": [{"role": "tool", "content": "hi"}]},
    "key given twice": b'{"prompt": "a", "prompt": "b"}',
    "nested too deeply": b'{"prompt": "a", "more": ' + b"[" * 60 + b"]" * 60 + b"}",
    "row too long": b'{"prompt": "' + b"a" * 1_000_001 + b'"}',
}


def test_bad_rows_are_set_aside_and_the_job_says_how_many(model, tmp_path):
    rows = [row for number, bad in enumerate(BAD.values()) for row in (bad, *prompts(2, 2 * number))]
    said = finetune_accel("score", write(tmp_path / "in.jsonl", rows), "--model", model, "--out", "out", "--max-tokens", 4, cwd=tmp_path)
    assert f"{3 * len(BAD)} rows: {2 * len(BAD)} answered, {len(BAD)} set aside, 0 known" in said
    aside = {row["place"]: row for row in table(tmp_path / "out_set_aside")}
    for number, name in enumerate(BAD):
        found = aside[f"in.jsonl:{3 * number + 1}"]
        expected = {"too long": "cannot be asked"}.get(name, name)
        assert found["rule"] == expected and found["fix"] and found["detail"], (name, found)
    failed = [row for row in table(tmp_path / "out") if row["error"]]
    assert {row["id"] for row in failed} == {row["id"] for row in aside.values()} and not any(row["response"] for row in failed)
    again = finetune_accel("score", tmp_path / "in.jsonl", "--model", model, "--out", "out", "--max-tokens", 4, cwd=tmp_path)
    assert f"0 answered, 0 set aside, {3 * len(BAD)} known" in again and len(table(tmp_path / "out_set_aside")) == len(BAD)


def test_ids_are_by_content(model, tmp_path):
    rows = prompts(6)
    job = a_job(model, write(tmp_path / "in.jsonl", [*rows, rows[0], {**rows[1], "at": None}]), tmp_path / "out")
    counts = run_job(job)
    assert (counts.rows, counts.answered, counts.known) == (8, 6, 2), "the same row twice is one question; null says nothing"
    pq.write_table(pa.Table.from_pylist([*reversed(rows), *prompts(3, 6)]), tmp_path / "more.parquet")
    counts = run_job(a_job(model, tmp_path / "more.parquet", tmp_path / "out"))
    assert (counts.answered, counts.known) == (3, 6), "in another file, another order and another format it is the same row"
    assert len(by_prompt(job.out)) == 9


def test_forms_of_rows(model, tmp_path):
    form = Form("supervised", prompt_template="{who} says: {what}", system_prompt="Answer with JSON.")
    run_job(a_job(model, write(tmp_path / "a.jsonl", [{"who": "Ann", "what": "lights on", "id": 7}]), tmp_path / "a", form=form))
    run_job(a_job(model, write(tmp_path / "b.jsonl", [{"messages": [{"role": "system", "content": "Answer with JSON."},
                                                                   {"role": "user", "content": "Ann says: lights on"}]}]), tmp_path / "b"))
    (tmp_path / "c.csv").write_text("frage\nlights on\n")
    run_job(a_job(model, tmp_path / "c.csv", tmp_path / "c", form=Form("supervised", columns={"prompt": "frage"})))
    run_job(a_job(model, write(tmp_path / "d.jsonl", [{"text": "lights on and"}]), tmp_path / "d", form=Form("continued_pretraining")))
    one, other, third, text = (table(tmp_path / name)[0] for name in "abcd")
    assert one["response"] == other["response"] and json.loads(one["row"])["id"] == 7
    assert third["error"] is None and text["prompt_tokens"] < third["prompt_tokens"]


def test_refusals(model, tmp_path):
    source = write(tmp_path / "in.jsonl", prompts(3))
    run_job(a_job(model, source, tmp_path / "out"))
    other = tiny_model(tmp_path / "other", WORDS, seed=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    write_deltalake(tmp_path / "foreign", pa.table({"a": [1]}))
    for arguments, rule in (((other, source, tmp_path / "out"), "answers of another model"),
                            ((model, source, tmp_path / "out", 9), "the same model asked in another way"),
                            ((model, source, tmp_path / "full"), "is no Delta table"),
                            ((model, source, tmp_path / "foreign"), "other columns"),
                            ((model, tmp_path / "none.jsonl", tmp_path / "new"), "cannot be opened"),
                            ((tmp_path / "nothing", source, tmp_path / "new"), "neither a run folder")):
        with pytest.raises(BadInput, match=rule):
            run_job(a_job(*arguments))
    assert len(table(tmp_path / "out")) == 3 and (tmp_path / "full" / "notes.txt").exists()
    bad = tmp_path / "schema.json"
    bad.write_text('{"type": "nothing"}')
    for options, rule in ((("--schema", bad), "json_schema"), (("--follow",), "no Delta table"), (("--constrain",), "JSON schema"),
                          (("--spark", "--follow"), "--checkpoint"), (("--spark",), "Parquet"), (("--column", "prompt"), "NAME=VALUE")):
        refused = command("score", source, "--model", model, "--out", tmp_path / "new", *options).exception
        assert isinstance(refused, BadInput) and rule in str(refused), refused
    write_deltalake(tmp_path / "plain", pa.table({"prompt": ["a"]}))
    with pytest.raises(BadInput, match="no change feed"):
        follow_job(a_job(model, tmp_path / "plain", tmp_path / "new"), lambda *_: None)


def test_two_jobs_do_not_write_one_table(model, tmp_path):
    from finetune_accel.core.scored import writing

    source = write(tmp_path / "in.jsonl", prompts(3))
    with writing(tmp_path / "out"), pytest.raises(BadInput, match="by another job"):
        run_job(a_job(model, source, tmp_path / "out"))


def test_what_it_will_take_and_the_cap(model, tmp_path):
    job = a_job(model, write(tmp_path / "in.jsonl", [*prompts(300), {"question": 1}]), tmp_path / "out", max_tokens=6, machine_hour=3.6)
    with closing(job.predictor()) as predictor:
        expected = score_job.dry_run(job, predictor)
    assert not (tmp_path / "out").exists() and (expected.rows, expected.refused, expected.sample) == (301, 1, scoring.SAMPLE)
    asked = ("score", job.source, "--model", model, "--out", job.out, "--max-tokens", 6)
    said = command(*asked, "--dry-run", "--machine-hour", 3.6).output
    assert "301 rows" in said and " EUR" in said and not (tmp_path / "out").exists()
    cap = expected.tokens[1] // 2
    assert "stopped before all rows" in str(command(*asked, "--token-cap", cap).exception)
    spent = sum(row["prompt_tokens"] + row["completion_tokens"] for row in table(tmp_path / "out"))
    assert cap - 64 < spent <= cap, "the cap is used and never passed"
    assert "stopped before" in str(command(*asked, "--token-cap", cap).exception)
    assert sum(row["prompt_tokens"] + row["completion_tokens"] for row in table(tmp_path / "out")) <= cap, "nor by running again"
    counts = run_job(job)
    whole = sum((row["prompt_tokens"] or 0) + (row["completion_tokens"] or 0) for row in table(tmp_path / "out"))
    assert counts.rows == 301 and expected.tokens[0] <= whole <= expected.tokens[2]


def test_answers_that_break_the_schema(model, tmp_path):
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}
    source = write(tmp_path / "in.jsonl", prompts(5))
    counts = run_job(a_job(model, source, tmp_path / "free", json_schema=schema))
    assert counts.set_aside == 5 and set(counts.rules) <= {"answer is not JSON", "answer breaks the schema"}
    rows = table(tmp_path / "free")
    assert all(row["error"] and row["response"] is not None and row["completion_tokens"] for row in rows)
    assert {row["id"] for row in table(tmp_path / "free_set_aside")} == {row["id"] for row in rows}
    counts = run_job(a_job(model, source, tmp_path / "held", json_schema={"enum": ["on", "off"]}, constrain=True))
    assert counts.set_aside == 0 and {json.loads(row["response"]) for row in table(tmp_path / "held")} <= {"on", "off"}


def test_an_engine_that_dies_is_started_again(model, tmp_path):
    with closing(Predictor(str(model), "reference", TableParameters(max_tokens=20))) as predictor:
        asks = [(row["prompt"], predictor.ask([{"role": "user", "content": row["prompt"]}])) for row in prompts(150)]
        expected = dict(predictor.answers(asks))
        found = {}
        for number, (key, answer) in enumerate(predictor.answers(asks)):
            found[key] = answer
            if number == 40:
                predictor.engine.process.kill()
    assert found == expected


@pytest.mark.slow
def test_a_row_that_kills_the_engine_alone_is_set_aside(model, tmp_path, monkeypatch):
    with closing(Predictor(str(model), "reference", TableParameters(max_tokens=20))) as predictor:
        asks = [(row["prompt"], predictor.ask([{"role": "user", "content": row["prompt"]}])) for row in prompts(80)]
        poison = asks[30][1].prompt
        start = predictor._start

        def started():
            start()
            take, process = predictor.engine.take, predictor.engine.process

            def taken(asks):
                if poison in [ask.prompt for _, ask in asks]:
                    process.kill()
                    process.join()
                return take(asks)

            predictor.engine.take = taken

        monkeypatch.setattr(predictor, "_start", started)
        predictor.close()
        started()
        found = dict(predictor.answers(asks))
    assert [key for key, answer in found.items() if not hasattr(answer, "text")] == [asks[30][0]] and len(found) == 80
    assert found[asks[30][0]].rule == "engine died"


# --- what is killed ---

SLOWLY = "from finetune_accel.core import scoring; scoring.COMMIT_ROWS = 25; from finetune_accel.core.cli import main; main()"


def start(model, source, out, *options) -> subprocess.Popen:
    """Start a job as a process of its own that commits every 25 rows."""
    command = [sys.executable, "-c", SLOWLY, "score", source, "--model", model, "--out", out, "--max-tokens", 24, *options]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def kill(process: subprocess.Popen) -> None:
    """kill -9 the job and all it started, at once."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        try:
            os.kill(one.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
    process.stdout.close()


def rows_there(out) -> int:
    return len(known_ids(out))


def killed_then_finished(begin, out, kills: int, whole: int, ends) -> int:
    """Kill a job `kills` times, each at a random moment after it has written more; let it end. Return how often it was killed with rows to do."""
    chance, worth = random.Random(7), 0
    for _ in range(kills):
        process, before = begin(), rows_there(out)
        until = time.monotonic() + 120
        while rows_there(out) == before < whole and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.2))
        worth += process.poll() is None and rows_there(out) < whole
        kill(process)
    done, process = rows_there(out) == whole, begin()
    said = ends(process)
    assert process.wait() in ((0, -signal.SIGTERM) if done else (0,)), said  # with nothing left to do it is told to stop while it starts
    return worth


def finish(process: subprocess.Popen) -> str:
    return process.communicate(timeout=300)[0]


def finish_stream(out, whole: int):
    """Return what lets a stream come to its end and stops it with SIGTERM."""
    def ends(process: subprocess.Popen) -> str:
        until = time.monotonic() + 300
        while rows_there(out) < whole and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        return process.communicate(timeout=60)[0]

    return ends


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    """{prompt: answer} of 600 rows, in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_job(a_job(model, write(folder / "in.jsonl", prompts(600)), folder / "out", max_tokens=24))
    return by_prompt(folder / "out")


def sources(folder, form: str, first: int = 0) -> str:
    """Write the 600 rows as JSON lines, as versions of a Delta table, or as Parquet files, 30 from the `first` on."""
    parts = [prompts(20, 20 * number) for number in range(first, 30)]
    if form == "jsonl":
        return write(folder / "in.jsonl", [row for part in parts for row in part])
    for number, part in enumerate(parts):
        if form == "delta":
            write_deltalake(folder / "asked", pa.Table.from_pylist(part), mode="append")
        else:
            (folder / "asked").mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(part), folder / "asked" / f"part-{number:02d}.parquet")
    return str(folder / "asked")


def kill_batch(model, folder, uninterrupted, kills: int) -> int:
    source, out = sources(folder, "jsonl"), folder / "out"
    worth = killed_then_finished(lambda: start(model, source, out), out, kills, 600, finish)
    assert by_prompt(out) == uninterrupted
    return worth


def kill_stream(model, folder, uninterrupted, kills: int) -> int:
    source, out, stop = folder / "asked", folder / "out", threading.Event()
    write_deltalake(source, pa.Table.from_pylist(prompts(20)), configuration=FEED)
    follow_job(a_job(model, source, out, max_tokens=24), lambda *_: stop.set(), stop)  # what is there at first; the rest comes by the change feed
    sources(folder, "delta", first=1)
    code = SLOWLY.replace("scoring.COMMIT_ROWS = 25", "from finetune_accel.core import following; following.VERSIONS = 1")

    def begin() -> subprocess.Popen:
        command = [sys.executable, "-c", code, "score", source, "--model", model, "--out", out, "--max-tokens", 24, "--follow"]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    worth = killed_then_finished(begin, out, kills, 600, finish_stream(out, 600))
    assert by_prompt(out) == uninterrupted
    return worth


def kill_spark(model, folder, uninterrupted, kills: int, stream: bool) -> int:
    source, out = sources(folder, "parquet"), folder / "out"
    options = ["--spark", *(["--follow", "--checkpoint", folder / "checkpoint"] if stream else [])]
    code = SLOWLY.replace("scoring.COMMIT_ROWS = 25", "from finetune_accel.core import spark_scoring; spark_scoring.CHUNK_ROWS = 60; spark_scoring.FILES_A_BATCH = 2")

    def begin() -> subprocess.Popen:
        command = [sys.executable, "-c", code, "score", source, "--model", model, "--out", out, "--max-tokens", 24, *options]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    worth = killed_then_finished(begin, out, kills, 600, finish_stream(out, 600) if stream else finish)
    assert by_prompt(out) == uninterrupted
    return worth


needs_java = pytest.mark.skipif(not shutil.which("java"), reason="Spark needs Java 17, which is not on this machine")


@pytest.mark.slow
def test_a_killed_batch_goes_on(model, tmp_path, uninterrupted):
    assert kill_batch(model, tmp_path, uninterrupted, kills=1) >= 1


@pytest.mark.slow
def test_a_killed_stream_goes_on(model, tmp_path, uninterrupted):
    assert kill_stream(model, tmp_path, uninterrupted, kills=1) >= 1


@needs_java
def test_spark_answers_the_same(model, tmp_path, uninterrupted):
    assert kill_spark(model, tmp_path, uninterrupted, kills=0, stream=False) == 0
    (row,) = [row for row in table(tmp_path / "out") if json.loads(row["row"])["prompt"] == prompts(1, 45)[0]["prompt"]]
    assert (row["source"], row["row_number"]) == ("part-02.parquet", 6)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["batch", "stream", "spark batch", "spark stream"])
def test_killed_ten_times(model, tmp_path, uninterrupted, way):
    if way.startswith("spark") and not shutil.which("java"):
        pytest.skip("Spark needs Java 17, which is not on this machine")
    if way.startswith("spark"):
        worth = kill_spark(model, tmp_path, uninterrupted, 10, stream=way == "spark stream")
    else:
        worth = (kill_batch if way == "batch" else kill_stream)(model, tmp_path, uninterrupted, 10)
    print(f"{way}: killed {worth} times with rows to do")
    assert worth >= 5


def test_a_job_that_is_told_to_stop_keeps_what_was_asked(model, tmp_path):
    source, out = write(tmp_path / "in.jsonl", prompts(3000)), tmp_path / "out"
    process = start(model, source, out)
    while rows_there(out) < 50:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "the same command" in said and "goes on" in said
    assert 50 <= rows_there(out) < 3000


# --- streams ---

def fed(model, folder, seconds: float, restarts: int) -> str:
    """Feed a table for `seconds` at varying rates, with a new column and poisoned rows, while a job follows it and is killed `restarts` times.

    Returns what came of it, in words, with what the last job said of its lag.
    """
    source, out, chance = folder / "asked", folder / "out", random.Random(11)
    write_deltalake(source, pa.Table.from_pylist(prompts(3)), configuration=FEED)
    fed_rows, said, number, began = {row["prompt"] for row in prompts(3)}, [], 3, time.monotonic()
    stops = [seconds * (turn + 1) / (restarts + 1) for turn in range(restarts)]
    process = start(model, source, out, "--follow")
    while (now := time.monotonic() - began) < seconds:
        rows = prompts(chance.choice([1, 2, 5, 40]), number)
        number += len(rows)
        fed_rows |= {row["prompt"] for row in rows}
        more = {"channel": "app"} if now > seconds / 2 else {}
        poison = [{"prompt": f"poison {number} <|im_end|>"}] if number % 7 == 0 else []
        fed_rows |= {row["prompt"] for row in poison}
        write_deltalake(source, pa.Table.from_pylist([{**row, **more} for row in [*rows, *poison]]), mode="append", schema_mode="merge")
        if stops and now > stops[0]:
            stops.pop(0)
            kill(process)
            process = start(model, source, out, "--follow")
        time.sleep(chance.choice([0.05, 0.2, 1.0]))
    said = [line for line in finish_stream(out, len(fed_rows))(process).splitlines() if "is scored" in line]
    assert said[-1].split(" is scored, ")[1].startswith("nothing waits"), said[-3:]
    found = {json.loads(row["row"])["prompt"]: row for row in table(out)}
    assert found.keys() == fed_rows and len(table(out)) == len(fed_rows), "nothing lost, nothing doubled"
    poisoned = {prompt for prompt in fed_rows if prompt.startswith("poison")}
    assert poisoned and {prompt for prompt, row in found.items() if row["error"]} == poisoned
    assert {json.loads(row["row"])["prompt"] for row in table(folder / "out_set_aside")} == poisoned and len(table(folder / "out_set_aside")) == len(poisoned)
    assert any("channel" in row["row"] for row in found.values())
    behind = [float(line.split(" versions and ")[1].split(" s behind")[0]) for line in said if " s behind" in line]
    return (f"{len(fed_rows)} rows in {seconds:.0f} s, {len(poisoned)} poisoned and set aside, {restarts} kills; the last of the jobs committed {len(said)} times "
            f"and was at most {max(behind, default=0):.0f} s behind")


def test_a_stream_with_everything(model, tmp_path):
    fed(model, tmp_path, 20, restarts=1)


@pytest.mark.slow
def test_a_stream_of_five_minutes(model, tmp_path):
    print(fed(model, tmp_path, 300, restarts=2))


def test_changed_and_deleted_rows_and_the_lag(model, tmp_path):
    source, seen, stop = tmp_path / "asked", [], threading.Event()
    write_deltalake(source, pa.Table.from_pylist(prompts(4)), configuration=FEED)

    def told(counts, lag):
        seen.append((counts.rows, lag))
        if len(seen) == 1:
            DeltaTable(str(source)).update(updates={"prompt": "'lights off'"}, predicate=f"prompt = '{prompts(1)[0]['prompt']}'")
            DeltaTable(str(source)).delete(f"prompt = '{prompts(1, 1)[0]['prompt']}'")
            DeltaTable(str(source)).optimize.compact()
        elif seen[-1][1].version == DeltaTable(str(source)).version():
            stop.set()

    follow_job(a_job(model, source, tmp_path / "out"), told, stop)
    assert set(by_prompt(tmp_path / "out")) == {row["prompt"] for row in prompts(4)} | {"lights off"}
    assert seen[0][1].latest == 0 and str(seen[0][1]) == "version 0 of 0 is scored, nothing waits" and seen[-1][1].version == DeltaTable(str(source)).version() >= 2


def test_a_table_that_has_forgotten_what_comes_next(model, tmp_path):
    source, stop = tmp_path / "asked", threading.Event()
    write_deltalake(source, pa.Table.from_pylist(prompts(4)), configuration=FEED)
    job = a_job(model, source, tmp_path / "out")
    follow_job(job, lambda *_: stop.set(), stop)
    write_deltalake(source, pa.Table.from_pylist(prompts(4, 4)), mode="append")
    DeltaTable(str(source)).delete(f"prompt = '{prompts(1, 5)[0]['prompt']}'")
    DeltaTable(str(source)).vacuum(0, dry_run=False, enforce_retention_duration=False)
    with pytest.raises(BadInput, match=r"asked@1\.\.\d+: the changes of these versions cannot be read .*`score` into a new --out"):
        follow_job(job, lambda *_: None)
    assert len(by_prompt(job.out)) == 4


# --- elsewhere ---

def test_sql_for_an_endpoint_is_sql_of_databricks():
    for form in (Form("supervised", system_prompt="It's \\ \"so\"\nhere"), Form("chat"), Form("supervised", prompt_template="{who}: {what} ok"),
                 Form("supervised", columns={"prompt": "a question"})):
        (statement,) = sqlglot.parse(ai_query_sql("lights", "main.home.asked", "main.home.answered", form, 64), read="databricks")
        assert statement.sql("databricks") and statement.kind == "TABLE"
    (text,) = [one.this for one in sqlglot.parse_one(ai_query_sql("e", "a.b.c", "a.b.d", Form("supervised", system_prompt="It's \\ so"), 1),
                                                     read="databricks").find_all(sqlglot.exp.Literal) if "so" in str(one.this)]
    assert text == "It's \\ so"
    for source in ("asked", "a.b", "a.b.c; DROP TABLE x"):
        with pytest.raises(BadInput, match="Unity Catalog"):
            ai_query_sql("e", source, "a.b.d", Form("chat"), 1)


@pytest.mark.slow
def test_memory_is_bounded(model, tmp_path):
    """Rows that are known, or cannot be asked, are many; they must not gather."""
    many = tmp_path / "many.jsonl"
    with open(many, "wb") as file:
        for number in range(60_000):
            file.write(json.dumps({"question": f"{number} " + "x" * 300}).encode() + b"\n")
    job = a_job(model, many, tmp_path / "out")
    process = subprocess.Popen([sys.executable, "-m", "finetune_accel.core.cli", "score", many, "--model", model, "--out", job.out, "--max-tokens", "4"])
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    assert process.wait() == 0 and len(table(f"{job.out}_set_aside")) == 60_000
    assert peak < 1.5 * 2**30, f"{peak / 2**30:.2f} GiB"
