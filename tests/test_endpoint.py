"""Databricks Model Serving: what is logged and started there, and databricks-sdk against a local server that speaks the workspace's paths."""
from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import mlflow
import pytest
from databricks.bundles.model_serving_endpoints import ModelServingEndpoint, ServingModelWorkloadType
from databricks.sdk.service import serving as sdk
from serving import HELLO, free_port, wait_until
from standin_workspace import MODEL, TOKEN, standing_workspace

from finetune_accel.core import endpoint, stores
from finetune_accel.core.endpoint import NEXT_VERSION, TASK, WORKLOAD_TYPES, databricks_endpoint, deploy, endpoint_config, entrypoint, log_server, server_of_run
from finetune_accel.core.environments import open_office
from finetune_accel.core.errors import BadInput, PhaseFailed
from finetune_accel.core.generate import generate, load

CONFIG = dict(workload_type="GPU_MEDIUM", table="main.logs.home", calls_per_minute=600, tags={"team": "home"},
              environment={"HF_TOKEN": "{{secrets/home/hf}}"})


# --- the configuration

def test_databricks_own_tools_take_the_configuration():
    config = endpoint_config("home-intents", MODEL, NEXT_VERSION, **CONFIG)
    resource = ModelServingEndpoint.from_dict(config).as_dict()
    assert resource["config"] == config["config"] and resource["ai_gateway"] == config["ai_gateway"] and resource["tags"] == config["tags"]
    kept = endpoint_config("home-intents", MODEL, 3, **CONFIG)
    assert sdk.EndpointCoreConfigInput.from_dict(kept["config"]).as_dict() == kept["config"]
    assert sdk.AiGatewayConfig.from_dict(kept["ai_gateway"]).as_dict() == kept["ai_gateway"]
    with pytest.raises(Exception, match="(?i)unexpected|unknown"):  # they do check: a field that they do not know is refused
        ModelServingEndpoint.from_dict({**config, "alias": "champion"})


def test_the_types_of_workload_are_those_of_databricks():
    assert set(WORKLOAD_TYPES) == {kind.value for kind in ServingModelWorkloadType} == {kind.value for kind in sdk.ServingModelWorkloadType}


# --- the server in the container

@pytest.mark.slow
def test_the_entrypoint_answers_from_the_logged_artifacts(server, tmp_path, monkeypatch):
    """As the platform does: the command of the model's metadata, in its folder `artifacts`, asked without a token."""
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    try:
        uri = log_server(server.folders["tuned"], "home_intents", {"licence": "none"})
        registered = mlflow.register_model(uri, MODEL)
        logged = Path(mlflow.artifacts.download_artifacts(f"models:/{registered.name}/{registered.version}", dst_path=str(tmp_path / "container")))
        about = mlflow.models.Model.load(logged)
        assert about.metadata == {"licence": "none", "task": TASK, "entrypoint": entrypoint("home_intents")} and about.signature is not None
        with pytest.raises(NotImplementedError, match="entrypoint"):
            mlflow.pyfunc.load_model(str(logged)).unwrap_python_model().predict(None, None)
    finally:
        mlflow.set_tracking_uri(None)
    port, log = free_port(), tmp_path / "log"
    command = shlex.split(about.metadata["entrypoint"].replace("8080", str(port)))
    environment = {key: value for key, value in os.environ.items() if key != "FINETUNE_ACCEL_TOKEN"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=logged / "artifacts", env=environment, stdout=out, stderr=subprocess.STDOUT)

    def well() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(well, 120)
        model, tokenizer = load(server.folders["tuned"])
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["data"][0]["id"] == "home_intents"
        answer = httpx.post(f"http://127.0.0.1:{port}/invocations", json={"messages": HELLO, "max_tokens": 16}, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == generate(model, tokenizer, [HELLO], 16)[0].text
        assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 200
    finally:
        process.kill()
        process.wait()


def test_what_an_endpoint_cannot_serve_is_said_first(tmp_path, monkeypatch):
    settings = {"approach": "instruction", "name": "home-intents", "register_to": "main.default", "tracking_uri": None}
    trained = {"settings": settings, "base_model": {"source": "path:x", "licence": "none"}, "key": "k", "mlflow_run_id": "r"}
    (tmp_path / "train.json").write_text(json.dumps(trained))
    assert server_of_run(tmp_path, registering=False) == ("home-intents", MODEL, NEXT_VERSION)
    with pytest.raises(BadInput, match="workload type"):
        databricks_endpoint(str(tmp_path), deploying=True, workload_type="GPU")
    with pytest.raises(BadInput, match="no endpoint reads"):
        databricks_endpoint(str(tmp_path), deploying=True)
    settings["tracking_uri"] = "databricks"
    (tmp_path / "train.json").write_text(json.dumps(trained))
    with pytest.raises(BadInput, match="serverless"):
        databricks_endpoint(str(tmp_path), deploying=True)
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "client.5.1")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(BadInput, match="needs this package inside"):
        databricks_endpoint(str(tmp_path), deploying=True)
    with pytest.raises(BadInput, match="no version"):
        databricks_endpoint("models:/main.default.home")
    (tmp_path / "train.json").write_text(json.dumps({**trained, "settings": {**settings, "approach": "continued_pretraining"}}))
    with pytest.raises(BadInput, match="chat"):
        databricks_endpoint(str(tmp_path))


# --- the workspace

@pytest.fixture
def workspace(monkeypatch, tmp_path):
    """A workspace, and `call(version, ...)`, which deploys to it and returns (outcome, what was told)."""
    with standing_workspace(monkeypatch, tmp_path) as listening:
        def call(version, model=MODEL, token=TOKEN, host=listening.url, name="home-intents", wait=None, **options):
            told = []
            config = endpoint_config(name, model, version, **{**CONFIG, **options})
            return deploy(config, host, token, poll_seconds=0.01, tell=told.append, **(wait or {})), told

        listening.call = call
        listening.sent = lambda: [(command, path.split("home-intents")[-1]) for command, path, _ in listening.state["asked"] if command != "GET"]
        yield listening


def test_an_endpoint_is_created_and_waited_for(workspace):
    outcome, told = workspace.call(3)
    assert outcome["ready"] == "READY" and outcome["url"] == f"{workspace.url}/serving-endpoints/home-intents/invocations"
    assert "does not exist yet" in told[0] and any("entity_version: nothing -> 3" in line for line in told)
    assert [line.partition(" s  ")[2] for line in told if " s  " in line] == [
        f"NOT_READY IN_PROGRESS DEPLOYMENT_CREATING {news}" for news in ("Preparing", "Loading the model")]
    (body,) = [body for command, _, body in workspace.state["asked"] if command == "POST"]
    assert body == endpoint_config("home-intents", MODEL, 3, **CONFIG)


def test_only_what_differs_is_sent(workspace):
    workspace.call(3)
    endpoint = workspace.state["endpoints"]["home-intents"]
    endpoint["ai_gateway"]["guardrails"] = {"input": {"safety": True}}
    endpoint["tags"].append({"key": "cost", "value": "42"})
    workspace.state["asked"].clear()
    outcome, told = workspace.call(3)
    assert workspace.sent() == [] and outcome["changes"] == {} and outcome["ready"] == "READY" and "needs no change" in told[0]
    outcome, _ = workspace.call(4)
    assert workspace.sent() == [("PUT", "/config")] and outcome["changes"] == {"config.served_entities.home_intents_server.entity_version": "3 -> 4"}
    workspace.state["asked"].clear()
    workspace.call(4, calls_per_minute=60, tags={"team": "garden"})
    assert workspace.sent() == [("PUT", "/ai-gateway"), ("PATCH", "/tags")]
    assert endpoint["ai_gateway"]["guardrails"] == {"input": {"safety": True}} and endpoint["ai_gateway"]["rate_limits"][0]["calls"] == 60
    assert {tag["key"]: tag["value"] for tag in endpoint["tags"]} == {"team": "garden", "cost": "42"}


def test_a_dry_run_changes_nothing(workspace):
    outcome, told = workspace.call(3, wait={"dry_run": True})
    assert workspace.sent() == [] and workspace.state["endpoints"] == {} and "ready" not in outcome
    workspace.call(3)
    workspace.state["asked"].clear()
    outcome, told = workspace.call(4, workload_type="GPU_LARGE", environment={}, wait={"dry_run": True})
    assert workspace.sent() == [] and told[1:] == [f"  config.served_entities.home_intents_server.{line}" for line in (
        "entity_version: 3 -> 4", "workload_type: GPU_MEDIUM -> GPU_LARGE", "environment_vars.HF_TOKEN: {{secrets/home/hf}} -> nothing")]


def test_a_version_that_does_not_start_leaves_the_old_one(workspace):
    workspace.call(3)
    with pytest.raises(PhaseFailed, match="UPDATE_FAILED.*entrypoint ended with 1.*serves what it served before"):
        workspace.call(13)
    assert workspace.state["endpoints"]["home-intents"]["config"]["served_entities"][0]["entity_version"] == "3"


def test_time_runs_out_and_the_same_command_goes_on(workspace):
    with pytest.raises(PhaseFailed, match="not ready after .*waits again"):
        workspace.call(99, wait={"seconds": 0.3})
    with pytest.raises(PhaseFailed, match="currently being updated"):
        workspace.call(3)
    workspace.state["endpoints"]["home-intents"]["pending_config"]["served_entities"][0]["entity_version"] = "98"
    workspace.state["asked"].clear()
    outcome, _ = workspace.call(98)
    assert outcome["ready"] == "READY" and workspace.sent() == []


def test_a_version_is_looked_at_before_it_is_deployed(workspace):
    workspace.state["versions"] = ["PENDING_REGISTRATION", "PENDING_REGISTRATION"]
    outcome, told = workspace.call(3)
    assert outcome["ready"] == "READY" and any("PENDING_REGISTRATION" in line for line in told)
    workspace.state["versions"] = ["FAILED_REGISTRATION"]
    with pytest.raises(BadInput, match="not registered to its end"):
        workspace.call(4)
    workspace.state["asked"].clear()
    with pytest.raises(BadInput, match="main.default.other/3.*not in the Unity Catalog"):
        workspace.call(3, model="main.default.other")
    assert workspace.sent() == []


def test_an_alias_is_the_version_behind_it_now(workspace):
    outcome = databricks_endpoint(f"models:/{MODEL}@champion", dry_run=True, host=workspace.url, token=TOKEN, tell=lambda line: None)
    assert outcome["config"]["config"]["served_entities"][0]["entity_version"] == "4" and outcome["config"]["name"] == "home-intents"
    with pytest.raises(BadInput, match="does not exist"):
        databricks_endpoint(f"models:/{MODEL}@challenger", host=workspace.url, token=TOKEN)


def test_what_a_workspace_refuses_is_said_in_its_words(workspace, monkeypatch):
    with pytest.raises(BadInput, match="Invalid access token"):
        workspace.call(3, token="wrong")
    with pytest.raises(BadInput, match="DATABRICKS_HOST"):
        workspace.call(3, host=None, token=None)
    monkeypatch.setattr("finetune_accel.core.endpoint.RETRY_SECONDS", 1)
    with pytest.raises(PhaseFailed, match="did not answer for 1 s. Check DATABRICKS_HOST"):
        workspace.call(3, host=f"http://127.0.0.1:{free_port()}")


# --- the champion of an environment

@pytest.mark.slow
def test_a_champion_gets_one_server_and_the_endpoint_follows_it(finished, workspace, tmp_path, monkeypatch):
    """Registered once, by the version that it serves; only the packing of the environment, which needs Databricks' serverless compute, is left out."""
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    run, store = tmp_path / "runs/mine", f"sqlite:///{tmp_path / 'runs/mlflow.db'}"
    monkeypatch.setenv("DATABRICKS_HOST", workspace.url)
    monkeypatch.setenv("DATABRICKS_TOKEN", TOKEN)
    with pytest.raises(BadInput, match="stands for nothing in dev, so there is nothing to serve yet"):
        databricks_endpoint(str(run), environment="dev", deploying=True)
    office = open_office(run)
    place = office.place("dev")
    stores.set_alias(place.uri, place.model, "champion", stores.alias_version(place.uri, place.model, "candidate"))
    with pytest.raises(BadInput, match="serverless"):
        databricks_endpoint(str(run), environment="dev", deploying=True)

    def unpacked(folder, registered, run_id, metadata):
        with mlflow.start_run(run_id=run_id):
            return int(mlflow.register_model(log_server(folder, registered.split(".")[-1], metadata), f"{registered}_server").version)

    monkeypatch.setattr(endpoint, "require_packable", lambda: None)
    monkeypatch.setattr(endpoint, "register_server", unpacked)
    monkeypatch.setitem(endpoint.deploy.__kwdefaults__, "poll_seconds", 0.01)
    workspace.state["versions_of"] = lambda model, kind, which: int(which) if model == f"{place.model}_server" else None
    assert databricks_endpoint(str(run), environment="dev")["config"]["config"]["served_entities"][0]["entity_version"] == NEXT_VERSION
    first = databricks_endpoint(str(run), "home-intents", environment="dev", deploying=True, tell=lambda line: None)
    entity = first["config"]["config"]["served_entities"][0]
    assert (entity["entity_name"], entity["entity_version"], first["ready"]) == (f"{place.model}_server", "1", "READY") and workspace.sent() == [("POST", "/api/2.0/serving-endpoints")]
    databricks_endpoint(str(run), "home-intents", environment="dev", deploying=True, tell=lambda line: None)
    assert workspace.sent() == [("POST", "/api/2.0/serving-endpoints")], "the same champion is not registered and not sent again"
    assert stores.alias_version(store, f"{place.model}_server", "of-1") == "1"
