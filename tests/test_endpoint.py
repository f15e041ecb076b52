"""Databricks Model Serving: what is logged and started there, and databricks-sdk against a local server that speaks the workspace's paths."""
from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import mlflow
import pytest
from databricks.bundles.model_serving_endpoints import AiGatewayConfig, EndpointCoreConfigInput, ModelServingEndpoint, ServingModelWorkloadType
from databricks.sdk.service import serving as sdk
from serving import HELLO, free_port, wait_until

from finetune_accel.core.endpoint import (
    NEXT_VERSION, TASK, WORKLOAD_TYPES, databricks_endpoint, deploy, endpoint_config, entrypoint, log_server, server_of_run)
from finetune_accel.core.errors import BadInput, PhaseFailed
from finetune_accel.core.generate import generate, load

MODEL, TOKEN = "main.default.home_intents_server", "dapi-of-this-test"
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

class Workspace(BaseHTTPRequestHandler):
    """The paths, bodies and errors of a workspace; a version has to come up in three looks, 13 cannot, 99 never does."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self) -> None:
        state, path = self.server.state, self.path.split("?")[0]
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        state["asked"].append((self.command, path, copy.deepcopy(body)))
        if not path.startswith("/api/"):
            return self.reply(404, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(403, {"error_code": "PERMISSION_DENIED", "message": "Invalid access token."})
        if found := re.fullmatch(r"/api/2.1/unity-catalog/models/([^/]+)/(versions|aliases)/([^/]+)", path):
            model, kind, which = found.groups()
            version = {"champion": 4}.get(which) if kind == "aliases" else int(which)
            if model != MODEL or not version:
                return self.reply(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"{model} {which} does not exist."})
            status = state["versions"].pop(0) if state["versions"] else "READY"
            return self.reply(200, {"full_name": model, "version": version, "status": status})
        name, _, part = path.removeprefix("/api/2.0/serving-endpoints").strip("/").partition("/")
        return self.endpoint(state["endpoints"], name or body.get("name"), part, body)

    do_GET = do_POST = do_PUT = do_PATCH = answer

    def endpoint(self, endpoints: dict, name: str, part: str, body: dict) -> None:
        try:  # Databricks' own definitions of what may be sent
            if self.command in ("POST", "PUT"):
                {"": ModelServingEndpoint, "config": EndpointCoreConfigInput, "ai-gateway": AiGatewayConfig}[part].from_dict(body)
        except Exception as error:
            return self.reply(400, {"error_code": "INVALID_PARAMETER_VALUE", "message": str(error)})
        if self.command == "POST":
            if name in endpoints:
                return self.reply(409, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": f"Endpoint {name} already exists."})
            endpoints[name] = {"name": name, "ai_gateway": body["ai_gateway"], "tags": body.get("tags", []), "state": {"ready": "NOT_READY"}}
        if name not in endpoints:
            return self.reply(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"Endpoint with name '{name}' does not exist."})
        endpoint = endpoints[name]
        if part == "ai-gateway":
            endpoint["ai_gateway"] = body
            return self.reply(200, body)
        if part == "tags":
            endpoint["tags"] = list({tag["key"]: tag for tag in endpoint["tags"] + body["add_tags"]}.values())
            return self.reply(200, {"tags": endpoint["tags"]})
        if self.command != "GET":
            if "pending_config" in endpoint:
                return self.reply(409, {"error_code": "RESOURCE_CONFLICT", "message": f"Endpoint {name} is currently being updated."})
            endpoint["pending_config"] = body if part else body["config"]
            endpoint["state"]["config_update"] = "IN_PROGRESS"
            self.server.state["looks"] = 0
        elif "pending_config" in endpoint:
            self.come_up(endpoint)
        return self.reply(200, endpoint)

    def come_up(self, endpoint: dict) -> None:
        self.server.state["looks"] += 1
        looks, (entity, *_) = self.server.state["looks"], endpoint["pending_config"]["served_entities"]
        entity["state"] = {"deployment": "DEPLOYMENT_CREATING", "deployment_state_message": "Loading the model" if looks > 1 else "Preparing"}
        if looks < 3 or entity["entity_version"] == "99":
            return
        if entity["entity_version"] == "13":
            entity["state"] = {"deployment": "DEPLOYMENT_FAILED", "deployment_state_message": "The entrypoint ended with 1"}
            endpoint["state"]["config_update"] = "UPDATE_FAILED"
            return
        entity["state"] = {"deployment": "DEPLOYMENT_READY", "deployment_state_message": ""}
        endpoint["config"] = {**endpoint.pop("pending_config"), "config_version": 1}
        endpoint["state"] = {"ready": "READY", "config_update": "NOT_UPDATING"}


@pytest.fixture
def workspace(monkeypatch, tmp_path):
    """A workspace, and `call(version, ...)`, which deploys to it and returns (outcome, what was told)."""
    for variable in [name for name in os.environ if name.startswith("DATABRICKS_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))  # no profile of a real workspace
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Workspace)
    listening.state = {"asked": [], "endpoints": {}, "versions": [], "looks": 0}
    threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
    listening.url = f"http://127.0.0.1:{listening.server_port}"

    def call(version, model=MODEL, token=TOKEN, host=listening.url, name="home-intents", wait=None, **options):
        told = []
        config = endpoint_config(name, model, version, **{**CONFIG, **options})
        return deploy(config, host, token, poll_seconds=0.01, tell=told.append, **(wait or {})), told

    listening.call = call
    listening.sent = lambda: [(command, path.split("home-intents")[-1]) for command, path, _ in listening.state["asked"] if command != "GET"]
    yield listening
    listening.shutdown()
    listening.server_close()


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
    with pytest.raises(PhaseFailed, match="the workspace failed"):
        workspace.call(3, host=f"http://127.0.0.1:{free_port()}")
