"""OpenVINO step by step: answers that come and go are the reference's, draws follow their seed, and no question can end the engine."""

import asyncio
import random
import subprocess
import sys

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from finetune_accel.core import generate, openvino_engine
from finetune_accel.core.answering import load_engine, load_live
from finetune_accel.core.errors import BadInput
from finetune_accel.core.generate import Sampling
from finetune_accel.core.live import Ask, EngineDown, Worker

SENTENCES = ["turn on the lights", "stop the timer for 86 minutes", "what is the time now in the kitchen please", "off", "is it cold",
             "close the blinds in the bedroom", "open the garage door now", "set the lamp to 40 percent", "play it again", "hm"]
ASKED = [[{"role": "user", "content": f"{sentence} {number}"}] for number, sentence in enumerate(SENTENCES * 3)]
NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of which tokens that it often writes end an answer. Its weights are exact in float16, as OpenVINO keeps them."""
    folder = tiny_model(tmp_path_factory.mktemp("tiny"), SENTENCES)
    model, tokenizer = generate.load_plain(folder, torch.float32)
    model.half().float()
    ids = [generate.encode(tokenizer, conversation) for conversation in ASKED]
    written = [token for tokens, *_ in generate._decode_batch(model, ids, None, NEW, Sampling(), lambda _: False) for token in tokens[4:]]
    plain = AutoModelForCausalLM.from_pretrained(folder).half().float()
    plain.generation_config.eos_token_id = [tokenizer.eos_token_id, *sorted(set(written), key=lambda token: -written.count(token))[2:4]]
    plain.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return load_engine("reference", folder)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_ACCEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def engine(folder):
    return load_live("openvino", folder)


@pytest.fixture(scope="module")
def prompts(reference):
    return [generate.encode(reference.tokenizer, conversation) for conversation in ASKED]


def finish(engine, wanted):
    """Take steps until the answers `wanted` have ended; return {number: (tokens, finish)}."""
    got = {number: ([], None) for number in wanted}
    while any(end is None for _, end in got.values()):
        for number, tokens, end in engine.step():
            if number in got:
                got[number] = (got[number][0] + tokens, end)
    return got


def ids(answer):
    return [token.id for token in answer[0]]


async def read(stream, pieces=10_000):
    """Return (text, tokens, finish), leaving after `pieces`."""
    text, count = "", 0
    async for piece in stream:
        text, count, pieces = text + piece.text, count + len(piece.tokens), pieces - 1
        if piece.finish or not pieces:
            stream.close()
            return text, count, piece.finish


def test_answers_that_come_and_go_are_the_references(engine, reference, prompts):
    dice, worker = random.Random(1), Worker(engine)
    stop = reference.generate(ASKED[:1], NEW)[0].text[3:5]
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

    ends = asyncio.run(all_of_them())
    assert set(ends) == {"stop", "length", None}
    assert worker.problem() is None and not worker.streams


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
def test_logprobs_are_the_models_own(engine, reference, prompts, how):
    engine.add(1, Ask(prompts[1], NEW, how, logprobs=0))
    engine.add(2, Ask(prompts[1], NEW, how))
    answers = finish(engine, [1, 2])
    assert ids(answers[1]) == ids(answers[2]) and all(token.logprob is None for token in answers[2][0])
    with torch.no_grad():
        logits = reference.model(torch.tensor([prompts[1] + ids(answers[1])])).logits[0, len(prompts[1]) - 1:-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids(answers[1]))[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([token.logprob for token in answers[1][0]]), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("wrong, place", [({"logprobs": 2}, "top_logprobs"), ({"schema": '{"type": "object"}'}, "response_format"),
                                          ({"adapter": "polite"}, "model"), ({"max_new_tokens": 1024}, "messages")])
def test_what_it_cannot_do_is_refused(engine, prompts, wrong, place):
    with pytest.raises(BadInput) as refused:
        engine.check(Ask(**{"prompt": prompts[0], "max_new_tokens": 4, **wrong}))
    assert refused.value.place == place


@pytest.mark.parametrize("how", [Sampling(5e-324), Sampling(1e-50, seed=2**63 - 1), Sampling(2.0, 1e-300, seed=-1), Sampling(1e-50, 1e-50, 2**64 + 1)])
def test_the_coldest_draws_are_greedy(engine, prompts, how):
    """OpenVINO GenAI refuses such settings, and an engine that raises is down."""
    ask = Ask(prompts[2], NEW, how, logprobs=0)
    engine.check(ask)
    engine.add(1, ask)
    engine.add(2, Ask(prompts[2], NEW))
    answers = finish(engine, [1, 2])
    assert ids(answers[1]) == ids(answers[2])


def test_memory_is_bounded_and_what_cannot_fit_is_refused(folder, engine, prompts, monkeypatch):
    """With room for 96 tokens, answers wait for each other, or are begun again, and are what they would be alone."""
    a_token = 2 * 2 * 2 * 16 * 4  # bytes: layers, keys and values, heads, size, float32
    monkeypatch.setattr(openvino_engine, "cpu_memory", lambda: 2.0 * 96 * a_token)
    small = load_live("openvino", folder)
    long = [random.Random(number).choices(range(4, 300), k=60) for number in range(16)]
    for one in (engine, small):
        for number, prompt in enumerate(long):
            ask = Ask(prompt, 30, Sampling(temperature=number % 2, seed=number))
            one.check(ask)
            one.add(number, ask)
    assert finish(small, range(16)) == finish(engine, range(16))
    assert small.pipeline.get_metrics().cache_size_in_bytes == 96 * a_token < engine.pipeline.get_metrics().cache_size_in_bytes
    with pytest.raises(BadInput, match="60 prompt tokens and 37 answer tokens pass the 96 "):
        small.check(Ask(long[0], 37))
    with pytest.raises(BadInput, match="conversation 1"):
        small.generate([ASKED[0], [{"role": "user", "content": "lights " * 80}]], 8)


def test_a_cancelled_answer_frees_its_place(engine, prompts):
    for number in range(engine.rows + 1):
        engine.add(number, Ask(prompts[0], 100, Sampling(1.0, seed=number)))
    engine.step()
    for number in range(engine.rows):
        engine.cancel(number)
    engine.cancel(999)
    assert ids(finish(engine, [engine.rows])[engine.rows]), "who waited has its turn"
    assert engine.pipeline.get_metrics().scheduled_requests == 1
    engine.add(1, Ask(prompts[0], 100))
    engine.cancel(1)
    engine.cancel(1)
    assert not engine.pipeline.has_non_finished_requests()


def test_who_reads_when_it_is_closed_is_told(folder, prompts):
    worker = Worker(load_live("openvino", folder))

    async def closed():
        (stream,) = worker.start([Ask(prompts[0], 900, Sampling(1.0, seed=1))])
        with pytest.raises(EngineDown, match="closed"):
            async for _ in stream:
                worker.close()

    worker.ends.clear()
    worker.engine.ends = set()
    asyncio.run(closed())
    assert worker.engine.pipeline is None


LOADED_HERE_CLOSED_THERE = """
import os, signal, sys, threading
from finetune_accel.core.answering import load_live
engine = load_live("openvino", sys.argv[1])
thread = threading.Thread(target=engine.close)
thread.start()
thread.join()
signal.signal(signal.SIGTERM, lambda *_: print("heard"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_process_whose_engine_another_thread_closed_can_still_be_told_to_stop(folder):
    done = subprocess.run([sys.executable, "-c", LOADED_HERE_CLOSED_THERE, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and "heard" in done.stdout, (done.returncode, done.stderr)
