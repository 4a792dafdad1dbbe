"""How Sphinx makes the documentation a site: `make docs`, then open build/docs/docs/index.html.

The pages are plain Markdown and read as well in the repository; links between them and to files of the repository hold
in both, so the source is the whole repository. The first page's list of links is the table of contents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
from click.testing import CliRunner
from sphinx.application import Sphinx

from trace_sdk import __version__
from trace_sdk.cli import main

project = "trace-sdk"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**.md",
    "benchmarks/**.md",
    "examples/**.md",
    "recipes/**.md",
    "trace_sdk/engines/bundled/*.md",
]
exclude_patterns = ["**/node_modules"]
suppress_warnings = ["toc.not_included"]  # model cards and the like are reached by links

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

maximum_signature_line_length = 88
default_role = "code"
autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"NDArray": "NDArray"}
napoleon_attr_annotations = False  # docstrings give dtypes and shapes

html_theme = "furo"
html_title = "trace-sdk"
html_show_copyright = False


def _complete(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == root_doc:
        for caption, section in re.findall(r"^## (.+)\n([^#]+)", source[0], re.MULTILINE):
            pages = "\n".join(re.findall(r"\]\((.+?)\.md\)", section))
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"
    if docname == "docs/commands":
        source[0] += "".join(f"\n## {name}\n\n```text\n{text}```\n" for name, text in _help_texts())


def _help_texts() -> Iterator[tuple[str, str]]:
    for name in main.list_commands(click.Context(main)):
        said = CliRunner().invoke(main, [name, "--help"], prog_name="trace-sdk", terminal_width=88)
        yield name, said.output


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _complete)
