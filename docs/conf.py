"""The documentation site: `make docs` builds it from the notebooks, these pages and the docstrings, with warnings as errors, into _docs/.

Sources are read from the repository's root, so that a link from README, a notebook or a page means the same here and on a code host.
"""
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from reference import write_pages

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")

project = settings["DEFAULT"]["title"]
author = settings["DEFAULT"]["author"]
copyright = settings["DEFAULT"]["copyright"]
release = settings["DEFAULT"]["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = ["docs/**", "nbs/[0-9]*.ipynb", "nbs/core/*.ipynb", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/*.md"]

nb_execution_mode = "off"  # `make test` runs their examples, `finetune-accel run` the whole; a page is what is committed
myst_heading_anchors = 3
default_role = "code"  # docstrings mark code by single backticks
autodoc_default_options = {"members": True, "show-inheritance": True}
# Two modules may have a class of the same name; and the page of modules leads to 340 others, which would be too many for a menu.
suppress_warnings = ["ref.python", "toc.not_included"]

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_use_index = False  # there is the search
html_show_sphinx = False


def plain(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text: outside of backticks a star or bar is itself."""
    for number, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
        lines[number] = "`".join(parts)


def without_directives(app, page: str, source: list[str]) -> None:
    """Leave out what notebooks tell nbdev (`#| export`), and cells that hold nothing else."""
    if page.startswith("nbs/"):
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            cell["source"] = [line for line in cell["source"] if not line.startswith("#|")]
        notebook["cells"] = [cell for cell in notebook["cells"] if cell["source"]]
        source[0] = json.dumps(notebook).replace("(index.ipynb)", "(../README.md)")  # the same text, with links from the root


def scrolled_by_keyboard(app, page, template, context: dict, doctree) -> None:
    """What is wider than its place scrolls by itself, and so must be reached by the keyboard."""
    context["body"] = context.get("body", "").replace("<pre>", '<pre tabindex="0">').replace('<div class="table-wrapper', '<div tabindex="0" class="table-wrapper')


def setup(app) -> None:
    """Write the pages that are made from the code, and read docstrings as they are meant.

    All modules are imported by that: autodoc itself would import them with TYPE_CHECKING on, which MLflow and FastAPI do not survive.
    """
    write_pages(Path(__file__).parent / "api")
    app.connect("source-read", without_directives)
    app.connect("autodoc-process-docstring", plain)
    app.connect("html-page-context", scrolled_by_keyboard)
