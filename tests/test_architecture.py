"""Who may import whom, and what an import may cost.

Counted as imports of a module: every ``import`` statement in its syntax tree, those inside functions and under
``if TYPE_CHECKING`` included.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sphinxkit

PACKAGE = Path(sphinxkit.__file__).parent

# The lowest layer first; a module imports its own family and lower layers. In layer 0 modules may use each other.
GROUND = "errors version registry features geometry pixels tensor_source atomic to_device hub tensor_files"
LAYERS = [
    set(GROUND.split()),
    {"encoders", "mixers", "tilers", "projectors", "tokenizer", "llama", "interpolation", "formatters", "checkpoint"},
    {"vision", "acceleration", "generation", "data"},
    {"sphinx_model"},
    {"recipe", "batch_inference"},
    {"evaluation"},
    {"training"},
    {"integrations", "nano"},
    {"cli"},
]
LAYER_OF = {family: layer for layer, families in enumerate(LAYERS) for family in families}

# Imported only inside the functions that need them; ABOUT names the modules whose classes derive from a package's.
LAZY = {
    *("timm", "open_clip", "xformers", "pydantic", "yaml", "transformers", "torchvision", "matplotlib", "torchao"),
    *("gradio", "vllm", "pyarrow", "webdataset", "peft", "trl", "fastapi", "tokenizers", "huggingface_hub"),
}
ABOUT = {
    "pydantic": {"recipe/schema.py"},
    "transformers": {f"integrations/transformers/{name}.py" for name in ("config", "model", "processor")},
    "vllm": {"integrations/vllm_model.py"},
}

PATHS = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__main__.py"
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in PATHS.items()}
PACKAGES = {module for module, path in PATHS.items() if path.name == "__init__.py"}


def names_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Modules that a statement imports; names of sphinxkit are resolved to modules."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    parts = [f"{node.module}.{alias.name}" for alias in node.names]
    return [part if part in PATHS else str(node.module) for part in parts]


def imported(tree: ast.AST) -> set[str]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name for node in nodes for name in names_of(node)}


IMPORTS = {module: (imported(tree) & PATHS.keys()) - {module} for module, tree in TREES.items()}


def family_of(module: str) -> str:
    return module.split(".")[1]


def test_every_folder_has_a_layer() -> None:
    families = {family_of(module) for module in PATHS if module != "sphinxkit"}
    assert not families - LAYER_OF.keys()


def test_no_import_circles() -> None:
    try:
        list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_imports_go_down() -> None:
    breaches = []
    for module, targets in IMPORTS.items():
        if module == "sphinxkit":
            continue
        own = family_of(module)
        for target in targets:
            if target == "sphinxkit":
                breaches += [] if own == "cli" else [f"{module} imports sphinxkit itself"]
            elif family_of(target) != own and LAYER_OF[family_of(target)] >= max(LAYER_OF[own], 1):
                breaches.append(f"{module} imports {target}")
    assert not breaches


def test_nothing_imports_the_face_of_its_own_family() -> None:
    breaches = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets & PACKAGES
        if target != "sphinxkit" and module.startswith(f"{target}.")
    ]
    assert not breaches


@pytest.mark.parametrize("family", ["encoders", "mixers", "tilers", "llama", "interpolation", "formatters", "vision"])
def test_the_face_of_a_family_only_hands_names_on(family: str) -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    others = [type(node).__name__ for node in TREES[f"sphinxkit.{family}"].body if not isinstance(node, allowed)]
    assert not others


def test_heavy_imports_stay_inside_functions() -> None:
    breaches = []
    for module, tree in TREES.items():
        relative = str(PATHS[module].relative_to(PACKAGE))
        for node in tree.body:
            roots = (
                {name.split(".")[0] for name in imported(node)}
                if isinstance(node, ast.Import | ast.ImportFrom)
                else set()
            )
            breaches += [f"{module}: {root}" for root in roots & LAZY if relative not in ABOUT.get(root, set())]
    assert not breaches


@pytest.mark.parametrize(
    ("statements", "forbidden"),
    [
        ("import sphinxkit; dir(sphinxkit)", {"torch", "pydantic", "yaml", "timm", "open_clip", "einops"}),
        ("import sphinxkit.registry", {"torch", "pydantic", "yaml"}),
        ("import sphinxkit.nano, sphinxkit.cli", {"torch", "pydantic", "yaml", "timm", "open_clip"}),
        (
            "from sphinxkit.mixers import ChannelMixer\n"
            "from sphinxkit.tilers import GridTiler\n"
            "from sphinxkit.encoders import Encoder\n"
            "from sphinxkit.llama import LlamaModel\n"
            "from sphinxkit.interpolation import lerp\n"
            "from sphinxkit.checkpoint import open\n"
            "from sphinxkit.formatters import tasks\n"
            "from sphinxkit.sphinx_model import SphinxModel",
            LAZY,
        ),
    ],
    ids=["sphinxkit", "registry", "nano, cli", "families"],
)
def test_import_cost(statements: str, forbidden: set[str]) -> None:
    code = f"import sys\n{statements}\nprint(','.join(name for name in {sorted(forbidden)!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_public_names_are_listed_and_resolve() -> None:
    code = "import sphinxkit as s\nfor name in dir(s): getattr(s, name)\nprint(set(s.__all__) <= set(dir(s)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"
