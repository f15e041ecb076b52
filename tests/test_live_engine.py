"""The live reference engine: rows that come and go write what `core.generate` writes for each prompt alone."""

import asyncio
import json
import random
import shutil
import subprocess
import sys
import time

import jsonschema
import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from finetune_accel.core import generate, rows_engine
from finetune_accel.core.answering import load_live
from finetune_accel.core.engine_process import Ahead, EngineProcess
from finetune_accel.core.errors import BadInput
from finetune_accel.core.generate import Sampling, encode
from finetune_accel.core.grammar import ANY_OBJECT, check_schema
from finetune_accel.core.live import Ask, Worker
from finetune_accel.core.rows_engine import Rows
from finetune_accel.core.template import control_tokens

SENTENCES = ["turn on the lights", "stop the timer for 86 minutes", "what is the time now in the kitchen please", "off", "is it cold",
             "close the blinds in the bedroom", "open the garage door now", "set the lamp to 40 percent", "play it again", "hm"]
TOLD = "Answer with JSON. Labels: lights, timer, kitchen, blinds, door, lamp, bedroom. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"), [*SENTENCES, TOLD])


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Two adapters of different shape, large enough to change what is said."""
    made = {}
    for seed, (name, targets) in enumerate({"polite": ["q_proj", "v_proj", "down_proj"], "acme.v2": "all-linear"}.items()):
        torch.manual_seed(seed)
        plan = LoraConfig(r=4 + seed, lora_alpha=16, use_rslora=bool(seed), target_modules=targets)
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), plan)
        for key, weight in tuned.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.1)
        made[name] = tmp_path_factory.mktemp("adapter") / name
        tuned.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def loaded(folder):
    return Rows(folder)


@pytest.fixture
def engine(loaded):
    """An engine that nobody has asked anything yet; the same weights for all tests."""
    loaded.table, loaded.beginnings = rows_engine.Table(loaded.model, loaded.rows), rows_engine.Beginnings(loaded.model)
    loaded.waiting, loaded.writing, loaded.reading = [], [], None
    return loaded


def prompt(engine, sentence, prefix=""):
    return encode(engine.tokenizer, [{"role": "user", "content": prefix + sentence}])


def alone(model, ask, ends):
    """What the reference writes for one question: ids up to and with the end token."""
    with torch.no_grad():
        decoded = generate._decode_batch(model, [ask.prompt], None, ask.max_new_tokens, ask.sampling, lambda tokens: tokens[-1] in ends)
    return decoded[0][0]


def equal(model, ask, tokens, expected):
    """Whether an answer (or its beginning) is the reference's, up to where two tokens are equally likely but for rounding."""
    for at, (token, other) in enumerate(zip(ids(tokens), expected)):
        if token != other:
            with torch.no_grad():
                logits = model(torch.tensor([[*ask.prompt, *expected[:at]]])).logits[0, -1]
            return abs(logits[token] - logits[other]).item() < 1e-5
    return True


def run(engine, asks, dice=None, leave=0.0, watch=lambda: None):
    """Ask at random times (all at once without dice), abandon some; return {number: tokens}, {number: finish}."""
    said, finished, number, left = {n: [] for n in range(len(asks))}, {}, 0, set()
    while len(finished.keys() | left) < len(asks):
        while number < len(asks) and (dice is None or dice.random() < 0.4):
            engine.check(asks[number])
            engine.add(number, asks[number])
            number += 1
        if dice and number and dice.random() < leave:
            left.add(gone := dice.randrange(number))
            engine.cancel(gone)
        for step in engine.step():
            assert step.number not in left and step.number not in finished
            said[step.number] += step.tokens
            if step.finish:
                finished[step.number] = step.finish
        watch()
    assert not (engine.waiting or engine.writing or engine.reading or engine.table.lengths)
    return said, finished


def ids(tokens):
    return [token.id for token in tokens]


@pytest.mark.parametrize("seed", range(3))
def test_answers_do_not_depend_on_neighbours_arrivals_and_memory(engine, monkeypatch, seed):
    dice = random.Random(seed)
    monkeypatch.setattr(rows_engine, "CHUNK", 16)
    monkeypatch.setattr(generate, "TOKENS_IN_FLIGHT", 1_000)  # so that answers are put back and read again
    monkeypatch.setattr(engine, "piece", 24)
    asks = [Ask(prompt(engine, dice.choice(SENTENCES) + " please" * dice.randrange(9), dice.choice(["", TOLD])), dice.randrange(1, 60),
                Sampling(*dice.choice([(0.0,), (1.3, 0.9, dice.randrange(99)), (0.7, 1.0, 7)]))) for _ in range(24)]
    often = alone(engine.model, asks[0], set())  # end tokens that come up, so that answers end by themselves
    monkeypatch.setattr(engine, "ends", {None: {*engine.ends[None], often[-1]}})
    put_back, drop, seen = [], engine._drop, []
    monkeypatch.setattr(engine, "_drop", lambda row: put_back.append(engine.writing[row]) or drop(row))

    def watch():
        seen.append(len(engine.writing))
        for layer in engine.table.cache.layers if engine.table.columns else []:
            held, _, columns, _ = layer.buffers[0].shape
            assert held * columns <= 1_000 and len(engine.writing) <= held and max(engine.table.lengths, default=0) <= columns

    said, finished = run(engine, asks, dice, leave=0.05, watch=watch)
    assert max(seen) > 1 and any(answer.written and answer.number in finished for answer in put_back)
    assert not engine.table.columns  # nothing is held for nobody
    for number, ask in enumerate(asks):
        expected = alone(engine.model, ask, engine.ends[None])
        assert equal(engine.model, ask, said[number], expected)
        if number in finished:
            assert ask.sampling.temperature or ids(said[number]) == expected
            assert finished[number] == ("stop" if said[number][-1].id in engine.ends[None] else "length")
            assert finished[number] == "stop" or len(said[number]) == ask.max_new_tokens
    assert len(finished) > 12 and "length" in finished.values()


def test_questions_are_taken_in_their_order_and_what_grows_is_put_back(engine, monkeypatch):
    monkeypatch.setattr(rows_engine, "CHUNK", 16)
    monkeypatch.setattr(generate, "TOKENS_IN_FLIGHT", 300)
    asks = [Ask(prompt(engine, sentence), 60) for sentence in SENTENCES]
    said, first = {}, []
    for number, ask in enumerate(asks):
        engine.add(number, ask)
    rereads, add = [], engine.table.add
    monkeypatch.setattr(engine.table, "add", lambda cache: rereads.append(cache.get_seq_length()) or add(cache))
    while len(said) < len(asks) or engine.writing or engine.waiting or engine.reading:
        for step in engine.step():
            if step.number not in said:
                first.append(step.number)
            said.setdefault(step.number, []).extend(step.tokens)
    assert first == sorted(first)
    assert len(rereads) > len(asks)  # some were put back
    assert all(ids(said[n]) == alone(engine.model, ask, engine.ends[None]) for n, ask in enumerate(asks))


def test_a_shared_beginning_is_read_once(engine, monkeypatch):
    read, read_on = [], rows_engine.read_on
    monkeypatch.setattr(rows_engine, "read_on", lambda model, cache, piece: read.append(len(piece)) or read_on(model, cache, piece))
    asks = [Ask(prompt(engine, sentence, TOLD), 5) for sentence in SENTENCES]
    said, _ = run(engine, asks)
    assert sum(read) < 0.3 * sum(len(ask.prompt) for ask in asks)
    assert max(read) <= rows_engine.PIECE
    assert all(ids(said[n]) == alone(engine.model, ask, engine.ends[None]) for n, ask in enumerate(asks))
    for number in range(40):  # others, until the memory for beginnings is full
        engine.beginnings.keep(None, [number] * 900, None)
    assert sum(len(known) for _, known, _ in engine.beginnings.kept) <= rows_engine.PREFIX_COLUMNS


def test_seeds_and_chance(engine):
    ask = Ask(prompt(engine, SENTENCES[0]), 20, Sampling(1.5, 0.95, seed=3))
    said, _ = run(engine, [ask, *(Ask(ask.prompt, 20, Sampling(2.0)) for _ in range(4)), ask])
    texts = [tuple(ids(said[n])) for n in said]
    assert texts[0] == texts[5] == tuple(alone(engine.model, ask, engine.ends[None])) and len(set(texts[1:5])) > 1


def test_logprobs_are_those_of_the_model(engine):
    asks = [Ask(prompt(engine, "hm"), 6, Sampling(1.5, seed=1), logprobs=20), Ask(prompt(engine, "off"), 6, logprobs=0),
            Ask(prompt(engine, "off"), 6, schema='{"enum": [false]}', logprobs=2)]
    said, _ = run(engine, asks)
    for number, ask in enumerate(asks):
        text = [*ask.prompt, *ids(said[number])]
        with torch.no_grad():
            expected = engine.model(torch.tensor([text])).logits[0].log_softmax(-1)[len(ask.prompt) - 1:]
        for token, row in zip(said[number], expected):
            assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
            values, likeliest = row.topk(20)
            assert [i for i, _ in token.top] == likeliest[:ask.logprobs].tolist()
            assert [value for _, value in token.top] == pytest.approx(values[:ask.logprobs].tolist(), abs=1e-4)
    assert said[1][0].top == () and engine.tokenizer.decode(ids(said[2]), skip_special_tokens=True) == "false"


SCHEMAS = [
    {"type": "object", "properties": {"intent": {"enum": ["On", "Off", "Timer"]}, "level": {"type": "integer", "minimum": -5, "maximum": 120}},
     "required": ["intent", "level"], "additionalProperties": False},
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "tags": {"type": "array", "items": {"enum": ["a", "é", "\"", None]},
     "minItems": 1, "maxItems": 3}, "in": {"$ref": "#/$defs/in"}}, "required": ["tags", "in"], "additionalProperties": False,
     "$defs": {"in": {"anyOf": [{"const": {"deep": [1, True]}}, {"type": "null"}]}}},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
    {"type": "string", "format": "date"},
    {"type": "boolean"},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_answers_follow_a_schema(engine, schema):
    hows = [Sampling(), *(Sampling(t, seed=s) for s in range(3) for t in (0.7, 5.0))]  # random weights know no JSON
    asks = [Ask(prompt(engine, sentence), 400, how, schema=json.dumps(schema)) for how, sentence in zip(hows, SENTENCES)]
    plain = Ask(prompt(engine, "hm"), 30)
    said, finished = run(engine, [*asks, plain])
    for number in range(len(asks)):
        assert finished[number] == "stop" and said[number][-1].id in engine.ends[None]
        answer = json.loads(engine.tokenizer.decode(ids(said[number])[:-1]))
        jsonschema.validate(answer, schema, format_checker=jsonschema.FormatChecker())
    assert ids(said[len(asks)]) == alone(engine.model, plain, engine.ends[None])  # a neighbour is not touched


def test_any_object_and_an_answer_that_is_cut(engine):
    said, finished = run(engine, [Ask(prompt(engine, "hm"), 5, Sampling(3.0, seed=n), schema=ANY_OBJECT) for n in range(5)])
    assert all(engine.tokenizer.decode(ids(tokens)).startswith("{") for tokens in said.values()) and "length" in finished.values()


def test_a_model_with_more_logits_than_tokens(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 61)
    model.save_pretrained(shutil.copytree(folder, tmp_path / "padded"), max_shard_size="1GB")
    engine = Rows(tmp_path / "padded")
    asks = [Ask(prompt(engine, "hm"), 60, Sampling(9.0, seed=n), schema=json.dumps(SCHEMAS[0])) for n in range(4)]
    said, _ = run(engine, asks)
    for tokens in said.values():
        jsonschema.validate(json.loads(engine.tokenizer.decode(ids(tokens), skip_special_tokens=True)), SCHEMAS[0])


HOSTILE = {
    "deep": "[" * 60_000,
    "nested": '{"items":' * 5_000 + "{}" + "}" * 5_000,
    "large": json.dumps({"enum": [f"word {i}" for i in range(9_000)]}),
    "divisors": json.dumps({"allOf": [{"type": "integer", "multipleOf": m} for m in (97, 89, 83)]}),
    "patterns": json.dumps({"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(40)]}),
    "pattern properties": json.dumps({"type": "object", "patternProperties": {f"^(x|y)*{i}$": {} for i in range(400)}}),
    "every pattern allowed": json.dumps({"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{90 + i}}}c"} for i in range(8)]}),
    "products": json.dumps({"allOf": [{"anyOf": [{"type": "object", "properties": {f"{i} {j}": {}}} for j in range(4)]} for i in range(12)]}),
    "doubling": json.dumps({"$defs": {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(40)} | {"40": {"type": "null"}},
                            "$ref": "#/$defs/0"}),
    "long": '{"type": "array", "minItems": 1000000000, "items": {"type": "string", "minLength": 1000000000}}',
    "names": json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2_000)}}),
    "infinite": '{"type": "number", "multipleOf": 1e999}',
    "no text": '{"const": "\\ud800"}',
    "its own settings": '{"type": "string", "x-guidance": {"lenient": true}, "not": {}}',
    "from elsewhere": '{"$ref": "file:///etc/passwd"}',
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_hostile_schemas_cost_little(engine, schema):
    started = time.process_time()
    try:
        check_schema(engine.tokenizer, schema)
        run(engine, [Ask(prompt(engine, "hm"), 3, schema=schema)])
    except BadInput as error:
        assert error.place == "response_format" and len(str(error)) < 400
    assert time.process_time() - started < 3


def test_adapters_answer_side_by_side(folder, adapters):
    engine = load_live("reference", folder, adapters)
    asks = [Ask(prompt(engine, sentence, TOLD), 12, adapter=adapter) for sentence in SENTENCES[:4] for adapter in (None, *adapters)]
    said, _ = run(engine, asks, random.Random(0))
    models = {None: AutoModelForCausalLM.from_pretrained(folder)}
    models |= {name: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), where) for name, where in adapters.items()}
    for number, ask in enumerate(asks):
        assert ids(said[number]) == alone(models[ask.adapter].eval(), ask, engine.ends[ask.adapter])
    assert all(ids(said[n]) != ids(said[n + 1]) != ids(said[n + 2]) for n in range(0, len(asks), 3))
    with pytest.raises(BadInput, match="no adapter 'rude'"):
        engine.check(Ask([1], 1, adapter="rude"))


def test_an_adapter_has_its_own_template_and_must_fit(folder, adapters, tmp_path):
    own = shutil.copytree(adapters["polite"], tmp_path / "own")
    engine = Rows(folder)
    engine.tokenizer.chat_template = "Q: {{ messages[0]['content'] }} A:"
    engine.tokenizer.save_pretrained(own)
    with_own = Rows(folder, {"own": own, "plain": adapters["polite"]})
    assert with_own.tokenizers["own"].chat_template != with_own.tokenizer.chat_template
    assert with_own.tokenizers["plain"] is with_own.tokenizers[None] is with_own.tokenizer
    other = tiny_model(tmp_path / "other", ["quite another vocabulary of words and things"])
    with pytest.raises(BadInput, match="adapter own: its tokenizer"):
        Rows(other, {"own": own})
    (own / "adapter_model.safetensors").write_bytes(b"\xff" * 99)
    with pytest.raises(BadInput, match="adapter own: no adapter_model.safetensors can be read"):
        Rows(folder, {"own": own})
    (own / "adapter_config.json").write_text("[]")
    with pytest.raises(BadInput, match="is no LoRA adapter"):
        Rows(folder, {"other": own})
    with pytest.raises(BadInput, match="engine: openvino.*reference"):
        load_live("openvino", folder, adapters)


def test_a_model_with_windows_answers_row_by_row(folder, tmp_path):
    config = Gemma3TextConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                              head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                              max_position_embeddings=512, initializer_range=0.2)
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(shutil.copytree(folder, tmp_path / "windows"))
    engine = Rows(tmp_path / "windows")
    assert not engine.plain
    dice = random.Random(1)
    asks = [Ask(prompt(engine, sentence), dice.randrange(2, 20)) for sentence in SENTENCES]
    engine.table.lengths = engine.table.caches  # for what `run` looks at
    said, finished = run(engine, asks)
    assert len(finished) == len(asks)
    assert all(ids(said[n]) == alone(engine.model, ask, engine.ends[None]) for n, ask in enumerate(asks))


@pytest.mark.parametrize("change, place", [({"prompt": []}, "messages"), ({"max_new_tokens": 0}, "max_tokens"),
                                           ({"max_new_tokens": 2_000}, "messages"), ({"logprobs": 21}, "top_logprobs"),
                                           ({"schema": "{"}, "response_format"), ({"adapter": "x"}, "model")])
def test_what_is_refused(engine, change, place):
    with pytest.raises(BadInput) as refused:
        engine.check(Ask(**{"prompt": [5, 6], "max_new_tokens": 3} | change))
    assert refused.value.place == place


def test_a_worker_streams_cuts_at_stop_texts_and_frees_places(folder):
    async def talk():
        worker = Worker(load_live("reference", folder), waiting=4)
        engine = worker.engine
        try:
            (whole,) = worker.start([Ask(prompt(engine, SENTENCES[0]), 24)])
            pieces = [piece async for piece in whole]
            text, tokens = "".join(piece.text for piece in pieces), [token for piece in pieces for token in piece.tokens]
            assert ids(tokens) == alone(engine.model, whole.ask, worker.ends)
            stop = text[6:8]
            cut, left, *others = worker.start([Ask(prompt(engine, SENTENCES[0]), 24, stop=(stop,)), Ask(prompt(engine, SENTENCES[1]), 900),
                                               *(Ask(prompt(engine, sentence), 24) for sentence in SENTENCES[2:6])])

            async def read(stream):
                return "".join([piece.text async for piece in stream])

            said = await asyncio.gather(read(cut), *map(read, others))
            assert said[0] == text[:text.index(stop)]
            reader = aiter(left)
            await anext(reader)
            await reader.aclose()
            (after,) = worker.start([Ask(prompt(engine, "off"), 5)])
            await read(after)
            assert not worker.streams and not engine.writing and worker.problem() is None
        finally:
            worker.close()
            worker._thread.join(10)

    asyncio.run(talk())


def test_a_process_takes_many_questions_at_once_and_refuses_the_bad_one(engine, folder):
    asks = [Ask(prompt(engine, SENTENCES[0]), 5), Ask(prompt(engine, SENTENCES[1]), 2_000), Ask(prompt(engine, SENTENCES[2]), 3)]
    child = EngineProcess("reference", folder)
    try:
        refused = child.take(list(enumerate(asks)))
        assert list(refused) == [1] and refused[1].place == "messages" and "pass the model's context" in refused[1].rule
        said, going = {0: [], 2: []}, {0, 2}
        while going:
            for step in child.step():
                said[step.number] += ids(step.tokens)
                going -= {step.number} if step.finish else set()
        assert said == {number: alone(engine.model, asks[number], engine.ends[None]) for number in said}
    finally:
        child.close()


def test_a_child_goes_on_unasked_and_forgets_what_was_cancelled(engine):
    ahead, asks = Ahead(engine), [Ask(prompt(engine, SENTENCES[0]), 9), Ask(prompt(engine, SENTENCES[1]), 6)]
    assert ahead.take(list(enumerate(asks))) == {} and ahead.idle()
    said, finished = ids(ahead.step()[1].tokens), None
    ahead.go_on()
    assert not ahead.idle() and {step.number for step in ahead.steps} == {0, 1}
    ahead.cancel(0)
    while not finished:
        (step,) = ahead.step()
        said, finished = said + ids(step.tokens), step.finish
        assert ahead.idle() is not bool(finished)
    assert said == alone(engine.model, asks[1], engine.ends[None]) and not engine.writing


def test_control_tokens_are_looked_up_once(folder, monkeypatch):
    tokenizer, asked = AutoTokenizer.from_pretrained(folder), []
    monkeypatch.setattr(generate, "control_tokens", lambda one: asked.append(one) or control_tokens(one))
    assert encode(tokenizer, SENTENCES[0]) == encode(tokenizer, SENTENCES[0])
    for _ in range(2):
        with pytest.raises(BadInput, match="control token"):
            encode(tokenizer, f"now {tokenizer.eos_token}")
    assert len(asked) == 1
    tokenizer.chat_template += " "  # a template may write tokens of its own
    encode(tokenizer, SENTENCES[0])
    assert len(asked) == 2


def test_a_program_that_ends_takes_its_engine_with_it(folder, tmp_path):
    script = tmp_path / "program.py"
    script.write_text("import sys\nfrom finetune_accel.core.engine_process import EngineProcess\n"
                      "if __name__ == '__main__':\n    print(EngineProcess('reference', sys.argv[1]).process.pid)\n")
    ended = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert not psutil.pid_exists(int(ended.stdout))
