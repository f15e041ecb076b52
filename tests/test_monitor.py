"""Monitoring: alarms that hold their rate, windows counted once whatever is killed, Databricks' definitions, and refusals.

A classifier that we serve is monitored in test_existing_models.py.
"""
from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import finetune_accel
from deltalake import DeltaTable, write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, ks_2samp
from typer.testing import CliRunner

from finetune_accel.core.baseline import make_baseline, read_exchanges
from finetune_accel.core.cli import app
from finetune_accel.core.criteria import Criterion
from finetune_accel.core.errors import BadInput, Broken
from finetune_accel.core.inference_table import PAYLOAD, append, check_table, compact, payload
from finetune_accel.core.monitor_tables import DRIFT, PROFILE
from finetune_accel.core.monitoring import Job, monitor, read_table
from finetune_accel.core.permutation import compare
from finetune_accel.core.sketches import ColumnCounts
from finetune_accel.core.traffic import exchanges
from finetune_accel.core.watched import Column, language_view, table_view
from finetune_accel.core.window_counts import COUNTS, Reading, unpacked_row, unpacked_schema

DAY = datetime(2026, 1, 1, tzinfo=timezone.utc)
CRITERIA = [Criterion(metric="json_valid", at_least=0.5), Criterion(metric="exact_match", at_least=0.1)]
TOPICS = {"home": [f"home{n}" for n in range(40)], "away": [f"away{n}" for n in range(40)]}


def row(number: int, day: int, topic: str = "home", **more) -> dict:
    """Return a row of an inference table; its words depend on its number alone."""
    rng = np.random.default_rng([number, day])
    asked = " ".join(rng.choice(TOPICS[topic], 5))
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": '{"on": true}'}, "finish_reason": "stop"}],
              "usage": {"prompt_tokens": 20, "completion_tokens": int(rng.integers(4, 9)), "total_tokens": 30}}
    return payload({"databricks_request_id": f"{day}-{number}", "client_request_id": f"mine-{day}-{number}", "request_time": DAY + timedelta(days=day, minutes=number),
                    "status_code": 200, "execution_duration_ms": int(rng.integers(20, 60)), "request": json.dumps({"messages": [{"role": "user", "content": asked}]}),
                    "response": json.dumps(answer), "served_entity_id": "home:3", **more})


def write_day(folder: Path, day: int, topic: str = "home", count: int = 60, **more) -> None:
    check_table(folder)
    append(folder, pa.RecordBatch.from_pylist([row(number, day, topic, **more) for number in range(count)], schema=PAYLOAD))


def a_job(scratch: Path, **more) -> Job:
    held = [exchanges(row(number, 900)) for number in range(80)]
    found = [one | {"latency_ms": None, "prompt_tokens": None, "completion_tokens": None} for (one,) in held]
    base = make_baseline(found, {one["request_id"]: '{"on": true}' for one in found}, CRITERIA, False, "the test questions")
    return Job("home", str(scratch / "payload"), scratch / "monitored", base, {}, "1 day", 0.05, 2, 3, 40, 17)._replace(**more)


def look(job: Job, day: int = 99) -> dict:
    return monitor(job, 10, "run", None, now=DAY + timedelta(days=day))


# --- the test ---

def test_false_alarms_keep_their_rate_whatever_the_sizes_and_rare_faults():
    """300 windows without a change, of five figures each: the number that is out is one that a rate of 10 % gives."""
    rng, columns = np.random.default_rng(3), [Column("number", "number", "either", ""), Column("time", "number", "up", ""), Column("rare", "share", "up", ""),
                                              Column("kind", "category", "either", ""), Column("usual", "share", "down", "")]

    def some(count):
        time = rng.lognormal(size=count)
        return [{"number": float(np.round(t)), "time": float(t), "rare": bool(rng.random() < 0.01), "kind": str(rng.integers(4)), "usual": bool(rng.random() < 0.9)}
                for t in time]

    out = [min(one.adjusted for one in compare(some(80), some(int(rng.integers(30, 120))), columns, 0.1, seed)) <= 0.1 for seed in range(300)]
    low, high = binom.ppf([0.001, 0.999], 300, 0.1)
    assert low <= sum(out) <= high, sum(out)


def test_a_fault_that_the_baseline_never_had_is_no_alarm_once_but_is_one_often():
    column = [Column("refusal", "share", "up", "")]
    never, some = [{"refusal": False}] * 200, lambda count: [{"refusal": n < count} for n in range(100)]  # noqa: E731
    assert compare(never, some(1), column, 0.05, 0)[0].adjusted > 0.05 >= compare(never, some(8), column, 0.05, 0)[0].adjusted


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True, width=32)), max_size=80), st.integers(0, 80), st.integers(0, 80))
def test_counts_are_the_same_however_rows_are_cut(values, first, second):
    whole, parts = ColumnCounts("number"), ColumnCounts("number")
    whole.update(values)
    first, second = sorted((first, second))
    for some in (values[:first], values[first:second], values[second:]):
        part = ColumnCounts("number")
        part.update(some)
        parts.merge(ColumnCounts.from_dict(json.loads(json.dumps(part.as_dict()))))
    ours, theirs = whole.as_dict(), parts.as_dict()
    for exact in ("total", "squares"):  # floating point sums depend on their order
        assert np.isclose(ours["numbers"].pop(exact), theirs["numbers"].pop(exact), rtol=1e-6)
    assert ours == theirs and whole.count + whole.nulls == len(values)


# --- the tables ---

def test_tables_have_databricks_columns_and_right_figures(tmp_path):
    for day in range(3):
        write_day(tmp_path / "payload", day)
    job = a_job(tmp_path)
    found = look(job)
    assert found["rows"] == {"in": 180, "kept": 180} and found["judged"] == 3 and not found["alerts"]
    profile, drift = (DeltaTable(job.folder / name) for name in ("profile", "drift"))
    assert {field.name for field in profile.schema().fields} == set(PROFILE.names) and {field.name for field in drift.schema().fields} == set(DRIFT.names)
    times = [[row(number, day)["execution_duration_ms"] for number in range(60)] for day in range(3)]
    (ours,) = [one for one in read_table(job.folder / "profile") if one["column_name"] == "latency_ms" and one["slice_key"] is None and one["window"]["start"] == DAY]
    assert (ours["count"], ours["num_nulls"], ours["avg"], ours["min"]) == (60, 0, np.mean(times[0]), min(times[0])) and abs(ours["median"] / np.median(times[0]) - 1) < 0.03
    (gap,) = [one for one in read_table(job.folder / "drift") if one["column_name"] == "latency_ms" and one["slice_key"] is None
              and one["window"]["start"] == DAY + timedelta(days=2)]
    assert gap["drift_type"] == "CONSECUTIVE" and abs(gap["ks_test"]["statistic"] - ks_2samp(times[1], times[2]).statistic) < 0.02
    assert {one["slice_value"] for one in read_table(job.folder / "profile")} == {None, "home:3"}


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from finetune_accel.core import window_counts
from test_monitor import a_job, look
real, stop = window_counts.write_deltalake, int(sys.argv[3])
calls = iter(range(99))
def write(*given, **more):
    if next(calls) == stop:
        print("here", flush=True)
        sys.stdin.readline()
    real(*given, **more)
window_counts.write_deltalake = write
print(look(a_job(Path(sys.argv[1])))["rows"])
"""


@pytest.mark.parametrize("stop", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_between_any_two_commits_rows_count_once(tmp_path, stop):
    """A process is killed before its first and before its second commit, rows come, small files are joined: the next one counts each row once."""
    write_day(tmp_path / "payload", 0)
    child = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path, Path(__file__).parent, str(stop)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    write_day(tmp_path / "payload", 1)
    compact(tmp_path / "payload", {"2026-01-01", "2026-01-02"})
    job = a_job(tmp_path)
    while look(job)["read"]:
        pass
    assert look(job)["rows"] == {"in": 120, "kept": 120} and DeltaTable(job.folder / "unpacked").count() == 120
    assert [one["rows"] for one in read_table(job.folder / "windows")] == [60, 60]


def test_yesterday_is_not_read_again(tmp_path):
    for day in range(2):
        write_day(tmp_path / "payload", day)
    job = a_job(tmp_path)
    look(job, 2)
    for file in (tmp_path / "payload").glob("*/*.parquet"):
        file.unlink()  # who reads them now fails
    write_day(tmp_path / "payload", 2)
    assert look(job, 3)["read"]["account"] == {"in": 60, "kept": 60} and len(read_table(job.folder / "windows")) == 3


def test_an_alert_comes_is_told_once_and_goes_by_itself(tmp_path, caplog):
    job, held = a_job(tmp_path), []
    with caplog.at_level(logging.WARNING):
        for day, topic in enumerate(["home", "away", "home", "away", "away", "home", "home", "home"]):
            write_day(tmp_path / "payload", day, topic)
            held.append([alert["column"] for alert in look(job, day + 1)["alerts"]])
    assert held == [[], [], [], ["prompt"], ["prompt"], ["prompt"], [], []]
    assert caplog.text.count("ALERT") == caplog.text.count("OVER") == 1


def test_a_change_that_is_to_stay_is_compared_with_itself(tmp_path):
    table = tmp_path / "payload"
    for day in range(6):
        write_day(table, day, **({"execution_duration_ms": 90} if day >= 3 else {}))
    before = a_job(tmp_path, baseline=make_baseline(read_exchanges(f"delta:{table}@4"), {}, CRITERIA, False, "all days"))
    assert [alert["column"] for alert in look(before)["alerts"]] == ["latency_ms"]
    since = read_exchanges(f"delta:{table}", "2026-01-04")
    assert {one["latency_ms"] for one in since} == {90} and len(since) == 180
    after = a_job(tmp_path, folder=tmp_path / "since", baseline=make_baseline(since, {}, CRITERIA, False, "the days since"))
    assert look(after)["alerts"] == []


def test_what_breaks_is_named(tmp_path):
    """Slower, failing, cut off, refusing, broken JSON: each is an alert of its column and of no other fault's."""
    cases = {"latency_ms": {"execution_duration_ms": 90}, "error": {"status_code": 500},
             "cut": {"response": json.dumps({"choices": [{"text": '{"on": true}', "finish_reason": "length"}]})},
             "refusal": {"response": json.dumps({"choices": [{"text": "I am sorry, I can't", "finish_reason": "stop"}]})}}
    for name, more in cases.items():
        payload_folder = tmp_path / name / "payload"
        for day in range(3):
            write_day(payload_folder, day, **({} if day == 0 else more))
        found = {alert["column"] for alert in look(a_job(tmp_path / name))["alerts"]}
        assert name in found and not found & (set(cases) - {name}), (name, found)
        assert "json_valid" in found or name != "refusal"


def test_labels_make_the_quality_seen_and_training_due(tmp_path):
    for day in range(3):
        write_day(tmp_path / "payload", day)
    job = a_job(tmp_path)
    assert not look(job)["alerts"]
    labels = {f"mine-{day}-{number}": {"request_id": f"mine-{day}-{number}", "response": '{"on": false}', "template": "t"} for day in (1, 2) for number in range(30)}
    found = look(job._replace(labels=labels))
    assert [alert["column"] for alert in found["alerts"]] == ["scored exact_match"] and found["retrain"]["due"]
    rows = [json.loads(line) for line in (job.folder / "new_rows.jsonl").read_text().splitlines()]
    assert len(rows) == 60 and rows[0].keys() == {"prompt", "response", "template"}


# --- the phase and the command ---

def test_the_phase_replays_and_the_page_opens_offline(finished):
    folder, output = finished
    assert "monitor:" in output
    result = json.loads((folder / "runs/mine/monitor.json").read_text())
    assert result["replayed"] and result["alerts"] == [] and result["account"].get("in", 0) == result["metrics"]["rows"]
    outputs = {name: folder / "runs/mine" / one["path"] for name, one in result["outputs"].items()}
    page = outputs["dashboard.html"].read_text()
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?https?:|@import|url\(http|<script", page) and "Replayed" in page
    assert {"alerts.json", "monitor.yml", "monitored", "to_label.csv"} <= set(outputs)


def test_the_command_ends_with_1_while_an_alert_holds(finished, tmp_path):
    folder, _ = finished
    run = folder / "runs/mine"
    assert "names no inference table" in finetune_accel("monitor", run, cwd=folder, code=2)
    for day in range(4):
        write_day(tmp_path / "payload", day, "home" if day < 2 else "away")
        write_day(tmp_path / "calm", day)
    base = f"delta:{tmp_path / 'calm'}@{DeltaTable(tmp_path / 'calm').version()}"
    said = finetune_accel("monitor", run, "--table", tmp_path / "payload", "--baseline", base, cwd=folder, code=1)
    assert "ALERT prompt since 2026-01-03" in said and "240 in" not in said and "in 240" in said
    assert "train again? prompt changed, but only 0 of 100 rows are labelled" in said
    (board,) = (run / "monitored").glob("*/dashboard.html")
    assert "away" in board.read_text()


@pytest.mark.parametrize("given, says", [
    (("--table", "nowhere"), "is no Delta table"), (("--table", "plain"), "has no change feed"), (("--table", "payload", "--window", "1 month"), "monitor.window"),
    (("--table", "payload", "--webhook", "http://example.com/x"), "must be https"), (("--table", "payload", "--webhook", "https://example.com/x?token=abc"), "credential"),
    (("--table", "payload", "--labels", "labels.jsonl"), "labels.jsonl:1: has no `request_id`"), (("--table", "payload", "--baseline", "delta:payload@99"), "check the version"),
    (("--table", "payload", "--baseline-from", "2026-01-01"), "needs baseline"), (("--table", "payload", "--baseline", "delta:payload@1", "--baseline-from", "today"), "baseline_from"),
    (("--table", "payload", "--baseline", "delta:payload@1", "--baseline-from", "2026-13-99"), "year-month-day"),
    (("--table", "payload", "--baseline", "delta:payload@1", "--baseline-from", "2027-01-01"), "has no rows")])
def test_bad_input_is_named(finished, tmp_path, given, says, monkeypatch):
    write_day(tmp_path / "payload", 0, count=3)
    write_deltalake(tmp_path / "plain", pa.table({"x": [1]}))
    (tmp_path / "labels.jsonl").write_text('{"response": "x"}\n')
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["monitor", str(finished[0] / "runs/mine"), *given])
    assert isinstance(done.exception, BadInput) and says in str(done.exception) and done.exception.fix, done.exception


def test_two_monitors_of_one_table_do_not_meet(tmp_path):
    from filelock import FileLock

    write_day(tmp_path / "payload", 0)
    job = a_job(tmp_path)
    job.folder.mkdir()
    with FileLock(job.folder / ".lock"), pytest.raises(BadInput, match="another monitor"):
        look(job)
    assert look(job)["rows"]["in"] == 60


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["messages", "prompt", "inputs", "instances", "dataframe_split", "columns", "data", "role", "content", "choices", "message", "text", "usage",
                     "predictions", "prompt_tokens"]), inner, max_size=4), max_leaves=12))
def test_no_body_stops_the_monitor(body):
    """Whatever JSON stands in a row, it is read or set aside, and what is read fits the tables."""
    text = json.dumps(body)
    for request, response in ((text, text), (row(0, 0)["request"], text), (text, row(0, 0)["response"])):
        fits(exchanges({**row(0, 0), "request": request, "response": response}))


def fits(found: list[dict] | Broken) -> None:
    if isinstance(found, Broken):
        return
    for view in (language_view(CRITERIA), table_view(found, CRITERIA)):
        reading = Reading(view, "1 day")
        rows = [unpacked_row(one, view) for one in found]
        reading.count(rows)
        assert pa.Table.from_pylist(rows, schema=unpacked_schema(view.columns)).num_rows == len(found)
        assert pa.Table.from_pylist(reading.as_rows(0), schema=COUNTS).num_rows > 1


@pytest.mark.parametrize("request_body, response_body", [
    (r'{"prompt": "half \ud800 a pair"}', r'{"choices": [{"text": "\udfff", "finish_reason": {"why": 1}}]}'),
    ('{"inputs": {"age": [1e999, 7]}}', '{"predictions": [1, {"a": 2}]}'), (f'{{"inputs": {{"age": [{10**400}]}}}}', '{"predictions": [true]}'),
    ('{"dataframe_split": {"columns": [["a"]], "data": [[1]]}}', '{"predictions": [1]}'),
    ('{"prompt": ["a", "b"]}', f'{{"choices": [{{"text": "x"}}], "usage": {{"prompt_tokens": {10**30}}}}}')])
def test_odd_bodies_fit_the_tables(request_body, response_body):
    fits(exchanges({**row(0, 0), "request": request_body, "response": response_body}))
