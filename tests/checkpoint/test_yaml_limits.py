"""Small YAML files that unfold to gigabytes are refused before anything is made of them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sphinxkit import checkpoint
from sphinxkit.checkpoint.yaml_limits import MAX_CHARACTERS, MAX_DEPTH, MAX_NODES, check_yaml
from sphinxkit.errors import CheckpointError, RecipeError
from sphinxkit.recipe import Recipe


def aliases(levels: int) -> str:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    for level in range(levels):
        here, below = chr(98 + level), chr(97 + level)
        lines.append(f"{here}: &{here} [{','.join([f'*{below}'] * 10)}]")
    return "\n".join(lines) + "\n"


BOMBS = {
    "aliases": (aliases(9), "more than 50000 entries"),
    "merge keys": ("a: &a {x: 1}\nb: &b {y: [*a, *a]}\n" + "c: {<<: *b}\n" * 3, None),
    "itself": ("a: &a [*a]\n", "stands inside of itself"),
    "depth": ("[" * 5000 + "]" * 5000, f"nested more than {MAX_DEPTH} deep"),
    "length": ("#" * (MAX_CHARACTERS + 1), "longer than"),
    "date": ("kind: 2020-99-99\n", None),
    "no timestamp": ("kind: !!timestamp 9\n", "is not YAML"),
    "number": (f"kind: {'9' * 5000}\n", None),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_recipe_that_unfolds_is_refused_at_once(tmp_path: Path, name: str) -> None:
    text, message = BOMBS[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    begin = time.process_time()
    with pytest.raises(RecipeError, match=message or r"recipe\.yaml"):
        Recipe.from_yaml(path)
    assert time.process_time() - begin < 1.0


def test_few_aliases_are_read() -> None:
    check_yaml(aliases(3))
    check_yaml("a: &x [1]\nb: *x\n---\nc: 1\n")
    with pytest.raises(ValueError, match=f"line 5: .*{MAX_NODES}"):
        check_yaml(aliases(4))


def test_a_checkpoints_recipe_is_counted_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(aliases(9))
    with pytest.raises(CheckpointError, match="entries"):
        checkpoint.formats.native._read_recipe(tmp_path / "recipe.yaml")
