"""Jobs for Databricks: checked by Databricks' own classes, and their command run here with a folder that stands for the Volume."""
from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import yaml
from conftest import finetune_accel, states, write_workspace
from databricks.bundles.jobs import ComputeSpecAcceleratorType, Job

from finetune_accel.core.databricks_commands import jobs
from finetune_accel.core.engagement import load_engagement
from finetune_accel.core.errors import BadInput
from finetune_accel.core.jobs import ACCELERATORS, ai_runtime_job, ai_runtime_workload, gpu_cluster_job, job_files, run_arguments

VOLUME = "/Volumes/main/default/fine_tuning"
WHEEL = f"{VOLUME}/finetune_accel-0.1.0-py3-none-any.whl"


def test_databricks_bundles_takes_both_jobs_unchanged():
    engagement = load_engagement("home-intents")
    for job in (ai_runtime_job(engagement, VOLUME, WHEEL, "GPU_8xH100"), gpu_cluster_job(engagement, VOLUME, WHEEL, "g5.12xlarge"),
                gpu_cluster_job(engagement, "${var.volume}", "${var.wheel}/finetune_accel.whl", "${var.node_type}")):
        assert Job.from_dict(job).as_dict() == job
        wrong = copy.deepcopy(job)
        wrong["tasks"][0]["accelerator"] = 1
        with pytest.raises(Exception, match="(?i)unexpected|unknown"):  # they do check
            Job.from_dict(wrong)
    assert set(ACCELERATORS) <= {kind.value for kind in ComputeSpecAcceleratorType}


@pytest.mark.parametrize("change, named", [
    (dict(volume="runs/mine"), "volume"), (dict(wheel=f"{VOLUME}/x.zip"), "wheel"), (dict(wheel="finetune_accel.whl"), "wheel"),
    (dict(accelerator="GPU_1xT4"), "accelerator")])
def test_what_databricks_would_refuse_is_refused(change, named):
    with pytest.raises(BadInput, match=f"^{named}.* Fix: "):
        ai_runtime_workload(load_engagement("home-intents"), **{"volume": VOLUME, "wheel": WHEEL, **change})


def test_the_command_writes_the_files_once(tmp_path):
    jobs("home-intents", VOLUME, WHEEL, tmp_path)
    assert yaml.safe_load((tmp_path / "jobs/air.yaml").read_text())["experiment_name"] == "home-intents"
    assert "--from train --to train" in (tmp_path / "jobs/train.sh").read_text()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match="exists already"):
        jobs("home-intents", VOLUME, WHEEL, tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_machine_goes_on_from_what_another_published(tmp_path):
    """The job's own arguments, phase by phase, each with an empty disk; a folder stands for the Volume."""
    workspace = write_workspace(tmp_path / "volume")
    engagement = load_engagement(str(workspace / "mine.yaml"))
    for phase in ("plan", "prepare"):
        assert states(finetune_accel(*run_arguments(engagement, str(workspace), phase), cwd=tmp_path)) == {phase: "done"}
    again = finetune_accel(*run_arguments(engagement, str(workspace)), "--to", "prepare", cwd=tmp_path)
    assert states(again) == {"plan": "kept", "prepare": "kept"}
    assert {path.name for path in tmp_path.iterdir()} == {"volume"} and (workspace / "runs/mine/prepare.json").exists()


AIR = """
import sys, yaml
from pathlib import Path
from cli.run_config import _validate_runtime_version, _validate_yaml_structure
for name in sys.argv[1:]:
    config = _validate_yaml_structure(yaml.safe_load(Path(name).read_text()), Path(name))
    print(config.compute.accelerator_type, config.compute.num_accelerators, _validate_runtime_version(config.environment.version, name))
"""


@pytest.mark.slow
def test_the_classes_of_databricks_air_take_the_workload(tmp_path):
    """In an environment of its own: the package's top-level module is called `cli`."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "air"], check=True)
    python = tmp_path / "air/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "databricks-air==1.2.1"], check=True)

    def checked(content: str, name: str = "air.yaml") -> subprocess.CompletedProcess:
        (tmp_path / name).write_text(content)
        return subprocess.run([python, "-c", AIR, tmp_path / name], capture_output=True, text=True, cwd=tmp_path)

    for accelerator, count in ACCELERATORS.items():
        files = job_files(load_engagement("home-intents"), VOLUME, WHEEL, accelerator=accelerator, node_type="g5.12xlarge")
        done = checked(files["jobs/air.yaml"])
        assert done.stdout.split() == [accelerator, str(count), "5"], done.stderr
    for wrong in ({"accelerators": 1}, {"compute": {"accelerator_type": "GPU_8xH100", "num_accelerators": 9}}):  # they do check
        assert checked(yaml.safe_dump({**yaml.safe_load(files["jobs/air.yaml"]), **wrong})).returncode
