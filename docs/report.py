"""Write docs/report.png: the first page of a run folder's report, with the network off.

    finetune-accel run home-intents && python docs/report.py runs/home-intents

Needs playwright (pip install "finetune-accel[dev]") and Debian's Chromium.
"""
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from finetune_accel.core.report import write_report
from finetune_accel.core.runs import RunFolder


def main(run_dir: str) -> None:
    report = write_report(RunFolder(Path(run_dir).absolute()))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_context(offline=True, viewport={"width": 1100, "height": 1250}, color_scheme="light").new_page()
        page.goto(report.as_uri())
        page.screenshot(path=Path(__file__).with_suffix(".png"))
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
