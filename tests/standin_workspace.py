"""A local stand-in for a Databricks workspace: the paths, bodies and errors of registry, endpoints, jobs, secrets and monitors as documented.

The client in the tests is databricks-sdk itself; what is sent is checked with Databricks' own definitions (databricks-bundles).
"""
from __future__ import annotations

import base64
import copy
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from databricks.bundles.model_serving_endpoints import AiGatewayConfig, EndpointCoreConfigInput, ModelServingEndpoint
from databricks.bundles.quality_monitors import QualityMonitor

MODEL, TOKEN, WHO = "main.default.home_intents_server", "dapi-of-this-test", "release@example.com"
FAULTS = {403: {"error_code": "PERMISSION_DENIED", "message": "User does not have permission to do this."},
          404: {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "It does not exist."},
          429: {"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "Too many requests."},
          500: {"error_code": "INTERNAL_ERROR", "message": "Something went wrong."}}


class Workspace(BaseHTTPRequestHandler):
    """The paths, bodies and errors of a workspace that we call. An endpoint's version has to come up in three looks, 13 cannot, 99 never does.

    `server.state` holds what is there; `faults` are {pattern of "GET /path": status or "silence"}, which come before everything else.
    """

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
        if fault := next((fault for pattern, fault in state["faults"].items() if re.fullmatch(pattern, f"{self.command} {path}")), None):
            return time.sleep(state["silence"]) if fault == "silence" else self.reply(fault, FAULTS[fault])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(403, {"error_code": "PERMISSION_DENIED", "message": "Invalid access token."})
        if found := re.fullmatch(r"/api/2.1/unity-catalog/models/([^/]+)/(versions|aliases)/([^/]+)", path):
            model, kind, which = found.groups()
            version = state["versions_of"](model, kind, which)
            if not version:
                return self.reply(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"{model} {which} does not exist."})
            status = state["versions"].pop(0) if state["versions"] else "READY"
            return self.reply(200, {"full_name": model, "version": version, "status": status})
        if not path.startswith("/api/2.0/serving-endpoints"):
            return self.elsewhere(state, path, body)
        if path == "/api/2.0/serving-endpoints" and self.command == "GET":
            return self.reply(200, {"endpoints": list(state["endpoints"].values())})
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

    def elsewhere(self, state: dict, path: str, body: dict) -> None:
        """Who asks, Unity Catalog, jobs, secrets, experiments and monitors."""
        if found := re.fullmatch(r"/api/2.1/unity-catalog/(catalogs|schemas)/(.+)", path):
            owner = state["owners"].get(found[2])
            return self.reply(200, {"name": found[2], "owner": owner}) if owner else self.missing(found[1].removesuffix("s").capitalize(), found[2])
        if found := re.fullmatch(r"/api/2.1/unity-catalog/effective-permissions/[A-Z]+/(.+)", path):
            who = parse_qs(urlsplit(self.path).query)["principal"][0]
            held = [{"privilege": one} for one in state["rights"].get(found[1], [])]
            return self.reply(200, {"privilege_assignments": [{"principal": who, "privileges": held}]})
        if found := re.fullmatch(r"/api/2.1/unity-catalog/tables/(.+)/monitor", path):
            if self.command == "GET" and found[1] not in state["monitors"]:
                return self.missing("Monitor of", found[1])
            if self.command != "GET":
                QualityMonitor.from_dict({"table_name": found[1], **state["monitors"].get(found[1], {}), **body})
                state["monitors"].setdefault(found[1], {}).update(body)
            return self.reply(200, {"table_name": found[1], "status": "MONITOR_STATUS_ACTIVE", "monitor_version": 1, **state["monitors"][found[1]]})
        plain = {"/api/2.0/preview/scim/v2/Me": {"userName": WHO, "id": "1"}, "/api/2.2/jobs/list": {"jobs": state["jobs"]},
                 "/api/2.0/secrets/scopes/list": {"scopes": []}, "/api/2.0/mlflow/experiments/list": {"experiments": []}}
        if path == "/api/2.0/secrets/get":
            scope, key = (parse_qs(urlsplit(self.path).query)[name][0] for name in ("scope", "key"))
            value = state["secrets"].get(f"{scope}/{key}")
            return self.reply(200, {"key": key, "value": base64.b64encode(value).decode()}) if value else self.missing("Secret", f"{scope}/{key}")
        return self.reply(200, plain[path]) if path in plain else self.missing("Path", path)

    def missing(self, kind: str, name: str) -> None:
        self.reply(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"{kind} '{name}' does not exist."})

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


def one_model(model: str, kind: str, which: str) -> int | None:
    """Return the version of MODEL: every number is one, champion is 4."""
    version = {"champion": 4}.get(which) if kind == "aliases" else int(which)
    return version if model == MODEL else None


@contextmanager
def standing_workspace(monkeypatch, home: Path) -> Iterator[ThreadingHTTPServer]:
    """Run a workspace at `url` meanwhile; no profile or token of a real one is seen."""
    for variable in [name for name in os.environ if name.startswith("DATABRICKS_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(home))
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Workspace)
    listening.daemon_threads = True
    listening.state = {"asked": [], "endpoints": {}, "versions": [], "looks": 0, "versions_of": one_model, "faults": {}, "silence": 2, "owners": {}, "rights": {},
                       "monitors": {}, "jobs": [], "secrets": {}}
    threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
    listening.url = f"http://127.0.0.1:{listening.server_port}"
    try:
        yield listening
    finally:
        listening.shutdown()
        listening.server_close()
