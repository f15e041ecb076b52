"""More than a hundred broken and hostile model folders: each is refused by name, nothing in it is run, and nothing hangs or eats the memory.

Every folder goes through the real loader, in a process of its own that is ended (and fails that one test) when it takes too long.
"""
from __future__ import annotations

import json
import os
import pickle
import resource
import select
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TEMPLATE, tiny_model

SECONDS = 60  # for one folder, on a busy machine
LOADER = """
import json, sys, time
from finetune_accel.core.answering import load_engine
from finetune_accel.core.errors import BadInput
print("ready", flush=True)
for line in sys.stdin:
    begun, cpu = time.monotonic(), time.process_time()
    try:
        engine = load_engine("reference", line.strip())
        told = {"kind": "loaded", "text": engine.generate([[{"role": "user", "content": "on"}]], 2)[0].text}
    except BadInput as error:
        told = {"kind": "BadInput", "text": str(error), "place": error.place, "rule": error.rule}
    except BaseException as error:
        told = {"kind": type(error).__name__, "text": str(error)}
    print(json.dumps(told | {"seconds": time.process_time() - cpu}), flush=True)
"""


class Loader:
    """A process that loads folders with the reference engine, one after the other."""

    def __init__(self):
        self.process = None

    def line(self, seconds: float) -> str:
        """Return the next line that the process writes; fail if there is none in time."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.end()
            pytest.fail(f"it hangs: nothing after {seconds} seconds")
        line = self.process.stdout.readline()
        if not line:
            self.end()
            pytest.fail("the process died")
        return line

    def load(self, folder: Path) -> dict:
        """Return what became of loading `folder`."""
        if self.process is None:
            limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))  # noqa: E731
            self.process = subprocess.Popen([sys.executable, "-c", LOADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                            text=True, bufsize=1, preexec_fn=limit, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            while self.line(120) != "ready\n":
                pass
        self.process.stdin.write(f"{folder}\n")
        return json.loads(self.line(SECONDS))

    def end(self) -> None:
        """End the process."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def loader():
    started = Loader()
    yield started
    started.end()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("good"), ["turn on the lights"])


class Folder:
    """A copy of the good folder that a case spoils; `canary` is a file that only code from the folder would write."""

    def __init__(self, path: Path, canary: Path):
        self.path, self.canary = path, canary

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def change(self, name: str, **keys) -> None:
        """Set keys of a JSON file."""
        file = self / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | keys))

    def code(self) -> str:
        """Return Python code that writes the canary."""
        return f"open({str(self.canary)!r}, 'w').write('run')\n"

    def python(self, name: str) -> None:
        """Write a Python file that writes the canary."""
        (self / name).parent.mkdir(exist_ok=True)
        (self / name).write_text(self.code())

    def pickled(self, name: str) -> None:
        """Write a pickle that writes the canary when it is opened."""
        code = self.code()

        class Payload:
            def __reduce__(self):
                return exec, (code,)

        (self / name).write_bytes(pickle.dumps({"model.embed_tokens.weight": Payload()}))

    def weights(self, change) -> None:
        """Rewrite the weights after `change` of {name: tensor}."""
        tensors = load_file(self / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self / "model.safetensors", {"format": "pt"})

    def header(self, header: dict | bytes, data: bytes = b"", length: int | None = None) -> None:
        """Write a safetensors file by hand."""
        written = header if isinstance(header, bytes) else json.dumps(header).encode()
        (self / "model.safetensors").write_bytes(struct.pack("<Q", len(written) if length is None else length) + written + data)

    def shards(self) -> dict:
        """Cut the weights in two files and return their index, which is written too."""
        tensors = load_file(self / "model.safetensors")
        names = sorted(tensors)
        for number, part in enumerate((names[::2], names[1::2])):
            save_file({name: tensors[name] for name in part}, self / f"part-{number}.safetensors", {"format": "pt"})
        (self / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}}
        (self / "model.safetensors.index.json").write_text(json.dumps(index))
        return index

    def tokenizer(self, change) -> None:
        """Rewrite tokenizer.json after `change`."""
        content = json.loads((self / "tokenizer.json").read_text())
        change(content)
        (self / "tokenizer.json").write_text(json.dumps(content))

    def template(self, text: str) -> None:
        """Write the chat template."""
        (self / "chat_template.jinja").write_text(text)

    def move_out(self, name: str) -> None:
        """Move a file out of the folder and leave a link to it."""
        outside = self.path.parent / f"outside-{name}"
        shutil.move(self / name, outside)
        (self / name).symlink_to(outside)


CASES = {}  # name: (what spoils the folder, words of the message)


def case(*words, name=None):
    def keep(spoil):
        CASES[name or spoil.__name__.replace("_", " ")] = (spoil, words)
        return spoil
    return keep


for ending in ("pytorch_model.bin", "model.pt", "weights.pkl", "model.ckpt"):
    @case("holds no .safetensors", ending, name=f"only {ending}")
    def _(folder, ending=ending):
        (folder / "model.safetensors").unlink()
        folder.pickled(ending)


@case("is not a whole safetensors file")
def a_pickle_named_safetensors(folder):
    folder.pickled("model.safetensors")


@case("weight_map", "must be in a .safetensors file")
def an_index_of_pickles(folder):
    (folder / "model.safetensors").unlink()
    folder.pickled("part.bin")
    folder.change("model.safetensors.index.json", weight_map={"model.embed_tokens.weight": "part.bin"}, metadata={})


@case("holds no .safetensors")
def a_pickled_index(folder):
    (folder / "model.safetensors").unlink()
    folder.pickled("part.bin")
    folder.change("pytorch_model.bin.index.json", weight_map={"model.embed_tokens.weight": "part.bin"}, metadata={})


for file, value in {"config.json": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "tokenizer_config.json": {"AutoTokenizer": ["evil.T", None]},
                    "generation_config.json": {"AutoModelForCausalLM": "evil.Model"}}.items():
    @case(file, "auto_map", "run code", name=f"auto_map in {file}")
    def _(folder, file=file, value=value):
        folder.change(file, auto_map=value)
        folder.python("evil.py")


@case("auto_map", "run code")
def auto_map_of_an_unknown_type(folder):
    folder.change("config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, model_type="evil")
    folder.python("evil.py")


@case("auto_map", "run code")
def auto_map_of_another_repository(folder):
    folder.change("config.json", auto_map={"AutoConfig": "someone/else--evil.Config"})


@case("trust_remote_code", "run code")
def trust_remote_code_in_the_config(folder):
    folder.change("config.json", trust_remote_code=True, code_revision="main")


@case("custom_pipelines", "run code")
def a_custom_pipeline(folder):
    folder.change("config.json", custom_pipelines={"text-generation": {"impl": "evil.Pipeline", "pt": ["AutoModelForCausalLM"]}})
    folder.python("evil.py")


@case("custom_generate", "code")
def custom_generate(folder):
    folder.python("custom_generate/generate.py")


@case("custom_generate", "run code")
def custom_generate_by_name(folder):
    folder.change("generation_config.json", custom_generate="someone/evil")


@case("transformers_weights")
def weights_named_by_the_config(folder):
    folder.change("config.json", transformers_weights="../../x.safetensors")


@case("_attn_implementation", "leads out")
def attention_from_the_hub(folder):
    folder.change("config.json", _attn_implementation="someone/evil-kernel")


@case("quantization_config", "another library")
def quantisation_by_another_library(folder):
    folder.change("config.json", quantization_config={"quant_method": "gptq", "bits": 4})


@case("model_type", "not a name")
def a_model_type_that_is_a_path(folder):
    folder.change("config.json", model_type="../../evil")


@case("cannot be loaded", "hyperllama")
def an_unknown_model_type(folder):
    folder.change("config.json", model_type="hyperllama", architectures=["HyperLlama"])


@case("cannot be loaded")
def no_model_type(folder):
    (folder / "config.json").write_text("{}")


@case("has no config.json")
def no_config(folder):
    (folder / "config.json").unlink()


@case("config.json", "not JSON")
def config_is_no_json(folder):
    (folder / "config.json").write_text("{'model_type': 'llama'}")


@case("config.json", "must be a JSON object")
def config_is_a_list(folder):
    (folder / "config.json").write_text("[1, 2]")


@case("config.json", "larger than")
def config_of_100_megabytes(folder):
    with open(folder / "config.json", "r+b") as file:
        file.truncate(100 << 20)


@case("config.json", "not JSON")
def config_nested_deeply(folder):
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


@case("config.json", "not JSON")
def config_is_no_unicode(folder):
    (folder / "config.json").write_bytes(b'{"model_type": "\xff\xfe\x80"}')


@case("config.json", "not a plain file")
def config_is_a_pipe(folder):
    (folder / "pipe").parent.mkdir(exist_ok=True)
    os.mkfifo(folder / "generation_config.json.pipe")
    os.replace(folder / "generation_config.json.pipe", folder / "generation_config.json")


for key, value in {"num_hidden_layers": 10**9, "hidden_size": 10**12, "intermediate_size": 10**12, "vocab_size": 10**13, "num_attention_heads": 10**10,
                   "max_position_embeddings": 10**12, "head_dim": 10**9}.items():
    @case("config.json", key, "does not fit", name=f"huge {key}")
    def _(folder, key=key, value=value):
        folder.change("config.json", **{key: value})


@case("config.json", "num_labels", "does not fit")
def a_name_for_each_of_a_billion_labels(folder):
    folder.change("config.json", num_labels=10**9)


@case("config.json", "text_config", "must be a JSON object")
def a_text_config_that_is_a_list(folder):
    folder.change("config.json", text_config=[1])


@case("describes a model of", "numbers")
def experts_without_weights(folder):
    folder.change("config.json", model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=60_000)


@case("describes a model of", "numbers")
def the_usual_sizes_of_a_giant(folder):
    (folder / "config.json").write_text('{"model_type": "deepseek_v3"}')


@case("describes a model of", "numbers")
def sizes_that_are_huge_together(folder):
    folder.change("config.json", hidden_size=90_000, intermediate_size=90_000, vocab_size=90_000, num_attention_heads=4)


@case("cannot be loaded")
def sizes_that_are_texts(folder):
    folder.change("config.json", hidden_size="64")


@case("cannot be loaded")
def sizes_that_are_negative(folder):
    folder.change("config.json", hidden_size=-64)


@case("cannot be loaded")
def an_unknown_dtype(folder):
    folder.change("config.json", dtype="float99")


@case("cannot be loaded")
def an_unknown_activation(folder):
    folder.change("config.json", hidden_act="__import__")


@case("embed_tokens", "another shape")
def a_vocabulary_larger_than_the_embedding(folder):
    config = json.loads((folder / "config.json").read_text())
    folder.change("config.json", vocab_size=config["vocab_size"] + 64)


@case("embed_tokens", "another shape")
def a_vocabulary_smaller_than_the_embedding(folder):
    folder.change("config.json", vocab_size=64)


@case("tokenizer knows token")
def an_embedding_smaller_than_the_tokenizer(folder):
    folder.change("config.json", vocab_size=64)
    folder.weights(lambda tensors: tensors.update({"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:64]}))


@case("q_proj", "another shape")
def wrong_shapes(folder):
    name = "model.layers.0.self_attn.q_proj.weight"
    folder.weights(lambda tensors: tensors.update({name: tensors[name][:, :-1]}))


@case("missing", "random", "down_proj")
def a_missing_tensor(folder):
    folder.weights(lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))


@case("does not fit")
def a_missing_layer(folder):
    folder.weights(lambda tensors: [tensors.pop(name) for name in list(tensors) if not name.endswith("embed_tokens.weight")])


@case("belong to no layer", "backdoor")
def a_tensor_too_many(folder):
    folder.weights(lambda tensors: tensors.update({"model.layers.0.backdoor.weight": torch.zeros(3)}))


@case("gate_proj", "is empty")
def empty_tensors(folder):
    folder.change("config.json", intermediate_size=0)
    folder.weights(lambda tensors: tensors.update({name: tensor[:, :0] if "down_proj" in name else tensor[:0]
                                                   for name, tensor in tensors.items() if ".mlp." in name}))


@case("model.norm.weight", "not finite")
def a_weight_that_is_nan(folder):
    folder.weights(lambda tensors: tensors["model.norm.weight"].__setitem__(5, float("nan")))


@case("up_proj", "not finite")
def a_weight_that_is_infinite(folder):
    folder.weights(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 3), float("-inf")))


@case("is not a whole safetensors file")
def truncated_weights(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) // 2)


@case("is not a whole safetensors file")
def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


@case("is not a whole safetensors file")
def a_header_of_absurd_length(folder):
    folder.header(b"{}", length=2**63)


@case("is not a whole safetensors file")
def a_header_nested_deeply(folder):
    folder.header(b'{"a":' * 50_000)


@case("is not a whole safetensors file")
def overlapping_tensors(folder):
    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    folder.header({"a": tensor, "b": tensor}, b"\0" * 16)


@case("is not a whole safetensors file")
def offsets_behind_the_end(folder):
    folder.header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [2**40, 2**40 + 16]}}, b"\0" * 16)


@case("is not a whole safetensors file")
def a_shape_that_overflows(folder):
    folder.header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, b"\0" * 16)


@case("is not a whole safetensors file")
def a_tensor_of_unknown_type(folder):
    folder.header({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16)


@case("part-1.safetensors", "is none")
def a_missing_shard(folder):
    folder.shards()
    (folder / "part-1.safetensors").unlink()


@case("must be in a .safetensors file of this folder", "../")
def an_index_that_leaves_the_folder(folder):
    index = folder.shards()
    shutil.copy(folder / "part-0.safetensors", folder.path.parent / "x.safetensors")
    folder.change("model.safetensors.index.json", weight_map=index["weight_map"] | {"lm_head.weight": "../x.safetensors"})


@case("weight_map")
def an_index_without_map(folder):
    folder.shards()
    (folder / "model.safetensors.index.json").write_text("{}")


for file in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
    @case(file, "link that leaves", name=f"link from {file} to the outside")
    def _(folder, file=file):
        folder.move_out(file)


@case("link that leaves")
def a_link_to_a_secret(folder):
    (folder / "vocab.txt").symlink_to("/etc/passwd")


@case("link that leaves")
def a_folder_that_is_a_link(folder):
    (folder / "additional_chat_templates").symlink_to("/etc")


@case("config.json")
def a_link_to_itself(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")


@case("adapter", "base model")
def an_adapter_instead_of_a_model(folder):
    folder.change("adapter_config.json", peft_type="LORA", base_model_name_or_path="https://example.com/evil")


@case("holds no .safetensors", "adapter_model", name="an adapter without model")
def _(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.bin")


GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 3) + b"abc" + struct.pack("<II", 9, 8)[:8]  # an array of texts without end


@case("holds no .safetensors", ".gguf")
def a_crafted_gguf(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.gguf").write_bytes((GGUF + b"\xff" * 43)[:43])


@case("is not a whole safetensors file")
def a_crafted_gguf_named_safetensors(folder):
    (folder / "model.safetensors").write_bytes((GGUF + b"\xff" * 43)[:43])


@case("gguf_file")
def a_gguf_named_by_the_config(folder):
    folder.change("tokenizer_config.json", gguf_file="model.gguf")
    (folder / "model.gguf").write_bytes((GGUF + b"\xff" * 43)[:43])


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
for name, text, *words in [
        ("loops", LOOP, "counts in a loop that counts"),
        ("loops in a macro", "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}", "is not done"),
        ("grows", "{% set n = namespace(x='x' * 99999) %}{% for a in range(99999) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}", "short conversation"),
        ("counts", "{{ 9 ** (9 ** (9 ** 9)) }}", "is not done"),
        ("repeats", "{{ 'x' * 10 ** 11 }}", "memory"),
        ("pads", "{{ '%099999999999d' % 1 }}", "memory"),
        ("reaches for a class", "{{ messages.__class__ }}", "__class__"),
        ("reaches for globals", "{{ raise_exception['__globals__']['__builtins__']['open']('/etc/passwd').read() }}", "__globals__"),
        ("reaches by a filter", "{{ messages | map(attribute='x.__init__') | list }}", "__init__"),
        ("includes a file", "{% include '/etc/passwd' %}", "another file"),
        ("imports a file", "{% import 'evil.jinja' as evil %}", "another file"),
        ("extends a file", "{% extends '/etc/passwd' %}", "another file"),
        ("is no template", "{% for %}", "Jinja"),
        ("is nested deeply", "{% if 1 %}" * 5000 + "{% endif %}" * 5000, "chat_template.jinja"),
        ("is huge", "x" * 3_000_000, "million")]:
    @case("chat_template.jinja", *words, name=f"a template that {name}")
    def _(folder, text=text):
        folder.template(text)


@case("tokenizer_config.json", "chat_template", "counts in a loop that counts")
def a_template_in_the_tokenizer_config_that_loops(folder):
    (folder / "chat_template.jinja").unlink()
    folder.change("tokenizer_config.json", chat_template=LOOP)


@case("chat_template", "counts in a loop that counts")
def a_second_template_that_loops(folder):
    (folder / "chat_template.jinja").unlink()
    folder.change("tokenizer_config.json", chat_template=[{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": LOOP}])


@case("additional_chat_templates", "counts in a loop that counts")
def an_additional_template_that_loops(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text(LOOP)


@case("chat_template", "must be a text")
def a_template_that_is_a_number(folder):
    (folder / "chat_template.jinja").unlink()
    folder.change("tokenizer_config.json", chat_template=7)


@case("tokenizer.json", "not JSON")
def a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:5000])


@case("cannot be loaded")
def a_tokenizer_without_a_model(folder):
    folder.tokenizer(lambda content: content.pop("model"))


@case("cannot be loaded")
def a_tokenizer_whose_merges_name_no_tokens(folder):
    folder.tokenizer(lambda content: content["model"].update(merges=[["nobody", "knows"]]))


@case("cannot be loaded")
def no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


for part, extra in {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
                    "normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}}.items():
    @case("tokenizer.json", "fails for a text", name=f"a {part} that backtracks")
    def _(folder, part=part, extra=extra):
        folder.tokenizer(lambda content: content.update({part: extra}))


@case("tokenizer.json", "fails for a text")
def a_regular_expression_that_backtracks_while_it_loads(folder):
    def spoil(content):
        content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
        content["added_tokens"].append({"id": 600, "content": "a" * 60 + "!", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False})
    folder.tokenizer(spoil)


DOUBLE = {"type": "Replace", "pattern": {"String": "n"}, "content": "nn"}
BEGIN = {"id": "<s>", "ids": [4_000_000], "tokens": ["<s>"]}
for name, part, extra, *words in [
        ("a normalizer that doubles letters", "normalizer", {"type": "Sequence", "normalizers": [DOUBLE] * 28}, "tokenizer.json", "cuts text"),
        ("a normalizer that doubles letters a little", "normalizer", {"type": "Sequence", "normalizers": [DOUBLE] * 7}, "makes a short text very long"),
        ("a normalizer that prepends megabytes", "normalizer", {"type": "Prepend", "prepend": "x" * 5_000_000}, "larger than"),
        ("a normalizer of garbage", "normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////w=="}, "tokenizer.json", "cuts text"),
        ("a pre_tokenizer that panics", "pre_tokenizer", {"type": "FixedLength", "length": 0}, "fails for a text"),
        ("a decoder that nobody knows", "decoder", {"type": "Evil"}, "cannot be read"),
        ("a post_processor that writes an unknown token", "post_processor", {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<s>": BEGIN}},
         "writes token 4000000"),
        ("a post_processor that writes a million tokens", "post_processor", {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 200 + [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 5000, "tokens": ["<s>"] * 5000}}}, "makes a short text very long"),
        ("a vocabulary without its unknown token", "model", {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                                                             "max_input_chars_per_word": 100, "vocab": {"a": 0}}, "cannot be loaded", "UNK")]:
    @case(*words, name=name)
    def _(folder, part=part, extra=extra):
        folder.tokenizer(lambda content: content.update({part: extra}))


def add_token(folder, text, special):
    """Add a token after the last; the model has no row for it."""
    token = {"content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    folder.tokenizer(lambda content: content["added_tokens"].append({"id": 4_000_000, **token}))


@case("tokenizer knows token", "please")
def an_added_token_beyond_the_vocabulary(folder):
    add_token(folder, "please", special=False)


@case("tokenizer knows token", "<extra>")
def an_added_token_that_the_template_writes(folder):
    add_token(folder, "<extra>", special=True)
    folder.template("<extra>" + TEMPLATE)


@case("tokenizer knows token", "<extra>")
def an_added_token_that_fills_texts(folder):
    add_token(folder, "<extra>", special=True)
    folder.change("tokenizer_config.json", pad_token="<extra>")


@case("tokenizer knows token", "漢")
def a_special_token_that_is_a_letter(folder):
    add_token(folder, "漢", special=True)


@case("cannot be loaded")
def a_length_that_is_a_text(folder):
    folder.change("tokenizer_config.json", model_max_length="x")


@case("tokenizer knows token")
def a_token_beyond_the_vocabulary(folder):
    folder.tokenizer(lambda content: content["model"]["vocab"].update({"zzz": 2_000_000_000}))


@case("tokenizer_file", "leads out")
def a_tokenizer_that_lies_elsewhere(folder):
    folder.change("tokenizer_config.json", tokenizer_file="/etc/passwd")


@case("tokenizer_class", "not a name")
def a_tokenizer_class_that_is_a_path(folder):
    folder.change("tokenizer_config.json", tokenizer_class="../evil.py")
    folder.python("evil.py")


@case("special_tokens_map.json", "must be a JSON object")
def special_tokens_that_are_a_list(folder):
    (folder / "special_tokens_map.json").write_text("[]")


for name, content in {"nonsense": {"max_new_tokens": -5, "temperature": "hot"}, "a list": [1]}.items():
    @case("model", name=f"generation config of {name}")
    def _(folder, content=content):
        (folder / "generation_config.json").write_text(json.dumps(content))


for name, ids in {"beyond the vocabulary": 10**6, "negative": -1, "a text": "<|im_end|>", "a list with one beyond": [1, 10**9], "true": True}.items():
    @case("generation_config.json", "eos_token_id", "no answer could end", name=f"end token {name}")
    def _(folder, ids=ids):
        folder.change("generation_config.json", eos_token_id=ids)


@case("no end token")
def no_end_token(folder):
    folder.template("{% for m in messages %}{{ m.content }}{% endfor %}")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if not key.startswith("eos_token")}))


LONG = ("a template that loops in a macro", "a template that counts", "a normalizer that doubles letters")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in CASES])
def test_a_hostile_folder_is_refused(name, loader, good, tmp_path):
    spoil, words = CASES[name]
    folder = Folder(tmp_path / "model", tmp_path / "canary")
    shutil.copytree(good, folder.path)
    spoil(folder)
    told = loader.load(folder.path)
    assert told["kind"] == "BadInput", told
    assert " Fix: " in told["text"] and str(tmp_path) in told["text"] and len(told["text"]) < 1500, told["text"]
    for word in words:
        assert word in told["text"], (word, told["text"])
    assert not folder.canary.exists(), "code from the folder was run"
    assert told["seconds"] < 5, told


def snapshot(folder: Folder) -> Path:
    """Put the files as Hugging Face's cache does: snapshots/COMMIT/NAME links to blobs/DIGEST."""
    cache = folder.path.parent / "models--someone--something"
    place = cache / "snapshots" / ("0123456789" * 4)
    place.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.path.iterdir())):
        blob = f"{number:040x}"
        shutil.move(file, cache / "blobs" / blob)
        (place / file.name).symlink_to(f"../../blobs/{blob}")
    return place


def beside_pickles(folder: Folder) -> Path:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        folder.pickled(name)
    folder.python("train.py")
    return folder.path


def in_shards(folder: Folder) -> Path:
    folder.shards()
    return folder.path


def linked_as_a_whole(folder: Folder) -> Path:
    link = folder.path.parent / "link"
    link.symlink_to(folder.path)
    return link


def linked_inside(folder: Folder) -> Path:
    shutil.move(folder / "model.safetensors", folder / "weights.safetensors")
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    return folder.path


def with_room_for_tokens(folder: Folder) -> Path:
    """Published models pad their embedding to a round number of rows."""
    padded = lambda tensors: tensors.update({"model.embed_tokens.weight": torch.nn.functional.pad(tensors["model.embed_tokens.weight"], (0, 0, 0, 64))})  # noqa: E731
    folder.weights(padded)
    config = json.loads((folder / "config.json").read_text())
    folder.change("config.json", vocab_size=config["vocab_size"] + 64)
    return folder.path


def with_a_token_for_images(folder: Folder) -> Path:
    """Gemma 3 has one in its models for text, behind their last row: nothing writes it."""
    add_token(folder, "<image_soft_token>", special=True)
    return folder.path


def cut_as_llama_does(folder: Folder) -> Path:
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    folder.tokenizer(lambda content: content.update(pre_tokenizer={"type": "Sequence", "pretokenizers": steps}))
    return folder.path


@pytest.mark.parametrize("make", [lambda folder: folder.path, snapshot, beside_pickles, in_shards, linked_as_a_whole, linked_inside, with_room_for_tokens,
                                  with_a_token_for_images, cut_as_llama_does])
def test_good_folders_are_loaded(make, loader, good, tmp_path):
    folder = Folder(tmp_path / "model", tmp_path / "canary")
    shutil.copytree(good, folder.path)
    begun = time.monotonic()
    told = loader.load(make(folder))
    assert told["kind"] == "loaded", told
    assert not folder.canary.exists() and time.monotonic() - begun < SECONDS


def test_a_snapshot_may_link_to_its_own_blobs_only(loader, good, tmp_path):
    folder = Folder(tmp_path / "model", tmp_path / "canary")
    shutil.copytree(good, folder.path)
    place = snapshot(folder)
    other = tmp_path / "other/blobs" / ("a" * 40)
    other.parent.mkdir(parents=True)
    shutil.copy(place / "config.json", other)
    (place / "config.json").unlink()
    (place / "config.json").symlink_to(other)
    assert "link that leaves" in loader.load(place)["text"]
