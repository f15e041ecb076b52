"""What a contributor finds at the door: citation, issue forms, hooks and changes, each by the schema or the tool that will read it."""
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CONFIG = configparser.ConfigParser(delimiters=["="])
CONFIG.read(REPO / "settings.ini", encoding="utf-8")


@pytest.mark.parametrize("schema, files", [
    ("vendor.citation-file-format", ["CITATION.cff"]), ("vendor.github-issue-forms", [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/wish.yml"]),
    ("vendor.github-issue-config", [".github/ISSUE_TEMPLATE/config.yml"])])
def test_files_that_others_read_keep_their_schema(schema, files):
    done = subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_the_same_everywhere():
    version = CONFIG["DEFAULT"]["version"]
    assert yaml.safe_load((REPO / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## (\S+)", (REPO / "CHANGELOG.md").read_text().replace(",", ""), re.M).group(1) == version


def test_contributing_knows_every_target():
    targets = re.findall(r"^([a-z][a-z-]*):", (REPO / "Makefile").read_text(), re.M)
    assert [target for target in targets if f"`make {target}`" not in (REPO / "CONTRIBUTING.md").read_text()] == []


def test_hooks_are_of_this_repository_and_are_there():
    """They need no network: each is a program of .venv, and each looks at files that exist."""
    (repo,) = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    files = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()
    for hook in repo["hooks"]:
        program = Path(hook["entry"].split()[0])
        assert hook["language"] == "system" and program.parts[:2] == (".venv", "bin"), hook["id"]
        assert (BIN / program.name).exists() or (REPO / program).exists(), hook["id"]
        assert any(re.search(hook.get("files", ""), file) for file in files), hook["id"]


@pytest.mark.slow
def test_hooks_pass_on_all_files_without_a_network():
    pre_commit = pytest.importorskip("pre_commit", reason="needs pip install pre-commit")
    assert pre_commit and (REPO / ".venv").exists()
    done = subprocess.run(["unshare", "--net", "--map-root-user", sys.executable, "-m", "pre_commit", "run", "--all-files"], cwd=REPO, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(REPO)})
    assert done.returncode == 0 and "Failed" not in done.stdout, done.stdout + done.stderr
