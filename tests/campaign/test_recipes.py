"""Recipes that are damaged or hostile, through ``check``: an error with a name, at little cost."""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

import sphinxkit
from sphinxkit.recipe.recipe import shipped_recipes
from tests.campaign import trial

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(7200)]
NUM_RECIPES = 5000
SEED = 2311
MAX_SECONDS = 1.0  # of processor time above the undamaged recipe's
MAX_BYTES = 200 * 10**6
TEXTS = (
    *(
        "&a [*a]",
        "*b",
        "!!python/object/apply:os.system [true]",
        "!!binary x",
        "2020-99-99",
        "? [1]",
        "<<: *x",
        "{{{",
        "[" * 60,
    ),
    *(
        "&a {<<: *a}",
        "\t",
        "%",
        "---",
        "...",
        "!!set {a}",
        "!!omap [a: 1]",
        "0x",
        "1_000",
        "0b2",
        "1:99:99",
        "!!int x",
        ".inf",
    ),
    *(
        "!!timestamp 9",
        "<<: [1]",
        "<<: {a: 1}",
        "!!float x",
        "!!bool x",
        "!!null x",
        "!!pairs [a]",
        "!foo bar",
        "\ufeff",
        "@",
        "`",
    ),
)


def damaged_text(text: str, rng: random.Random) -> bytes:
    """A text with bytes changed, cut out, doubled or put in."""
    if rng.random() < 0.5:
        lines = text.splitlines()
        place = rng.randrange(len(lines))
        head, _, _ = lines[place].partition(":")
        lines[place] = f"{head}: {rng.choice(TEXTS)}" if rng.random() < 0.7 else rng.choice(TEXTS)
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    return trial.damaged_bytes(text.encode(), rng)


def test_damaged_recipes(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    shipped = [yaml.safe_load(path.read_text()) for path in shipped_recipes().values()]
    nano = yaml.safe_load((sphinxkit.nano.path() / "recipe.yaml").read_text())
    sources = [*[nano] * 40, *shipped, *[trial.TRAIN] * 5]
    texts = [yaml.safe_dump(document, sort_keys=False) for document in sources]
    usual: dict[int, float] = {}
    path = tmp_path / "recipe.yaml"

    def cost(number: int) -> float:
        if number not in usual:
            path.write_text(texts[number])
            usual[number] = checked(path)[1]
        return usual[number]

    def checked(path: Path) -> tuple[str, float]:
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            said = trial.outcome(lambda: sphinxkit.check(path))
        return said, time.process_time() - started

    counts: Counter[str] = Counter()
    faults: dict[str, bytes] = {}
    slowest = 0.0
    for _ in range(NUM_RECIPES):
        number = rng.randrange(len(sources))
        allowed = cost(number) + MAX_SECONDS
        data = damaged_text(texts[number], rng)
        if rng.random() < 0.6:
            with suppress(yaml.YAMLError, TypeError):  # keys of a kind that YAML does not write
                text = yaml.safe_dump(trial.damaged(sources[number], rng), sort_keys=False, allow_unicode=True)
                data = text.encode("utf-8", "surrogatepass")
        path.write_bytes(data)
        before = trial.peak()
        said, seconds = checked(path)
        counts[said] += 1
        slowest = max(slowest, seconds)
        if said.startswith("FAULT"):
            faults.setdefault(said, data)
        if seconds > allowed:
            faults.setdefault(f"{said}, {seconds:.1f} s", data)
        if trial.peak() - before > MAX_BYTES:
            faults.setdefault(f"{said}, {trial.peak() - before} bytes more", data)
    trial.say(counts, f"recipes, the slowest {slowest:.2f} s")
    assert not faults, trial.shown(faults)
    assert counts["fine"]
    assert counts["RecipeError"]
