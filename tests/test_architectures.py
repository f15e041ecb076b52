"""Every supported architecture: a tiny random model through prepare, train, merge and serve, and a real run of one of them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import torch
from conftest import states
from fastapi.testclient import TestClient
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from finetune_accel.core.architectures import (
    ARCHITECTURES,
    fast_paths,
    member_config,
    require_supported,
)
from finetune_accel.core.blocks import Block
from finetune_accel.core.engagement import phases
from finetune_accel.core.formats import Form
from finetune_accel.core.generate import generate, load_plain, ready_for_messages
from finetune_accel.core.loss import causal_lm_loss
from finetune_accel.core.microscope import mask_table, prove, require_proofs
from finetune_accel.core.models import load_tokenizer
from finetune_accel.core.packing import lay_out_row
from finetune_accel.core.rows import RowRules, check_block
from finetune_accel.core.runs import RunFolder
from finetune_accel.core.saving import merged_model, save_adapter, save_model
from finetune_accel.core.served_models import load_models
from finetune_accel.core.server import create_app
from finetune_accel.core.template import (
    conversation,
    encode_records,
    end_of_turn,
    with_default_system,
)
from finetune_accel.core.training import TrainingPlan, train, training_dataset

ROOMS = ["hall", "kitchen", "bath", "attic", "cellar", "garden", "garage", "study"]
ROWS = [{"prompt": f"lights {way} in the {room}", "response": json.dumps({"intent": way, "room": room})} for room in ROOMS for way in ("on", "off")]
SYSTEM = "Answer with JSON."

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
THINKING = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
LLAMA = """{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
FOLDED = """{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}\
{% set turns = messages[1:] if system else messages %}{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}"""  # Mistral and Gemma know no system role
MISTRAL = FOLDED + """{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + '[/INST]' }}\
{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
GEMMA = FOLDED + """{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (system if loop.first else '') }}\
{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
PHI = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}\
{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"""

CHATML_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
# name: (model_type, template, named special tokens, other special tokens, token that ends a turn, what differs from the tiny shape)
CASES = {
    "llama": ("llama", LLAMA, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, ["<|start_header_id|>", "<|end_header_id|>"],
              "<|eot_id|>", {}),
    "smollm3": ("smollm3", THINKING, CHATML_TOKENS, ["<|im_start|>"], "<|im_end|>", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "mistral": ("mistral", MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}, ["[INST]", "[/INST]"], "</s>", {"sliding_window": None}),
    "mistral, window": ("mistral", MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}, ["[INST]", "[/INST]"], "</s>", {"sliding_window": 7}),
    "qwen2": ("qwen2", CHATML, CHATML_TOKENS, ["<|im_start|>"], "<|im_end|>", {"tie_word_embeddings": True}),
    "qwen2, base": ("qwen2", CHATML, {"eos_token": "<|endoftext|>"}, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", {}),
    "qwen3": ("qwen3", THINKING, CHATML_TOKENS, ["<|im_start|>"], "<|im_end|>", {}),
    "gemma3_text": ("gemma3_text", GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
                    ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>",
                    {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", PHI, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
             [AddedToken(f"<|{name}|>", special=True, rstrip=True) for name in ("system", "user", "assistant", "end")], "<|end|>", {}),
}


def tiny_tokenizer(template, named, others):
    """Train a byte-level tokenizer on ROWS with the special tokens of a family."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator([row["prompt"] + row["response"] for row in ROWS] + [SYSTEM], trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*dict.fromkeys(named.values()), *others], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **named)


def tiny_model(case, folder):
    """Write a random two-layer model of the case's architecture (width 64) with its tokenizer into `folder`."""
    kind, template, named, others, _, differs = CASES[case]
    tokenizer = tiny_tokenizer(template, named, others)
    config = AutoConfig.for_model(kind, **{
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.1, "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **differs})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # biases start at zero and norms at one: a mistake with either would not show
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepared(folder, targets="last"):
    """Return ROWS as prepare keeps them."""
    rules = RowRules(Form("supervised", system_prompt=SYSTEM), str(folder), 17, 500, "set_aside", targets, "set_aside", "report", None)
    rows = check_block(Block("rows.jsonl", 1, tuple(enumerate(ROWS, 1))), rules).to_pylist()
    assert all(row["kept"] for row in rows), [row["detail"] for row in rows if not row["kept"]]
    return rows


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    """One architecture after prepare, train, merge: everything that the tests below look at."""
    folder = tiny_model(request.param, tmp_path_factory.mktemp("model") / "base")
    records = prepared(folder)
    model, tokenizer = load_plain(folder, torch.float32)
    require_proofs(prove(tokenizer, records))
    samples = encode_records(tokenizer, records)
    plan = TrainingPlan(epochs=12, batch_size=8, learning_rate=1e-2)
    tuned, result = train(model, tokenizer, samples, plan, folder.parent / "trainer")
    probe = torch.tensor([samples[0]["input_ids"]])
    with torch.no_grad():
        scores = tuned(probe).logits
    tokenizer.chat_template = with_default_system(tokenizer.chat_template, SYSTEM)
    save_adapter(tuned, tokenizer, "path:base", folder.parent / "adapter")
    save_model(merged_model(tuned, folder.parent / "adapter", folder), tokenizer, folder.parent / "merged")
    return SimpleNamespace(case=request.param, base=folder, merged=folder.parent / "merged", records=records, samples=samples, result=result,
                           probe=probe, scores=scores, end=CASES[request.param][4])


def test_every_architecture_of_the_list_is_tried():
    assert {kind for kind, *_ in CASES.values()} == ARCHITECTURES.keys()


def test_what_is_learnt_ends_with_the_end_of_turn(trained):
    tokenizer = load_tokenizer(trained.base)
    assert end_of_turn(tokenizer) == trained.end
    for row, sample in zip(ROWS, trained.samples, strict=True):
        bears = [token for token, counts in zip(sample["input_ids"], sample["completion_mask"], strict=True) if counts]
        assert tokenizer.decode(bears).strip() == row["response"] + trained.end
        assert [line["kind"] for line in mask_table(tokenizer, sample)][-1] == "end"


@pytest.mark.parametrize("case", CASES)
def test_every_answer_of_a_conversation_may_be_learnt(case):
    """Phi's end token swallows the line end behind it; a template that writes a thought in the last turn only cannot do it."""
    tokenizer = tiny_tokenizer(*CASES[case][1:4])
    turns = [{"role": role, "content": content} for row in ROWS[:3] for role, content in zip(("user", "assistant"), row.values(), strict=True)]
    failed = [proof.name for proof in prove(tokenizer, [{"messages": turns}], "all") if not proof.held]
    assert failed == (["training equals serving"] if "think" in tokenizer.chat_template else [])


@pytest.mark.parametrize("case", ["qwen3", "smollm3"])
def test_the_train_phase_reads_a_thinking_model_with_thinking_off(case, tmp_path):
    """The phase reads the tokenizer before the model: what it proves and saves must be what a server will write."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(case, tmp_path))
    records = prepared(tmp_path)
    assert not all(proof.held for proof in prove(tokenizer, records))  # as it comes
    require_proofs(prove(ready_for_messages(tokenizer), records))


def test_the_loss_falls(trained):
    assert trained.result.loss["last"] < 0.6 * trained.result.loss["first"], trained.result.loss


def test_training_leaves_padding_as_it_was(trained):
    """Padding that is the end of turn would be saved with the model, and whoever trains on that with padding teaches it never to stop."""
    before, after = load_tokenizer(trained.base), load_tokenizer(trained.merged)
    assert after.pad_token == before.pad_token


def test_the_merged_model_scores_as_the_adapter_did(trained):
    merged, _ = load_plain(trained.merged, torch.float32)
    with torch.no_grad():
        scores = merged(trained.probe).logits
        untrained = load_plain(trained.base, torch.float32)[0](trained.probe).logits
    torch.testing.assert_close(scores, trained.scores, atol=1e-4, rtol=1e-4)
    assert (untrained - trained.scores).abs().max() > 0.1


def test_packed_rows_give_transformers_own_loss(trained):
    """Samples in one row, a shared beginning written once, against each sample alone through the model's own forward."""
    merged, _ = load_plain(trained.merged, torch.float32)
    rows = [{key: value for key, value in row.items()} for row in training_dataset(trained.samples[:6])]
    total = count = 0.0
    with torch.no_grad():
        for row in rows:
            labels = torch.tensor([row["labels"]])
            bears = int((labels[:, 1:] != -100).sum())
            total, count = total + merged(torch.tensor([row["input_ids"]]), labels=labels).loss.item() * bears, count + bears
        merged.set_attn_implementation("packed")
        for share in (True, False):
            laid = lay_out_row(rows, share)
            assert bool(laid["shared_prefix"]) == share
            assert causal_lm_loss(merged, laid).item() == pytest.approx(total / count, rel=1e-5)


def test_what_is_served_is_what_generate_writes(trained):
    model, tokenizer = load_plain(trained.merged, torch.float32)
    asked = [conversation(row["prompt"], None) for row in ROWS[:3]]
    wanted = generate(model, tokenizer, asked, 40)
    http = TestClient(create_app(load_models(str(trained.merged), "reference")))
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)
    end = tokenizer.convert_tokens_to_ids(trained.end)
    configured = json.loads((trained.merged / "generation_config.json").read_text())["eos_token_id"]
    assert end in (configured if isinstance(configured, list) else [configured]), "any other server stops there too"
    for messages, answer in zip(asked, wanted, strict=True):
        served = client.chat.completions.create(model="merged", messages=messages, max_tokens=40)
        assert served.choices[0].message.content == answer.text and served.choices[0].finish_reason == answer.finish_reason
        prompt = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]])
        plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False,
                               pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end)[0, prompt.shape[1]:]
        assert tokenizer.decode(plain, skip_special_tokens=True) == answer.text and answer.completion_tokens == len(plain)
    assert any(answer.finish_reason == "stop" for answer in wanted), "it learnt to stop"


def test_a_switch_for_thinking_is_off_everywhere(tmp_path):
    folder = tiny_model("qwen3", tmp_path)
    for tokenizer in (load_tokenizer(folder), load_plain(folder, torch.float32)[1]):
        assert tokenizer.apply_chat_template(conversation("hi", None), add_generation_prompt=True, tokenize=False).endswith("</think>\n\n")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_members_are_what_their_names_say(kind):
    """Parameters on the meta device against the size in the name; the list's fast paths and Liger's own list."""
    named = {"135M": 0.135, "0.5B": 0.49, "0.6B": 0.6, "1B": 1.24, "3B": 3.08, "7B": 7.2, "8B": 8.0, "270m": 0.268, "1b": 1.0,
             "mini": 3.8, "4": 14.7}
    for member in ARCHITECTURES[kind].members:
        config = member_config(kind, member)
        assert require_supported(config) is ARCHITECTURES[kind]
        with torch.device("meta"):
            counted = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) / 1e9
        said = [size for part, size in named.items() if part in member.name.replace("_", "-").split("-")]
        assert said and counted == pytest.approx(said[0], rel=0.06), (member.name, counted)
    assert isinstance(fast_paths(config), list)
    liger = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    assert ARCHITECTURES[kind].liger == (kind in liger.MODEL_TYPE_TO_APPLY_LIGER_FN)


def test_the_page_is_current():
    script = Path(__file__).parent.parent / "docs/models.py"
    assert script.with_suffix(".md").read_text() == runpy.run_path(str(script))["page"](), "run `python docs/models.py`"


ENGAGEMENT = f"""\
name: mine
plan:
  use_case: sentences to commands
  owner: tests
  criteria: [{{metric: json_valid}}]
  data_sources: [{{name: rows, licence: ours, origin: customer, examples: 16}}]
  prerequisites: [{{item: rows may be used, state: met, who: tests}}]
prepare: {{source: rows.jsonl, base_model: "path:tiny", system_prompt: {SYSTEM}, split: {{by: null, stratify: null}}}}
benchmark: {{models: ["path:tiny"], examples_in_prompt: 1}}
train: {{base_model: "path:tiny", epochs: 3, evaluations: 1}}
evaluate: {{examples_in_prompt: 1}}
serve: {{parity_prompts: 1, engines: [reference]}}
score: {{}}
promote: {{}}
monitor: {{}}
"""


@pytest.mark.slow
def test_gemma_through_the_real_command(tmp_path):
    """Sliding windows, a turn that ends otherwise than a text, no system role: all phases in their own kernels."""
    tiny_model("gemma3_text", tmp_path / "tiny")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "mine.yaml").write_text(ENGAGEMENT)
    done = subprocess.run([sys.executable, "-m", "finetune_accel.core.cli", "run", "mine.yaml", "--run-dir", str(tmp_path / "runs/mine")],
                          cwd=tmp_path, text=True, capture_output=True, check=False, env={**os.environ, "COLUMNS": "160"})
    assert done.returncode in (0, 1), done.stdout + done.stderr  # whether a random model meets its criteria is not the question
    assert states(done.stdout) == dict.fromkeys([phase.name for phase in phases()], "done"), done.stdout
    run = RunFolder(tmp_path / "runs/mine")
    assert run.need("serve")["parity"]["equal"] == 1 and all(proof["held"] for proof in run.need("train")["proofs"])
    generation = json.loads((run.output("train/merged") / "generation_config.json").read_text())
    tokenizer = load_tokenizer(run.output("train/merged"))
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") in generation["eos_token_id"]
