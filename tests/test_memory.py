"""The memory estimate against counted tensors and measured peaks, and what is chosen from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3Config

from finetune_accel.core import attention  # noqa: F401 - registers `packed`
from finetune_accel.core.adapters import AdapterPlan, add_adapters
from finetune_accel.core.choices import (
    DeviceFacts,
    choose,
    most_tokens_of_a_row,
    usable_bytes,
)
from finetune_accel.core.errors import BadInput
from finetune_accel.core.fast_layers import fast_layers
from finetune_accel.core.memory import (
    GIB,
    MOST_TOKENS,
    adapter_copies,
    estimate,
    kept_on_cpu,
    largest_micro_batch,
    model_shape,
)
from finetune_accel.core.packing import lay_out_row

BENCHMARK = Path(__file__).parent.parent / "benchmarks/memory.py"
LLAMA_8B = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                       num_key_value_heads=8)
QWEN3_4B = Qwen3Config(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                       num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
LORA = {"longest": 512, "dtype": "bfloat16", "base_weights": "bfloat16", "adapter": AdapterPlan(rank=16)}
H100 = DeviceFacts("cuda", "H100", 79 * GIB, {"float32": 5e4, "bfloat16": 7e5}, (9, 0))
A10 = DeviceFacts("cuda", "A10", 22 * GIB, {"float32": 3e4, "bfloat16": 7e4}, (8, 6))
LAPTOP = DeviceFacts("cpu", "a laptop", 14 * GIB, {"float32": 340.0, "bfloat16": 2300.0})


# What a layer keeps, tensor by tensor

def bytes_kept(config, method: str, dtype: torch.dtype, tokens: int) -> int:
    """Count the bytes of all tensors that autograd keeps for the backward pass of the model's body, parameters left out."""
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    causal_lm.set_attn_implementation("packed")
    model = add_adapters(causal_lm, AdapterPlan(rank=16)) if method == "lora" else causal_lm
    model.train()
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # and hold on to it, so that its place is not used again
        return tensor

    documents = [{"input_ids": list(range(128)), "labels": list(range(128))} for _ in range(tokens // 128)]
    row = {key: value for key, value in lay_out_row(documents, share_prefix=False).items() if key != "labels"}
    with fast_layers(causal_lm), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_lm.base_model(**row, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_layers_in_one_piece_are_those_that_are_counted_so():
    pytest.importorskip("triton")
    from finetune_accel.core.fused_layer import PLAIN_LAYERS
    from finetune_accel.core.memory import ONE_PIECE

    assert [layer.__module__.split(".")[2] for layer in PLAIN_LAYERS] == list(ONE_PIECE)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize(("method", "dtype"), [("lora", "float32"), ("lora", "bfloat16"), ("full", "float32"), ("full", "bfloat16")])
def test_what_a_layer_keeps_is_counted_right(kind, method, dtype):
    sizes = {"vocab_size": 256, "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    two, four = (kind(num_hidden_layers=layers, **sizes) for layers in (2, 4))
    tokens, rank, size = 512, 16 if method == "lora" else 0, 2.0 if dtype == "bfloat16" else 4.0
    counted = (bytes_kept(four, method, getattr(torch, dtype), tokens) - bytes_kept(two, method, getattr(torch, dtype), tokens)) / 2
    shape = model_shape(four)
    expected = tokens * sum(kept_on_cpu(shape, method, rank, size).values()) + adapter_copies(shape, rank, size, 1) / 4
    assert counted == pytest.approx(expected, rel=0.04), (counted / tokens, kept_on_cpu(shape, method, rank, size))


# The shape

def test_shapes_are_counted_on_the_real_modules():
    phi = Phi3Config(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     pad_token_id=0)
    for config in (phi, LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                    num_key_value_heads=2, tie_word_embeddings=True)):
        model, shape = AutoModelForCausalLM.from_config(config), model_shape(config)
        assert shape.parameters == sum(p.numel() for p in model.parameters())
        adapted = add_adapters(model, AdapterPlan(rank=4))
        assert 4 * shape.adapted == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert model_shape(QWEN3_4B).head_norms and model_shape(QWEN3_4B).head == 0 and not model_shape(phi).gated_in_parts


# Measured peaks of resident memory, each in a process of its own

SMALL = {"model_type": "llama", "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10,
         "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}


@pytest.mark.parametrize("case", [
    {"method": "lora", "tokens": 1024, "dtype": "float32", "base_weights": "float32"},
    pytest.param({"method": "lora", "tokens": 1024, "dtype": "bfloat16", "base_weights": "bfloat16"}, marks=pytest.mark.slow),
    pytest.param({"method": "full", "tokens": 512, "dtype": "float32", "base_weights": "float32"}, marks=pytest.mark.slow),
], ids=["lora-float32", "lora-bfloat16", "full-float32"])
def test_estimates_of_cpu_runs_are_within_15_percent(case):
    command = [sys.executable, BENCHMARK, "--device", "cpu", "--case", json.dumps({"model": SMALL, **case})]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ratio"] == pytest.approx(1, abs=0.15), found


# What must hold for any size

@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(512, 40_000), more=st.integers(1, 20_000), method=st.sampled_from(["lora", "full"]),
       device=st.sampled_from(["cuda", "cpu"]))
def test_more_tokens_never_need_less(tokens, more, method, device):
    for checkpointing in (False, True):
        less, most = (estimate(QWEN3_4B, method, n, checkpointing=checkpointing, device=device, **LORA).total for n in (tokens, tokens + more))
        assert less <= most


def test_methods_and_checkpointing_are_ordered():
    def total(method, base_weights="bfloat16", **how):
        return estimate(LLAMA_8B, method, 8192, **{**LORA, "base_weights": base_weights}, **how).total

    assert total("qlora", "nf4") < total("lora") < total("full")
    assert total("lora", checkpointing=True) < total("lora") and total("lora") < total("lora", "fp8") < 1.05 * total("lora")
    assert total("lora", supervised_share=0.3) <= total("lora")
    parts = estimate(LLAMA_8B, "lora", 8192, **LORA)
    assert parts.total == pytest.approx(sum(vars(parts).values()) - min(parts.loss, parts.workspace))
    assert parts.weights == pytest.approx(8_030_261_248 * 2 / GIB) and parts.line().startswith(f"{parts.total:.1f} GiB: activations")


def test_prototypes_measured_on_an_h100():
    """facts/gpu-training.md: LoRA in bfloat16 at 8,192 tokens took 50.0 GiB when the gated unit's output was still kept."""
    kept_then = 8192 * 32 * 14336 * 2 / GIB
    assert estimate(LLAMA_8B, "lora", 8192, **LORA).total + kept_then == pytest.approx(50.0, rel=0.15)


# The largest micro-batch

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("method", "base_weights", "gib"), [
    ("lora", "bfloat16", 40), ("lora", "fp8", 40), ("qlora", "nf4", 20), ("full", "bfloat16", 160)])
def test_largest_micro_batch_fits_and_the_next_does_not(method, base_weights, gib, checkpointing):
    how = {**LORA, "base_weights": base_weights, "checkpointing": checkpointing}
    tokens = largest_micro_batch(LLAMA_8B, method, available_bytes=gib * GIB, **how)
    assert tokens % 256 == 0 and tokens >= 512
    assert estimate(LLAMA_8B, method, tokens, **how).total <= gib < estimate(LLAMA_8B, method, tokens + 256, **how).total


def test_no_machine_gets_an_endless_row():
    assert largest_micro_batch(LLAMA_8B, "lora", available_bytes=1e15, **LORA) == MOST_TOKENS


@pytest.mark.parametrize(("method", "checkpointing", "helps", "not_said"), [
    ("lora", False, ["qlora", "checkpointing", "max_tokens", "smaller base model"], "method to lora"),
    ("full", True, ["train.method to lora", "max_tokens"], "checkpointing"),
    ("qlora", True, ["max_tokens"], "train.method")])
def test_what_does_not_fit_is_refused_with_figures_and_advice(method, checkpointing, helps, not_said):
    with pytest.raises(BadInput) as refused:
        largest_micro_batch(LLAMA_8B, method, available_bytes=4 * GIB, checkpointing=checkpointing, **LORA)
    assert "a sample of 512 tokens needs" in str(refused.value) and "there are 4.0 GiB" in str(refused.value)
    assert all(word in refused.value.fix for word in helps) and not_said not in refused.value.fix


def test_a_row_shorter_than_the_longest_sample_is_refused():
    with pytest.raises(BadInput, match="longest sample has 512 tokens"):
        estimate(LLAMA_8B, "lora", 256, **LORA)


# Choices

def chosen(facts, method="lora", lengths=(275,) * 500, config=LLAMA_8B, **how):
    return choose(config, method, lengths, adapter=AdapterPlan(), facts=facts, **{"batch_size": 64, **how})


def test_checkpointing_only_where_memory_asks_for_it():
    assert not chosen(H100).checkpointing.value
    small = chosen(A10)
    assert small.checkpointing.value and "without it" in small.checkpointing.reason
    assert chosen(A10, "qlora", batch_size=256).micro_batch_tokens.value > chosen(A10, batch_size=256).micro_batch_tokens.value


def test_what_is_chosen_fits_and_is_not_longer_than_a_step():
    for facts in (H100, A10):
        plan = chosen(facts)
        assert plan.memory.total * GIB <= usable_bytes(facts) and plan.micro_batch_tokens.value <= most_tokens_of_a_row([275] * 500, 64, 1)
    assert chosen(H100, batch_size=2).micro_batch_tokens.value == 768
    assert chosen(H100, lengths=[275] * 10 + [9000], batch_size=1).micro_batch_tokens.value >= 9000


def test_what_is_set_wins_and_says_so():
    plan = chosen(H100, checkpointing=True, micro_batch_tokens=4096, dtype="float32", base_weights=None)
    assert (plan.checkpointing.value, plan.micro_batch_tokens.value, plan.dtype.value, plan.base_weights.value) == (True, 4096, "float32", "float32")
    assert plan.micro_batch_tokens.reason == "set in train.micro_batch_tokens" and plan.checkpointing.reason == "set in train.checkpointing"
    assert chosen(A10, checkpointing=True).checkpointing.reason == "set in train.checkpointing"
    with pytest.raises(BadInput, match="needs"):
        chosen(DeviceFacts("cuda", "T4", 15 * GIB, H100.rates, (7, 5)), checkpointing=False)


@pytest.mark.parametrize(("facts", "method", "set_to"), [(A10, "lora", "fp8"), (H100, "full", "fp8"), (H100, "lora", "nf4"), (LAPTOP, "qlora", None)])
def test_storages_that_cannot_be_are_refused(facts, method, set_to):
    with pytest.raises(BadInput):
        chosen(facts, method, base_weights=set_to)


def test_a_laptop_gets_documents_plain_kernels_and_a_row_a_core():
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, tie_word_embeddings=True)
    plan = chosen(LAPTOP, config=config, lengths=[120] * 64, batch_size=8)
    assert (plan.attention.value, plan.kernels.value, plan.dtype.value, plan.compile.value) == ("documents", "plain", "bfloat16", False)
    assert 120 <= plan.micro_batch_tokens.value <= 8 * 120 + 256
    slow = DeviceFacts("cpu", "an old laptop", 14 * GIB, {"float32": 300.0, "bfloat16": 90.0})
    assert chosen(slow, config=config, lengths=[120] * 64).dtype.value == "float32"


def test_the_plan_line_and_the_record_name_every_choice():
    plan = chosen(H100, base_weights="fp8")
    for name, choice in plan.items().items():
        assert name.replace("_", " ") in plan.line() and choice.reason in plan.line()
        assert plan.as_dict()[name] == {"value": choice.value, "reason": choice.reason}
    assert plan.storage == "fp8" and chosen(A10, "qlora").storage == "nf4" and chosen(H100).storage == "plain"
    assert "GiB" in plan.line() and json.loads(json.dumps(plan.as_dict()))["memory_available_gib"] == 79


def test_choosing_does_not_import_torch_to_check_a_file():
    code = "import sys; import finetune_accel.core.choices; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
