"""Unmodified clients against the server: each gets the answers that evaluate generates, streams, and its own kind of error."""
from __future__ import annotations

import asyncio

import openai
import pytest
from serving import HELLO, TOKEN, wait_until

from finetune_accel.core.generate import generate, load

TOO_LONG = [{"role": "user", "content": "lights " * 3000}]
TOOL = {"type": "function", "function": {"name": "switch", "description": "a switch", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def expected(server):
    model, tokenizer = load(server.folders["tuned"])
    return generate(model, tokenizer, [HELLO], 16)[0].text


class OpenAI:
    """The openai package, on /v1."""

    wrong_token, bad_request, missing = openai.AuthenticationError, openai.BadRequestError, openai.NotFoundError
    path = "/v1"

    def __init__(self, server, token=TOKEN):
        self.client = openai.OpenAI(base_url=f"{server.url}{self.path}", api_key=token, max_retries=0)

    def ask(self, messages=HELLO, model="tuned", **more):
        return self.client.chat.completions.create(model=model, messages=messages, max_tokens=16, **more).choices[0].message.content

    def stream(self):
        pieces = self.client.chat.completions.create(model="tuned", messages=HELLO, max_tokens=16, stream=True)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)

    def abandon(self):
        stream = self.client.chat.completions.create(model="tuned", messages=HELLO, max_tokens=900, stream=True)
        next(iter(stream))
        stream.close()


class OpenAIOnDatabricks(OpenAI):
    """The openai package, on the path that Databricks gives it."""

    path = "/serving-endpoints"


class Databricks:
    """databricks-sdk's WorkspaceClient."""

    def __init__(self, server, token=TOKEN):
        from databricks.sdk import WorkspaceClient, errors
        from databricks.sdk.service.serving import ChatMessage, ChatMessageRole

        self.wrong_token, self.bad_request, self.missing = errors.Unauthenticated, errors.InvalidParameterValue, errors.ResourceDoesNotExist
        self.turn = lambda turn: ChatMessage(content=turn["content"], role=ChatMessageRole(turn["role"]))
        self.workspace = WorkspaceClient(host=server.url, token=token, auth_type="pat")

    def ask(self, messages=HELLO, model="tuned", **more):
        turns = [self.turn(turn) for turn in messages]
        extra = {"extra_params": more} if more else {}
        return self.workspace.serving_endpoints.query(name=model, messages=turns, max_tokens=16, **extra).choices[0].message.content

    def stream(self):
        client = self.workspace.serving_endpoints.get_open_ai_client()
        pieces = client.chat.completions.create(model="tuned", messages=HELLO, max_tokens=16, stream=True)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)

    def abandon(self):
        stream = self.workspace.serving_endpoints.get_open_ai_client().chat.completions.create(model="tuned", messages=HELLO, max_tokens=900, stream=True)
        next(iter(stream))
        stream.close()


class MLflow:
    """mlflow.deployments, as on Databricks."""

    def __init__(self, server, token=TOKEN):
        from mlflow.deployments import get_deploy_client
        from mlflow.exceptions import MlflowException
        from requests import HTTPError

        self.wrong_token = self.bad_request = self.missing = (HTTPError, MlflowException)
        self.environment = {"DATABRICKS_HOST": server.url, "DATABRICKS_TOKEN": token}
        self.client = get_deploy_client("databricks")

    def ask(self, messages=HELLO, model="tuned", **more):
        return self.client.predict(endpoint=model, inputs={"messages": messages, "max_tokens": 16, **more})["choices"][0]["message"]["content"]

    def stream(self):
        pieces = self.client.predict_stream(endpoint="tuned", inputs={"messages": HELLO, "max_tokens": 16})
        return "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"])

    def abandon(self):
        stream = self.client.predict_stream(endpoint="tuned", inputs={"messages": HELLO, "max_tokens": 900})
        next(iter(stream))
        stream.close()


class LangChain:
    """langchain-openai's ChatOpenAI."""

    wrong_token, bad_request, missing = openai.AuthenticationError, openai.BadRequestError, openai.NotFoundError

    def __init__(self, server, token=TOKEN):
        from langchain_openai import ChatOpenAI

        self.make = lambda model, **more: ChatOpenAI(base_url=f"{server.url}/v1", api_key=token, model=model, max_retries=0, temperature=0, **more)

    def ask(self, messages=HELLO, model="tuned", tools=None, **more):
        chat = self.make(model, max_tokens=16, **more)
        return (chat.bind_tools(tools) if tools else chat).invoke([(turn["role"], turn["content"]) for turn in messages]).content

    def stream(self):
        return "".join(piece.content for piece in self.make("tuned", max_tokens=16).stream([("user", HELLO[0]["content"])]))

    def abandon(self):
        stream = self.make("tuned", max_tokens=900).stream([("user", HELLO[0]["content"])])
        next(stream)
        stream.close()


@pytest.fixture(params=[OpenAI, OpenAIOnDatabricks, Databricks, MLflow, LangChain], ids=lambda kind: kind.__name__)
def kind(request, server, monkeypatch):
    monkeypatch.setenv("DATABRICKS_HOST", server.url)
    monkeypatch.setenv("DATABRICKS_TOKEN", TOKEN)
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_DEPLOYMENT_PREDICT_TIMEOUT", "10")
    return request.param


def test_a_client_asks_streams_is_refused_and_leaves(kind, server, expected, monkeypatch):
    client = kind(server)
    assert client.ask() == expected and client.stream() == expected
    assert client.ask(model="base") != expected
    with pytest.raises(client.bad_request, match="tools"):
        client.ask(tools=[TOOL])
    with pytest.raises(client.bad_request, match="context"):
        client.ask(messages=TOO_LONG)
    with pytest.raises(client.missing, match="other"):
        client.ask(model="other")
    client.abandon()
    wait_until(lambda: not server.writing(), 5)
    monkeypatch.setenv("DATABRICKS_TOKEN", "wrong")
    stranger = kind(server, token="wrong")
    with pytest.raises(stranger.wrong_token, match="(?i)token|401|unauthorized"):
        stranger.ask()


def test_databricks_clients_see_endpoints(server, monkeypatch):
    from databricks.sdk import WorkspaceClient
    from mlflow.deployments import get_deploy_client

    monkeypatch.setenv("DATABRICKS_HOST", server.url)
    monkeypatch.setenv("DATABRICKS_TOKEN", TOKEN)
    workspace = WorkspaceClient(host=server.url, token=TOKEN, auth_type="pat")
    assert [endpoint.name for endpoint in workspace.serving_endpoints.list()] == ["tuned", "base"]
    endpoint = workspace.serving_endpoints.get("base")
    assert endpoint.state.ready.value == "READY" and endpoint.config.served_entities[0].entity_name == "base"
    deployments = get_deploy_client("databricks")
    assert [one["name"] for one in deployments.list_endpoints()] == ["tuned", "base"] and deployments.get_endpoint("tuned")["task"] == "llm/v1/chat"


def test_openai_lists_models_and_cancels_many_at_once(server, expected):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0)
    assert [model.id for model in client.models.list()] == ["tuned", "base"] and client.models.retrieve("base").id == "base"
    assert client.completions.create(model="tuned", prompt="turn on", max_tokens=4).choices[0].text

    async def leave_some():
        asked = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0)
        streams = [await asked.chat.completions.create(model="tuned", messages=HELLO, max_tokens=900, stream=True) for _ in range(8)]
        for stream in streams:
            await anext(aiter(stream))
            await stream.close()
        answer = await asked.chat.completions.create(model="tuned", messages=HELLO, max_tokens=16)
        return answer.choices[0].message.content

    assert asyncio.run(leave_some()) == expected
    wait_until(lambda: not server.writing(), 5)


def test_langchain_gets_structured_output(server):
    from langchain_openai import ChatOpenAI

    schema = {"title": "command", "type": "object", "properties": {"intent": {"type": "string", "enum": ["on", "off"]}}, "required": ["intent"],
              "additionalProperties": False}
    chat = ChatOpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, model="tuned", max_retries=0, max_tokens=100)
    assert chat.with_structured_output(schema, method="json_schema").invoke("turn on the lights")["intent"] in ("on", "off")
