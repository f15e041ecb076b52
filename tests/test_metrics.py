"""Metrics: hand-made cases, agreement with the libraries that define them, and any text at all."""
import gzip
import io
import json
import time
import zipfile
from importlib.metadata import EntryPoint
from typing import get_args

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Indel
from sklearn.metrics import f1_score

from finetune_accel.core import aws_commands, metrics
from finetune_accel.core.criteria import OF_LIKELIHOODS, Criterion
from finetune_accel.core.errors import BadInput
from finetune_accel.core.metrics import SCORERS, label_of, labels_of, last_number, measure_of, normalise, score, score_all
from finetune_accel.core.sources import fetch_package
from finetune_accel.core.standins_aws import aws_commands as manual
from finetune_accel.core.statistics import interval

SCHEMA = {"type": "object", "properties": {"intent": {"enum": ["On", "Off"]}, "level": {"type": "integer", "multipleOf": 5}}, "required": ["intent"],
          "additionalProperties": False}
C = {"valid": Criterion(metric="json_valid"), "schema": Criterion(metric="json_schema", json_schema=SCHEMA), "field": Criterion(metric="json_field", field="a"),
     "fields": Criterion(metric="json_fields"), "exact": Criterion(metric="exact_match"), "normal": Criterion(metric="normalised_match"),
     "fuzzy": Criterion(metric="fuzzy_match"), "class": Criterion(metric="macro_f1"), "class a": Criterion(metric="macro_f1", field="a"),
     "regex": Criterion(metric="regex", pattern=r"[A-Z]{2}-\d{4}"), "slow": Criterion(metric="regex", pattern=r"(\w+\s?)+\d!"),
     "number": Criterion(metric="numeric"), "near": Criterion(metric="numeric", tolerance=0.01), "sql": Criterion(metric="sql"),
     "postgres": Criterion(metric="sql", dialect="postgres"), "mysql": Criterion(metric="sql", dialect="mysql"),
     "length": Criterion(metric="length", between=[0.5, 2]), "refusal": Criterion(metric="refusal"), "repetition": Criterion(metric="repetition"),
     "aws operation": Criterion(metric="validator", validator="aws-cli-operation"), "aws flags": Criterion(metric="validator", validator="aws-cli-flags")}
SELECT = "SELECT a, b FROM t WHERE c = 'X' AND d > 1"
CASES = [
    ("schema", '{"intent": "On", "level": 10}', "", 1), ("schema", '{"intent": "On", "level": 7}', "", 0), ("schema", '{"intent": "Up"}', "", 0),
    ("schema", "{}", "", 0), ("schema", '{"intent": "On"} yes', "", 0), ("schema", '{"intent": "On", "level": 1e308}', "", 0),
    ("fields", '{"a": 1, "b": 2}', '{"b": 2.0, "a": 1}', 1), ("fields", '{"a": 1}', '{"a": 1, "b": 2}', 2 / 3), ("fields", '{"c": 1}', '{"a": 1}', 0),
    ("fields", '{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 0.5), ("fields", "{}", "{}", 1), ("fields", "{}", '{"a": 1}', 0), ("fields", "[1]", "[1]", 0),
    ("normal", "The LAMP,\nis on!", "the lamp is on", 1), ("normal", "ﬁne STRASSE", "fine straße", 1), ("normal", "cafe\u0301", "café", 1),
    ("normal", "१२ हिन्दी", "१२  हिन्दी!", 1), ("normal", "-5", "5", 0), ("normal", "3.14", "3 14", 0), ("normal", "!", "?", 0), ("normal", "?!", " ?!", 1),
    ("normal", "lamp off", "lamp on", 0), ("normal", "minus-5", "minus 5", 1),
    ("fuzzy", "abcd", "abcd", 1), ("fuzzy", "abcd", "abce", 0.75), ("fuzzy", "xyz", "abc", 0),
    ("class", " on\n", "on", 1), ("class", "On", "on", 0), ("class a", '{"a": 1, "b": 2}', '{"a": 1.0}', 1), ("class a", '{"a": "1"}', '{"a": 1}', 0),
    ("class a", "{}", '{"b": 1}', 1), ("class a", "on", "on", 0),
    ("regex", " AB-1234\n", "", 1), ("regex", "AB-1234 and more", "", 0), ("regex", "so AB-1234", "", 0),
    ("number", "so it is 1,234.50 EUR.", "1234.5", 1), ("number", "2 and 3", "3", 1), ("number", "3 and 2", "3", 0), ("number", "three", "3", 0),
    ("number", "-5", "5", 0), ("number", "\u22125", "-5", 1), ("number", "5-3", "3", 1), ("number", "1e3", "1000", 1), ("number", "٣", "3", 1),
    ("number", "99999999999999999999999999999999998", "99999999999999999999999999999999999", 0), ("number", "0.1", "0.10", 1), ("number", "version2", "2", 0),
    ("near", "101", "100", 1), ("near", "101.1", "100", 0), ("near", "-99", "-100", 1), ("near", "0.001", "0", 0), ("near", "1e999", "1e999", 1),
    ("sql", "select a , b\nfrom T -- all\nwhere c='X' and d>1;", SELECT, 1), ("sql", SELECT.lower(), SELECT, 0), ("sql", SELECT + " LIMIT 1", SELECT, 0),
    ("sql", "```sql\n" + SELECT + "\n```", SELECT, 0), ("sql", "Sure! " + SELECT, SELECT, 0), ("sql", SELECT + "; " + SELECT, SELECT, 0),
    ("mysql", "select `a` from t", "SELECT a FROM t", 1), ("sql", "SELECT a != 1", "SELECT a <> 1", 1), ("postgres", "select x::int", "select cast(x as int)", 1),
    ("length", "ab", "abcd", 1), ("length", "a", "abcd", 0), ("length", "a" * 8, "abcd", 1), ("length", "a" * 9, "abcd", 0),
    ("refusal", "I'm sorry, but I cannot do that.", "on", 1), ("refusal", "I cannot.", "Sorry, I won't.", 0), ("refusal", "on", "on", 0),
    ("repetition", "and on " * 20, "on", 1), ("repetition", "and on " * 20, "and on " * 20, 0), ("repetition", "on", "on", 0),
    ("aws operation", "aws s3 ls s3://a", "aws s3 ls", 1), ("aws flags", "aws s3 ls --recursive", "aws s3 ls", 0), ("aws flags", "ls", "ls", 0),
]


@pytest.mark.parametrize("name, answer, reference, expected", CASES)
def test_hand_made_cases(name, answer, reference, expected):
    assert score(C[name], answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize("name", C)
def test_an_empty_answer_is_no_success_under_any_metric(name):
    worst = 1.0 if name in ("refusal", "repetition") else 0.0
    assert [score(C[name], text, "") for text in ("", " \n", "\u3000")] == [worst] * 3


NASTY = ["[" * 50_000, "(" * 50_000, '{"a":' * 5_000 + "1" + "}" * 5_000, "x" * 100_000, "1" * 100_000, "and on " * 15_000, " \n" * 50_000 + "x", "\ud800\udfff",
         "\0", "a " * 40 + "?", "select " + "(" * 3_000, "select a where " + " and ".join(f"x{i} = 1 or y{i} = 2" for i in range(800)), "-" * 100_000, "'" * 9_999,
         "1e999999999999", "1,000" * 2_000, '{"a": 1e400}', '{"a": "\\ud800"}', "9" * 5_000, '{"level": ' + "9" * 4_000 + ', "intent": "On"}', "\\\n" * 9_000 + "aws"]
FRAGMENTS = ["{", "}", "[", '"a"', ":", ",", "1", "-", ".", "e9", "null", "select ", " from ", "'", '"', "`", "--", "/*", ";", "::", "aws ", "ec2 ", "--flag ", "I'm sorry",
             "\n", " ", "NaN", "\u2212", "ﬁ", "\ud800", "\u0301", "{%", "$$"]
TEXTS = st.text(st.characters(exclude_categories=()), max_size=60) | st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join) | \
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                 lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "intent", "level", "é"]), inner, max_size=3),
                 max_leaves=6).map(json.dumps)


@settings(max_examples=300, deadline=None)
@given(answer=TEXTS, reference=TEXTS)
def test_never_raises_always_within_bounds_and_a_reference_is_the_best_answer_to_itself(answer, reference):
    for name, criterion in C.items():
        found = score(criterion, answer, reference)
        assert isinstance(found, float) and 0 <= found <= 1, name
        assert score(criterion, answer, reference) == found, name
        if name in ("exact", "normal", "fuzzy", "class", "length", "refusal", "repetition") and reference.strip():
            best = 0.0 if criterion.lower_is_better else 1.0
            assert score(criterion, reference, reference) == best, name


@pytest.mark.parametrize("number", range(len(NASTY)))
def test_nasty_texts_are_scored_in_seconds(number, monkeypatch):
    monkeypatch.setattr(metrics, "PATIENCE", 0.05)
    text, started = NASTY[number], time.monotonic()
    for name, criterion in C.items():
        for answer, reference in ((text, text), (text, "{}"), ("{}", text)):
            assert 0 <= score(criterion, answer, reference) <= 1, name
    assert time.monotonic() - started < 20


def test_a_pattern_that_would_take_for_ever_is_no_match_after_a_second():
    started = time.monotonic()
    assert score(Criterion(metric="regex", pattern=r"(a|aa)+$"), "a" * 5_000 + "b", "") == 0.0
    assert score(Criterion(metric="regex", pattern=r"(x+x+)+y"), "x" * 5_000, "") == 0.0
    assert time.monotonic() - started < 2 * metrics.PATIENCE + 3


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.booleans() | st.integers(-20, 20) | st.sampled_from(["On", "Off", "x"]),
                    lambda inner: st.dictionaries(st.sampled_from(["intent", "level", "x"]), inner, max_size=3), max_leaves=5))
def test_json_schema_agrees_with_jsonschema(value):
    valid = jsonschema.Draft202012Validator(SCHEMA).is_valid(value)
    assert score(C["schema"], json.dumps(value), "") == valid


def test_json_schema_keeps_to_the_draft_that_it_names():
    """`items` as a list is a rule for each place in draft 7 and an error in 2020-12."""
    old = Criterion(metric="json_schema", json_schema={"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "integer"}]})
    assert [score(old, text, "") for text in ('[1, "a"]', '["a"]')] == [1.0, 0.0]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=()), min_size=1), st.text(st.characters(exclude_categories=()), min_size=1))
def test_fuzzy_match_agrees_with_rapidfuzz(answer, reference):
    a, b = answer.strip(), reference.strip()
    if a:
        assert score(C["fuzzy"], answer, reference) == pytest.approx(Indel.normalized_similarity(a, b) if b else 0.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["a", "b", "c", "d", "e", "elsewhere", ""])), min_size=1, max_size=40))
def test_macro_f1_agrees_with_scikit_learn(pairs):
    wanted, given_ = zip(*pairs)
    ours = measure_of(C["class"], given_, wanted)
    assert ours.total == pytest.approx(f1_score(wanted, given_, labels=sorted(set(wanted)), average="macro", zero_division=0))
    as_json = measure_of(C["class a"], [json.dumps({"a": g}) if g else "" for g in given_], [json.dumps({"a": w, "b": 1}) for w in wanted])
    assert as_json.total == pytest.approx(ours.total)
    right = score_all([C["class"]], given_, wanted)["macro_f1"]
    assert right.tolist() == [float(w == g) for w, g in pairs]


def test_labels_are_told_apart_and_an_answer_without_one_is_never_right():
    field = C["class a"]
    assert [label_of(field, text) for text in ('{"a": "1"}', '{"a": 1}', '{"a": null}', "{}", "[]", "")] == ['"1"', "1", "null", "", None, None]
    wanted, given_ = labels_of(field, ["", "{}", "no", '{"a": 2}'], ['{"b": 1}', '{"b": 1}', "no object", '{"a": 1}'])
    assert wanted == ["(absent)", "(absent)", "(none)", "1"] and given_ == ["", "(absent)", "", ""]
    long = labels_of(C["class"], ["x" * 100_000, "on"], ["on", "on"])[1]
    assert long == ["", "on"], "what no reference names is not kept"


def test_measure_of_has_an_interval_for_every_metric():
    answers, references = ["on", "off", "on", ""] * 10, ["on", "off", "off", "on"] * 10
    exact, macro = measure_of(C["exact"], answers, references), measure_of(C["class"], answers, references)
    assert exact.total == 0.5 and exact.bounded and not exact.lower_is_better and exact.features.shape == (40, 2)
    assert macro.bounded and macro.total != exact.total
    fault = measure_of(C["refusal"], answers, references)
    assert fault.lower_is_better and fault.total == 0.25, "who says nothing has not answered"
    for measure in (exact, macro, fault):
        value, low, high = interval(measure, range(40))
        assert low < value < high


def test_a_criterion_that_no_reference_meets_is_a_mistake_in_the_plan():
    hopeless = {"valid": "lamp", "schema": '{"intent": "Up"}', "field": "[]", "fields": "[]", "regex": "ab-1234", "number": "one", "sql": "Sure! here", "class a": "on"}
    for name, reference in hopeless.items():
        with pytest.raises(BadInput, match="no reference answer would itself meet") as error:
            score_all([C["exact"], C[name]], ["x", "y"], [reference] * 2)
        assert C[name].name in error.value.place
    with pytest.raises(BadInput):
        measure_of(C["class a"], ["x"], ["on"])
    assert score_all([C["number"]], ["1", "2"], ["one", "2"])["numeric"].tolist() == [0, 1], "one that fits is enough"
    assert score_all([C["refusal"]], ["I cannot."], ["I cannot."])["refusal"].tolist() == [0]
    assert score_all([C["exact"], Criterion(metric="perplexity"), Criterion(metric="choice")], [], []).keys() == {"exact_match"}


def offers(monkeypatch, function: str):
    """Let an entry point `mine` refer to a function of a module of this test."""
    monkeypatch.setattr("finetune_accel.core.criteria.validators", lambda: {"mine": EntryPoint("mine", f"test_metrics:{function}", "finetune_accel.validators")})
    metrics._load_validator.cache_clear()


def half_right(answer, reference):
    return 0.5 if answer == "half" else np.bool_(answer == reference)


def raises(answer, reference):
    raise KeyError("no such product")


def too_much(answer, reference):
    return 7


def nothing(answer, reference):
    return None


def not_a_number(answer, reference):
    return float("nan")


def test_a_validator_scores_and_one_that_fails_is_named(monkeypatch):
    mine = Criterion(metric="validator", validator="mine")
    offers(monkeypatch, "half_right")
    assert score_all([mine], ["half", "a", "b", ""], ["a"] * 4)["validator:mine"].tolist() == [0.5, 1.0, 0.0, 0.0]
    for function, words in {"raises": "no such product", "too_much": "returned 7", "nothing": "NoneType", "not_a_number": "returned nan"}.items():
        offers(monkeypatch, function)
        with pytest.raises(BadInput, match=words) as error:
            score_all([mine], ["an answer"], ["a"])
        assert error.value.place == "validator mine" and function in error.value.rule and "an answer" in error.value.rule
    metrics._load_validator.cache_clear()


def test_every_metric_of_answers_has_a_scorer():
    assert set(SCORERS) == set(get_args(Criterion.model_fields["metric"].annotation)) - set(OF_LIKELIHOODS)
    assert {criterion.metric for criterion in C.values()} == set(SCORERS)


@settings(max_examples=200, deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-10**9, max_value=10**9))
def test_numbers_are_read_as_they_are_written(number):
    assert last_number(f"about 7, no: {number}.") == last_number(f"{number:,} EUR") == number


def test_normalising_twice_changes_nothing():
    for text in ("The LAMP, is on!", "ﬁne STRASSE", "İstanbul -3.14", "१२ हिन्दी", "\u1e9e"):
        assert normalise(normalise(text)) == normalise(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["aws", "ec2", "s3", "wait", "describe-instances", "--region", "--debug", "--ids", "'", '"', "\\\n", "|", "a=b", "--", "--x=1"]), max_size=12))
def test_aws_commands_are_read_or_refused_and_equal_themselves(words):
    text = " ".join(words)
    command = aws_commands.read_command(text)
    assert aws_commands.same_operation(text, text) == aws_commands.same_flags(text, text) == (command is not None)
    assert command is None or (text.replace("\\\n", " ").split()[0] == "aws" and command.service and command.operation)


def test_aws_commands_exist_or_not(monkeypatch):
    """A wheel as small as can be, of botocore's form: operations, flags, switches, pages and waiters are read from it."""
    model = {"operations": {"DescribeInstances": {"input": {"shape": "In"}}, "ListRegions": {}},
             "shapes": {"In": {"members": {"InstanceIds": {"shape": "L"}, "DryRun": {"shape": "B"}, "Filters": {"shape": "L"}}}, "L": {"type": "list"}, "B": {"type": "boolean"}}}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for service in ("ec2", "s3", "config"):
            archive.writestr(f"botocore/data/{service}/2016-11-15/service-2.json.gz", gzip.compress(json.dumps(model).encode()))
        archive.writestr("botocore/data/ec2/2016-11-15/paginators-1.json", json.dumps({"pagination": {"DescribeInstances": {}}}))
        archive.writestr("botocore/data/ec2/2016-11-15/waiters-2.json", json.dumps({"waiters": {"InstanceRunning": {"operation": "DescribeInstances"}}}))
        archive.writestr("botocore/data/ec2/2014-01-01/service-2.json.gz", gzip.compress(b"{}"))
    content.seek(0)
    monkeypatch.setattr(aws_commands, "fetch_package", lambda source: content)
    aws_commands._wheel.cache_clear(), aws_commands.operations.cache_clear()
    right = ["aws ec2 describe-instances --instance-ids i-1 --filters Name=a,Values=b", "aws ec2 describe-instances --no-dry-run --filter x", "aws ec2 list-regions",
             "aws --region eu ec2 --debug describe-instances --query 'a[*].b' --max-items 3", "aws ec2 wait instance-running --instance-ids=i-1",
             "aws s3api list-regions", "aws s3 cp a s3://b --recursive", "aws configservice list-regions", "aws ecr get-login-password", "aws ec2 describe-instances \\\n --dry-run"]
    wrong = ["aws ec2 describe-instance", "aws ec2 describe-instances --instances i-1", "aws ec2 describeinstances", "aws ec3 list-regions", "aws ec2 list-regions --max-items 3",
             "aws ec2 wait instance-stopped", "aws ec2 list-regions | wc", "aws s3 list-regions", "aws config list-regions", "aws ec2", "ec2 list-regions", "aws ec2 wait",
             "aws ec2 describe-instances --no-filters x", "aws ec2 describe-instances --d", "aws s3api cp a b", "Run: aws ec2 list-regions", "aws ec2 list-regions 'a"]
    try:
        assert [command for command in right if not aws_commands.valid(command, "")] == []
        assert [command for command in wrong if aws_commands.valid(command, "")] == []
        assert score(Criterion(metric="validator", validator="aws-cli"), right[0], "") == 1.0
    finally:
        aws_commands._wheel.cache_clear(), aws_commands.operations.cache_clear()


@pytest.mark.slow
def test_the_manuals_own_commands_are_accepted():
    commands = [row["response"] for row in manual(fetch_package("pypi:awscli"))]
    assert len(commands) > 7_000 and sum(aws_commands.valid(command, "") for command in commands) / len(commands) > 0.985
    assert all(aws_commands.same_flags(command, command) for command in commands)
