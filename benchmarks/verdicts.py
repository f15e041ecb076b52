"""How often intervals hold what they promise, how often a verdict is wrong, and whether the promised power is there.

    python benchmarks/verdicts.py

Everything is drawn from distributions whose truth is known, and goes through the functions that the phases call. Coverage: the share of
1,000 samples whose 95 % interval contains the truth (its own error is 0.7 points). A/A: both arms of every comparison come from the same
distribution, so each "better" or "worse" is false; counted is the share of engagements with at least one. Power: the share of tests that
prove the difference which `detectable_difference` promises to find in 80 %. A few minutes on one core; writes benchmarks/verdicts.json.
"""
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from finetune_accel.core import statistics
from finetune_accel.core.statistics import (
    Interval,
    detectable_difference,
    difference,
    interval,
    macro_f1_measure,
    mean_measure,
    perplexity_measure,
    verdict_rows,
)

PARAMETERS = {"samples": 1_000, "resamples": 1_000, "resamples in use": statistics.RESAMPLES, "confidence": 0.95, "power": 0.8, "seed": 17}
LABELS = {"four labels": ([1, 1, 1, 1], [0.9, 0.8, 0.7, 0.6]),
          "eight labels, 25 % to 5 %": ([20, 15, 12, 10, 8, 6, 5, 4], [0.95, 0.9, 0.9, 0.9, 0.8, 0.8, 0.7, 0.5])}
Sample = Callable[[np.random.Generator], tuple[Interval, float]]  # an interval, and the truth


def clusters(groups: int, each: int) -> np.ndarray:
    return np.arange(groups).repeat(each)


def share_right(groups: int, each: int, a: float, b: float) -> Sample:
    """Right-or-wrong answers; a cluster's share of right ones is Beta(a, b)."""
    def draw(random):
        rate = random.beta(a, b, groups).repeat(each)
        return interval(mean_measure(random.random(len(rate)) < rate), clusters(groups, each)), a / (a + b)
    return draw


def independent(items: int, rate: float) -> Sample:
    return lambda random: (interval(mean_measure(random.random(items) < rate), range(items)), rate)


def fuzzy(groups: int, each: int) -> Sample:
    """Scores between 0 and 1, as of fuzzy match: Beta about a cluster's own mean, which is Beta(4, 2)."""
    def draw(random):
        mean = random.beta(4, 2, groups).repeat(each)
        return interval(mean_measure(random.beta(8 * mean, 8 * (1 - mean))), clusters(groups, each)), 2 / 3
    return draw


def labelled(random: np.random.Generator, groups: int, each: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels wanted and given: all of a cluster want the same one, and half of its items are right or wrong together."""
    shares, right = (np.array(values, dtype=float) for values in LABELS[kind])
    wanted = random.choice(len(shares), groups, p=shares / shares.sum()).repeat(each)
    together = random.random(groups).repeat(each)
    luck = np.where(random.random(len(wanted)) < 0.5, together, random.random(len(wanted)))
    elsewhere = (wanted + random.integers(1, len(shares), len(wanted))) % len(shares)
    return wanted, np.where(luck < right[wanted], wanted, elsewhere)


def true_macro_f1(kind: str) -> float:
    shares, right = (np.array(values, dtype=float) for values in LABELS[kind])
    wrong = (1 - right) / (len(right) - 1) * shares  # wrongly given to each of the other labels
    return float(np.mean(2 * shares * right / (shares + shares * right + wrong.sum() - wrong)))


def macro_f1(groups: int, each: int, kind: str) -> Sample:
    return lambda random: (interval(macro_f1_measure(*labelled(random, groups, each, kind)), clusters(groups, each)), true_macro_f1(kind))


def macro_f1_difference(groups: int, each: int, kind: str) -> Sample:
    """Two systems with the same true F1: what one gets right, the other may get wrong."""
    def draw(random):
        wanted, ours = labelled(random, groups, each, kind)
        shares, right = (np.array(values, dtype=float) for values in LABELS[kind])
        theirs = np.where(random.random(len(wanted)) < right[wanted], wanted, (wanted + random.integers(1, len(shares), len(wanted))) % len(shares))
        return difference(macro_f1_measure(wanted, ours), macro_f1_measure(wanted, theirs), clusters(groups, each), 0), 0.0
    return draw


def texts(random: np.random.Generator, groups: int, skew: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return nats a token (mean 3), tokens and clusters of texts, one to five a cluster; a lognormal spread of `skew` between clusters."""
    names = np.arange(groups).repeat(random.integers(1, 6, groups))
    spread = np.exp(random.normal(-skew**2 / 2, skew, groups))[names] * np.exp(random.normal(-0.045, 0.3, len(names)))
    return 3 * spread, random.integers(5, 80, len(names)), names


def perplexity(groups: int, skew: float) -> Sample:
    def draw(random):
        nats, tokens, names = texts(random, groups, skew)
        return interval(perplexity_measure(nats * tokens, tokens), names, int(random.integers(2**31))), math.exp(3)
    return draw


def perplexity_difference(groups: int, skew: float) -> Sample:
    """Ours takes about a tenth off each text's nats, more off some than others."""
    def draw(random):
        nats, tokens, names = texts(random, groups, skew)
        ours = nats * (0.9 + random.normal(0, 0.05, groups)[names] + random.normal(0, 0.05, len(names)))
        return difference(perplexity_measure(ours * tokens, tokens), perplexity_measure(nats * tokens, tokens), names, int(random.integers(2**31))), -0.3
    return draw


def paired_difference(groups: int, each: int) -> Sample:
    """Right-or-wrong answers of two systems to the same items: 0.5 of a cluster's rate Beta(2, 2), and a tenth less."""
    def draw(random):
        rate = random.beta(2, 2, groups).repeat(each)
        ours, theirs = random.random(len(rate)) < rate, random.random(len(rate)) < 0.9 * rate
        return difference(mean_measure(ours), mean_measure(theirs), clusters(groups, each), int(random.integers(2**31))), 0.05
    return draw


def rarely_different(groups: int, each: int) -> Sample:
    """Two systems that answer alike in nine clusters of ten: ours is right on one more item in 8 % of them, wrong on one in 2 %."""
    def draw(random):
        change = np.zeros((groups, each))
        change[:, 0] = random.choice([1, -1, 0], groups, p=[0.08, 0.02, 0.9])
        theirs = np.where(change > 0, 0, np.where(change < 0, 1, random.random(change.shape) < 0.6))
        found = difference(mean_measure((theirs + change).ravel()), mean_measure(theirs.ravel()), clusters(groups, each), int(random.integers(2**31)))
        return found, 0.06 / each
    return draw


SHAPES: dict[str, Sample] = {
    "mean: 20 independent items, rate 0.5": independent(20, 0.5),
    "mean: 50 independent items, rate 0.8": independent(50, 0.8),
    "mean: 200 independent items, rate 0.9": independent(200, 0.9),
    "mean: 100 clusters of 5": share_right(100, 5, 2, 2),
    "mean: 100 clusters of 5, rate 0.9, strongly alike": share_right(100, 5, 1.8, 0.2),
    "mean: 40 clusters of 5, hardly alike": share_right(40, 5, 40, 20),
    "mean: 20 clusters of 5": share_right(20, 5, 2, 2),
    "mean: 12 clusters of 5": share_right(12, 5, 2, 2),
    "mean: 8 clusters of 5": share_right(8, 5, 2, 2),
    "mean: 5 clusters of 5": share_right(5, 5, 2, 2),
    "mean of fuzzy scores: 100 clusters of 5": fuzzy(100, 5),
    "mean of fuzzy scores: 12 clusters of 5": fuzzy(12, 5),
    "mean of fuzzy scores: 12 independent items": fuzzy(12, 1),
    "macro-F1: 100 clusters of 4, four labels": macro_f1(100, 4, "four labels"),
    "macro-F1: 20 clusters of 4, four labels": macro_f1(20, 4, "four labels"),
    "macro-F1: 300 clusters of 4, eight labels, 25 % to 5 %": macro_f1(300, 4, "eight labels, 25 % to 5 %"),
    "macro-F1: 100 clusters of 4, eight labels, 25 % to 5 %": macro_f1(100, 4, "eight labels, 25 % to 5 %"),
    "perplexity: 100 clusters": perplexity(100, 0.2),
    "perplexity: 20 clusters": perplexity(20, 0.2),
    "perplexity: 12 clusters": perplexity(12, 0.2),
    "perplexity: 100 clusters, skewed": perplexity(100, 0.6),
    "perplexity: 20 clusters, skewed": perplexity(20, 0.6),
    "difference of means: 100 clusters of 5": paired_difference(100, 5),
    "difference of means: 20 clusters of 5": paired_difference(20, 5),
    "difference of means: 8 clusters of 5": paired_difference(8, 5),
    "difference of means: 5 clusters of 5": paired_difference(5, 5),
    "difference of means: 100 independent items": paired_difference(100, 1),
    "difference of means: 100 clusters of 4, nine of ten answered alike": rarely_different(100, 4),
    "difference of perplexity: 100 clusters": perplexity_difference(100, 0.2),
    "difference of perplexity: 20 clusters": perplexity_difference(20, 0.2),
    "difference of perplexity: 20 clusters, skewed": perplexity_difference(20, 0.6),
    "difference of macro-F1: 60 clusters of 4, four labels": macro_f1_difference(60, 4, "four labels"),
}


def coverage(shape: str) -> dict:
    """Return how often the interval of `shape` contains the truth, and on which side it misses."""
    random = np.random.default_rng(PARAMETERS["seed"])
    found = [SHAPES[shape](random) for _ in range(PARAMETERS["samples"])]
    above, below = (float(np.mean([side(each, truth) for each, truth in found])) for side in (lambda i, t: t < i.low, lambda i, t: t > i.high))
    return {"shape": shape, "coverage": round(1 - above - below, 4), "interval above the truth": above, "interval below the truth": below,
            "median width": round(float(np.median([each.high - each.low for each, _ in found])), 4)}


def engagement(random: np.random.Generator, groups: int, each: int) -> tuple[dict, np.ndarray]:
    """Return the scores of six equally good systems on three criteria and perplexity, alike within clusters for each system."""
    names, scores = clusters(groups, each), {}
    hard, tokens = random.beta(3, 2, groups), random.integers(5, 60, len(names))
    wanted = random.choice(6, groups).repeat(each)
    for system in ("tuned", "base", "base+K", "base+K nearest", "nearest", "classical"):
        luck = np.where(random.random(len(names)) < 0.5, random.random(groups).repeat(each), random.random(len(names)))
        field, exact = luck < np.sqrt(hard)[names], luck < hard[names]  # whoever has all right has the field right
        given = np.where(field, wanted, random.integers(0, 6, len(names)))
        nats = random.gamma(9, 1 / 3, groups)[names] * random.gamma(16, 1 / 16, len(names))
        scores[system] = {"exact_match": mean_measure(exact), "json_field:intent": mean_measure(field), "macro-F1": macro_f1_measure(wanted, given),
                          "perplexity": perplexity_measure(nats * tokens, tokens)}
    return scores, names


def false_verdicts(groups: int, each: int, engagements: int) -> dict:
    """Return how often engagements, and single comparisons with and without Holm's correction, give a false verdict."""
    random, others = np.random.default_rng(PARAMETERS["seed"]), ("base", "base+K", "base+K nearest", "nearest", "classical")
    comparisons = [(criterion, "tuned", other) for criterion in ("exact_match", "json_field:intent", "macro-F1") for other in others[:-1]]
    comparisons += [("json_field:intent", "tuned", "classical"), ("perplexity", "tuned", "base")]
    wrong, tests = [], set()
    for seed in range(engagements):
        rows = verdict_rows(comparisons, *engagement(random, groups, each), seed)
        tests |= {row["test"] for row in rows}
        wrong.append([row["verdict"] != "not proven" for row in rows])
    return {"clusters": groups, "items a cluster": each, "engagements": engagements, "comparisons an engagement": len(comparisons), "tests": sorted(tests),
            "engagements with a false verdict": float(np.mean(np.any(wrong, axis=1))), "comparisons with a false verdict": round(float(np.mean(wrong)), 5)}


def single_false_verdicts(groups: int, each: int) -> dict:
    """Return how often one comparison, which no correction protects, gives a false verdict."""
    random, wrong = np.random.default_rng(PARAMETERS["seed"]), []
    for seed in range(PARAMETERS["samples"]):
        scores, names = engagement(random, groups, each)
        wrong.append([verdict_rows([(criterion, "tuned", "base")], scores, names, seed)[0]["verdict"] for criterion in scores["base"]])
    shares = np.mean(np.array(wrong) != "not proven", axis=0)
    return {"clusters": groups, "items a cluster": each, "comparisons": PARAMETERS["samples"],
            "false verdicts": {criterion: round(float(share), 4) for criterion, share in zip(scores["base"], shares)}}


def power(what: str, groups: int, each: int, together: float, disagree: float, comparisons: int) -> dict:
    """Return how often the promised difference is proven.

    An item follows its cluster's draw with probability `together`, so that two of a cluster correlate by its square. With several
    comparisons the others compare equals.
    """
    random, names, effect = np.random.default_rng(PARAMETERS["seed"]), clusters(groups, each), 1 + (each - 1) * together**2
    gap = detectable_difference(groups * each, groups, effect, disagree, comparisons)
    found = 0

    def scores(better: float) -> tuple[np.ndarray, np.ndarray]:
        def outcome(size):
            return random.choice([1, -1, 0], size, p=[(disagree + better) / 2, (disagree - better) / 2, 1 - disagree])
        change = np.where(random.random(len(names)) < together, outcome(groups)[names], outcome(len(names)))
        theirs = np.where(change == 0, random.random(len(names)) < 0.5, change < 0)
        return (theirs + change).astype(float), theirs.astype(float)

    for seed in range(PARAMETERS["samples"]):
        drawn = [scores(gap if i == 0 else 0.0) for i in range(comparisons)]
        table = {"tuned": {str(i): ours for i, (ours, _) in enumerate(drawn)}, "base": {str(i): theirs for i, (_, theirs) in enumerate(drawn)}}
        found += verdict_rows([(str(i), "tuned", "base") for i in range(comparisons)], table, names, seed)[0]["verdict"] == "better"
    return {"shape": what, "clusters": groups, "items a cluster": each, "design effect": effect, "disagree": disagree, "comparisons": comparisons,
            "promised to be detectable": round(gap, 4), "power": found / PARAMETERS["samples"]}


def continuous_power(groups: int) -> dict:
    """Return the power for scores that are no shares: normal differences of variance 1."""
    random, gap, found = np.random.default_rng(PARAMETERS["seed"]), detectable_difference(groups, groups, disagree=1.0, shares=False), 0
    for seed in range(PARAMETERS["samples"]):
        table = {"tuned": {"c": random.normal(gap, 1, groups)}, "base": {"c": np.zeros(groups)}}
        found += verdict_rows([("c", "tuned", "base")], table, range(groups), seed)[0]["verdict"] == "better"
    return {"shape": "normal differences", "clusters": groups, "promised to be detectable": round(gap, 4), "power": found / PARAMETERS["samples"]}


def main() -> None:
    started, statistics.RESAMPLES = time.monotonic(), PARAMETERS["resamples"]
    result = {"parameters": PARAMETERS, "coverage": [coverage(shape) for shape in SHAPES],
              "A/A": [false_verdicts(60, 4, 1_000), false_verdicts(80, 1, 1_000), false_verdicts(12, 8, 1_000)],
              "A/A of one comparison": [single_false_verdicts(60, 4), single_false_verdicts(12, 8)],
              "power": [power("independent", 200, 1, 0.0, 0.5, 1), power("all alike", 100, 4, 1.0, 0.5, 1), power("half alike", 100, 4, 0.6, 0.5, 1),
                        power("all alike, few clusters", 20, 4, 1.0, 0.9, 1), power("one of twelve", 60, 4, 0.6, 0.5, 12),
                        continuous_power(100), continuous_power(20)]}
    result["seconds"] = round(time.monotonic() - started)
    (Path(__file__).parent / "verdicts.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
