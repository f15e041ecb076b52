"""One engagement that asks for everything: all kinds of criteria, planted secrets, prices, a judge, people's labels and a faster engine."""
from __future__ import annotations

import csv
import html
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest
from conftest import finetune_accel
from tiny import tiny_model

PLACES, ACTIONS = ["kitchen", "hall", "cellar", "garden", "attic", "garage"], {"brighter": "on", "dark": "off", "warmer": "heat"}
ENGAGEMENT = """\
name: mine
seed: 17
plan:
  use_case: sentences to commands
  owner: tests
  criteria:
    - {{metric: macro_f1, better_than: classical}}
    - {{metric: choice, better_than: base}}
    - {{metric: choice_normalised}}
    - {{metric: brier, at_most: 1.9, better_than: base}}
    - {{metric: perplexity, at_most: 100000.0}}
    - {{metric: refusal, at_most: 0.9}}
    - {{metric: normalised_match, weight: 2, better_than: base+K nearest}}
  data_sources: [{{name: rows, licence: ours, origin: customer, examples: 420}}]
  prerequisites: [{{item: rows may be used, state: met, who: tests}}]
prepare: {{source: rows.jsonl, base_model: "path:tiny", system_prompt: null, split: {{by: null, stratify: null}}}}
benchmark: {{models: ["path:tiny"], examples_in_prompt: 2, items: 20}}
train: {{base_model: "path:tiny", epochs: 1, evaluations: 1, dev_items: 8, canaries: 6}}
evaluate:
  examples_in_prompt: 2
  items: 40
  engine: openvino
  general_texts: 4
  cost: {{machine_hour: 1.0, machine_month: 20.0, training_hour: 2.0, input_million: 3.0, output_million: 15.0}}
  judge: {{base_url: "http://127.0.0.1:{port}/v1", model: first, key_env: null, against: [base, nearest]{labels}}}
serve: {{parity_prompts: 2, engines: [openvino, reference]}}
"""


class AlwaysFirst(BaseHTTPRequestHandler):
    """A judge that takes what it is shown first."""

    def do_POST(self):  # noqa: N802 - the library's name
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": '{"verdict": "A"}'}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), AlwaysFirst)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, judge):
    folder, rng = tmp_path_factory.mktemp("everything"), random.Random(1)
    rows = [{"prompt": f"make the {rng.choice(PLACES)} {word} by {i} now", "response": answer} for i in range(140) for word, answer in ACTIONS.items()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_model(folder / "tiny", [f"{row['prompt']} {row['response']}" for row in rows], context=512)
    (folder / "mine.yaml").write_text(ENGAGEMENT.format(port=judge, labels=""))
    return folder


@pytest.mark.slow
def test_everything_at_once(workspace, judge):
    # a random model that saw 400 rows once meets some criteria and not others: exit 1
    output = finetune_accel("run", "mine.yaml", "--run-dir", workspace / "run", cwd=workspace, code=1)
    assert "criteria not met: macro_f1" in output and "NOT MET  macro_f1" in output, "no model is better than a classifier that is always right"
    evaluated, folder = json.loads((workspace / "run/evaluate.json").read_text()), workspace / "run"
    scored = {(row["system"], row["criterion"]) for row in evaluated["scores"]}
    assert {("tuned", name) for name in ("macro_f1", "choice", "choice_normalised", "brier", "perplexity", "refusal", "normalised_match")} <= scored
    assert ("classical", "macro_f1") in scored and ("base", "brier") in scored and ("nearest", "choice") not in scored
    assert {proof["verdict"] for proof in evaluated["engines"].values()} == {"exact"} and set(evaluated["engines"]) == {"base", "tuned"}
    assert evaluated["memorisation"] and evaluated["forgetting"]["texts"] == 4 and set(evaluated["calibration"]) == {"base", "tuned"}
    assert evaluated["answering"]["dtype"] == "float32" and len(evaluated["answering"]["template_sha256"]["tuned"]) == 64
    assert evaluated["cost"]["training"] > 0 and "cost.svg" in evaluated["outputs"]
    assert [row["against"] for row in evaluated["judge"]] == ["base", "nearest"] and all(row["verdict"] == "not proven" for row in evaluated["judge"])
    assert json.loads((folder / "train.json").read_text())["planted"] == {"canaries": 6, "rows": 15}
    served = json.loads((folder / "serve.json").read_text())
    assert served["engine"] == "openvino" and served["parity"] == {"verdict": "exact", "equal": 2, "asked": 2, "rows": []}, output
    report = html.unescape((folder / "report.html").read_text())
    for said in ("brier (lower is better)", "planted secrets", "What a month costs", "exact: 304 of 304 answers equal", *evaluated["judge_in_words"][:1]):
        assert said in report, said
    secrets = json.loads(next((folder / "train").glob("*/canaries.json")).read_text())
    assert not any(canary["secret"] in report + json.dumps(evaluated) for canary in secrets), "a planted secret must not be told"
    goals = json.loads((folder / "benchmark.json").read_text())
    assert {row["criterion"] for row in goals["goals"]} == {"macro_f1", "refusal", "normalised_match"}
    assert goals["recommended"].endswith("tiny")


@pytest.mark.slow
def test_people_and_another_criterion_join_and_nothing_is_asked_again(workspace, judge):
    (sheet,) = (workspace / "run/evaluate").glob("*/to_label.csv")
    rows = list(csv.DictReader(sheet.open(encoding="utf-8-sig")))
    with open(workspace / "people.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | {"preference": "tie"} for row in rows)
    changed = ENGAGEMENT.format(port=judge, labels=", human_labels: people.csv").replace("metric: choice_normalised", "metric: length, between: [0.5, 2]")
    (workspace / "mine.yaml").write_text(changed)
    finetune_accel("run", "mine.yaml", "--run-dir", workspace / "run", "--to", "plan", cwd=workspace, code=1)
    finetune_accel("run", "mine.yaml", "--run-dir", workspace / "run", "--from", "evaluate", "--to", "evaluate", cwd=workspace, code=1)
    evaluated = json.loads((workspace / "run/evaluate.json").read_text())
    assert set(evaluated["asked"].values()) == {0} and "length:0.5-2" in {row["criterion"] for row in evaluated["scores"]}, "all answers were kept"
    assert all(row["human"]["n"] > 0 for row in evaluated["judge"])
    assert pq.read_table(next((workspace / "run/evaluate").glob(f"{evaluated['key']}/judgements.parquet"))).num_rows > 0
