"""A small engagement of one's own: three rows, a tiny random model, all phases."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from browser import chromium  # noqa: E402, F401 (a fixture)
from tiny import tiny_model  # noqa: E402

os.environ.setdefault("FINETUNE_ACCEL_KEY", str(Path(tempfile.mkdtemp(prefix="key-")) / "signing.pem"))  # not the key of who runs the tests

ROWS = [{"prompt": "lights on", "response": '{"intent": "On"}'}, {"prompt": "lights off", "response": '{"intent": "Off"}'},
        {"prompt": "what time is it", "response": '{"intent": "Time"}'}]
ENGAGEMENT = """\
name: mine
seed: 17
plan:
  use_case: sentences to commands
  owner: tests
  criteria: [{metric: json_valid}, {metric: exact_match, at_least: 0.0}]
  data_sources: [{name: three rows, licence: ours, origin: customer, examples: 3}]
  prerequisites: [{item: rows may be used, state: met, who: tests}]
prepare: {source: rows.jsonl, base_model: "path:tiny", system_prompt: Answer with JSON., split: {by: null, stratify: null}}
benchmark: {models: ["path:tiny"], examples_in_prompt: 1}
train: {base_model: "path:tiny", epochs: 3, evaluations: 1}
evaluate: {examples_in_prompt: 1}
serve: {parity_prompts: 1, engines: [reference]}
score: {}
promote: {}
monitor: {}
handover: {}
"""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out of `make test`; `make slow` runs them")


# of no use to a run: test_planted_secrets.py looks for them in all that the run below leaves behind
PLANTED_ENVIRONMENT = {"DATABRICKS_TOKEN": "dapi" + "faded1" * 5 + "ee", "HF_TOKEN": "hf_" + "Q7zL" * 9, "OPENAI_API_KEY": "sk-proj-" + "K2xW" * 9,
                       "MLFLOW_TRACKING_PASSWORD": "correct Horse battery 9", "DATABASE_URL": "postgresql://joe:Vg5tY8uJ2kM4nB7c@db/x"}
LONG = ("test_end_to_end.py", "test_package.py", "test_approaches.py", "test_served_models.py", "test_everything_on.py", "test_training.py", "test_score.py",
        "test_existing_models.py", "test_prepare.py", "test_promote.py")
WITH_FINISHED = ("test_end_to_end.py", "test_served_models.py", "test_training.py", "test_promote.py", "test_planted_secrets.py", "test_parity.py",
                 "test_monitor.py", "test_handover.py", "test_pages.py", "test_endpoint.py")


def pytest_collection_modifyitems(items):
    # else one of two workers is left with an end of several minutes; `--no-loadscope-reorder` keeps this order
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if missing := {item.path.name for item in items if "finished" in item.fixturenames} - set(WITH_FINISHED):
        raise pytest.UsageError(f"tests/conftest.py: {', '.join(sorted(missing))} would make a whole run of its own. Fix: add it to WITH_FINISHED")


def pytest_xdist_make_scheduler(config, log):
    """A file's tests go to one worker, and the files that need the whole run (`finished`) to the same, so that it is made once."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "finished" if Path(file).name in WITH_FINISHED else file

    return ByFile(config, log)


def finetune_accel(*arguments, cwd, code=0, **environment):
    """Run the command line as a process of its own and return its output; the exit code must be `code`."""
    done = subprocess.run([sys.executable, "-m", "finetune_accel.core.cli", *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, env={**os.environ, "COLUMNS": "160", **environment})
    assert done.returncode == code, f"exit {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def states(output: str) -> dict[str, str]:
    """Return {phase: "done" or "kept"} from what the command line printed."""
    lines = [line.split() for line in output.splitlines()]
    return {words[0]: words[1] for words in lines if len(words) >= 3 and words[1] in ("done", "kept", "failed")}


CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}  # of a machine without this checkout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, Path(__file__).parent.parent], check=True)
    (built,) = folder.glob("*.whl")
    return built


def write_workspace(folder: Path) -> Path:
    """Write rows, tiny model and engagement file into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tiny_model(folder / "tiny", [f"{row['prompt']} {row['response']}" for row in ROWS] + ["Answer with JSON."])
    (folder / "mine.yaml").write_text(ENGAGEMENT)
    return folder


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with rows, tiny model and engagement file, not yet run."""
    return write_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def finished(workspace):
    """The same workspace after one whole run; returns (folder, output of the run)."""
    return workspace, finetune_accel("run", "mine.yaml", "--run-dir", workspace / "runs/mine", cwd=workspace, **PLANTED_ENVIRONMENT)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for all tests that only ask it: two tiny models, the reference engine, an inference table."""
    from serving import running

    scratch = tmp_path_factory.mktemp("server")
    words = ["turn on the lights in the kitchen", "stop the timer"]
    folders = {name: tiny_model(scratch / name, words, seed=seed) for seed, name in enumerate(("tuned", "base"))}
    with running(folders, scratch, table=True) as started:
        yield started
