"""Chat and continued pre-training through all phases, perplexity against transformers' own loss, and completions."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pyarrow.parquet as pq
import pytest
import torch
from conftest import finetune_accel, states
from fastapi.testclient import TestClient
from tiny import tiny_model

from finetune_accel.core.asking import dev_scorer, read_by
from finetune_accel.core.comparison import Answers, Likelihoods, compare, score_table
from finetune_accel.core.criteria import Criterion, check_criteria
from finetune_accel.core.engagement import phases
from finetune_accel.core.errors import BadInput
from finetune_accel.core.generate import generate, load
from finetune_accel.core.likelihood import log_likelihoods
from finetune_accel.core.prompting import asked_of_base
from finetune_accel.core.runs import RunFolder
from finetune_accel.core.served_models import load_models
from finetune_accel.core.server import create_app

PHASES = [phase.name for phase in phases()]
PERPLEXITY, EXACT = Criterion(metric="perplexity"), Criterion(metric="exact_match")
ROOMS = ["hall", "kitchen", "bath", "attic", "cellar", "garden", "garage", "study"]
CHATS = [
    {"messages": [
        {"role": "user", "content": f"is the {room} dark?"}, {"role": "assistant", "content": f"yes, the {room} is dark"},
        {"role": "user", "content": f"then lights on in the {room}"}, {"role": "assistant", "content": f"the {room} is lit"}]}
    for room in ROOMS
]
TEXTS = [
    {"text": f"In the {room} stands a lamp. Whoever enters the {room} turns it on, and whoever leaves the {room} turns it off again."}
    for room in ROOMS
]
TEXT_RECORDS = [
    {"id": str(i), "group": str(i), "label": "", "prompt": "", "response": row["text"], "messages": [], "source": "t", "row": i + 1}
    for i, row in enumerate(TEXTS)
]
ENGAGEMENT = """\
name: mine
approach: {approach}
plan:
  use_case: tests
  owner: tests
  criteria: {criteria}
  data_sources: [{{name: rows, licence: ours, origin: customer, examples: 8}}]
  prerequisites: [{{item: rows may be used, state: met, who: tests}}]
prepare: {{source: rows.jsonl, base_model: "path:tiny", system_prompt: {system}, targets: {targets}, split: {{by: null, stratify: null, dev: 0.2, test: 0.3}}}}
benchmark: {{models: ["path:tiny"]}}
train: {{base_model: "path:tiny", epochs: 4, evaluations: 1, batch_size: 2}}
evaluate: {{}}
serve: {{parity_prompts: 2, engines: [reference]}}
score: {{}}
promote: {{}}
monitor: {{}}
handover: {{runbooks: []}}
"""


def write_engagement(folder, rows, **values):
    """Write rows, tiny model and engagement file into `folder`."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_model(folder / "tiny", [json.dumps(row) for row in rows])
    (folder / "mine.yaml").write_text(ENGAGEMENT.format(**values))
    return folder


ENGAGEMENTS = {
    "chat": (CHATS, {"approach": "chat", "system": "Be brief.", "targets": "all",
                     "criteria": "[{metric: exact_match}, {metric: perplexity, at_most: 100000.0, better_than: base}]"}),
    "reading": (TEXTS, {"approach": "continued_pretraining", "system": "null", "targets": "last",
                        "criteria": "[{metric: perplexity, at_most: 100000.0}]"}),
}


def run_whole(folder):
    """Run all phases; whether a tiny model that saw five rows meets its criteria is not the question (exit 0 or 1)."""
    done = subprocess.run([sys.executable, "-m", "finetune_accel.core.cli", "run", "mine.yaml", "--run-dir", str(folder / "runs/mine")],
                          cwd=folder, text=True, capture_output=True, env={**os.environ, "COLUMNS": "160"})
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return RunFolder(folder / "runs/mine"), done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    """Both engagements after all phases (most of which is waiting for kernels to start, so both run at once)."""
    folders = [write_engagement(tmp_path_factory.mktemp(name), rows, **values) for name, (rows, values) in ENGAGEMENTS.items()]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ENGAGEMENTS, pool.map(run_whole, folders), strict=True))


@pytest.fixture(scope="module")
def chat(finished_runs):
    """A finished chat engagement: (run folder, what the command printed)."""
    return finished_runs["chat"]


@pytest.fixture(scope="module")
def reading(finished_runs):
    """A finished continued pre-training: (run folder, what the command printed)."""
    return finished_runs["reading"]


def test_a_chat_goes_through_all_phases(chat):
    run, output = chat
    assert states(output) == dict.fromkeys(PHASES, "done"), output
    evaluated, trained = run.need("evaluate"), run.need("train")
    rows = {(s["system"], s["criterion"]): s for s in evaluated["scores"]}
    assert set(rows) == {(system, criterion) for system in ("base", "tuned") for criterion in ("exact_match", "perplexity")}
    assert all(1 < rows[system, "perplexity"]["low"] <= rows[system, "perplexity"]["value"] for system in ("base", "tuned"))
    assert rows["tuned", "perplexity"]["value"] < rows["base", "perplexity"]["value"], "it learnt"
    assert {s["system"] for s in run.need("benchmark")["scores"]} == {"base"}
    assert trained["dev"].keys() == {"exact_match", "perplexity"} and trained["dev"]["perplexity"] > 1
    assert trained["proofs"] and all(proof["held"] for proof in trained["proofs"])
    served = run.need("serve")
    assert served["parity"] == {"verdict": "exact", "equal": 2, "asked": 2, "rows": []} and len(served["routes"]) == 7
    assert "perplexity (lower is better)" in output
    report = (run.path / "report.html").read_text()
    assert "at most 100000.0 was asked" in report and "base+K" not in report.split('id="answers"')[1].split("</section>")[0]


def test_a_chat_is_asked_its_whole_conversation(chat):
    run, _ = chat
    rows = pq.read_table(run.output("evaluate/answers.parquet")).to_pylist()
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant", "user"]
    assert rows[0]["messages"][0]["content"] == "Be brief." and rows[0]["prompt"] == rows[0]["messages"][-1]["content"]
    tuned = [row for row in rows if row["system"] == "tuned"]
    model, tokenizer = load(run.output("train/merged"))
    limit = run.need("evaluate")["max_new_tokens"]
    assert [g.text for g in generate(model, tokenizer, [row["messages"] for row in tuned], limit)] == [row["answer"] for row in tuned]


def test_continued_pretraining_goes_through_all_phases(reading):
    run, output = reading
    assert states(output) == dict.fromkeys(PHASES, "done"), output
    evaluated, trained = run.need("evaluate"), run.need("train")
    assert [(s["system"], s["criterion"]) for s in evaluated["scores"]] == [("base", "perplexity"), ("tuned", "perplexity")]
    base, tuned = evaluated["scores"]
    assert tuned["value"] < base["value"] and tuned["low"] <= tuned["value"] <= tuned["high"]
    assert evaluated["verdicts"][0]["difference"] < 0
    records = pq.read_table(run.output("prepare/train.parquet")).to_pylist()
    assert trained["supervised_tokens"] == trained["tokens"] - 4 * len(records), "all tokens but the first of each text bear loss"
    assert trained["loss_on"] == "every token"
    served = run.need("serve")
    assert served["parity"] == {"verdict": "exact", "equal": 2, "asked": 2, "rows": []} and len(served["routes"]) == 4
    assert served["registered"]["same_files"] and "problem" not in served["registered"]
    rows = pq.read_table(run.output("evaluate/answers.parquet")).to_pylist()
    assert rows[0]["messages"] == [] and any(row["text"].startswith(rows[0]["prompt"]) for row in TEXTS)
    assert {row["system"] for row in rows} == {"base", "tuned"} and all(row["answer"] for row in rows)
    weights = pq.read_table(run.output("evaluate/item_scores.parquet")).to_pandas().query("system == 'tuned'")
    assert math.exp((weights.score * weights.tokens).sum() / weights.tokens.sum()) == pytest.approx(tuned["value"])
    assert "What the models write" in (run.path / "report.html").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"), [row["text"] for row in TEXTS], context=32)


def test_perplexity_is_transformers_own_loss(tmp_path):
    folder = tiny_model(tmp_path / "tiny", [row["text"] for row in TEXTS])
    model, tokenizer = load(folder)
    read = read_by(folder, TEXT_RECORDS, "last", "base", "tiny")
    total = 0.0
    for record in TEXT_RECORDS:
        ids = torch.tensor([[*tokenizer(record["response"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert read.perplexity == pytest.approx(math.exp(total / read.tokens.sum()), rel=1e-4)
    (row,) = score_table(read, [PERPLEXITY])
    assert row["value"] == pytest.approx(read.perplexity) and row["n"] == len(TEXTS)


def test_longer_than_the_context_is_read_in_windows(folder):
    """Each token is counted once, with at least half a context before it (after the first window)."""
    model, tokenizer = load(folder)
    record = {**TEXT_RECORDS[0], "response": " ".join(row["text"] for row in TEXTS)}
    ids = [*tokenizer(record["response"])["input_ids"], tokenizer.eos_token_id]
    assert len(ids) > 100
    (total,), (count,) = log_likelihoods(model, tokenizer, [record], "last")
    wanted = 0.0
    for start in range(0, len(ids) - 16, 16):
        window = torch.tensor([ids[start:start + 32]])
        labels = window.clone()
        if start:
            labels[0, :16] = -100
        with torch.no_grad():
            scored = int((labels[0, 1:] != -100).sum())
            wanted -= model(window, labels=labels).loss.item() * scored if scored else 0
    assert count == len(ids) - 1 and total == pytest.approx(wanted, rel=1e-4)


def test_only_answers_count_in_a_chat(folder):
    model, tokenizer = load(folder)
    turns = [{"role": "user", "content": "lamp?"}, {"role": "assistant", "content": "on"}]
    record = {"messages": turns, "response": "on", "prompt": "lamp?"}
    _, counts = log_likelihoods(model, tokenizer, [record], "last")
    assert counts.tolist() == [len(tokenizer("on")["input_ids"]) + 1], "the answer and the token that ends it"
    twice = {**record, "messages": [*turns, {"role": "user", "content": "and?"}, turns[1]]}
    model.config.max_position_embeddings = 256
    counts = [log_likelihoods(model, tokenizer, [twice], targets)[1][0] for targets in ("last", "all")]
    assert counts[1] == 2 * counts[0]


def test_a_lower_perplexity_is_better_and_a_higher_one_worse():
    items = [{"id": str(i), "group": str(i), "response": "x"} for i in range(40)]
    noise = np.random.default_rng(0).normal(0, 0.1, 40)
    low, high = (Likelihoods(name, "m", items, (nats + noise) * 5, np.full(40, 5), 0.1) for name, nats in (("tuned", 2.0), ("base", 2.5)))
    assert compare([high, low], [PERPLEXITY], seed=1)[0]["verdict"] == "better"
    low.system, high.system = "base", "tuned"
    (row,) = compare([high, low], [PERPLEXITY], seed=1)
    assert row["verdict"] == "worse" and row["difference"] == pytest.approx(0.5)
    answers = [Answers(name, "m", items, [text] * 40, ["stop"] * 40, 0.1) for name, text in (("base", "y"), ("tuned", "x"))]
    both = compare([*answers, high, low], [EXACT, PERPLEXITY], seed=1)
    assert [(row["criterion"], row["verdict"]) for row in both] == [("exact_match", "better"), ("perplexity", "worse")]


@pytest.mark.parametrize("values, approach, words", [
    ({"metric": "exact_match"}, "continued_pretraining", "has none"),
    ({"metric": "json_valid", "better_than": "base"}, "continued_pretraining", "has none"),
    ({"metric": "exact_match", "better_than": "base+K"}, "chat", "base+K"),
])
def test_wrong_combinations_are_refused(values, approach, words):
    with pytest.raises(BadInput, match="plan.criteria.0") as error:
        check_criteria([Criterion(**values)], approach)
    assert words in str(error.value)


def test_a_wrong_combination_stops_the_command_before_anything_runs(tmp_path):
    write_engagement(tmp_path, TEXTS, approach="continued_pretraining", system="null", targets="last", criteria="[{metric: exact_match}]")
    output = finetune_accel("run", "mine.yaml", "--run-dir", tmp_path / "runs/mine", cwd=tmp_path, code=2)
    assert "plan.criteria.0" in output and not (tmp_path / "runs/mine/plan.json").exists()


def test_systems_asked_by_approach():
    row = {"prompt": "p", "response": "r", "id": "1", "label": "", "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}
    form = {"system_prompt": None, "targets": "last"}
    assert list(asked_of_base([row], [row], {**form, "approach": "supervised"}, 5, 1)) == ["base", "base+K", "base+K nearest"]
    assert list(asked_of_base([row], [row], {**form, "approach": "supervised"}, 0, 1)) == ["base"]
    assert list(asked_of_base([row], [row], {**form, "approach": "chat"}, 5, 1)) == ["base"]
    assert asked_of_base([row], [row], {**form, "approach": "continued_pretraining"}, 5, 1) == {"base": ["p"]}


def test_dev_scores_while_training(tmp_path):
    model, tokenizer = load(tiny_model(tmp_path / "tiny", [row["text"] for row in TEXTS]))
    form = {"approach": "continued_pretraining", "system_prompt": None, "targets": "last"}
    score = dev_scorer(tokenizer, TEXT_RECORDS[:3], TEXT_RECORDS, form, [PERPLEXITY])
    sums, counts = log_likelihoods(model, tokenizer, TEXT_RECORDS[:3], "last")
    model.train()
    assert score(model, 1) == {"dev/perplexity": pytest.approx(math.exp(-sums.sum() / counts.sum()))} and model.training


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server in memory: (client of the app, its model and tokenizer)."""
    folder = tiny_model(tmp_path_factory.mktemp("served") / "tiny", [row["text"] for row in TEXTS])
    return TestClient(create_app(load_models(str(folder)))), load(folder)


def test_completions_go_on_with_the_raw_text(served):
    http, (model, tokenizer) = served
    text = "In the hall stands"
    wanted = generate(model, tokenizer, [text], 12)[0]
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)
    answer = client.completions.create(model="tiny", prompt=[text, text + " a"], max_tokens=12)
    assert answer.object == "text_completion" and [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text == wanted.text and answer.choices[0].finish_reason == wanted.finish_reason
    assert answer.usage.completion_tokens <= 24 and answer.usage.prompt_tokens == 2 * wanted.prompt_tokens + 1
    assert client.completions.create(model="tiny", prompt=text).usage.completion_tokens <= 16
    by_mlflow = http.post("/invocations", json={"prompt": text, "max_tokens": 12}).json()
    assert by_mlflow["choices"][0]["text"] == wanted.text
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt=text)


@pytest.mark.parametrize("field, value", [
    ("suffix", "x"), ("echo", True), ("best_of", 2), ("logprobs", 9), ("logit_bias", {}), ("stream", 1), ("n", 9), ("prompt", ""),
    ("prompt", []), ("prompt", [1, 2]), ("prompt", "a<|im_start|>system"), ("prompt", "lamp " * 3000), ("max_completion_tokens", 4),
    ("temperature", "0"), ("stop", [""]), ("prompt", "\ud800"),
])
def test_completions_refuse_by_name_what_they_do_not_do(served, field, value):
    body = json.dumps({"prompt": "In the hall", "max_tokens": 4, field: value})
    answer = served[0].post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and field in answer.json()["error"]["message"], answer.text


def test_a_model_without_template_completes_texts_and_refuses_messages(tmp_path):
    folder = tiny_model(tmp_path / "tiny", [row["text"] for row in TEXTS])
    (folder / "chat_template.jinja").unlink()
    http = TestClient(create_app(load_models(str(folder))))
    assert http.post("/v1/completions", json={"prompt": "In the hall", "max_tokens": 4}).status_code == 200
    refused = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert refused.status_code == 400 and "no chat template" in refused.json()["error"]["message"]
