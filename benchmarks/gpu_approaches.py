"""Continued pre-training and conversations on real text and real weights: what they gain on held-out data, on one NVIDIA GPU.

    finetune-accel run aws-manual --to prepare        (and chitchat)
    pip download --no-deps gensim==4.4.0
    python benchmarks/gpu_approaches.py --rows aws-manual=RUN_DIR --rows chitchat=RUN_DIR --general gensim-4.4.0-*.whl --model MODEL_DIR

aws-manual trains every weight on the manual and is measured on services never read, and on *general text*: does it forget what it
knew? chitchat is measured on people's own answers. Settings are chosen on dev by short trials (arms below), for aws-manual among
those that forget less than FORGETS_DEV; the test split is opened once, by base model and final model. Both are measured as they are
served: saved, or the adapter merged, and loaded again in the number format of training. Changes are paired by text; intervals
resample services, conversations or articles.

General text: the 87 articles with more than 2,000 letters of prose of the piece of the English Wikipedia of April 2016 (CC BY-SA 3.0)
that gensim carries for its tests: Aardvark to Azerbaijan, markup taken away here. Of the articles 15 % serve dev and 25 % the test; the
rest may be mixed into training (*replay*: a share of its tokens). As replay is of the same kind as what is measured, people's
conversations as plain text, which aws-manual never reads, are measured too. Writes gpu_approaches.json.
"""
from __future__ import annotations

import argparse
import bz2
import html
import json
import math
import random
import re
import tempfile
import time
import zipfile
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

ARTICLES = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
FORGETS, FORGETS_DEV = 0.05, 0.04  # nats a token: the limit, and what dev is asked for, so that the test holds it
SEED, TRIAL_STEPS, MICRO_BATCH = 17, 60, 32768
ENGAGEMENTS = {
    "aws-manual": {"seconds": 150, "batch_size": 64, "epochs": 1, "target": 0.25, "forgets": FORGETS_DEV, "arms": [
        {"method": "full", "learning_rate": rate, "replay": replay} for rate in (1e-4, 2e-4, 3e-5) for replay in (0.25, 0.0)]},
    "chitchat": {"seconds": 100, "batch_size": 32, "epochs": 2, "target": 0.4, "forgets": math.inf, "arms": [
        {"method": method, "learning_rate": rate, "replay": 0.0}
        for method, rate in (("lora", 2e-3), ("full", 1e-4), ("lora", 1e-3), ("full", 2e-4), ("full", 5e-5))]},
}


def prose(wikitext: str) -> list[str]:
    """Return the paragraphs of more than 200 characters that are free of markup once templates, tables, notes and links are resolved."""
    text = re.sub(r"<!--.*?-->|<ref[^>]*?/>|<(ref|math|gallery|table|timeline|code|source|pre)\b.*?</\1>", " ", wikitext, flags=re.DOTALL)
    text = re.sub(r"\{\{(?:convert|cvt)\|([\d.,]+)\|(\w+)[^{}]*\}\}", r"\1 \2", text)
    before = None
    while before != text:  # from the innermost outwards
        before = text
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\|).)*?\|\}", " ", text, flags=re.DOTALL)
        text = re.sub(r"\[\[(?:File|Image|Category):[^\[\]]*\]\]", " ", text)
        text = re.sub(r"\[\[(?:[^\[\]|]*\|)*([^\[\]|]*)\]\]", r"\1", text)
    text = html.unescape(re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text))
    text = re.sub(r"\(\s*[;,]?\s*\)", "", re.sub(r"[ \t\xa0]+", " ", re.sub(r"'{2,}|<[^>]+>|__\w+__", "", text)))
    lines = (line.strip() for line in re.sub(r" ([,.;:)])", r"\1", text).split("\n"))
    whole, markup = re.compile(r"[A-Z\"“].*[.!?\")”]$"), re.compile(r"[{}\[\]|=<>]|https?:")
    return [line for line in lines if len(line) > 200 and whole.match(line) and not markup.search(line)]


def document(text: str, group: str) -> dict:
    """Return a record of plain text that goes on after its end."""
    return {"messages": [], "prompt": "", "response": text, "group": group, "last": False}


def general_text(wheel: Path) -> dict[str, list[dict]]:
    """Return {"dev", "test", "replay"}: records of about 1,800 characters; `wheel` is gensim's, or the file ARTICLES from it."""
    packed = zipfile.ZipFile(wheel).read(ARTICLES) if zipfile.is_zipfile(wheel) else Path(wheel).read_bytes()
    records: dict[str, list[dict]] = {}
    for _event, page in ElementTree.iterparse(BytesIO(bz2.decompress(packed))):
        if not page.tag.endswith("}page"):
            continue
        space = page.tag.removesuffix("page")
        title, pieces = page.findtext(f"{space}title"), [""]
        for paragraph in prose(page.findtext(f"{space}revision/{space}text") or ""):
            if pieces[-1] and len(pieces[-1]) + len(paragraph) > 1800:
                pieces.append("")
            pieces[-1] += paragraph + "\n\n"
        if sum(map(len, pieces)) > 2000:
            records[title] = [document(piece, title) for piece in pieces]
    titles = sorted(records)
    random.Random(0).shuffle(titles)
    dev, test = round(0.15 * len(titles)), round(0.4 * len(titles))
    parts = {"dev": titles[:dev], "test": titles[dev:test], "replay": titles[test:]}
    return {part: [record for title in chosen for record in records[title]] for part, chosen in parts.items()}


def read_rows(run_dir: Path) -> tuple[dict[str, list[dict]], str]:
    """Return ({split: records}, targets) of a run folder's prepare phase."""
    from finetune_accel.core.records import read_records

    folder = next(path.parent for path in sorted(Path(run_dir).rglob("train.parquet")))
    form = json.loads((folder / "format.json").read_text())
    return {split: read_records(folder / f"{split}.parquet") for split in ("train", "dev", "test")}, form["targets"]


class Bench:
    """The model folder, the data and the limits that all measurements of one engagement share; the clock starts when it is made."""

    def __init__(self, args: argparse.Namespace, name: str, rows: dict, targets: str, general: dict):
        from finetune_accel.core.records import sample_records

        self.started, self.settings, self.args = time.time(), ENGAGEMENTS[name], args
        self.folder, self.targets, self.train, self.replay, self.encoded = Path(args.model), targets, rows["train"], general["replay"], None
        self.texts = {"dev": sample_records(rows["dev"], args.texts, 0), "test": sample_records(rows["test"], args.texts, 0),
                      "general dev": sample_records(general["dev"], args.texts // 2, 0),
                      "general test": sample_records(general["test"], args.texts, 0)}

    def load(self):
        """Return (base model, its tokenizer) in the number format of training."""
        import torch

        from finetune_accel.core.generate import load_plain, ready_for_messages

        model, tokenizer = load_plain(self.folder, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        return model, ready_for_messages(tokenizer) if self.train[0]["messages"] else tokenizer

    def surprise(self, model, tokenizer, texts: str):
        """Return (nats, tokens), each of shape (texts,)."""
        from finetune_accel.core.likelihood import log_likelihoods

        sums, tokens = log_likelihoods(model, tokenizer, self.texts[texts], self.targets)
        return -sums, tokens

    def dev(self, model, tokenizer, base: dict) -> dict[str, float]:
        """Return the perplexity on dev and by how much the cross-entropy of general text has risen, nats a token."""
        (nats, tokens), (general, count) = (self.surprise(model, tokenizer, texts) for texts in ("dev", "general dev"))
        return {"perplexity": math.exp(nats.sum() / tokens.sum()), "general_rise": float(general.sum() / count.sum()) - base.get("general", 0.0)}

    def samples(self, tokenizer, replay: float, count: int | None) -> list[dict]:
        """Return `count` training samples (None: all), with general text, again and again, until it is the share `replay` of all tokens."""
        from finetune_accel.core.template import encode_records

        self.encoded = self.encoded or [encode_records(tokenizer, records, self.targets) for records in (self.train, self.replay)]
        samples, more = (random.Random(SEED).sample(part, len(part)) for part in self.encoded)
        samples, others = samples[:count], []
        lack = sum(len(sample["input_ids"]) for sample in samples) * replay / (1 - replay)
        while lack > 0:
            others.append(more[len(others) % len(more)])
            lack -= len(others[-1]["input_ids"])
        return samples + others

    def train_arm(self, arm: dict, base: dict, scratch: Path, steps: int | None, evaluations: int):
        """Train the base model by one arm's settings and return (model, tokenizer, record), the weights that did best on dev."""
        from finetune_accel.core.training import TrainingPlan, train

        model, tokenizer = self.load()
        curve: list[dict] = []

        def on_evaluate(model, step: int) -> dict[str, float]:
            curve.append({"step": step} | self.dev(model, tokenizer, base))
            allowed = curve[-1]["general_rise"] < self.settings["forgets"]
            return {"dev/perplexity": curve[-1]["perplexity"] if allowed else math.inf}

        samples = self.samples(tokenizer, arm["replay"], None if evaluations > 1 else TRIAL_STEPS * self.settings["batch_size"])
        plan = TrainingPlan(method=arm["method"], learning_rate=arm["learning_rate"], batch_size=self.settings["batch_size"], max_steps=steps,
                            epochs=self.settings["epochs"], micro_batch_tokens=MICRO_BATCH, evaluations=evaluations, seed=SEED,
                            best_by="dev/perplexity" if evaluations > 1 else None)
        tuned, outcome = train(model, tokenizer, samples, plan, scratch, on_evaluate=on_evaluate)
        record = arm | {"steps": outcome.steps, "tokens": outcome.tokens, "seconds": round(outcome.seconds, 1), "tokens_per_second":
                        round(outcome.tokens_per_second), "peak_gib": round(outcome.peak_memory_gib, 1), "loss": outcome.loss,
                        "dev": curve, "kept_step": outcome.best["step"] if outcome.best else outcome.steps}
        return tuned, tokenizer, record

    def choose(self, base: dict, scratch: Path) -> tuple[dict, list[dict]]:
        """Try the arms, as many as half of the time allows, and return (the best of those that forget little, all records)."""
        tried: list[dict] = []
        for i, arm in enumerate(self.settings["arms"]):
            spent = time.time() - self.started
            if tried and spent * (1 + 1 / i) > self.settings["seconds"] * 0.55:
                tried += [arm | {"skipped": "no time left"} for arm in self.settings["arms"][i:]]
                break
            tried.append(self.train_arm(arm, base, scratch, min(TRIAL_STEPS, self.args.steps or TRIAL_STEPS), 1)[2])
            print(json.dumps(tried[-1]), flush=True)
        done = [record for record in tried if "dev" in record]
        allowed = [record for record in done if record["dev"][-1]["general_rise"] < self.settings["forgets"]]
        best = min(allowed or done, key=lambda record: record["dev"][-1]["perplexity" if allowed else "general_rise"])
        return {name: best[name] for name in ("method", "learning_rate", "replay")}, tried

    def steps_left(self, tried: list[dict]) -> int:
        """Return how many steps fit into the rest of the time, less a sixth of the whole for setting up and for the test."""
        a_step = min(record["seconds"] / record["steps"] for record in tried if "steps" in record)
        left = self.settings["seconds"] * 5 / 6 - (time.time() - self.started)
        return max(TRIAL_STEPS, int(left / a_step))

    def served(self, tuned, tokenizer, method: str, scratch: Path):
        """Return the model as it would be served: saved and loaded again, or its adapter merged into the base's weights."""
        from finetune_accel.core.generate import load_plain
        from finetune_accel.core.saving import merged_model, save_adapter, save_model

        if method == "full":
            save_model(tuned, tokenizer, scratch / "merged")
            return load_plain(scratch / "merged", tuned.dtype)[0]
        save_adapter(tuned, tokenizer, "base", scratch / "adapter")
        return merged_model(tuned, scratch / "adapter", self.folder).to(tuned.device)


def compared(before: tuple, after: tuple, records: list[dict]) -> dict:
    """Return the perplexities before and after with their intervals, and what changed: as a share, and in nats a token."""
    from finetune_accel.core.statistics import difference, perplexity_interval, perplexity_measure

    clusters, tokens = [record["group"] for record in records], before[1]
    old, new = (perplexity_interval(nats, tokens, clusters) for nats in (before[0], after[0]))
    rise = difference(perplexity_measure(after[0], tokens), perplexity_measure(before[0], tokens), clusters, SEED)

    def three(values) -> list[float]:
        return [round(float(value), 4) for value in values]

    return {"texts": len(records), "groups": len(set(clusters)), "tokens": int(tokens.sum()), "base": three(old), "tuned": three(new),
            "lower by": three(1 - math.exp(nats) for nats in (rise.value, rise.high, rise.low)), "cross-entropy rises by": three(rise)}


def engagement(args: argparse.Namespace, name: str, rows: dict, targets: str, general: dict, others: list[dict]) -> dict:
    """Choose settings on dev, train with them and open the test: returns the record. `others` are texts to be measured besides."""
    bench = Bench(args, name, rows, targets, general)
    base_model, tokenizer = bench.load()
    before = bench.dev(base_model, tokenizer, {})
    base = {"perplexity": before["perplexity"], "general": before["general_rise"]}
    print(name, json.dumps(base), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        arm, tried = bench.choose(base, Path(scratch))
        tuned, tokenizer, final = bench.train_arm(arm, base, Path(scratch), args.steps or bench.steps_left(tried), 3)
        print(json.dumps(final), flush=True)
        tuned = bench.served(tuned, tokenizer, arm["method"], Path(scratch))
        bench.texts |= {"conversations": others} if others else {}
        test = {}
        for texts in [texts for texts in bench.texts if "dev" not in texts]:
            results = [bench.surprise(model, tokenizer, texts) for model in (base_model, tuned)]
            test[texts] = compared(*results, bench.texts[texts])
    rise, gain = test["general test"]["cross-entropy rises by"], test["test"]["lower by"]
    checks = {f"perplexity lower by at least {bench.settings['target']:.0%}": gain[0] >= bench.settings["target"]}
    if bench.settings["forgets"] < math.inf:
        checks[f"general cross-entropy rises by less than {FORGETS}"] = rise[0] < FORGETS
    return {"base_on_dev": base, "chosen": arm, "tried": tried, "final": final, "test": test, "checks": checks,
            "seconds": round(time.time() - bench.started, 1), "rows": {split: len(records) for split, records in rows.items()}}


def main() -> None:
    """Run the engagements given by `--rows` one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="append", required=True, metavar="NAME=DIR", help=f"run folder of one of {', '.join(ENGAGEMENTS)}")
    parser.add_argument("--general", type=Path, required=True, help="gensim's wheel, or the file with articles from it")
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--texts", type=int, default=400, help="texts measured of each kind")
    parser.add_argument("--train", type=int, help="fewer training rows, to try the script")
    parser.add_argument("--steps", type=int, help="fewer training steps, to try the script")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    args = parser.parse_args()

    import torch

    from finetune_accel.core import likelihood

    if torch.cuda.is_available():  # the default spares a laptop's memory
        likelihood.BATCH_SIZE, likelihood.SCORES_IN_FLIGHT = 32, 2**29
    general, started = general_text(args.general), time.time()
    data = {name: read_rows(Path(folder)) for name, folder in (given.split("=", 1) for given in args.rows)}
    talks = [document("\n".join(message["content"] for message in row["messages"]), row["group"])
             for row in data.get("chitchat", ({"dev": []}, ""))[0]["dev"]][:args.texts]
    result = {"parameters": {"seed": SEED, "trial_steps": TRIAL_STEPS, "micro_batch_tokens": MICRO_BATCH, "texts": args.texts,
                             "dev may rise by": FORGETS_DEV}, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
              "general": {part: {"articles": len({r["group"] for r in records}), "records": len(records)} for part, records in general.items()},
              "engagements": {}}
    for name, (rows, targets) in data.items():
        rows["train"] = rows["train"][:args.train]
        result["engagements"][name] = engagement(args, name, rows, targets, general, talks if name == "aws-manual" else [])
        result["seconds"] = round(time.time() - started, 1)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")  # after each, in case the machine is taken away
        print(json.dumps({name: result["engagements"][name] | {"tried": None}}, indent=1), flush=True)


if __name__ == "__main__":
    main()
