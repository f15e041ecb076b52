"""Fake credentials planted in environment, data, settings and errors of a full run are in nothing that it leaves behind."""
from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ENGAGEMENT, PLANTED_ENVIRONMENT, ROWS, finetune_accel, states
from tiny import tiny_model

from finetune_accel.core.engagement import phases
from finetune_accel.core.server import TOKEN_VARIABLE

A = "aB3dE5gH7jK9mN1pQ4sT6vX8zC2fR0wY"


def fakes(place: str) -> dict[str, str]:
    """Return one made-up credential of each kind, as it stands in a text; `place` (4 letters of a-f) makes it another one than elsewhere."""
    body, upper = place + A[4:], place.upper() * 4
    return {
        "AWS access key": f"AKIA{upper}", "AWS secret key": f"aws_secret_access_key={body}{A[:8]}", "GitHub": f"ghp_{body}{A[:8]}",
        "Hugging Face": f"hf_{body}", "Databricks": f"dapi{place * 8}", "OpenAI": f"sk-proj-{body}", "Slack": f"xoxb-123456789012-{body}",
        "JWT": f"eyJ{body}.eyJ{body}.{body}", "PEM": f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n{body[::-1]}\n-----END RSA PRIVATE KEY-----",
        "PostgreSQL": f"postgresql://joe:pg-{body}@db/x", "MongoDB": f"mongodb+srv://joe:mo/{body}@db/x", "Redis": f"redis://:re-{body}@cache:6379/0",
        "JDBC": f"jdbc:sqlserver://db;user=sa;password=jd-{body};encrypt=true", "Azure key": f"AccountKey={body}{A}{A[:22]}==",
        "SAS": f"https://x.example/y?sv=1&sig={body}{A[:12]}%3D", "header": f"Authorization: Bearer {body}{A[:4]}"}


def core_of(fake: str) -> list[str]:
    """Return what of a credential nobody may read: each run of 16 characters and more that it has (nothing of it is a word of ours)."""
    return [run for run in re.findall(r"[A-Za-z0-9/+_-]{16,}", fake) if not run.startswith("aws_secret")] or [fake]


def forms(value: str) -> dict[str, bytes]:
    """Return a value as it is, in base64 (at each of three alignments) and as part of a URL."""
    raw = value.encode()
    found = {"raw": raw, "in a URL": urllib.parse.quote(value, safe="").encode()}
    for shift in range(3):  # what stands before it shifts its base64; the ends depend on neighbours, the middle does not
        found[f"base64 + {shift}"] = base64.b64encode(b"\0" * shift + raw)[4:-4]
    return found


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of a file, and of a Parquet file its values unpacked too."""
    yield str(path), path.read_bytes()
    if path.suffix == ".parquet":
        yield f"{path} (unpacked)", json.dumps(pq.read_table(path).to_pylist(), default=str, ensure_ascii=False).encode()


def leaks(folders: list[Path], planted: dict[str, str], spared: set[Path] = frozenset()) -> list[str]:
    """Return 'kind, form, file' of each planted credential that a file below `folders` has; `spared` are the files where they were planted."""
    wanted = [(kind, form, text) for kind, fake in planted.items() for value in core_of(fake) for form, text in forms(value).items()]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path not in spared]
    assert files, folders
    return [f"{kind}, {form}, {name}" for path in files for name, content in contents(path) for kind, form, text in wanted if text in content]


def run_process(*arguments, cwd: Path, log: Path, environment: dict[str, str], code: int = 0) -> str:
    """Run the command line, and keep what it printed as `log` beside what it wrote."""
    said = finetune_accel(*arguments, cwd=cwd, code=code, **environment)
    log.write_text(said)
    return said


IN_ENVIRONMENT, IN_ROWS, IN_ERROR, IN_REQUEST = (fakes(place) for place in ("adab", "beeb", "cafe", "dead"))
PLAIN = "correct Horse battery"  # a password without a form: it is known by the name of its variable
LEAKY_PACKAGE = '''\
import os

def login(answer, reference):
    raise ConnectionError(f"login of joe with {os.environ['MLFLOW_TRACKING_PASSWORD']} failed: " + os.environ["IN_ERROR"])
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A workspace whose rows hold a credential of each kind, an installed package that fails with them, and an environment full of them."""
    folder = tmp_path_factory.mktemp("planted")
    work = folder / "work"
    work.mkdir()
    good = [*ROWS, *({"prompt": f"say {word}", "response": '{"intent": "Say"}'} for word in ("hello", "goodbye", "thanks"))]
    bad = [{"prompt": f"what is {i}", "response": f"it is {fake}, thanks"} for i, fake in enumerate(IN_ROWS.values())]
    bad += [{"prompt": f"use {IN_ROWS['GitHub']}", "response": "ok"}, {"prompt": "other column", "response": "ok", "note": IN_ROWS["Databricks"]},
            {"prompt": "broken row", "answer": IN_ROWS["PostgreSQL"]}, {IN_ROWS["OpenAI"]: 1}]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good + bad) + f'{{"prompt": "{IN_ROWS["Slack"]}\n')
    (work / "ask.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"] + " " + row.get("response", "")}) + "\n" for row in bad if "prompt" in row))
    tiny_model(work / "tiny", [f"{row['prompt']} {row['response']}" for row in good], context=2048)
    (work / "mine.yaml").write_text(ENGAGEMENT.replace("examples: 3", f"examples: {len(good + bad) + 1}").replace("score: {}", "score: {source: ask.jsonl}"))
    package = folder / "package"
    (package / "leaky-1.dist-info").mkdir(parents=True)
    (package / "leaky.py").write_text(LEAKY_PACKAGE)
    (package / "leaky-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: leaky\nVersion: 1\n")
    (package / "leaky-1.dist-info/entry_points.txt").write_text("[finetune_accel.validators]\nleaky = leaky:login\n")
    named = {"MLFLOW_TRACKING_PASSWORD": PLAIN, "DATABRICKS_TOKEN": IN_ENVIRONMENT["Databricks"], "HF_TOKEN": IN_ENVIRONMENT["Hugging Face"],
             "OPENAI_API_KEY": IN_ENVIRONMENT["OpenAI"], "DATABASE_URL": IN_ENVIRONMENT["PostgreSQL"], "SLACK": IN_ENVIRONMENT["Slack"]}
    others = {f"PLANTED_{i}": fake for i, fake in enumerate(IN_ENVIRONMENT.values())}
    environment = {**named, **others, "IN_ERROR": "\n".join(IN_ERROR.values()), "PYTHONPATH": str(package), "TMPDIR": str(folder / "tmp"),
                   "XDG_CACHE_HOME": str(folder / "cache"), "JUPYTER_RUNTIME_DIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    return folder, work, environment


EVERYTHING = {f"{where}: {kind}": fake for where, some in (("environment", IN_ENVIRONMENT), ("row", IN_ROWS), ("error", IN_ERROR), ("request", IN_REQUEST))
              for kind, fake in some.items()} | {"password": PLAIN}


def searched(place) -> list[str]:
    """Return all leaks below the test's folder, but for the files in which it planted credentials."""
    folder, work, _ = place
    return leaks([folder], EVERYTHING, {work / "rows.jsonl", work / "ask.jsonl"})


def test_the_search_finds_what_is_there(tmp_path):
    for kind, fake in (IN_ROWS | {"password": PLAIN}).items():
        (tmp_path / "plain.txt").write_text(f"x{fake}y")
        (tmp_path / "encoded.txt").write_text(base64.b64encode(f"user:{fake}".encode()).decode())
        pq.write_table(pa.table({"a": [fake] * 3}), tmp_path / "packed.parquet", compression="zstd")
        found = {path.split(", ")[2].removesuffix(" (unpacked)") for path in leaks([tmp_path], {kind: fake})}
        assert found == {str(tmp_path / name) for name in ("plain.txt", "encoded.txt", "packed.parquet")}, kind


def test_a_run_of_all_phases_writes_nothing_of_its_environment(finished):
    folder, output = finished
    assert set(states(output)) == {phase.name for phase in phases()}
    (folder / "output.log").write_text(output)
    assert leaks([folder], {f"${name}": value for name, value in PLANTED_ENVIRONMENT.items()}) == []


def test_rows_that_hold_one_are_set_aside(place):
    folder, work, environment = place
    said = run_process("run", "mine.yaml", "--run-dir", work / "runs/mine", "--to", "prepare", cwd=work, log=folder / "prepare.log", environment=environment)
    prepared = json.loads((work / "runs/mine/prepare.json").read_text())["rows"]
    assert prepared["set_aside"] == {"secret": len(IN_ROWS) + 4, "not JSON": 1} and sum(prepared["kept"].values()) == 6, said
    (aside,) = (work / "runs/mine/prepare").glob("*/set_aside.jsonl")
    row = next(row for row in map(json.loads, aside.read_text().splitlines()) if "DATABRICKS" in row["detail"])
    assert row["place"].endswith(":11") and row["rule"] == "secret" and row["row"]["response"] == "it is <DATABRICKS_TOKEN>, thanks"
    assert searched(place) == []


@pytest.mark.slow
def test_a_failing_package_prints_its_error_without_them(place):
    folder, work, environment = place
    (work / "failing.yaml").write_text((work / "mine.yaml").read_text().replace("{metric: json_valid}", "{metric: validator, validator: leaky}"))
    said = run_process("run", "failing.yaml", "--run-dir", work / "runs/mine", "--to", "benchmark", cwd=work, log=folder / "failing.log",
                       environment=environment, code=2)
    assert "validator leaky" in said and "ConnectionError" in said and list((work / "runs/mine/failed").glob("*.ipynb")), said
    assert searched(place) == []


def test_a_bug_in_a_notebook_shows_its_traceback_without_them(place):
    """An error that nobody foresaw: its traceback goes into the notebook, its message to the screen."""
    folder, work, environment = place
    notebook, executed = folder / "bug.ipynb", folder / "bug-executed.ipynb"
    program = """
import json, sys
from pathlib import Path
from nbformat.v4 import new_code_cell, new_notebook, writes
from finetune_accel.core.pipeline import _our_error, execute_notebook
from finetune_accel.core.supervisor import Watch
code = "import os, sys; print(os.environ['IN_ERROR']); print(dict(os.environ), file=sys.stderr); dict(os.environ)"
cells = [new_code_cell(code), new_code_cell("secrets = os.environ['IN_ERROR']\\nraise RuntimeError(f'no answer from {secrets} of {dict(os.environ)}')")]
notebook, executed = map(Path, sys.argv[1:])
notebook.write_text(writes(new_notebook(cells=cells)))
try:
    execute_notebook(notebook, executed, {}, Watch())
except Exception as error:
    print(_our_error(error, executed))
"""
    said = subprocess.run([sys.executable, "-c", program, notebook, executed], env={**os.environ, **environment}, cwd=work, capture_output=True, text=True)
    (folder / "bug.log").write_text(said.stdout + said.stderr)
    assert "stopped with RuntimeError: no answer from" in said.stdout and "RuntimeError" in executed.read_text(), said
    assert searched(place) == []


@pytest.mark.parametrize("kind", IN_ROWS)
def test_settings_refuse_them_without_repeating_them(place, kind):
    folder, work, environment = place
    for setting in ("plan.owner", "tracking_uri"):
        log = folder / f"refused-{kind.replace(' ', '-')}-{setting}.log"
        said = run_in_process(["run", str(work / "mine.yaml"), "--run-dir", str(work / "runs/refused"), "--set", f"{setting}={json.dumps(IN_ROWS[kind])}"], log)
        assert "BadInput" in said and setting in said and "looks like a" in said, said
    assert not (work / "runs/refused").exists() and searched(place) == []


def run_in_process(arguments: list[str], log: Path) -> str:
    """Run the command line in a fork of this process: no library is imported again."""
    child = os.fork()
    if child == 0:
        with open(log, "w") as out:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            from finetune_accel.core import cli

            sys.argv, sys.stdout, sys.stderr = ["finetune-accel", *arguments], out, out
            try:
                cli.main()
            finally:  # whatever it raises: this copy of pytest must not go on
                out.flush()
                os._exit(0)
    os.waitpid(child, 0)
    return log.read_text()


@pytest.mark.slow
def test_a_full_run_with_all_of_them_leaves_none_behind(place):
    folder, work, environment = place
    said = run_process("run", "mine.yaml", "--run-dir", work / "runs/mine", cwd=work, log=folder / "run.log", environment=environment)
    assert set(states(said)) == {phase.name for phase in phases()}, said
    scored = json.loads((work / "runs/mine/score.json").read_text())
    assert (work / "runs/mlflow.db").exists() and (work / "runs/mine/report.html").exists() and list((work / "runs/mine").rglob("notebook.ipynb"))
    assert scored["metrics"] and list(work.glob("runs/mine/scored/*/*.parquet")), scored
    assert searched(place) == []


@pytest.mark.slow
def test_a_served_request_leaves_none_in_table_and_log(place):
    folder, work, environment = place
    log = open(folder / "server.log", "w")
    token = {TOKEN_VARIABLE: IN_REQUEST["JWT"]}
    command = [sys.executable, "-m", "finetune_accel.core.cli", "serve", str(work / "runs/mine"), "--port", "8799", "--table", str(folder / "asked")]
    server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment, **token})
    try:
        deadline, client = time.monotonic() + 120, httpx.Client(base_url="http://127.0.0.1:8799", headers={"Authorization": f"Bearer {IN_REQUEST['JWT']}"})
        while server.poll() is None and time.monotonic() < deadline and not ready(client):
            time.sleep(0.3)
        for fake in IN_REQUEST.values():
            body = {"messages": [{"role": "user", "content": f"use {fake} now"}], "max_tokens": 2, "user": fake[:200]}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
    finally:
        server.terminate()
        server.wait(60)
    assert sum(pq.read_table(file).num_rows for file in (folder / "asked").rglob("*.parquet")) == len(IN_REQUEST)
    assert searched(place) == []


def ready(client: httpx.Client) -> bool:
    """Return whether the server answers."""
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False
