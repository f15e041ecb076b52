"""Scoring in Ray: the same answers as here, and nothing lost or doubled when the job is killed. Needs `pip install "finetune-accel[ray]"`."""
from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys

import pytest
from test_score import SLOWLY, by_prompt, command, finish, killed_then_finished, model, prompts, sources, table, uninterrupted  # noqa: F401  (fixtures)

from finetune_accel.core import ray_scoring
from finetune_accel.core.errors import BadInput

ray_missing = ray_scoring.find_spec("ray") is None
needs_ray = pytest.mark.skipif(ray_missing, reason='there is no Ray here: pip install "finetune-accel[ray]"')
IN_PIECES = SLOWLY.replace("scoring.COMMIT_ROWS = 25", "from finetune_accel.core import ray_scoring; ray_scoring.PIECE_ROWS = 60")


HOLD = "import ray; print(ray.init(include_dashboard=False).address_info['gcs_address'], flush=True); input()"


@pytest.fixture
def cluster():
    """The environment of jobs on a cluster of this machine that outlives those that are killed; workers find our code as we do."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **token}) as holder:
        yield {**os.environ, **token, "RAY_ADDRESS": holder.stdout.readline().strip()}
        holder.communicate("\n", timeout=120)


@pytest.mark.slow
@needs_ray
def test_ray_answers_the_same_whatever_is_killed(model, tmp_path, uninterrupted, cluster):  # noqa: F811
    source, out = sources(tmp_path, "parquet"), tmp_path / "out"

    def begin() -> subprocess.Popen:
        options = [sys.executable, "-c", IN_PIECES, "score", source, "--model", model, "--out", out, "--max-tokens", 24, "--ray"]
        return subprocess.Popen(list(map(str, options)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=cluster)

    worth = killed_then_finished(begin, out, 3, 600, finish)
    print(f"ray batch: killed {worth} times with rows to do")
    assert worth >= 2 and by_prompt(out) == uninterrupted
    (row,) = [row for row in table(out) if json.loads(row["row"])["prompt"] == prompts(1, 45)[0]["prompt"]]
    assert (row["source"], row["row_number"]) == ("part-02.parquet", 6)


@pytest.mark.slow
@needs_ray
def test_a_cluster_that_does_not_let_us_in_is_named(cluster):
    stranger = {name: value for name, value in cluster.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run([sys.executable, "-c", "from finetune_accel.core.ray_scoring import ray_here; ray_here()"], capture_output=True, text=True, env=stranger)
    assert "BadInput" in done.stderr and cluster["RAY_ADDRESS"] in done.stderr and "RAY_AUTH_TOKEN" in done.stderr.splitlines()[-1], done.stderr


def test_what_ray_cannot_do_is_said(tmp_path):
    said = [command("score", tmp_path / "rows.jsonl", "--model", tmp_path, "--out", tmp_path / "out", "--ray", *more).exception
            for more in ([], ["--spark"], ["--follow"])]
    assert all(isinstance(one, BadInput) for one in said) and "leave out" in said[1].fix and "leave out" in said[2].fix


@pytest.mark.skipif(not ray_missing, reason="Ray is installed here")
def test_without_ray_it_says_what_to_install():
    with pytest.raises(BadInput, match=r"finetune-accel\[ray\]"):
        ray_scoring.ray_here()
