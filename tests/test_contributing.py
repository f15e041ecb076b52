"""CONTRIBUTING's worked examples, carried out as they stand there in a copy of the repository: a metric, a source, a phase."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import states, write_workspace
from test_docs import REPO, Block, blocks

EXAMPLES = [block for block in blocks(REPO / "CONTRIBUTING.md") if block.notebook]


def apply_diff(notebook: Path, block: Block) -> None:
    """Change the one cell of a notebook in which the lines of a diff stand; a last line may be the beginning of one."""
    lines = block.text.splitlines()
    old, new = ("\n".join(line[1:] for line in lines if line[:1] in (" ", sign)) for sign in "-+")
    content = json.loads(notebook.read_text())
    cells = [cell for cell in content["cells"] if old in "".join(cell["source"])]
    assert len(cells) == 1 and "".join(cells[0]["source"]).count(old) == 1, f"{block.place}: stands in {len(cells)} cells of {notebook.name}\n{old}"
    cells[0]["source"] = "".join(cells[0]["source"]).replace(old, new).splitlines(keepends=True)
    notebook.write_text(json.dumps(content))


def add_cell(notebook: Path, block: Block) -> None:
    """Add a block as a cell to a notebook, which is made if need be."""
    content = nbformat.read(notebook, 4) if notebook.exists() else nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    make = nbformat.v4.new_markdown_cell if block.language == "markdown" else nbformat.v4.new_code_cell
    content.cells.append(make(block.text.rstrip(), metadata={"tags": block.notebook.split()[1:]}))
    nbformat.write(content, notebook)


def in_copy(copy: Path, *command: str, cwd: Path | None = None) -> str:
    """Run a command of Python with the copy's package and return what it printed."""
    done = subprocess.run([sys.executable, *command], cwd=cwd or copy, env={**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "160"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with all examples in it, and what `make sync` does."""
    copy = tmp_path_factory.mktemp("contributing") / "repo"
    shutil.copytree(REPO, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "*.egg-info", "_docs", "build", "docs", "benchmarks", "tests"))
    for block in EXAMPLES:
        notebook = copy / block.notebook.split()[0]
        if block.language == "diff":
            apply_diff(notebook, block)
        elif block.language in ("python", "markdown"):
            add_cell(notebook, block)
    changed = sorted({block.notebook.split()[0] for block in EXAMPLES})
    in_copy(copy, "-c", f"from nbdev.export import nb_export; [nb_export(notebook) for notebook in {changed}]")  # the rest is as it was, compiled
    in_copy(copy, "-c", "from finetune_accel.core.engagement import write_parameters; write_parameters()")
    return copy


def test_the_metric_scores_and_is_a_criterion(copy):
    in_copy(copy, "-c", "from finetune_accel.core.criteria import Criterion; from finetune_accel.core.metrics import score\n"
                        "first = Criterion(metric='first_word', at_least=0.5)\n"
                        "assert [score(first, answer, 'aws s3 ls') for answer in ('aws ec2 run', 'gcloud', '')] == [1.0, 0.0, 0.0]")
    notebook = json.loads((copy / "nbs/core/metrics.ipynb").read_text())
    assert any("assert first_word" in "".join(cell["source"]) for cell in notebook["cells"])


def test_the_source_is_read_and_its_bad_rows_are_named(copy, tmp_path):
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "response": "b"}, 7]')
    said = in_copy(copy, "-c", "from finetune_accel.core.readers import open_source; opened = open_source('rows.json')\n"
                               "print(opened.said, [row for block in opened.blocks() for row in block.rows()])", cwd=tmp_path)
    assert "a JSON list of 2 rows" in said and "not a JSON object" in said and "'prompt': 'a'" in said


SECTION = yaml.safe_load(next(block.text for block in EXAMPLES if block.language == "yaml"))


def test_the_phase_is_known_by_its_notebook_alone(copy, tmp_path):
    (tmp_path / "mine.yaml").write_text((REPO / "finetune_accel/engagements/starter.yaml").read_text() + yaml.safe_dump(SECTION))
    assert "words" in in_copy(copy, "-m", "finetune_accel.core.cli", "check", "mine.yaml", cwd=tmp_path)
    cell = next(cell for cell in json.loads((copy / "nbs/11_words.ipynb").read_text())["cells"] if cell["metadata"].get("tags"))
    assert "longest: int = 12  # letters from which a word is long" in "".join(cell["source"])


@pytest.mark.slow
def test_the_phase_runs(copy, tmp_path):
    folder = write_workspace(tmp_path / "work")
    engagement = yaml.safe_load((folder / "mine.yaml").read_text())
    (folder / "mine.yaml").write_text(yaml.safe_dump({key: engagement[key] for key in ("name", "seed", "plan", "prepare")} | SECTION))
    said = in_copy(copy, "-m", "finetune_accel.core.cli", "run", "mine.yaml", cwd=folder)
    assert states(said) == dict.fromkeys(("plan", "prepare", "words"), "done")
    assert json.loads((folder / "runs/mine/words.json").read_text())["metrics"] == {"long_words": 0}
