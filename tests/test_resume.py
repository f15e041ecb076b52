"""A training that is killed goes on from its newest whole checkpoint, and learns what it would have learnt; nothing else is ever resumed."""
import json
import math
import os
import signal
import subprocess
import sys
import warnings
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

SAMPLES = [{"input_ids": [5 + i % 40, 9, 30 + i % 7, 6 + i % 40, 1][:3 + i % 3] + [1], "completion_mask": [0, 0] + [1] * (2 + i % 3)} for i in range(50)]
PLAN = TrainingPlan(adapter=AdapterPlan(rank=4, alpha=8), learning_rate=5e-3, epochs=2, batch_size=4, evaluations=3, best_by="dev/score",
                    seed=1, deterministic=True)  # 26 steps, 13 an epoch
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


@pytest.mark.parametrize("method, dtype, step", [("lora", torch.float32, 5), ("lora", torch.bfloat16, 13), ("full", torch.float32, 21), ("full", torch.bfloat16, 26)])
def test_interrupted_anywhere_it_learns_the_same(folder, tmp_path, method, dtype, step):
    """In an epoch, at its end, after a measurement, after the last step; with and without float32 copies."""
    whole, result = run(folder, tmp_path / "whole", method=method, dtype=dtype)
    checkpoints = always(tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "first", checkpoints, [At(step + 1, interrupt)] if step < 26 else [], method=method, dtype=dtype, max_steps=None) and interrupt()
    assert checkpoints.all()[0].name == f"step-{step:08d}"
    again = always(tmp_path / "kept")
    resumed, other = run(folder, tmp_path / "second", again, method=method, dtype=dtype)
    assert same(whole, resumed) and learnt(result) == learnt(other) and result.best == other.best and again.resumed_at == [step]
    assert (result.tokens, result.supervised_tokens, result.steps) == (other.tokens, other.supervised_tokens, other.steps)
