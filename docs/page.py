"""Write docs/page.png: the page at /, with the tuned and the base model of a run folder of home-intents after one question to both.

    finetune-accel run home-intents && python docs/page.py runs/home-intents

Needs playwright (pip install "finetune-accel[dev]") and Debian's Chromium.
"""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from finetune_accel.core.runs import RunFolder

QUESTION = "turn off the lights in the kitchen"


def main(run_dir: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "finetune_accel.core.cli", "serve", run_dir, "--base", "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}, stdout=subprocess.PIPE, text=True)
    try:
        print(server.stdout.readline().strip())  # says its address when the models are loaded
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1100, "height": 600}, color_scheme="light")
            page.goto(f"http://127.0.0.1:{port}/")
            page.click("summary")
            page.fill("#system", json.loads(RunFolder(Path(run_dir).absolute()).output("prepare/format.json").read_text())["system_prompt"])
            for _ in range(2):  # the first question also warms both models up
                page.fill("#max-tokens", "100")
                page.fill("#prompt", QUESTION)
                page.press("#prompt", "Control+Enter")
                page.wait_for_selector("#stop:enabled")
                page.wait_for_selector("#ask:enabled", timeout=120_000)
            page.screenshot(path=Path(__file__).with_suffix(".png"), full_page=True)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
