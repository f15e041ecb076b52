"""The faults that a training must survive: each is injected into real processes, and what happened is written down.

    python benchmarks/faults.py              (all; some ten minutes on two cores)
    python benchmarks/faults.py 1 2 3        (some; the others' findings stay)

A tiny random model on 60 made-up rows. Faults of the trainer (1-3, 5, 7, 8, 13) happen in processes that are forked with everything imported, so that
twenty kills cost little; those of a run (4, 6, 9, 12, 14, 17, 18, 20) in `finetune-accel run` with its notebook kernels. Filling a disk (4)
needs the right to mount a tmpfs. `FAULT` is read by a small `sitecustomize` that this script puts before the kernels' path: it makes steps slow
enough to be hit, and kills a kernel at a step, as the memory killer does. Writes benchmarks/faults.json and faults.md.
"""
from __future__ import annotations

import hashlib
import http.server
import json
import math
import os
import platform
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
FAULTS: dict[int, tuple[str, str, Callable]] = {}
ROOMS = ["hall", "kitchen", "bath", "attic", "cellar", "garden", "garage", "study", "porch", "loft", "den", "shed"]
ROWS = [{"prompt": f"{verb} the {what} in the {room}", "response": f"{room}: {what} {verb}"} for room in ROOMS
        for verb, what in (("open", "door"), ("close", "door"), ("light", "lamp"), ("dim", "lamp"), ("lock", "window"))]
ENGAGEMENT = """\
name: faults
plan: {use_case: faults, owner: tests, criteria: [{metric: exact_match, at_least: 0.0}],
  data_sources: [{name: rows, licence: ours, origin: customer, examples: 60}], prerequisites: [{item: rows, state: met, who: tests}]}
prepare: {source: rows.jsonl, base_model: "path:tiny", system_prompt: null, split: {by: null, stratify: null}}
train: {base_model: "path:tiny", epochs: 4, evaluations: 2, dev_items: 4, deterministic: true, batch_size: 2, checkpoint_minutes: 0.02}
"""
INJECTOR = '''\
import importlib.abc, importlib.util, os, signal, sys, time
TARGET = "finetune_accel.core.training"

def patch(module):
    faults = dict(part.split("=") for part in os.environ["FAULT"].split(","))
    step = module.PackedSFTTrainer.training_step
    def slow(self, model, inputs, num_items_in_batch=None):
        time.sleep(float(faults.get("slow", 0)))
        rows = [row for hand in inputs["step"].rows(self.hands, self.micro_batch_tokens) for row in hand]
        longest = max(sum(len(sample["input_ids"]) for sample in row) for row in rows)
        if self.state.global_step + 1 == int(faults.get("kill", 0)) and longest > int(faults.get("above", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, model, inputs, num_items_in_batch)
    module.PackedSFTTrainer.training_step = slow

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), patch(module))
        return spec

if os.environ.get("FAULT"):
    sys.meta_path.insert(0, Finder())
'''


def fault(number: int, name: str, injected: str) -> Callable:
    """Register a fault: the function injects it, raises AssertionError if it is not survived, and returns what happened."""
    def register(function: Callable) -> Callable:
        FAULTS[number] = name, injected, function
        return function
    return register


# --- processes ---

def child(action: Callable[[], object], log: Path) -> int:
    """Fork a process that does `action` with its output in `log`; return its process id. It exits as the command line would."""
    from finetune_accel.core.errors import FinetuneAccelError

    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        action()
        code = 0
    except FinetuneAccelError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(pid: int, seconds: float = 1200) -> int:
    """Return a child's exit code, negative for the signal that killed it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"it hung for {seconds} s")


def wait_for(condition: Callable[[], object], seconds: float = 900) -> object:
    """Return what `condition` gives once it is true."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)
    return found


def command(*words: object, cwd: Path, faults: str = "", tracking: str | None = None) -> subprocess.Popen:
    """Start the command line, output piped; `faults` is for its kernels."""
    inject = Path(tempfile.gettempdir()) / "finetune-accel-faults"
    inject.mkdir(exist_ok=True)
    (inject / "sitecustomize.py").write_text(INJECTOR)
    path = os.pathsep.join([str(inject), str(HERE.parent)])
    return subprocess.Popen([sys.executable, "-m", "finetune_accel.core.cli", *map(str, words)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "200", "PYTHONPATH": path, "FAULT": faults})


def said(process: subprocess.Popen, code: int) -> str:
    """Wait for a command and return what it printed; its exit code must be `code`."""
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == code, f"exit {process.returncode}, expected {code}:\n{output[-3000:]}"
    return output


# --- the trainer alone, in forked processes ---

SAMPLES = [{"input_ids": [5 + i % 40, 9, 30 + i % 7, 6 + i % 40, 1], "completion_mask": [0, 0, 0, 1, 1]} for i in range(120)]


class Lab:
    """The scratch folder with model, rows and a run that has been prepared, and ways to train in it."""

    def __init__(self, scratch: Path):
        from tiny import tiny_model

        self.scratch, self.count = scratch, 0
        self.prepared_run: Path | None = None
        (scratch / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        (scratch / "faults.yaml").write_text(ENGAGEMENT)
        assert ended(child(lambda: tiny_model(scratch / "tiny", [json.dumps(ROWS)]), scratch / "model.log")) == 0

    def folder(self, name: str) -> Path:
        """Return a fresh folder."""
        self.count += 1
        folder = self.scratch / f"{self.count:03d}-{name}"
        folder.mkdir()
        return folder

    def training(self, out: Path, kept: Path, *, hook: Callable = lambda trainer: None, identity: dict | None = None, samples=None, **changes) -> int:
        """Fork a process that trains with a checkpoint after each step and writes weights and history into `out`; return its id."""
        def run() -> None:
            import torch
            from safetensors.torch import save_file
            from transformers import TrainerCallback

            from finetune_accel.core import training
            from finetune_accel.core.adapters import AdapterPlan
            from finetune_accel.core.generate import load_plain
            from finetune_accel.core.resume import Checkpoints
            from finetune_accel.core.saving import keep_good

            torch.set_num_threads(1)

            class Told(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    with open(out / "steps", "a") as file:
                        file.write(f"{state.global_step}\n")
                    time.sleep(0.01)

            model, tokenizer = load_plain(self.scratch / "tiny", torch.float32)
            plan = training.TrainingPlan(**{"adapter": AdapterPlan(rank=4, alpha=8), "learning_rate": 5e-3, "epochs": 4, "batch_size": 4, "seed": 1,
                                            "evaluations": 3, "best_by": "dev/score", "deterministic": True, **changes})
            checkpoints = Checkpoints(kept, identity or {"data": "ab", "world size": "1"}, 0)
            checkpoints.pace.due = lambda at_end=False: True
            hook(training)
            tuned, result = training.train(
                model, tokenizer, samples or SAMPLES, plan, out / "trainer", [Told()], lambda model, step: {"dev/score": math.sin(step)}, checkpoints,
                lambda model: keep_good(model, tokenizer, "path:tiny", out / "good"))
            save_file({name: p.detach().contiguous() for name, p in tuned.named_parameters() if p.requires_grad}, out / "weights.safetensors")
            history = [{k: v for k, v in entry.items() if k not in ("tokens_per_second", "peak_memory_gib")} for entry in result.history]
            (out / "result.json").write_text(json.dumps({"history": history, "best": result.best, "tokens": result.tokens, "resumed": checkpoints.resumed_at,
                                                         "skipped": checkpoints.skipped, "halvings": result.halvings,
                                                         "micro_batch_tokens": result.micro_batch_tokens}))
        return child(run, out / "log")

    def whole(self, epochs: int = 4) -> Path:
        """Return the outcome of the training that nobody disturbs, 30 steps an epoch."""
        out = self.scratch / f"whole-{epochs}"
        if not out.exists():
            out.mkdir()
            assert ended(self.training(out, out / "kept", epochs=epochs)) == 0, (out / "log").read_text()
        return out

    def prepared(self) -> Path:
        """Return a copy of a run folder in which plan and prepare are done."""
        if self.prepared_run is None:
            said(command("run", "faults.yaml", "--run-dir", "runs/prepared", "--to", "prepare", cwd=self.scratch), 0)
            self.prepared_run = self.scratch / "runs/prepared"
        self.count += 1
        target = self.scratch / f"runs/{self.count:03d}"
        shutil.copytree(self.prepared_run, target)
        (target / ".mlflow.json").unlink(missing_ok=True)
        return target

    def train(self, run_dir: Path, faults: str = "", *more: object) -> subprocess.Popen:
        """Start the train phase by the command line."""
        return command("run", "faults.yaml", "--run-dir", run_dir, "--from", "train", "--to", "train", *more, cwd=self.scratch, faults=faults)


def steps_of(out: Path) -> list[int]:
    """Return the steps that a training has told."""
    return [int(line) for line in (out / "steps").read_text().split("\n")[:-1]] if (out / "steps").exists() else []


def same_outcome(one: Path, other: Path) -> bool:
    """Return whether two trainings ended with the same weights, bit for bit, and the same history."""
    results = [json.loads((out / "result.json").read_text()) for out in (one, other)]
    return (one / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes() and all(
        results[0][name] == results[1][name] for name in ("history", "best", "tokens"))


def kernel_step(run_dir: Path) -> int:
    """Return the step that the train phase of a run in progress has reached."""
    from finetune_accel.core.progress import latest_progress

    latest = latest_progress(run_dir / ".staging/train.progress")
    return latest["done"] if latest and latest["label"] == "training" else 0


def kernel_of(run_dir: Path):
    """Return the kernel process of a run in progress, None where there is none."""
    from finetune_accel.core.processes import processes_of

    return next((process for process in processes_of(run_dir) if "ipykernel_launcher" in " ".join(process.cmdline())), None)


@fault(1, "killed in a step", "kill -9 in the backward pass of step 50; then 20 times over one training, each after a random number of steps")
def killed_in_a_step(lab: Lab) -> str:
    whole, out = lab.whole(), lab.folder("mid-step")

    def kill_in_step_50(training) -> None:
        loss, calls = training.causal_lm_loss, []

        def once(*given):
            calls.append(1)
            if len(calls) == 50:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(*given)
        training.causal_lm_loss = once

    assert ended(lab.training(out, out / "kept", hook=kill_in_step_50)) == -9 and steps_of(out)[-1] == 49
    assert ended(lab.training(out, out / "kept")) == 0 and same_outcome(whole, out)
    out, luck, kills, places = lab.folder("random"), random.Random(1), 0, []
    while kills < 20:
        begun, pid = len(steps_of(out)), lab.training(out, out / "kept")
        wanted = begun + luck.randint(1, 5)
        wait_for(lambda: len(steps_of(out)) >= wanted or (out / "result.json").exists())
        time.sleep(luck.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -9, (out / "log").read_text()
        kills, places = kills + 1, [*places, steps_of(out)[-1]]
    assert not (out / "result.json").exists(), "it was over before the last kill"
    assert ended(lab.training(out, out / "kept")) == 0, (out / "log").read_text()
    assert same_outcome(whole, out)
    return f"resumed 21 times (after steps {', '.join(map(str, places))}); weights, history and best weights equal the undisturbed run's, bit for bit"


@fault(2, "killed while a checkpoint is written", "kill -9 after each of its files, after the manifest, before the rename: 7 places, at step 12")
def killed_while_saving(lab: Lab) -> str:
    whole, fell_back = lab.whole(epochs=1), []
    for place in ("save_learnt", "save_schedule", "save_random_state", "save_kept", "write_manifest", "fsync_folder", "os.replace"):
        out = lab.folder(place)

        def hook(training, place=place):
            from finetune_accel.core import resume

            owner, name = (training, place) if place.startswith("save") else (resume.os, "replace") if place == "os.replace" else (resume, place)
            action = getattr(owner, name)

            def then_die(*given):
                if steps_of(out)[-1] == 12 and (place != "os.replace" or Path(given[1]).name.startswith("step-")):
                    if place != "os.replace":
                        action(*given)
                    os.kill(os.getpid(), signal.SIGKILL)
                return action(*given)
            setattr(owner, name, then_die)

        assert ended(lab.training(out, out / "kept", hook=hook, epochs=1)) == -9, (out / "log").read_text()
        assert ended(lab.training(out, out / "kept", epochs=1)) == 0 and same_outcome(whole, out), place
        fell_back.append(json.loads((out / "result.json").read_text())["resumed"][0])
    assert set(fell_back) <= {11, 12} and 11 in fell_back
    return f"went on from the newest whole checkpoint (step {', '.join(map(str, fell_back))}); weights equal bit for bit each time"


@fault(3, "a checkpoint's files are missing, cut or zeroed", "each of its files, and the manifest: removed, cut in half, overwritten with zeros")
def damaged_files(lab: Lab) -> str:
    from finetune_accel.core.resume import Checkpoints

    whole, out = lab.whole(epochs=1), lab.folder("damaged")
    pid = lab.training(out, out / "kept", epochs=1)
    wait_for(lambda: len(steps_of(out)) >= 22)  # the best weights, of step 20, are a file too
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    newest, before = Checkpoints(out / "kept", {"data": "ab", "world size": "1"}).all()[:2]
    tried = 0
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for damaged in (None, content[:len(content) // 2], bytes(len(content))):
            path.unlink(missing_ok=True)  # the file of the best weights has a second name
            if damaged is not None:
                path.write_bytes(damaged)
            checkpoints = Checkpoints(out / "kept", {"data": "ab", "world size": "1"})
            assert checkpoints.newest() == before and newest.name in checkpoints.skipped[0], path.name
            tried += 1
        path.write_bytes(content)
    (newest / "optimiser.safetensors").unlink()
    assert ended(lab.training(out, out / "kept", epochs=1)) == 0 and same_outcome(whole, out)
    skipped = json.loads((out / "result.json").read_text())["skipped"]
    return f"{tried} variants: each time the checkpoint is left out by name and the one before is taken; resumed so ({skipped[0]}), weights equal bit for bit"


def tmpfs(folder: Path, megabytes: float) -> None:
    """Mount a small disk."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(folder)], check=True)


@fault(4, "the disk is full", "a tmpfs too small: for a checkpoint; for a phase; filled while prepare writes its data and notebook")
def disk_full(lab: Lab) -> str:
    from finetune_accel.core.resume import Checkpoints, damage

    out = lab.folder("full")
    one = sum(-(-path.stat().st_size // 4096) * 4096 for path in Checkpoints(lab.whole(epochs=1) / "kept", {}).all()[0].iterdir())
    tmpfs(out / "small", 1.6 * one / 2**20)  # one checkpoint fits, a second does not
    try:
        assert ended(lab.training(out, out / "small/kept", epochs=1)) == 0, (out / "log").read_text()
        (kept,) = Checkpoints(out / "small/kept", {}).all()
        assert damage(kept) is None and same_outcome(lab.whole(epochs=1), out)
        warned = next(line for line in (out / "log").read_text().splitlines() if "no checkpoint after step" in line)
    finally:
        subprocess.run(["umount", str(out / "small")], check=True)
    tmpfs(out / "tiny", 20)
    try:
        refused = said(command("run", "faults.yaml", "--run-dir", out / "tiny/run", "--to", "plan", cwd=lab.scratch), 2)
        assert str(out / "tiny/run") in refused and "bytes" in refused and "the phase plan" in refused, refused
    finally:
        subprocess.run(["umount", str(out / "tiny")], check=True)
    tmpfs(out / "filled", 80)
    try:
        run_dir = out / "filled/run"
        running = command("run", "faults.yaml", "--run-dir", run_dir, "--to", "prepare", cwd=lab.scratch)
        wait_for(lambda: list((run_dir / ".staging").glob("prepare-*")) or running.poll() is not None)
        with open(out / "filled/filler", "wb") as file:
            try:
                while True:
                    file.write(bytes(2**16))
                    file.flush()
            except OSError:
                pass
        message = said(running, 2)
        assert str(run_dir) in message and "the disk is full" in message and "bytes" in message, message
        plan = (run_dir / "plan.json").read_bytes()
        (out / "filled/filler").unlink()
        again = said(command("run", "faults.yaml", "--run-dir", run_dir, "--to", "prepare", cwd=lab.scratch), 0)
        assert "plan                     kept" in again and (run_dir / "plan.json").read_bytes() == plan
    finally:
        subprocess.run(["umount", str(out / "filled")], check=True)
    return (f"checkpoint: \"{warned.split(': ', 1)[-1].strip()}\", training went on and the older checkpoint is whole; phase: refused before it began; "
            "data and notebook: exit 2 with path and bytes, plan stayed whole, and with room again the same command finished")


@fault(5, "out of memory in a step", "RLIMIT_AS, 120 MB above what the process has, with steps of 96 samples of 250 tokens")
def out_of_memory(lab: Lab) -> str:
    import resource

    long = [{"input_ids": [5 + (i + j) % 200 for j in range(250)], "completion_mask": [0] * 50 + [1] * 200} for i in range(192)]
    how = {"samples": long, "batch_size": 96, "epochs": 1, "evaluations": 0, "best_by": None, "method": "full", "learning_rate": 1e-3}
    out, roomy = lab.folder("memory"), lab.folder("roomy")

    def limit(training) -> None:
        def at_first_step(self, *given, step=training.PackedSFTTrainer.training_step):
            if self.state.global_step == 0:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.setrlimit(resource.RLIMIT_AS, (used + 120 * 2**20,) * 2)
            return step(self, *given)
        training.PackedSFTTrainer.training_step = at_first_step

    assert ended(lab.training(roomy, roomy / "kept", **how)) == 0, (roomy / "log").read_text()[-2000:]
    assert ended(lab.training(out, out / "kept", hook=limit, **how)) == 0, (out / "log").read_text()[-2000:]
    found, other = (json.loads((folder / "result.json").read_text()) for folder in (out, roomy))
    logged = next(line for line in (out / "log").read_text().splitlines() if "out of memory with rows" in line)
    assert found["halvings"] >= 1 and other["halvings"] == 0 and found["tokens"] == other["tokens"]
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(found["history"], other["history"]) if "loss" in a]
    assert max(losses) < 1e-4
    return (f"\"{logged.split('Warning: ')[-1].strip()}\"; {found['halvings']} halvings to {found['micro_batch_tokens']} tokens, the same samples a step, "
            f"losses within {max(losses):.0e} of the run with enough memory")


@fault(6, "killed by the system for memory", "the kernel kills itself with SIGKILL at step 15 as long as a row has more than 60 tokens, which is two samples")
def killed_for_memory(lab: Lab) -> str:
    run_dir = lab.prepared()
    output = said(lab.train(run_dir, "slow=0.1,kill=15,above=60", "--set", "train.batch_size=8", "--set", "train.micro_batch_tokens=80"), 0)
    again = [line for line in output.splitlines() if " again " in line]
    result = json.loads((run_dir / "train.json").read_text())
    assert len(again) >= 2 and "half of the micro-batch" in output and [death["signal"] for death in result["deaths"]] == ["SIGKILL"] * len(again)
    assert result["settings"]["batch_size"] == 8 and result["micro_batch_tokens"] == 40 and result["checkpoints"]["resumed_at"]
    return f"{len(again)} relaunches by the command itself, the last: \"{again[-1].split('again', 1)[1].strip()}\"; done with rows of {result['micro_batch_tokens']} tokens, 8 samples a step"


@fault(7, "a loss or gradient that is no number", "loss NaN; loss Inf; gradient Inf; a frozen weight NaN: each at step 40")
def not_a_number(lab: Lab) -> str:
    heard = []
    good = lab.folder("good")
    assert ended(lab.training(good, good / "kept", hook=lambda training: setattr(training.BestWeights, "restore", lambda *_: None), max_steps=120)) == 0
    for kind in ("loss nan", "loss inf", "gradient inf", "weight nan"):
        out = lab.folder(kind.replace(" ", "-"))

        def poison(training, kind=kind):
            def at_40(self, model, *given, step=training.PackedSFTTrainer.training_step):
                if self.state.global_step == 39 and kind == "weight nan":
                    next(p for p in model.parameters() if not p.requires_grad).data[:] = math.nan
                loss = step(self, model, *given)
                if self.state.global_step == 39 and kind.startswith("loss"):
                    self.step_loss = loss = loss * float(kind[5:])
                if self.state.global_step == 39 and kind == "gradient inf":
                    next(p for p in model.parameters() if p.grad is not None).grad[0] = math.inf
                return loss
            training.PackedSFTTrainer.training_step = at_40

        assert ended(lab.training(out, out / "kept", hook=poison)) == 3, (out / "log").read_text()
        assert steps_of(out)[-1] == 39 and "Diverged: in step 40" in (out / "log").read_text() and "lower train.learning_rate" in (out / "log").read_text()
        kept = out / "good/adapter_model.safetensors"
        assert kept.exists()
        heard.append(hashlib.sha256(kept.read_bytes()).hexdigest())
    assert len(set(heard)) == 1
    from finetune_accel.core.resume import Checkpoints

    def compare() -> None:
        import torch
        from safetensors.torch import load_file

        adapter = load_file(out / "good/adapter_model.safetensors")
        checkpoint = load_file(Checkpoints(out / "kept", {}).all()[0] / "weights.safetensors")
        assert Checkpoints(out / "kept", {}).all()[0].name == "step-00000039"
        assert all(torch.equal(adapter[name.replace(".default", "")], value) for name, value in checkpoint.items())

    assert ended(child(compare, out / "log")) == 0, (out / "log").read_text()[-1500:]
    return "stopped in that very step, before its update, exit 3; an adapter with the weights of step 39 is kept and named in the message with what to do"


@fault(8, "the loss explodes", "all weights, learning rate 5.0, a thousand times what teaches")
def loss_spike(lab: Lab) -> str:
    out = lab.folder("spike")
    code = ended(lab.training(out, out / "kept", learning_rate=5.0, method="full"))
    log = (out / "log").read_text()
    assert code == 3 and "the loss jumped to" in log and "Diverged: the loss" in log, log[-2000:]
    line = next(line for line in log.splitlines() if "Diverged: the loss" in line)
    return f"warned, then exit 3 after step {steps_of(out)[-1]} of 120: \"{line.strip()[:230]}\""


def whole_train(lab: Lab) -> Path:
    """Return a run folder whose train phase nobody disturbed."""
    if not hasattr(lab, "undisturbed"):
        lab.undisturbed = lab.prepared()
        said(lab.train(lab.undisturbed), 0)
    return lab.undisturbed


def adapter(run_dir: Path) -> str:
    """Return the SHA-256 of the adapter that a run trained."""
    return json.loads((run_dir / "train.json").read_text())["outputs"]["adapter"]["sha256"]


def rewrite(path: Path) -> None:
    """Change one word in a Parquet file of records."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["messages"][-1]["content"] += " now"
    rows[0]["response"] += " now"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


@fault(9, "SIGTERM", "kill -TERM to `finetune-accel run` at step 40 of its training")
def terminated(lab: Lab) -> str:
    undisturbed, run_dir = whole_train(lab), lab.prepared()
    running = lab.train(run_dir, "slow=0.05")
    wait_for(lambda: kernel_step(run_dir) >= 40 or running.poll() is not None)
    running.send_signal(signal.SIGTERM)
    output = said(running, 143)
    line = next(line for line in output.splitlines() if "asked to stop" in line)
    assert list(run_dir.glob("unfinished/train-*/checkpoints/step-*")) and not (run_dir / "train.json").exists() and kernel_of(run_dir) is None
    lab.stopped = run_dir
    shutil.copytree(run_dir, run_dir.with_name(f"{run_dir.name}-edited"))
    said(lab.train(run_dir), 0)
    resumed = json.loads((run_dir / "train.json").read_text())["checkpoints"]["resumed_at"]
    assert resumed and adapter(run_dir) == adapter(undisturbed) and not (run_dir / "unfinished").exists()
    return f"exit 143, \"{line.split('Stopped: ')[-1]}\"; the same command went on after step {resumed[0]}, the adapter equals the undisturbed run's bit for bit"


def two_processes(lab: Lab) -> Path:
    """Return the run folder of an undisturbed training by two processes."""
    if not hasattr(lab, "together"):
        lab.together = lab.prepared()
        said(lab.train(lab.together, "", "--set", "train.processes=2"), 0)
    return lab.together


def lost_process(lab: Lab, number: int, step: int = 40) -> str:
    """Send a signal to the second of two processes at a step; return what the phase's notebook said of it."""
    undisturbed, run_dir = two_processes(lab), lab.prepared()
    running = lab.train(run_dir, "slow=0.05", "--set", "train.processes=2")

    def second() -> dict | None:
        signs = [json.loads(path.read_text()) for path in run_dir.glob("unfinished/train-*/job/rank-1.json")]
        return next((sign for sign in signs if sign["step"] >= step), None)

    sign = wait_for(lambda: second() or running.poll() is not None, 900)
    begun = time.monotonic()
    os.kill(sign["pid"], number)
    said(running, 0)
    result = json.loads((run_dir / "train.json").read_text())
    (lost,) = result["group"]["lost"]
    assert result["checkpoints"]["resumed_at"] and adapter(run_dir) == adapter(undisturbed) and not (run_dir / "unfinished").exists()
    notebook = (run_dir / "train" / result["key"] / "notebook.ipynb").read_text()
    line = notebook[notebook.index("process 1 of 2"):].split("\\n")[0].split('"')[0]
    return (f"\"{line}\"; done {time.monotonic() - begun:.0f} s later, the adapter equals that of two undisturbed processes bit for bit "
            f"(resumed at step {result['checkpoints']['resumed_at'][0]}, lost at {lost['step']})")


@fault(10, "one of two processes is killed", "kill -9 to the second of two processes (torchrun, gloo) at step 40")
def process_killed(lab: Lab) -> str:
    return lost_process(lab, signal.SIGKILL)


@fault(11, "a process hangs", "SIGSTOP to the second of two processes at step 40; silence is borne for 30 s here, 60 by default")
def process_hangs(lab: Lab) -> str:
    os.environ["FINETUNE_ACCEL_SILENCE_SECONDS"] = "30"
    try:
        return lost_process(lab, signal.SIGSTOP)
    finally:
        del os.environ["FINETUNE_ACCEL_SILENCE_SECONDS"]


@fault(12, "data changed before resuming", "one word in prepare's train.parquet, by hand, after a training was stopped")
def data_changed(lab: Lab) -> str:
    if not hasattr(lab, "stopped"):
        terminated(lab)
    run_dir = lab.stopped.with_name(f"{lab.stopped.name}-edited")
    (path,) = run_dir.glob("prepare/*/train.parquet")
    before = path.read_bytes()
    rewrite(path)
    refused = said(lab.train(run_dir), 2)
    assert "data was" in refused and "and now is" in refused, refused
    path.write_bytes(before)
    said(lab.train(run_dir), 0)
    assert json.loads((run_dir / "train.json").read_text())["checkpoints"]["resumed_at"]
    line = next(line for line in refused.splitlines() if "data was" in line)
    return f"exit 2: \"{line[line.index('cannot'):][:210]}...\"; with the file as it was it resumed"


@fault(13, "batch or world size changed before resuming", "train.batch_size=4 after a stop; a checkpoint of one process, resumed as one of two")
def batch_changed(lab: Lab) -> str:
    from finetune_accel.core.engagement import load_engagement, phases
    from finetune_accel.core.runs import RunFolder, phase_key

    train = next(phase for phase in phases() if phase.name == "train")
    keys = [phase_key(load_engagement(str(lab.scratch / "faults.yaml"), more).settings(train, Path("/x")), train.notebook, {})
            for more in ([], ["train.batch_size=4"], ["train.checkpoint_minutes=9"])]
    assert keys[0] != keys[1] and keys[0] == keys[2] and RunFolder("/x").unfinished("train", keys[0]) != RunFolder("/x").unfinished("train", keys[1])
    out = lab.folder("world")
    pid = lab.training(out, out / "kept")
    wait_for(lambda: len(steps_of(out)) >= 10)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    assert ended(lab.training(out, out / "kept", identity={"data": "ab", "world size": "2"})) == 2
    line = next(line for line in (out / "log").read_text().splitlines() if "world size was" in line)
    return f"another batch size is another key ({keys[0]}, {keys[1]}), which has no checkpoints; world size: exit 2, \"{line[line.index('cannot'):][:150]}...\""


class Server:
    """An MLflow server on a port of its own, over one sqlite file; can be killed and started again."""

    def __init__(self, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.process = folder, None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        import httpx

        log = open(self.folder / "server.log", "a")
        self.process = subprocess.Popen([sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
                                         "--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.port), "--workers", "1"],
                                        stdout=log, stderr=log, start_new_session=True)

        def up() -> bool:
            try:
                return httpx.get(f"{self.uri}/health", timeout=2).status_code == 200
            except httpx.TransportError:
                return False
        wait_for(up)

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def once_each(lab: Lab, server: Server, run_dir: Path) -> int:
    """Return how many figures the MLflow run of a train phase has; each of the run's history must be there once."""
    def look() -> None:
        import mlflow

        result = json.loads((run_dir / "train.json").read_text())
        client = mlflow.MlflowClient(server.uri)
        run = client.get_run(result["mlflow_run_id"])
        assert run.info.status == "FINISHED" and run.data.params["batch_size"] == "2" and run.data.tags["key"] == result["key"]
        history = json.loads((run_dir / result["outputs"]["history.json"]["path"]).read_text())
        count = 0
        for name in run.data.metrics:
            told = client.get_metric_history(run.info.run_id, name)
            assert len({one.step for one in told}) == len(told), f"{name} stands there twice"
            count += len(told)
        for name in {key for entry in history for key in entry} - {"step", "epoch"}:
            wanted = {entry["step"]: entry[name] for entry in history if name in entry}
            there = {one.step: one.value for one in client.get_metric_history(run.info.run_id, name) if one.step}
            assert there == wanted, f"{name}: {len(there)} of {len(wanted)}"
        (run_dir / "count").write_text(str(count))

    assert ended(child(look, run_dir / "look.log")) == 0, (run_dir / "look.log").read_text()[-2000:]
    return int((run_dir / "count").read_text())


@fault(14, "MLflow is down", "kill -9 to the MLflow server: before the phase starts; at step 40; when the last step is done")
def mlflow_down(lab: Lab) -> str:
    heard = []
    for when in ("start", "middle", "end"):
        server, run_dir = Server(lab.folder(f"mlflow-{when}")), lab.prepared()
        options = ("--set", f"tracking_uri={server.uri}")
        try:
            if when != "start":
                server.start()
            running = lab.train(run_dir, "slow=0.05", *options)
            if when != "start":
                last = json.loads((run_dir / "prepare.json").read_text())["rows"]["kept"]["train"] * 4 // 2
                wait_for(lambda: kernel_step(run_dir) >= (40 if when == "middle" else last) or running.poll() is not None)
                server.kill()
            said(running, 0)
            assert list(run_dir.glob("spool/train-*.jsonl")), "what was not sent is kept"
            server.start()
            said(lab.train(run_dir, "", *options), 0)
            assert not list(run_dir.glob("spool/*.jsonl"))
            heard.append(f"{when}: {once_each(lab, server, run_dir)} figures")
        finally:
            server.kill()
    return f"the runs succeeded (exit 0), the next command sent what was spooled, and each figure is there once ({'; '.join(heard)})"


@fault(15, "first use of a store by several processes", "8 processes meet a store that is not there and log 50 steps each")
def first_use(lab: Lab) -> str:
    folder = lab.folder("first")

    def one(name: str) -> Callable:
        def work() -> None:
            from finetune_accel.core.engagement import phases
            from finetune_accel.core.runs import PhaseRun
            from finetune_accel.core.settings import PhaseSettings
            from finetune_accel.core.tracking import Tracker

            run = PhaseRun(PhaseSettings(name="first", run_dir=str(folder / name)), "plan", phases()[0].notebook, (), Tracker)
            for step in range(50):
                run.tracker.metrics({"loss": float(step)}, step)
            run.finish({})
        return work

    pids = [child(one(f"r{i}"), folder / f"r{i}.log") for i in range(8)]
    assert [ended(pid) for pid in pids] == [0] * 8, [(folder / f"r{i}.log").read_text()[-500:] for i in range(8)]
    store = sqlite3.connect(folder / "mlflow.db")
    counts = dict(store.execute("select run_uuid, count(*) from metrics where key = 'loss' group by run_uuid").fetchall())
    assert sorted(counts.values()) == [50] * 8, counts
    return "8 runs with 50 figures each in the store"


@fault(16, "the sqlite store is locked", "BEGIN EXCLUSIVE for 20 s while a phase logs 60 steps")
def locked_store(lab: Lab) -> str:
    folder = lab.folder("locked")

    def work() -> None:
        from finetune_accel.core.engagement import phases
        from finetune_accel.core.runs import PhaseRun
        from finetune_accel.core.settings import PhaseSettings
        from finetune_accel.core.tracking import Tracker

        run = PhaseRun(PhaseSettings(name="locked", run_dir=str(folder / "r")), "plan", phases()[0].notebook, (), Tracker)
        (folder / "open").touch()
        for step in range(60):
            began = time.monotonic()
            run.tracker.metrics({"loss": float(step)}, step)
            with open(folder / "waits", "a") as file:
                file.write(f"{time.monotonic() - began}\n")
            time.sleep(0.1)
        run.finish({})

    pid = child(work, folder / "log")
    wait_for(lambda: (folder / "open").exists())
    store = sqlite3.connect(folder / "mlflow.db", isolation_level=None, timeout=30)
    store.execute("BEGIN EXCLUSIVE")
    time.sleep(20)
    store.execute("ROLLBACK")
    assert ended(pid) == 0, (folder / "log").read_text()[-2000:]
    (steps, distinct) = store.execute("select count(*), count(distinct step) from metrics where key = 'loss'").fetchone()
    assert steps == distinct == 60, (steps, distinct)
    longest = max(map(float, (folder / "waits").read_text().split()))
    return f"60 of 60 figures in the store, each once; a step waited for it at most {longest:.1f} s"


@fault(17, "the command is killed", "kill -9 to `finetune-accel run` while its kernel trains")
def command_killed(lab: Lab) -> str:
    import psutil

    from finetune_accel.core.processes import processes_of

    run_dir = lab.prepared()
    running = lab.train(run_dir, "slow=0.05")
    wait_for(lambda: kernel_step(run_dir) >= 20 or running.poll() is not None)
    pids = [process.pid for process in processes_of(run_dir)]
    running.kill()
    running.communicate()
    began = time.monotonic()
    wait_for(lambda: not processes_of(run_dir) and not any(psutil.pid_exists(pid) for pid in pids), 20)
    took = time.monotonic() - began
    said(lab.train(run_dir), 0)
    resumed = json.loads((run_dir / "train.json").read_text())["checkpoints"]["resumed_at"]
    assert pids and resumed and adapter(run_dir) == adapter(whole_train(lab))
    return f"{len(pids)} processes were at work, none {took:.1f} s later; the same command went on after step {resumed[0]}, adapter equal bit for bit"


@fault(18, "a kernel dies in a phase", "kill -9 to prepare's kernel, once; then three times")
def kernel_dies(lab: Lab) -> str:
    def kill_in(run_dir: Path, running: subprocess.Popen, times: int) -> None:
        before = None
        for _ in range(times):
            def working():
                kernel = kernel_of(run_dir)
                return kernel if kernel and kernel.pid != before and list((run_dir / ".staging").glob("prepare-*")) else running.poll() is not None
            kernel = wait_for(working)
            assert kernel is not True, running.communicate()[0]
            before = kernel.pid
            kernel.kill()

    once, thrice = (lab.folder(name) / "run" for name in ("once", "thrice"))
    running = command("run", "faults.yaml", "--run-dir", once, "--to", "prepare", cwd=lab.scratch)
    kill_in(once, running, 1)
    output = said(running, 0)
    assert output.count("again") == 1 and output.count("done") == 2
    running = command("run", "faults.yaml", "--run-dir", thrice, "--to", "prepare", cwd=lab.scratch)
    kill_in(thrice, running, 3)
    failed = said(running, 3)
    assert "killed by SIGKILL three times" in failed and failed.count(" again ") == 2
    after = said(command("run", "faults.yaml", "--run-dir", thrice, "--to", "prepare", cwd=lab.scratch), 0)
    assert "plan                     kept" in after and "prepare                  done" in after
    return "once: prepare was started again by the command itself; three times: exit 3, and the next command kept plan and ran prepare alone"


def wheel() -> bytes:
    """Return a small valid wheel."""
    path = Path(tempfile.mkdtemp()) / "fault_demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fault_demo.py", "x = '" + "0" * 200_000 + "'\n")
        archive.writestr("fault_demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fault-demo\nVersion: 1.0\n")
        archive.writestr("fault_demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("fault_demo-1.0.dist-info/RECORD", "")
    return path.read_bytes()


@fault(19, "a download is cut or corrupted", "a package index here: cuts the first answer; sends other bytes; is down")
def download(lab: Lab) -> str:
    content, served = wheel(), []
    digest = hashlib.sha256(content).hexdigest()
    mode = {"now": "cut once"}

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.endswith(".whl"):
                served.append(mode["now"])
                body = bytes([content[0]]) + content[1:-40] + bytes(40) if mode["now"] == "corrupt" else content
                sent = body[:len(body) // 2] if mode["now"] == "cut" or (mode["now"] == "cut once" and len(served) == 1) else body
            else:
                body = sent = b'<a href="/fault_demo-1.0-py3-none-any.whl">fault_demo-1.0-py3-none-any.whl</a>'
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if not self.path.endswith(".whl") else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_):
            pass

    index = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=index.serve_forever, daemon=True).start()
    out, heard = lab.folder("download"), []
    try:
        for now, code in (("cut once", 0), ("cut", 2), ("corrupt", 2)):
            mode["now"] = now
            served.clear()
            cache = out / now.replace(" ", "-")

            def fetch() -> None:
                from finetune_accel.core.sources import fetch_package

                os.environ |= {"FINETUNE_ACCEL_CACHE": str(cache), "PIP_INDEX_URL": f"http://127.0.0.1:{index.server_port}/simple", "PIP_NO_CACHE_DIR": "1",
                               "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": ""}
                print(fetch_package(f"pypi:fault-demo==1.0#sha256={digest}"))

            assert ended(child(fetch, out / f"{now}.log")) == code, (out / f"{now}.log").read_text()[-2000:]
            there = [path for path in cache.rglob("*") if path.is_file() and path.suffix == ".whl"]
            assert len(there) == (code == 0) and all(hashlib.sha256(path.read_bytes()).hexdigest() == digest for path in there), there
            heard.append(f"{now}: asked {len(served)} times, exit {code}")
    finally:
        index.shutdown()
    return f"{'; '.join(heard)}; the cache holds the whole file or none"


@fault(20, "two runs in one folder", "the same command twice at once")
def two_runs(lab: Lab) -> str:
    run_dir = lab.folder("two") / "run"
    first = command("run", "faults.yaml", "--run-dir", run_dir, "--to", "plan", cwd=lab.scratch)
    wait_for(lambda: (run_dir / ".lock.holder").exists())
    refused = said(command("run", "faults.yaml", "--run-dir", run_dir, "--to", "plan", cwd=lab.scratch), 2)
    assert "is in use by process" in refused and str(first.pid) in refused
    said(first, 0)
    return "the second was refused (exit 2) with the first one's process id, and the first finished"


def cost(lab: Lab) -> dict:
    """Return what checkpoints cost where steps are real: bytes and seconds of one, with LoRA and with all weights, of SmolLM2's size."""
    out = lab.folder("cost")

    def measure() -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        from finetune_accel.core.adapters import AdapterPlan, add_adapters
        from finetune_accel.core.optimiser import MasterAdamW
        from finetune_accel.core.resume import Checkpoints
        from finetune_accel.core.training_state import save_learnt, state_size

        shape = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                            tie_word_embeddings=True)
        found = {}
        for method in ("lora", "full"):
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
            model = add_adapters(model, AdapterPlan(rank=16)) if method == "lora" else model
            optimiser = MasterAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
            for parameter in optimiser.working:
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
            optimiser.step()
            checkpoints = Checkpoints(out / method, {})
            for step in (1, 2, 3):
                with checkpoints.saving(step, state_size(model)) as folder:
                    save_learnt(model, optimiser, folder)
            found[method] = {"megabytes": round(checkpoints.bytes / 1e6), "seconds": round(checkpoints.seconds / 3, 2)}
        (out / "cost.json").write_text(json.dumps(found))

    assert ended(child(measure, out / "log")) == 0, (out / "log").read_text()[-2000:]
    return json.loads((out / "cost.json").read_text())


def write_page(rows: list[dict], costs: dict) -> None:
    """Put what was found into benchmarks/faults.json, in place of earlier findings of the same faults, and write the table faults.md."""
    with FileLock(Path(tempfile.gettempdir()) / "finetune-accel-faults.lock"):
        _write_page(rows, costs)


def _write_page(rows: list[dict], costs: dict) -> None:
    path = HERE / "faults.json"
    before = json.loads(path.read_text()) if path.exists() else {"faults": [], "cost": {}}
    known = {row["number"]: row for row in [*before["faults"], *rows]}
    record = {"machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}",
              "faults": [known[number] for number in sorted(known)], "cost": costs or before["cost"]}
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    commits = ", ".join(sorted({row["commit"] or "none" for row in record["faults"]}))
    lines = ["# Faults, injected and survived", "", f"`make faults` on {record['machine']}, commit {commits}. {sum(row['passed'] for row in record['faults'])} of "
             f"{len(record['faults'])} passed; date and seconds (on cores that others used too) of each are in `faults.json`.", "",
             "| # | fault | injected by | what happened | |", "|---|---|---|---|---|"]
    lines += [f"| {row['number']} | {row['fault']} | {row['injected']} | {row['happened'].replace('|', '/')} | {'pass' if row['passed'] else '**FAIL**'} |"
              for row in record["faults"]]
    if record["cost"]:
        lines += ["", "What a checkpoint costs with the shape of SmolLM2-135M (written, hashed, brought to the disk): " + "; ".join(
            f"{method} {cost['megabytes']} MB in {cost['seconds']} s" for method, cost in record["cost"].items())
            + ". Checkpoints are at least 50 times as far apart as one takes (`core.resume.COST_LIMIT`), and `train.checkpoint_minutes` (5) apart."]
    (HERE / "faults.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Inject the faults that were asked for, all by default."""
    import finetune_accel.core.saving  # noqa: F401  all that children need, before they are forked
    import finetune_accel.core.training  # noqa: F401
    from finetune_accel.core.provenance import git_state

    wanted = [int(word) for word in sys.argv[1:]] or [*sorted(FAULTS), 0]
    state, lab, passed_all = git_state(HERE.parent), Lab(Path(tempfile.mkdtemp(prefix="faults-"))), True
    commit = state and state["commit"][:7] + ("-changed" if state["changed"] else "")
    for number in wanted:
        if number == 0:
            write_page([], cost(lab))
            continue
        name, injected, function = FAULTS[number]
        begun = time.monotonic()
        try:
            happened, passed = function(lab), True
        except Exception as error:
            traceback.print_exc()
            happened, passed = f"{type(error).__name__}: {str(error)[:400]}", False
        happened = happened.replace(str(lab.scratch), "FOLDER")
        row = {"number": number, "fault": name, "injected": injected, "happened": happened, "passed": passed, "commit": commit,
               "date": time.strftime("%Y-%m-%d"), "seconds": round(time.monotonic() - begun, 1)}
        write_page([row], {})
        passed_all = passed_all and passed
        print(f"{number:>2} {'pass' if passed else 'FAIL'} {name}: {happened} ({row['seconds']:.0f} s)", flush=True)
    shutil.rmtree(lab.scratch, ignore_errors=True)
    sys.exit(0 if passed_all else 1)


if __name__ == "__main__":
    main()
