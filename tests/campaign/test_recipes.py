"""Recipes that are damaged or hostile, through ``check``: an error with a name, at little cost."""

from __future__ import annotations

import copy
import random
import resource
import time
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

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
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**5, 10**9, 10**18, 10**40, -(10**40), 0.5, -0.0, 1e308, float("inf")),
    *(
        float("nan"),
        "",
        " ",
        "x",
        "1",
        "os:system",
        "os.path:join",
        ":",
        "a:b:c",
        "llama",
        "grid",
        "from_config",
        "\ud800",
    ),
    *("\x00", "x" * 5000, "é" * 10, "../../etc/passwd", "/dev/zero", "hf://a/b", "hf://", "nano", "~", "2020-99-99"),
    *(
        [],
        [[]],
        {},
        {"type": "llama"},
        {"type": None},
        {"type": []},
        {1: 2},
        {None: None},
        {"a": {"b": {}}},
        [1, 2],
        [1e9, 1e9],
    ),
    *([0] * 3000, {str(n): n for n in range(2000)}, "sphinx_13b", b"bytes", {"type": "os:system", "command": "true"}),
)
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


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        found += nodes(each, (*path, key))
    return found


def damaged(document: Any, rng: random.Random) -> Any:
    """A document with up to three changes to its keys and values."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(nodes(document)[1:] or [()])
        if not path:
            return rng.choice(ODD)
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        key, kind = path[-1], rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = [holder[key]] * rng.choice((1, 2, 1000))
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice((f"{key}s", "", 1, None, "type", "weights", str(key).upper()))] = holder.pop(key)
        elif kind == 3 and isinstance(holder[key], int | float):
            holder[key] *= rng.choice((-1, 0, 2, 1000, 1e9, 10**9, 10**30, 0.5))
        else:
            holder[key] = rng.choice(ODD)
    return document


def damaged_text(text: str, rng: random.Random) -> bytes:
    """A text with bytes changed, cut out, doubled or put in."""
    if rng.random() < 0.5:
        lines = text.splitlines()
        place = rng.randrange(len(lines))
        head, _, _ = lines[place].partition(":")
        lines[place] = f"{head}: {rng.choice(TEXTS)}" if rng.random() < 0.7 else rng.choice(TEXTS)
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    data = bytearray(text.encode())
    for _ in range(rng.choice((1, 2, 8))):
        place = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 40)]
        elif kind == 2:
            data[place:place] = data[place : place + rng.randrange(1, 40)]
        else:
            data[place] = rng.randrange(256)
        if not data:
            break
    return bytes(data)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
                text = yaml.safe_dump(damaged(sources[number], rng), sort_keys=False, allow_unicode=True)
                data = text.encode("utf-8", "surrogatepass")
        path.write_bytes(data)
        before = peak()
        said, seconds = checked(path)
        counts[said] += 1
        slowest = max(slowest, seconds)
        if said.startswith("FAULT"):
            faults.setdefault(said, data)
        if seconds > allowed:
            faults.setdefault(f"{said}, {seconds:.1f} s", data)
        if peak() - before > MAX_BYTES:
            faults.setdefault(f"{said}, {peak() - before} bytes more", data)
    trial.say(counts, f"recipes, the slowest {slowest:.2f} s")
    assert not faults, trial.shown(faults)
    assert counts["fine"]
    assert counts["RecipeError"]
