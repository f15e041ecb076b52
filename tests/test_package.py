"""The wheel alone, in a clean environment without nbdev, runs an engagement."""
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import CLEAN, states, write_workspace

REPO = Path(__file__).parent.parent


def test_the_wheel_holds_all_that_a_run_needs(wheel, tmp_path):
    """Every module and file of data; unpacked elsewhere it plans and prepares, so nothing is read from the checkout."""
    listed = subprocess.run(["git", "ls-files", "finetune_accel"], capture_output=True, text=True, cwd=REPO, check=True).stdout.split()
    assert set(listed) <= set(zipfile.ZipFile(wheel).namelist())
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    folder = write_workspace(tmp_path / "work")
    command = f"import sys; sys.path.insert(0, {str(tmp_path / 'unpacked')!r}); import finetune_accel.core.cli as cli; " \
              f"assert cli.__file__.startswith({str(tmp_path)!r}), cli.__file__; cli.main()"
    done = subprocess.run([sys.executable, "-P", "-c", command, "run", "mine.yaml", "--run-dir", "runs/mine", "--to", "prepare"],
                          cwd=folder, capture_output=True, text=True, env=CLEAN | {"PYTHONPATH": str(tmp_path / "unpacked")})
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(done.stdout) == dict.fromkeys(["plan", "prepare"], "done")


@pytest.mark.slow
def test_wheel_in_a_clean_environment_runs_an_engagement(wheel, tmp_path):
    python = tmp_path / "env/bin/python"
    venv.create(tmp_path / "env", with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", REPO / "constraints.txt", wheel], check=True)
    probe = "import importlib.util as u; print(u.find_spec('nbdev'), u.find_spec('fastcore'), __import__('finetune_accel').__file__)"
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True, cwd=tmp_path, env=CLEAN).stdout
    assert found.startswith("None None") and str(tmp_path) in found
    folder = write_workspace(tmp_path / "work")
    done = subprocess.run([tmp_path / "env/bin/finetune-accel", "run", "mine.yaml", "--run-dir", "runs/mine", "--to", "train"],
                          cwd=folder, env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(done.stdout) == dict.fromkeys(["plan", "prepare", "benchmark", "train"], "done")
