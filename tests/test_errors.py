from __future__ import annotations

import pytest

from sphinxkit.errors import CheckpointError, raise_errors


def test_long_lists_of_errors_are_cut() -> None:
    raise_errors("nothing", [])
    with pytest.raises(CheckpointError, match=r"(?s)wrong:\n  - 0.*  - 49\n  \.\.\. and 3 more$"):
        raise_errors("wrong", [str(index) for index in range(53)])
