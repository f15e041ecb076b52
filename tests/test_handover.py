"""The handover pack: every link in it leads somewhere, every command in it exists, and its runbooks were tried."""
import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import ROWS, finetune_accel

from finetune_accel.core.cli import app
from finetune_accel.core.runs import RunFolder


def broken_links(folder: Path) -> list[str]:
    """Return what a page of the pack links to and is not there: files, places in pages, and anything outside."""
    broken = []
    for page in folder.glob("*.html"):
        text = page.read_text()
        ids = set(re.findall(r'id="([^"]+)"', text))
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            file, _, place = link.partition("#")
            found = (folder / file).is_file() if file else True
            if re.match(r"[a-z]+:", link) or not found or (not file and place not in ids):
                broken.append(f"{page.name}: {link}")
    return broken


def commands_in(folder: Path) -> list[str]:
    """Return the commands `finetune-accel ...` that stand in code of the pack's pages."""
    code = [html.unescape(found) for page in folder.glob("*.html") for found in re.findall(r"<(?:code|pre)[^>]*>(.*?)</(?:code|pre)>", page.read_text(), re.S)]
    lines = [line.strip().removeprefix("$ ") for text in code for line in text.splitlines()]
    return sorted({re.sub(r"^[A-Z_]+=\S+ ", "", line).split("     #")[0] for line in lines if re.match(r"([A-Z_]+=\S+ )?finetune-accel ", line)})


def unknown_in(command: str) -> list[str]:
    """Return the words of a command that the command line does not know: its name and its options."""
    known = typer.main.get_command(app).commands
    words = shlex.split(command)[1:]
    if words[0] not in known:
        return [words[0]]
    options = {option for parameter in known[words[0]].params for option in parameter.opts}
    return [word for word in words if word.startswith("--") and word not in options]


def check_pack(folder: Path) -> list[str]:
    """Check all links and commands of a pack and return its commands."""
    assert not broken_links(folder)
    commands = commands_in(folder)
    assert commands and not {command: unknown for command in commands if (unknown := unknown_in(command))}
    return commands


def test_the_checks_find_what_is_broken(tmp_path):
    (tmp_path / "index.html").write_text('<a href="gone.html">x</a> <a href="#nowhere">x</a> <a href="https://example.com">x</a> <pre>$ finetune-accel handoff\n</pre>')
    assert len(broken_links(tmp_path)) == 3 and commands_in(tmp_path) == ["finetune-accel handoff"] and unknown_in("finetune-accel handoff") == ["handoff"]
    assert unknown_in("finetune-accel run home-intents --form x") == ["--form"]


def test_the_pack_of_a_run(finished):
    folder, output = finished
    run = RunFolder(folder / "runs/mine")
    pack = run.output("handover/pack")
    commands = check_pack(pack)
    assert {command.split()[1] for command in commands} >= {"key", "policy", "run", "promote", "rollback", "decisions", "monitor", "quiz", "handover", "serve"}
    page = (pack / "index.html").read_text()
    assert "Not tried in this short form" in page and page.count("$ FINETUNE_ACCEL_KEY=new.pem finetune-accel key") == 1
    for title in ("As it stands", "Runbooks", "Alerts", "Who owns what", "Open risks", "Made of", "Costs", "Glossary"):
        assert f">{title}</h2>" in page
    plan = run.need("plan")["settings"]
    assert plan["risks"] and all(html.escape(risk["risk"]) in page for risk in plan["risks"]) and "decides after evaluate" in page
    parts = json.loads((pack / "bom.json").read_text())["components"]
    assert all(part["name"] in page for part in parts)
    assert run.need("handover")["tried"] == ["rotate keys"] and "next:" in output
    assert ">Next steps</h2>" in (folder / "runs/mine/report.html").read_text()


@pytest.mark.slow
def test_one_command_tries_all_runbooks_and_touches_nothing_of_the_run(finished, tmp_path):
    folder, _ = finished
    run = RunFolder(folder / "runs/mine")
    before = {name: run.need(name) for name in ("plan", "prepare", "train", "evaluate", "serve", "promote")}
    entries = len(run.decisions.entries())
    output = finetune_accel("handover", run.path, cwd=folder)
    assert "the pack:" in output and run.need("handover")["tried"] == ["rotate keys", "retrain", "alert", "new data", "roll back"]
    check_pack(run.output("handover/pack"))
    page = (run.output("handover/pack") / "index.html").read_text()
    assert "Not tried" not in page and "@champion is version" in page and "ALERT prompt since" in page and "uses every row" in page
    assert {name: run.need(name) for name in before} == before and len(run.decisions.entries()) == entries


@pytest.mark.slow
def test_a_second_use_case_from_a_file_runs_headless(workspace, tmp_path):
    """The notebook of the pack, as a team would run it: from a file of rows to a verdict."""
    from importlib import resources

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{row['prompt']} {number}", "response": row["response"]}) + "\n" for number in range(8) for row in ROWS))
    shutil.copytree(workspace / "tiny", tmp_path / "tiny")
    notebook = Path(str(resources.files("finetune_accel"))) / "second_use_case.ipynb"
    parameters = {"rows": str(rows), "name": "second", "use_case": "sentences to commands", "owner": "the team", "at_least": 0.01, "base_model": f"path:{tmp_path}/tiny",
                  "folder": str(tmp_path), "max_steps": 2}
    words = [word for key, value in parameters.items() for word in ("-y", json.dumps({key: value}))]
    done = subprocess.run([sys.executable, "-m", "papermill", str(notebook), str(tmp_path / "out.ipynb"), "--no-progress-bar", *words], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    evaluated = RunFolder(tmp_path / "runs/second").need("evaluate")
    assert evaluated["criteria"][0]["criterion"] == "exact_match" and (tmp_path / "runs/second/report.html").is_file()
