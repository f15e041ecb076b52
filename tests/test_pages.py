"""Pages that are written to files, in a real browser without a network."""
from browser import problems

from finetune_accel.core.pages import markdown_body, render, write_page
from finetune_accel.core.runs import RunFolder

CARD = "# Card\n\n## Scores\n\n| | rows | " + " | ".join(f"column {n}" for n in range(12)) + " |\n|---|---|" + "---|" * 12 + "\n| in | 3 |" + " x |" * 12


def test_a_card_is_readable_everywhere(chromium, tmp_path):
    assert problems(chromium, write_page(tmp_path / "card.html", render("card.html.j2", title="card", body=markdown_body(CARD))), tmp_path) == {}
    assert {picture.name for picture in tmp_path.glob("*.png")} == {"card-light-1280.png", "card-dark-390.png"}


def test_what_a_reader_cannot_use_is_found(chromium, tmp_path):
    bad = ('<title>x</title><style>p {color: #ccc; background: #fff} div {width: 900px}</style><main><h1>x</h1><p>pale</p><div>wide</div>'
           '<img src="https://example.com/x.png"></main>')
    found = problems(chromium, write_page(tmp_path / "bad.html", bad), tmp_path)
    assert len(found) == 2
    seen = found["bad.html dark 390"]
    assert {line.split(":")[0] for line in seen.findings} >= {"serious color-contrast", "serious html-has-lang", "critical image-alt"}
    assert seen.fetched == ["https://example.com/x.png"] and seen.too_wide > 400


def test_all_pages_of_a_run_are_readable_everywhere(finished, chromium, tmp_path):
    """Report, dashboard and handover pack, in light and dark, at 1280 and 390 pixels, with the network off: axe-core finds nothing."""
    run = RunFolder(finished[0] / "runs/mine")
    pages = [run.path / "report.html", run.output("monitor/dashboard.html"), *sorted(run.output("handover/pack").glob("*.html"))]
    assert [page.name for page in pages[2:]] == ["data_card.html", "index.html", "model_card.html", "report.html"]
    assert {name: seen for page in pages[:-1] for name, seen in problems(chromium, page, tmp_path).items()} == {}


def test_the_report_prints_as_a_pdf_with_its_summary_on_the_first_page(finished, chromium):
    page = chromium.new_page(color_scheme="dark")
    page.goto((finished[0] / "runs/mine/report.html").as_uri())
    page.emulate_media(media="print")
    assert page.eval_on_selector("body", "body => getComputedStyle(body).color") == "rgb(28, 36, 48)", "ink is dark on paper, whatever the screen's scheme"
    assert page.eval_on_selector("#verdict", "section => getComputedStyle(section).breakBefore") == "page"
    assert page.pdf(format="A4", prefer_css_page_size=True)[:5] == b"%PDF-"
    page.close()
