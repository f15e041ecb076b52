"""A training that is killed goes on from its newest whole checkpoint, and learns what it would have learnt; nothing else is ever resumed."""
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from transformers import TrainerCallback

from finetune_accel.core import training
from finetune_accel.core.adapters import AdapterPlan
from finetune_accel.core.errors import BadInput, Stopped
from finetune_accel.core.generate import load_plain
from finetune_accel.core.resume import Checkpoints, damage
from finetune_accel.core.stability import Diverged
from finetune_accel.core.training import TrainingPlan, train

SAMPLES = [{"input_ids": [5 + i % 40, 9, 30 + i % 7, 6 + i % 40, 1][:3 + i % 3] + [1], "completion_mask": [0, 0] + [1] * (2 + i % 3)} for i in range(26)]
PLAN = TrainingPlan(adapter=AdapterPlan(rank=4, alpha=8), learning_rate=5e-3, epochs=2, batch_size=4, evaluations=3, best_by="dev/score",
                    seed=1, deterministic=True)  # 14 steps, 7 an epoch
IDENTITY = {"data": "ab"}


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def always(folder, identity=IDENTITY):
    """Checkpoints after each step."""
    checkpoints = Checkpoints(Path(folder), identity, minutes=0)
    checkpoints.pace.due = lambda at_end=False: True
    return checkpoints


def run(model_folder, scratch, checkpoints=None, callbacks=(), dtype=torch.float32, **changes):
    """Train a fresh tiny model; returns (trained weights, result)."""
    model, tokenizer = load_plain(model_folder, dtype)
    plan = TrainingPlan(**{**vars(PLAN), **changes})
    tuned, result = train(model, tokenizer, SAMPLES, plan, Path(scratch), list(callbacks),
                          lambda model, step: {"dev/score": math.sin(step)}, checkpoints)
    return {name: p.detach().clone() for name, p in tuned.named_parameters() if p.requires_grad}, result


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def learnt(result):
    """What a history says of the learning, without times and memory."""
    return [{k: v for k, v in entry.items() if k not in ("tokens_per_second", "peak_memory_gib")} for entry in result.history]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"), ["lights on in the hall"])


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("method, dtype, step", [
    ("lora", torch.float32, 5), pytest.param("lora", torch.bfloat16, 7, marks=pytest.mark.slow),
    pytest.param("full", torch.float32, 10, marks=pytest.mark.slow), ("full", torch.bfloat16, 14)])
def test_interrupted_anywhere_it_learns_the_same(folder, tmp_path, method, dtype, step):
    """In an epoch, at its end, after a measurement, after the last step; with and without float32 copies."""
    whole, result = run(folder, tmp_path / "whole", method=method, dtype=dtype)
    checkpoints = always(tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "first", checkpoints, [At(step + 1, interrupt)] if step < 14 else [], method=method, dtype=dtype, max_steps=None) and interrupt()
    assert checkpoints.all()[0].name == f"step-{step:08d}"
    again = always(tmp_path / "kept")
    resumed, other = run(folder, tmp_path / "second", again, method=method, dtype=dtype)
    assert same(whole, resumed) and learnt(result) == learnt(other) and result.best == other.best and again.resumed_at == [step]
    assert (result.tokens, result.supervised_tokens, result.steps) == (other.tokens, other.supervised_tokens, other.steps)


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
import test_resume as t
from finetune_accel.core import training
loss, calls = training.causal_lm_loss, []
def dies(*given):
    calls.append(1)
    return os.kill(os.getpid(), 9) if len(calls) == 9 * training.row_count(t.PLAN.batch_size) else loss(*given)  # a row a thread, in step 9
training.causal_lm_loss = dies
t.run({model!r}, {scratch!r} + "/first", t.always({scratch!r} + "/kept"))
"""


def test_killed_in_the_middle_of_a_step(folder, tmp_path, monkeypatch):
    """kill -9 in the forward pass of a real process; what it had kept goes on in this one, with a damaged newest checkpoint left out."""
    whole, result = run(folder, tmp_path / "whole")
    code = KILLED.format(tests=str(Path(__file__).parent), model=str(folder), scratch=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    newest = always(tmp_path / "kept").all()[0]
    (newest / "rng.json").unlink()
    again = always(tmp_path / "kept")
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged and left out .rng.json is missing"):
        resumed, other = run(folder, tmp_path / "second", again)
    assert again.resumed_at == [int(newest.name[5:]) - 1] and same(whole, resumed) and learnt(result) == learnt(other)


def test_a_damaged_file_is_found_by_the_manifest_alone(folder, tmp_path):
    checkpoints = always(tmp_path / "kept")
    run(folder, tmp_path / "trainer", checkpoints, max_steps=2, evaluations=1)
    newest = checkpoints.all()[0]
    files = sorted(newest.iterdir())
    assert {"weights.safetensors", "optimiser.safetensors", "scheduler.json", "rng.json", "kept.json", "trainer_state.json", "best.safetensors",
            "manifest.json"} == {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for damaged in (None, content[:len(content) // 2], bytes(len(content))):
            path.unlink(missing_ok=True)
            if damaged is not None:
                path.write_bytes(damaged)
            assert path.name in damage(newest)
        path.write_bytes(content)
    assert damage(newest) is None


def test_other_data_or_another_world_size_is_refused_with_both_values(folder, tmp_path):
    run(folder, tmp_path / "trainer", always(tmp_path / "kept"), max_steps=2)
    with pytest.raises(BadInput, match="data was ab and now is cd; world size was None and now is 2"):
        run(folder, tmp_path / "other", always(tmp_path / "kept", {"data": "cd", "world size": "2"}), max_steps=2)


def test_sigterm_ends_with_the_step_and_a_checkpoint(folder, tmp_path):
    checkpoints = Checkpoints(tmp_path / "kept", IDENTITY, minutes=60)
    with pytest.raises(Stopped, match="after step 7 of 14"):
        run(folder, tmp_path / "first", checkpoints, [At(7, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    whole, _ = run(folder, tmp_path / "whole")
    resumed, _ = run(folder, tmp_path / "second", Checkpoints(tmp_path / "kept", IDENTITY))
    assert same(whole, resumed) and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_no_number_changes_nothing_and_its_good_weights_are_kept(folder, tmp_path, monkeypatch, how):
    step, kept = training.PackedSFTTrainer.training_step, []

    def poisoned(self, model, *given):
        loss = step(self, model, *given)
        if self.state.global_step == 4:
            if how == "loss":
                self.step_loss = loss = loss * math.inf
            else:
                next(p for p in model.parameters() if p.grad is not None).grad[0] = math.nan
        return loss

    monkeypatch.setattr(training.PackedSFTTrainer, "training_step", poisoned)
    model, tokenizer = load_plain(folder, torch.float32)
    with pytest.raises(Diverged, match="in step 5 .* lower train.learning_rate .* kept here") as stopped:
        train(model, tokenizer, SAMPLES, PLAN, tmp_path / "trainer", on_lost=lambda model: kept.append(
            {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}) or "kept here")
    assert stopped.value.exit_code == 3
    monkeypatch.setattr(training.PackedSFTTrainer, "training_step", step)
    checkpoints = always(tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "clean", checkpoints, [At(5, interrupt)])
    from safetensors.torch import load_file

    assert same(kept[0], load_file(checkpoints.all()[0] / "weights.safetensors"))


def test_no_room_for_a_checkpoint_costs_the_checkpoint_only(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    checkpoints = always(tmp_path / "kept")
    monkeypatch.setattr(training, "save_schedule", full)
    with pytest.warns(UserWarning, match="no checkpoint after step 1: the disk of .* is full, .* bytes"):
        _, result = run(folder, tmp_path / "trainer", checkpoints, max_steps=2)
    assert result.steps == 2 and not checkpoints.all() and not (tmp_path / "kept/.staged").exists()


@pytest.mark.slow
def test_the_same_run_twice_is_the_same_to_the_last_bit(tmp_path):
    """`run --again` in deterministic mode: data, adapter and answers; and it says so where something else came out."""
    from conftest import finetune_accel, write_workspace

    workspace = write_workspace(tmp_path)
    engagement = workspace / "mine.yaml"
    text = engagement.read_text().replace("evaluations: 1}", "evaluations: 1, deterministic: true}")
    engagement.write_text(text[:text.index("serve:")])
    finetune_accel("run", engagement, "--run-dir", workspace / "runs/mine", cwd=workspace)
    said = finetune_accel("run", "--again", workspace / "runs/mine", cwd=workspace)
    assert "the same, to the last bit" in said and said.count("equal") == 9 and "differs" not in said
    train = json.loads((workspace / "runs/mine/train.json").read_text())
    train["outputs"]["adapter"]["sha256"] = "0" * 64
    (workspace / "runs/mine/train.json").write_text(json.dumps(train))
    other = finetune_accel("run", "--again", workspace / "runs/mine", "--run-dir", workspace / "runs/third", cwd=workspace, code=1)
    assert "not the same: train/adapter" in other
    assert "is not empty" in finetune_accel("run", "--again", workspace / "runs/mine", "--run-dir", workspace / "runs/third", cwd=workspace, code=2)
