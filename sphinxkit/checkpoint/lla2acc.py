"""Released SPHINX directories (LLaMA2-Accessory): their types as recipes, their configuration, their shards.

This module holds the only table of the public implementation's type names. A type is an arrangement (image size, views,
encoders); every width comes from the directory's own files, whatever its size.

Source: LLaMA2-Accessory, accessory/model/LLM/llama_ens*.py (arrangements), accessory/util/tensor_parallel.py (shards).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.registry import suggest

_INPUT_SIZES = {"convnext_xxlarge": 256, "dinov2_vit_giant_patch14": 224}  # the builders' defaults
_PROJECTOR = {"type": "linear", "norm": "layer"}


def _full(image_size: int, rows: int = 1, tile_pool: int = 1) -> dict[str, Any]:
    mixer: dict[str, Any] = {"type": "channel", "grid": [16, 16]}
    if tile_pool != 1:
        mixer["tile_pool"] = tile_pool
    return {
        "image_size": image_size,
        **_views(rows, 224),
        "branches": [
            {"encoders": ["blip2_qformer"], "projector": _PROJECTOR},
            {
                "encoders": ["clip_vit_large_patch14", "convnext_xxlarge", "dinov2_vit_giant_patch14"],
                "mixer": mixer,
                "projector": _PROJECTOR,
            },
        ],
        "mixer": "sequence",
    }


def _light(image_size: int, rows: int = 1) -> dict[str, Any]:
    convnext: dict[str, Any] = {"type": "convnext_xxlarge", "input_size": 512}
    if rows == 1:
        convnext["tile_size"] = 512  # the single view passes the half-precision resize although its size stays
    return {
        "image_size": image_size,
        **_views(rows, 512),
        "branches": [
            {
                "encoders": [convnext, {"type": "dinov2_vit_giant_patch14", "tile_size": 224}],
                "mixer": {"type": "channel", "grid": [16, 16]},
                "projector": _PROJECTOR,
            }
        ],
        "mixer": "sequence",
    }


def _views(rows: int, tile_size: int) -> dict[str, Any]:
    """The tiler of several views; a single view needs none."""
    if rows == 1:
        return {}
    return {"tiler": {"type": "grid", "rows": rows, "cols": rows, "tile_size": tile_size, "thumbnail": True}}


LLAMA_TYPES: dict[str, dict[str, Any] | None] = {
    "llama": None,
    "llama_ens": _full(224),
    "llama_ens5": _full(448, 2),
    "llama_ens10": _full(672, 3),
    "llama_ens5p2": _full(448, 2, tile_pool=2),
    "llama_ens_light": _light(512),
    "llama_ens5_light": _light(1024, 2),
}
"""The ``llama_type`` of ``meta.json`` -> a recipe's ``vision`` part (None: text only)."""


def vision_of_type(llama_type: str, where: str) -> dict[str, Any] | None:
    """A copy of the ``vision`` part that a type name stands for.

    Args:
        llama_type: As in ``meta.json``.
        where: The file that says so, for messages.
    Raises:
        CheckpointError: A mixture-of-experts type (not supported yet), or an unknown name.
    """
    if "mixtral" in llama_type or "moe" in llama_type:
        raise CheckpointError(
            f"{where}: llama_type {llama_type!r} is a mixture-of-experts model, which is not supported yet"
        )
    if llama_type not in LLAMA_TYPES:
        raise CheckpointError(
            f"{where}: unknown llama_type {llama_type!r}{suggest(llama_type, LLAMA_TYPES)} "
            f"Known: {', '.join(LLAMA_TYPES)}"
        )
    return copy.deepcopy(LLAMA_TYPES[llama_type])


def _signature(vision: Mapping[str, Any] | None) -> Any:
    """What tells one arrangement from another, with the defaults filled in."""
    if vision is None:
        return None
    size = vision["image_size"]
    tiler = _options_of(vision.get("tiler"))
    single = {"type": "grid", "rows": 1, "cols": 1, "tile_size": size, "thumbnail": False}
    defaults = {"rows": 2, "cols": 2, "tile_size": 224, "thumbnail": True} if tiler else single
    views = {key: tiler.get(key, default) for key, default in {"type": "grid", **defaults}.items()}
    branches = []
    for branch in vision["branches"]:
        mixer, projector = _options_of(branch.get("mixer")), _options_of(branch["projector"])
        encoders = []
        for entry in branch["encoders"]:
            options = _options_of(entry)
            own_size = options.get("input_size", _INPUT_SIZES.get(options["type"]))
            encoders.append((options["type"], own_size, options.get("tile_size")))
        grid = list(mixer.get("grid") or [])
        branches.append([encoders, grid, mixer.get("tile_pool", 1), projector["type"], projector.get("norm", "layer")])
    return size, views, branches


def _options_of(entry: Any) -> dict[str, Any]:
    """A component's ``{type: name, ...}`` whichever way it is written."""
    if entry is None:
        return {}
    return {"type": entry} if isinstance(entry, str) else dict(entry)


def type_of_vision(vision: Mapping[str, Any] | None) -> str:
    """The type name under which the public implementation knows an arrangement; encoders' widths do not matter.

    Args:
        vision: A recipe's ``vision`` part; None for text only.
    Raises:
        CheckpointError: It knows none.
    """
    wanted = _signature(vision)
    for name, known in LLAMA_TYPES.items():
        if _signature(known) == wanted:
            return name
    raise CheckpointError(
        "the released layout has no type for this recipe's vision part (image size, tiles and encoders must be those "
        f"of one of {', '.join(LLAMA_TYPES)}); save in sphinxkit's own format"
    )


# ---- files -----------------------------------------------------------------------------------------------------------

SHARD_NAME = "consolidated.{:02d}-of-{:02d}.{}.pth"
_SHARD = re.compile(r"consolidated\.(\d+)-of-(\d+)\.([\w-]+)\.pth")


def find_shards(folder: Path, kind: str = "model") -> list[Path]:
    """The ``consolidated.NN-of-MM.<kind>.pth`` files of a folder, in order; empty if there are none.

    Args:
        folder: Where to look.
        kind: "model", or "model-diff" for differences to a base model.
    Raises:
        CheckpointError: Shards are missing, or files of several sharded checkpoints lie together.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _SHARD.fullmatch(path.name)
        if match and match.group(3) == kind:
            found.setdefault(int(match.group(2)), {})[int(match.group(1))] = path
    if not found:
        return []
    if len(found) > 1:
        raise CheckpointError(f"{folder}: holds shards of checkpoints in {sorted(found)} parts; keep one of them")
    ((count, shards),) = found.items()
    missing = [SHARD_NAME.format(rank, count, kind) for rank in range(count) if rank not in shards]
    surplus = [path.name for rank, path in shards.items() if rank >= count]
    raise_errors(f"{folder}: shards are missing; fetch them", missing)
    raise_errors(f"{folder}: shard numbers beyond their count", surplus)
    return [shards[rank] for rank in range(count)]


def guess_vision(names: Sequence[str]) -> dict[str, Any] | None:
    """An arrangement with the encoders that the released names speak of; None if they speak of none.

    Only the order of branches and encoders is meant: the number of views cannot be seen in the tensors.

    Args:
        names: Tensor names of a released file.
    """
    if any(name.startswith("llma.qformer.") for name in names):
        return vision_of_type("llama_ens", "")
    if any(name.startswith("llma.visual_proj.") for name in names):
        return vision_of_type("llama_ens_light", "")
    return None
