from __future__ import annotations

import pytest

from sphinxkit import formatters
from sphinxkit.errors import RegistryError


def test_names() -> None:
    assert formatters.names() == ["chatml", "jinja", "llama3", "mistral", "sphinx_v1", "vicuna"]
    with pytest.raises(RegistryError, match="unknown conversation 'sphinx_v2'; did you mean 'sphinx_v1'"):
        formatters.create("sphinx_v2")
