"""Packed rows against transformers: each document alone, with its own sdpa masks, is what a row must give."""

from __future__ import annotations

import sys
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from finetune_accel.core import attention
from finetune_accel.core.attention import (
    NO_MASK,
    attend_whole_row,
    attend_within_documents,
    document_kernels_take,
    flash_takes,
    packed_attention,
)
from finetune_accel.core.errors import BadInput

LENGTHS = [11, 3, 7, 1]
SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
)
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral, window 4": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "gemma 3, window 4 in one layer, head_dim 256": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1}, **MIXED, head_dim=256,
                         query_pre_attn_scalar=100)),
    "qwen 2, window 4 in one layer": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, **MIXED, use_sliding_window=True)),
    "qwen 3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)),
    "phi 3, window 5": lambda: Phi3ForCausalLM(Phi3Config(**SMALL, sliding_window=5)),
}


def tiny(name: str, implementation: str = "packed"):
    """A random float32 model; the same weights each time."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(implementation)
    return model


def documents(prefix: int = 0) -> list[torch.Tensor]:
    """Random token ids [length] of each document, all beginning with the same `prefix` tokens."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(3, 64, (prefix,), generator=generator)
    return [torch.cat([shared, torch.randint(3, 64, (n,), generator=generator)]) for n in LENGTHS]


def row_of(texts: list[torch.Tensor], prefix: int = 0) -> dict:
    """Lay documents end to end, their common prefix written once, as a model call's arguments."""
    parts = [texts[0][:prefix], *(text[prefix:] for text in texts)] if prefix else texts
    starts = [0, *[prefix] * len(texts)] if prefix else [0] * len(texts)
    positions = [torch.arange(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]
    lengths = [len(part) for part in parts]
    return {
        "input_ids": torch.cat(parts)[None],
        "position_ids": torch.cat(positions)[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_length_q": max(lengths),
        "document_lengths": tuple(lengths),
        "shared_prefix": prefix,
        "attention_mask": NO_MASK,
    }


def losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Next-token losses of one document, [tokens - 1]."""
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefix", [0, 6])
def test_a_row_is_each_document_alone(name: str, prefix: int) -> None:
    """Logits and input gradients of a row, prefix shared or none, are transformers' for one document at a time."""
    texts = documents(prefix)
    packed, alone = tiny(name), tiny(name, "sdpa")
    found = packed(**row_of(texts, prefix)).logits[0]
    head, *rests = found.split([prefix, *LENGTHS])
    (sum(rest.log_softmax(-1)[:, 5].sum() for rest in rests)).backward()
    wanted = [alone(input_ids=text[None]).logits[0] for text in texts]
    sum(logits[prefix:].log_softmax(-1)[:, 5].sum() for logits in wanted).backward()
    for rest, logits in zip(rests, wanted, strict=True):
        torch.testing.assert_close(rest, logits[prefix:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(head, logits[:prefix], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(packed.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_windows_matter_here() -> None:
    """The documents are longer than the windows: without them Mistral would say something else."""
    model, text = tiny("mistral, window 4"), documents()[0][None]
    with torch.no_grad():
        narrow = model(input_ids=text).logits
        model.config.sliding_window = None
        assert not torch.allclose(narrow, model(input_ids=text).logits, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "mistral, window 4"])
@pytest.mark.parametrize("prefix", [0, 6])
def test_changing_one_document_changes_no_other_loss(name: str, prefix: int) -> None:
    """Other documents' losses are the same to the last bit when one document's own tokens change."""
    model, texts = tiny(name), documents(prefix)
    changed = [text.clone() for text in texts]
    changed[0][prefix:] = 63 - changed[0][prefix:] // 2
    with torch.no_grad():
        before, after = (model(**row_of(row, prefix)).logits[0, prefix:].split(LENGTHS) for row in (texts, changed))
    assert not torch.equal(before[0], after[0])
    for text, was, now in list(zip(texts, before, after, strict=True))[1:]:
        assert torch.equal(losses(was, text[prefix:]), losses(now, text[prefix:]))


@pytest.mark.parametrize("name", ["llama", "gemma 3, window 4 in one layer, head_dim 256"])
def test_no_gradient_crosses_documents(name: str) -> None:
    """One document's loss has a gradient exactly zero with respect to every other document's embeddings."""
    model, texts = tiny(name), documents()
    row = row_of(texts)
    embeddings = model.get_input_embeddings()(row.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, **row).logits[0].split(LENGTHS)
    for i in (0, 2):
        (gradient,) = torch.autograd.grad(losses(logits[i], texts[i]).sum(), embeddings, retain_graph=True)
        touched = [bool(part.abs().sum() > 0) for part in gradient[0].split(LENGTHS)]
        assert touched == [j == i for j in range(len(LENGTHS))]


def test_no_mask_is_built_for_a_row_and_one_is_for_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """`NO_MASK` spares the tokens × tokens mask of a row; padded batches still get theirs."""
    built = []
    interface = attention.AttentionMaskInterface()
    monkeypatch.setitem(interface._global_mapping, "packed", lambda **facts: built.append(facts) or attention.sdpa_mask(**facts))
    model, texts = tiny("mistral, window 4"), documents()
    with torch.no_grad():
        row = row_of(texts)
        spared = model(**row).logits
        assert not built
        assert torch.equal(spared, model(**row | {"attention_mask": None}).logits) and built
        with pytest.raises(RuntimeError):
            tiny("mistral, window 4", "sdpa")(**row)
        padded = torch.zeros(2, 11, dtype=torch.long)
        padded[0], padded[1, 4:] = texts[0], texts[2]
        ours = model(input_ids=padded, attention_mask=padded != 0).logits[1, 4:]
    wanted = tiny("mistral, window 4", "sdpa")(input_ids=texts[2][None]).logits[0]
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options, word", [
    ({"softcap": 50.0}, "softcap"), ({"s_aux": torch.ones(4)}, "s_aux"), ({"dropout": 0.1}, "dropout"), ({"is_causal": False}, "forwards"),
])
def test_what_a_row_cannot_have_is_refused(options: dict, word: str) -> None:
    """A model that means another attention gets an error that names it, never a wrong number."""
    states, bounds = torch.randn(1, 4, 5, 8), torch.tensor([0, 5], dtype=torch.int32)
    harmless = {"dropout": 0.0, "softcap": None, "sliding_window": None}
    packed_attention(torch.nn.Module(), states, states, states, None, cu_seq_lens_q=bounds, **harmless)
    with pytest.raises(BadInput, match=word):
        packed_attention(torch.nn.Module(), states, states, states, None, cu_seq_lens_q=bounds, **options)
    with pytest.raises(BadInput, match="one row and no cache"):
        packed_attention(torch.nn.Module(), states[:, :, -1:], states, states, None, cu_seq_lens_q=bounds)


def test_gemma_2_is_refused() -> None:
    """Gemma 2 caps its scores."""
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8))
    model.set_attn_implementation("packed")
    with pytest.raises(BadInput, match="softcap"):
        model(**row_of(documents()))


@pytest.mark.parametrize("window", [None, 4, 100])
def test_what_the_gpu_kernel_is_asked_is_what_documents_get(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments to varlen_attn mean the same attention (a stand-in computes them here, and reads no Python lengths)."""
    def stand_in(query, key, value, bounds, bounds_again, longest, longest_again, *, scale, window_size, enable_gqa):
        assert bounds is bounds_again and longest == longest_again and window_size[1] == 0 and enable_gqa
        document = torch.bucketize(torch.arange(len(query)), bounds[1:], right=True)
        back = torch.arange(len(query))[:, None] - torch.arange(len(query))
        seen = (document[:, None] == document) & (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        states = [part.transpose(0, 1)[None] for part in (query, key, value)]
        attended = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        return attended[0].transpose(0, 1)

    assert {"scale", "window_size"} <= set(signature(varlen.varlen_attn).parameters)
    monkeypatch.setattr(attention, "VARLEN_OPTIONS", frozenset({"window_size", "enable_gqa"}))  # torch 2.13's; 2.11 cannot group heads
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 22, 8), torch.randn(1, 2, 22, 8), torch.randn(1, 2, 22, 8)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    whole = attend_whole_row(query, key, value, bounds, max(LENGTHS), scaling=0.5, window=window)
    apart = attend_within_documents(query, key, value, LENGTHS, scaling=0.5, window=window)
    torch.testing.assert_close(whole, apart, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(attention, "VARLEN_OPTIONS", frozenset({"window_size"}))  # a PyTorch that cannot group heads
    ungrouped = lambda *args, **options: stand_in(*args, **options, enable_gqa=True)
    monkeypatch.setattr(attention, "varlen_attn", ungrouped)
    torch.testing.assert_close(attend_whole_row(query, key, value, bounds, 11, 0.5, window), apart, atol=1e-5, rtol=1e-5)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Stand in for Triton's kernels on a CPU, whatever the dtype, and list what they are asked."""
    calls = []

    def stand_in(q, k, v, lengths, scale, window=None):
        calls.append({"lengths": lengths, "window": window})
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        states = [part.transpose(0, 1)[None] for part in (q, k, v)]
        return attend_within_documents(*states, list(lengths), scaling=scale, window=window)[0]

    monkeypatch.setitem(sys.modules, "finetune_accel.core.document_attention", SimpleNamespace(attend=stand_in))
    monkeypatch.setattr(attention, "_triton_runs_on", lambda device: True)
    take = attention.document_kernels_take
    monkeypatch.setattr(attention, "document_kernels_take", lambda dtype, *facts: take(torch.bfloat16, *facts))
    return calls


@pytest.mark.parametrize("window", [None, 4])
def test_rows_with_known_lengths_go_to_our_kernels(window: int | None, asked: list[dict]) -> None:
    """Heads of 16 to 128 go there with lengths, scale and window; a shared prefix, other heads and unknown lengths do not."""
    torch.manual_seed(0)
    lengths, bounds = tuple(LENGTHS), torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    for dim, options, goes in ((16, {"document_lengths": lengths}, True), (128, {"document_lengths": lengths}, True),
                               (24, {"document_lengths": lengths}, False), (256, {"document_lengths": lengths}, False), (16, {}, False),
                               (16, {"document_lengths": lengths, "shared_prefix": 11}, False)):
        asked.clear()
        states = [torch.randn(1, 22, heads, dim).transpose(1, 2) for heads in (4, 2, 2)]
        found, _ = packed_attention(
            torch.nn.Module(), *states, NO_MASK, scaling=0.3, cu_seq_lens_q=bounds, max_length_q=11, sliding_window=window, **options)
        wanted = attend_within_documents(*states, LENGTHS, options.get("shared_prefix", 0), scaling=0.3, window=window)
        torch.testing.assert_close(found, wanted)
        assert asked == ([{"lengths": lengths, "window": window}] if goes else [])


def test_a_model_hands_document_lengths_on(asked: list[dict]) -> None:
    """From a model's call they arrive in every layer, with the layer's window."""
    model = MistralForCausalLM(MistralConfig(**SMALL, head_dim=16, sliding_window=4))
    model.set_attn_implementation("packed")
    model(**row_of(documents()))
    assert asked == [{"lengths": tuple(LENGTHS), "window": 4}] * 2


def test_what_our_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a CPU, not float32, not heads that are no power of two or wider than 128, not more offsets than 32 bits hold."""
    cpu = torch.device("cpu")
    assert not document_kernels_take(torch.bfloat16, cpu, 100, 32, 128)
    monkeypatch.setattr(attention, "_triton_runs_on", lambda device: True)
    assert document_kernels_take(torch.bfloat16, cpu, 100, 32, 128) and document_kernels_take(torch.float16, cpu, 100, 32, 16)
    for wrong in ((torch.float32, 100, 32, 128), (torch.bfloat16, 100, 32, 256), (torch.bfloat16, 100, 32, 80), (torch.bfloat16, 10**6, 32, 128)):
        assert not document_kernels_take(wrong[0], cpu, *wrong[1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", [True, False])
def test_a_row_on_a_gpu_is_each_document_alone(name: str, lengths: bool) -> None:
    """In bfloat16 each of the whole-row kernels differs from float32 documents as much as bfloat16 does, and asks the GPU for nothing."""
    texts = documents()
    alone = tiny(name, "sdpa")
    wanted = torch.cat([alone(input_ids=text[None]).logits[0] for text in texts])
    model = tiny(name).to("cuda", torch.bfloat16)
    row = {key: part.cuda() if torch.is_tensor(part) else part for key, part in row_of(texts).items()}
    row["document_lengths"] = row["document_lengths"] if lengths else None
    model(**row)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = model(**row).logits[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    error = (found.float().cpu() - wanted).norm() / wanted.norm()
    assert flash_takes(torch.empty(1, 4, 5, 16, device="cuda", dtype=torch.bfloat16)) and error < 0.05, error
