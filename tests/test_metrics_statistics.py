"""Scores and verdicts: what they answer, and how often they are wrong."""

import numpy as np
import pytest

from finetune_accel.core.criteria import Criterion
from finetune_accel.core.errors import BadInput
from finetune_accel.core.metrics import count_failed, parse_json, score, score_all
from finetune_accel.core.statistics import (
    Interval,
    bootstrap_difference,
    design_effect,
    detectable_difference,
    holm,
    mean_interval,
    perplexity_interval,
    score_rows,
    sign_flip_p,
    verdict,
    verdict_rows,
)

EXACT, VALID, INTENT = (
    Criterion(metric="exact_match"),
    Criterion(metric="json_valid"),
    Criterion(metric="json_field", field="intent"),
)


@pytest.mark.parametrize(
    "criterion, answer, reference, expected",
    [
        (EXACT, '{"b": 1, "a": 2}', '{"a": 2, "b": 1}', 1),
        (EXACT, '{"a": 1.0}', '{"a": 1}', 1),
        (EXACT, '{"a": true}', '{"a": 1}', 0),
        (EXACT, '{"a": "1"}', '{"a": 1}', 0),
        (EXACT, " Paris\n", "Paris", 1),
        (EXACT, "paris", "Paris", 0),
        (EXACT, "", "", 0),
        (EXACT, '{"a": 2}{"a": 2}', '{"a": 2}', 0),
        (EXACT, "[1, 2]", "[2, 1]", 0),
        (EXACT, '"Paris"', "Paris", 0),
        (VALID, "{}", "", 1),
        (VALID, "Sure: {}", "{}", 0),
        (VALID, '{"a": NaN}', "{}", 0),
        (VALID, "-Infinity", "{}", 0),
        (VALID, "1e999", "{}", 0),
        (VALID, "9" * 5000, "{}", 0),
        (VALID, "[" * 200_000, "[]", 0),
        (VALID, "\ud800", "{}", 0),
        (INTENT, '{"intent": "A", "x": 1}', '{"intent": "A"}', 1),
        (INTENT, '{"intent": "B"}', '{"intent": "A"}', 0),
        (INTENT, '["A"]', '{"intent": "A"}', 0),
        (INTENT, "{}", '{"intent": "A"}', 0),
        (INTENT, '{"x": 1}', '{"y": 2}', 1),
        (INTENT, '{"intent": null}', "{}", 0),
        (INTENT, '{"intent": 1}', '{"intent": true}', 0),
    ],
)
def test_score(criterion, answer, reference, expected):
    assert score(criterion, answer, reference) == expected


def test_deep_nesting_is_no_crash_and_no_json():
    for text in ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000]:
        assert (
            score(VALID, text, "{}")
            == score(EXACT, text, "{}")
            == score(INTENT, text, '{"intent": 1}')
            == 0.0
        )
        with pytest.raises(ValueError):
            parse_json(text)


def test_score_all_keeps_every_item_and_names_a_hopeless_criterion():
    scores = score_all([EXACT, VALID], ["", "{}"], ["{}", "{}"])
    assert scores["exact_match"].tolist() == [0, 1] and scores["json_valid"].shape == (2,)
    assert count_failed(["", " \n", "x"]) == 2
    with pytest.raises(BadInput, match="json_field:intent"):
        score_all([INTENT], ["Paris"], ["Paris"])
    with pytest.raises(ValueError, match="1 answers"):
        score_all([EXACT], ["{}"], ["{}", "{}"])


@pytest.mark.parametrize(
    "right, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_newcombes_table(right, n, low, high):
    """Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3."""
    interval = mean_interval(np.repeat([1.0, 0.0], [right, n - right]), range(n))
    assert interval == pytest.approx((right / n, low, high), abs=5e-5)


def test_clusters_widen_the_interval_as_if_there_were_fewer_items():
    scores, names = np.repeat([1.0, 0.0] * 30, 5), np.repeat([f"t{i}" for i in range(60)], 5)
    clustered, alone = mean_interval(scores, names), mean_interval(scores[::5], range(60))
    assert design_effect(scores, names) == pytest.approx(5, rel=0.02)
    assert list(clustered) == pytest.approx(list(alone), abs=0.004)  # Student's t of 59 is 2 % wider than of 299
    assert design_effect(scores, ["one"] * 300) == 300 and design_effect(np.ones(300), names) == 1.0
    with pytest.raises(ValueError):
        mean_interval(np.array([]), [])


def test_bootstrap_and_p_value_agree_with_the_normal_theory():
    random = np.random.default_rng(0)
    difference = random.normal(0.1, 1.0, 400)
    interval = bootstrap_difference(difference, np.zeros(400), range(400), seed=3)
    error = difference.std() / 20
    assert interval == pytest.approx(
        (difference.mean(), difference.mean() - 1.96 * error, difference.mean() + 1.96 * error), abs=0.01
    )
    assert bootstrap_difference(difference, np.zeros(400), range(400), seed=3) == interval
    assert sign_flip_p(np.ones(10), np.zeros(10), range(10), seed=0) == pytest.approx(2 / 2**10, abs=1e-3)
    assert sign_flip_p(np.ones(10), np.zeros(10), [0] * 10, seed=0) == 1.0  # one cluster proves nothing


def test_perplexity_weighs_by_tokens_and_its_interval_by_clusters():
    random = np.random.default_rng(0)
    tokens = random.integers(5, 50, 200)
    surprise = tokens * random.normal(2.0, 0.5, 200).clip(0.1)
    value, low, high = perplexity_interval(surprise, tokens, range(200))
    assert value == pytest.approx(np.exp(surprise.sum() / tokens.sum())) and low < value < high
    residual = surprise - tokens * np.log(value)  # the ratio's standard error, by the delta method
    error = np.sqrt((residual**2).sum()) / tokens.sum()
    assert (np.log(low), np.log(high)) == pytest.approx((np.log(value) - 1.96 * error, np.log(value) + 1.96 * error), abs=0.01)
    wide = perplexity_interval(surprise, tokens, np.repeat(range(10), 20))
    assert wide.value == pytest.approx(value)
    alike = perplexity_interval(np.repeat(surprise[:10], 20), np.repeat(tokens[:10], 20), np.repeat(range(10), 20))
    ten = perplexity_interval(surprise[:10], tokens[:10], range(10))
    assert alike == pytest.approx(ten), "twenty copies of an item are one item"
    with pytest.raises(ValueError, match="no items"):
        perplexity_interval(np.array([]), np.array([]), [])


def test_lower_is_better_where_it_is_said():
    assert verdict(Interval(-0.2, -0.3, -0.1), 0.01, lower_is_better=True) == "better"
    assert verdict(Interval(0.2, 0.1, 0.3), 0.01, lower_is_better=True) == "worse"
    assert verdict(Interval(-0.2, -0.3, 0.1), 0.01, lower_is_better=True) == "not proven"
    scores = {"tuned": {"p": np.linspace(1, 2, 50)}, "base": {"p": np.linspace(1, 2, 50) + 0.3}}
    rows = [verdict_rows([("p", "tuned", "base")], scores, range(50), 1, names)[0]["verdict"] for names in ((), ("p",))]
    assert rows == ["worse", "better"]


def test_verdicts():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([0.5, 0.6]) == [1.0, 1.0]
    assert verdict(Interval(0.1, 0.0, 0.2), 0.001) == "not proven"
    low, high = np.repeat([0.0, 1.0], [70, 30]), np.repeat([0.0, 1.0], [30, 70])
    scores = {"tuned": {"e": high, "v": low}, "base": {"e": low, "v": low}}
    rows = verdict_rows([("e", "tuned", "base"), ("v", "tuned", "base")], scores, range(100), seed=17)
    assert [row["verdict"] for row in rows] == ["better", "not proven"]
    assert list(rows[0]) == ["criterion", "system", "against", "difference", "low", "high", "p", "test", "verdict"]
    assert rows[0]["difference"] == pytest.approx(0.4) and rows[0]["p"] == pytest.approx(2 / 10_001, rel=1)
    table = score_rows("tuned", "smol", scores["tuned"], range(100), failed=3)
    assert list(table[0]) == ["system", "model", "criterion", "value", "low", "high", "n", "failed"]
    assert (table[0]["value"], table[0]["n"], table[0]["failed"]) == (0.7, 100, 3)


def test_no_false_better_in_a_a_comparisons(monkeypatch):
    """Two samples of the same clustered system: a verdict in at most 5 % (plus the margin of 300 trials)."""
    monkeypatch.setattr("finetune_accel.core.statistics.RESAMPLES", 1_000)
    random, clusters, verdicts = np.random.default_rng(1), np.repeat(range(40), 4), []
    for trial in range(300):
        rate = random.beta(1, 1, 40).repeat(4)
        one, two = (random.random((2, 160)) < rate).astype(float)
        verdicts.append(
            verdict_rows([("e", "a", "b")], {"a": {"e": one}, "b": {"e": two}}, clusters, trial)[0]["verdict"]
        )
    assert sum(v != "not proven" for v in verdicts) <= 24


def test_detectable_difference():
    assert detectable_difference(400, 400) == pytest.approx(2.8016 * np.sqrt(0.5 / 400), abs=4e-3)  # and the allowances of exact tests
    assert (
        detectable_difference(500, 100)
        == detectable_difference(100, 100)
        > detectable_difference(500, 100, effect=2.0)
    )
    assert detectable_difference(1, 1) == 1.0
