"""The wheel alone, in a clean environment without nbdev, runs an engagement."""
import os
import subprocess
import sys
import venv
from pathlib import Path

from conftest import states, write_workspace

REPO = Path(__file__).parent.parent


def test_wheel_in_a_clean_environment_runs_an_engagement(tmp_path):
    python = tmp_path / "env/bin/python"
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "dist", REPO], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", REPO / "constraints.txt", wheel], check=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    probe = "import importlib.util as u; print(u.find_spec('nbdev'), u.find_spec('fastcore'), __import__('finetune_accel').__file__)"
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True, cwd=tmp_path, env=clean).stdout
    assert found.startswith("None None") and str(tmp_path) in found
    folder = write_workspace(tmp_path / "work")
    done = subprocess.run([tmp_path / "env/bin/finetune-accel", "run", "mine.yaml", "--run-dir", "runs/mine", "--to", "train"],
                          cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(done.stdout) == dict.fromkeys(["plan", "prepare", "benchmark", "train"], "done")
