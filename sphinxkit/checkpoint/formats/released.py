"""The layout of the released SPHINX checkpoints (LLaMA2-Accessory).

- ``consolidated.NN-of-MM.model.pth``: tensor-parallel shards of Meta's names behind ``llma.``, the encoders whole.
- ``meta.json``: the type's name, which stands for an arrangement: image size, views, encoders.
- ``config.json``: the language model's numbers in Meta's words.
- ``encoders.json`` (optional): the encoders' widths, depths and activations where they are not the full-size ones.

Source: LLaMA2-Accessory, accessory/model/LLM/llama_ens*.py (arrangements, names), accessory/util/tensor_parallel.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.accessory_adapters import SUFFIX, check_updates, take_adapters
from sphinxkit.checkpoint.formats.base import Format, OpenOptions, register
from sphinxkit.checkpoint.formats.meta import (
    BALANCE_WEIGHTS,
    PARAMS_NAME,
    has_experts,
    llama_rules,
    meta_from_numbers,
    read_llm,
    unpack_experts,
)
from sphinxkit.checkpoint.formats.released_encoders import (
    encoder_options,
    encoders_json,
    options_of,
    with_encoder_options,
)
from sphinxkit.checkpoint.keymap import KeyMap, NameRule
from sphinxkit.checkpoint.llm_config import Fitting, embedding_rows, model_recipe, refuse_unsupported
from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.sharding import merge_shards
from sphinxkit.checkpoint.verify import torch_files_checks
from sphinxkit.checkpoint.writing import TensorInput, Texts, WriteOptions, json_text, pieces_of, write_torch_shards
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.registry import suggest
from sphinxkit.tensor_files.files import read_json
from sphinxkit.tensor_files.torch_zip import read_torch_file

ENCODER_PREFIXES: dict[str, str] = {
    "blip2_qformer": "llma.qformer.",
    "clip_vit_large_patch14": "llma.clip.visual.",
    "convnext_xxlarge": "llma.openclip_convnext_xxl.",
    "dinov2_vit_giant_patch14": "llma.dinov2_vitg14.",
}
"""Where the released files keep each encoder."""

# the packed SwiGLU of the DINOv2 repository under timm's names, in every block
_BLOCK_RENAMES = {"dinov2_vit_giant_patch14": {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}}
_UNUSED: dict[str, list[str]] = {
    # CLIP's text side and both output projections; everything of llma.clip that is not its image trunk
    "clip_vit_large_patch14": [r"llma\.clip\.(?!visual\.).+", r"llma\.clip\.visual\.proj"],
    "dinov2_vit_giant_patch14": [r"llma\.dinov2_vitg14\.mask_token"],
}


def sphinx_key_map(vision: Mapping[str, Any] | None) -> KeyMap:
    """Names of the released SPHINX files.

    Args:
        vision: The recipe's ``vision`` part (only ``branches[].encoders`` matters here); None for a text-only model.
    """
    rules = llama_rules("llma.")
    unused: list[str] = []
    if vision is not None:
        rules += [NameRule("llma.start_img", "vision.start_token"), NameRule("llma.end_img", "vision.end_token")]
        for index, branch in enumerate(vision["branches"]):
            ours = f"vision.branches.{index}."
            names = [options_of(entry)["type"] for entry in branch["encoders"]]
            projector = "qformer_proj" if "blip2_qformer" in names else "visual_proj"
            rules += [
                NameRule(f"llma.{projector}.0.*", f"{ours}projector.proj.*"),
                NameRule(f"llma.{projector}.1.*", f"{ours}projector.norm.*"),
            ]
            for position, name in enumerate(names):
                if name not in ENCODER_PREFIXES:
                    continue  # released files have no such encoder: its tensors stay without a name there
                prefix, trunk = ENCODER_PREFIXES[name], f"{ours}encoders.{position}.trunk."
                for a, b in _BLOCK_RENAMES.get(name, {}).items():
                    rules.append(NameRule(f"{prefix}blocks.{{}}.{a}*", f"{trunk}blocks.{{}}.{b}*"))
                rules.append(NameRule(f"{prefix}*", f"{trunk}*"))
                unused += _UNUSED.get(name, [])
    return KeyMap(rules, unused=unused)


_INPUT_SIZES = {"convnext_xxlarge": 256, "dinov2_vit_giant_patch14": 224}  # the builders' defaults
_MIXER = {"type": "channel", "grid": [16, 16]}
_PROJECTOR = {"type": "linear", "norm": "layer"}


def _full(image_size: int, rows: int = 1, **mixer: int) -> dict[str, Any]:
    encoders = ["clip_vit_large_patch14", "convnext_xxlarge", "dinov2_vit_giant_patch14"]
    branches: list[dict[str, Any]] = [
        {"encoders": ["blip2_qformer"], "projector": _PROJECTOR},
        {"encoders": encoders, "mixer": {**_MIXER, **mixer}, "projector": _PROJECTOR},
    ]
    return _arrangement(image_size, rows, 224, branches)


def _light(image_size: int, rows: int = 1) -> dict[str, Any]:
    convnext: dict[str, Any] = {"type": "convnext_xxlarge", "input_size": 512}
    if rows == 1:
        convnext["tile_size"] = 512  # the single view passes the half-precision resize although its size stays
    encoders = [convnext, {"type": "dinov2_vit_giant_patch14", "tile_size": 224}]
    return _arrangement(image_size, rows, 512, [{"encoders": encoders, "mixer": _MIXER, "projector": _PROJECTOR}])


def _sparse(image_size: int, rows: int = 1) -> dict[str, Any]:
    """The encoders of ``_full`` with the views of ``_light``."""
    branches = copy.deepcopy(_full(image_size, rows)["branches"])
    convnext, dinov2 = _light(image_size, rows)["branches"][0]["encoders"]
    small = {"tile_size": dinov2["tile_size"]}
    branches[0]["encoders"] = [{"type": "blip2_qformer", **small}]
    branches[1]["encoders"] = [{"type": "clip_vit_large_patch14", **small}, convnext, dinov2]
    return _arrangement(image_size, rows, 512, branches)


def _arrangement(image_size: int, rows: int, tile_size: int, branches: list[dict[str, Any]]) -> dict[str, Any]:
    tiler = {"type": "grid", "rows": rows, "cols": rows, "tile_size": tile_size, "thumbnail": True}
    several = {"tiler": tiler} if rows > 1 else {}  # a single view needs none
    return {"image_size": image_size, **several, "branches": branches, "mixer": "sequence"}


LLAMA_TYPES: dict[str, dict[str, Any] | None] = {
    "llama": None,
    "llama_ens": _full(224),
    "llama_ens5": _full(448, 2),
    "llama_ens10": _full(672, 3),
    "llama_ens5p2": _full(448, 2, tile_pool=2),
    "llama_ens_light": _light(512),
    "llama_ens5_light": _light(1024, 2),
    "mixtral_sparse": None,
    "mixtral_sparse_ens": _sparse(512),
    "mixtral_sparse_ens5": _sparse(1024, 2),
}
"""The ``llama_type`` of ``meta.json`` -> a recipe's ``vision`` part (None: text only)."""


def vision_of_type(llama_type: str, where: str) -> dict[str, Any] | None:
    """A copy of the ``vision`` part that a type name stands for.

    Args:
        llama_type: As in ``meta.json``.
        where: The file that says so, for messages.
    Raises:
        CheckpointError: An unknown name, or a mixture of experts whose shards hold whole experts.
    """
    what = f"llama_type {llama_type!r}"
    if llama_type == "mixtral":
        raise CheckpointError(
            f"{where}: {what} is a mixture of experts whose shards hold whole experts each, which is not supported; "
            f"known are {', '.join(BALANCE_WEIGHTS)}"
        )
    plain = llama_type.removesuffix(SUFFIX)  # adapters change no arrangement
    if plain not in LLAMA_TYPES:
        hint = "." if plain != llama_type else suggest(llama_type, LLAMA_TYPES) or "."
        raise CheckpointError(f"{where}: unknown {what}{hint} Known: {', '.join(LLAMA_TYPES)}")
    return copy.deepcopy(LLAMA_TYPES[plain])


def _signature(vision: Mapping[str, Any] | None) -> Any:
    """What tells one arrangement from another, with the defaults filled in."""
    if vision is None:
        return None
    size = vision["image_size"]
    tiler = options_of(vision.get("tiler"))
    single = {"type": "grid", "rows": 1, "cols": 1, "tile_size": size, "thumbnail": False}
    defaults = {"rows": 2, "cols": 2, "tile_size": 224, "thumbnail": True} if tiler else single
    views = {key: tiler.get(key, default) for key, default in {"type": "grid", **defaults}.items()}
    branches = []
    for branch in vision["branches"]:
        mixer, projector = options_of(branch.get("mixer")), options_of(branch["projector"])
        encoders = []
        for entry in branch["encoders"]:
            options = options_of(entry)
            own_size = options.get("input_size", _INPUT_SIZES.get(options["type"]))
            encoders.append((options["type"], own_size, options.get("tile_size")))
        grid = list(mixer.get("grid") or [])
        branches.append([encoders, grid, mixer.get("tile_pool", 1), projector["type"], projector.get("norm", "layer")])
    return size, views, branches


def type_of_vision(vision: Mapping[str, Any] | None, has_moe: bool = False) -> str:
    """The type name under which the public implementation knows an arrangement; encoders' widths do not matter.

    Args:
        vision: A recipe's ``vision`` part; None for text only.
        has_moe: Whether the language model is a mixture of experts.
    Raises:
        CheckpointError: It knows none.
    """
    wanted = _signature(vision)
    types = [name for name in LLAMA_TYPES if (name in BALANCE_WEIGHTS) == has_moe]
    for name in types:
        if _signature(LLAMA_TYPES[name]) == wanted:
            return name
    raise CheckpointError(
        "the released layout has no type for this recipe's vision part (image size, tiles and encoders must be those "
        f"of one of {', '.join(types)}); save in sphinxkit's own format"
    )


def guess_vision(names: Sequence[str]) -> dict[str, Any] | None:
    """An arrangement with the encoders that the released names speak of; None if they speak of none.

    Args:
        names: Tensor names of a released file.
    """
    types = {"llma.qformer.": "llama_ens", "llma.visual_proj.": "llama_ens_light"}
    found = (types[prefix] for prefix in types if any(name.startswith(prefix) for name in names))
    return vision_of_type(next(found, "llama"), "")


SHARD_NAME = "consolidated.{:02d}-of-{:02d}.{}.pth"
_KINDS = ("model", "model-diff")  # weights, differences to a base model
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
        if (match := _SHARD.fullmatch(path.name)) and match[3] == kind:
            found.setdefault(int(match[2]), {})[int(match[1])] = path
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


@register("sphinx")
class Released(Format):
    """The layout of the released SPHINX checkpoints."""

    name = "sphinx"
    looks_like = "consolidated.NN-of-MM.model.pth"
    has_shards = True
    has_unused = True
    has_deltas = True
    tokenizer_may_lie_above = True

    def detect(self, folder: Path) -> bool:
        """Whether the folder has ``consolidated.NN-of-MM.model.pth`` files."""
        return bool(find_shards(folder))

    def detect_delta(self, folder: Path) -> bool:
        """Whether the folder has ``consolidated.NN-of-MM.model-diff.pth`` files."""
        return bool(find_shards(folder, _KINDS[True]))

    def open(self, folder: Path, options: OpenOptions) -> Checkpoint:
        """Open a released SPHINX folder.

        Raises:
            CheckpointError: Damaged, missing or contradicting files, unknown or unsupported types, names or shapes that
                do not fit, a tokenizer of the wrong size.
        """
        meta_path, config_path, encoders_path = (folder / f"{name}.json" for name in ("meta", "config", "encoders"))
        if not config_path.is_file() and (folder / PARAMS_NAME).is_file():
            config_path = folder / PARAMS_NAME  # as LLaMA2-Accessory's own folders call it
        llama_type, said_by = options.llama_type, f"{folder}: llama_type="
        if llama_type is None and meta_path.is_file():
            said_by = str(meta_path)
            llama_type = read_json(meta_path).get("llama_type")
            if not isinstance(llama_type, str):
                raise CheckpointError(f"{meta_path}: 'llama_type' is {llama_type!r}, expected a name")
        vision = None if llama_type is None else vision_of_type(llama_type, said_by)
        kind = _KINDS[options.is_delta]
        files = find_shards(folder, kind)
        if not files:
            raise CheckpointError(f"{folder}: no consolidated.NN-of-MM.{kind}.pth in it")
        stored = unpack_experts([read_torch_file(file) for file in files])
        shards, updates = take_adapters(stored, sphinx_key_map(None), options.replicas, str(files[0]))
        refuse_unsupported([name for shard in shards for name in shard], str(files[0]), sphinx_key_map(None))
        if all(sphinx_key_map(None).to_ours(name) for shard in shards for name in shard):
            vision = None  # the language model alone, whatever the type's name
        elif llama_type is None:
            vision = guess_vision(list(shards[0]))
        fitting = Fitting(folder, sphinx_key_map(vision), options.defer_errors)
        merged, unused = merge_shards(folder, shards, fitting.key_map, options.replicas, errors=fitting.errors)
        check_updates(updates, merged, str(folder), alone=not options.defer_errors)
        if vision is not None and encoders_path.is_file():
            vision = with_encoder_options(vision, encoder_options(read_json(encoders_path), encoders_path))
        config = read_json(config_path) if config_path.is_file() else None
        recipe: dict[str, Any] | str
        if config is None:
            fitting.raise_all()
            recipe = "there is no config.json, so the model's numbers are not known; give a recipe"
        else:
            plain = llama_type and llama_type.removesuffix(SUFFIX)
            is_moe = plain in BALANCE_WEIGHTS or (llama_type is None and has_experts(shards[0]))
            balance_weight = BALANCE_WEIGHTS[plain or "mixtral_sparse"] if is_moe else None
            llm = read_llm(fitting, merged, config, config_path, balance_weight)
            recipe = llm if isinstance(llm, str) else model_recipe(llm, vision)
            if not isinstance(llm, str) and vision is not None and llama_type is None:
                recipe = "there is no meta.json, so the views are unknown; pass llama_type= or recipe="
        return Checkpoint(
            folder,
            self.name,
            merged,
            files,
            unused,
            recipe,
            self.tokenizer(folder, embedding_rows(merged)),
            {"llama_type": llama_type, "config": config, "num_shards": len(files)},
            partial(torch_files_checks, files),
            fitting.key_map,
            fitting.errors,
            updates,
        )

    def write(self, folder: Path, source: TensorInput, unused: TensorInput | None, options: WriteOptions) -> Texts:
        """Write the shards, ``meta.json``, ``config.json`` and, where it is needed, ``encoders.json``."""
        numbers = self.numbers(source, options.recipe)
        vision = options.recipe.get("vision") if options.recipe else None
        texts = {
            "meta.json": json_text({"llama_type": type_of_vision(vision, numbers["moe"] is not None)}),
            "config.json": json_text(meta_from_numbers(numbers)),
        }
        if vision is not None and (encoders := encoders_json(vision)) is not None:
            texts["encoders.json"] = json_text(encoders)
        count = options.num_shards
        pieces = pieces_of(source, sphinx_key_map(vision), count)
        paths = [folder / SHARD_NAME.format(rank, count, _KINDS[options.is_delta]) for rank in range(count)]
        write_torch_shards(paths, source, pieces, unused, "model")
        return texts
