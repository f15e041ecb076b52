"""Every kind of source read back from files that the real libraries wrote, the bad ones refused, and memory measured."""
import csv
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_accel.core.blocks import LARGEST_ROW
from finetune_accel.core.engagement import anchored
from finetune_accel.core.errors import BadInput, Broken
from finetune_accel.core.lines import LARGEST_PIECE
from finetune_accel.core.readers import open_source
from finetune_accel.core.sources import source_digest

ROWS = [{"prompt": f"question {i}\nü", "response": f'say "{i}", or; {i}'} for i in range(4500)]


def rows_of(source, **options):
    """Return [(file, row number, row)] of a source; every block has gone through pickle."""
    blocks = [pickle.loads(pickle.dumps(block)) for block in open_source(str(source), **options).blocks()]
    assert all(block.first == block.items[0][0] and len(block.items) <= 2000 for block in blocks)
    return [(block.source, number, row) for block in blocks for number, row in block.rows()]


def values(source, **options):
    return [row for _, _, row in rows_of(source, **options)]


def refused(source, *words, **options):
    with pytest.raises(BadInput) as caught:
        rows_of(source, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, rows=ROWS, **options):
    with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


def test_jsonl(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    assert rows_of(tmp_path / "a.jsonl") == [("a.jsonl", i, row) for i, row in enumerate(ROWS, 1)]
    opened = open_source(str(tmp_path / "a.jsonl"))
    assert len(list(opened.blocks())) == len(list(opened.blocks())) == 3


@pytest.mark.parametrize("options", [{}, {"delimiter": ";"}, {"delimiter": "\t", "encoding": "utf-8-sig"}, {"delimiter": "|", "lineterminator": "\n"},
                                     {"quoting": csv.QUOTE_ALL}])
def test_csv(tmp_path, options):
    write_csv(tmp_path / "a.csv", **options)
    limit = csv.field_size_limit()
    assert values(tmp_path / "a.csv") == ROWS
    assert csv.field_size_limit() == limit
    assert [n for _, n, _ in rows_of(tmp_path / "a.csv")][:3] == [2, 4, 6]  # each record takes two lines


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"use_dictionary": False}, {"row_group_size": 100},
                                     {"use_dictionary": False, "column_encoding": {"prompt": "DELTA_BYTE_ARRAY", "response": "DELTA_LENGTH_BYTE_ARRAY"}}])
def test_parquet(tmp_path, options):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", **options)
    assert rows_of(tmp_path / "a.parquet") == [("a.parquet", i, row) for i, row in enumerate(ROWS, 1)]


def test_parquet_nested_and_null(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "s": {"x": [1, 2]}}, {"messages": None, "s": None},
            {"messages": [], "s": {"x": None}}] * 1500
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == rows


def test_text(tmp_path):
    text = "\n\n".join(f"paragraph {i} " + "wörd " * 50 for i in range(3000))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.txt").write_text(text)
    (tmp_path / "b.md").write_text("short")
    (tmp_path / "c.txt").write_text("")
    found = rows_of(tmp_path)
    pieces = [row for name, _, row in found if name == "sub/a.txt"]
    assert "".join(piece["text"] for piece in pieces) == text and [p["last"] for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece["text"]) <= LARGEST_PIECE for piece in pieces)
    lines = text.split("\n")
    assert all(lines[n - 1] == row["text"].split("\n")[0] for name, n, row in found if name == "sub/a.txt")
    assert [(name, n, row) for name, n, row in found if name == "b.md"] == [("b.md", 1, {"text": "short", "last": True})]
    assert [row.rule for name, _, row in found if name == "c.txt"] == ["empty text"]


def test_text_without_spaces_and_bad_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 250_000)
    (tmp_path / "b.txt").write_bytes("ä".encode() * 600_000 + b"\xe4")
    (tmp_path / "c.txt").write_bytes(b"\x1f\x8b" + b"0" * 50)
    found = rows_of(tmp_path)
    assert [len(row["text"]) for name, _, row in found if name == "a.txt"] == [100_000, 100_000, 50_000]
    (broken,) = [row for name, _, row in found if name == "b.txt"]
    assert broken.rule == "not UTF-8" and "1200001" in broken.detail
    assert [row.rule for name, _, row in found if name == "c.txt"] == ["not text"]


def test_folders(tmp_path):
    for name in ("x", "y"):
        pq.write_table(pa.Table.from_pylist(ROWS[:3]), tmp_path / f"{name}.parquet")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".x.parquet.crc").touch()
    assert [(name, n) for name, n, _ in rows_of(tmp_path)] == [("x.parquet", 1), ("x.parquet", 2), ("x.parquet", 3)] + [("y.parquet", i) for i in (1, 2, 3)]
    pq.write_table(pa.table({"other": ["a"]}), tmp_path / "z.parquet")
    refused(tmp_path, "z.parquet", "x.parquet", "other")
    (tmp_path / "z.parquet").unlink()
    write_jsonl(tmp_path / "z.jsonl", ROWS[:1])
    refused(tmp_path, "z.jsonl", "x.parquet", "mixes")


def test_folder_traps(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    refused(folder, "no data files")
    write_jsonl(tmp_path / "secret.jsonl", ROWS[:1])
    write_jsonl(folder / "a.jsonl", ROWS[:1])
    (folder / "b.jsonl").symlink_to(tmp_path / "secret.jsonl")
    refused(folder, "b.jsonl", "link")
    (folder / "b.jsonl").unlink()
    os.mkfifo(folder / "b.jsonl")
    refused(folder, "b.jsonl", "regular file")
    refused(folder / "b.jsonl", "regular file")
    (folder / "b.jsonl").unlink()
    (folder / "l").symlink_to(tmp_path)
    refused(folder, "link")
    (folder / "l").unlink()
    (folder / "k=1").mkdir()
    write_jsonl(folder / "k=1/b.jsonl", ROWS[:1])
    refused(folder, "partitionBy")
    refused(f"{folder}/../secret.jsonl", "'..'")
    refused("/dev/zero")


def test_saved_dataset(tmp_path):
    import datasets

    rows = [{**row, "messages": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:2])).save_to_disk(tmp_path / "d", num_shards={"train": 2, "test": 1})
    refused(tmp_path / "d", "test, train", "d/test")
    assert values(f"path:{tmp_path}/d/train") == rows and values(tmp_path / "d/test") == rows[:2]
    shard = sorted((tmp_path / "d/train").glob("*.arrow"))[1]
    shard.write_bytes(shard.read_bytes()[:100_000])
    refused(tmp_path / "d/train", shard.name)
    state = tmp_path / "d/test/state.json"
    state.write_text(state.read_text().replace("data-00000", "../../x"))
    refused(tmp_path / "d/test", "not a whole saved data set")


def test_delta(tmp_path):
    import deltalake

    path = str(tmp_path / "t")
    deltalake.write_deltalake(path, pa.Table.from_pylist([{**row, "lang": "ü x" if i % 2 else "de"} for i, row in enumerate(ROWS[:10])]), partition_by=["lang"])
    deltalake.write_deltalake(path, pa.table({"prompt": ["new"], "response": ["r"], "lang": ["de"], "extra": ["e"]}), mode="append", schema_mode="merge")
    deltalake.DeltaTable(path).delete("prompt = 'new'")
    assert len(values(path)) == len(values(f"delta:{path}")) == 10 and len(values(f"delta:{path}@1")) == 11
    assert {row["extra"] for row in values(f"delta:{path}@1")} == {None, "e"}
    assert sorted((r["prompt"], r["lang"]) for r in values(f"delta:{path}@0")) == sorted((r["prompt"], "ü x" if i % 2 else "de") for i, r in enumerate(ROWS[:10]))
    assert source_digest(f"delta:{path}@0") != source_digest(f"delta:{path}@1")
    refused(f"delta:{path}@9", "version 9")
    refused(f"delta:{tmp_path}/none", "_delta_log")
    refused("delta:cat.schema.table", "Spark")
    assert anchored("delta:t@1", tmp_path) == f"delta:{path}@1" and anchored("delta:../t", tmp_path / "t") == "delta:../t"


@pytest.mark.parametrize("feature", ["deletion vectors", "column mapping"])
def test_delta_features_that_would_be_misread(tmp_path, feature):
    import deltalake

    deltalake.write_deltalake(str(tmp_path), pa.table({"text": ["a", "b"]}))
    log = tmp_path / "_delta_log/00000000000000000000.json"
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    for entry in entries:
        if "protocol" in entry:
            name = {"deletion vectors": "deletionVectors", "column mapping": "columnMapping"}[feature]
            entry["protocol"] = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": [name], "writerFeatures": [name]}
        if "add" in entry and feature == "deletion vectors":
            entry["add"]["deletionVector"] = {"storageType": "u", "pathOrInlineDv": "ab^-aqEH.-t@S}K{vb[*k^", "offset": 4, "sizeInBytes": 40, "cardinality": 1}
        if "metaData" in entry and feature == "column mapping":
            entry["metaData"]["configuration"]["delta.columnMapping.mode"] = "name"
    log.write_text("\n".join(map(json.dumps, entries)))
    refused(f"delta:{tmp_path}", "Delta table" if feature == "deletion vectors" else "olumn mapping")


def test_volumes(tmp_path, monkeypatch):
    (tmp_path / "main/ft/raw").mkdir(parents=True)
    write_jsonl(tmp_path / "main/ft/raw/a.jsonl")
    for source in ("dbfs:/Volumes/main/ft/raw/a.jsonl", "/Volumes/main/ft/raw/a.jsonl", "dbfs:/Volumes/main/ft/raw"):
        assert values(source, volumes=str(tmp_path)) == ROWS
        refused(source, "FINETUNE_ACCEL_VOLUMES", "Databricks")
    monkeypatch.setenv("FINETUNE_ACCEL_VOLUMES", str(tmp_path))
    assert values("dbfs:/Volumes/main/ft/raw/a.jsonl") == ROWS and source_digest("dbfs:/Volumes/main/ft/raw/a.jsonl") == source_digest(str(tmp_path / "main/ft/raw/a.jsonl"))
    refused("dbfs:/Volumes/main/../../x.jsonl", "'..'")
    refused("dbfs:/mnt/x.jsonl", "volumes")


REFUSED = {  # file name: (content, words of the message)
    "array.jsonl": (b'[{"a": 1}]', ["JSON array", "jq"]), "pretty.jsonl": (b'{\n "a": 1\n}', ["several lines"]), "empty.jsonl": (b"", ["empty"]),
    "parquet.jsonl": (b"PAR1" + b"0" * 50, ["parquet"]), "gzip.jsonl": (b"\x1f\x8b\x08", ["gunzip"]), "utf16.jsonl": ('{"a": 1}'.encode("utf-16"), ["UTF-16"]),
    "a.json": (b"{}", ["jq"]), "a.jsonl.gz": (b"\x1f\x8b", ["gunzip"]), "a.xlsx": (b"PK\x03\x04", ["CSV UTF-8"]), "a.xyz": (b"a", [".jsonl"]), "none": (b"a", [".csv"]),
    "latin1.csv": ("a,b\nx,\nKäse,1\n".encode("latin-1"), [":3", "byte 9", "0xe4", "iconv"]), "twice.csv": (b"a,b,a\n", ["`a`", "twice"]),
    "unnamed.csv": (b"a,,b\n", ["no name"]), "which.csv": (b"a;b,c\n", ["','", "';'"]), "zip.csv": (b"PK\x03\x04", ["zip"]), "blank.csv": (b"\n\n", ["empty"]),
    "quote.csv": (b'a,"b\n1,2\n', ["header"]), "quotes.csv": (b'a,b\n' + b'a","\n' * 250_000, ["quote", "100"]),
    "text.parquet": (b"a,b", ["PAR1"]), "cut.parquet": (b"PAR1" + b"0" * 90, ["cut parquet"]), "encrypted.parquet": (b"PARE" + b"0" * 90, ["encrypted"]),
    "empty.parquet": (b"", ["empty"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(tmp_path, name):
    content, words = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, name, *words)


def test_parquet_damaged_inside_and_binary(tmp_path):
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(9000)]}), tmp_path / "a.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[200:2000] = os.urandom(1800)
    (tmp_path / "a.parquet").write_bytes(content)
    refused(tmp_path / "a.parquet", "a.parquet", "damaged")
    pq.write_table(pa.table({"text": ["a"], "image": [b"\x00"]}), tmp_path / "b.parquet")
    refused(tmp_path / "b.parquet", "image", "bytes")


def test_broken_csv_rows_do_not_take_others_with_them(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'a,b\n1,2\n3,"x\n5,6\n7,8,9\n' + b"z" * (LARGEST_ROW + 5) + b",1\n10,\"a\"b\n11\n\n12,=cmd()\n")
    found = {n: row.rule if isinstance(row, Broken) else row["b"] for _, n, row in rows_of(tmp_path / "a.csv")}
    assert found == {2: "2", 3: "not CSV", 4: "6", 5: "wrong number of fields", 6: "row too long", 7: "not CSV", 8: "wrong number of fields", 10: "=cmd()"}


BOUNDED = """
import resource, sys
from finetune_accel.core.readers import open_source
limit = int(sys.argv[2])
list(open_source(sys.argv[1].replace("target", "warm")).blocks())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    rows = [getattr(row, "rule", "good") for block in open_source(sys.argv[1]).blocks() for _, row in block.rows()]
    print(len(rows), sorted(set(rows)))
except Exception as error:
    print(type(error).__name__)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(grown, "MB")
assert grown < limit, grown
"""


def in_bounded_memory(tmp_path, name, limit):
    """Read tmp_path/target.SUFFIX in a process of its own, whose memory may grow by `limit` MB; return what it printed."""
    done = subprocess.run([sys.executable, "-c", BOUNDED, str(tmp_path / name), str(limit)], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("suffix, limit, said", [("jsonl", 40, "2 ['good', 'row too long']"), ("csv", 40, "2 ['good', 'row too long']"), ("txt", 60, "3000 ['good']")])
def test_memory_of_a_line_of_300_mb(tmp_path, suffix, limit, said):
    start, end = {"jsonl": (b'{"a": "', b'"}\n{"a": 1}\n'), "csv": (b"a,b\n", b",1\n1,2\n"), "txt": (b"", b"")}[suffix]
    (tmp_path / f"warm.{suffix}").write_bytes(start + b"x" + end)
    with open(tmp_path / f"target.{suffix}", "wb") as file:
        file.write(start)
        for _ in range(300):
            file.write(b"x" * 1_000_000)
        file.write(end)
    assert said in in_bounded_memory(tmp_path, f"target.{suffix}", limit)


def repeated(word, n):
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([word]))


def parquet_bomb(kind):
    """Return a table whose file is a few kB: megabyte strings repeated, very many rows, or one row of very many values."""
    n = 20_000_000
    if kind == "strings":
        return pa.table({"prompt": repeated("x" * 2_000_000, 4_000), "response": repeated("y" * 900_000, 4_000)})
    if kind == "rows":
        return pa.table({"prompt": repeated("x", n)})
    return pa.table({"prompt": pa.ListArray.from_arrays(pa.array([0, n], pa.int32()), repeated("x", n))})


@pytest.mark.parametrize("kind, said", [("strings", "4000 ['row too long']"), ("rows", "BadInput"), ("list", "BadInput")])
def test_memory_of_parquet_bombs(tmp_path, kind, said):
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "warm.parquet")
    pq.write_table(parquet_bomb(kind), tmp_path / "target.parquet", compression="zstd", store_schema=False, dictionary_pagesize_limit=1 << 30, row_group_size=1 << 30)
    assert os.path.getsize(tmp_path / "target.parquet") < 100_000
    assert said in in_bounded_memory(tmp_path, "target.parquet", 150)


ANY_LINES = st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b'{"a": "b"}', b"a,b", b'"', b'a","', b"", b" ", b"\r", b"\xef\xbb\xbf", b"1;2", b"\x00"])), max_size=12)


@settings(max_examples=200, deadline=None)
@given(ANY_LINES)
def test_any_bytes_as_jsonl(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content := b"\n".join(lines))
    try:
        found = rows_of(path)
    except BadInput as error:
        assert error.fix
        return
    assert [n for _, n, _ in found] == [n for n, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1) if line.strip()]
    assert all(isinstance(row, (dict, Broken)) for _, _, row in found)


@settings(max_examples=300, deadline=None)
@given(ANY_LINES)
def test_any_bytes_as_csv(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(b"a,b\n" + b"\n".join(lines))
    try:
        numbers = [n for _, n, _ in rows_of(path)]
    except BadInput as error:
        assert error.fix
        return
    assert numbers == sorted(set(numbers))
    path.write_bytes(b"\n".join(lines))
    try:
        rows_of(path)
    except BadInput as error:
        assert error.fix


def test_conversations_in_parquet_come_back_over_many_row_groups_and_pages(tmp_path):
    talks = [{"messages": [{"role": role, "content": f"{role} {i} " + "word " * (i % 200)} for role in ("user", "assistant")]} for i in range(12_000)]
    pq.write_table(pa.Table.from_pylist(talks), tmp_path / "chats.parquet", row_group_size=5_000)
    assert [row for _, _, row in rows_of(tmp_path / "chats.parquet")] == talks
