"""Who may import whom, and what an import may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sphinxkit

PACKAGE = Path(sphinxkit.__file__).parent

# The lowest layer first; a module imports its own family and lower layers (design, section "Who may import whom").
LAYERS = [
    {
        "errors",
        "version",
        "registry",
        "features",
        "geometry",
        "pixels",
        "tensor_source",
        "atomic",
        "to_device",
        "hub",
        "tensor_files",
    },
    {
        "encoders",
        "mixers",
        "tilers",
        "projectors",
        "tokenizer",
        "llama",
        "interpolation",
        "formatters",
        "checkpoint",
    },
    {"vision", "acceleration", "generation", "data"},
    {"sphinx_model"},
    {"recipe", "batch_inference"},
    {"evaluation"},
    {"training"},
    {"integrations", "nano"},
    {"cli"},
    {"__main__"},
]
LAYER_OF = {family: layer for layer, families in enumerate(LAYERS) for family in families}

# Imported only inside the functions that need them; pydantic belongs to the one module that is about schemas.
LAZY = {
    *("timm", "open_clip", "xformers", "pydantic", "yaml", "transformers", "torchvision", "matplotlib", "torchao"),
    "gradio",
}
ABOUT = {"pydantic": {"recipe/schema.py"}}

MODULES = sorted(PACKAGE.rglob("*.py"))


def family_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def runtime_imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Every import that runs: those under ``if TYPE_CHECKING`` do not."""
    found: list[ast.Import | ast.ImportFrom] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def names_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if node.module == "sphinxkit":
        return [f"sphinxkit.{alias.name}" for alias in node.names]
    return [node.module or ""]


def test_every_module_has_a_layer() -> None:
    unknown = {family_of(path) for path in MODULES} - set(LAYER_OF) - {"__init__"}
    assert not unknown


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = family_of(path)
    if own == "__init__":
        return
    breaches = []
    for node in runtime_imports(ast.parse(path.read_text())):
        for name in names_of(node):
            parts = name.split(".")
            if parts[0] != "sphinxkit" or len(parts) < 2 or parts[1] in (own, "__version__"):
                continue
            if LAYER_OF[parts[1]] >= max(LAYER_OF[own], 1):  # the modules of layer 0 may use each other
                breaches.append(f"line {node.lineno}: {own} imports {name}")
    assert not breaches


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_imports_stay_inside_functions(path: Path) -> None:
    tree = ast.parse(path.read_text())
    relative = str(path.relative_to(PACKAGE))
    breaches = []
    for node in tree.body:
        for child in [node] if isinstance(node, ast.Import | ast.ImportFrom) else []:
            for name in names_of(child):
                root = name.split(".")[0]
                if root in LAZY and relative not in ABOUT.get(root, set()):
                    breaches.append(f"line {child.lineno}: {name}")
    assert not breaches


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import sphinxkit", {"torch", "pydantic", "yaml", "timm", "open_clip", "einops"}),
        ("import sphinxkit.registry", {"torch", "pydantic", "yaml"}),
        ("from sphinxkit.mixers import ChannelMixer", LAZY),
        ("from sphinxkit.tilers import GridTiler", LAZY),
        ("from sphinxkit.encoders import Encoder", LAZY),
        ("from sphinxkit.llama import LlamaModel", LAZY),
        ("from sphinxkit.interpolation import lerp", LAZY),
        ("from sphinxkit.checkpoint import open", LAZY),
        ("from sphinxkit.formatters import tasks", LAZY),
        ("from sphinxkit.sphinx_model import SphinxModel", LAZY),
        ("import sphinxkit.nano", {"torch", "pydantic", "yaml", "timm", "open_clip"}),
        ("import sphinxkit.cli", {"torch", "pydantic", "yaml", "timm", "open_clip"}),
    ],
)
def test_import_cost(statement: str, forbidden: set[str]) -> None:
    code = f"import sys\n{statement}\nprint(','.join(name for name in {sorted(forbidden)!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
