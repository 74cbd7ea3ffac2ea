"""Every page of the site is listed once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)
MADE = {"api/index", "api/recipe_keys", "api/command_line"}  # written when the site is built
PAGES = {
    path.relative_to(DOCS).with_suffix("").as_posix()
    for path in DOCS.rglob("*.md")
    if not {"api", "_build"} & set(path.relative_to(DOCS).parts)
} | MADE


def listed(page: str) -> list[str]:
    """The pages in the toctrees of a page."""
    if page in MADE:
        return []
    folder = (DOCS / page).parent
    entries = [line for block in TOCTREE.findall((DOCS / f"{page}.md").read_text()) for line in block.splitlines()]
    found = []
    for entry in entries:
        if not entry or entry.startswith(":"):
            continue
        if "*" in entry:
            found += [path.relative_to(DOCS).with_suffix("").as_posix() for path in folder.glob(f"{entry}.md")]
        else:
            found.append((folder / entry).relative_to(DOCS).as_posix())
    return found


def test_every_page_stands_in_exactly_one_toctree() -> None:
    counts = Counter(entry for page in PAGES for entry in listed(page))
    assert set(counts) == PAGES - {"index"}
    assert [page for page, count in counts.items() if count > 1] == []
