"""Settings of the documentation site: ``python -m sphinx -W docs docs/_build/html``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import api_pages  # noqa: E402
import cli_page  # noqa: E402
import recipe_keys  # noqa: E402
from sphinx.search.en import SearchEnglish  # noqa: E402

import sphinxkit  # noqa: E402

project = "sphinxkit"
author = "the sphinxkit authors"
copyright = "2026, the sphinxkit authors"
version = release = sphinxkit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "howto/*.py"]
html_theme = "furo"
html_title = f"sphinxkit {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(DOCS / "_static" / "scorer.js")
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"show-inheritance": True}
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # "Attributes" are fields: as properties they are documented a second time
napoleon_custom_sections = [("Shape", "params_style"), "Source"]
suppress_warnings = ["config.cache", "ref.python"]  # ref.python: two parts have a class of one name


class Search(SearchEnglish):
    """English in which the words of a question count for nothing: "how do I load CLIP" finds what "load CLIP" does."""

    stopwords = SearchEnglish.stopwords | {"can", "do", "does", "how", "my", "should", "what", "when", "where", "which"}


SECTION = re.compile(r"^(Shape|Source|Attributes|Args|Returns|Raises|Yields):(?: (.*))?$")


def _escape(line: str, pattern: str) -> str:
    """A line with what matches escaped, literals (between double backticks) left alone."""
    parts = line.split("``")
    parts[::2] = [re.sub(pattern, r"\\\1", part) for part in parts[::2]]
    return "``".join(parts)


def _house_sections(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make napoleon sections of the one-line forms that the docstrings use, and shapes safe for reStructuredText."""
    result: list[str] = []
    section = ""
    for line in lines:
        found = SECTION.match(line)
        if found:
            section = found.group(1)
            if result and result[-1].strip():
                result.append("")
            result.append(f"{section}:")
            if found.group(2):
                result.append(f"    {found.group(2)}")
            continue
        if line.strip() and not line.startswith(" "):
            section = ""
        if section == "Source" and line.strip():
            line = "    " + line.strip()
        if section == "Shape":
            line = _escape(line, r"(?<!\\)([*_|])")
        result.append(_escape(line, r"(?<=\S )(\*)(?= )"))
    if what in ("property", "attribute", "data") and result:
        result.insert(0, "")  # or napoleon takes what stands before a colon for the type
    lines[:] = result


def setup(app: Any) -> None:
    """Write the generated pages, then read the docstrings our way before napoleon does."""
    api_pages.write(DOCS / "api")
    cli_page.write(DOCS / "api" / "command_line.md")
    recipe_keys.write(DOCS / "api" / "recipe_keys.md")
    app.add_search_language(Search)
    app.connect("autodoc-process-docstring", _house_sections, priority=400)
