"""Write docs/data_formats.md: each rule of Databricks' fine-tuning formats, its service's verdict beside ours.

    python docs/data_formats.py

The service's verdicts are read from its documentation and open source; they were not tried against the service itself.
"""
from pathlib import Path

from finetune_accel.core.formats import DATABRICKS_RULES, FORMATS

INTRO = """# Formats of training data: Databricks' service and ours

What a row that breaks the rule meets. `finetune-accel validate FILE --as chat|instruction|pretrain` gives both verdicts on a file; a
row that we *refuse* is set aside in the ledger with its place and the fix, never dropped. Written by `python docs/data_formats.py`
from `DATABRICKS_RULES` (`nbs/core/formats.ipynb`); a test walks over every line. The service's verdicts are from its documentation and
open source, not from a run of the service.
"""


def page() -> str:
    """Return the page as Markdown."""
    lines = [INTRO]
    for form, approach in FORMATS.items():
        lines += [f"## {form} (`approach: {approach}`)\n", "| rule | the service | finetune-accel | | why ours differs |", "|---|---|---|---|---|"]
        lines += [f"| {r.rule} | {r.service} | {r.ours} | {r.compared} | {r.why} |" for r in DATABRICKS_RULES if r.format == form] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
