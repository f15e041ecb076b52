"""The customer's repository: a handful of combinations, what its checks find, and that `copier update` keeps what the customer changed."""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from scaffolding import CHOICES, check_repository, combinations, commit, git, render, run_tool, steps

from finetune_accel.core.bundle import bundle_problems, check_bundle, read_bundle
from finetune_accel.core.engagement import load_engagement, overrides_of, phases
from finetune_accel.core.errors import BadInput
from finetune_accel.core.job import CarriedRuns
from finetune_accel.core.repository import check_secrets
from finetune_accel.core.scaffold import read_answers, scaffold

REPO = Path(__file__).parent.parent
DEFAULT = {"pipeline": "engagement", "cloud": "aws", "ci": "github", "promote": "model", "inference": "realtime", "compute": "serverless_gpu"}
SOME = [DEFAULT, {**DEFAULT, "cloud": "azure", "ci": "azure_devops", "promote": "code", "inference": "batch", "compute": "ai_runtime"},
        {**DEFAULT, "pipeline": "model", "cloud": "gcp", "ci": "gitlab", "inference": "streaming", "compute": "classic"},
        {**DEFAULT, "cloud": "gcp", "promote": "code", "inference": "realtime", "compute": "classic"}]


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The repository that all defaults give."""
    return render(tmp_path_factory.mktemp("default") / "home-intents", DEFAULT)


@pytest.fixture
def copied(default, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(default, tmp_path / "home-intents")


@pytest.mark.parametrize("answers", SOME, ids=lambda one: "-".join(one.values()))
def test_some_combinations_hold_together_without_a_workspace(answers, tmp_path):
    """All of them: python benchmarks/scaffold.py."""
    assert {name: set(values) for name, values in CHOICES.items()}.keys() == answers.keys() and answers in combinations()
    assert check_repository(render(tmp_path / "repository", answers), answers) >= 6


def test_every_phase_is_a_task_however_many_there_are(default):
    names = [phase.name for phase in phases()]
    assert list(load_engagement(str(default / "engagement.yaml")).sections) == names
    job = read_bundle(default).tree["resources"]["jobs"]["train"]
    assert [task["task_key"] for task in job["tasks"]] == names
    assert all(task.get("depends_on", [{"task_key": None}])[0]["task_key"] == before for task, before in zip(job["tasks"], [None, *names]))
    for settings in ("short", "staging", "prod"):
        assert list(load_engagement(str(default / "engagement.yaml"), overrides_of(default / f"settings/{settings}.yaml")).sections) == names


def test_the_three_ci_systems_run_the_same_steps(tmp_path):
    found = [steps(render(tmp_path / ci, {**DEFAULT, "ci": ci}), ci) for ci in CHOICES["ci"]]
    assert found[0] == found[1] == found[2] and list(found[0]) == ["install", "secrets", "check", "unit", "data", "train", "gate"]


def test_its_documents_name_what_is_there(default):
    targets = set(re.findall(r"(?m)^(\w+):", (default / "Makefile").read_text()))
    for page in ("README.md", "docs/operate.md", "docs/decisions/0001-architecture.md"):
        text = (default / page).read_text()
        assert {one or other for one, other in re.findall(r"(?m)^make (\w+)|`make (\w+)`", text)} <= {*targets, "STEP"}, page
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((default / page).parent / link).exists(), f"{page} links to {link}"
        for name in re.findall(r"`((?:resources|settings|notebooks|scripts|keys|tests|docs|\.github)/[\w./-]*)`", text):
            assert (default / name).exists() or "NAME" in name, f"{page} names {name}"
    record = (default / "docs/decisions/0001-architecture.md").read_text()
    assert all(f"## {title}" in record for title in ("What makes the model: engagement", "Cloud: aws", "CI/CD: GitHub Actions", "Inference: realtime", "Compute: serverless_gpu"))


def test_what_the_comparison_with_mlops_stacks_says_is_shown_somewhere():
    text = (REPO / "docs/mlops_stacks.md").read_text()
    tests = "".join(path.read_text() for path in (REPO / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+|check_\w+)(?:\.\.\.)?", text):
        assert f"def {name}" in tests, name
    for path in re.findall(r"`((?:tests|benchmarks|finetune_accel)/[\w./]+)`", text) + re.findall(r"\]\(\.\./([^)]+)\)", text):
        assert (REPO / path).exists(), path
    rows = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|- ")]
    assert len(rows) > 35 and all(line.count("|") >= 3 for line in rows)


# --- what the checks find

SPOILT = {  # file: (what stands there, what is written instead, what is said)
    "a notebook": ("resources/train.yml", "../notebooks/run_phase.py", "../notebooks/run_fase.py", "run_fase.py is no file of the bundle"),
    "a notebook elsewhere": ("resources/train.yml", "../notebooks/run_phase.py", "../../other/x.py", "outside the bundle"),
    "a variable": ("resources/release.yml", "${var.release_key}", "${var.release_ky}", "the variable release_ky is not declared"),
    "a variable of one target": ("databricks.yml", "      catalog: prod\n", "", "catalog has no value in this target (prod)"),
    "a variable that nobody uses": ("databricks.yml", "  why:", "  reason: {default: x}\n  why:", "variables.reason: nothing uses it"),
    "an unknown variable in a target": ("databricks.yml", "      catalog: prod\n", "      catalog: prod\n      catlog: prod\n", "variables.catlog: is not declared"),
    "a variable of itself": ("databricks.yml", "      catalog: prod\n", "      catalog: ${var.schema}\n      schema: x${var.catalog}\n", "variables.catalog: is made of itself"),
    "an environment": ("resources/release.yml", "          environment_key: cpu", "          environment_key: cqu", "the job has no environment cqu"),
    "a task": ("resources/release.yml", "{task_key: promote}", "{task_key: promotion}", "there is no task promotion"),
    "a circle": ("resources/release.yml", "- task_key: promote\n", "- task_key: promote\n          depends_on: [{task_key: endpoint}]\n", "wait for each other"),
    "a resource": ("resources/governed.yml", "schema_name: ${resources.schemas.home.name}\n      name: runs", "schema_name: ${resources.schemas.hom.name}\n      name: runs",
                   "there is no resource schemas.hom"),
    "a phase": ("resources/train.yml", "              - plan\n", "              - plann\n", "--from plann: is not a phase of this engagement"),
    "an option of ours": ("resources/release.yml", "- --environment", "- --enviroment", "No such option: --enviroment"),
    "a file of a command": ("resources/train.yml", "engagement.yaml\n              - --from", "engagment.yaml\n              - --from", "engagment.yaml is no file of the bundle"),
    "a field": ("resources/train.yml", "max_concurrent_runs", "max_concurent_runs", "max_concurent_runs"),
    "a value": ("resources/governed.yml", "MANAGED", "MANGED", "MANGED"),
    "a kind": ("resources/governed.yml", "  volumes:", "  volums:", "volums is no kind of resource"),
    "the mode": ("databricks.yml", "  prod: # what was released and approved\n    mode: production", "  prod:\n    mode: development", "must be production"),
    "an endpoint": ("resources/governed.yml", "resources:", "resources:\n  model_serving_endpoints: {home: {name: home}}", "not there at the first deploy"),
    "an include": ("databricks.yml", "resources/*.yml", "resource/*.yml", "is no file"),
    "the form": ("resources/release.yml", "resources:", "resources: [", "is not YAML"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_name_that_names_nothing_is_found(copied, what):
    name, old, new, said = SPOILT[what]
    text = (copied / name).read_text()
    assert old in text, "the template has changed: mend the test"
    (copied / name).write_text(text.replace(old, new))
    with pytest.raises(BadInput) as refused:
        check_bundle(copied)
    assert said in str(refused.value), refused.value
    assert what == "a variable of itself" or "itself" not in str(refused.value), refused.value


def test_the_bundle_as_it_is_has_no_problem(default):
    assert bundle_problems(read_bundle(default)) == []


def test_a_secret_is_found_before_it_is_kept(copied):
    assert check_secrets(copied) > 20, "keys/release.pem, which git ignores, is no finding"
    run_tool("git", "add", "-A", cwd=copied)
    (copied / "settings/staging.yaml").write_text("# token dapi" + "0123456789abcdef" * 2 + "\n")
    with pytest.raises(BadInput, match=r"settings/staging.yaml:1: Databricks token"):
        check_secrets(copied)


def test_what_cannot_be_rendered_is_refused_whole(tmp_path, default):
    with pytest.raises(BadInput, match="is there already.*copier update"):
        scaffold(default, {}, defaults=True)
    for wrong, said in (("cloud=moon", "aws, azure, gcp"), ("naem=x", "did you mean `name`"), ("name", "answers no question")):
        with pytest.raises(BadInput, match=said):
            read_answers([wrong])
    with pytest.raises(BadInput, match="copier refuses an answer"):
        scaffold(tmp_path / "no", {"name": "Not A Name"}, defaults=True)
    assert not list(tmp_path.iterdir())


def test_runs_travel_and_decisions_are_never_written_over(tmp_path):
    """A result half given back is not seen: the file that names it comes last."""
    runs, volume = tmp_path / "runs", tmp_path / "volume"
    here, there = CarriedRuns(volume, runs), CarriedRuns(volume, tmp_path / "other")
    (runs / "mine/plan/k").mkdir(parents=True)
    (runs / "mine/plan/k/a.json").write_text("1")
    (runs / "mine/plan.json").write_text("{}")
    volume.mkdir()
    assert here.give_back() == 2
    written = sorted((path.stat().st_mtime_ns, path.name) for path in volume.rglob("*.json"))
    assert written[-1][1] == "plan.json" and there.fetch() == 2


# --- a later version of the template

def update(folder: Path, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "copier", "update", "--defaults", "--quiet", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_copier_update_keeps_what_the_customer_changed(tmp_path, monkeypatch):
    """Two tagged versions of the template in a repository of its own, as its users see this one."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    template, home = tmp_path / "template", tmp_path / "home"
    shutil.copytree(REPO / "finetune_accel/template", template / "finetune_accel/template")
    shutil.copy(REPO / "copier.yml", template)
    git("init", "-q", cwd=template)
    commit(template, "first")
    git("tag", "v0.1.0", cwd=template)
    render(home, DEFAULT)
    answers = home / ".copier-answers.yml"
    assert {"_commit": "v0.1.0"}.items() <= yaml.safe_load(answers.read_text()).items()
    answers.write_text(re.sub(r"_src_path: .*", f"_src_path: {template}", answers.read_text()))
    commit(home, "scaffold")

    engagement = home / "engagement.yaml"
    engagement.write_text(engagement.read_text().replace("at_least: 0.65", "at_least: 0.75"))
    (home / "resources/release.yml").write_text((home / "resources/release.yml").read_text().replace("timeout_seconds: 86400", "timeout_seconds: 7200"))
    (home / "tests/test_ours.py").write_text("def test_ours():\n    assert True\n")
    (home / "notebooks/monitor.py").unlink()
    commit(home, "ours")

    source = template / "finetune_accel/template/repo"
    for name, old, new in (("resources/release.yml.jinja", "max_concurrent_runs: 1", "max_concurrent_runs: 2"), ("engagement.yaml.jinja", "seed: 17", "seed: 18")):
        (source / name).write_text((source / name).read_text().replace(old, new))
    (source / "docs/new.md.jinja").write_text("[[ name ]] has a new page\n")
    commit(template, "second")
    git("tag", "v0.2.0", cwd=template)

    update(home)
    release, text = (home / "resources/release.yml").read_text(), engagement.read_text()
    assert "timeout_seconds: 7200" in release and "max_concurrent_runs: 2" in release, "theirs and ours, in one file"
    assert "at_least: 0.75" in text and "seed: 18" in text and "<<<<" not in text + release
    assert (home / "tests/test_ours.py").exists() and not (home / "notebooks/monitor.py").exists(), "what they added stays, what they took away stays away"
    assert (home / "docs/new.md").read_text() == "home-intents has a new page\n" and yaml.safe_load(answers.read_text())["_commit"] == "v0.2.0"
    commit(home, "updated")
    update(home, "--data", "ci=gitlab")
    assert (home / ".gitlab-ci.yml").exists() and "at_least: 0.75" in engagement.read_text()


def test_copier_copy_without_the_package_says_what_to_do(tmp_path):
    done = subprocess.run([sys.executable, "-m", "copier", "copy", "--defaults", "--quiet", str(REPO / "finetune_accel/template"), str(tmp_path / "x")],
                          capture_output=True, text=True)
    assert done.returncode and "finetune-accel scaffold DIR" in done.stderr
