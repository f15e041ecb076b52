"""Before a first deploy: what a workspace answers, and what a person reads, against databricks-sdk and a local stand-in of the workspace's paths."""
from __future__ import annotations

import re
import time

import pytest
from databricks.bundles.quality_monitors import QualityMonitor
from databricks.sdk.clock import RealClock
from standin_workspace import MODEL, TOKEN, WHO, standing_workspace
from typer.testing import CliRunner

from finetune_accel.core import endpoint
from finetune_accel.core.cli import app
from finetune_accel.core.errors import BadInput, FinetuneAccelError, PhaseFailed
from finetune_accel.core.job import signing_key
from finetune_accel.core.quality_monitor import SHARES, keep_monitor, monitor_definition, unpack_sql
from finetune_accel.core.signing import own_key
from finetune_accel.core.workspace import NEEDED_ON_CATALOG, NEEDED_ON_SCHEMA, examine_workspace

PLACE, UNPACKED = "staging.home_intents", "staging.home_intents.home_unpacked"


@pytest.fixture
def workspace(monkeypatch, tmp_path):
    """A workspace in which all is well; the client is soon out of patience."""
    monkeypatch.setattr(endpoint, "RETRY_SECONDS", 1)
    monkeypatch.setattr(endpoint, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(RealClock, "sleep", lambda self, seconds: time.sleep(0.1))  # of databricks-sdk, between two attempts
    with standing_workspace(monkeypatch, tmp_path) as listening:
        listening.state["owners"] = {"staging": "admin@example.com", PLACE: "admin@example.com"}
        listening.state["rights"] = {"staging": list(NEEDED_ON_CATALOG), PLACE: list(NEEDED_ON_SCHEMA)}
        monkeypatch.setenv("DATABRICKS_HOST", listening.url)
        monkeypatch.setenv("DATABRICKS_TOKEN", TOKEN)
        yield listening


def found(workspace) -> dict[str, str]:
    """Return {question: answer}, the refused ones with `no: ` before them."""
    return {one.what: one.found if one.ok else f"no: {one.found}" for one in examine_workspace(PLACE)}


def test_all_is_well(workspace):
    answers = found(workspace)
    assert not [one for one in answers.values() if one.startswith("no")], answers
    assert answers["sign in"] == f"{WHO} at {workspace.url}" and len(answers) == 7
    assert {command for command, *_ in workspace.state["asked"]} == {"GET"}, "nothing is changed"
    done = CliRunner().invoke(app, ["doctor", "--workspace", PLACE])
    assert done.exit_code == 0 and "serving endpoints" in done.output


def test_a_schema_that_is_not_there_is_no_fault_and_an_owner_needs_no_grant(workspace):
    del workspace.state["owners"][PLACE]
    workspace.state["owners"]["staging"], workspace.state["rights"] = WHO, {}
    answers = found(workspace)
    assert "the first deploy makes it" in answers[f"schema {PLACE}"] and not answers["catalog staging"].startswith("no")


def test_what_is_missing_is_said_as_the_statement_to_run(workspace):
    workspace.state["rights"] = {"staging": ["USE_CATALOG"], PLACE: ["USE_SCHEMA", "CREATE_TABLE"]}
    answers = found(workspace)
    assert answers["catalog staging"] == f"no: {WHO} lacks CREATE_SCHEMA. Fix: let its owner admin@example.com run: GRANT CREATE SCHEMA ON CATALOG staging TO `{WHO}`."
    assert f"GRANT CREATE MODEL, CREATE VOLUME ON SCHEMA {PLACE} TO `{WHO}`" in answers[f"schema {PLACE}"]
    done = CliRunner().invoke(app, ["doctor", "--workspace", PLACE])
    assert done.exit_code == 1


CALLS = {"sign in": "/api/2.0/preview/scim/v2/Me", "catalog staging": "/api/2.1/unity-catalog/catalogs/staging", f"schema {PLACE}": f"/api/2.1/unity-catalog/schemas/{PLACE}",
         "jobs": "/api/2.2/jobs/list", "serving endpoints": "/api/2.0/serving-endpoints", "secret scopes": "/api/2.0/secrets/scopes/list",
         "experiments": "/api/2.0/mlflow/experiments/list"}
SAID = {403: "does not allow it.*what its owner may do", 404: "does not exist", 429: r"too much at once \(429\).*Wait a few minutes",
        500: "workspace failed|Something went wrong", "silence": "did not answer for 1 s. Check DATABRICKS_HOST"}


@pytest.mark.parametrize("fault", [403, 404, 429, 500, "silence"])
def test_each_answer_of_a_workspace_is_a_message_to_act_on(workspace, fault):
    """Calls refused at once (those that are tried again for a second, two of them): none hides another, and each says what to do."""
    refused = [what for what in CALLS if what != "sign in"] if fault in (403, 404, 500) else ["jobs", "serving endpoints"]
    workspace.state["faults"] = {f"GET {re.escape(CALLS[what])}": fault for what in refused}
    for what, answer in found(workspace).items():
        if what not in refused or (fault == 404 and what.startswith("schema")):
            assert not answer.startswith("no"), answer
        else:
            assert re.search(SAID[fault], answer) and answer.startswith("no: ") and "Traceback" not in answer, (what, answer)


@pytest.mark.parametrize("fault", [403, "silence"])
def test_who_cannot_sign_in_is_told_only_that(workspace, fault):
    workspace.state["faults"] = {"GET .*Me": fault}
    (answer,) = examine_workspace(PLACE)
    assert not answer.ok and re.search(SAID[fault], answer.found)


CHAMPION = dict(name="home-intents", model=MODEL, version=3)


LOOK, MAKE, VERSION = "GET /api/2.0/serving-endpoints/home-intents", "POST /api/2.0/serving-endpoints", "GET .*/models/.*"


@pytest.mark.parametrize("path, fault, kind", [  # 404 to LOOK is no fault: so answers an endpoint that does not exist yet
    (LOOK, 403, BadInput), (LOOK, 500, PhaseFailed), (LOOK, "silence", PhaseFailed), (MAKE, 403, BadInput), (MAKE, 404, BadInput), (MAKE, 429, PhaseFailed),
    (MAKE, 500, PhaseFailed), (VERSION, 403, BadInput), (VERSION, 404, BadInput), (VERSION, 429, PhaseFailed)])
def test_a_deploy_ends_with_the_same_messages(workspace, path, fault, kind):
    workspace.state["faults"] = {path: fault}
    config = endpoint.endpoint_config(**CHAMPION)
    with pytest.raises(FinetuneAccelError) as refused:
        endpoint.deploy(config, workspace.url, TOKEN, poll_seconds=0.01, tell=lambda line: None)
    assert type(refused.value) is kind and re.search(f"{SAID[fault]}|is not in the Unity Catalog", str(refused.value)), refused.value


def test_the_key_of_a_job_is_a_secret_of_the_workspace(workspace, tmp_path):
    release = own_key(tmp_path / "release.pem")
    workspace.state["secrets"]["home-intents/release-key"] = (tmp_path / "release.pem").read_bytes()
    with signing_key("secret:home-intents/release-key"):
        assert own_key().fingerprint == release.fingerprint
    for source, said in (("secret:home-intents/other", "does not exist"), (str(tmp_path / "none.pem"), "is no file")):
        with pytest.raises(BadInput, match=said):
            with signing_key(source):
                pass


def test_the_quality_monitor_is_made_once_and_kept(workspace):
    assert [keep_monitor(UNPACKED), keep_monitor(UNPACKED)] == ["made", "kept"]
    assert [command for command, path, _ in workspace.state["asked"] if path.endswith("/monitor")] == ["GET", "POST", "GET", "PUT"]
    wanted = monitor_definition(UNPACKED, ["1 hour", "1 day"], SHARES)
    assert {**workspace.state["monitors"][UNPACKED], "table_name": UNPACKED} == wanted, "each part of the definition arrived"
    workspace.state["faults"] = {"POST .*/monitor": 403}
    with pytest.raises(BadInput, match="does not allow it"):
        keep_monitor("staging.home_intents.other")


def test_databricks_takes_the_definition_and_would_refuse_an_unknown_key():
    made = monitor_definition(UNPACKED, ["1 day"], ["error"])
    known = QualityMonitor.from_dict(made)
    assert known.time_series.granularities == ["1 day"] and known.custom_metrics[0].name == "share_error"
    with pytest.raises(Exception, match="nonsense"):
        QualityMonitor.from_dict({**made, "nonsense": 1})
    for table, window in (("home", "1 day"), ("a.b.c", "1 minute")):
        with pytest.raises(BadInput):
            monitor_definition(table, [window], [])


def test_both_unpacked_tables_have_the_columns_that_the_monitor_reads():
    import sqlglot

    from finetune_accel.core.watched import language_columns
    from finetune_accel.core.window_counts import unpacked_schema

    (statement,) = sqlglot.parse(unpack_sql("a.b.home_payload", UNPACKED), dialect="databricks")
    of_sql = {column.alias_or_name for select in statement.find_all(sqlglot.exp.Select) for column in select.expressions}
    made = monitor_definition(UNPACKED, ["1 day"], SHARES)
    read = {made["time_series"]["timestamp_col"], *made["slicing_exprs"], *(column for one in made["custom_metrics"] for column in one["input_columns"])}
    assert read <= of_sql and read <= set(unpacked_schema(language_columns([])).names)
