"""The reference pages that are made from the code whenever the site is built (docs/conf.py): commands, settings, a page for each module.

    python docs/reference.py     # prints commands and settings
"""
from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import typer

import finetune_accel
from finetune_accel.core.cli import app
from finetune_accel.core.engagement import CommonSettings, phases
from finetune_accel.core.settings import model_inside, own_fields


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def commands_page() -> str:
    """Return every command of the command line with its arguments and options, as Markdown."""
    lines = ["# Commands", "", "Exit codes: 0 done, 1 a gate or criterion not met, 2 bad input, 3 a phase failed, 143 stopped when asked to.", ""]
    for name, command in sorted(typer.main.get_command(app).commands.items()):
        lines += [f"## finetune-accel {name}", "", inspect.cleandoc(command.help or ""), "", "| argument or option | default | what it is |", "|---|---|---|"]
        for parameter in command.params:
            shown = parameter.name.upper() if parameter.param_type_name == "argument" else ", ".join([*parameter.opts, *parameter.secondary_opts])
            default = "required" if parameter.required else "" if parameter.default in (None, [], ()) else f"`{parameter.default}`"
            lines.append(f"| `{shown}` | {default} | {_cell(getattr(parameter, 'help', None) or '')} |")
        lines.append("")
    return "\n".join(lines)


def _rows(fields: dict, prefix: str = "") -> list[str]:
    """Return a table row for each field, and for each field of the models inside."""
    rows = []
    for key, field in fields.items():
        kind = re.sub(r"[\w.]+\.", "", str(field.annotation)) if not isinstance(field.annotation, type) else field.annotation.__name__
        must = field.is_required() or (field.json_schema_extra or {}).get("stated")
        default = "must be stated" if must else f"`{_cell(field.get_default(call_default_factory=True))[:60]}`"
        rows.append(f"| `{prefix}{key}` | {_cell(kind)[:120]} | {default} | {_cell(field.description or '')} |")
        if inner := model_inside(field):
            rows += _rows(inner.model_fields, f"{prefix}{key}.")
    return rows


def settings_page() -> str:
    """Return every key of the engagement file, section by section, as Markdown."""
    header = ["| key | type | default | what it is |", "|---|---|---|---|"]
    lines = ["# The engagement file", "", "What may stand in it. `finetune-accel check FILE` refuses anything else, with the nearest valid spelling; "
             "`--set section.key=value` changes one key for one run. A section's keys are the parameters of its notebook.", "",
             "## At the top", "", *header, *_rows(CommonSettings.model_fields), ""]
    for phase in phases():
        lines += [f"## {phase.name}", "", f"Notebook: [{phase.notebook.name}](../../nbs/{phase.notebook.name}). Reads: "
                  + (", ".join(f"`{name}`" for name in phase.reads) or "nothing") + ".", "", *header, *_rows(own_fields(phase.settings)), ""]
    return "\n".join(lines)


def modules() -> dict[str, Any]:
    """Return {name: module} of all modules that a notebook exports, imported."""
    names = [name for _, name, package in pkgutil.walk_packages(finetune_accel.__path__, "finetune_accel.") if not package and not name.endswith("_modidx")]
    return {name.removeprefix("finetune_accel."): importlib.import_module(name) for name in names}


def notebook_of(module: Any) -> str:
    """Return the notebook that a module is exported from, as its path in the repository."""
    exported = re.search(r"File to edit: (?:\.\./)+(nbs/\S+\.ipynb)", Path(module.__file__).read_text())
    return exported.group(1)


def module_page(name: str, module: Any) -> str:
    """Return the page of a module: what its docstrings say, and the way to its notebook."""
    return (f"# {name}\n\nWhy it is as it is, function by function with examples: [{notebook_of(module)}](../../{notebook_of(module)}).\n\n"
            f"```{{eval-rst}}\n.. automodule:: finetune_accel.{name}\n```\n")


def modules_page() -> str:
    """Return the list of all modules: what each is for, its docstrings, its notebook."""
    rows = [f"| [{name}]({name}.md) | {_cell(inspect.getdoc(module).splitlines()[0])} | [notebook](../../{notebook_of(module)}) |" for name, module in modules().items()]
    return "\n".join(["# Modules", "", "Phases first, then `core`: what phases share.", "", "| module | what it is for | explained |", "|---|---|---|",
                      *sorted(rows, key=lambda row: row.startswith("| [core."))]) + "\n"


def write_pages(folder: Path) -> None:
    """Write all pages into a folder."""
    folder.mkdir(exist_ok=True)
    pages = {"commands": commands_page(), "settings": settings_page(), "modules": modules_page(), **{name: module_page(name, module) for name, module in modules().items()}}
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text)


if __name__ == "__main__":
    print(commands_page(), settings_page(), sep="\n")
