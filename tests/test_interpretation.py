"""What a result means: slices that got worse, models that are degenerate, kinds of mistakes, and the paragraph about it."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr

from finetune_accel.core import slices
from finetune_accel.core.degenerate import degenerate
from finetune_accel.core.errors import BadInput
from finetune_accel.core.interpretation import verdict_paragraph
from finetune_accel.core.mistakes import EMPTY, NO_LABEL, UNLIKE, changed_answers, confused, confusion, diff_html, error_clusters, given_labels
from finetune_accel.core.slices import label_effect, length_effect, proven_worse, slice_bars, slice_table, slices_of
from finetune_accel.core.statistics import bootstrap_difference, sign_flip_p, verdict

KEYS = ("label", "prompt length", "answer length")
LABELS = np.repeat([f"L{i:02}" for i in range(30)], [25, 25, *[20] * 22, *[18] * 5, 20])


def six_hundred(random):
    """Return 600 items of 30 labels with prompts of 3 to 14 words and answers of 1 to 8."""
    words = random.integers(3, 15, 600), random.integers(1, 9, 600)
    return [{"id": str(i), "group": str(i), "label": str(label), "prompt": "w " * p, "response": "w " * a}
            for i, (label, p, a) in enumerate(zip(LABELS, *words))]


def exactly(random, right, of=25):
    """Return `of` scores of which `right` are 1, in random order."""
    return random.permutation(np.repeat([1.0, 0.0], [right, of - right]))


def planted(seed, churn):
    """Return items and two systems' scores, 90 % right, with label L00 at 40 % and label L01 risen by as many items.

    `churn` is the share of other items that the new system answers anew; 1.0 makes the systems independent.
    """
    random = np.random.default_rng(seed)
    theirs = (random.random(600) < 0.9).astype(float)
    ours = np.where(random.random(600) < churn, random.random(600) < 0.9, theirs).astype(float)
    theirs[:25], ours[:25] = exactly(random, 23), exactly(random, 10)
    ours[25:50] = exactly(random, 23)
    theirs[25:50] = exactly(random, 10)
    others = np.arange(50, 600)
    surplus = int(ours[others].sum() - theirs[others].sum())  # the mean is made exactly equal
    movable = [i for i in random.permutation(others) if (ours[i] == 1) == (surplus > 0) and ours[i] != theirs[i]][:abs(surplus)]
    ours[movable] = 1 - ours[movable]
    assert ours.mean() == theirs.mean()
    return six_hundred(random), ours, theirs


@pytest.fixture
def quick(monkeypatch):
    """Fewer resamples: p is needed around 0.05 only."""
    monkeypatch.setattr(slices, "RESAMPLES", 1_000)


@pytest.mark.parametrize("churn", [0.2, 1.0])
def test_a_loss_on_one_slice_that_the_mean_hides_is_found_and_named(quick, churn):
    found, named_wrongly = 0, 0
    for seed in range(100):
        items, ours, theirs = planted(seed, churn)
        worse = [row["slice"] for row in proven_worse(slice_table(items, range(600), ours, theirs, KEYS, seed))]
        found += worse[:1] == ["label: L00"]
        named_wrongly += bool(set(worse) - {"label: L00"})
    assert verdict(bootstrap_difference(ours, theirs, range(600), 0), sign_flip_p(ours, theirs, range(600), 0)) == "not proven"
    assert found >= 95 and named_wrongly <= 5, (found, named_wrongly)


@pytest.mark.parametrize("size", [1, 4])
def test_equal_systems_have_no_worse_slice(quick, size):
    """Also where items come in clusters of four that are right or wrong together."""
    named, clusters = 0, np.arange(600) // size
    for seed in range(100):
        random = np.random.default_rng(seed)
        ours, theirs = ((random.random(600) < 0.9).astype(float)[clusters] for _ in range(2))
        named += bool(proven_worse(slice_table(six_hundred(random), clusters, ours, theirs, KEYS, seed)))
    assert named <= 5, named


def test_items_that_are_alike_count_once():
    items = [{"label": "a" if i < 20 else "b", "prompt": "p", "response": "r"} for i in range(40)]
    lost = np.repeat([0.0, 1.0], 20)
    assert slice_table(items, range(40), lost, np.ones(40), ["label"])[0]["verdict"] == "worse"
    row = slice_table(items, np.arange(40) // 5, lost, np.ones(40), ["label"])[0]
    assert (row["verdict"], row["groups"], row["low"], row["n"]) == ("too few", 4, None, 20)


def test_slices_need_a_key_that_divides():
    items = six_hundred(np.random.default_rng(0))
    for key, words in [("group", "which items are alike"), ("id", "600 values for 600 items"), ("colour", "is not a field")]:
        with pytest.raises(BadInput, match=words):
            slices_of(items, [key])
    one = [{"label": None, "prompt": "a b", "response": "c"}] * 8
    assert slices_of(one, KEYS) == {} and slice_table(one, range(8), np.ones(8), np.ones(8), KEYS) == []
    masks = slices_of(items, ["prompt length"])
    assert sum(mask.astype(int) for mask in masks.values()).tolist() == [1] * 600, "each item is in one third"


def test_a_conversation_is_as_long_as_what_was_said_in_it():
    turns = [("system", "be very brief please"), ("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "the answer is not counted")]
    assert slices.asked_words({"messages": [{"role": r, "content": c} for r, c in turns], "prompt": "d"}) == 4
    assert slices.asked_words({"messages": [], "prompt": "one two"}) == 2


def test_length_effect_is_spearmans_and_its_interval_covers_clusters():
    random = np.random.default_rng(3)
    items, scores = six_hundred(random), random.random(600)
    effect = length_effect(items, range(600), scores)
    assert np.isclose(effect.value, spearmanr([slices.asked_words(item) for item in items], scores).statistic)
    assert effect.low < 0 < effect.high and abs((effect.high - effect.low) / 2 - 1.96 / np.sqrt(599)) < 0.01
    twice = [item for item in items[:150] for _ in range(4)]
    wide = length_effect(twice, np.repeat(range(150), 4), np.repeat(scores[:150], 4))
    alone = length_effect(items[:150], range(150), scores[:150])
    assert np.allclose(wide, alone, atol=0.02), "four copies of an item tell what one tells"
    assert length_effect(items, ["one"] * 600, scores) is None


def test_labels_are_ranked_by_what_is_sure():
    items = [{"label": label} for label in ["rare"] + ["bad"] * 40 + ["good"] * 40]
    rows = label_effect(items, range(81), np.repeat([0.0, 0.2, 1.0], [1, 40, 40]))
    assert [row["label"] for row in rows] == ["bad", "rare", "good"] and rows[0]["low"] < 0.2 < rows[0]["high"]


def test_the_figure_shows_judged_slices_only():
    import matplotlib.pyplot as plt

    items, ours, theirs = planted(0, 0.2)
    rows = slice_table(items, range(600), ours, theirs, KEYS)
    figure = slice_bars([*rows, {**rows[0], "verdict": "too few", "low": None, "high": None}], "tuned", "base")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[0] == "label: L00 (25)" and len(names) == 20
    plt.close(figure)
    plt.close(slice_bars([], "tuned", "base"))


# Degenerate models

INTENTS = [json.dumps({"intent": f"Do{i % 7}", "area": ["hall", "attic", "kitchen"][i % 3]}) for i in range(100)]
PROMPTS = [f"please do the thing number {i}" for i in range(100)]


def kinds(texts, finish="stop", references=INTENTS):
    return {f.kind: f for f in degenerate(texts, [finish] * len(texts), references, PROMPTS)}


@pytest.mark.parametrize("texts, finish, kind", [
    ([INTENTS[0]] * 100, "stop", "same answer"),
    (["I do not know.", *[f"I do not know{'.' * (i % 3)}" for i in range(99)]], "stop", "same answer"),
    ([""] * 60 + INTENTS[60:], "stop", "empty answers"),
    ([f"{i} is the one and " * 20 for i in range(100)], "length", "endless repetition"),
    (["{" * 80 + str(i) for i in range(100)], "length", "endless repetition"),
    ([text[:25] + str(i) for i, text in enumerate(INTENTS)], "length", "cut at the limit"),
    ([prompt.capitalize() + "!" for prompt in PROMPTS], "stop", "prompt copied back"),
    ([f"I’m sorry, but I cannot do {i}." for i in range(30)] + INTENTS[30:], "stop", "refusals"),
])
def test_a_degenerate_model_is_named_with_share_example_and_remedy(texts, finish, kind):
    finding = kinds(texts, finish)[kind]
    hits = {"empty answers": 0.6, "refusals": 0.3}.get(kind, 1.0)
    assert abs(finding.share - hits) < 0.011 and finding.says.startswith(f"{round(100 * finding.share)} of 100 answers") and finding.fix
    assert bool(finding.example) == (kind != "empty answers")


def test_always_the_majority_label_is_found_although_nine_of_ten_are_right():
    references = ["on"] * 90 + ["off"] * 10
    assert list(kinds(["on"] * 100, references=references)) == ["same answer"]
    assert list(kinds(["on"] * 99 + ["off"], references=references)) == ["same answer"], "nearly always"
    assert kinds(["on"] * 95 + ["off"] * 5, references=references) == {}, "it tells half of the rare ones"


@pytest.mark.parametrize("references", [
    INTENTS,
    ["on"] * 97 + ["off"] * 3,
    ["on"] * 100,
    [f"{'very ' * 40}long text {i}" for i in range(100)],
    [f"I'm sorry, order {i} cannot be changed." for i in range(100)],
    PROMPTS,
])
def test_a_healthy_model_has_no_finding(references):
    texts = [*references[:-2], "", "something else"]
    assert kinds(texts, references=references) == {}
    assert degenerate(references, ["length", *["stop"] * 99], references, PROMPTS) == [] == degenerate([], [], [], [])


# Mistakes


def test_a_diff_is_escaped_and_rebuilds_both_texts():
    wanted, given = '{"a": "<b>", "c": 12}', '{"a": "<i>", "c": 13, "d": "&"}'
    diff = diff_html(wanted, given)
    assert "<b>" not in diff and "<i>" not in diff and "&lt;" in diff
    import html

    def without(tag):
        return html.unescape(re.sub(r"</?(ins|del)>", "", re.sub(rf"<{tag}>.*?</{tag}>", "", diff)))

    assert without("ins") == wanted and without("del") == given
    assert len(diff_html("a " * 10_000, "b " * 10_000)) < 40_000


def test_changed_answers_come_worst_first():
    items = [{"id": str(i), "group": "g", "label": "x", "prompt": f"p{i}", "response": "turn the lamp on"} for i in range(4)]
    tuned = SimpleNamespace(items=items, texts=["turn the lamp off", "<script>", "turn", "turn the lamp on"])
    base = SimpleNamespace(items=items, texts=["turn the lamp on"] * 3 + ["no"])
    changed = changed_answers(tuned, base, np.array([0.5, 0, 0, 1.0]), np.array([1, 1, 1, 0.0]))
    assert [row["prompt"] for row in changed["right to wrong"]] == ["p1", "p2", "p0"]
    assert [row["change"] for row in changed["wrong to right"]] == [1.0] and "<del>" in changed["wrong to right"][0]["diff"]
    assert "<script>" not in changed["right to wrong"][0]["diff"]
    assert len(changed_answers(tuned, base, np.zeros(4), np.ones(4), at_most=2)["right to wrong"]) == 2


def test_confusions_are_counted_and_said():
    items = [{"label": label, "prompt": "p", "response": json.dumps({"intent": label})} for label in ["on"] * 4 + ["off"] * 2]
    given = given_labels(items, ['{"intent": "on"}'] + ['{"intent": "off"}'] * 3 + ["[1]", '{"intent": null}'])
    assert given == ["on", "off", "off", "off", NO_LABEL, NO_LABEL]
    labels, table = confusion([item["label"] for item in items], given)
    assert labels == ["off", "on", NO_LABEL] and table.tolist() == [[0, 0, 2], [3, 1, 0], [0, 0, 0]]
    assert confused([item["label"] for item in items], given) == ["on was wanted and off given: 3 of 4", "off was wanted and no label given: 2 of 2"]
    assert given_labels([{**items[0], "label": None}], ["x"]) is None is given_labels([], [])


def test_wrong_answers_without_labels_fall_into_named_kinds():
    items, texts = [], []
    for i in range(12):
        items += [{"prompt": "p", "response": f"Order number {i} ships on Monday from Bonn."}] * 3
        texts += [f"Order number {i} ships on {rest}" for rest in ("Tuesday from Bonn.", "Monday.", "Monday from Bonn.")]
    texts[-3:] = ["", "An answer about something else entirely, which nobody asked for", texts[-1]]
    scores = np.array([float(text == item["response"]) for text, item in zip(texts, items)])
    rows = error_clusters(items, texts, scores)
    assert [(row["name"], row["count"]) for row in rows[:2]] in (
        [("adds “tuesday”, misses “monday”", 11), ("misses “bonn”, misses “from”", 11)],
        [("misses “bonn”, misses “from”", 11), ("adds “tuesday”, misses “monday”", 11)])
    assert {row["name"]: row["count"] for row in rows[2:]} == {EMPTY: 1, UNLIKE: 1} and rows[-1]["name"] == UNLIKE
    assert len(rows[0]["examples"]) == 3 and abs(sum(row["share"] for row in rows) - 24 / 36) < 1e-9


# Calibration


def score_rows(*systems):
    return [{"system": system, "model": "m", "criterion": "exact_match", "value": 0.5, "low": 0.4, "high": 0.6, "n": 400, "failed": 0}
            for system in systems]


def met(criterion="exact_match", kept=True, **changed):
    return {"criterion": criterion, "value": 0.7, "low": 0.65, "high": 0.75, "at_least": 0.6, "at_most": None, "better_than": "base",
            "verdict": "better", "met": kept, **changed}


def against(found="better", system="base", criterion="exact_match", difference=0.2):
    gap = {"better": difference, "worse": -difference, "not proven": difference / 10}[found]
    return {"criterion": criterion, "system": "tuned", "against": system, "difference": gap, "low": gap - 0.05, "high": gap + 0.05, "p": 0.01,
            "verdict": found}


WORSE = {"slice": "label: TurnOff", "n": 25, "groups": 25, "ours": 0.4, "theirs": 0.9, "difference": -0.5, "low": -0.7, "high": -0.3, "p": 0.001,
         "verdict": "worse"}
SAME = degenerate(["on"] * 100, ["stop"] * 100, ["on"] * 90 + ["off"] * 10, ["p"] * 100)
MANY = ["json_valid", "json_field:intent", "exact_match", "fuzzy", "regex", "sql"]


READ = met("perplexity", value=11.0, low=10.0, high=12.0, at_least=None, at_most=13.0)
READS_BETTER = {**against("worse", criterion="perplexity", difference=0.5), "verdict": "better"}  # lower is better
FOLLOWED = [against("worse", "nearest"), against("not proven", "base+K")]


@pytest.mark.parametrize("rows, verdicts, findings, parts, words", [
    ([met()], [against()], [], [],
     ["1 of 1 success criteria is met", "70 %, or 65 % to 75 %", "20 points more than the untuned model (+15 to +25)",
      "try the model with a few users"]),
    ([met(kept=False)], [against("not proven")], [], [],
     ["none of 1 success criteria is met", "which chance could explain", "Not proven", "collect more test items"]),
    ([met("json_valid"), met(kept=False)], [against(criterion="json_valid"), against("not proven")], [], [WORSE],
     ["1 of 2 success criteria is met", "Worse on label: TurnOff: score 0.40 instead of 0.90", "add training examples for label: TurnOff"]),
    ([met()], [against()], SAME, [],
     ["Do not rely on the scores of the tuned model: 100 of 100 answers are the same", "“on”", "Next: balance the labels"]),
    ([met(kept=False)], [against("worse", "nearest"), against("worse", "classical", difference=0.3), against("not proven")], [], [],
     ["A classical classifier is better than the tuned model on exact match", "30 points fewer", "Next: use a classical classifier as it stands"]),
    ([READ], [READS_BETTER], [], [],
     ["Perplexity is met: 11.00, or 10.00 to 12.00", "at most 13.00 was asked", "-39 % against the untuned model"]),
    ([met(name, kept=i % 2 == 0) for i, name in enumerate(MANY)], [*(against(criterion=name) for name in MANY), *FOLLOWED], SAME, [WORSE],
     ["3 of 6 success criteria are met", "json valid (70 %, or 65 % to 75 %)", "sql"]),
])
def test_the_paragraph_says_what_matters_in_five_to_eight_plain_sentences(rows, verdicts, findings, parts, words):
    said = verdict_paragraph("home-intents", rows, score_rows("base", "tuned"), verdicts, findings, parts, groups=113)
    for word in ["400 test items from 113 groups", "the tuned model was compared with the untuned model", *words]:
        assert word in said, said
    assert 5 <= len(re.findall(r"[.](?= |$)", said)) <= 8, said
    assert not re.search(r"\bp\b|p-value|bootstrap|resampl|confidence|Holm|interval|_", said), said
    if findings:
        assert said.startswith("Do not rely"), "first of all"


def test_a_small_fault_is_named_without_condemning_the_scores():
    empty = degenerate([""] * 10 + INTENTS[10:], ["stop"] * 100, INTENTS, PROMPTS)
    said = verdict_paragraph("x", [met()], score_rows("base", "tuned"), [against()], empty)
    assert said.startswith("The tuned model has a fault that its scores do not show: 10 of 100 answers are empty.") and "Do not rely" not in said
