"""A model that somebody else trained: an ordinary notebook's scikit-learn classifier is judged, promoted, scored and served as any other."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import httpx
import mlflow
import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
from conftest import finetune_accel
from deltalake import DeltaTable
from mlflow.tracking import MlflowClient
from scipy.stats import chi2_contingency
from serving import free_port, wait_until
from typer.testing import CliRunner

from finetune_accel.core import monitor_job, targets
from finetune_accel.core.cli import app
from finetune_accel.core.comparison import compare
from finetune_accel.core.criteria import Criterion
from finetune_accel.core.decision_log import DecisionLog
from finetune_accel.core.errors import BadInput, Broken
from finetune_accel.core.existing_models import MOST_FREQUENT, evaluate_existing
from finetune_accel.core.formats import Form
from finetune_accel.core.gating import results_of
from finetune_accel.core.judging import judge_file
from finetune_accel.core.monitor_commands import monitor_settings
from finetune_accel.core.monitoring import read_table
from finetune_accel.core.policy import default_policy
from finetune_accel.core.predictor import predictor_for
from finetune_accel.core.promotion import Desk, Place, promote, register_existing
from finetune_accel.core.score_job import job_for, known_ids, run_job, spark_job
from finetune_accel.core.signing import own_key
from finetune_accel.core.sources import fetch_package, file_digest
from finetune_accel.core.standins import standin_rows
from finetune_accel.core.targets import resolve_target

NOTEBOOK = Path(__file__).parent / "data/sklearn_classifier.ipynb"
NAME = "main.default.intent_classifier"
CRITERIA = [Criterion(metric="macro_f1", at_least=0.5, better_than="base"), Criterion(metric="exact_match", at_least=0.6)]
DATA = [{"name": "home-assistant-intents", "licence": "Apache-2.0", "origin": "public"}]


def version(number: int) -> str:
    return f"models:/{NAME}/{number}"


def train(data: Path, **parameters) -> None:
    """Run the customer's notebook, as the customer does."""
    assert "finetune_accel" not in NOTEBOOK.read_text(), "it knows nothing of us"
    given = [word for key, value in {"data": data, **parameters}.items() for word in ("-p", key, str(value))]
    command = [sys.executable, "-m", "papermill", NOTEBOOK, data.parent / "executed.ipynb", "--no-progress-bar", *given]
    subprocess.run(command, check=True, cwd=data.parent, capture_output=True)


@pytest.fixture(scope="module")
def customer(tmp_path_factory):
    """A registry with a weak version 1 and a good version 2, test rows of templates that training did not see, and rows to score."""
    folder = tmp_path_factory.mktemp("customer")
    uri, wheel = f"sqlite:///{folder / 'mlflow.db'}", fetch_package("pypi:home-assistant-intents")
    every = list(standin_rows("home-assistant-intents", wheel, 4, 17))
    usual = {intent for intent, _ in Counter(row["intent"] for row in every).most_common(12)}
    rows = [row for row in every if row["intent"] in usual]
    seen = {template for number, template in enumerate(sorted({row["template"] for row in rows})) if number % 4}
    taught = pd.DataFrame([{"text": row["prompt"], "intent": row["intent"]} for row in rows if row["template"] in seen])
    taught.to_csv(folder / "sentences.csv", index=False)
    tests = [{"text": row["prompt"], "expected": row["intent"], "group": row["template"]} for row in rows if row["template"] not in seen]
    pd.DataFrame(tests).to_parquet(folder / "tests.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyspark.sql.connect", None)  # it takes a worker of pytest-xdist for a doctest, and ends it
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("FINETUNE_ACCEL_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        mlflow.set_tracking_uri(uri)
        client = MlflowClient()
        client.search_experiments(max_results=1)
        for words in (3, 20_000):
            train(folder / "sentences.csv", words=words)
        client.set_registered_model_alias(NAME, "champion", "2")
        yield SimpleNamespace(folder=folder, client=client, uri=uri, tests=folder / "tests.parquet", sentences=[row["prompt"] for row in rows])
    mlflow.set_tracking_uri(None)


def judge(customer, out, model: int = 2, against: str = MOST_FREQUENT, **more) -> dict:
    return evaluate_existing(version(model), customer.tests, CRITERIA, against, 17, out, data_sources=DATA, **more)


# --- register, gate, promote ---

def test_judged_by_criteria_of_its_own(customer, tmp_path):
    log = DecisionLog(tmp_path / "decisions")
    found = judge(customer, tmp_path / "out", log=log, reason="a first look")
    print(found["in_words"])
    assert found == json.loads((tmp_path / "out/evaluation.json").read_text())
    assert all(row["met"] for row in found["criteria"]) and {row["system"] for row in found["scores"]} == {"tuned", "base"}
    assert found["model"] == resolve_target(version(2)).folder.name and found["test"] == file_digest(customer.tests)
    (entry,) = log.entries()
    assert (entry["action"], entry["test"], entry["model"], entry["criteria"]) == ("open test", found["test"], found["model"],
                                                                               file_digest(tmp_path / "out/criteria.json"))
    answers = pq.read_table(tmp_path / "out/answers.parquet").to_pylist()
    expected = pd.read_parquet(customer.tests).drop_duplicates()
    assert len(answers) == 2 * len(expected) == 2 * found["items"] and {row["group"] for row in answers} == set(expected["group"])
    tuned = {row["prompt"]: row["answer"] for row in answers if row["system"] == "tuned"}
    theirs = mlflow.pyfunc.load_model(version(2)).predict(expected[["text"]])
    assert tuned == dict(zip(expected["text"], theirs)), "it is the customer's model that was judged"
    accuracy = np.mean(theirs == expected["expected"])
    assert abs(next(row["value"] for row in found["scores"] if (row["system"], row["criterion"]) == ("tuned", "exact_match")) - accuracy) < 1e-9


@pytest.mark.slow
def test_judged_against_another_version(customer, tmp_path):
    found = judge(customer, tmp_path / "a", against=version(1))
    assert found["verdicts"][0]["verdict"] == "better" and found["against"]["model"] == f"{NAME} 1"
    found = judge(customer, tmp_path / "b", model=1, against=version(2))
    assert found["verdicts"][0]["verdict"] == "worse" and not found["criteria"][0]["met"]
    again = results_of(tmp_path / "b", CRITERIA)
    assert compare(again, CRITERIA, 17) == found["verdicts"], "whoever receives the files computes the verdicts again"


def test_registered_gated_promoted_and_scored(customer, tmp_path):
    """register -> gate -> promote -> score: what the customer's notebook logged is champion of another store, and answers as before."""
    key, log = own_key(tmp_path / "ada.pem"), DecisionLog(tmp_path / "decisions")
    desk = Desk(key, default_policy(key.public), log)
    source, place = Place("dev", customer.uri, NAME), Place("prod", f"sqlite:///{tmp_path}/prod/mlflow.db", "prod.default.intents")
    judge(customer, tmp_path / "good", log=log)
    judge(customer, tmp_path / "weak", model=1, log=log)
    weak = register_existing(desk, place, source, "1", tmp_path / "weak", "a try")
    assert {check.name for check in promote(desk, place, weak, "champion", "a try").broken} == {"verdicts"}
    good = register_existing(desk, place, source, "2", tmp_path / "good", "it is better")
    decision = promote(desk, place, good, "champion", "it is better")
    assert decision.moved, decision.broken
    print(*(f"{check.name}: {check.says}" for check in decision.checks), sep="\n")
    promoted = f"models:/{place.model}@champion"
    (tmp_path / "in.jsonl").write_text('{"text": "turn on the lights in the kitchen"}\n')
    said = finetune_accel("score", tmp_path / "in.jsonl", "--model", promoted, "--out", tmp_path / "out", cwd=tmp_path, MLFLOW_TRACKING_URI=place.uri,
                          MLFLOW_REGISTRY_URI=place.uri)
    assert "1 answered" in said
    (row,) = table(tmp_path / "out")
    expected = (place.model, good, resolve_target(version(2)).folder.name)
    assert (row["model"], row["model_version"], row["model_sha256"]) == expected, "evidence and signature lie beside it, and are no part of the model"


@pytest.mark.parametrize("rows, rule", [([{"text": "on"}], "`expected`"), ([{"words": "on", "expected": "x"}], "no.? ?.*`text`|`text` is not among"),
                                        ([{"text": 5, "expected": "x"}], "the model takes text"), ([], "no rows|is empty")])
def test_test_rows_are_refused_whole(customer, tmp_path, rows, rule):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadInput, match=rule):
        evaluate_existing(version(2), tmp_path / "rows.jsonl", CRITERIA, MOST_FREQUENT, 1, tmp_path / "out", data_sources=DATA)
    assert not (tmp_path / "out/evaluation.json").exists()


# --- score ---

def table(folder) -> list[dict]:
    return DeltaTable(str(folder)).to_pyarrow_table().to_pylist()


SLOWLY = "from finetune_accel.core import scoring; scoring.COMMIT_ROWS = 25; from finetune_accel.core.cli import main; main()"


@pytest.mark.slow
def test_scored_by_the_command_line_killed_and_run_again(customer, tmp_path):
    """Each row once, bad rows set aside, whatever is killed: the child too ends with its job."""
    sentences = [f"{text} {turn}" for turn in ("now", "please") for text in dict.fromkeys(customer.sentences)][:2000]
    bad = ['{"text": 7}', '{"sentence": "lights on"}', '{"text": null, "n": 1}', '{"text": " "}', '{"text": "lights']
    lines = [json.dumps({"text": text, "number": number}) for number, text in enumerate(sentences)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:50], *bad, *lines[50:]]) + "\n")
    command = ["score", tmp_path / "in.jsonl", "--model", f"models:/{NAME}@champion", "--out", tmp_path / "out"]
    with subprocess.Popen([sys.executable, "-c", SLOWLY, *map(str, command)], stdout=subprocess.DEVNULL, start_new_session=True) as job:
        wait_until(lambda: len(known_ids(tmp_path / "out")) >= 100, 120)
        children = psutil.Process(job.pid).children(recursive=True)
        os.kill(job.pid, signal.SIGKILL)
    there = len(known_ids(tmp_path / "out"))
    assert 100 <= there < len(lines), "it was killed with rows left to do"
    wait_until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children), 20)
    said = finetune_accel(*command, cwd=tmp_path)
    print(said)
    assert f"{len(lines) + len(bad):,} rows" in said and f"{there:,} known already" in said
    rows = table(tmp_path / "out")
    assert len(rows) == len({row["id"] for row in rows}) == len(lines) + len(bad)
    answered = {json.loads(row["row"])["text"]: row for row in rows if not row["error"]}
    expected = dict(zip(sentences, mlflow.pyfunc.load_model(version(2)).predict(pd.DataFrame({"text": sentences}))))
    assert {text: row["response"] for text, row in answered.items()} == expected
    same = ("model", "model_version", "model_sha256", "engine", "finish_reason", "prompt_tokens", "completion_tokens")
    digest = resolve_target(version(2)).folder.name
    assert {tuple(row[key] for key in same) for row in answered.values()} == {(NAME, "2", digest, "mlflow.sklearn", "stop", 0, 0)}
    aside = {row["place"]: (row["rule"], row["detail"], row["fix"]) for row in table(tmp_path / "out_set_aside")}
    assert {place: rule for place, (rule, _, _) in aside.items()} == {
        "in.jsonl:51": "wrong type", "in.jsonl:52": "missing key", "in.jsonl:53": "null content", "in.jsonl:54": "empty text",
        "in.jsonl:55": "not JSON"}
    assert "`text`" in aside["in.jsonl:52"][1] and "--column text=YOURS" in aside["in.jsonl:52"][2]


def command(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.slow
def test_other_forms_of_rows_and_what_means_nothing_here(customer, tmp_path):
    (tmp_path / "in.csv").write_text("sentence\nturn on the lights\nclose the blinds\n")
    asked = ["score", tmp_path / "in.csv", "--model", version(2), "--out"]
    assert "2 answered" in command(*asked, tmp_path / "csv", "--column", "text=sentence").output
    assert "2 rows" in command(*asked, tmp_path / "dry", "--column", "text=sentence", "--dry-run").output and not (tmp_path / "dry").exists()
    for options, name in ((("--engine", "openvino"), "engine"), (("--max-tokens", 5), "max_tokens"), (("--system-prompt", "Hi"), "system_prompt")):
        refused = command(*asked, tmp_path / "no", *options).exception
        assert isinstance(refused, BadInput) and name in refused.place, refused
    with pytest.raises(BadInput, match="another model"):
        run_job_of(job_for(str(tmp_path / "in.csv"), version(1), tmp_path / "csv", form=Form("supervised", {"text": "sentence"})))


def run_job_of(job):
    predictor = job.predictor()
    try:
        return run_job(job, predictor)
    finally:
        predictor.close()


@pytest.mark.slow
def test_scored_in_spark(customer, tmp_path):
    pd.DataFrame({"text": [*customer.sentences[:300], None]}).to_parquet(tmp_path / "in.parquet")
    counts = spark_job(job_for(str(tmp_path / "in.parquet"), version(2), tmp_path / "out"), 2, lambda _: None)
    assert counts.rows == 301 and counts.set_aside == 1 and counts.answered == len(set(customer.sentences[:300]))


# --- what may be loaded, and models that misbehave ---

class Odd(mlflow.pyfunc.PythonModel):
    """Answers with lengths; some texts it cannot bear."""

    def predict(self, context, model_input, params=None):
        if "die" in set(model_input["text"]):
            os.kill(os.getpid(), 9)
        if "break" in set(model_input["text"]):
            raise RuntimeError("a word that I cannot bear")
        return [None if text == "nothing" else len(text) / 2 for text in model_input["text"]]


def log(customer, name: str, model, python: bool = False, example=None, **more) -> str:
    """Register a model and return its uri."""
    with mlflow.start_run():
        kind = mlflow.pyfunc.log_model if python else mlflow.sklearn.log_model
        given = {"python_model": model} if python else {"sk_model": model}
        info = kind(name=name, registered_model_name=f"main.default.{name}", pip_requirements=[], input_example=example, **given, **more)
    return f"models:/main.default.{name}/{info.registered_model_version}"


@pytest.fixture(scope="module")
def odd(customer):
    return log(customer, "odd", Odd(), python=True, example=pd.DataFrame({"text": ["a", "b"]}))


@pytest.mark.slow
def test_a_model_that_runs_its_own_code_needs_a_word(customer, odd, tmp_path):
    with pytest.raises(BadInput, match="to load this model is to run its loader mlflow.pyfunc.model.*--unpickle"):
        predictor_for(odd)
    from sklearn.dummy import DummyClassifier

    frame = pd.DataFrame({"text": ["a", "b", "c"]})
    pickled = log(customer, "pickled", DummyClassifier(strategy="constant", constant="on").fit(frame, ["on", "off", "on"]), example=frame,
                  serialization_format="cloudpickle")
    (tmp_path / "in.jsonl").write_text('{"text": "on"}\n')
    asked = ["score", tmp_path / "in.jsonl", "--model", pickled, "--out", tmp_path / "out"]
    refused = command(*asked).exception
    assert isinstance(refused, BadInput) and "its cloudpickle file" in str(refused) and not (tmp_path / "out").exists()
    assert "1 answered" in command(*asked, "--unpickle").output


def test_a_store_that_nobody_named(customer, monkeypatch):
    monkeypatch.setattr(mlflow, "is_tracking_uri_set", lambda: False)
    with pytest.raises(BadInput, match="MLFLOW_TRACKING_URI"):
        resolve_target(version(2))
    assert targets.alias_of(f"models:/{NAME}@champion")


@pytest.mark.slow
def test_rows_that_a_model_cannot_bear(odd, tmp_path):
    texts = ["four", *["more"] * 30, "break", "last", "nothing", "die", "end"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text, "n": number}) + "\n" for number, text in enumerate(texts)))
    counts = run_job_of(job_for(str(tmp_path / "in.jsonl"), odd, tmp_path / "out", trusted=True))
    assert (counts.rows, counts.answered, dict(counts.rules)) == (36, 33, {"cannot be predicted": 1, "no prediction": 1, "engine died": 1})
    found = {json.loads(row["row"])["n"]: row for row in table(tmp_path / "out")}
    assert found[0]["response"] == "2.0" and found[35]["response"] == "1.5" and "cannot bear" in found[31]["error"]


@pytest.mark.slow
def test_models_that_do_not_answer_each_row(customer):
    """A vectorizer alone reads the names of a table's columns: MLflow would answer one label for all rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, labels = ["lights on", "lights off", "doors on", "doors off"], ["on", "off", "on", "off"]
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, labels)
    with pytest.raises(BadInput, match="1 answers to a table of . rows.*ColumnTransformer"):
        predictor_for(log(customer, "names", model, signature=mlflow.models.infer_signature(pd.DataFrame({"text": texts}), labels),
                          example=pd.DataFrame({"text": texts})))
    with pytest.raises(BadInput, match="array without column names"):
        predictor_for(log(customer, "array", LogisticRegression().fit(np.eye(4), labels), example=np.eye(4)))
    predictor = predictor_for(log(customer, "unsigned", model))  # without a signature it is given the texts as they are
    read = [predictor.question(row, Form("supervised", {"prompt": "text"})) for row in ({"text": "lights on"}, {"text": "doors off"}, {"words": "x"})]
    assert [answer.text for _, answer in predictor.answers((number, predictor.ask(row)) for number, row in enumerate(read[:2]))] == ["on", "off"]
    assert isinstance(read[2], Broken)
    predictor.close()


# --- serve ---

@pytest.fixture
def server(customer, tmp_path):
    """`finetune-accel serve models:/...@champion --table`, with a token."""
    customer.client.set_registered_model_alias(NAME, "champion", "1")
    port, token = free_port(), "a-token-for-this-test"
    code = ("from finetune_accel.core import served_models; served_models.Models.follow_seconds = 0.2\n"
            f"from finetune_accel.core.server import serve; serve('models:/{NAME}@champion', port={port}, table={str(tmp_path / 'requests')!r})")
    with open(tmp_path / "log", "w") as out:
        environment = {**os.environ, "FINETUNE_ACCEL_TOKEN": token}
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=out, stderr=subprocess.STDOUT)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token}"}, timeout=60)

    def ready() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        try:
            return client.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(ready, 120)
        yield SimpleNamespace(client=client, process=process, log=tmp_path / "log", table=tmp_path / "requests")
    finally:
        client.close()
        process.kill()
        process.wait()


@pytest.mark.slow
def test_served(customer, server):
    client, texts = server.client, ["turn on the lights in the kitchen", "close the blinds"]
    expected = mlflow.pyfunc.load_model(version(1)).predict(pd.DataFrame({"text": texts})).tolist()
    for body in ({"dataframe_split": {"columns": ["text"], "data": [[text] for text in texts]}}, {"inputs": {"text": texts}}, {"instances": texts},
                 {"dataframe_records": [{"text": text} for text in texts]}):
        for path in ("/invocations", f"/serving-endpoints/{NAME}/invocations"):
            assert client.post(path, json=body).json() == {"predictions": expected}, (path, body)
    hello = {"messages": [{"role": "user", "content": "hi"}]}
    for path, body, status in (("/invocations", {"inputs": [{"words": "x"}]}, 400), ("/invocations", hello, 400),
                               ("/v1/chat/completions", hello, 400),
                               ("/v1/completions", {"prompt": "hi"}, 400),
                               ("/serving-endpoints/none/invocations", {"inputs": texts}, 404)):
        refused = client.post(path, json=body)
        assert refused.status_code == status, (path, refused.text)
        assert "v1" not in path or "does not chat" in refused.text
    assert httpx.post(f"{client.base_url}/invocations", json={"inputs": texts}).status_code == 401
    for path in ("/ping", "/version", "/healthz", "/readyz"):
        assert client.get(path).status_code == 200
    assert f'model_info{{dtype="none",engine="mlflow.sklearn",model="{NAME}",version="1"}} 1.0' in client.get("/metrics").text
    assert client.get("/v1/models").json()["data"][0]["id"] == NAME
    assert "task" not in client.get(f"/api/2.0/serving-endpoints/{NAME}").json()


@pytest.mark.slow
def test_its_alias_moves_and_no_request_is_dropped(customer, server):
    texts, stop, seen = ["turn on the lights in the kitchen", "what is on my shopping list", "close the blinds"], threading.Event(), []
    expected = {mlflow.pyfunc.load_model(version(number)).predict(pd.DataFrame({"text": texts})).tolist().__repr__(): number for number in (1, 2)}
    assert len(expected) == 2

    def client() -> None:
        while not stop.is_set():
            reply = server.client.post("/invocations", json={"inputs": texts})
            seen.append(expected[repr(reply.json()["predictions"])] if reply.status_code == 200 else reply.text)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: 1 in seen, 60)
    customer.client.set_registered_model_alias(NAME, "champion", "2")
    wait_until(lambda: seen[-20:].count(2) == 20, 120)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(seen) == {1, 2} and seen[0] == 1, [one for one in seen if one not in (1, 2)][:3]
    print(f"{len(seen)} requests while the alias moved, none dropped")
    wait_until(lambda: len(psutil.Process(server.process.pid).children()) <= 2, 30)  # the old model's process has ended


@pytest.mark.slow
def test_a_model_that_dies_in_service_is_seen(server):
    (child,) = [one for one in psutil.Process(server.process.pid).children() if "spawn_main" in " ".join(one.cmdline())]
    child.kill()
    wait_until(lambda: server.client.get("/healthz").status_code == 503, 30)
    reply = server.client.post("/invocations", json={"inputs": ["lights on"]})
    assert reply.status_code == 503 and "ended" in reply.text
    assert "Traceback" not in server.log.read_text()
    time.sleep(0.1)


# --- monitored ---

@pytest.mark.slow
def test_monitored_as_classification(customer, server, tmp_path):
    """Judged on half of the test rows, asked the other half through its server: no alert. Asked one intent alone: its predictions have moved."""
    rows = pd.read_parquet(customer.tests).drop_duplicates("text").sample(frac=1, random_state=17)
    rows[::2].to_parquet(tmp_path / "judged.parquet")
    (tmp_path / "tickets.yaml").write_text(json.dumps({"name": "tickets", "model": version(1), "rows": "judged.parquet", "data_sources": DATA[:1],
                                                       "criteria": [one.model_dump() for one in CRITERIA]}).replace('"public"', '"public stand-in"'))
    judge_file(tmp_path / "tickets.yaml", tmp_path / "out")
    rules = monitor_settings(tmp_path / "out", {"window": "1 minute", "windows_out": 1, "of_windows": 1, "fewest_rows": 30})
    evidence, usual, later = monitor_job.Evidence(tmp_path / "out"), rows[1::2], datetime.now(timezone.utc) + timedelta(days=1)
    job = monitor_job.job_for(rules, str(server.table), evidence.baseline(rules), None, tmp_path / "out", {})
    assert {column.name for column in job.baseline.view.columns} == {"input text", "prediction", "latency_ms", "error", "scored macro_f1", "scored exact_match"}

    def ask(texts: list[str], name: str) -> None:
        time.sleep(60 - time.time() % 60)  # a window of its own
        for number, text in enumerate(texts):
            form = {"inputs": {"text": [text]}} if number % 2 else {"dataframe_records": [{"text": text}]}
            assert server.client.post("/invocations", json={**form, "client_request_id": f"{name}-{number}"}).status_code == 200
        time.sleep(7)  # until the server has written them

    asked = usual["text"].tolist()[:120]
    ask(asked, "usual")
    labels = {f"usual-{number}": {"request_id": f"usual-{number}", "response": label} for number, label in enumerate(usual["expected"].tolist()[:120])}
    found = monitor_job.look(job._replace(labels=labels), rules, tmp_path / "out", now=later)
    assert found["judged"] == 1 and not found["alerts"] and found["rows"] == {"in": 120, "kept": 120}, found["alerts"]
    (score,) = [row for row in read_table(job.folder / "profile") if row["column_name"] == "scored exact_match"]
    assert score["count"] == 120 and 0 < score["avg"] < 1
    most = Counter(usual["expected"]).most_common(1)[0][0]
    one = usual[usual["expected"] == most]["text"].tolist()[:60]
    ask(one, "one")
    found = monitor_job.look(job._replace(labels=labels), rules, tmp_path / "out", now=later)
    assert "prediction" in {alert["column"] for alert in found["alerts"]} and "input text" in {alert["column"] for alert in found["alerts"]}
    (drift,) = [row for row in read_table(job.folder / "drift") if row["column_name"] == "prediction" and row["slice_key"] is None and row["drift_type"] == "CONSECUTIVE"]
    model = mlflow.pyfunc.load_model(version(1))
    before, now = (Counter(model.predict(pd.DataFrame({"text": texts}))) for texts in (asked, one))
    counts = np.array([[side[name] for name in sorted({*before, *now})] for side in (before, now)])
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert abs(drift["tv_distance"] - np.abs(shares[0] - shares[1]).sum() / 2) < 1e-9 and drift["tv_distance"] > 0.2
    test = chi2_contingency(counts, correction=False)
    assert abs(drift["chi_squared_test"]["statistic"] - test.statistic) < 1e-6 and abs(drift["chi_squared_test"]["pvalue"] - test.pvalue) < 1e-9
    (profile,) = [row for row in read_table(job.folder / "profile") if row["column_name"] == "prediction" and row["slice_key"] is None
                  and row["window"]["start"] == drift["window"]["start"]]
    assert profile["frequent_items"][0]["count"] == now.most_common(1)[0][1]
    assert "The model predicts other classes" in (job.folder / "dashboard.html").read_text()
