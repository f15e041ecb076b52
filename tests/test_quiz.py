"""Each fault of the quiz is found with what the pack says; neither doing nothing nor claiming everything passes."""
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import finetune_accel
from contrived import contrive, questions
from typer.testing import CliRunner

from finetune_accel.core.cli import app
from finetune_accel.core.errors import GateNotMet
from finetune_accel.core.quiz import make_quiz, score_quiz
from finetune_accel.core.quiz_faults import FAULTS, FOLDERS
from finetune_accel.core.runs import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return RunFolder(contrive(tmp_path_factory.mktemp("quiz"), questions(200, 1)))


@pytest.fixture(scope="module")
def quizzes(run, tmp_path_factory):
    """Quizzes as they were made, by seed; each is copied before anything is mended."""
    folder = tmp_path_factory.mktemp("quizzes")
    return {seed: make_quiz(run, folder / f"quiz-{seed}", seed) for seed in (0,)}


def leaks(folder: Path, by_command: bool) -> tuple[bool, str]:
    """Return whether there is a leak, and the place of a leaked row."""
    if by_command:
        finetune_accel("run", "engagement.yaml", "--run-dir", "runs/rows", "--to", "prepare", cwd=folder)
        pairs = json.loads(next(folder.glob("runs/rows/prepare/*/leaks.json")).read_text())
    else:
        pairs = pairs_of(folder)
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    same = [pair for pair in pairs if pair["exact"]]
    if not same:
        return False, ""
    number = next(n for n, row in enumerate(lines, 1) if row["prompt"] != row["prompt"].lower() and row["prompt"].lower() in same[0]["train"].lower())
    return True, f"rows.jsonl:{number}"


def pairs_of(folder: Path) -> list[dict]:
    """Return the worst pairs of test and training rows, as prepare computes them."""
    import tempfile

    from finetune_accel.core.decisions import decide
    from finetune_accel.core.leaks import pairs_with_texts, worst_pairs
    from finetune_accel.prepare import PrepareSettings, check_rows, find_leaks, open_all, row_rules

    section = yaml.safe_load((folder / "engagement.yaml").read_text())["prepare"]
    settings = PrepareSettings(**section | {"source": str(folder / "rows.jsonl")})
    with tempfile.TemporaryDirectory() as scratch:
        checked = check_rows(settings, open_all(settings), row_rules(settings), Path(scratch))
        return pairs_with_texts(worst_pairs(find_leaks(checked, decide(checked, settings.split, "report", None))), checked.texts)


def mend_leak(folder: Path) -> None:
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(row for row in rows if json.loads(row)["prompt"] == json.loads(row)["prompt"].lower()))


def broken_template(folder: Path) -> tuple[bool, str]:
    right = json.loads((folder / "parity.json").read_text())["model"]["template_sha256"]
    wrong = [name for name in FOLDERS if hashlib.sha256((folder / f"templates/{name}/chat_template.jinja").read_bytes()).hexdigest() != right]
    return bool(wrong), wrong[0] if wrong else ""


def mend_template(folder: Path) -> None:
    _, wrong = broken_template(folder)
    good = next(name for name in FOLDERS if name != wrong)
    shutil.copyfile(folder / f"templates/{good}/chat_template.jinja", folder / f"templates/{wrong}/chat_template.jinja")


def drift(folder: Path) -> tuple[bool, str]:
    done = subprocess.run([sys.executable, "-m", "finetune_accel.core.cli", "monitor", "runs/contrived", "--table", "payload", "--baseline", "delta:before@2"],
                          cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    since = re.search(r"ALERT prompt since (\d{4}-\d\d-\d\d)", done.stdout)
    return bool(since), since.group(1) if since else ""


def mend_drift(folder: Path) -> None:
    from finetune_accel.core.baseline import read_exchanges

    asked = [one["question"]["prompt"] for one in read_exchanges(f"delta:{folder / 'payload'}")]
    new = [prompt for prompt in asked if "guests" in prompt][:6]
    (folder / "new_rows.jsonl").write_text("".join(json.dumps({"prompt": prompt, "response": "complaint"}) + "\n" for prompt in new))


def wrong_promotion(folder: Path) -> tuple[bool, str]:
    """The champion in the registry beside what `finetune-accel decisions` lists last."""
    from finetune_accel.core import stores

    listed = finetune_accel("decisions", "runs/contrived", cwd=folder)
    decided = [words[-2] for line in listed.splitlines() if len(words := [word.strip() for word in re.split("[│┃]", line) if word.strip()]) > 4 and "promote" in words]
    now = stores.alias_version(f"sqlite:///{folder}/runs/mlflow.db", "main.default.contrived", "champion")
    return now != decided[-1], f"version {now}" if now != decided[-1] else ""


def mend_promotion(folder: Path) -> None:
    finetune_accel("rollback", "runs/contrived", "--to-log", "--why", "moved by hand", cwd=folder)


MEND = {"leak": mend_leak, "template": mend_template, "drift": mend_drift, "promotion": mend_promotion}


def walk(folder: Path, by_command: bool = False) -> dict[str, tuple[bool, str]]:
    """Find, mend and write down all faults of a quiz as its README says; return what was found."""
    found = {"leak": leaks(folder, by_command), "template": broken_template(folder), "drift": drift(folder), "promotion": wrong_promotion(folder)}
    for name, (there, _) in found.items():
        if there:
            MEND[name](folder)
    write(folder, found)
    return found


def write(folder: Path, found: dict[str, tuple[bool, str]]) -> None:
    (folder / "findings.yaml").write_text(yaml.safe_dump({name: {"present": there, "where": place or None} for name, (there, place) in found.items()}))


def fresh(quizzes, seed: int, tmp_path: Path) -> Path:
    """Return a copy of a quiz; its store knows where its artefacts are, so they stay."""
    return shutil.copytree(quizzes[seed], tmp_path / "quiz")


@pytest.mark.parametrize("seed", [0])
def test_who_does_as_the_pack_says_gets_all_points(quizzes, seed, tmp_path):
    folder = fresh(quizzes, seed, tmp_path)
    found, score = walk(folder), score_quiz(folder)
    assert score.passed and score.points == score.of == 2 * sum(there for there, _ in found.values()), (found, score)


def test_doing_nothing_gets_nothing(quizzes):
    score = score_quiz(quizzes[0])
    assert score.points == 0 and not score.passed and score.of >= 4


def same_for_all(folder: Path) -> None:
    """Claim every fault at each kind of place, then none: no such answer passes."""
    for answer in ({"present": True, "where": "version 2"}, {"present": True, "where": "amber"}, {"present": True, "where": "rows.jsonl:1"}, {"present": False}):
        (folder / "findings.yaml").write_text(yaml.safe_dump({name: dict(answer) for name in FAULTS}))
        score = score_quiz(folder)
        assert not score.passed and score.points <= 1, (answer, score)


def test_the_same_answer_for_all_does_not_pass(quizzes, tmp_path):
    same_for_all(fresh(quizzes, 0, tmp_path))


def test_found_and_not_mended_does_not_pass_and_a_false_claim_costs(quizzes, tmp_path):
    folder = fresh(quizzes, 0, tmp_path)
    there, name = broken_template(folder)
    write(folder, {fault: (False, "") for fault in FAULTS} | {"template": (there, name)})
    before = score_quiz(folder)
    assert before.points == there and not before.passed
    absent = [mark.fault for mark in before.marks if mark.says == "rightly not claimed"]
    assert absent, "not all faults are there"
    write(folder, {fault: (False, "") for fault in FAULTS} | {"template": (there, name), absent[0]: (True, "somewhere")})
    assert score_quiz(folder).points == 0


def test_the_command(run, quizzes, tmp_path):
    def ask(*words: str):
        return CliRunner().invoke(app, ["quiz", *map(str, words)])

    assert "not answered" in (scored := ask(quizzes[0], "--score")).stdout and isinstance(scored.exception, GateNotMet) and "0 of" in str(scored.exception)
    assert "either --out or --score" in str(ask(run.path).exception)
    assert "exists already" in str(ask(run.path, "--out", quizzes[0]).exception)
    assert "is no quiz" in str(ask(tmp_path, "--score").exception)


@pytest.mark.slow
def test_every_fault_is_found_by_commands_alone(run, tmp_path):
    seen = set()
    for seed in (5, 8):  # all four faults are there in one or the other
        finetune_accel("quiz", run.path, "--out", tmp_path / f"quiz-{seed}", "--seed", seed, cwd=tmp_path)
        folder = tmp_path / f"quiz-{seed}"
        assert score_quiz(folder).points == 0
        same_for_all(folder)
        found, score = walk(folder, by_command=True), score_quiz(folder)
        seen |= {name for name, (there, _) in found.items() if there}
        assert score.passed, (seed, found, score)
    assert seen == set(FAULTS)
