"""What README, CONTRIBUTING and the documentation pages tell a reader to do: every code block runs, or is checked by what would run it."""
from __future__ import annotations

import re
import shlex
from configparser import ConfigParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from markdown_it import MarkdownIt

from finetune_accel.core.cli import app
from finetune_accel.core.engagement import load_engagement, phases, read_yaml, shipped_engagements
from finetune_accel.core.errors import BadInput
from finetune_accel.core.settings import own_fields

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md")), *sorted((REPO / "docs/howto").glob("*.md"))]
GROUP = typer.main.get_command(app)
UsageError = typer.BadParameter.__base__  # typer carries a click of its own
# Programs of others: what they are told is theirs to check
OTHERS = {"cd", "databricks", "export", "git", "sed", "vllm/bin/pip", "chromium", "jupyter", "pre-commit"}


class Block(NamedTuple):
    """A fenced block: where it stands, what its fence says it is, its text, and the notebook that it is for (test_contributing.py puts it there)."""

    place: str
    language: str
    text: str
    notebook: str = ""


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, also those inside lists; Sphinx's own directives are left out."""
    found = [token for token in MarkdownIt().parse(page.read_text()) if token.type in ("fence", "code_block")]
    return [Block(f"{page.relative_to(REPO)}:{token.map[0] + 1}", *token.info.partition(" ")[:1], token.content, token.info.partition(" ")[2])
            for token in found if not token.info.startswith("{")]


def commands(text: str) -> list[list[str]]:
    """Return the words of each simple command of a shell text, without comments and without what is set before it."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        reader.whitespace_split = True
        words: list[str] = []
        for word in [*reader, ";"]:
            if word in ("&&", "|", ";"):
                found += [words] if words else []
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)
    return found


def parsed(words: list[str]) -> Any:
    """Return the context in which the command line would carry out `finetune-accel WORDS`; raises UsageError as it would."""
    group = GROUP.make_context("finetune-accel", list(words))
    name, command, rest = GROUP.resolve_command(group, [*group._protected_args, *group.args])
    return command.make_context(name, list(rest), parent=group)


def engagement_of(name: str, tmp_path: Path) -> str:
    """Return a shipped engagement's name, or for a reader's own file the starter that `init` writes for it."""
    if name in shipped_engagements():
        return name
    (tmp_path / Path(name).name).write_text(shipped_engagements()["starter"].read_text())
    return str(tmp_path / Path(name).name)


def check_own_command(words: list[str], tmp_path: Path) -> None:
    """Parse a command of ours; an engagement that it runs is loaded with all that it sets."""
    context = parsed(words)
    if context.info_name == "run" and context.params["engagement"]:
        name = engagement_of(context.params["engagement"], tmp_path)
        grid = [f"{key}={value}" for option in context.params["grid"] or [] for key, values in [option.split("=", 1)] for value in values.split(",")]
        for overrides in [context.params["overrides"] or [], *([one] for one in grid)]:
            load_engagement(name, list(overrides))


def check_command(words: list[str], tmp_path: Path) -> None:
    """Fail if a command does not exist here, or would be refused for how it is written."""
    program, *rest = words
    if program == "finetune-accel":
        check_own_command(rest, tmp_path)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.M)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif program == "pip" or rest[:3] == ["-m", "pip", "install"]:
        extras = {name.removesuffix("_requirements") for name in _settings() if name.endswith("_requirements")}
        assert {extra for word in rest for extra in re.findall(r"^finetune-accel\[(\w+)\]", word)} <= extras, words
    elif program in ("python", "python3"):
        assert rest[0] in ("-c", "-m", "old_script.py") or (REPO / rest[0]).is_file(), words
        assert all(word in (REPO / rest[0]).read_text() for word in rest[1:] if word.startswith("--")), words
    elif program == "papermill":
        phase = next(phase for phase in phases() if phase.notebook == REPO / rest[0])
        assert all(rest[i + 1] in phase.settings.model_fields for i, word in enumerate(rest) if word == "-p"), words
    elif program == "curl":
        path = re.search(r"http://127\.0\.0\.1:8000(/\S*)", " ".join(rest)).group(1)
        assert f'"{path}"' in (REPO / "finetune_accel/core/server.py").read_text(), words
    else:
        assert program in OTHERS, f"{program}: a program that nobody here knows"


def _settings() -> dict:
    config = ConfigParser(delimiters=["="])
    config.read(REPO / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def check_yaml(block: Block, tmp_path: Path) -> None:
    """Lay a piece of an engagement file over the starter, section by section, and load it."""
    whole = yaml.safe_load(shipped_engagements()["starter"].read_text())
    for key, value in read_yaml(block.text, block.place).items():
        whole[key] = {**whole[key], **value} if isinstance(whole.get(key), dict) else value
    (tmp_path / "piece.yaml").write_text(yaml.safe_dump(whole))
    load_engagement(str(tmp_path / "piece.yaml"))


def check_block(block: Block, tmp_path: Path) -> None:
    """Run a block, or have checked what it says by what would run it."""
    if block.language == "sh":
        for words in commands(block.text):
            check_command(words, tmp_path)
    elif block.language == "yaml":
        check_yaml(block, tmp_path)
    elif block.language == "python":
        exec(compile(block.text, block.place, "exec"), {"__name__": "page"})
    else:
        assert block.language == "text", f"{block.place}: says {block.language!r}; a reader and this test need sh, yaml, python or text"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_code_block_runs_or_is_checked(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in (block for block in blocks(page) if not block.notebook):
        try:
            check_block(block, tmp_path)
        except (BadInput, UsageError, AssertionError) as error:
            raise AssertionError(f"{block.place}: {error}\n{block.text}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_command_in_a_sentence_exists(page):
    code = [part.content for token in MarkdownIt().enable("table").parse(page.read_text()) for part in token.children or [] if part.type == "code_inline"]
    targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.M)
    for text in code:
        name, *words = text.split()
        if name == "make" and words:
            assert words[0] in targets, text
        if name == "finetune-accel" and words and words[0].isalpha():
            assert words[0] in GROUP.commands, text
            options = {option for parameter in GROUP.commands[words[0]].params for option in [*parameter.opts, *parameter.secondary_opts]}
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, text


def test_the_reference_names_every_command_and_every_key(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "docs"))
    from reference import commands_page, settings_page

    commands, settings = commands_page(), settings_page()
    assert [name for name in GROUP.commands if f"## finetune-accel {name}\n" not in commands] == []
    assert [(phase.name, key) for phase in phases() for key in own_fields(phase.settings) if f"| `{key}` |" not in settings.split(f"## {phase.name}\n")[1].split("\n## ")[0]] == []


@pytest.mark.parametrize("language, text", [
    ("sh", "finetune-accel runn home-intents"), ("sh", "finetune-accel run home-intents --sett train.epochs=2"), ("sh", "finetune-accel run home-intents --set train.epoch=2"),
    ("sh", "finetune-accel run home-intents --grid train.epochs=1,many"), ("sh", "finetune-accel serve"), ("sh", "cd x && make nothing"),
    ("sh", 'pip install "finetune-accel[everything]"'), ("sh", "python docs/gone.py"), ("sh", "frobnicate"), ("sh", "papermill nbs/04_train.ipynb out.ipynb -p rate 1"),
    ("sh", "curl http://127.0.0.1:8000/gone"), ("yaml", "train: {epoch: 1}"), ("python", "assert False"), ("", "anything")])
def test_a_wrong_block_is_found(language, text, tmp_path):
    with pytest.raises((BadInput, UsageError, AssertionError, StopIteration)):
        check_block(Block("page.md:1", language, text + "\n"), tmp_path)
