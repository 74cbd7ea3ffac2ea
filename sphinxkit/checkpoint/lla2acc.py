"""Released SPHINX directories (LLaMA2-Accessory): their types as recipes, their configuration, their shards.

This module holds the only table of the public implementation's type names. A type is an arrangement (image size, views,
encoders); every width comes from the directory's own files, whatever its size.

Source: LLaMA2-Accessory, accessory/model/LLM/llama_ens*.py (arrangements), accessory/util/tensor_parallel.py (shards).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinxkit.checkpoint.entries import raise_faults
from sphinxkit.checkpoint.keymap import encoder_name
from sphinxkit.errors import CheckpointError
from sphinxkit.registry import suggest

_PROJECTOR = {"type": "linear", "norm": "layer"}


def _full(image_size: int, rows: int, tile_pool: int = 1) -> dict[str, Any]:
    mixer: dict[str, Any] = {"type": "channel", "grid": [16, 16]}
    if tile_pool != 1:
        mixer["tile_pool"] = tile_pool
    return {
        "image_size": image_size,
        "tiler": {"type": "grid", "rows": rows, "cols": rows, "tile_size": 224, "thumbnail": rows > 1},
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


def _light(image_size: int, rows: int) -> dict[str, Any]:
    convnext: dict[str, Any] = {"type": "convnext_xxlarge", "input_size": 512}
    if rows == 1:
        convnext["tile_size"] = 512  # the single view passes the half-precision resize although its size stays
    return {
        "image_size": image_size,
        "tiler": {"type": "grid", "rows": rows, "cols": rows, "tile_size": 512, "thumbnail": rows > 1},
        "branches": [
            {
                "encoders": [convnext, {"type": "dinov2_vit_giant_patch14", "tile_size": 224}],
                "mixer": {"type": "channel", "grid": [16, 16]},
                "projector": _PROJECTOR,
            }
        ],
        "mixer": "sequence",
    }


LLAMA_TYPES: dict[str, dict[str, Any] | None] = {
    "llama": None,
    "llama_ens": _full(224, 1),
    "llama_ens5": _full(448, 2),
    "llama_ens10": _full(672, 3),
    "llama_ens5p2": _full(448, 2, tile_pool=2),
    "llama_ens_light": _light(512, 1),
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
    tiler = vision.get("tiler") or {}
    tiler = {"type": tiler} if isinstance(tiler, str) else tiler
    branches = []
    for branch in vision["branches"]:
        mixer = branch.get("mixer") or {}
        mixer = {"type": mixer} if isinstance(mixer, str) else mixer
        names = tuple(encoder_name(entry) for entry in branch["encoders"])
        branches.append((names, mixer.get("tile_pool", 1)))
    keys = (("rows", 2), ("cols", 2), ("tile_size", 224), ("thumbnail", True))
    return vision["image_size"], tuple(tiler.get(key, default) for key, default in keys), tuple(branches)


def type_of_vision(vision: Mapping[str, Any] | None) -> str:
    """The type name under which the public implementation knows an arrangement.

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


# ---- encoders.json ---------------------------------------------------------------------------------------------------

# Defaults of the builders (sphinxkit.encoders), so that a recipe only says what differs; a test compares both.
ENCODER_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vit_large_patch14": {
        "activation": "quick_gelu", "image_size": 224, "patch_size": 14, "embed_dim": 1024, "num_layers": 24,
        "num_heads": 16, "mlp_ratio": 4.0, "norm_eps": 1e-5,
    },
    "convnext_xxlarge": {
        "dims": [384, 768, 1536, 3072], "depths": [3, 4, 30, 3], "norm_eps": 1e-5, "activation": "gelu",
    },
    "dinov2_vit_giant_patch14": {
        "patch_size": 14, "pretrain_image_size": 518, "embed_dim": 1536, "num_layers": 40, "num_heads": 24,
        "mlp_ratio": 4.0, "hidden_dim": None, "norm_eps": 1e-6,
    },
    "blip2_qformer": {
        "image_size": 224, "patch_size": 14, "vision_dim": 1408, "vision_layers": 39, "vision_heads": 16,
        "vision_hidden_dim": 6144, "vision_norm_eps": 1e-6, "embed_dim": 768, "num_layers": 12, "num_heads": 12,
        "hidden_dim": 3072, "num_query_tokens": 32, "cross_attention_frequency": 2, "norm_eps": 1e-12,
    },
}  # fmt: skip

# Section of encoders.json -> builder, and its keys -> the builder's options.
_OPTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "clip": ("clip_vit_large_patch14", {
        "image_size": "image_size", "patch_size": "patch_size", "mlp_ratio": "mlp_ratio", "activation": "activation",
        "norm_eps": "norm_eps", "width": "embed_dim", "layers": "num_layers", "heads": "num_heads",
    }),
    "convnext": ("convnext_xxlarge", {
        "norm_eps": "norm_eps", "activation": "activation", "depths": "depths", "dims": "dims",
    }),
    "dinov2": ("dinov2_vit_giant_patch14", {
        "pretrain_image_size": "pretrain_image_size", "patch_size": "patch_size", "mlp_ratio": "mlp_ratio",
        "hidden": "hidden_dim", "norm_eps": "norm_eps", "embed_dim": "embed_dim", "layers": "num_layers",
        "heads": "num_heads",
    }),
    "blip2_vision": ("blip2_qformer", {
        "image_size": "image_size", "patch_size": "patch_size", "norm_eps": "vision_norm_eps",
        "hidden_size": "vision_dim", "layers": "vision_layers", "heads": "vision_heads",
        "intermediate_size": "vision_hidden_dim",
    }),
    "qformer": ("blip2_qformer", {
        "norm_eps": "norm_eps", "encoder_hidden_size": "vision_dim", "hidden_size": "embed_dim",
        "layers": "num_layers", "heads": "num_heads", "intermediate_size": "hidden_dim",
        "cross_attention_frequency": "cross_attention_frequency", "num_query_tokens": "num_query_tokens",
    }),
}  # fmt: skip

# What an encoders.json may state but the networks have only in one way.
_FIXED: dict[str, dict[str, Any]] = {
    "convnext": {"kernel_size": 7, "mlp_ratio": 4, "layer_scale": True},
    "dinov2": {"ffn": "swiglu, fused w12", "num_register_tokens": 0, "layer_scale": True},
    "blip2_vision": {"activation": "gelu", "qkv_bias": True},
    "qformer": {"activation": "gelu"},
}
_UNREAD_SECTIONS = ("note", "clip_text_leftover")  # prose, and the shapes of tensors that no model uses
_ACTIVATIONS = {
    "gelu (exact erf)": "gelu", "gelu": "gelu", "quick_gelu": "quick_gelu", "quickgelu": "quick_gelu",
    "gelu (tanh)": "gelu_tanh", "gelu_tanh": "gelu_tanh",
}  # fmt: skip
_ACTIVATION_WORDS = {"gelu": "gelu (exact erf)", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu (tanh)"}


def encoder_options(config: Mapping[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    """Builder options from an ``encoders.json``, where they differ from the builders' defaults.

    Args:
        config: The file's content: a section for each encoder. An option that is left out is the full-size one.
        file: For messages.
    Returns:
        Builder name -> options.
    Raises:
        CheckpointError: Every unknown section or key, contradiction, or value that the encoders cannot have.
    """
    faults: list[str] = []
    stated: dict[str, dict[str, Any]] = {}
    for section, content in config.items():
        if section in _UNREAD_SECTIONS:
            continue
        if section not in _OPTIONS or not isinstance(content, Mapping):
            faults.append(f"section {section!r} is not known{suggest(section, _OPTIONS)}")
            continue
        builder, names = _OPTIONS[section]
        fixed = _FIXED.get(section, {})
        options = stated.setdefault(builder, {})
        for key, stated_value in content.items():
            value = stated_value
            where = f"{section}.{key}"
            if key == "note":
                continue
            if key == "activation":
                if str(value).lower() not in _ACTIVATIONS:
                    faults.append(f"{where} is {value!r}, expected one of {', '.join(map(repr, _ACTIVATIONS))}")
                    continue
                value = _ACTIVATIONS[str(value).lower()]
            if key in fixed:
                if value != fixed[key]:
                    faults.append(f"{where} is {value!r}; the encoder only exists with {fixed[key]!r}")
            elif key not in names:
                faults.append(f"{where} is not known{suggest(key, [*names, *fixed])}")
            elif options.setdefault(names[key], value) != value:
                faults.append(f"{where} is {value!r}, which contradicts {options[names[key]]!r} given before")
    raise_faults(f"{file} cannot be followed", faults)
    return {builder: _only_differing(builder, options) for builder, options in stated.items()}


def _swiglu_hidden_dim(embed_dim: int, mlp_ratio: float) -> int:
    """The DINOv2 repository's rule (dinov2/layers/swiglu_ffn.py) for the width after the gate."""
    return (int(int(embed_dim * mlp_ratio) * 2 / 3) + 7) // 8 * 8


def _only_differing(builder: str, options: Mapping[str, Any]) -> dict[str, Any]:
    defaults = ENCODER_DEFAULTS[builder]
    found = {key: value for key, value in options.items() if value != defaults[key]}
    if builder == "dinov2_vit_giant_patch14" and found.get("hidden_dim") is not None:
        values = {**defaults, **options}
        if found["hidden_dim"] == _swiglu_hidden_dim(values["embed_dim"], values["mlp_ratio"]):
            del found["hidden_dim"]  # None stands for that rule
    return found


def with_encoder_options(vision: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A ``vision`` part whose encoders carry ``options`` (builder name -> options)."""
    found = copy.deepcopy(dict(vision))
    for branch in found["branches"]:
        branch["encoders"] = [
            {**({"type": entry} if isinstance(entry, str) else entry), **options[encoder_name(entry)]}
            if options.get(encoder_name(entry))
            else entry
            for entry in branch["encoders"]
        ]
    return found


def encoders_json(vision: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``encoders.json`` of a ``vision`` part; None if every encoder is as in the full-size models.

    Args:
        vision: A recipe's ``vision`` part.
    """
    entries: dict[str, Mapping[str, Any]] = {}
    for branch in vision["branches"]:
        for entry in branch["encoders"]:
            entries[encoder_name(entry)] = {} if isinstance(entry, str) else entry
    if not any(key in ENCODER_DEFAULTS[name] and entry[key] != ENCODER_DEFAULTS[name][key]
               for name, entry in entries.items() if name in ENCODER_DEFAULTS for key in entry):  # fmt: skip
        return None
    content: dict[str, Any] = {}
    for section, (builder, names) in _OPTIONS.items():
        if builder not in entries:
            continue
        values = {**ENCODER_DEFAULTS[builder], **entries[builder]}
        if builder == "dinov2_vit_giant_patch14" and values["hidden_dim"] is None:
            values["hidden_dim"] = _swiglu_hidden_dim(values["embed_dim"], values["mlp_ratio"])
        written = {key: values[option] for key, option in names.items()}
        written |= _FIXED.get(section, {})
        if "activation" in written:
            written["activation"] = _ACTIVATION_WORDS[written["activation"]]
        content[section] = written
    return content


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
    raise_faults(f"{folder}: shards are missing; fetch them", missing)
    raise_faults(f"{folder}: shard numbers beyond their count", surplus)
    return [shards[rank] for rank in range(count)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: It cannot be read, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected an object")
    return content


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
