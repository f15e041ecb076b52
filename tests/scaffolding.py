"""What a rendered repository must pass without a workspace, as functions: `test_scaffold.py` tries a handful of combinations, `benchmarks/scaffold.py` all."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import yaml

from finetune_accel.core.bundle import check_bundle, read_bundle
from finetune_accel.core.scaffold import questions, read_answers, scaffold

CHOICES = {name: list(question["choices"].values()) for name, question in questions().items() if question.get("choices")}
CI_FILES = {"github": ".github/workflows", "azure_devops": "azure-pipelines.yml", "gitlab": ".gitlab-ci.yml"}
SCHEMAS = {"github": ["vendor.github-workflows"], "azure_devops": ["vendor.azure-pipelines", "--regex-variant", "nonunicode"], "gitlab": ["vendor.gitlab-ci"]}


def combinations() -> list[dict[str, str]]:
    """Return every combination of the choices; a model of one's own has no choice of what travels, as no code of ours trains it."""
    every = [dict(zip(CHOICES, values)) for values in product(*CHOICES.values())]
    return [one for one in every if one["pipeline"] == "engagement" or one["promote"] == "model"]


def render(folder: Path, answers: dict[str, str]) -> Path:
    """Render a repository as the command line does, and make it a git repository."""
    made = scaffold(folder, read_answers([f"{name}={value}" for name, value in answers.items()]), defaults=True)
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=made, check=True)
    return made


def tool(name: str) -> str:
    """Return the program `name` of this environment."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed: pip install -e .[dev]"
    return found


def run_tool(*words: str, cwd: Path) -> str:
    """Return what a program printed; it must end with 0."""
    done = subprocess.run([tool(words[0]), *map(str, words[1:])], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def git(*words: str, cwd: Path) -> str:
    """Run git as somebody who has set nothing up."""
    return run_tool("git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main", *words, cwd=cwd)


def commit(folder: Path, message: str) -> None:
    """Commit all that is in a folder."""
    git("add", "-A", cwd=folder)
    git("commit", "-qm", message, cwd=folder)


def findings_above_low(repository: Path) -> list[str]:
    """Return what zizmor finds in the workflows with a severity above low."""
    done = subprocess.run([tool("zizmor"), "--offline", "--format=json", "--persona=regular", "--no-exit-codes", ".github/workflows"], cwd=repository,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [f"{one['ident']}: {one['desc']}" for one in json.loads(done.stdout) if one["determinations"]["severity"] not in ("Informational", "Low")]


PASSED: set[str] = set()  # contents of CI files that have passed: most combinations have the same


def check_ci(repository: Path, ci: str) -> None:
    """Check the CI files: their schema; for GitHub also actionlint and zizmor. Files of the same content are checked once."""
    place = repository / CI_FILES[ci]
    files = sorted(place.glob("*.yml")) if place.is_dir() else [place]
    content = "".join(path.read_text() for path in files)
    if content in PASSED:
        return
    run_tool("check-jsonschema", "--builtin-schema", *SCHEMAS[ci], *files, cwd=repository)
    if ci == "github":
        run_tool("actionlint", *files, cwd=repository)
        assert findings_above_low(repository) == []
    PASSED.add(content)


def check_no_other_ci(repository: Path, ci: str) -> None:
    """No file of another CI system is there."""
    others = [name for name in CI_FILES.values() if name != CI_FILES[ci] and (repository / name).exists()]
    assert not others, f"of another CI system: {others}"


def check_no_secret_of_production(repository: Path, ci: str) -> None:
    """No step that a pull request runs names production, or any secret."""
    if ci == "github":
        text = yaml.safe_dump(yaml.safe_load((repository / ".github/workflows/pull-request.yml").read_text()))
    else:
        content = yaml.safe_load((repository / CI_FILES[ci]).read_text())
        text = yaml.safe_dump([one for one in content["stages"] if one["stage"] in ("checks", "test")] if ci == "azure_devops" else
                              {name: content[name] for name in ("checks", "test")})
    assert "prod" not in text.lower(), text
    assert "secrets." not in text


BUNDLES: dict[str, list[str]] = {}  # what the files of a bundle came to, by their content: the same for each CI system


def resources_of(repository: Path) -> list[str]:
    """Check the bundle and return its resources. One with the same files, but for CI and documents, is checked once."""
    apart = (*CI_FILES.values(), ".git/", ".copier-answers.yml", "docs/", "README.md", "keys/")
    names = [str(path.relative_to(repository)) for path in sorted(repository.rglob("*")) if path.is_file()]
    content = hashlib.sha256(b"\0".join(name.encode() + b"\0" + (repository / name).read_bytes() for name in names if not name.startswith(apart))).hexdigest()
    if content not in BUNDLES:
        BUNDLES[content] = check_bundle(repository)
    assert list(read_bundle(repository).tree["targets"]) == ["test", "staging", "prod"]
    return BUNDLES[content]


def check_repository(repository: Path, answers: dict[str, str]) -> int:
    """Check all that can be without a workspace; return how many resources the bundle has."""
    assert "[[" not in "".join(path.read_text() for path in repository.rglob("*") if path.is_file() and ".git" not in path.parts and path.suffix != ".ipynb")
    resources = resources_of(repository)
    assert len(yaml.safe_load((repository / ".copier-answers.yml").read_text())) > 15
    check_ci(repository, answers["ci"])
    check_no_other_ci(repository, answers["ci"])
    check_no_secret_of_production(repository, answers["ci"])
    return len(resources)


def steps(repository: Path, ci: str) -> dict[str, str]:
    """Return {name: command} of the pull request's steps that need no workspace, as the CI file says them."""
    if ci == "github":
        content = yaml.safe_load((repository / ".github/workflows/pull-request.yml").read_text())
        return {one["name"]: one["run"] for one in content["jobs"]["checks"]["steps"] if "run" in one}
    content = yaml.safe_load((repository / CI_FILES[ci]).read_text())
    if ci == "azure_devops":
        return {one["displayName"]: one["script"] for one in content["stages"][0]["jobs"][0]["steps"] if "script" in one}
    return {line.removeprefix("make "): line for line in content["checks"]["script"]}


def run_steps(repository: Path, ci: str, *, without: tuple[str, ...] = ("install",), **variables: str) -> dict[str, tuple[int, str]]:
    """Run a pull request's steps one after the other, as CI does, until one fails; return {name: (exit code, output)}."""
    found: dict[str, tuple[int, str]] = {}
    environment = {**os.environ, "BIN": str(Path(sys.executable).parent), "READY": "", "COLUMNS": "160", "CI": "true", **variables}
    for name, command in steps(repository, ci).items():
        if name in without:
            continue
        done = subprocess.run(["bash", "-c", command], cwd=repository, env=environment, capture_output=True, text=True)
        found[name] = done.returncode, done.stdout + done.stderr
        if done.returncode:
            break
    return found
