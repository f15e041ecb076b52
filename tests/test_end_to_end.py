"""One engagement through all phases, by each of the three ways, killed, repeated and served."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import nbformat
import psutil
import pytest
from conftest import ROWS, finetune_accel, states, write_workspace
from nbclient import NotebookClient

from finetune_accel.core.engagement import load_engagement, phases
from finetune_accel.core.processes import RUN_MARK, processes_of
from finetune_accel.core.runs import RunFolder

PHASES = [phase.name for phase in phases()]


def test_three_rows_go_through_all_phases(finished):
    folder, output = finished
    assert states(output) == dict.fromkeys(PHASES, "done")
    for word in ("scores on 1 test items", "report:", "mlflow ui", "finetune-accel serve"):
        assert word in output
    run = RunFolder(folder / "runs/mine")
    rows = run.need("prepare")["rows"]
    assert rows["in"] == len(ROWS) == sum(rows["kept"].values()) and not rows["set_aside"]
    train = run.need("train")
    assert train["steps"] == 3 and train["supervised_tokens"] > 0 and train["dev"].keys() == {"json_valid", "exact_match"}
    assert {"phase", "settings", "inputs", "outputs", "started", "seconds", "mlflow_run_id"} <= train.keys()
    evaluated = run.need("evaluate")
    assert {s["system"] for s in evaluated["scores"]} == {"base", "base+K", "base+K nearest", "nearest", "tuned"}
    assert evaluated["test_openings"] == 1
    assert run.need("serve")["parity"]["equal"] == 1


def test_a_second_run_runs_no_phase(finished):
    folder, _ = finished
    assert states(finetune_accel("run", "mine.yaml", "--run-dir", folder / "runs/mine", cwd=folder)) == dict.fromkeys(PHASES, "kept")


def test_a_changed_setting_reruns_what_follows_and_changing_it_back_restores(finished):
    folder, _ = finished
    run = RunFolder(folder / "runs/mine")
    before = run.need("train")
    output = finetune_accel("run", "mine.yaml", "--run-dir", run.path, "--set", "train.rank=4", "--to", "train", cwd=folder)
    assert "evaluate (made before train/merged" in output and "--from evaluate" in output and "test items" not in output, output
    changed = states(output)
    assert changed == {"plan": "kept", "prepare": "kept", "benchmark": "kept", "train": "done"}
    assert run.need("train")["key"] != before["key"]
    back = states(finetune_accel("run", "mine.yaml", "--run-dir", run.path, cwd=folder))
    assert back == dict.fromkeys(PHASES, "kept") and run.need("train") == before


def test_a_report_of_another_versions_results_is_refused_kindly(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "runs/mine", tmp_path / "old")
    result = json.loads((tmp_path / "old/evaluate.json").read_text())
    del result["in_words"]
    (tmp_path / "old/evaluate.json").write_text(json.dumps(result))
    said = finetune_accel("report", tmp_path / "old", cwd=tmp_path, code=2)
    assert "another version" in said and "run the engagement again" in said


def test_changed_data_are_noticed(finished, tmp_path):
    folder, _ = finished
    engagement = load_engagement(str(folder / "mine.yaml"))
    prepare = next(phase for phase in phases() if phase.name == "prepare")
    before = engagement.settings(prepare, tmp_path).external_inputs()
    rows = (folder / "rows.jsonl").read_text()
    try:
        (folder / "rows.jsonl").write_text(rows.replace("lights on", "lights up"))
        assert engagement.settings(prepare, tmp_path).external_inputs() != before
    finally:
        (folder / "rows.jsonl").write_text(rows)


def test_mlflow_has_parent_children_curves_digests_plots_and_a_model_that_loads(finished):
    import mlflow

    folder, _ = finished
    mlflow.set_tracking_uri(f"sqlite:///{folder}/runs/mlflow.db")
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    children = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId")}
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert set(children) == set(PHASES)
    assert {r.data.tags["mlflow.parentRunId"] for r in children.values()} == {parent.info.run_id}
    train = next(r for r in runs if r.info.run_id == RunFolder(folder / "runs/mine").need("train")["mlflow_run_id"])
    settings = RunFolder(folder / "runs/mine").need("train")["settings"]
    assert train.data.params["learning_rate"] == str(settings["learning_rate"]) and train.info.status == "FINISHED"
    assert len(client.get_metric_history(train.info.run_id, "loss")) == 3
    assert train.inputs.dataset_inputs[0].dataset.digest and train.data.tags["input.prepare.train.parquet"]
    assert {a.path for a in client.list_artifacts(train.info.run_id)} >= {"plots", "adapter"}
    assert "report.html" in {a.path for a in client.list_artifacts(parent.info.run_id)}
    registered = RunFolder(folder / "runs/mine").need("train")["registered"]
    assert registered["name"] == "main.default.mine"
    model = mlflow.pyfunc.load_model(registered["uri"])
    answer = model.predict({"messages": [{"role": "user", "content": "lights on"}], "max_tokens": 4})
    assert answer[0]["object"] == "chat.completion" and answer[0]["usage"]["completion_tokens"] <= 4


def test_papermill_by_hand_gives_the_same_result(finished):
    folder, _ = finished
    run = RunFolder(folder / "runs/mine")
    before = run.need("prepare")
    settings = load_engagement(str(folder / "mine.yaml")).settings(next(p for p in phases() if p.name == "prepare"), run.path)
    parameters = [word for key, value in settings.model_dump(mode="json").items() for word in ("-y", json.dumps({key: value}))]
    notebook = next(p.notebook for p in phases() if p.name == "prepare")
    command = [sys.executable, "-m", "papermill", str(notebook), str(folder / "out.ipynb"), "--no-progress-bar", *parameters]
    subprocess.run(command, check=True, cwd=folder, capture_output=True)
    after = run.need("prepare")
    assert after["key"] == before["key"] and after["outputs"] == before["outputs"] and after["rows"] == before["rows"]
    assert after["started"] != before["started"], "it ran"
    for wrong, rule in ((["-p", "sorce", "x"], "prepare.sorce"), (["-p", "limit", "many"], "prepare.limit")):
        refused = subprocess.run([*command, *wrong], cwd=folder, capture_output=True, text=True)
        assert refused.returncode and "BadInput" in refused.stderr and rule in refused.stderr


@pytest.mark.parametrize("name", PHASES)
def test_run_all_in_jupyter_after_editing_the_parameters_cell(name, finished, tmp_path):
    """Every phase notebook runs top to bottom in a fresh kernel, from another working folder, with the same outcome."""
    folder, _ = finished
    phase = next(phase for phase in phases() if phase.name == name)
    run = RunFolder(folder / "runs/mine")
    before = run.need(name)
    settings = load_engagement(str(folder / "mine.yaml")).settings(phase, run.path)
    notebook = nbformat.read(phase.notebook, as_version=4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += "\n" + "\n".join(f"{key} = {value!r}" for key, value in settings.model_dump(mode="json").items())
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    after = run.need(name)
    assert (after["key"] == before["key"]) == (after["inputs"] == before["inputs"]) and after["started"] != before["started"]  # a new certificate is another input
    assert {k: v for k, v in after["metrics"].items() if "second" not in k and "memory" not in k} == \
           pytest.approx({k: v for k, v in before["metrics"].items() if "second" not in k and "memory" not in k}, rel=1e-3)
    assert not list(tmp_path.iterdir()), "nothing is written to the working folder"


def start(folder: Path, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "finetune_accel.core.cli", "run", "mine.yaml", "--run-dir", str(folder / "runs/mine"), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.mark.parametrize("killed_in", [["prepare"], pytest.param(PHASES, marks=pytest.mark.slow)], ids=["prepare", "every phase"])
def test_killed_in_a_phase_the_same_command_finishes_the_job(tmp_path, killed_in):
    """kill -9 while a phase's notebook works: nothing is left running, and the next run goes on from there."""
    folder = write_workspace(tmp_path)
    run_dir, until = folder / "runs/mine", killed_in[-1]
    through = PHASES[:PHASES.index(until) + 1]
    for name in killed_in:
        victim = start(folder)
        wait_for(lambda: list((run_dir / ".staging").glob(f"{name}-*")) or victim.poll() is not None)
        assert victim.poll() is None, victim.stderr.read()
        kernels = [p.pid for p in processes_of(run_dir)]
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        assert kernels, "a kernel was at work"
        wait_for(lambda: not processes_of(run_dir) and not any(psutil.pid_exists(pid) for pid in kernels), seconds=10)
        assert not (run_dir / f"{name}.json").exists(), "a killed phase leaves no result"
        assert all((run_dir / f"{earlier}.json").exists() for earlier in PHASES[:PHASES.index(name)])
    done = finetune_accel("run", "mine.yaml", "--run-dir", run_dir, "--to", until, cwd=folder)
    assert states(done) == dict.fromkeys(through[:-1], "kept") | {until: "done"}
    assert not list((run_dir / ".staging").glob("*")), "nothing half-made is left"


def test_two_runs_in_one_folder_the_second_is_refused(tmp_path):
    folder = write_workspace(tmp_path)
    first = start(folder, "--to", "prepare")
    wait_for(lambda: (folder / "runs/mine/.lock.holder").exists())
    refused = finetune_accel("run", "mine.yaml", "--run-dir", folder / "runs/mine", cwd=folder, code=2)
    assert "is in use by process" in refused and str(first.pid) in refused
    assert first.wait(300) == 0, first.stderr.read()


@pytest.mark.slow
def test_two_runs_at_once_on_a_fresh_store_keep_all_metrics(tmp_path):
    import mlflow

    folder = write_workspace(tmp_path)
    first = start(folder, "--to", "train")
    other = subprocess.Popen([sys.executable, "-m", "finetune_accel.core.cli", "run", "mine.yaml", "--to", "train", "--run-dir",
                              str(folder / "runs/other")], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert first.wait(300) == 0 and other.wait(300) == 0, (first.stderr.read(), other.stderr.read())
    mlflow.set_tracking_uri(f"sqlite:///{folder}/runs/mlflow.db")
    client = mlflow.MlflowClient()
    for name in ("mine", "other"):
        run_id = RunFolder(folder / "runs" / name).need("train")["mlflow_run_id"]
        assert len(client.get_metric_history(run_id, "loss")) == 3 and client.get_run(run_id).data.metrics["final_loss"] > 0
    assert len(client.search_runs([client.get_experiment_by_name("mine").experiment_id])) == 2 * (1 + 4)


def test_an_open_blocking_prerequisite_stops_the_run_unless_accepted(workspace, tmp_path):
    engagement = workspace / "open.yaml"
    engagement.write_text((workspace / "mine.yaml").read_text().replace("state: met", "state: open"))
    stopped = finetune_accel("run", engagement, "--run-dir", tmp_path / "run", "--to", "plan", cwd=workspace, code=1)
    assert "rows may be used (tests)" in stopped and "accept_open=true" in stopped
    finetune_accel("run", engagement, "--run-dir", tmp_path / "run", "--to", "plan", "--set", "plan.accept_open=true", cwd=workspace)
    assert RunFolder(tmp_path / "run").need("plan")["accepted_open"] == ["rows may be used"]


def test_grid_compares_on_dev_and_never_opens_the_test_split(finished):
    folder, _ = finished
    output = finetune_accel("run", "mine.yaml", "--run-dir", folder / "runs/mine", "--grid", "train.learning_rate=1e-4,1e-3", cwd=folder)
    grid = json.loads((folder / "runs/mine/grid.json").read_text())
    assert len(grid["rows"]) == 2 and grid["split"] == "dev" and "scores on the dev split" in output
    for row in grid["rows"]:
        child = RunFolder(row["run_dir"])
        assert child.result("evaluate") is None and not child.decisions.entries()
        assert child.need("train")["mlflow_run_id"] == row["mlflow_run_id"]
    assert {RunFolder(r["run_dir"]).need("train")["settings"]["learning_rate"] for r in grid["rows"]} == {1e-4, 1e-3}


def test_the_report_opens_offline(finished):
    folder, _ = finished
    html = (folder / "runs/mine/report.html").read_text()
    assert not re.search(r'(src|href)\s*=\s*"(?!#)|url\((?!#)|@import', html)
    for section in ("Verdict", "What was asked", "What was done", "Lineage and licences", "What was not shown"):
        assert f">{section}</h2>" in html
    assert html.count("<svg ") == 3 and html.index('id="summary"') < html.index('id="contents"') < html.index('id="verdict"')
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids)), "two pictures share ids"


@pytest.fixture
def served(finished):
    folder, _ = finished
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "finetune_accel.core.cli", "serve", str(folder / "runs/mine"), "--port", "8765"],
                                  stdout=log, stderr=log)
    try:
        wait_for(lambda: server.poll() is not None or _ready("http://127.0.0.1:8765"))
        yield folder, "http://127.0.0.1:8765"
    finally:
        server.terminate()
        server.wait(30)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_openai_client_and_curl_get_what_evaluate_generated(served):
    import openai
    import pyarrow.parquet as pq

    folder, url = served
    run = RunFolder(folder / "runs/mine")
    limit = run.need("evaluate")["max_new_tokens"]
    (row,) = [r for r in pq.read_table(run.output("evaluate/answers.parquet")).to_pylist() if r["system"] == "tuned"]
    messages = [{"role": "user", "content": row["prompt"]}]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["mine"]
    answer = client.chat.completions.create(model="mine", messages=messages, max_tokens=limit)
    assert answer.choices[0].message.content == row["answer"]
    curl = subprocess.run(["curl", "-sS", f"{url}/invocations", "-H", "Content-Type: application/json", "-d",
                           json.dumps({"messages": messages, "max_tokens": limit})], capture_output=True, text=True, check=True)
    assert json.loads(curl.stdout)["choices"][0]["message"]["content"] == row["answer"]


def test_the_environment_is_left_as_it_was():
    assert RUN_MARK not in os.environ
