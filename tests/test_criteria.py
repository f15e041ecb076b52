"""Criteria as data: every key is checked when the plan is read, and every mistake gets one message with place, rule and fix."""
import datetime
import re

import pytest
from mlflow.utils.validation import _validate_metric_name

from finetune_accel.core import criteria as criteria_module
from finetune_accel.core.criteria import Criterion, check_criteria, of_answers, validators
from finetune_accel.core.engagement import load_engagement, phases, read_yaml, shipped_engagements
from finetune_accel.core.errors import BadInput
from finetune_accel.core.settings import validate
from finetune_accel.plan import PlanSettings

ONE_CRITERION = {  # what is written: what the message must say
    "no metric": ({}, ["metric", "required"]),
    "unknown metric": ({"metric": "bleu"}, ["'json_valid'", "'perplexity'"]),
    "unknown key": ({"metric": "exact_match", "atleast": 0.6}, ["did you mean `at_least`"]),
    "json_field without field": ({"metric": "json_field"}, ["needs `field`"]),
    "json_schema without schema": ({"metric": "json_schema"}, ["needs `json_schema`"]),
    "regex without pattern": ({"metric": "regex"}, ["needs `pattern`"]),
    "length without between": ({"metric": "length"}, ["needs `between`"]),
    "validator without validator": ({"metric": "validator"}, ["needs `validator`", "entry point"]),
    "field elsewhere": ({"metric": "exact_match", "field": "intent"}, ["`field` belongs to json_field and macro_f1 only"]),
    "pattern elsewhere": ({"metric": "exact_match", "pattern": "a"}, ["`pattern` belongs to regex only"]),
    "tolerance elsewhere": ({"metric": "exact_match", "tolerance": 0.1}, ["`tolerance` belongs to numeric only"]),
    "dialect elsewhere": ({"metric": "exact_match", "dialect": "mysql"}, ["`dialect` belongs to sql only"]),
    "schema elsewhere": ({"metric": "json_valid", "json_schema": {}}, ["`json_schema` belongs to json_schema only"]),
    "between elsewhere": ({"metric": "fuzzy_match", "between": [0.5, 2.0]}, ["`between` belongs to length only"]),
    "validator elsewhere": ({"metric": "regex", "pattern": "a", "validator": "aws-cli"}, ["`validator` belongs to validator only"]),
    "field of a likelihood": ({"metric": "perplexity", "field": "intent"}, ["belongs to json_field and macro_f1 only"]),
    "empty field": ({"metric": "json_field", "field": ""}, ["at least 1 character"]),
    "field is a number": ({"metric": "json_field", "field": 1}, ["must be text"]),
    "schema is a text": ({"metric": "json_schema", "json_schema": "object"}, ["must be a mapping"]),
    "negative tolerance": ({"metric": "numeric", "tolerance": -0.1}, ["greater than or equal to 0"]),
    "one bound": ({"metric": "length", "between": [0.5]}, ["at least 2 items"]),
    "three bounds": ({"metric": "length", "between": [0.5, 1, 2]}, ["at most 2 items"]),
    "bounds in words": ({"metric": "length", "between": [50, 200]}, ["must hold 1"]),
    "bounds turned round": ({"metric": "length", "between": [2, 0.5]}, ["must hold 1"]),
    "negative bound": ({"metric": "length", "between": [-1, 2]}, ["must hold 1"]),
    "bound that is no number": ({"metric": "length", "between": [0.5, float("nan")]}, ["finite"]),
    "at_least above one": ({"metric": "exact_match", "at_least": 2.0}, ["less than or equal to 1"]),
    "at_least no number": ({"metric": "exact_match", "at_least": float("nan")}, ["finite"]),
    "at_least in quotes": ({"metric": "exact_match", "at_least": "0.6"}, ["must be a number", "without quotes"]),
    "at_least where lower is better": ({"metric": "refusal", "at_least": 0.5}, ["write `at_most`"]),
    "at_most where higher is better": ({"metric": "exact_match", "at_most": 0.5}, ["takes `at_least`"]),
    "at_most of nothing": ({"metric": "perplexity", "at_most": 0.0}, ["greater than 0"]),
    "at_most above a share": ({"metric": "repetition", "at_most": 1.5}, ["never above 1"]),
    "at_most above Brier's": ({"metric": "brier", "at_most": 3.0}, ["never above 2"]),
    "unknown baseline": ({"metric": "exact_match", "better_than": "champion"}, ["'base'", "'nearest'", "'classical'"]),
    "examples for a perplexity": ({"metric": "perplexity", "better_than": "base+K"}, ["`base` only"]),
    "examples for a choice": ({"metric": "choice", "better_than": "base+K nearest"}, ["`base` only"]),
    "nearest for Brier": ({"metric": "brier", "better_than": "nearest"}, ["`base` only"]),
    "a classifier's whole answer": ({"metric": "exact_match", "better_than": "classical"}, ["only names a label", "json_field and macro_f1"]),
    "weight of nothing": ({"metric": "exact_match", "weight": 0.0}, ["greater than 0"]),
    "infinite weight": ({"metric": "exact_match", "weight": float("inf")}, ["finite"]),
}


@pytest.mark.parametrize("name", ONE_CRITERION)
def test_a_bad_criterion_is_refused_with_its_rule(name):
    values, words = ONE_CRITERION[name]
    with pytest.raises(BadInput) as error:
        validate(PlanSettings, {"criteria": [{"metric": "exact_match"}, values]}, "plan")
    assert error.value.place.startswith("plan.criteria.1") and error.value.fix
    assert all(word in str(error.value) for word in words), str(error.value)


IN_A_PLAN = {  # the criteria, the approach: where, what the message must say
    "answers of a reader": ([{"metric": "exact_match"}], "continued_pretraining", "0", ["has none: it reads texts", "perplexity"]),
    "choices in a chat": ([{"metric": "perplexity"}, {"metric": "choice_normalised"}], "chat", "1", ["approach supervised", "chat"]),
    "examples in a chat": ([{"metric": "exact_match", "better_than": "base+K"}], "chat", "0", ["one answer a prompt", "better_than: base"]),
    "nearest in a chat": ([{"metric": "exact_match", "better_than": "nearest"}], "chat", "0", ["one answer a prompt"]),
    "twice": ([{"metric": "numeric"}, {"metric": "sql"}, {"metric": "numeric", "at_least": 0.5}], "supervised", "0", ["2 criteria are called numeric"]),
    "bad pattern": ([{"metric": "regex", "pattern": "a("}], "supervised", "0.pattern", ["'a('", "escaped"]),
    "endless pattern": ([{"metric": "regex", "pattern": "(" * 20_000}], "supervised", "0.pattern", ["no regular expression"]),
    "unknown validator": ([{"metric": "validator", "validator": "nobody's"}], "chat", "0.validator", ["nobody's", "aws-cli-operation"]),
    "unknown dialect": ([{"metric": "sql", "dialect": "latin"}], "supervised", "0.dialect", ["latin", "postgres"]),
    "unknown type": ([{"metric": "json_schema", "json_schema": {"properties": {"a": {"type": "strin"}}}}], "supervised", "0.json_schema",
                     ["$.properties.a.type", "strin"]),
    "schema elsewhere": ([{"metric": "json_schema", "json_schema": {"$ref": "https://example.com/s"}}], "supervised", "0.json_schema",
                         ["https://example.com/s", "$defs"]),
    "schema without its part": ([{"metric": "json_schema", "json_schema": {"items": {"$ref": "#/$defs/a"}}}], "supervised", "0.json_schema",
                                ["/$defs/a", "#/$defs/NAME"]),
    "schema with a bad pattern": ([{"metric": "json_schema", "json_schema": {"pattern": "("}}], "supervised", "0.json_schema", ["$.pattern"]),
    "schema with a date": ([{"metric": "json_schema", "json_schema": {"const": datetime.date(2026, 1, 1)}}], "supervised", "0.json_schema", ["dates"]),
    "schema of no draft": ([{"metric": "json_schema", "json_schema": {"$schema": 7}}], "supervised", "0.json_schema", ["JSON Schema"]),
}


@pytest.mark.parametrize("name", IN_A_PLAN)
def test_a_criterion_that_cannot_be_measured_is_refused_when_the_plan_is_read(name):
    criteria, approach, where, words = IN_A_PLAN[name]
    with pytest.raises(BadInput) as error:
        PlanSettings(approach=approach, criteria=[Criterion(**values) for values in criteria])
    assert error.value.place == f"plan.criteria.{where}" and error.value.fix
    assert all(word in str(error.value) for word in words), str(error.value)


def test_sql_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(criteria_module, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r'pip install "finetune-accel\[sql\]"'):
        check_criteria([Criterion(metric="sql")], "supervised")


def test_a_validator_that_cannot_be_imported_or_called_is_refused(tmp_path, monkeypatch):
    """A package of one's own, installed in a folder: its entry points are found, and what they name is tried out."""
    info = tmp_path / "mine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[finetune_accel.validators]\ngone = mine_gone:f\nbroken = mine_broken:f\nvalue = mine_whole:VALUE\nwhole = mine_whole:f\n")
    (tmp_path / "mine_broken.py").write_text("raise RuntimeError('no licence')\n")
    (tmp_path / "mine_whole.py").write_text("VALUE = 1\ndef f(answer, reference):\n    return len(answer) <= 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert {"gone", "broken", "value", "whole", "aws-cli"} <= set(validators())
    check_criteria([Criterion(metric="validator", validator="whole")], "chat")
    for name, words in {"gone": "cannot be imported.*mine_gone", "broken": "no licence", "value": "no function"}.items():
        with pytest.raises(BadInput, match=words) as error:
            check_criteria([Criterion(metric="validator", validator=name)], "chat")
        assert error.value.place == "plan.criteria.0.validator" and name in error.value.rule


ALL = [{"metric": "json_valid"}, {"metric": "json_schema", "json_schema": {"type": "object"}}, {"metric": "json_field", "field": "größe/x"},
       {"metric": "json_fields"}, {"metric": "exact_match"}, {"metric": "normalised_match"}, {"metric": "fuzzy_match"}, {"metric": "macro_f1"},
       {"metric": "macro_f1", "field": "intent", "better_than": "classical"}, {"metric": "regex", "pattern": "^(a|b)+$"},
       {"metric": "regex", "pattern": "[0-9]{4}"}, {"metric": "numeric"}, {"metric": "numeric", "tolerance": 0.01}, {"metric": "sql"},
       {"metric": "sql", "dialect": "postgres"}, {"metric": "length", "between": [0.5, 2]}, {"metric": "refusal", "at_most": 0.05},
       {"metric": "repetition", "better_than": "base+K nearest"}, {"metric": "validator", "validator": "aws-cli"}, {"metric": "choice", "better_than": "base"},
       {"metric": "choice_normalised"}, {"metric": "brier", "at_most": 0.5}, {"metric": "perplexity", "at_most": 12.0, "weight": 2.0}]


def test_names_are_unique_and_what_mlflow_allows():
    criteria = [Criterion(**values) for values in ALL]
    check_criteria(criteria, "supervised")
    names = [criterion.name for criterion in criteria]
    assert len(set(names)) == len(names) and {"json_field:größe_x", "regex:a_b", "length:0.5-2", "validator:aws-cli"} <= set(names)
    for name in names:
        _validate_metric_name(name)
    long = Criterion(metric="regex", pattern="(../" + "very " * 100 + "long)").name
    _validate_metric_name(long)
    assert len(long) < 60


def test_what_is_written_down_is_read_back_and_holds_only_what_was_said():
    for values in ALL:
        criterion = Criterion(**values)
        assert criterion.model_dump() == criterion.model_dump(mode="json") == {"weight": 1.0, **values}
        assert Criterion(**criterion.model_dump()) == criterion


def test_what_scores_answers_and_what_the_model_measures():
    criteria = [Criterion(**values) for values in ALL]
    assert [c.metric for c in criteria if c not in of_answers(criteria)] == ["choice", "choice_normalised", "brier", "perplexity"]
    assert [c.metric for c in criteria if c.lower_is_better] == ["refusal", "repetition", "brier", "perplexity"]


def test_the_commented_criteria_of_the_starter_are_right():
    text = re.sub(r"^    # - ", "    - ", shipped_engagements()["starter"].read_text(), flags=re.M)
    criteria = read_yaml(text, "starter")["plan"]["criteria"]
    assert len(criteria) > 3
    PlanSettings(criteria=[Criterion(**values) for values in criteria])


def test_aws_cli_states_its_four_criteria(tmp_path):
    settings = load_engagement("aws-cli").settings(phases()[0], tmp_path)
    assert [c.name for c in settings.criteria] == ["validator:aws-cli", "validator:aws-cli-operation", "validator:aws-cli-flags", "exact_match"]
