"""Write docs/models.md: the architectures that can be fine-tuned, from the table in core.architectures.

    python docs/models.py

Parameters, memory and fast paths are computed from each model's published sizes; what is said of templates, attention and licences is
the publisher's statement.
"""
from pathlib import Path

from finetune_accel.core.architectures import (
    ARCHITECTURES,
    GPU_SIZES,
    LEFT_OUT,
    SAMPLE_TOKENS,
    USABLE,
    Architecture,
    fast_paths,
    member_config,
    peak_gib,
    smallest_gpu,
)
from finetune_accel.core.memory import model_shape
from finetune_accel.core.sources import TERMS

INTRO = """# Models that can be fine-tuned

Any model of these architectures (`model_type` in its `config.json`), from a folder, a package or the hub. Each architecture is proven by a
tiny random model that goes through prepare, train, merge and serve (`tests/test_architectures.py`): its loss falls, packed rows give
transformers' own loss (1e-5), the merged model scores as the adapter did (1e-4), the server writes what `generate` writes, and an
answer ends with the token that ends a turn. Any other model is refused before anything runs, with this list.

Written by `python docs/models.py` from `ARCHITECTURES` (`nbs/core/architectures.ipynb`); a test keeps the two the same.

## At a glance

Turn ends, system prompt, attention and what is special are what the publisher's configuration and chat template say; `prepare` proves
them on your copy and your rows before a minute of training is spent.

| type | models | an answer ends with | system prompt | attention | special |
|---|---|---|---|---|---|
"""

SIZES = f"""
## Sizes and machines

The smallest member of each architecture, and the one of 7 to 8 billion parameters (or the largest). Parameters are counted from the
published sizes. *Needs* is the peak that `core.memory` estimates for adapters of rank 16 on all layers, samples of up to
{SAMPLE_TOKENS:,} tokens, one at a time, with checkpointing, base weights in bfloat16 (LoRA) or four bits (QLoRA); *card* is the
smallest memory among {", ".join(map(str, GPU_SIZES))} GiB that holds it in {USABLE:.0%} of its space. Full speed wants more: what memory is left over goes into larger micro-batches. LoRA also runs on a processor
without a card, at the speed of `benchmarks/cpu_training.json`.

| model | parameters | licence | LoRA needs | card | QLoRA needs | card |
|---|---|---|---|---|---|---|
"""

PATHS = """
## Fast paths

Every architecture trains on packed rows with attention inside each document and a loss over answers only. Beyond that:

| type | layers computed together | kernels by Liger for its norms and rotation exist |
|---|---|---|
"""

END = """
## Not on the list

{left_out}
- Encoder-decoders, mixtures of experts and models that read images or sound: not supported.
- Weights published in a quantised format (GPTQ, AWQ, bitsandbytes): give the model that they were made from; `method: qlora` quantises it in memory.

## To add one

1. A row in `ARCHITECTURES` (`nbs/core/architectures.ipynb`), with one or more published members and their sizes.
2. A case in `tests/test_architectures.py` with its template's form, its special tokens and whatever its configuration has that the others have not.
   A test fails while a row has no case.
3. Run `pytest tests/test_architectures.py`. What usually fails: scores that are changed after the output layer (`core.loss` says so), an
   attention that `core.attention` does not know (it says so), a template that writes a turn differently later (the proof names it).
4. `python docs/models.py`.
"""


def glance(kind: str, one: Architecture) -> str:
    """Return an architecture's line of the first table; a table's cell cannot hold the bar of `<|end|>` unescaped."""
    cells = [f"`{kind}`", one.family, one.turn_ends, one.system, one.attention, one.special]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def size_lines(kind: str, one: Architecture) -> list[str]:
    """Return a line of the second table for the first and the last member."""
    lines = []
    for member in (one.members[0], *one.members[1:][-1:]):
        config = member_config(kind, member)
        terms = f" (`accept_terms: [{TERMS[member.licence][0]}]`)" if member.licence in TERMS else ""
        needs = [f"{gib:.1f} GiB | {smallest_gpu(gib)} GiB" for gib in (peak_gib(config, method) for method in ("lora", "qlora"))]
        lines.append(f"| {member.name} | {model_shape(config).parameters / 1e9:.2f} billion | {member.licence}{terms} | {' | '.join(needs)} |")
    return lines


def path_line(kind: str, one: Architecture) -> str:
    """Return an architecture's line of the third table."""
    paths = "; ".join(fast_paths(member_config(kind, one.members[0]))) or "none: they are fused in the model itself"
    return f"| `{kind}` | {paths} | {'yes' if one.liger else 'no'} |"


def page() -> str:
    """Return the page as Markdown."""
    left_out = "\n".join(f"- `{kind}`: {reason}." for kind, reason in LEFT_OUT.items())
    return (INTRO + "\n".join(glance(*item) for item in ARCHITECTURES.items()) + "\n"
            + SIZES + "\n".join(line for item in ARCHITECTURES.items() for line in size_lines(*item)) + "\n"
            + PATHS + "\n".join(path_line(*item) for item in ARCHITECTURES.items()) + "\n" + END.format(left_out=left_out))


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
