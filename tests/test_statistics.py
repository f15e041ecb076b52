"""Intervals, tests and power against published values, closed forms and quick simulations; benchmarks/verdicts.py measures at length."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from finetune_accel.core import statistics
from finetune_accel.core.statistics import (
    Interval,
    bootstrap_difference,
    design_effect,
    detectable_difference,
    difference,
    exchange_p,
    holm,
    interval,
    macro_f1_measure,
    mcnemar_p,
    mean_interval,
    mean_measure,
    needed_items,
    perplexity_interval,
    perplexity_measure,
    score_rows,
    sign_flip_p,
    verdict_rows,
)


def paired(both: int, ours: int, theirs: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores of two systems from the four cells of their table."""
    cells = [both, ours, theirs, neither]
    return np.repeat([1.0, 1, 0, 0], cells), np.repeat([1.0, 0, 1, 0], cells)


@pytest.mark.parametrize(
    "cells, p",
    [
        ((101, 121, 59, 33), 0.000004),  # Vassar College's calculator, as quoted in statsmodels' tests
        ((101, 70, 59, 33), 0.378688),
        ((101, 80, 59, 33), 0.089452),
        ((101, 30, 60, 33), 0.002060),
        ((101, 10, 30, 33), 0.002221),
        ((101, 10, 10, 33), 1.0),
        ((794, 150, 86, 570), 0.000037),  # approval ratings, Agresti 1990, p. 350; chi-squared 17.3559, p 0.000031, without being exact
        ((5, 6, 0, 5), 0.03125),  # 2 / 2**6: six coins that show the same side
        ((5, 0, 0, 5), 1.0),
    ],
)
def test_mcnemar_equals_published_values(cells, p):
    ours, theirs = paired(*cells)
    assert mcnemar_p(ours, theirs) == mcnemar_p(theirs, ours) == pytest.approx(p, abs=6e-7)
    if cells[1] + cells[2]:
        assert mcnemar_p(ours, theirs) == pytest.approx(binomtest(cells[1], cells[1] + cells[2]).pvalue)


def test_mcnemar_is_for_right_or_wrong_and_independent_items_only():
    ours, theirs = paired(10, 20, 5, 10)
    fuzzy = np.clip(ours, 0.1, 0.9)

    def test_of(scores, clusters):
        (row,) = verdict_rows([("c", "a", "b")], {"a": {"c": scores}, "b": {"c": theirs}}, clusters, 1)
        return row["test"], row["p"]

    assert test_of(ours, range(45)) == ("McNemar", mcnemar_p(ours, theirs))
    assert test_of(ours, np.arange(45) // 3)[0] == test_of(fuzzy, range(45))[0] == "exchange"
    assert sign_flip_p(ours, theirs, range(45), 1) == pytest.approx(mcnemar_p(ours, theirs), abs=0.003), "exchanges estimate the exact value"


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),  # as many wrong as right are in the table: 0 of 29 is 0 to 0.1170
    ],
)
def test_independent_right_or_wrong_items_have_wilsons_interval(right, n, low, high):
    assert list(mean_interval(np.repeat([1.0, 0.0], [right, n - right]), range(n))) == pytest.approx([right / n, low, high], abs=5e-5)


def test_holm_equals_multtest():
    """R's multtest on ten p-values, and on thirty (the first eight of which stay below 0.1), as quoted in statsmodels' tests."""
    raw = [0.838541367553, 0.642193923795, 0.680845947633, 0.967833824309, 0.71626938238,
           0.177096952723, 5.23656777208e-05, 0.0202732688798, 0.00028140506198, 0.0149877310796]  # fmt: skip
    adjusted = [1, 1, 1, 1, 1, 1, 5.23656777208e-04, 0.1419128821586, 2.53264555782e-03, 0.1199018486368]
    assert holm(raw) == pytest.approx(adjusted)
    small = [0.00031612, 0.0003965, 0.00048442, 0.00051932, 0.00101436, 0.00121506, 0.0014516, 0.00265684]
    expected = [0.0094836, 0.0114985, 0.01356376, 0.01402164, 0.02637336, 0.0303765, 0.0348384, 0.06110732]
    assert holm([*small, *[0.5] * 22])[:8] == pytest.approx(expected)


def test_design_effect_by_hand():
    """Clusters (1, 1), (0, 0), (1, 0): residuals about 1/2 sum to 1, -1, 0; (1 + 1) * 3/2 over (6 * 1/4) * 6/5."""
    assert design_effect(np.array([1.0, 1, 0, 0, 1, 0]), ["x", "x", "y", "y", "z", "z"]) == pytest.approx(3 / 1.8)
    assert design_effect(np.array([1.0, 0, 1, 0]), ["x", "x", "y", "y"]) == 1.0, "less alike than strangers is luck"


def test_few_clusters_are_less_sure_of_their_spread():
    scores, clusters = np.repeat([1.0, 0.0] * 5, 8), np.repeat(range(10), 8)
    found = mean_interval(scores, clusters)
    normal = 10 * 9 / 10 * 80 / 79 * (1.9905 / 2.2622) ** 2  # clusters, G / (G - 1) and its like for items, t of 79 and of 9
    half = 1.95996 / (1 + 1.95996**2 / normal) * math.sqrt(0.25 / normal + 1.95996**2 / (4 * normal**2))
    assert found.high - found.low == pytest.approx(2 * half, rel=1e-3)
    one_wrong = mean_interval(np.repeat([0.0, 1.0], [1, 79]), clusters)
    assert mean_interval(np.ones(80), clusters).low > one_wrong.low, "a perfect score is not less sure than one with a mistake"
    assert mean_interval(np.array([1.0, 0.0]), [0, 0]).low < 0.1


def test_scores_between_right_and_wrong_have_students_interval():
    scores = np.random.default_rng(0).normal(0.5, 0.05, 60).clip(0, 1)
    half = 2.0010 * scores.std(ddof=1) / math.sqrt(60)  # t of 59
    assert list(mean_interval(scores, range(60))) == pytest.approx([scores.mean(), scores.mean() - half, scores.mean() + half], abs=5e-4)


def test_macro_f1_equals_scikit_learn_and_its_range_stays_within_bounds():
    from sklearn.metrics import f1_score

    random = np.random.default_rng(0)
    wanted = random.choice(list("aaabbcd"), 200)
    given = np.where(random.random(200) < 0.7, wanted, random.choice([*"abcd", "none of them"], 200))
    found = interval(macro_f1_measure(wanted.tolist(), given.tolist()), range(200))
    assert found.value == pytest.approx(f1_score(wanted, given, labels=list("abcd"), average="macro", zero_division=0))
    assert found.low < found.value < found.high
    perfect = interval(macro_f1_measure(wanted.tolist(), wanted.tolist()), np.arange(200) // 4)
    assert perfect == mean_interval(np.ones(200), range(200))
    nothing = interval(macro_f1_measure(wanted.tolist(), [""] * 200), range(200))
    assert nothing.value == 0.0 == nothing.low < nothing.high < 0.05


def test_measures_and_arrays_give_the_same_verdicts():
    random, clusters = np.random.default_rng(0), np.repeat(range(30), 3)
    ours, theirs = random.random((2, 90))
    assert difference(mean_measure(ours), mean_measure(theirs), clusters, 3) == bootstrap_difference(ours, theirs, clusters, 3)
    assert exchange_p(mean_measure(ours), mean_measure(theirs), clusters, 3) == sign_flip_p(ours, theirs, clusters, 3)
    table = {"a": {"c": ours}, "b": {"c": theirs}}
    measured = {name: {"c": mean_measure(scores["c"])} for name, scores in table.items()}
    assert verdict_rows([("c", "a", "b")], table, clusters, 3) == verdict_rows([("c", "a", "b")], measured, clusters, 3)
    assert score_rows("a", "m", table["a"], clusters, 0) == score_rows("a", "m", measured["a"], clusters, 0)


def test_macro_f1_and_perplexity_are_compared_on_the_same_draws():
    random, clusters = np.random.default_rng(0), np.repeat(range(40), 5)
    wanted = random.choice(list("abcd"), 200)
    good, poor = (np.where(random.random(200) < share, wanted, "a") for share in (0.95, 0.6))
    tokens, nats = random.integers(5, 50, 200), random.gamma(4, 0.5, 200)
    scores = {"a": {"f1": macro_f1_measure(wanted, good), "perplexity": perplexity_measure(nats * tokens, tokens)},
              "b": {"f1": macro_f1_measure(wanted, poor), "perplexity": perplexity_measure((nats + 0.3) * tokens, tokens)}}  # fmt: skip
    f1, perplexity = verdict_rows([("f1", "a", "b"), ("perplexity", "a", "b")], scores, clusters, 1)
    assert f1["verdict"] == perplexity["verdict"] == "better"
    assert perplexity["difference"] == pytest.approx(-0.3), "in nats a token"
    assert (perplexity["low"], perplexity["high"]) == pytest.approx((-0.3, -0.3)), "the same 0.3 in every text, however hard"
    row = score_rows("a", "m", scores["a"], clusters, 0)[1]
    assert row["value"] == pytest.approx(math.exp((nats * tokens).sum() / tokens.sum())) and row["low"] < row["value"] < row["high"]


def test_resampling_is_bounded_in_memory(monkeypatch):
    scores = np.random.default_rng(0).normal(0, 1, 50)
    whole = bootstrap_difference(scores, np.zeros(50), range(50), 1), sign_flip_p(scores, np.zeros(50), range(50), 1)
    monkeypatch.setattr(statistics, "AT_ONCE", 50 * 77)
    assert sum(statistics._chunks(50)) == statistics.RESAMPLES and max(statistics._chunks(50)) == 77
    pieces = bootstrap_difference(scores, np.zeros(50), range(50), 1), sign_flip_p(scores, np.zeros(50), range(50), 1)
    assert list(pieces[0]) == pytest.approx(list(whole[0])) and pieces[1] == pytest.approx(whole[1], abs=0.02)


def test_one_cluster_or_equal_answers_prove_nothing():
    ours, theirs = np.ones(10), np.zeros(10)
    assert sign_flip_p(ours, theirs, [0] * 10, 0) == 1.0 == sign_flip_p(ours, ours, range(10), 0)
    assert bootstrap_difference(ours, ours, range(10), 0) == Interval(0, 0, 0)
    assert perplexity_interval(ours, ours, [0] * 10) == pytest.approx((math.e, math.e, math.e))
    with pytest.raises(ValueError, match="no items"):
        interval(mean_measure([]), [])


@pytest.mark.parametrize("comparisons", [1, 12])
@pytest.mark.parametrize("items, groups, disagree", [(400, 400, 0.5), (400, 100, 0.2), (1000, 250, 1.3)])
def test_power_equals_its_closed_form(items, groups, disagree, comparisons):
    """The power of a difference less one item's worth, with as many clusters fewer as an estimated spread costs."""
    of = {"disagree": disagree, "comparisons": comparisons}
    z = norm.isf(0.025 / comparisons)
    n = groups - z**2
    for shares in (True, False):
        gap = detectable_difference(items, groups, shares=shares, **of)
        assert norm.sf(z - (gap - shares / n) / math.sqrt(disagree / n)) == pytest.approx(0.8)
        assert needed_items(gap, items, groups, shares=shares, **of) == 0
    more = needed_items(gap / 2, items, groups, shares=False, **of)
    assert more == math.ceil(round(3 * n * items / groups, 6)), "half the difference takes four times as many"
    with pytest.raises(ValueError, match="nothing"):
        needed_items(0.0, items, groups)


def test_power_at_the_edges():
    assert detectable_difference(1, 1) == detectable_difference(40, 2) == 1.0, "of so few clusters nothing can be said"
    assert detectable_difference(1, 1, shares=False) == math.inf and detectable_difference(9, 9, disagree=30.0, shares=False) > 1
    assert detectable_difference(4000, 4000) == pytest.approx(2.8016 * math.sqrt(0.5 / 4000), rel=0.01), "Miller, arXiv 2411.00640, section 5"
    assert needed_items(0.05, 300, 100, effect=1.5) < needed_items(0.05, 300, 100)


def test_promised_power_is_measured(monkeypatch):
    """400 tests of a difference that 200 items can just show: found in 80 % or more, less the margin of 400 trials."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    random, gap, found = np.random.default_rng(0), detectable_difference(200, 200), 0
    for trial in range(400):
        ours, theirs = paired(0, *random.multinomial(200, [0.25 + gap / 2, 0.25 - gap / 2, 0.5]))
        (row,) = verdict_rows([("c", "a", "b")], {"a": {"c": ours}, "b": {"c": theirs}}, range(200), trial)
        found += row["verdict"] == "better"
    assert found >= 0.76 * 400


def test_intervals_cover(monkeypatch):
    """300 samples of each kind: the truth lies inside in 95 %, give or take the margin of 300 trials."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    random, clusters, inside = np.random.default_rng(0), np.repeat(range(30), 4), np.zeros(3)
    for trial in range(300):
        rate = random.beta(4, 2, 30).repeat(4)
        wanted = random.choice(list("abc"), 120)
        given = np.where(random.random(120) < 0.8, wanted, np.array(list("bca"))[np.searchsorted(list("abc"), wanted)])
        tokens, nats = random.integers(5, 60, 120), random.gamma(9, 1 / 3, 30).repeat(4) * random.gamma(16, 1 / 16, 120)
        for kind, (found, truth) in enumerate([
            (mean_interval((random.random(120) < rate).astype(float), clusters), 2 / 3),
            (interval(macro_f1_measure(wanted, given), clusters), 0.8),
            (perplexity_interval(nats * tokens, tokens, clusters, trial), math.exp(3)),
        ]):  # fmt: skip
            inside[kind] += found.low <= truth <= found.high
    assert (inside >= 0.91 * 300).all() and (inside <= 0.985 * 300).all(), inside
