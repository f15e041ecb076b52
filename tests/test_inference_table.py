"""The inference table: what stands in it, and what happens to it and to answers when disks fill, permissions go and processes are killed."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from statistics import median

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_accel.core import inference_table
from finetune_accel.core.inference_table import MAX_QUEUE_BYTES, InferenceTable, clean
from finetune_accel.core.secrets import SECRET_PATTERNS

# as https://docs.databricks.com/aws/en/ai-gateway/inference-tables lists them, in Delta's names of types
DATABRICKS = {"databricks_request_id": "string", "client_request_id": "string", "request_date": "date", "request_time": "timestamp",
              "status_code": "integer", "sampling_fraction": "double", "execution_duration_ms": "long", "request": "string",
              "response": "string", "logging_error_codes": {"type": "array", "elementType": "string", "containsNull": True},
              "served_entity_id": "string", "requester": "string"}


def row(number: int | str = 0, **more) -> dict:
    return {"databricks_request_id": str(number), "status_code": 200, "execution_duration_ms": 12, "request": '{"messages": []}',
            "response": '{"choices": []}', "served_entity_id": "home/3", "requester": "token", **more}


def stored(folder) -> list[dict]:
    return DeltaTable(folder).to_pyarrow_table().to_pylist()


def numbers(folder) -> list[int]:
    return sorted(int(found["databricks_request_id"]) for found in stored(folder))


def until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_columns_types_and_partitions(tmp_path):
    table = InferenceTable(tmp_path / "payload", seconds=60)
    evening = datetime(2026, 11, 22, 23, 59, 59, 999_000, tzinfo=timezone.utc)
    table.write(row(1, request_time=evening, client_request_id="mine"))
    table.write(row(2, request="x" * 2_000_000, response="é" * 600_000, status_code=400))
    table.write(row(3, sampling_fraction=0.5))
    assert table.close() and (table.written, table.dropped, table.failures, table.problem) == (3, 0, 0, None)
    delta = DeltaTable(tmp_path / "payload")
    assert {field["name"]: field["type"] for field in json.loads(delta.schema().to_json())["fields"]} == DATABRICKS
    assert delta.metadata().partition_columns == ["request_date"] and {"request_date": "2026-11-22"} in delta.partitions()
    first, large, sampled = sorted(stored(tmp_path / "payload"), key=lambda found: found["databricks_request_id"])
    assert first == row(1, client_request_id="mine", request_time=evening, request_date=evening.date(), sampling_fraction=1.0, logging_error_codes=[])
    assert large["request"] is large["response"] is None
    assert large["logging_error_codes"] == ["MAX_REQUEST_SIZE_EXCEEDED", "MAX_RESPONSE_SIZE_EXCEEDED"]
    assert sampled["sampling_fraction"] == 0.5 and sampled["request_date"] == sampled["request_time"].date()


def test_rows_are_written_by_time_and_by_number(tmp_path):
    by_time, by_number = InferenceTable(tmp_path / "time", seconds=0.2), InferenceTable(tmp_path / "number", seconds=600, rows=10)
    by_time.write(row())
    for number in range(10):
        by_number.write(row(number))
    until(lambda: by_time.written == 1 and by_number.written == 10)
    by_number.write(row(10))
    assert by_number.flush() and numbers(tmp_path / "number") == list(range(11))
    assert by_time.close() and by_number.close()
    by_time.write(row())
    assert by_time.dropped == 1, "a closed table takes nothing"


def test_rows_that_trickle_in_share_commits(tmp_path):
    table, started = InferenceTable(tmp_path / "payload", seconds=0.25), time.monotonic()
    for number in range(600):
        table.write(row(number))
        time.sleep(0.001)
    assert table.close() and numbers(tmp_path / "payload") == list(range(600))
    assert DeltaTable(tmp_path / "payload").version() <= (time.monotonic() - started) / 0.25 + 3


def test_a_burst_never_waits_and_is_bounded(tmp_path):
    table, seconds = InferenceTable(tmp_path / "payload"), []
    for number in range(10_000):
        started = time.perf_counter()
        table.write(row(number, request=json.dumps({"messages": [{"role": "user", "content": f"lights {number} " * 100}]})))
        seconds.append(time.perf_counter() - started)
    assert median(seconds) < 0.001
    assert table.close() and table.written + table.dropped == 10_000 and numbers(tmp_path / "payload") == list(range(table.written))


@pytest.mark.parametrize("size, waiting", [(70, 200), (1 << 20, MAX_QUEUE_BYTES >> 20)])
def test_what_waits_is_bounded_in_rows_and_bytes(tmp_path, caplog, size, waiting):
    (tmp_path / "file").write_text("no folder")
    table, seconds = InferenceTable(tmp_path / "file" / "payload", seconds=0.02, rows=10), []
    for number in range(400):
        started = time.perf_counter()
        table.write(row(number, request="lights " * (size // 7)))
        seconds.append(time.perf_counter() - started)
    assert median(seconds) < 0.001 and waiting - 2 <= len(table._queue) <= waiting and table.dropped == 400 - len(table._queue)
    assert not table.flush()
    until(lambda: table.failures > 3)
    assert caplog.text.count("rows cannot be written") == 1, "said once a minute"
    (tmp_path / "file").unlink()
    kept = len(table._queue)
    until(lambda: table.written == kept and table.problem is None)
    assert table.close() and numbers(tmp_path / "file" / "payload") == list(range(kept)), "the first, in order, once"


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that gives a tmpfs a size, mounted at `.folder`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)

    resize.folder = folder
    yield resize
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_loses_nothing_that_waits(small_disk):
    folder = small_disk.folder / "payload"
    table = InferenceTable(folder, seconds=0.05, rows=20)
    for number in range(200):
        table.write(row(number, request=os.urandom(2000).hex()))
    until(lambda: table.failures > 1)
    before = table.written
    assert "No space left" in table.problem and 0 < before < 200 and numbers(folder) == list(range(before)), "what is in is whole"
    small_disk("20m")
    until(lambda: table.written == 200)
    assert table.close() and numbers(folder) == list(range(200)) and (table.dropped, table.problem) == (0, None)


def test_a_checkpoint_that_fails_writes_no_row_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(inference_table, "FILES_BEFORE_COMPACTION", 3)
    folder = tmp_path / "payload"
    table = InferenceTable(folder, seconds=60, rows=5)
    assert table.flush()
    (folder / "_delta_log" / "_last_checkpoint").mkdir()  # where a file is to be written
    for number in range(40):
        table.write(row(number))
    assert table.close() and table.failures == 0 and numbers(folder) == list(range(40))


WITHOUT_PERMISSION = """
import os, sys
import deltalake
from finetune_accel.core.inference_table import InferenceTable
if os.getuid() == 0:
    os.setuid(65534)
table = InferenceTable(sys.argv[1], seconds=0.05)
table.write({"databricks_request_id": "0", "status_code": 200})
print(table.flush(), table.problem, flush=True)
sys.stdin.readline()
print(table.close(), table.written, flush=True)
"""


def test_a_folder_without_permission():
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is inside folders that another user may not enter
        payload = os.path.join(folder, "payload")
        os.chmod(folder, 0o555)
        child = subprocess.Popen([sys.executable, "-c", WITHOUT_PERMISSION, payload], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        said = child.stdout.readline()
        assert said.startswith("False") and "Permission denied" in said
        os.chmod(folder, 0o777)
        assert child.communicate("go on\n", timeout=30)[0].strip() == "True 1"
        assert numbers(payload) == [0]


def test_another_table_is_left_alone(tmp_path):
    others = {"columns": pa.table({"x": [1]}), "type": inference_table.as_arrow([], None)}
    index = others["type"].schema.get_field_index("status_code")
    others["type"] = pa.Table.from_batches([others["type"]]).set_column(index, "status_code", pa.array([], pa.string()))
    for name, content in {**others, "no partitions": inference_table.as_arrow([], None)}.items():
        folder = tmp_path / name
        write_deltalake(folder, content)
        table = InferenceTable(folder, seconds=60)
        table.write(row(7))
        assert not table.flush() and "a table" in table.problem and DeltaTable(folder).version() == 0
        shutil.rmtree(folder)
        assert table.flush() and numbers(folder) == [7] and table.close()


ENDLESS = """
import itertools, sys, time
from finetune_accel.core.inference_table import InferenceTable
table = InferenceTable(sys.argv[1], seconds=0.2, rows=50)
for number in itertools.count(int(sys.argv[2])):
    table.write({"databricks_request_id": str(number), "status_code": 200, "request": "{}", "response": "{}"})
    time.sleep(0.001)
    if number % 20 == 0:
        print(table.written, flush=True)
"""


def test_killed_servers_leave_a_whole_table(tmp_path):
    """Three processes write to one table and are killed in mid-write: what they said is written is there, nothing twice, without gaps."""
    folder, starts = tmp_path / "payload", (0, 1_000_000, 2_000_000)
    children = [subprocess.Popen([sys.executable, "-c", ENDLESS, folder, str(start)], text=True, stdout=subprocess.PIPE) for start in starts]
    said, killed = [], []
    for child in children:
        said.append(next(count for line in child.stdout if (count := int(line)) > 300))
        child.kill()
        killed.append(datetime.now(timezone.utc))
        child.wait()
    there = stored(folder)
    for start, count, when in zip(starts, said, killed, strict=True):
        mine = [found for found in there if start <= int(found["databricks_request_id"]) < start + 1_000_000]
        assert sorted(int(found["databricks_request_id"]) for found in mine) == list(range(start, start + len(mine))) and len(mine) >= count
        assert (when - max(found["request_time"] for found in mine)).total_seconds() < 5, "no more than the last moments are lost"
    table = InferenceTable(folder)
    table.write(row(9_999_999))
    assert table.close() and DeltaTable(folder).count() == len(there) + 1


def test_small_files_are_joined_while_others_append(tmp_path, monkeypatch):
    monkeypatch.setattr(inference_table, "FILES_BEFORE_COMPACTION", 5)
    folder = tmp_path / "payload"
    assert InferenceTable(folder).close()
    tables = [InferenceTable(folder, seconds=600, rows=10) for _ in range(2)]
    for number in range(300):
        tables[number % 2].write(row(number))
        time.sleep(0.001)
    assert all(table.close() for table in tables) and numbers(folder) == list(range(300))
    delta = DeltaTable(folder)
    operations = [entry["operation"] for entry in delta.history()]
    assert "OPTIMIZE" in operations and len(delta.file_uris()) < operations.count("WRITE")
    assert (folder / "_delta_log" / "_last_checkpoint").is_file()


@pytest.mark.parametrize("kind", SECRET_PATTERNS)
def test_no_known_form_of_credential_stands_in_a_row(kind):
    @settings(max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.from_regex(SECRET_PATTERNS[kind].replace("{0,8000}", "{0,80}"), fullmatch=True, alphabet=st.characters(codec="ascii")))
    def hidden(secret: str) -> None:
        body = json.dumps({"messages": [{"role": "user", "content": f"use {secret} here"}]})
        (message,) = json.loads(clean(body, None))["messages"]
        assert secret not in message["content"] and f"<{kind}>" in message["content"], body

    hidden()


def test_the_servers_token_stands_in_no_column(tmp_path):
    table = InferenceTable(tmp_path, token="t0k-n")
    texts = {name: f"a t0k-n and Bearer {'x1.' * 9}" for name in ("request", "response", "requester", "client_request_id", "served_entity_id")}
    table.write(row(1, **texts))
    assert table.close()
    (found,) = stored(tmp_path)
    assert {found[name] for name in texts} == {"a <token> and <authorization header>"}
