"""Pages that are written to files, in a real browser without a network; those of a whole run are looked at in test_end_to_end.py."""
from browser import problems

from finetune_accel.core.pages import markdown_body, render, write_page

CARD = "# Card\n\n## Scores\n\n| | rows | " + " | ".join(f"column {n}" for n in range(12)) + " |\n|---|---|" + "---|" * 12 + "\n| in | 3 |" + " x |" * 12


def test_a_card_is_readable_everywhere(chromium, tmp_path):
    assert problems(chromium, write_page(tmp_path / "card.html", render("card.html.j2", title="card", body=markdown_body(CARD))), tmp_path) == {}
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_what_a_reader_cannot_use_is_found(chromium, tmp_path):
    bad = ('<title>x</title><style>p {color: #ccc; background: #fff} div {width: 900px}</style><main><h1>x</h1><p>pale</p><div>wide</div>'
           '<img src="https://example.com/x.png"></main>')
    found = problems(chromium, write_page(tmp_path / "bad.html", bad), tmp_path)
    assert len(found) == 4
    seen = found["bad.html light 390"]
    assert {line.split(":")[0] for line in seen.findings} >= {"serious color-contrast", "serious html-has-lang", "critical image-alt"}
    assert seen.fetched == ["https://example.com/x.png"] and seen.too_wide > 400
