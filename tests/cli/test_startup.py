"""What a command imports: heavy libraries that it does not need would be most of its time."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy", "timm", "open_clip", "transformers")
SCRIPT = f"""
import os, sys
from sphinxkit.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print([name for name in {HEAVY} if name in sys.modules], os.environ["GOMP_SPINCOUNT"], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["memory", "sphinx_micro", "--batch-size", "8"],
        pytest.param(["memory", "sphinx_1k_13b", "--batch-size", "8"], marks=pytest.mark.slow),
        pytest.param(["generate", "-p", "What is it?", "--device", "cpu"], marks=pytest.mark.slow),
    ],
)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[-1] == "[] 1000"
