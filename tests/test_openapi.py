"""schemathesis holds the server against its own OpenAPI document: no failure of the server, and no answer that the document does not announce."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import httpx
import pytest
from serving import HELLO, TOKEN

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
POSTS = ("/v1/chat/completions", "/v1/completions", "/invocations", "/serving-endpoints/chat/completions", "/serving-endpoints/completions",
         "/serving-endpoints/{name}/invocations")


@pytest.fixture(scope="module")
def document(server):
    return httpx.get(f"{server.url}/openapi.json", headers=server.headers).json()


def examine(server, phases: str, examples: int, folder) -> str:
    """Let schemathesis ask every operation with valid and invalid data; return what it printed. It must have found nothing."""
    (folder / "schemathesis.toml").write_text('[parameters]\n"path.name" = ["tuned", "base", "nobody"]\n')  # models, one of them unknown
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}", "--mode", "all",
               "--phases", phases, "--max-examples", str(examples), "--seed", "17", "--workers", "2", "--continue-on-failure", "--no-shrink",
               "--suppress-health-check", "all", "--checks", CHECKS]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=600, check=False, env={**os.environ, "COLUMNS": "160"})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def operations(document: dict) -> int:
    """Return how many operations a document has."""
    return sum(len(methods) for methods in document["paths"].values())


def test_the_server_keeps_to_its_own_description(server, document, tmp_path):
    printed = examine(server, "fuzzing", 3, tmp_path)
    count = operations(document)
    assert re.search(rf"Selected: {count}/{count}\s+Tested: {count}\b", printed), printed  # none was left out
    with server.client() as client:
        assert client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2}).status_code == 200


@pytest.mark.slow
def test_the_server_keeps_to_its_own_description_in_many_examples(server, tmp_path):
    examine(server, "coverage,fuzzing", 60, tmp_path)


@pytest.mark.parametrize("path", POSTS)
def test_streams_and_errors_stand_in_the_document(path, server, document):
    """Where a body says stream, the answer is text/event-stream; both it and each refusal are announced."""
    responses = document["paths"][path]["post"]["responses"]
    body = {"max_tokens": 2, **({"prompt": "lights"} if path.endswith("completions") and "chat" not in path else {"messages": HELLO})}
    with server.client() as client:
        asked = path.replace("{name}", server.name)
        kinds = {client.post(asked, json={**body, "stream": stream}).headers["content-type"].split(";")[0] for stream in (False, True)}
        refused = client.post(asked, json={**body, "tools": []})
    assert kinds == set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    shape = responses[str(refused.status_code)]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    assert set(refused.json()) == set(document["components"]["schemas"][shape]["properties"])


def test_every_reference_in_the_document_leads_somewhere(document):
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert named == set(document["components"]["schemas"]), "a schema is missing, or nothing uses it"
