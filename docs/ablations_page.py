"""Writes docs/ablations.md and its plots from docs/ablations/*.json; copies named folders' results there first."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sphinxkit.nano.ablations import read_results
from sphinxkit.nano.ablations.report import write_page

DOCS = Path(__file__).parent


def main() -> None:
    (DOCS / "ablations").mkdir(exist_ok=True)
    for folder in sys.argv[1:]:
        for path in sorted(Path(folder).glob("*.json")):
            shutil.copy(path, DOCS / "ablations" / path.name)
    write_page(read_results(DOCS / "ablations"), DOCS / "ablations.md", DOCS / "images")


if __name__ == "__main__":
    main()
