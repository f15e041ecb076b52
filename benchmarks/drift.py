"""How often a window of 500 rows is called shifted, by what it holds, beside the population stability index of lengths.

    python benchmarks/drift.py                          (a quarter of an hour on one idle core)
    python benchmarks/drift.py --data home-intents --resamples 20

Prompts and reference answers are those of the shipped data sets; no model is asked. In each resample a data set's rows are shuffled, the first 500
are the baseline and others are the window, so no window shares a row with its baseline. A shift replaces part of the window's rows, or changes
them: `other topic` by rows of a part of the data set that the baseline never has, `other language` by German templates of the same package,
`longer prompts` joins two requests, `typos` exchanges, drops or doubles letters in a fifth of the words, `broken answers` cuts answers in half.
Times are made up (log-normal, by the length of the answer), and `slower` multiplies them. A window is found if any figure's adjusted p-value is
at most 0.05. `nothing` is the rate of false alarms; `2 of 3` draws three windows in a row against one baseline, as an alert does.

Beside it stands the PSI of the prompt's length in characters over the baseline's deciles, by the rule of thumb (0.2) and by a limit that 5 % of
windows without a shift pass, from resamples of their own. Writes benchmarks/drift.json after each data set; results of others stay in it.
"""
from __future__ import annotations

import argparse
import functools
import json
import platform
import random
import re
import time
from collections.abc import Callable
from multiprocessing import Pool
from pathlib import Path

import numpy as np

from finetune_accel.core.criteria import Criterion
from finetune_accel.core.permutation import compare
from finetune_accel.core.readers import open_source
from finetune_accel.core.sources import fetch_package
from finetune_accel.core.standins import home_intents
from finetune_accel.core.statistics import mean_interval
from finetune_accel.core.watched import language_view

ROWS, LEVEL = 500, 0.05
FILMS = re.compile(r"\b(movies?|films?|shows?|music|songs?|bands?|games?|series|netflix)\b", re.IGNORECASE)


def _rows(package: str, **how) -> list[dict]:
    return [row for block in open_source(f"pypi:{package}", **how).blocks() for _, row in block.rows()]


def _pairs(rows: list[dict], prompt: str = "prompt", answer: str = "response") -> list[tuple[str, str]]:
    return list({row[prompt]: (row[prompt], row[answer]) for row in rows}.values())


def home() -> dict[str, list]:
    """Return pairs (prompt, answer): usual ones, those about timers and media, and German ones."""
    rows, wheel = _rows("home-assistant-intents", per_template=10), fetch_package("pypi:home-assistant-intents")
    other = {row["intent"] for row in rows if "Timer" in row["intent"] or "Media" in row["intent"]}
    return {"usual": _pairs([row for row in rows if row["intent"] not in other]), "topic": _pairs([row for row in rows if row["intent"] in other]),
            "language": _pairs([row for row in home_intents(wheel, 10, 17, "de") if row["intent"] not in other])}


def commands() -> dict[str, list]:
    """Return pairs (request, command): of all services but EC2, and of EC2."""
    rows = _rows("awscli")
    return {"usual": _pairs([row for row in rows if row["service"] != "ec2"]), "topic": _pairs([row for row in rows if row["service"] == "ec2"])}


def manual() -> dict[str, list]:
    """Return pairs (first half, second half) of texts: of all services but SageMaker, and of SageMaker."""
    rows = [row | {"prompt": row["text"][:len(row["text"]) // 2], "response": row["text"][len(row["text"]) // 2:]} for row in _rows("botocore")]
    return {"usual": _pairs([row for row in rows if row["service"] != "sagemaker"]), "topic": _pairs([row for row in rows if row["service"] == "sagemaker"])}


def talks() -> dict[str, list]:
    """Return pairs (turn, reply), one a conversation: that do not name films, music, games or shows, and that do."""
    pairs = []
    for number, row in enumerate(_rows("chitchat-dataset")):
        turns = row["messages"]
        told = [n for n in range(0, len(turns) - 1, 2) if FILMS.search(turns[n]["content"])]
        at = told[0] if told else random.Random(number).randrange(0, len(turns) - 1, 2)
        pairs.append((turns[at]["content"], turns[at + 1]["content"]))
    pairs = list(dict(pairs).items())
    return {"usual": [pair for pair in pairs if not FILMS.search(pair[0])], "topic": [pair for pair in pairs if FILMS.search(pair[0])]}


DATA = {"home-intents": home, "aws-cli": commands, "chitchat": talks, "aws-manual": manual}
CRITERIA = {"home-intents": [Criterion(metric="json_valid", at_least=0.98)]}


def typos(text: str, rng: random.Random) -> str:
    """Return a text with a wrong letter in about a fifth of its words."""
    said = text.split(" ")
    for place, word in enumerate(said):
        if len(word) > 2 and rng.random() < 0.2:
            at = rng.randrange(len(word) - 1)
            said[place] = rng.choice((word[:at] + word[at + 1] + word[at] + word[at + 2:], word[:at] + word[at + 1:], word[:at] + word[at] + word[at:]))
    return " ".join(said)


def as_row(pair: tuple[str, str], rng: random.Random, slower: float = 1.0) -> dict:
    """Return what a table of traffic would hold: the prompt, the answer, a made-up time."""
    prompt, answer = pair
    return {"question": {"prompt": prompt}, "answer": answer, "status_code": 200, "finish_reason": "stop", "prompt_tokens": None, "completion_tokens": None,
            "latency_ms": (50 + 2 * len(answer)) * rng.lognormvariate(0, 0.4) * slower}


def share_of(share: float, other: Callable[[tuple, random.Random, list], tuple]) -> Callable:
    """Return a shift that changes a share of the window by `other(pair, rng, spare pairs)`."""
    return lambda window, rng, spare: [other(pair, rng, spare) if number < share * len(window) else pair for number, pair in enumerate(window)]


def shifts(pools: dict[str, list], name: str) -> dict[str, tuple[Callable, float]]:
    """Return {name: (shift, factor of time)} of a data set."""
    found = {"nothing": (lambda window, rng, spare: window, 1.0)}
    for share in (0.05, 0.1, 0.2, 0.5):
        found[f"{share:.0%} other topic"] = (lambda window, rng, spare, share=share: [*window[int(share * len(window)):],
                                                                                    *rng.sample(pools["topic"], int(share * len(window)))], 1.0)
    found["20% longer prompts"] = (share_of(0.2, lambda pair, rng, spare: (f"{pair[0]} and {spare.pop()[0]}", pair[1])), 1.0)
    if "language" in pools:
        found["20% other language"] = (lambda window, rng, spare: [*window[len(window) // 5:], *rng.sample(pools["language"], len(window) // 5)], 1.0)
    found["20% typos"] = (share_of(0.2, lambda pair, rng, spare: (typos(pair[0], rng), pair[1])), 1.0)
    if name in CRITERIA:
        found["5% broken answers"] = (share_of(0.05, lambda pair, rng, spare: (pair[0], pair[1][:len(pair[1]) // 2])), 1.0)
    return found | {"20% slower": (lambda window, rng, spare: window, 1.2)}


def length_psi(baseline: list[dict], window: list[dict]) -> float:
    """Return the population stability index of the prompt's characters over the baseline's deciles, each share at least half a row's."""
    before, now = (np.array([len(row["prompt"]) for row in rows]) for rows in (baseline, window))
    edges = np.unique(np.quantile(before, np.linspace(0.1, 0.9, 9)))
    shares = [np.maximum(np.bincount(np.searchsorted(edges, sizes), minlength=len(edges) + 1), 0.5) / len(sizes) for sizes in (before, now)]
    return float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())


@functools.cache
def pools_of(name: str) -> dict[str, list]:
    """Return a data set's pairs, read once a process."""
    return DATA[name]()


def draw(name: str, shift: str, seed: int, windows: int = 1) -> tuple[list[dict], list[list[dict]]]:
    """Return the rows of a baseline and of `windows` windows with this shift; no pair is drawn twice."""
    pools, rng, view = pools_of(name), random.Random(seed), language_view(CRITERIA.get(name, []))
    change, slower = shifts(pools, name)[shift]
    pairs = rng.sample(pools["usual"], min(len(pools["usual"]), (1 + 2 * windows) * ROWS))
    spare = pairs[(1 + windows) * ROWS:]
    sides = [pairs[:ROWS], *(change(pairs[start:start + ROWS], rng, spare) for start in range(ROWS, (1 + windows) * ROWS, ROWS))]
    first, *rest = [[view.row(as_row(pair, rng, 1.0 if side == 0 else slower), None) for pair in pairs] for side, pairs in enumerate(sides)]
    return first, rest


def look(task: tuple[str, str, int, int]) -> dict:
    """Return which columns and figures are out in each window of one resample, and the PSI of the first."""
    name, shift, seed, windows = task
    baseline, drawn = draw(name, shift, seed, windows)
    view = language_view(CRITERIA.get(name, []))
    out = [[(signal.column, signal.figure) for signal in compare(baseline, window, view.columns, LEVEL, seed) if signal.adjusted <= LEVEL] for window in drawn]
    return {"data": name, "shift": shift, "out": out, "psi": length_psi(baseline, drawn[0])}


def calibrate(task: tuple[str, int]) -> float:
    """Return the PSI of a window without a shift."""
    baseline, (window,) = draw(task[0], "nothing", task[1])
    return length_psi(baseline, window)


def again(out: list[list]) -> bool:
    """Return whether a column is out in two of three windows."""
    columns = [{column for column, _ in window} for window in out]
    return any(sum(name in window for window in columns) >= 2 for name in set().union(*columns))


def rate(hits: list[bool]) -> dict:
    """Return a share with its 95 % interval (Wilson)."""
    share, low, high = mean_interval(np.array(hits, dtype=float), range(len(hits)))
    return {"share": round(share, 4), "low": round(low, 4), "high": round(high, 4), "resamples": len(hits)}


def summary(found: list[dict], limit: float) -> dict:
    """Return the rates of one data set and shift."""
    figures: dict[str, int] = {}
    for one in found:
        for column, figure in one["out"][0]:
            figures[f"{column}.{figure}"] = figures.get(f"{column}.{figure}", 0) + 1
    three = [again(one["out"]) for one in found if len(one["out"]) == 3]
    return {"found": rate([bool(one["out"][0]) for one in found]), "psi above 0.2": rate([one["psi"] > 0.2 for one in found]),
            "psi above its limit": rate([one["psi"] > limit for one in found]), **({"2 of 3 windows": rate(three)} if three else {}),
            "by figure": dict(sorted(figures.items(), key=lambda pair: -pair[1]))}


def main() -> None:
    """Run all resamples and write the rates."""
    options = argparse.ArgumentParser()
    options.add_argument("--data", nargs="*", default=list(DATA), choices=list(DATA))
    options.add_argument("--resamples", type=int, default=25, help="of each shift; eight times as many without one")
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = options.parse_args()
    results = json.loads(given.out.read_text())["results"] if given.out.is_file() else {}
    with Pool(given.processes) as pool:
        for name in given.data:
            started = time.monotonic()
            every = shifts(pools_of(name), name)
            limit = float(np.quantile(pool.map(calibrate, [(name, 10**6 + seed) for seed in range(8 * given.resamples)]), 1 - LEVEL))
            results[name] = {"psi limit": round(limit, 4), "rows": {kind: len(pairs) for kind, pairs in pools_of(name).items()}}
            for number, shift in enumerate(every):
                count = 8 * given.resamples if shift == "nothing" else given.resamples
                three = len(pools_of(name)["usual"]) >= 4 * ROWS and shift in ("nothing", "20% other topic")
                tasks = [(name, shift, 10_000 * number + seed, 3 if three and seed < given.resamples else 1) for seed in range(count)]
                results[name][shift] = summary(pool.map(look, tasks, chunksize=5), limit)
                print(f"{time.monotonic() - started:6.0f} s  {name:<13} {shift:<20} found {results[name][shift]['found']['share']:.3f}  "
                      f"PSI {results[name][shift]['psi above 0.2']['share']:.3f} {results[name][shift]['psi above its limit']['share']:.3f}", flush=True)
            results[name] |= {"seconds": round(time.monotonic() - started), "resamples of a shift": given.resamples}
            parameters = {"rows": ROWS, "level": LEVEL, "python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
            given.out.write_text(json.dumps({"parameters": parameters, "results": results}, indent=1) + "\n")

if __name__ == "__main__":
    main()
