"""Two processes compute what one does: ddp and fsdp2, adapters and all weights; and one that is killed or hangs is named and costs little."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import finetune_accel, states, write_workspace
from safetensors.torch import load_file
from tiny import tiny_model

from finetune_accel.core.adapters import AdapterPlan
from finetune_accel.core.checkpoints import trained_weights
from finetune_accel.core.errors import BadInput, PhaseFailed
from finetune_accel.core.generate import load_plain
from finetune_accel.core.launch import Follower, World, launch, run_processes, surroundings, torchrun
from finetune_accel.core.together import write_job
from finetune_accel.core.training import TrainingPlan, train
from finetune_accel.train import TrainSettings

# Between the weights of one process and those of two, trained in float32: relative to the largest weight, after ten steps at a rate that moves
# each weight by up to its own size. Only the order of additions differs.
TOLERANCE = 2e-5
TEXTS = [f"lights {how} in the {room}" for how in ("on", "off", "low") for room in ("hall", "kitchen", "bath", "attic", "cellar")]
PLANS = {"lora": TrainingPlan(method="lora", adapter=AdapterPlan(4, 8), learning_rate=1e-2, epochs=2, batch_size=7, seed=3),
         "full": TrainingPlan(method="full", learning_rate=1e-3, epochs=2, batch_size=7, seed=3)}


class Lab:
    """A tiny model, samples of different lengths, and what one process makes of them."""

    def __init__(self, root: Path):
        self.root, self.model = root, tiny_model(root / "tiny", TEXTS)
        _, self.tokenizer = load_plain(self.model, torch.float32)
        encoded = [self.tokenizer(text + " please" * (i % 4))["input_ids"] for i, text in enumerate(TEXTS * 2)]
        self.samples = [{"input_ids": ids, "completion_mask": [0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2)} for ids in encoded]

    def alone(self, method: str) -> tuple[dict, object]:
        model, _ = load_plain(self.model, torch.float32)
        trained, result = train(model, self.tokenizer, self.samples, PLANS[method], self.root / f"alone-{method}")
        return {name: weight.detach() for name, weight in trained_weights(trained).items()}, result

    def job(self, name: str, method: str, world: World, plan: TrainingPlan | None = None) -> Path:
        folder = self.root / name / "job"
        write_job(folder, self.samples, plan or PLANS[method], model=str(self.model), dtype="float32", sharding=world.sharding, size=world.size, reads_texts=False,
                  measure=None, checkpoints={"folder": str(folder / "checkpoints"), "identity": {"world size": str(world)}, "minutes": 0.0001})
        return folder


class Told:
    """A reporter that remembers."""

    def __init__(self):
        self.steps, self.losses = [], []

    def on_log(self, args, state, control, logs=None):
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_step_end(self, args, state, control):
        self.steps.append(state.global_step)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("sharding, method", [("ddp", "lora"), *(pytest.param(s, m, marks=pytest.mark.slow) for s, m in (
    ("ddp", "full"), ("fsdp2", "lora"), ("fsdp2", "full")))])
def test_two_processes_equal_one(sharding, method, lab):
    world, told = World(2, sharding=sharding), Told()
    folder = lab.job(f"{sharding}-{method}", method, world)
    outcome = run_processes(folder, world, told)
    weights, (alone, result) = load_file(folder / "weights.safetensors"), lab.alone(method)
    assert outcome["group"]["size"] == 2 and outcome["group"]["sharding"] == sharding and outcome["lost"] == []
    if sharding == "fsdp2":  # and not ddp under that name
        assert outcome["group"]["of_this_process"] == pytest.approx(outcome["group"]["elements"] / 2, rel=0.02)
    assert weights.keys() == alone.keys()
    largest = max(weight.abs().max().item() for weight in alone.values())
    apart = max((weights[name] - alone[name]).abs().max().item() for name in alone) / largest
    print(f"two processes, {sharding}, {method}: {len(weights)} weights, {result.steps} steps, at most {apart:.1e} of the largest weight apart from one process")
    assert apart <= TOLERANCE
    moved = load_plain(lab.model, torch.float32)[0].state_dict() if method == "full" else {name: torch.zeros_like(w) for name, w in alone.items() if "lora_B" in name}
    assert max((alone[name] - moved[name]).abs().max().item() for name in moved if name in alone) > 100 * TOLERANCE * largest  # there was something to differ in
    assert outcome["result"]["tokens"] == result.tokens and outcome["result"]["supervised_tokens"] == result.supervised_tokens
    assert told.losses == pytest.approx([entry["loss"] for entry in result.history if "loss" in entry], rel=1e-5)
    assert told.steps == [*range(1, result.steps + 1)]


@pytest.mark.slow
def test_more_processes_than_samples_in_a_step(lab):
    world = World(3)
    for sharding in ("ddp", "fsdp2"):
        world = replace(world, sharding=sharding)
        plan = replace(PLANS["lora"], batch_size=2, max_steps=3)
        outcome = run_processes(lab.job(f"few-{sharding}", "lora", world, plan), world, Told())
        assert outcome["result"]["steps"] == 3 and outcome["group"]["size"] == 3


def injected(monkeypatch, tmp_path, faults: str) -> None:
    """Put the injector of benchmarks/faults.py before the processes' path: steps become slow enough to be hit."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    from faults import INJECTOR

    (tmp_path / "sitecustomize.py").write_text(INJECTOR)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", str(Path(__file__).parent.parent))]))
    monkeypatch.setenv("FAULT", faults)


def at_step(folder: Path, rank: int, step: int, action) -> threading.Thread:
    """Do `action(pid)` once a process has reached a step."""
    def watch() -> None:
        path = folder / f"rank-{rank}.json"
        while not path.exists() or (known := json.loads(path.read_text()))["step"] < step:
            time.sleep(0.05)
        action(known["pid"])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("number, sharding, method", [(signal.SIGKILL, "ddp", "lora"), (signal.SIGKILL, "fsdp2", "full"), (signal.SIGSTOP, "ddp", "full")])
def test_a_lost_process_is_named_and_training_goes_on_exactly(number, sharding, method, lab, tmp_path, monkeypatch):
    """Faults 10 and 11: the second of two is killed, or hangs."""
    injected(monkeypatch, tmp_path, "slow=0.4")
    monkeypatch.setenv("FINETUNE_ACCEL_SILENCE_SECONDS", "30")
    world, told, said = World(2, sharding=sharding), Told(), []
    plan = replace(PLANS[method], epochs=4, deterministic=True)
    undisturbed = lab.job(f"whole-{sharding}-{method}-{number}", method, world, plan)
    run_processes(undisturbed, world, Told())
    folder = lab.job(f"lost-{sharding}-{method}-{number}", method, world, plan)
    at_step(folder, 1, 8, lambda pid: os.kill(pid, number))
    outcome = run_processes(folder, world, told, said.append)
    assert len(outcome["lost"]) == 1 and said[0].startswith("process 1 of 2 " + ("killed by SIGKILL" if number == signal.SIGKILL else "hung")), said
    print(f"{sharding}, {method}: {said[0]}")
    assert "from the checkpoint of step" in said[0] and outcome["checkpoints"]["resumed_at"]
    one, other = (load_file(job / "weights.safetensors") for job in (undisturbed, folder))
    assert all(torch.equal(one[name], other[name]) for name in one) and sorted(set(told.steps)) == [*range(1, outcome["result"]["steps"] + 1)]


@pytest.mark.slow
def test_a_process_that_dies_each_time_ends_the_phase(lab, tmp_path, monkeypatch):
    injected(monkeypatch, tmp_path, "kill=1")
    with pytest.raises(PhaseFailed, match="killed by SIGKILL at step 1, 3 times"):
        run_processes(lab.job("dies", "lora", World(2)), World(2), Told(), lambda said: None)


@pytest.mark.slow
def test_another_world_size_is_refused_and_so_are_too_few_processes(lab):
    folder = lab.job("sizes", "lora", World(2), replace(PLANS["lora"], max_steps=2))
    run_processes(folder, World(2), Told())
    job = json.loads((folder / "job.json").read_text())
    job["checkpoints"]["identity"]["world size"] = "4 (ddp)"
    (folder / "job.json").write_text(json.dumps(job))
    with pytest.raises(BadInput, match=r"world size was 2 \(ddp\) and now is 4 \(ddp\)"):
        run_processes(folder, World(2), Told())
    (folder / "job.json").write_text(json.dumps(job | {"size": 4}))
    with pytest.raises(PhaseFailed, match="4 processes were asked for and 2 came"):
        launch(folder, World(2), Told(), Follower(folder / "events.jsonl", Told()))


@pytest.mark.slow
def test_two_machines_meet(lab):
    """Each starts its own torchrun; here both are this one."""
    from serving import free_port

    world = World(1, 2, f"127.0.0.1:{free_port()}")
    folder = lab.job("machines", "lora", world)
    other = subprocess.Popen(torchrun(folder, world, 1), env=surroundings(world) | {"GLOO_SOCKET_IFNAME": "lo"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    monkey = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        outcome = run_processes(folder, world, Told(), lambda said: None)
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME") if monkey is None else None
    assert outcome["group"]["size"] == 2 and other.wait(60) == 0
    alone, _ = lab.alone("lora")
    weights = load_file(folder / "weights.safetensors")
    assert all(torch.allclose(weights[name], alone[name], atol=TOLERANCE * 0.2) for name in alone)


# --- the phase

@pytest.mark.parametrize("wrong, place", [({"nodes": 2}, "train.nodes"), ({"sharding": "fsdp2", "processes": 1}, "train.sharding")])
def test_a_world_that_cannot_be_is_refused(wrong, place):
    with pytest.raises(BadInput, match=place):
        TrainSettings(**wrong).world()


@pytest.mark.slow
@pytest.mark.parametrize("sharding, method", [("ddp", "lora"), ("fsdp2", "lora"), ("fsdp2", "full")])
def test_the_phase_gives_the_same_model_with_one_and_with_two_processes(sharding, method, tmp_path):
    workspace = write_workspace(tmp_path / "w")
    finetune_accel("run", "mine.yaml", "--run-dir", workspace / "runs/one", "--to", "prepare", cwd=workspace)
    shutil.copytree(workspace / "runs/one", workspace / "runs/two")

    def trained(name: str, *more: str) -> str:
        return finetune_accel("run", "mine.yaml", "--run-dir", workspace / f"runs/{name}", "--from", "train", "--to", "train", "--set", f"train.method={method}",
                              "--set", "train.batch_size=2", *(word for setting in more for word in ("--set", setting)), cwd=workspace)

    trained("one", "train.processes=1")
    assert states(trained("two", "train.processes=2", f"train.sharding={sharding}"))["train"] == "done"
    one, other = (json.loads((workspace / f"runs/{name}/train.json").read_text()) for name in ("one", "two"))
    assert one["key"] != other["key"] and other["group"]["size"] == 2 and other["group"]["sharding"] == sharding and other["manifest"]["world_size"] == 2
    folders = [workspace / "runs" / name / result["outputs"]["merged"]["path"] for name, result in (("one", one), ("two", other))]
    weights, others = (load_file(folder / "model.safetensors") for folder in folders)
    assert weights.keys() == others.keys() and all(torch.allclose(weights[name], others[name], atol=TOLERANCE) for name in weights)
    assert one["dev"] == pytest.approx(other["dev"]) and one["tokens"] == other["tokens"]
    assert states(trained("two", "train.processes=2", f"train.sharding={sharding}"))["train"] == "kept"
