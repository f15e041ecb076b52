"""Fast engines against the reference: the same prompts, the same greedy tokens, the same refusals."""

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from finetune_accel.core import answering, generate, sources
from finetune_accel.core.errors import BadInput
from finetune_accel.core.generate import Sampling

SENTENCES = ["turn on the lights", "stop the timer for 86 minutes", "what is the time now in the kitchen please", "off", "is it cold",
             "close the blinds in the bedroom", "open the garage door now", "set the lamp to 40 percent", "play it again", "hm"] * 4
TOLD = "Answer with JSON. Labels: lights, timer, kitchen, blinds, door, lamp, bedroom. " * 4
ASKED = [[{"role": "user", "content": f"{sentence} {number}"}] for number, sentence in enumerate(SENTENCES)]


def told(prefix):
    return [[{"role": "system", "content": f"{prefix}Answer."}, *conversation] for conversation in ASKED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of which tokens that it often writes end an answer, so that answers differ in length."""
    folder = tiny_model(tmp_path_factory.mktemp("tiny"), [*SENTENCES, TOLD])
    model, tokenizer = generate.load(folder)
    common = []
    for prefix in ("", TOLD):
        ids = [generate.encode(tokenizer, conversation) for conversation in told(prefix)]
        rows = generate._decode_batch(model, ids, None, 24, Sampling(), lambda _: False)
        written = [token for tokens, *_ in rows for token in tokens[4:]]
        common += sorted(set(written), key=lambda token: -written.count(token))[2:4]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.generation_config.eos_token_id = [tokenizer.eos_token_id, *common]
    plain.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return answering.load_engine("reference", folder)


@pytest.fixture(scope="module")
def openvino(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_ACCEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        before = sources.tree_digest(folder)
        engine = answering.load_engine("openvino", folder)
        assert sources.tree_digest(folder) == before, "a model folder is an output and stays as it is"
        yield engine


def plain(answers):
    return [(a.text, a.prompt_tokens, a.completion_tokens, a.finish_reason) for a in answers]


@pytest.mark.parametrize("prefix", ["", TOLD], ids=["no shared prefix", "shared prefix"])
def test_an_exact_engine_answers_as_the_reference(reference, openvino, prefix):
    asked, seen = told(prefix), []
    expected, answers = reference.generate(asked, 24), openvino.generate(asked, 24, progress=lambda *now: seen.append(now))
    assert plain(answers) == plain(expected) and len({a.completion_tokens for a in expected}) > 1
    assert {a.finish_reason for a in expected} == {"stop", "length"} and seen[-1] == (len(asked), len(asked))
    assert all(a.seconds > 0 for a in answers)


def test_texts_and_stop_texts(reference, openvino):
    asked = ["turn on the", "what is", ASKED[0]]
    (whole,) = openvino.generate(asked[:1], 24)
    stop = [whole.text[3:5]]
    assert plain(openvino.generate(["a"], 24)) == plain(reference.generate(["a"], 24)) and openvino.generate(["a"], 24)[0].prompt_tokens == 1
    expected, answers = reference.generate(asked, 24, stop=stop), openvino.generate(asked, 24, stop=stop)
    assert plain(answers) == plain(expected) and answers[0].finish_reason == "stop" and len(answers[0].text) <= 3
    assert plain(openvino.generate(asked, 24)) == plain(reference.generate(asked, 24)), "what stopped early leaves nothing behind"


def test_one_token_and_nothing(reference, openvino):
    assert plain(openvino.generate(ASKED[:3], 1)) == plain(reference.generate(ASKED[:3], 1))
    assert openvino.generate([], 5) == []


def test_the_same_prompts_are_refused(openvino):
    with pytest.raises(BadInput, match="context of 1024"):
        openvino.generate([ASKED[0], [{"role": "user", "content": "lights " * 2000}]], 8)
    with pytest.raises(BadInput, match="control token"):
        openvino.generate([[{"role": "user", "content": "<|im_start|>system"}]], 8)
    assert len(openvino.generate(ASKED[:1], 8)) == 1, "a refusal leaves the engine as it was"


def test_sampling_repeats_with_a_seed_and_follows_the_temperature(reference, openvino):
    hot = Sampling(temperature=1.5, seed=3)
    first, again = (openvino.generate(ASKED[:4], 12, sampling=hot) for _ in range(2))
    assert plain(first) == plain(again) != plain(openvino.generate(ASKED[:4], 12))
    cold = openvino.generate(ASKED[:4], 12, sampling=Sampling(temperature=1e-4, seed=3))
    assert plain(cold) == plain(reference.generate(ASKED[:4], 12)), "next to no temperature is greedy"


def test_batch_size_does_not_change_the_reference(reference):
    model, tokenizer = reference.model, reference.tokenizer
    alone, *others = (plain(generate.generate(model, tokenizer, ASKED[:12], 24, batch_size=size)) for size in (1, 2, 32))
    assert others == [alone, alone]


def test_a_graph_is_converted_once(openvino, folder):
    from finetune_accel.core import openvino_graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_graph, "traced", lambda _: pytest.fail("converted again"))
        assert (openvino_graph.converted(folder) / "openvino_model.bin").is_file()


def test_windows_are_refused_kindly(tmp_path, folder):
    config = MistralConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=1, sliding_window=8)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="mistral, whose layers look at a window"):
        answering.load_engine("openvino", tmp_path)


def test_conversions_are_reported_to_nobody(openvino):
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"


def test_settings_name_the_engines_that_there_are():
    from typing import get_args

    from finetune_accel.evaluate import EvaluateSettings

    assert get_args(EvaluateSettings.model_fields["engine"].annotation) == answering.ENGINES


def test_an_engine_is_checked_before_it_is_used(openvino, folder, tmp_path, monkeypatch):
    from finetune_accel.core import asking, fidelity
    from finetune_accel.core.criteria import Criterion
    from finetune_accel.core.kept_answers import KeptAnswers

    items = [{"id": str(i), "group": str(i), "prompt": SENTENCES[i], "response": "on", "messages": [*ASKED[i], {"role": "assistant", "content": "on"}]}
             for i in range(len(ASKED))]
    form, words = {"approach": "supervised", "system_prompt": None}, [Criterion(metric="length", between=[0, 999])]
    checked = fidelity.check_engine(folder, items, form, words, KeptAnswers(tmp_path, "digest", 12, "openvino"), seed=1)
    assert (checked["verdict"], checked["equal"], checked["prompts"]) == ("exact", len(ASKED), len(ASKED))

    class Careless:
        tokenizer, model = openvino.tokenizer, openvino.model

        def generate(self, prompts, *_, **__):
            return [generate.Generation("something else", 1, 1, "stop", 0.1) for _ in prompts]

    load = asking.load_engine
    monkeypatch.setattr(asking, "load_engine", lambda name, model: load(name, model) if name == "reference" else Careless())
    with pytest.raises(BadInput, match="openvino-bf16 is not admitted .* 0 of 40 answers"):
        fidelity.check_engine(folder, items, form, words, KeptAnswers(tmp_path, "digest", 12, "openvino-bf16"), seed=1)
    with pytest.raises(BadInput, match="which approach chat does not have"):
        fidelity.check_engine(folder, items, form | {"approach": "chat"}, words, KeptAnswers(tmp_path, "digest", 12, "openvino"), seed=1)


def test_the_server_answers_by_the_engine_it_is_given(openvino, reference, folder):
    from fastapi.testclient import TestClient

    from finetune_accel.core.served_models import load_models
    from finetune_accel.core.server import create_app

    with TestClient(create_app(load_models(str(folder), engine="openvino"))) as http:
        said = http.post("/v1/chat/completions", json={"messages": ASKED[3], "max_tokens": 12, "temperature": 0}).json()
    assert said["choices"][0]["message"]["content"] == reference.generate(ASKED[3:4], 12)[0].text


def test_recorded_steps_answer_as_the_reference(reference, folder):
    """What the engine cuda does, unrecorded: slots, padding and pieces are the same on a machine without a GPU."""
    from finetune_accel.core.cuda_engine import Recorded

    engine, stop = Recorded(folder), ["86", "light"]
    for asked in (told(""), told(TOLD)):
        assert plain(engine.generate(asked, 24)) == plain(reference.generate(asked, 24))
    assert plain(engine.generate(ASKED, 24, stop=stop)) == plain(reference.generate(ASKED, 24, stop=stop))
    drawn = [engine.generate(ASKED[:3], 12, Sampling(temperature=1.0, seed=seed)) for seed in (5, 5, 6)]
    assert plain(drawn[0]) == plain(drawn[1]) != plain(drawn[2])
    engine.steps.budget = 40
    with pytest.raises(BadInput, match="conversation 0: .* pass the 40 whose keys and values fit the GPU's memory"):
        engine.generate(told(TOLD)[:1], 24)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_before_anything_is_loaded(tmp_path):
    for load in (answering.load_engine, answering.load_live):
        with pytest.raises(BadInput, match="cuda-bf16 needs an NVIDIA GPU"):
            load("cuda-bf16", tmp_path / "nothing")
