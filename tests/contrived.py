"""Four run folders of which the right next step is known, made in a second or two each, without a language model.

Rows are written to a file and go through the real functions of *prepare*; answers are scored, compared and written by the real functions of
*evaluate*; results by `PhaseRun`. In the place of a language model stands one that really learns and is really limited: logistic regression on
pieces of words, which answers with the whole text of a training answer. So *too little data* is too little for it, *label noise* misleads it, and what no
training row says it cannot know. What is contrived:

| case | rows |
|---|---|
| too little data | 600 questions of eight kinds, each with two of the 240 words of its kind, of which so few rows hold less than half |
| label noise | 600 questions with three of 30 words; a quarter are answered as another kind, and 30 are asked twice and answered otherwise |
| knowledge task | 300 questions for the number of a customer, each another number, as JSON |
| perfect base | 300 questions with three of 30 words, and a base model that answers all of them rightly |
"""
from __future__ import annotations

import json
import random
from pathlib import Path

import yaml
from tiny import tiny_model

KINDS = ("refund", "invoice", "delivery", "password", "contract", "complaint", "newsletter", "appointment")
FILLERS = "please could you today again really maybe my our the about soon quickly help kindly now still".split()


def word(generator: random.Random) -> str:
    """Return a made-up word of three syllables."""
    return "".join(generator.choice("bdfgklmnprstvz") + generator.choice("aeiou") for _ in range(3))


def questions(count: int, seed: int, words: int = 30, said: int = 3) -> list[dict]:
    """Return `count` questions, each of `said` of the `words` of its kind among fillers, with the kind as answer."""
    generator = random.Random(seed)
    own = {kind: [word(generator) for _ in range(words)] for kind in KINDS}
    rows = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        parts = generator.sample(own[kind], said) + generator.sample(FILLERS, 4)
        generator.shuffle(parts)
        rows.append({"prompt": " ".join(parts), "response": kind})
    return rows


def noisy(rows: list[dict], seed: int) -> list[dict]:
    """Return the rows, a quarter answered as another kind, and 30 of them asked again and answered otherwise."""
    generator = random.Random(seed)
    other = lambda row: {**row, "response": generator.choice([kind for kind in KINDS if kind != row["response"]])}
    return [other(row) if generator.random() < 0.25 else row for row in rows] + [other(row) for row in rows[:30]]


def customers(count: int, seed: int) -> list[dict]:
    """Return questions for the number of a customer that only a register knows."""
    generator = random.Random(seed)
    return [{"prompt": f"which number does {word(generator)} {word(generator)} have?", "response": json.dumps({"number": str(generator.randrange(10**7, 10**8))})}
            for _ in range(count)]


class Words:
    """Logistic regression on pieces of words that answers with a training answer."""

    def __init__(self, rows: list[dict]):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        self.model = make_pipeline(TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)), LogisticRegression(C=30, max_iter=300))
        self.model.fit([row["prompt"] for row in rows], [row["response"] for row in rows])

    def __call__(self, rows: list[dict]) -> list[str]:
        return self.model.predict([row["prompt"] for row in rows]).tolist()


def phase_run(settings, name: str):
    """Open a phase's run as its notebook does."""
    from finetune_accel.core.engagement import phases
    from finetune_accel.core.runs import PhaseRun

    phase = next(one for one in phases() if one.name == name)
    return PhaseRun(settings, name, phase.notebook, phase.reads)


def plan(common: dict, criteria: list[dict]) -> None:
    """Write plan.json."""
    from finetune_accel.plan import PlanSettings

    run = phase_run(PlanSettings(**common, criteria=criteria), "plan")
    run.output("criteria.json").write_text(json.dumps(criteria))
    run.finish({}, use_case="contrived", owner="tests", warnings=[], accepted_open=[])


def prepare(scratch: Path, common: dict, rows: list[dict], limit: int | None) -> None:
    """Write prepare.json and its records, as 02_prepare does."""
    import shutil

    from finetune_accel.core.datacard import data_card
    from finetune_accel.core.decisions import decide
    from finetune_accel.core.leaks import leak_counts
    from finetune_accel.core.ledger import write_all
    from finetune_accel.prepare import PrepareSettings, check_rows, find_leaks, group_counts, open_all, row_rules

    source = scratch / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = PrepareSettings(**common, source=str(source), base_model=f"path:{scratch / 'tiny'}", limit=limit,
                               split={"by": None, "stratify": None, "dev": 0.15, "test": 0.2})
    run = phase_run(settings, "prepare")
    checked = check_rows(settings, open_all(settings), row_rules(settings), run.staging / "work")
    decided = decide(checked, settings.split, settings.near_duplicates, settings.limit)
    counts = write_all(checked, decided, run.output)
    splits = {name: run.output(f"{name}.parquet") for name in ("train", "dev", "test")}
    card = data_card(counts, run.output("ledger.parquet"), splits, [], len(decided.near), leak_counts(find_leaks(checked, decided)))
    run.output("format.json").write_text(json.dumps({"approach": "supervised", "system_prompt": None, "targets": "last"}))
    groups = group_counts(checked, decided)
    shutil.rmtree(run.staging / "work")
    run.finish({}, rows=counts.as_dict(), groups=groups, card=card)


def right(texts: list[str], rows: list[dict]) -> float:
    """Return the share of texts that are the rows' answers."""
    return sum(text == row["response"] for text, row in zip(texts, rows)) / len(rows)


def train(scratch: Path, common: dict, learner) -> None:
    """Write train.json with the dev scores of the learner half-way and at the end."""
    import shutil

    from finetune_accel.core.records import read_records
    from finetune_accel.train import TrainSettings

    run = phase_run(TrainSettings(**common, base_model=f"path:{scratch / 'tiny'}"), "train")
    rows, dev = (read_records(run.folder.output(f"prepare/{split}.parquet")) for split in ("train", "dev"))
    scores = [right(learner(rows[:end])(dev), dev) for end in (9 * len(rows) // 10, len(rows))]
    run.output("history.json").write_text(json.dumps([{"step": step, "dev/exact_match": score} for step, score in zip((9, 10), scores)]))
    run.output("canaries.json").write_text("[]")
    shutil.copytree(scratch / "tiny", run.output("merged"))  # only its tokenizer is looked at
    run.finish({}, dev={"exact_match": scores[-1]}, dev_items=len(dev), steps=-(-len(rows) // 8), training_seconds=1.0, loss={"first": 2.0, "last": 0.1}, best=None)


def evaluate(common: dict, learner, base) -> None:
    """Write evaluate.json, answers and item scores of the learner and of `base`, as 05_evaluate does."""
    from finetune_accel.core.comparison import Answers, compare, goodness, score_table, write_answers, write_item_scores
    from finetune_accel.core.criteria import Criterion, criteria_met
    from finetune_accel.core.degenerate import degenerate
    from finetune_accel.core.mistakes import error_clusters
    from finetune_accel.core.records import read_records
    from finetune_accel.core.slices import slice_table
    from finetune_accel.evaluate import EvaluateSettings

    settings = EvaluateSettings(**common)
    run = phase_run(settings, "evaluate")
    criteria = [Criterion(**one) for one in json.loads(run.input("plan/criteria.json").read_text())]
    known, items = (read_records(run.folder.output(f"prepare/{split}.parquet")) for split in ("train", "test"))
    given = {"base": base(items), "tuned": learner(known)(items)}
    results = [Answers(system, system, items, texts, ["stop"] * len(items), 0.0) for system, texts in given.items()]
    scores = [row for result in results for row in score_table(result, criteria)]
    verdicts = compare(results, criteria, settings.seed)
    ours, theirs = (goodness(result, criteria[-1]) for result in reversed(results))
    write_answers(results, run.output("answers.parquet"))
    write_item_scores(results, criteria, run.output("item_scores.parquet"))
    run.finish({}, scores=scores, verdicts=verdicts, criteria=criteria_met(criteria, scores, verdicts), items=len(items), judge=[], forgetting=None,
               findings=[one._asdict() for one in degenerate(given["tuned"], results[1].finish, [row["response"] for row in items], [row["prompt"] for row in items])],
               slices=slice_table(items, [row["group"] for row in items], ours, theirs, ["prompt length"]),
               mistakes=error_clusters(items, given["tuned"], ours))


def serve(scratch: Path, common: dict) -> None:
    """Write serve.json with the part of a certificate that names the template."""
    import hashlib

    from finetune_accel.serve import ServeSettings

    run = phase_run(ServeSettings(**common), "serve")
    template = hashlib.sha256((scratch / "tiny/chat_template.jinja").read_bytes()).hexdigest()
    run.output("parity.json").write_text(json.dumps({"model": {"template_sha256": template}}))
    run.finish({}, parity={"verdict": "exact", "equal": 0, "asked": 0}, engine="reference")


def learnt(scratch: Path, folder: Path, rows: list[dict], limit: int | None = None) -> dict:
    """Plan, prepare and train in a run folder; return the settings that all phases share."""
    common = {"name": "contrived", "seed": 17, "run_dir": str(folder)}
    plan(common, [{"metric": "exact_match", "at_least": 0.8, "better_than": "base"}])
    prepare(scratch, common, rows, limit)
    train(scratch, common, Words)
    return common


def contrive(scratch: Path, rows: list[dict], base=lambda items: ["no idea"] * len(items), parts: tuple[int, ...] = ()) -> Path:
    """Make a run folder of `rows`, with runs on `parts` of them as a grid writes them, and return it."""
    from finetune_accel.core.runs import write_json

    folder, grid = scratch / "run", []
    tiny_model(scratch / "tiny", [f"{row['prompt']} {row['response']}" for row in rows])
    for part in parts:
        child = folder / "grid" / f"prepare.limit-{part}"
        learnt(scratch, child, rows, part)
        grid.append({"set": [f"prepare.limit={part}"], "run_dir": str(child)})
    common = learnt(scratch, folder, rows)
    write_json(folder / "grid.json", {"criterion": "exact_match", "split": "dev", "rows": grid})
    evaluate(common, Words, base)
    serve(scratch, common)
    (folder / "engagement.yaml").write_text(yaml.safe_dump({"name": "contrived", "plan": {
        "use_case": "contrived", "owner": "tests", "criteria": [{"metric": "exact_match"}], "prerequisites": [],
        "data_sources": [{"name": "made up", "licence": "ours", "origin": "public stand-in", "examples": len(rows)}]}}))
    return folder


CASES = {  # case: (how it is made, the step that is right)
    "too little data": (lambda scratch: contrive(scratch, questions(600, 1, words=240, said=2), parts=(75, 150, 300)), "collect more data"),
    "label noise": (lambda scratch: contrive(scratch, noisy(questions(600, 2), 3), parts=(75, 150, 300)), "mend the labels"),
    "knowledge task": (lambda scratch: contrive(scratch, customers(300, 4)), "look knowledge up (retrieval)"),
    "perfect base": (lambda scratch: contrive(scratch, questions(300, 5), base=lambda items: [row["response"] for row in items]),
                     "use the untuned model with a prompt")}
