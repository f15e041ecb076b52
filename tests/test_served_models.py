"""A server's models: aliases of a real registry that move under load, versions that cannot be served, registries that do not answer."""
import asyncio
import gc
import logging
import threading
import weakref
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from peft import LoraConfig, get_peft_model
from tiny import tiny_model

from finetune_accel.core import generate
from finetune_accel.core.errors import BadInput
from finetune_accel.core.live import Ask
from finetune_accel.core.registry import register_model
from finetune_accel.core.runs import PhaseRun, RunFolder
from finetune_accel.core.served_models import Models, load_models, measured_engine
from finetune_accel.core.settings import PhaseSettings
from finetune_accel.core.sources import tree_digest
from finetune_accel.core.targets import resolve_target
from finetune_accel.core.tracking import Tracker

NAME, TEXTS = "main.default.lights", ["lights on", "lights off", "what time is it", "Hello"]
ALIAS = f"models:/{NAME}@champion"
PROMPTS = [f"{'lights ' * (1 + i % 3)}{['on', 'off', 'time', 'it'][i % 4]}" for i in range(16)]
TOKENS = 12


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A sqlite registry: versions 1 and 2 are models that answer differently, of 3 half the weights are missing, 4 knows too few tokens."""
    root = tmp_path_factory.mktemp("registry")
    (root / "09_demo.ipynb").write_text('{"cells": []}')
    folders = [tiny_model(root / f"seed{seed}", TEXTS, seed=seed) for seed in (1, 2, 3, 4)]
    small = generate.load_plain(folders[3], "float32")[0]
    small.resize_token_embeddings(8)
    small.save_pretrained(folders[3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_ACCEL_CACHE", str(root / "cache"))
        run = PhaseRun(PhaseSettings(run_dir=str(root / "runs/lights")), "train", root / "09_demo.ipynb", (), tracker=Tracker)
        lineage = {"base_model": "path:tiny", "base_digest": "0", "licence": "Apache-2.0", "method": "full"}
        for folder in folders:
            assert register_model(run.tracker, folder, NAME, lineage, "continued_pretraining", "lights on"), run.tracker.problems
        run.finish({})
        (weights,) = [path for path in (root / "runs").rglob("model.safetensors") if tree_digest(path) == tree_digest(folders[2] / path.name)]
        with open(weights, "r+b") as file:
            file.truncate(weights.stat().st_size // 2)
        yield SimpleNamespace(client=MlflowClient(), folders=folders, uri=mlflow.get_tracking_uri())
    mlflow.set_tracking_uri(None)


def move(registry, version: int) -> None:
    registry.client.set_registered_model_alias(NAME, "champion", str(version))


@pytest.fixture(scope="module")
def expected(registry):
    """{version: {prompt: greedy answer}} of the two whole models, one prompt at a time."""
    def answers(folder):
        model, tokenizer = generate.load(folder)
        return {prompt: generate.generate(model, tokenizer, [prompt], TOKENS)[0].text for prompt in PROMPTS}

    found = {str(number): answers(registry.folders[number - 1]) for number in (1, 2)}
    assert all(found["1"][prompt] != found["2"][prompt] for prompt in PROMPTS)
    return found


@asynccontextmanager
async def following(models: Models):
    task = asyncio.create_task(models.follow())
    try:
        yield
    finally:
        assert not task.done(), task
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def ask(models: Models, prompt: str, name: str | None = None) -> tuple[str, str]:
    """Return (version, whole answer)."""
    with models.lease(name) as served:
        ids = served.worker.engine.tokenizer.encode(prompt)
        (stream,) = served.worker.start([Ask(ids, TOKENS, adapter=served.adapter)])
    return served.version, "".join([piece.text async for piece in stream])


async def until(condition, seconds: float = 120) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("engine ")}


def load_alias(seconds: float = 0.1, **more) -> Models:
    models = load_models(ALIAS, "reference", **more)
    models.follow_seconds = seconds
    return models


def test_an_alias_moves_under_load(registry, expected):
    move(registry, 1)
    models, seen = load_alias(), []

    async def client(prompt: str, stop: asyncio.Event) -> None:
        while not stop.is_set():
            version, text = await ask(models, prompt)
            seen.append((version, prompt, text))

    async def under_load() -> None:
        stop, versions = asyncio.Event(), lambda: [version for version, _, _ in seen]
        clients = [asyncio.create_task(client(prompt, stop)) for prompt in PROMPTS]
        async with following(models):
            await until(lambda: len(seen) > 32)
            move(registry, 2)
            await until(lambda: versions().count("2") > 32 or any(task.done() for task in clients))
            stop.set()
            await asyncio.gather(*clients)
            await until(lambda: not thread.is_alive())
        assert {prompt for version, prompt, _ in seen if version == "2"} == set(PROMPTS)
        assert not models._leaving and not models._leases.total()

    thread, engine = models.models[0].now.worker._thread, weakref.ref(models.models[0].now.worker.engine)
    asyncio.run(under_load())
    wrong = [(version, prompt, text) for version, prompt, text in seen if text != expected[version][prompt]]
    assert not wrong, f"{len(wrong)} of {len(seen)}: {wrong[:3]}"
    gc.collect()
    assert engine() is None, "the old model is no longer in memory"
    models.close()


@pytest.mark.parametrize("version", [3, 4])
def test_a_version_that_cannot_be_served_leaves_the_old_one(registry, expected, caplog, version):
    move(registry, 1)
    before, models = engine_threads(), load_alias()

    async def tried() -> None:
        async with following(models):
            move(registry, version)
            await until(lambda: models.failed_versions == {NAME: str(version)})
            await until(lambda: len(engine_threads() - before) == 1)
            assert models.problem() is None and await ask(models, PROMPTS[0]) == ("1", expected["1"][PROMPTS[0]])
            await asyncio.sleep(0.5)
            assert caplog.text.count(f"/{version} cannot be served") == 1, "not tried again and again"
            models.models[0].retry_at = 0.0
            await until(lambda: caplog.text.count(f"/{version} cannot be served") == 2)
            move(registry, 2)
            await until(lambda: models.served()[0].version == "2")
            assert not models.failed_versions and await ask(models, PROMPTS[0]) == ("2", expected["2"][PROMPTS[0]])

    asyncio.run(tried())
    models.close()


def test_an_alias_that_moves_back_is_no_failure(registry):
    move(registry, 1)
    models = load_alias()

    async def tried() -> None:
        async with following(models):
            move(registry, 3)
            await until(lambda: models.failed_versions)
            move(registry, 1)
            await until(lambda: not models.failed_versions)

    asyncio.run(tried())
    assert models.served()[0].version == "1"
    models.close()


def test_a_registry_that_does_not_answer_changes_nothing(registry, expected, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    move(registry, 1)
    models = load_alias()

    async def tried() -> None:
        async with following(models):
            mlflow.set_tracking_uri("http://127.0.0.1:9")
            await until(lambda: models.models[0].unreachable)
            assert models.problem() is None and await ask(models, PROMPTS[0]) == ("1", expected["1"][PROMPTS[0]])
            registry.client.delete_registered_model_alias(NAME, "champion")
            mlflow.set_tracking_uri(registry.uri)
            await asyncio.sleep(0.5)
            assert models.models[0].unreachable and caplog.text.count("the registry cannot be asked") == 1
            move(registry, 2)
            await until(lambda: models.served()[0].version == "2")
        assert "the registry answers again" in caplog.text

    try:
        with caplog.at_level(logging.WARNING):
            asyncio.run(tried())
    finally:
        mlflow.set_tracking_uri(registry.uri)
    models.close()


def test_names(registry, expected):
    move(registry, 2)
    other = str(registry.folders[0])
    models = load_alias(also={"other": other})
    assert models.names == [NAME, "other"]
    assert [served.version for served in models.served()] == ["2", tree_digest(registry.folders[0])[:12]]

    async def tried() -> None:
        async with following(models):
            assert (await ask(models, PROMPTS[0]))[1] == (await ask(models, PROMPTS[0], NAME))[1] == expected["2"][PROMPTS[0]]
            assert (await ask(models, PROMPTS[0], "other"))[1] == expected["1"][PROMPTS[0]]
            with pytest.raises(KeyError), models.lease("nobody"):
                pass

    asyncio.run(tried())
    first, second = (model.now.worker for model in models.models)
    second.close()
    second._thread.join()
    assert models.problem() == "other: the engine is closed" and first.problem() is None
    models.close()
    with pytest.raises(BadInput, match="given to two models"):
        load_models(other, also={registry.folders[0].name: other})


def test_targets(registry):
    move(registry, 2)
    by_alias, by_number = resolve_target(ALIAS), resolve_target(f"models:/{NAME}/2")
    assert by_alias == by_number and by_alias[1:] == (NAME, "2", False)
    for wrong, word in ((f"models:/{NAME}@nobody", "looked up"), (f"models:/{NAME}/99", "fetched"), (f"models:/{NAME}", "no version")):
        with pytest.raises(BadInput, match=word):
            resolve_target(wrong)


def test_a_run_folder_is_served_as_it_was_measured(finished):
    folder = finished[0] / "runs/mine"
    run = RunFolder(folder)
    assert resolve_target(str(folder)) == (run.output("train/merged"), "mine", run.need("train")["key"], False)
    assert measured_engine(str(folder)) == run.need("evaluate")["settings"]["engine"]


def test_an_adapter_moves_with_its_model(registry, tmp_path):
    """An adapter is asked by its own name, on the model that is in service."""
    def tuned(number: int):
        model, tokenizer = generate.load_plain(registry.folders[number - 1], torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)), tokenizer

    tuned(1)[0].save_pretrained(tmp_path / "polite")
    expected = {}
    for number in (1, 2):
        model, tokenizer = tuned(number)
        merged = model.merge_and_unload()
        expected[str(number)] = [generate.generate(merged, tokenizer, [prompt], TOKENS)[0].text for prompt in PROMPTS]
    move(registry, 1)
    models = load_alias(adapters={"polite": str(tmp_path / "polite")})
    assert models.names == [NAME, "polite"] and models.served()[1].version == tree_digest(tmp_path / "polite")[:12]

    async def tried() -> None:
        async with following(models):
            assert [text for _, text in await asyncio.gather(*(ask(models, prompt, "polite") for prompt in PROMPTS))] == expected["1"]
            move(registry, 2)
            await until(lambda: models.served()[0].version == "2")
            assert [text for _, text in await asyncio.gather(*(ask(models, prompt, "polite") for prompt in PROMPTS))] == expected["2"]

    asyncio.run(tried())
    models.close()


@pytest.mark.slow
def test_an_alias_moves_under_sixteen_streams_of_a_server(registry, expected, tmp_path, monkeypatch):
    """The whole server, as it is started: sixteen callers stream all the time, the alias moves there and back, and no request fails."""
    import json
    import time

    import httpx
    from serving import running

    move(registry, 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    seen, stop = [], threading.Event()

    async def caller(client: httpx.AsyncClient, prompt: str) -> None:
        while not stop.is_set():
            pieces = []
            body = {"prompt": prompt, "max_tokens": TOKENS, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as response:
                lines = [line async for line in response.aiter_lines() if line]
            for line in lines[:-1]:
                pieces += [choice["text"] for choice in json.loads(line.removeprefix("data: "))["choices"]]
            seen.append((time.monotonic(), response.status_code, lines[-1], prompt, "".join(pieces)))

    async def callers(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            await asyncio.gather(*(caller(client, prompt) for prompt in PROMPTS))

    def of(version: str) -> int:
        return sum(text == expected[version][prompt] for _, _, _, prompt, text in seen[-48:])

    with running({"lights": ALIAS}, tmp_path, token=None) as server:
        asking = threading.Thread(target=lambda: asyncio.run(callers(server.url)))
        asking.start()
        for version in (1, 2, 1):
            move(registry, version)
            deadline = time.monotonic() + 90
            while len(seen) < 48 or of(str(version)) < 48:
                assert time.monotonic() < deadline and asking.is_alive()
                time.sleep(0.1)
        stop.set()
        asking.join(60)
    print(f"{len(seen)} streams by 16 callers while the alias moved twice")
    assert all(status == 200 and last == "data: [DONE]" for _, status, last, _, _ in seen)
    assert all(text in (expected["1"][prompt], expected["2"][prompt]) for _, _, _, prompt, text in seen)
