"""Near-duplicates and leaks: what was planted is found, what is reported is true, and degenerate data ends."""
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_accel.core import similarity
from finetune_accel.core.leaks import overlap, worst_pairs
from finetune_accel.core.similarity import jaccard, near_duplicates, shingles, signatures

SYLLABLES = [c + v for c in "bcdfghklmnprstvz" for v in ("a", "e", "i", "o", "u", "ar", "en", "il", "or", "un")]


def sentences(count: int, seed: int = 17, words: int = 24) -> list[str]:
    """Invented sentences: articles and prepositions as in English, nouns and verbs from a vocabulary of 4,000."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))) for _ in range(4000)]
    small = ["the", "a", "in the", "with a", "and", "of the", "to", "for"]
    made = []
    for _ in range(count):
        parts = [w for _ in range(draw.randint(words // 2, words)) for w in (draw.choice(small), draw.choice(vocabulary))]
        made.append(" ".join(parts).capitalize() + ".")
    return made


def streamed(texts):
    return lambda rows: ((int(row), texts[row]) for row in rows)


def write_bands(folder, texts, files=3):
    signed, paths = signatures(texts), []
    for i, part in enumerate(np.array_split(signed, files)):
        paths.append(folder / f"bands-{i}.parquet")
        pq.write_table(pa.table({f"band_{b}": column for b, column in enumerate(part.T)}), paths[-1])
    return paths


def edited(text: str, draw: random.Random) -> str:
    words = text.split()
    words[draw.randrange(len(words) - 1)] = "changed"
    return " ".join(words)


def test_planted_near_duplicates_are_found_and_nothing_else(tmp_path):
    draw, texts = random.Random(1), sentences(20_000)
    long = [i for i in range(15_000) if len(texts[i]) > 200]
    planted = dict(zip(range(19_000, 19_050), draw.sample(long, 50), strict=True))
    for copy, original in planted.items():
        texts[copy] = edited(texts[original], draw)
    rows, earlier, scores = near_duplicates(write_bands(tmp_path, texts), streamed(texts), np.ones(len(texts), bool))
    assert dict(zip(rows.tolist(), earlier.tolist(), strict=True)) == planted
    for row, other, score in zip(rows, earlier, scores, strict=True):
        assert score == pytest.approx(jaccard(shingles(texts[row]), shingles(texts[other]))) and score >= 0.85
    some = [shingles(text) for text in texts[18_700:19_000]]
    assert max(jaccard(some[i], some[j]) for i in range(300) for j in range(i)) < 0.85


def test_planted_leaks_are_found_and_nothing_else(tmp_path):
    draw, texts = random.Random(2), sentences(20_000)
    train, test = np.arange(19_000), np.arange(19_000, 20_000)
    long = [i for i in range(19_000) if len(texts[i].split()) > 30]
    originals = dict(zip(range(19_100, 19_150), draw.sample(long, 50), strict=True))
    for kind, row in enumerate(originals):
        source = texts[originals[row]]
        passage = " ".join(source.split()[3:20])
        texts[row] = [source, "  " + source.upper().replace(" ", "\n ", 3), edited(source, draw),
                      f"{texts[row]} {passage}, {texts[row - 100]}"][kind % 4]
    found = overlap(write_bands(tmp_path, texts), streamed(texts), train, test)
    for kind, row in enumerate(originals):
        at = row - 19_000
        assert found.exact[at] == (kind % 4 < 2)
        assert found.grams13[at] > 0
        assert (found.train_row[at] == originals[row]) == (kind % 4 < 3)
        assert found.jaccard[at] == 1 if kind % 4 < 2 else found.jaccard[at] < 1
    clean = ~np.isin(test, list(originals))
    assert not found.exact[clean].any() and not found.grams13[clean].any() and (found.train_row[clean] == -1).all()
    assert {pair["test_row"] for pair in worst_pairs(found, 100)} == set(originals)


@pytest.mark.parametrize("texts", [[], ["one row"], [""] * 5, ["the same row again"] * 30_000,
                                   ["long " * 200_000, "x", "long " * 200_000], ["\ud800 lone", "\0", "日本語のテキスト"]],
                         ids=["none", "one", "empty", "all equal", "a megabyte", "odd characters"])
def test_degenerate_data_ends(tmp_path, texts):
    bands = write_bands(tmp_path, texts)
    rows, earlier, scores = near_duplicates(bands, streamed(texts), np.ones(len(texts), bool))
    same = [row for row in range(len(texts)) if texts[row] in texts[:min(row, 3)]]
    assert rows.tolist() == same and (earlier < rows).all() and (scores == 1).all()
    half = np.arange(len(texts) // 2), np.arange(len(texts) // 2, len(texts))
    found = overlap(bands, streamed(texts), *half)
    assert found.exact.sum() == (found.jaccard == 1).sum() <= len(half[1])


def test_rows_set_aside_take_no_part(tmp_path):
    texts = sentences(1)[:1] * 4
    kept = np.array([False, True, False, True])
    rows, earlier, _ = near_duplicates(write_bands(tmp_path, texts), streamed(texts), kept)
    assert (rows.tolist(), earlier.tolist()) == ([3], [1])


def test_small_chunks_and_pruning_find_the_same(tmp_path, monkeypatch):
    draw, texts = random.Random(3), sentences(300)
    texts += [edited(text, draw) for text in texts for _ in range(2)]
    bands, kept = write_bands(tmp_path, texts), np.ones(900, bool)
    wanted = near_duplicates(bands, streamed(texts), kept)
    monkeypatch.setattr(similarity, "HELD_BYTES", 5_000)
    for given_, got in zip(wanted, near_duplicates(bands, streamed(texts), kept), strict=True):
        assert (given_ == got).all()
    monkeypatch.setattr(similarity, "_LIMIT", 500)
    assert np.isin(wanted[0], near_duplicates(bands, streamed(texts), kept)[0]).mean() > 0.99


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet="abc é\n", max_size=40), max_size=30), st.sampled_from([0.6, 0.85, 1.0]))
def test_every_reported_pair_is_one(tmp_path_factory, texts, at_least):
    bands = write_bands(tmp_path_factory.mktemp("bands"), texts, files=1)
    found = near_duplicates(bands, streamed(texts), np.ones(len(texts), bool), at_least)
    for row, other, score in zip(*found, strict=True):
        assert other < row
        assert score == pytest.approx(jaccard(shingles(texts[row]), shingles(texts[other]))) and score >= at_least - 1e-6


def test_recall_against_brute_force(tmp_path):
    draw, texts = random.Random(4), sentences(300, words=16)
    for _ in range(600):
        text = draw.choice(texts)
        for _ in range(draw.randint(1, 2)):
            text = edited(text, draw)
        texts.append(text)
    sets = [shingles(text) for text in texts]
    wanted = {i for i in range(len(texts)) if any(jaccard(sets[i], sets[j]) >= 0.85 for j in range(i))}
    rows, _, _ = near_duplicates(write_bands(tmp_path, texts), streamed(texts), np.ones(len(texts), bool))
    assert set(rows.tolist()) <= wanted and len(wanted) > 100
    assert len(rows) >= 0.97 * len(wanted)


def test_signatures_are_the_same_in_another_process():
    code = "from finetune_accel.core.similarity import signatures; print(signatures(['Turn on the lamp.', 'é']).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONHASHSEED": "99", "PATH": ""})
    assert done.stdout.strip() == str(signatures(["Turn on the lamp.", "é"]).tolist())
