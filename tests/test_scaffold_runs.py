"""A rendered repository at work: its pull request's steps as its CI file says them, each planted fault in the step that should find it, and the order
of the first and the second deploy."""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CLEAN, ROWS
from mlflow.tracking import MlflowClient
from scaffolding import commit, git, render, run_steps
from standin_workspace import TOKEN, standing_workspace
from tiny import tiny_model
from typer.testing import CliRunner

from finetune_accel.core import endpoint, stores
from finetune_accel.core.bundle import filled, read_bundle, target_tree
from finetune_accel.core.cli import app

TUNED = {"pipeline": "engagement", "source": "data/rows.jsonl", "base_model": "path:tiny", "name": "mine"}
PREPARED = ["secrets", "check", "unit", "data"]
EVERY = [*PREPARED, "train", "gate"]


def with_data(folder: Path, **answers: str) -> Path:
    """Render a repository, and put rows and a tiny model into it."""
    home = render(folder, {**TUNED, **answers})
    (home / "data").mkdir(exist_ok=True)
    rows = [{"prompt": f"{row['prompt']} {turn}", "response": row["response"]} for turn in ("please", "now", "today", "again") for row in ROWS]
    (home / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_model(home / "tiny", [f"{row['prompt']} {row['response']}" for row in rows])
    return home


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A repository to spoil."""
    return with_data(tmp_path_factory.mktemp("tuned") / "mine")


def spoil(home: Path, name: str, old: str, new: str) -> None:
    text = (home / name).read_text()
    assert old in text, (name, text)
    (home / name).write_text(text.replace(old, new))


FAULTS = {  # what is planted: (file, what stands there, what is written instead, the step that must be red, its exit code, what it says)
    "leaked secret": ("settings/staging.yaml", "seed: 17", "seed: 17 # dapi" + "0123456789abcdef" * 2, "secrets", "Databricks token"),
    "bad bundle": ("resources/release.yml", "{task_key: promote}", "{task_key: promotion}", "check", "there is no task promotion"),
    "bad engagement": ("engagement.yaml", "seed: 17", "sead: 17", "check", "did you mean `seed`"),
    "an approver who promotes": ("policy.yml", "may: [register, promote]", "may: [register, promote, approve]", "unit", "may approve what they promote"),
    "broken data": ("data/rows.jsonl", '"prompt"', '"question"', "data", "no `prompt` among the columns question, response"),
    "failed gate": ("settings/short.yaml", "at_least: 0.0", "at_least: 0.9", "gate", "criteria not met: exact_match"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_turns_the_right_step_red(tuned, tmp_path, fault):
    home = shutil.copytree(tuned, tmp_path / "mine")
    name, old, new, step, said = FAULTS[fault]
    spoil(home, name, old, new)
    found = run_steps(home, "github")
    *before, (last, (code, output)) = found.items()
    print(f"{fault}: {last} ended with {code}\n{output[-600:]}")
    assert last == step and code != 0 and [one for _, (one, _) in before] == [0] * len(before) and list(found) == EVERY[:EVERY.index(step) + 1]
    assert said in output and "Traceback" not in output, output


@pytest.mark.slow
@pytest.mark.parametrize("ci", ["github", "azure_devops", "gitlab"])
def test_without_a_fault_all_steps_are_green(tmp_path, ci):
    found = run_steps(with_data(tmp_path / "mine", ci=ci), ci)
    print(*(f"{name} ended with {code}\n{output[-600:]}" for name, (code, output) in found.items()), sep="\n")
    assert {name: code for name, (code, _) in found.items()} == dict.fromkeys(EVERY, 0)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [pytest.param("model", id="own model"), pytest.param("engagement", id="fine-tuned model")])
def test_the_two_commands_of_its_readme_work_in_a_fresh_clone(wheel, tmp_path, pipeline):
    """On the machine of a colleague, who has a key of their own, the wheel of this package, and for all else the package registry."""
    home = with_data(tmp_path / "home") if pipeline == "engagement" else render(tmp_path / "home", {"pipeline": "model", "name": "mine"})
    if pipeline == "engagement":  # a random model meets no criterion
        spoil(home, "engagement.yaml", "at_least: 0.5, better_than: base+K", "at_least: 0.0")
    commit(home, "scaffold")
    git("clone", "-q", str(home), str(tmp_path / "clone"), cwd=tmp_path)
    clone, commands = tmp_path / "clone", re.findall(r"(?m)^make \w+", (home / "README.md").read_text())
    colleague = {**CLEAN, "HOME": str(tmp_path), "PIP_CACHE_DIR": str(Path.home() / ".cache/pip"), "PIP_FIND_LINKS": f"{wheel.parent} {os.environ.get('PIP_FIND_LINKS', '')}"}
    colleague.pop("FINETUNE_ACCEL_KEY")
    assert commands == ["make run", "make test"] and not (clone / "keys/release.pem").exists()
    for command in commands:
        started = time.monotonic()
        done = subprocess.run(command.split(), cwd=clone, env=colleague, capture_output=True, text=True)
        print(f"{pipeline}: {command} ended with {done.returncode} after {time.monotonic() - started:.0f} s\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        assert done.returncode == 0
    where = subprocess.run([clone / ".venv/bin/python", "-c", "import finetune_accel; print(finetune_accel.__file__)"], cwd=tmp_path, env=colleague, capture_output=True, text=True)
    assert where.stdout.startswith(str(clone / ".venv")), where
    assert git("status", "--short", cwd=clone) == "", "what the commands make is no change to commit"


# --- a model of the customer's own

NOTEBOOK = Path(__file__).parent / "data/sklearn_classifier.ipynb"
OWN = {"pipeline": "model", "name": "intents", "registered": "main.default.intent_classifier"}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A repository with the customer's notebook, as it is, in the place of ours; its pull request passes."""
    home = render(tmp_path_factory.mktemp("own") / "intents", OWN)
    shutil.copy(NOTEBOOK, home / "notebooks/train.ipynb")
    found = run_steps(home, "github")
    print(*(f"{name}: {code}\n{output}" for name, (code, output) in found.items()), sep="\n")
    assert {name: code for name, (code, _) in found.items()} == dict.fromkeys([*PREPARED[:3], "data", "train", "gate"], 0)
    assert "models:/staging.intents.intents@challenger is version 1 in staging" in found["gate"][1]
    return home


@pytest.mark.slow
def test_the_customers_own_notebook_in_a_repository_of_its_own(own):
    assert "finetune_accel" not in (own / "notebooks/train.ipynb").read_text()
    judged = json.loads((own / "runs/short/intents/evaluation.json").read_text())
    assert all(row["met"] for row in judged["criteria"]) and judged["items"] == 24


@pytest.mark.slow
@pytest.mark.parametrize("name, old, new, step, said", [
    ("data/test.jsonl", '"expected"', '"expcted"', "data", "`expected`"),
    ("notebooks/train.ipynb", "C=30", "C=-1", "train", "InvalidParameterError"),
    ("judging.yaml", "at_least: 0.6", "at_least: 0.999", "gate", "verdicts")])
def test_a_fault_in_it_turns_the_right_step_red(own, tmp_path, name, old, new, step, said):
    home = shutil.copytree(own, tmp_path / "intents")
    spoil(home, name, old, new)
    *before, (last, (code, output)) = run_steps(home, "github").items()
    print(f"{name}: {last} ended with {code}\n{output[-600:]}")
    assert last == step and code != 0 and said in output and all(one == 0 for _, (one, _) in before)


# --- the order of the first deploy, and of the second

class Databricks:
    """Runs the jobs of a rendered bundle, task by task: each on a machine of its own, with a volume, secrets and endpoints that stand in for the workspace's.

    The registry is an MLflow store here: `databricks` is replaced by it, and the workspace's answers about models come from it.
    """

    def __init__(self, home: Path, scratch: Path, workspace, monkeypatch):
        self.home, self.scratch, self.workspace, self.monkeypatch, self.machines = home, scratch, workspace, monkeypatch, 0
        self.store = f"sqlite:///{scratch / 'registry/mlflow.db'}"
        self.volumes = scratch / "Volumes"
        for catalog in ("test", "staging", "prod"):
            (self.volumes / catalog / "intents/runs").mkdir(parents=True)
        workspace.state["secrets"]["intents/release-key"] = (home / "keys/release.pem").read_bytes()
        workspace.state["versions_of"] = self.version_of
        monkeypatch.setenv("DATABRICKS_HOST", workspace.url)
        monkeypatch.setenv("DATABRICKS_TOKEN", TOKEN)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", self.store)
        monkeypatch.setitem(endpoint.deploy.__kwdefaults__, "poll_seconds", 0.01)
        with stores.opened(self.store):
            pass

    def version_of(self, model: str, kind: str, which: str) -> int | None:
        if kind == "aliases":
            return int(found) if (found := stores.alias_version(self.store, model, which)) else None
        return int(which) if which in {str(one.version) for one in MlflowClient(self.store, self.store).search_model_versions(f"name='{model}'")} else None

    def words(self, words: list[str], target: str) -> list[str]:
        tree = target_tree(read_bundle(self.home), target)
        known = [filled(str(word), tree, target) for word in words]
        return [re.sub(r"^\./", f"{self.home}/", word).replace("/Volumes", str(self.volumes)).replace("tracking_uri=databricks", f"tracking_uri={self.store}")
                for word in known]

    def run(self, job: str, target: str) -> list[tuple[str, str]]:
        """Run a job's tasks in their order; return (task, outcome) of each, the last one may have failed."""
        done: list[tuple[str, str]] = []
        waiting = list(read_bundle(self.home).tree["resources"]["jobs"][job]["tasks"])
        while waiting:
            task = next(one for one in waiting if {before["task_key"] for before in one.get("depends_on", [])} <= {name for name, _ in done})
            waiting.remove(task)
            done.append((task["task_key"], self.task(task, target)))
            if done[-1][1] != "done":
                break
        return done

    def task(self, task: dict, target: str) -> str:
        self.machines += 1
        machine = self.scratch / f"machine{self.machines}"
        machine.mkdir()
        if notebook := task.get("notebook_task"):
            given = [word for key, value in notebook["base_parameters"].items() for word in ("-p", key, *self.words([value], target))]
            path = (self.home / "resources" / notebook["notebook_path"]).resolve()
            subprocess.run([sys.executable, "-m", "papermill", path, "executed.ipynb", "--no-progress-bar", *given], cwd=machine, check=True, capture_output=True)
            return "done"
        return self.command(*self.words(task["python_wheel_task"]["parameters"], target), machine=machine)

    def command(self, *words: str, machine: Path | None = None) -> str:
        """Run a command line of ours in a process like this one; return `done` or what it was refused with."""
        self.monkeypatch.chdir(machine or self.scratch)
        found = CliRunner().invoke(app, list(map(str, words)))
        print(" ".join(map(str, words)), found.output, found.exception, sep="\n")
        return "done" if found.exit_code == 0 else str(found.exception)

    def sent(self) -> list[tuple[str, str, str]]:
        """Return (method, path, version) of what was sent to endpoints since the last look."""
        asked = [(command, path.removeprefix("/api/2.0/serving-endpoints"), json.dumps(body)) for command, path, body in self.workspace.state["asked"]
                 if command != "GET" and "serving-endpoints" in path]
        self.workspace.state["asked"].clear()
        return [(command, path, re.search(r'"entity_version": "(\d+)"', body)[1]) for command, path, body in asked]


@pytest.fixture
def databricks(tmp_path, monkeypatch):
    home = render(tmp_path / "intents", {"pipeline": "model", "name": "intents", "inference": "realtime"})
    with standing_workspace(monkeypatch, tmp_path) as workspace:
        yield Databricks(home, tmp_path / "cloud", workspace, monkeypatch)


@pytest.mark.slow
def test_the_first_deploy_needs_no_model_and_the_second_changes_one_thing(databricks):
    """Nothing there -> the release is refused, and no endpoint is made -> registered -> endpoint -> a second version -> only its number is sent."""
    assert "model_serving_endpoints" not in read_bundle(databricks.home).tree["resources"]
    ((task, said),) = databricks.run("release", "staging")
    assert task == "promote" and "holds neither" in said and databricks.sent() == []

    assert databricks.run("train", "staging") == [("train", "done"), ("judge", "done"), ("promote", "done")]
    nobody = databricks.command("--runs", databricks.volumes / "staging/intents/runs", "endpoint", "runs/intents", "--environment", "staging", "--deploy", "--workload-type", "CPU")
    assert "stands for nothing in staging, so there is nothing to serve yet" in nobody and databricks.sent() == []

    assert databricks.run("release", "staging") == [("promote", "done"), ("endpoint", "done")]
    assert databricks.sent() == [("POST", "", "1")]
    endpoints = databricks.workspace.state["endpoints"]
    assert endpoints["intents-staging"]["state"]["ready"] == "READY" and endpoints["intents-staging"]["config"]["served_entities"][0]["entity_name"] == "staging.intents.intents"
    assert databricks.run("release", "staging") == [("promote", "done"), ("endpoint", "done")] and databricks.sent() == [], "deployed again, nothing changes"

    tests = databricks.home / "data/test.jsonl"  # a second model is judged by items that the first was not chosen by
    tests.write_text(tests.read_text() + '{"text": "lower the blinds in the attic", "expected": "blinds"}\n')
    assert databricks.run("train", "staging")[-1] == ("promote", "done") and databricks.sent() == []
    assert databricks.run("release", "staging") == [("promote", "done"), ("endpoint", "done")]
    assert databricks.sent() == [("PUT", "/intents-staging/config", "2")]

    runs = databricks.volumes / "staging/intents/runs"
    (task, said), = databricks.run("release", "prod")
    assert task == "promote" and "approvals" in said and databricks.sent() == [], "nobody has approved it: no endpoint in production"
    assert databricks.command("--runs", runs, "approve", "runs/intents", "--environment", "prod", "--why", "read it") == "done"
    assert databricks.run("release", "prod") == [("promote", "done"), ("endpoint", "done")] and databricks.sent() == [("POST", "", "1")]
    assert endpoints["intents-prod"]["config"]["served_entities"][0]["entity_name"] == "prod.intents.intents"

    key = databricks.home / "keys/release.pem"
    assert databricks.command("--runs", runs, "--key", key, "rollback", "runs/intents", "--environment", "staging", "--why", "rude") == "done"
    (deploy,) = [one for one in read_bundle(databricks.home).tree["resources"]["jobs"]["release"]["tasks"] if one["task_key"] == "endpoint"]
    assert databricks.task(deploy, "staging") == "done" and databricks.sent() == [("PUT", "/intents-staging/config", "1")]
