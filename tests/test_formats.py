"""Databricks' rules one by one, and that no row, however odd, is anything but a clean record or a Broken with rule, detail and fix."""
import copy
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_accel.core.errors import BadInput, Broken
from finetune_accel.core.formats import APPROACHES, DATABRICKS_RULES, FORMATS, RULES, UNPRINTABLE, Form, our_verdict, service_verdict, to_record, validate_rows

ASK, ANSWER, SYSTEM = ({"role": role, "content": f"{role} speaks"} for role in ("user", "assistant", "system"))
PAIR, TALK, TEXT = {"prompt": "lights on", "response": "{}"}, {"messages": [SYSTEM, ASK, ANSWER]}, {"text": "Once upon a time."}


@pytest.mark.parametrize("rule", DATABRICKS_RULES, ids=lambda rule: f"{rule.format}: {rule.rule}")
def test_databricks_rule(rule):
    assert service_verdict(rule.breaks, rule.format)[0] == rule.service
    assert ("refuses" if our_verdict(rule.breaks, rule.format) else "accepts") == rule.ours
    assert service_verdict(rule.keeps, rule.format) == ("accepts", "") and our_verdict(rule.keeps, rule.format) is None
    assert rule.why if rule.compared != "same" else not rule.why, "a difference is explained, sameness needs no words"
    if rule.ours == "refuses":
        assert all(our_verdict(rule.breaks, rule.format))
    verdict = validate_rows([("x.jsonl:1", rule.keeps), ("x.jsonl:2", rule.breaks)], rule.format)
    assert verdict.rows == 2 and verdict.service_accepts == (rule.service != "refuses") and verdict.ours_accepts == (rule.ours == "accepts")
    for counts in (verdict.service, verdict.ours):
        assert all(entry[:2] == [1, ["x.jsonl:2"]] and entry[2] for entry in counts.values())


def test_every_rule_that_the_service_can_name_is_in_the_table():
    assert {rule.format for rule in DATABRICKS_RULES} == set(FORMATS) and {rule.compared for rule in DATABRICKS_RULES} == {"same", "stricter", "looser"}
    names = [(rule.format, rule.rule) for rule in DATABRICKS_RULES]
    assert len(names) == len(set(names))


BROKEN_ROWS = [  # (approach, row, rule, what the detail or fix must name)
    ("supervised", {"prompt": "a"}, "missing key", "response"),
    ("supervised", {"Prompt": "a", "response": "b"}, "missing key", "columns: {prompt: Prompt}"),
    ("supervised", {"prompt": "a", "response": "b", "completion": "c"}, "ambiguous key", "both"),
    ("supervised", {"prompt": None, "response": "b"}, "null content", "prompt"),
    ("supervised", {"prompt": float("nan"), "response": "b"}, "wrong type", "float"),
    ("supervised", {"prompt": "a", "response": ["b"]}, "wrong type", "list"),
    ("supervised", {"prompt": "a", "response": " \t\n"}, "empty text", "response"),
    ("supervised", {"prompt": "a\ud83d", "response": "b"}, "broken text", "U+D83D"),
    ("supervised", {"prompt": "a\0", "response": "b"}, "control character", "NUL"),
    ("supervised", {"prompt": "a\x1b[31m", "response": "b"}, "control character", "U+001B"),
    ("supervised", {"messages": [ASK, ANSWER]}, "wrong form", "approach: chat"),
    ("chat", {"conversations": [{"from": "human", "value": "a"}]}, "wrong form", "human: user"),
    ("chat", {"messages": '[{"role": "user"'}, "not JSON", "messages"),
    ("chat", {"messages": [ASK, {**ANSWER, "tool_calls": []}]}, "message keys", "tool_calls"),
    ("chat", {"messages": [ASK, {"role": "assistant"}]}, "message keys", "content"),
    ("chat", {"messages": [{**ASK, "role": "tool"}, ANSWER]}, "unknown role", "tool"),
    ("chat", {"messages": [ASK, SYSTEM, ANSWER]}, "system not first", "message 2"),
    ("chat", {"messages": [SYSTEM, SYSTEM, ASK, ANSWER]}, "system not first", "message 2"),
    ("chat", {"messages": [ANSWER, ASK, ANSWER]}, "user not first", "assistant"),
    ("chat", {"messages": [SYSTEM, ASK, ANSWER, ANSWER]}, "repeated role", "messages 3 and 4"),
    ("chat", {"messages": [ASK, ANSWER, ASK]}, "last not assistant", "last"),
    ("chat", {"messages": []}, "too few turns", "none"),
    ("continued_pretraining", {"text": ""}, "empty text", "text"),
    ("continued_pretraining", {"content": "a"}, "missing key", "text"),
]


@pytest.mark.parametrize("approach, row, rule, named", BROKEN_ROWS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_broken_row_says_rule_detail_and_fix(approach, row, rule, named):
    problem = to_record(row, Form(approach))
    assert isinstance(problem, Broken) and problem.rule == rule and all(problem) and named in f"{problem.detail} {problem.fix}"


def test_every_rule_has_a_row_that_breaks_it():
    assert {rule for _, _, rule, _ in BROKEN_ROWS} == set(RULES)


def test_columns_template_split_columns_and_system_prompt():
    form = Form("supervised", {"response": "German"}, prompt_template="Translate: {English}", system_prompt="Be exact.", group="doc", label="kind", time="when")
    row = {"English": "good day", "German": "guten Tag", "doc": 12, "kind": "greeting", "when": 1700000000.5, "note": None}
    record = to_record(row, form)
    assert record["prompt"] == "Translate: good day" and [m["role"] for m in record["messages"]] == ["system", "user", "assistant"]
    assert (record["group"], record["label"], record["time"]) == ("12", "greeting", "1700000000.5")
    for column in ("doc", "kind", "when", "English"):
        assert to_record({**row, column: None}, form).rule == "missing key" and column in to_record({**row, column: None}, form).detail
    kept = to_record({"messages": json.dumps([SYSTEM, ASK, ANSWER])}, Form("chat", system_prompt="ours"))
    assert kept["messages"][0] == SYSTEM, "a row's own system message stays"
    with pytest.raises(BadInput):
        Form("supervised", prompt_template="{row.__class__}")


def test_validate_counts_all_and_shows_the_first_places():
    verdict = validate_rows(((f"x.jsonl:{i}", PAIR if i % 2 else {"prompt": "a"}) for i in range(1, 10_001)), "instruction")
    count, places, _ = verdict.ours["missing key"]
    assert count == 5000 and places == ["x.jsonl:2", "x.jsonl:4", "x.jsonl:6", "x.jsonl:8", "x.jsonl:10"] and "5,000" in "\n".join(verdict.lines())
    with pytest.raises(BadInput):
        validate_rows([], "csv")


# 2,000 generated rows: any JSON value (and what CSV and Parquet readers add) under any key, and good rows with one thing changed.
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.just(10**300) | st.floats() | ANY_TEXT | st.binary(max_size=4) | st.dates() | st.datetimes()
KEYS = st.sampled_from(["prompt", "response", "completion", "messages", "text", "conversations", "role", "content", "group", "label", "when", "last", "a"]) | ANY_TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=10)
ROWS = st.dictionaries(KEYS, VALUES, max_size=6)


def places(value, path=()):
    """Yield the path of each value inside a row."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@st.composite
def mutated(draw):
    """A good row in which one value is replaced, removed or doubled."""
    row = copy.deepcopy(draw(st.sampled_from([{**good, "group": "g", "label": "l", "when": 3} for good in (PAIR, TALK, TEXT)])))
    *way, last = draw(st.sampled_from([path for path in places(row) if path]))
    inside = row
    for key in way:
        inside = inside[key]
    change = draw(st.sampled_from(["replace", "remove", "double", "rename"]))
    if change == "replace":
        inside[last] = draw(VALUES)
    elif change == "remove":
        del inside[last]
    elif isinstance(inside, list):
        inside.insert(last, inside[last])
    else:
        inside[draw(KEYS)] = inside.pop(last) if change == "rename" else inside[last]
    return row


FORMS = [Form(approach, **more) for approach in APPROACHES for more in (
    {}, {"group": "group", "label": "label", "time": "when", "system_prompt": "Be brief."}, {"prompt_template": "Say {a}: {prompt}", "columns": {"response": "text"}})]


def texts(record):
    yield from (record[name] for name in ("prompt", "response", "group", "label", "time"))
    for message in record["messages"]:
        assert set(message) == {"role", "content"}
        yield from message.values()


@settings(max_examples=2000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(ROWS | mutated())
def test_generated_rows(row):
    before = repr(row)
    for form in FORMS:
        outcome = to_record(row, form)
        if isinstance(outcome, Broken):
            assert outcome.rule in RULES and all(part.strip() and part.isascii() and len(part) <= 300 for part in outcome)
            continue
        assert all(isinstance(text, str) and not UNPRINTABLE.search(text) for text in texts(outcome))
        assert outcome["response"].strip() and (outcome["prompt"].strip() or form.approach == "continued_pretraining")
        if outcome["messages"]:
            assert (outcome["messages"][-2]["content"], outcome["messages"][-1]["content"]) == (outcome["prompt"], outcome["response"])
            assert [m["role"] for m in outcome["messages"] if m["role"] != "system"] == ["user", "assistant"] * (len(outcome["messages"]) // 2)
    assert repr(row) == before, "the customer's row is not changed"
    for as_format in FORMATS:
        verdict = validate_rows([(1, row)], as_format)
        assert verdict.rows == 1 and verdict.lines()


def test_speed():
    import time

    rng = random.Random(1)
    rows = [{"messages": [{"role": ("user", "assistant")[i % 2], "content": f"{rng.random()} " + "word " * 40} for i in range(6)]} for _ in range(5000)]
    start, form = time.perf_counter(), Form("chat")
    assert all(isinstance(to_record(row, form), dict) for row in rows)
    print(f"{len(rows) / (time.perf_counter() - start):,.0f} conversations of 1.2 KB a second")


def test_the_table_of_rules_on_paper_is_current():
    import runpy
    from pathlib import Path

    script = Path(__file__).parent.parent / "docs/data_formats.py"
    assert script.with_suffix(".md").read_text() == runpy.run_path(str(script))["page"](), "run `python docs/data_formats.py`"
