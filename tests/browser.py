"""Debian's Chromium with the network off, and axe-core: what a reader cannot use on a page, in light and dark, wide and narrow."""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

CHROMIUM = Path("/usr/bin/chromium")
LOOKS = [("light", 1280), ("dark", 390)]  # each scheme and each width once: colours do not depend on the width, nor the width on colours


@pytest.fixture(scope="module")
def chromium():
    """The browser, for one file of tests: Playwright's loop must not outlive it, as other tests have loops of their own."""
    sync_api = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("axe_playwright_python")
    if not CHROMIUM.is_file():
        pytest.skip("needs Debian's Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


class Seen(NamedTuple):
    """What one look at a page found: what axe says, what was asked of a network, and by how many pixels it is too wide."""

    findings: list[str]
    fetched: list[str]
    too_wide: int


def findings(page, levels=("serious", "critical")) -> list[str]:
    """Return a line for each rule of axe-core that the page breaks at these levels: level, rule, places."""
    from axe_playwright_python.sync_playwright import Axe

    return [f"{found['impact']} {found['id']}: {[node['html'][:120] for node in found['nodes'][:3]]}"
            for found in Axe().run(page).response["violations"] if found["impact"] in levels]


def look(browser, address: str, scheme: str, width: int, picture: Path) -> Seen:
    """Open a page with the network off, have axe look at it, and take its picture."""
    context = browser.new_context(offline=True, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, fetched = context.new_page(), []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(address)
    page.screenshot(path=picture)
    seen = Seen(findings(page, ("minor", "moderate", "serious", "critical")), [url for url in fetched if not url.startswith(("file:", "data:"))],
                page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
    context.close()
    return seen


def problems(browser, page: Path, pictures: Path) -> dict[str, Seen]:
    """Return {look: what was found} of each look at a file that is not as it should be; pictures are left in a folder."""
    looks = {f"{page.name} {scheme} {width}": look(browser, page.as_uri(), scheme, width, pictures / f"{page.stem}-{scheme}-{width}.png") for scheme, width in LOOKS}
    return {name: seen for name, seen in looks.items() if seen != Seen([], [], 0)}
