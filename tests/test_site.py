"""The documentation site: built with warnings as errors, opened from its folder with the network off, searched, and looked at by axe-core."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import LOOKS, look

REPO = Path(__file__).parent.parent
PAGES = ("docs/index", "docs/tutorial", "docs/howto/own_data", "docs/api/commands", "docs/api/settings", "docs/api/modules", "docs/api/core.report", "docs/models",
         "docs/explanation", "README", "CONTRIBUTING", "nbs/01_plan", "nbs/05_evaluate", "nbs/core/promotion", "benchmarks/home_intents", "search")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it."""
    pytest.importorskip("sphinx", reason='needs pip install "finetune-accel[docs]"')
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d", str(folder / "doctrees"), ".", str(folder / "html")],
                          cwd=REPO, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO)})
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "html"


def test_pages_are_readable_everywhere_without_a_network(site, chromium, tmp_path):
    bad = {}
    for page in PAGES:
        for scheme, width in LOOKS:
            seen = look(chromium, (site / f"{page}.html").as_uri(), scheme, width, tmp_path / f"{page.replace('/', '-')}-{scheme}-{width}.png")
            serious = [line for line in seen.findings if line.split()[0] in ("serious", "critical")]
            if serious or seen.fetched or seen.too_wide:
                bad[f"{page} {scheme} {width}"] = (serious, seen.fetched, seen.too_wide)
    assert bad == {}


def test_nothing_is_fetched_from_elsewhere(site):
    found = {found for page in site.rglob("*.html") for found in re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text())}
    assert found == set() and len(list(site.rglob("*.html"))) > 300


def test_it_is_searched_without_a_network(site, chromium):
    context = chromium.new_context(offline=True)
    page = context.new_page()
    page.goto(f"{(site / 'search.html').as_uri()}?q=parity")
    page.wait_for_selector("#search-results li", timeout=20_000)
    assert any("parity" in line for line in page.locator("#search-results li").all_inner_texts())
    context.close()
