"""The parity certificate: what a running server answers beside what the reference engine answers."""
from functools import partial

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving import running
from tiny import tiny_model

from finetune_accel.core.criteria import Criterion
from finetune_accel.core.errors import PhaseFailed
from finetune_accel.core.generate import generate, load
from finetune_accel.core.kept_answers import KeptAnswers
from finetune_accel.core.parity import (
    Broken,
    Route,
    ask_all,
    check_registered,
    check_routes,
    judge_engine,
    read_certificate,
    reference_answers,
    request_of,
    routes,
    rows_digest,
    tuned_rows,
    whole_text,
)
from finetune_accel.core.report import write_report
from finetune_accel.core.runs import RunFolder
from finetune_accel.core.served_models import measured_engine
from finetune_accel.core.sources import tree_digest
from finetune_accel.serve import try_engine

LIMIT = 12
ORDERS = ["lights on in the hall", "stop the timer", "what time is it", "play some music", "close the blinds"]
EXACT = [Criterion(metric="exact_match")]


def row_of(number: int, order: str, system: str | None = "Be brief.", text: bool = False) -> dict:
    """Return an item as evaluate's answers.parquet has it, without its answer."""
    turns = [{"role": "system", "content": system}] if system else []
    return {"id": str(number), "group": str(number), "messages": [] if text else [*turns, {"role": "user", "content": order}], "prompt": order,
            "response": "?"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server without a token, and its model's folder: a tiny model whose template brings no system prompt of the rows."""
    scratch = tmp_path_factory.mktemp("parity")
    folder = tiny_model(scratch / "model", ORDERS)
    with running({"model": folder}, scratch, token=None) as server:
        yield server.url, folder


@pytest.fixture(scope="module")
def answered(served):
    """Rows with the reference engine's answers, as evaluate writes them."""
    model, tokenizer = load(served[1])
    rows = [row_of(number, order) for number, order in enumerate(ORDERS)] + [row_of(9, "Once upon a time", text=True)]
    answers = generate(model, tokenizer, [row["messages"] or row["prompt"] for row in rows], LIMIT)
    return [{**row, "answer": one.text, "finish": one.finish_reason} for row, one in zip(rows, answers, strict=True)]


def test_every_route_answers_as_the_reference(served, answered):
    for rows, talks in ((answered[:-1], True), (answered[-1:], False)):
        every = routes("model", talks, None)
        replies = ask_all(served[0], every[0], rows, LIMIT)
        assert [reply.text for reply in replies] == [row["answer"] for row in rows] and all(0 < reply.tokens <= LIMIT for reply in replies)
        checked = check_routes(served[0], every, rows, LIMIT)
        assert [row["route"] for row in checked] == [route.name for route in every[1:]] and {row["asked"] for row in checked} == {len(rows)}
    assert len({row["answer"] for row in answered}) > 3, "a model that always says the same would pass with any prompt"


def test_a_route_that_answers_otherwise_is_found(served, answered):
    first = routes("model", True, None)[0]
    short = Route("/v1/chat/completions", "cut short", lambda row, limit: request_of(row, limit - 9), whole_text)
    with pytest.raises(PhaseFailed, match=r"row 0 \('lights on in the hall'\).*cut short"):
        check_routes(served[0], [first, short], answered[:2], LIMIT)
    # this template has another system prompt of its own: leaving out that of the rows is another question
    with pytest.raises(PhaseFailed, match="without the system prompt"):
        check_routes(served[0], routes("model", True, "Be brief."), answered[:2], LIMIT)
    with pytest.raises(Broken, match="404"):
        check_routes(served[0], [first, Route("/v2/chat", "", request_of, whole_text)], answered[:1], LIMIT)


def test_what_another_model_answers_is_refused(served, answered, tmp_path):
    rows = answered[:-1]
    model, tokenizer = load(tiny_model(tmp_path / "other", ORDERS, seed=1))
    expected = [one.text for one in generate(model, tokenizer, [row["messages"] for row in rows], LIMIT)]
    replies = [reply.text for reply in ask_all(served[0], routes("model", True, None)[0], rows, LIMIT)]
    for approach in ("supervised", "chat"):
        assert judge_engine("reference", rows, expected, replies, EXACT, approach, 17)["verdict"] == "refused"
        assert judge_engine("reference", rows, [row["answer"] for row in rows], replies, EXACT, approach, 17)["verdict"] == "exact"


def test_the_reference_is_computed_where_evaluate_used_another_engine(served, answered, tmp_path):
    rows, folder = answered[:-1], served[1]
    stale = [{**row, "answer": "another engine's"} for row in rows]
    kept = KeptAnswers(tmp_path, tree_digest(folder), LIMIT, "openvino")
    assert reference_answers(stale, "reference", folder, "supervised", kept) == ["another engine's"] * len(rows)
    assert reference_answers(stale, "openvino", folder, "supervised", kept) == [row["answer"] for row in rows]
    assert len(kept.by("reference").known) == len(rows), "they are not computed twice"


def test_rows_are_the_tuned_models_that_had_room(answered, tmp_path):
    columns = [{**row, "system": system} for system in ("base", "tuned") for row in answered[:3]]
    columns.append({**answered[3], "system": "tuned", "finish": "no room"})
    pq.write_table(pa.Table.from_pylist(columns), tmp_path / "answers.parquet")
    assert [row["id"] for row in tuned_rows(tmp_path / "answers.parquet", None)] == ["0", "1", "2"]
    assert len(tuned_rows(tmp_path / "answers.parquet", 2)) == 2
    assert rows_digest(answered[:2]) != rows_digest(answered[1::-1])
    pq.write_table(pa.Table.from_pylist(columns[-1:]), tmp_path / "answers.parquet")
    with pytest.raises(PhaseFailed, match="left room"):
        tuned_rows(tmp_path / "answers.parquet", None)


def test_an_engine_that_cannot_run_is_passed_over_with_the_reason(tmp_path, answered):
    target = tmp_path / "gone"
    judge = partial(judge_engine, "reference", [], [], criteria=EXACT, approach="supervised", seed=17)
    found = try_engine("reference", target, answered, LIMIT, None, judge, tmp_path / "log", 60)
    assert found["verdict"] == "cannot run here" and "neither a run folder" in found["reason"] and "answers" not in found
    late = try_engine("reference", target, answered, LIMIT, None, judge, tmp_path / "log", 0.1)
    assert late["verdict"] == "broken" and "not ready" in late["reason"]


def test_the_certificate_of_a_run(finished):
    run = RunFolder(finished[0] / "runs/mine")
    served, model = run.need("serve"), run.need("train")["outputs"]["merged"]["sha256"]
    certificate = read_certificate(run.output("serve/parity.json"), model)
    assert certificate["engine"] == served["engine"] == measured_engine(str(run.path)) == "reference" and certificate["verdict"] == "exact"
    assert certificate["rows"]["asked"] == 1 and certificate["rows"]["answers_sha256"] == run.need("evaluate")["outputs"]["answers.parquet"]["sha256"]
    assert certificate["model"]["template_sha256"] == run.need("evaluate")["answering"]["template_sha256"]["tuned"]
    assert len(certificate["routes"]) == 7 and "without the system prompt" in certificate["routes"][-1]["route"]
    assert certificate["registered"]["same_files"] and certificate["registered"]["asked"] == 1 and certificate["versions"]["torch"]
    (row,) = pq.read_table(run.output("serve/parity.parquet")).to_pylist()
    assert row["served"] == row["reference"] and row["engine"] == "reference"
    assert served["in_words"] in write_report(run).read_text().replace("&#39;", "'")


def test_a_registered_model_with_other_files_is_seen(finished):
    folder, _ = finished
    run = RunFolder(folder / "runs/mine")
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'runs/mlflow.db'}")
    uri = run.need("train")["registered"]["uri"]
    row = tuned_rows(run.output("evaluate/answers.parquet"), 1)
    found = check_registered(uri, "0" * 64, row, [row[0]["answer"]], run.need("evaluate")["max_new_tokens"])
    assert found["same_files"] is False and found["dtype"] == "bfloat16"
    gone = check_registered(uri.rsplit("/", 1)[0] + "/999", "0" * 64, row, [row[0]["answer"]], 8)
    assert "999" in gone["problem"]
