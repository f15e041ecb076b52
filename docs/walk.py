"""Walk the notebooks 01 to 06 in a real browser as a consultant does, and write the pictures docs/walk-*.png.

    make walk

JupyterLab on loopback, Debian's Chromium driven by Playwright. The form of 01 is filled in by hand until it says what the shipped engagement
home-intents-short says, is saved, and the file is compared with that hand-written one as data. Then the notebooks of the saved file are opened one
after the other, all cells run, and the widgets used: a rule of the ledger, another sample's mask, a moved threshold, two systems' answers, a question
to the served model. Whatever a notebook or a widget fails at ends the walk with exit code 1.
"""
from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from finetune_accel.core.engagement import load_engagement, read_yaml, shipped_engagements
from finetune_accel.core.engagement_text import plain
from finetune_accel.core.lab import write_notebooks

CHROMIUM, DOCS, LARGEST = "/usr/bin/chromium", Path(__file__).parent, 150_000
QUESTION = "turn off the lights in the kitchen"
LOOKS = {"notebook-extension/tracker": {"windowingMode": "none"},  # cells that are not in sight are there too
         "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
CELLS = """() => { const panel = window.jupyterapp.shell.currentWidget, code = panel.content.widgets.filter(cell => cell.model.type === 'code');
  const failed = code.flatMap(cell => cell.model.outputs.toJSON()).filter(output => output.output_type === 'error').map(output => output.ename + ': ' + output.evalue);
  return {kernel: panel.sessionContext.session?.kernel?.status, failed, left: code.filter(cell => cell.model.executionCount === null).length, all: code.length}; }"""


@contextmanager
def jupyter(root: Path) -> Iterator[tuple[str, str]]:
    """Run JupyterLab over `root` on a free port of loopback; yield its address and its token."""
    for name, values in LOOKS.items():
        file = root / f".settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
               f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True", str(root)]
    environment = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(root / ".settings"), "JUPYTERLAB_WORKSPACES_DIR": str(root / ".workspaces"),
                   "JUPYTER_PREFER_ENV_PATH": "1"}
    with open(root / "jupyter.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError((root / "jupyter.log").read_text()[-2000:])
            try:
                httpx.get(f"{url}/api", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url, token
    finally:
        server.terminate()
        server.wait()


class Notebook:
    """A notebook open in the browser; its kernel is ended on leaving."""

    def __init__(self, browser: Browser, server: tuple[str, str], path: Path, root: Path):
        self.url, self.token = server
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        self.page.set_default_timeout(60_000)
        self.page.goto(f"{self.url}/lab/tree/{path.relative_to(root).as_posix()}?token={self.token}&reset")
        self.page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=120_000)
        self.page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area').catch(() => null)")

    def __enter__(self) -> Notebook:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()
        with httpx.Client(base_url=self.url, headers={"Authorization": f"token {self.token}"}, timeout=60) as http:
            for kernel in http.get("/api/kernels").json():
                http.delete(f"/api/kernels/{kernel['id']}")

    def run_all(self, minutes: float = 15) -> int:
        """Choose Run All Cells in the menu, wait for the last one, and return how many code cells ran. Raises RuntimeError for a cell that failed."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        deadline = time.monotonic() + minutes * 60
        while time.monotonic() < deadline:
            time.sleep(0.5)
            found = self.page.evaluate(CELLS)
            if found["failed"]:
                raise RuntimeError("; ".join(found["failed"]))
            if found["kernel"] == "idle" and not found["left"]:
                return found["all"]
        raise RuntimeError(f"not done in {minutes} minutes: {found}")

    def output(self, source: str) -> Locator:
        """Return what the code cell that contains `source` shows."""
        return self.page.locator(".jp-CodeCell", has=self.page.locator(".jp-InputArea", has_text=source)).last.locator(".jp-OutputArea")

    def picture(self, what: Locator, name: str, around: Locator | None = None) -> None:
        """Write docs/NAME.png of what can be seen of an element when its top, or the middle of what is `around`, is in sight; at most LARGEST bytes."""
        (around or what).evaluate("(node, block) => node.scrollIntoView({block})", "center" if around else "start")
        self.page.wait_for_timeout(500)
        box, seen, file = what.bounding_box(), self.page.locator(".jp-WindowedPanel-outer:visible").bounding_box(), DOCS / f"{name}.png"
        top, bottom = max(box["y"], seen["y"]), min(box["y"] + box["height"], seen["y"] + seen["height"])
        self.page.screenshot(path=file, clip={"x": box["x"], "y": top, "width": min(box["width"], seen["width"]), "height": bottom - top})
        Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)
        assert file.stat().st_size <= LARGEST, f"{file} has {file.stat().st_size} bytes"


def enter(where: Locator, label: str, value: object) -> None:
    """Enter a value into the field of this label, by typing or choosing."""
    field = where.get_by_label(label, exact=True).locator("visible=true").first
    kind = field.evaluate("node => node.type || node.tagName")
    if kind == "select-one":
        field.select_option(label=str(value))
    elif kind == "checkbox":
        field.set_checked(bool(value))
    else:
        field.fill(value if isinstance(value, str) else json.dumps(value))
        field.press("Tab")


def unfold(form: Locator, name: str) -> Locator:
    """Unfold a list of settings, such as the machines, and return its frame."""
    header = form.locator(".jupyter-widget-Collapse-header", has_text=re.compile(f"^{name}:")).locator("visible=true")
    frame = header.locator("xpath=..")
    if frame.get_by_role("button", name=f"add to {name}").locator("visible=true").count() == 0:
        header.click()
    return frame


def fill_in(form: Locator, wanted: dict) -> None:
    """Make the form of home-intents say `wanted`."""
    tabs = form.locator(".widget-tab > .widget-tab-contents").first

    def turn_to(tab: str) -> Locator:
        form.locator(".lm-TabBar-tab", has_text=re.compile(f"^{tab}$")).click()
        return tabs

    enter(turn_to("general"), "name", wanted["name"])
    plan = turn_to("plan")
    for key, add in (("interview", wanted["plan"]["interview"]), ("machines", wanted["plan"]["machines"][0])):
        frame = unfold(form, key)
        frame.get_by_role("button", name=f"add to {key}").click()
        frame.get_by_role("button", name=f"remove this of {key}").wait_for()
        for label, value in add.items():
            enter(frame, label, value)
    enter(plan, "start", wanted["plan"]["start"])
    for tab, keys in (("prepare", ["limit"]), ("benchmark", ["examples_in_prompt", "items"]), ("train", ["max_steps", "evaluations", "dev_items"]),
                      ("evaluate", ["items", "examples_in_prompt", "general_texts", "slices"]), ("serve", ["engines"])):
        panel = turn_to(tab)
        for key in keys:
            enter(panel, key, wanted[tab][key])
    turn_to("plan")


def plan_together(book: Notebook, wanted: dict, saved: Path) -> None:
    """Fill in the form with one mistake on the way, look at the complaint, save, and compare the file with the hand-written one."""
    form = book.output("form = engagement_form")
    form.get_by_text("opened home-intents").or_(form.get_by_role("button", name="Save")).first.wait_for()
    fill_in(form, wanted)
    enter(form, "start", "1.12.2026")
    complaint = form.locator("[role=alert]", has_text="year-month-day").first
    complaint.wait_for()
    book.picture(form, "walk-mistake", complaint)
    enter(form, "start", wanted["plan"]["start"])
    form.get_by_text("The interview speaks for supervised").wait_for()
    enter(form, "file", saved.name)
    form.get_by_role("button", name="Save", exact=True).click()
    form.get_by_text("saved: finetune-accel run").wait_for()
    book.picture(form, "walk-plan")
    written = plain(read_yaml(saved.read_text(), saved.name))
    assert written == wanted, f"the form's file differs from the hand-written one: {json.dumps(written, indent=1)}"
    print(f"01_plan: the form's {saved.name} equals the hand-written one, {len(saved.read_text().splitlines())} lines with {saved.read_text().count('#')} comments")


def look_at_rows(book: Notebook) -> None:
    """02: filter the ledger, and look at another sample's mask."""
    ledger = book.output("ledger_view(run.output")
    ledger.get_by_label("rule").select_option(index=1)
    ledger.get_by_text(re.compile(r"^[\d,]+ of [\d,]+ rows")).wait_for()
    book.picture(ledger, "walk-ledger")
    mask = book.output("mask_html(tokenizer, encoded[record]")
    before = mask.locator(".mask-microscope").inner_text()
    mask.locator(".noUi-handle").press("ArrowRight")
    book.page.wait_for_function("([node, before]) => node.querySelector('.mask-microscope').innerText !== before", arg=[mask.element_handle(), before])
    book.picture(mask, "walk-mask")


def look_at_answers(book: Notebook) -> None:
    """05: move a threshold and see what would follow; compare two systems' answers."""
    moved = book.output("threshold_view(criteria, scores, met)")
    planned = moved.inner_text()
    for _ in range(4):
        moved.locator(".noUi-handle").press("PageUp")
    moved.get_by_text("The verdict would be: not met").wait_for()
    book.page.wait_for_timeout(1000)
    assert moved.inner_text() != planned and "the interval starts at" in moved.inner_text()
    book.picture(moved, "walk-threshold")
    answers = book.output("answers_view(answered")
    answers.get_by_label("which").select_option(label="only the other right")
    answers.get_by_text(re.compile(r"^\d+ of \d+ items")).wait_for()
    answers.get_by_label("which").select_option(label="both alike")
    answers.get_by_text(re.compile(r"^\d+ of \d+ items")).wait_for()
    book.picture(answers, "walk-answers")


def ask_it(book: Notebook) -> None:
    """06: ask the served model a question of one's own."""
    ask = book.output("ask_view(lambda: running_server")
    ask.get_by_placeholder("a question of your own").fill(QUESTION)
    ask.get_by_placeholder("a question of your own").press("Tab")
    ask.get_by_role("button", name="Ask", exact=True).click()
    ask.get_by_text("served at http://127.0.0.1:").wait_for(timeout=180_000)
    assert QUESTION in ask.inner_text()
    book.picture(ask, "walk-ask")


LOOK = {"prepare": look_at_rows, "evaluate": look_at_answers, "serve": ask_it}


def walk(root: Path) -> None:
    """Do the whole walk in the folder `root`."""
    hand_written = shipped_engagements()["home-intents-short"]
    wanted, saved = plain(read_yaml(hand_written.read_text(), hand_written.name)), root / "runs/first/notebooks/mine.yaml"
    first = write_notebooks(load_engagement("home-intents"), root / "runs/first")
    with jupyter(root) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with Notebook(browser, server, first / "01_plan.ipynb", root) as book:
            book.run_all()
            plan_together(book, wanted, saved)
        folder = write_notebooks(load_engagement(str(saved)), root / "runs/short")
        for notebook in sorted(folder.glob("0[1-6]_*.ipynb")):
            started = time.monotonic()
            with Notebook(browser, server, notebook, root) as book:
                cells = book.run_all()
                phase = notebook.stem[3:]
                LOOK.get(phase, lambda _: None)(book)
                assert (root / f"runs/short/{phase}.json").exists()
                print(f"{notebook.stem}: {cells} code cells ran and its widgets answered, {time.monotonic() - started:.0f} s", flush=True)
        browser.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="walk-") as scratch:
        walk(Path(sys.argv[1] if len(sys.argv) > 1 else scratch).resolve())
