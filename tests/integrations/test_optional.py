from __future__ import annotations

import sys

import pytest

from sphinxkit.errors import SphinxkitError
from sphinxkit.integrations import lmms_eval, vllm
from sphinxkit.integrations.optional import require
from sphinxkit.integrations.transformers import register


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SphinxkitError, match=r'no_such_module cannot be imported .*pip install "sphinxkit\[some\]"'):
        require("no_such_module", "some")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'transformers cannot be imported .*pip install "sphinxkit\[transformers\]"'):
        register()
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ImportError, match=r'lmms_eval.* cannot be imported .*pip install "sphinxkit\[lmms_eval\]"'):
        lmms_eval.manifest()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'vllm cannot be imported .*pip install "sphinxkit\[vllm\]"'):
        vllm.register()


def test_an_old_package_is_refused() -> None:
    numpy = require("numpy", "some", oldest="1.9")
    assert numpy.__name__ == "numpy"
    assert require("numpy", "some", oldest=".".join(numpy.__version__.split(".")[:2])) is numpy
    with pytest.raises(SphinxkitError, match=r"numpy .* is too old, 99.1 or later is needed; install it: pip install"):
        require("numpy", "some", oldest="99.1")
