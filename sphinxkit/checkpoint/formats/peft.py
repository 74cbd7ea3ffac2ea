"""PEFT's adapter folders: LoRA factors of a base model in ``adapter_model.safetensors`` and ``adapter_config.json``.

peft is not imported. Source: peft, tuners/lora/{config,layer}.py, utils/save_and_load.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sphinxkit.checkpoint.formats.hf import hf_key_map, rotary, rotary_to_halves, rotary_to_pairs
from sphinxkit.checkpoint.formats.hf_sphinx import hf_sphinx_key_map
from sphinxkit.checkpoint.keymap import NameRule
from sphinxkit.checkpoint.llm_config import full_numbers
from sphinxkit.checkpoint.opened import Checkpoint
from sphinxkit.checkpoint.sharding import MergedTensor
from sphinxkit.checkpoint.writing import json_text
from sphinxkit.errors import CheckpointError, raise_errors
from sphinxkit.tensor_files.files import read_json, read_tensor_files
from sphinxkit.tensor_files.low_rank import Update, lora_scale
from sphinxkit.tensor_files.safetensors import write_safetensors
from sphinxkit.tensor_files.spec import TensorSpec

CONFIG_NAME = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# Options that change what an adapter computes, with the values at which they do not. Source: peft, LoraConfig.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "corda_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG_NAME).is_file()


class Adapter:
    """A LoRA adapter of PEFT, opened. Nothing is read until a merged tensor is.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``.
    Attributes:
        folder: As above.
        config: Content of ``adapter_config.json``.
    Raises:
        CheckpointError: Missing or damaged files, another kind of adapter, or an option that cannot be merged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / CONFIG_NAME
        if not path.is_file():
            raise CheckpointError(f"{self.folder}: holds no {CONFIG_NAME}")
        self.config = read_json(path)
        if self.config.get("peft_type") != "LORA":
            raise CheckpointError(f"{path}: peft_type is {self.config.get('peft_type')!r}, expected 'LORA'")
        raise_errors(
            f"{path}: cannot be merged",
            [
                f"{key} is {self.config[key]!r}"
                for key, neutral in _NEUTRAL.items()
                if key in self.config and self.config[key] not in neutral
            ],
        )
        weights = next((self.folder / name for name in _WEIGHTS if (self.folder / name).is_file()), None)
        if weights is None:
            raise CheckpointError(f"{self.folder}: holds none of {', '.join(_WEIGHTS)}")
        self._stored, self._files = read_tensor_files(weights)

    @property
    def base(self) -> str:
        """Directory or hub id of the base model, as the configuration names it; empty if it does not."""
        return str(self.config.get("base_model_name_or_path") or "")

    def _alpha(self, module: str) -> float:
        alphas = self.config.get("alpha_pattern") or {}
        found = next((value for key, value in alphas.items() if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = self.config.get("lora_alpha") if found is None else found
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.folder / CONFIG_NAME}: lora_alpha of {module!r} is {alpha!r}, not a number")
        return float(alpha)

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._alpha(module)
        # Source: rsLoRA, arXiv:2312.03732
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else lora_scale(rank, alpha)

    def updates(self, num_heads: int, num_kv_heads: int) -> tuple[dict[str, Update], dict[str, MergedTensor]]:
        """The adapter's tensors under canonical names, not read yet.

        Args:
            num_heads: Query heads of the language model; its rows are ordered in pairs here, in halves there.
            num_kv_heads: Key heads.
        Returns:
            Updates by the weight's name, and whole tensors (``modules_to_save``).
        Raises:
            CheckpointError: Names that no model here has, or a factor without its other; one error lists all.
        """
        updates: dict[str, Update] = {}
        whole: dict[str, MergedTensor] = {}
        errors: list[str] = []
        for name, tensor in self._stored.items():
            if name.endswith(_UP) and f"{name.removesuffix(_UP)}{_DOWN}" in self._stored:
                continue
            module = name.removeprefix(_PREFIX).removesuffix(_DOWN)
            is_update = name.endswith(_DOWN)
            found = _ours(f"{module}.weight" if is_update else module)
            up = self._stored.get(f"{name.removesuffix(_DOWN)}{_UP}")
            if found is None:
                errors.append(f"{name!r} is no tensor of a language model or SPHINX")
            elif is_update and (up is None or len(tensor.shape) != 2 or up.shape[1:] != tensor.shape[:1]):
                errors.append(f"{name!r} of {list(tensor.shape)}: lora_B is {None if up is None else list(up.shape)}")
            else:
                reorder = rotary(rotary_to_pairs, found[1], num_heads, num_kv_heads)
                if up is None or not is_update:
                    whole[found[0]] = MergedTensor([tensor], reorder=reorder)
                else:
                    scale = self._scale(module, tensor.shape[0])
                    updates[found[0]] = Update(tensor, MergedTensor([up], reorder=reorder), scale)
        if not self._stored:
            errors.append("it holds no tensors")
        raise_errors(f"{self.folder}: the adapter cannot be read", errors)
        return updates, whole

    def laid_over(self, base: Checkpoint) -> Checkpoint:
        """The base with every update merged, as its tensors are read.

        Args:
            base: In any format, with a recipe.
        Returns:
            Both as one; it closes the files of the base.
        Raises:
            CheckpointError: Names or shapes that the base does not have.
        """
        numbers = full_numbers(base.recipe["llm"], base)
        updates, whole = self.updates(numbers["num_heads"], numbers["num_kv_heads"])
        raise_errors(
            f"{self.folder}: does not lie over {base.path}",
            [f"there is no {name!r}" for name in (*updates, *whole) if name not in base],
        )
        said = "is an adapter, which has no recipe"
        return base.overlaid(Checkpoint(self.folder, "peft", whole, self._files, recipe=said, updates=updates))


def _ours(name: str) -> tuple[str, NameRule] | None:
    return hf_sphinx_key_map().to_ours(name) or hf_key_map().to_ours(name)


def _below_llm(targets: Sequence[str]) -> str:
    """A pattern of the language model's modules alone: encoders have layers of the same names."""
    layers = "|".join(target for target in targets if target != "lm_head")
    pattern = rf"(.*\.)?language_model\..*\.({layers})"
    return f"{pattern}|lm_head" if "lm_head" in targets else pattern


def write_adapter(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    num_heads: int,
    num_kv_heads: int,
    has_vision: bool,
    rank: int,
    alpha: float,
    base: str = "",
) -> None:
    """Write LoRA factors as PEFT's folder, for ``PeftModel.from_pretrained``.

    Args:
        folder: Existing folder.
        factors: Canonical name of each updated weight -> (down, up).
        num_heads: Query heads of the language model.
        num_kv_heads: Its key heads.
        has_vision: Whether the names are those of ``SphinxForConditionalGeneration`` or of the language model alone.
        rank: Rank R of every update.
        alpha: The scale is ``alpha / rank``.
        base: Directory or hub id of the base model.
    Shape:
        factors: (R, in) and (out, R) each
    Raises:
        CheckpointError: A name that Hugging Face's classes do not have.
    """
    key_map = hf_sphinx_key_map() if has_vision else hf_key_map()
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        found = key_map.to_theirs(name)
        if found is None:
            raise CheckpointError(f"Hugging Face's classes have no tensor for {name!r}")
        theirs, rule = found
        reorder = rotary(rotary_to_halves, rule, num_heads, num_kv_heads)
        module = f"{_PREFIX}{theirs.removesuffix('.weight')}"
        tensors[f"{module}{_DOWN}"] = down.detach().cpu().contiguous()
        tensors[f"{module}{_UP}"] = (up if reorder is None else reorder(up)).detach().cpu().contiguous()
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_safetensors(folder / _WEIGHTS[0], specs, tensors.__getitem__, checksum=False)
    targets = sorted({name.removesuffix(_DOWN).rpartition(".")[2] for name in tensors if name.endswith(_DOWN)})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _below_llm(targets) if has_vision else targets,
        "inference_mode": True,
    }
    (folder / CONFIG_NAME).write_text(json_text(config), encoding="utf-8")
