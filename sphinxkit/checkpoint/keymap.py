"""Canonical tensor names and the names each format uses: rules as data, and their use in both directions.

A rule pairs two templates. ``{}`` stands for a layer number and a trailing ``*`` for the rest of a name; both sides
have the same wildcards in the same order, so every rule can be run backwards. The first rule that fits wins.

Source of the names on the other side: LLaMA2-Accessory, accessory/model/LLM/llama.py and llama_ens*.py (released
files); meta-llama/llama, llama/model.py (Meta); transformers, models/llama/modeling_llama.py (Hugging Face).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Rotary = Literal["query", "key"]


@dataclass(frozen=True)
class NameRule:
    """One pair of templates and what is special about the tensors they name.

    Attributes:
        theirs: Template in the other format.
        ours: Template in canonical names.
        split_dim: Dimension that tensor-parallel shards split; None: every shard holds the whole tensor.
        rotary: Set where the other format orders the rows in halves instead of pairs (Hugging Face's q and k).
    """

    theirs: str
    ours: str
    split_dim: int | None = None
    rotary: Rotary | None = None

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        return _compile(self.theirs), _compile(self.ours)

    def to_ours(self, name: str) -> str | None:
        """The canonical name of ``name``, or None where the rule does not fit."""
        return _translate(self._patterns[0], self.ours, name)

    def to_theirs(self, name: str) -> str | None:
        """The other format's name of the canonical ``name``, or None where the rule does not fit."""
        return _translate(self._patterns[1], self.theirs, name)


def _compile(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)").replace(r"\*", r"(.+)"))


def _translate(pattern: re.Pattern[str], template: str, name: str) -> str | None:
    match = pattern.fullmatch(name)
    return template.replace("*", "{}").format(*match.groups()) if match else None


def _meta_rules(prefix: str) -> list[NameRule]:
    layer, ours = f"{prefix}layers.{{}}.", "llm.layers.{}."
    return [
        NameRule(f"{prefix}tok_embeddings.weight", "llm.embed_tokens.weight", 1),
        NameRule(f"{layer}attention.wq.weight", f"{ours}attention.q_proj.weight", 0),
        NameRule(f"{layer}attention.wk.weight", f"{ours}attention.k_proj.weight", 0),
        NameRule(f"{layer}attention.wv.weight", f"{ours}attention.v_proj.weight", 0),
        NameRule(f"{layer}attention.wo.weight", f"{ours}attention.o_proj.weight", 1),
        NameRule(f"{layer}feed_forward.w1.weight", f"{ours}mlp.gate_proj.weight", 0),
        NameRule(f"{layer}feed_forward.w2.weight", f"{ours}mlp.down_proj.weight", 1),
        NameRule(f"{layer}feed_forward.w3.weight", f"{ours}mlp.up_proj.weight", 0),
        NameRule(f"{layer}attention_norm.weight", f"{ours}attention_norm.weight"),
        NameRule(f"{layer}ffn_norm.weight", f"{ours}mlp_norm.weight"),
        NameRule(f"{prefix}norm.weight", "llm.norm.weight"),
        NameRule(f"{prefix}output.weight", "llm.lm_head.weight", 0),
    ]


_HF_LAYER, _OUR_LAYER = "model.layers.{}.", "llm.layers.{}."
_HF_RULES = [
    NameRule("model.embed_tokens.weight", "llm.embed_tokens.weight"),
    NameRule(f"{_HF_LAYER}self_attn.q_proj.weight", f"{_OUR_LAYER}attention.q_proj.weight", rotary="query"),
    NameRule(f"{_HF_LAYER}self_attn.k_proj.weight", f"{_OUR_LAYER}attention.k_proj.weight", rotary="key"),
    NameRule(f"{_HF_LAYER}self_attn.v_proj.weight", f"{_OUR_LAYER}attention.v_proj.weight"),
    NameRule(f"{_HF_LAYER}self_attn.o_proj.weight", f"{_OUR_LAYER}attention.o_proj.weight"),
    NameRule(f"{_HF_LAYER}mlp.gate_proj.weight", f"{_OUR_LAYER}mlp.gate_proj.weight"),
    NameRule(f"{_HF_LAYER}mlp.up_proj.weight", f"{_OUR_LAYER}mlp.up_proj.weight"),
    NameRule(f"{_HF_LAYER}mlp.down_proj.weight", f"{_OUR_LAYER}mlp.down_proj.weight"),
    NameRule(f"{_HF_LAYER}input_layernorm.weight", f"{_OUR_LAYER}attention_norm.weight"),
    NameRule(f"{_HF_LAYER}post_attention_layernorm.weight", f"{_OUR_LAYER}mlp_norm.weight"),
    NameRule("model.norm.weight", "llm.norm.weight"),
    NameRule("lm_head.weight", "llm.lm_head.weight"),
]

ENCODER_PREFIXES: dict[str, str] = {
    "blip2_qformer": "llma.qformer.",
    "clip_vit_large_patch14": "llma.clip.visual.",
    "convnext_xxlarge": "llma.openclip_convnext_xxl.",
    "dinov2_vit_giant_patch14": "llma.dinov2_vitg14.",
}
"""Where the released files keep each encoder."""

_ENCODER_RENAMES: dict[str, list[tuple[str, str]]] = {
    # the packed SwiGLU of the DINOv2 repository under timm's names
    "dinov2_vit_giant_patch14": [
        ("blocks.{}.mlp.w12.*", "blocks.{}.mlp.fc1.*"),
        ("blocks.{}.mlp.w3.*", "blocks.{}.mlp.fc2.*"),
    ],
}

_UNUSED: dict[str, list[str]] = {
    # CLIP's text side and both output projections; everything of llma.clip that is not its image trunk
    "clip_vit_large_patch14": [r"llma\.clip\.(?!visual\.).+", r"llma\.clip\.visual\.proj"],
    "dinov2_vit_giant_patch14": [r"llma\.dinov2_vitg14\.mask_token"],
}


@dataclass(frozen=True)
class KeyMap:
    """The rules of one format (and, for released SPHINX files, of one arrangement of encoders).

    Attributes:
        rules: Tried in order.
        unused: Patterns of names that the format stores but no model uses; they have no canonical name.
        derived: Patterns of names that are computed from the configuration (rotary tables); they are skipped.
    """

    rules: Sequence[NameRule]
    unused: Sequence[str] = ()
    derived: Sequence[str] = ()

    def is_unused(self, name: str) -> bool:
        """Whether the other format's ``name`` belongs to the unused group."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)

    def is_derived(self, name: str) -> bool:
        """Whether the other format's ``name`` is computed from the configuration and need not be read."""
        return any(re.fullmatch(pattern, name) for pattern in self.derived)

    def to_ours(self, name: str) -> tuple[str, NameRule] | None:
        """Canonical name and rule of the other format's ``name``; None where no rule fits."""
        for rule in self.rules:
            if (ours := rule.to_ours(name)) is not None:
                return ours, rule
        return None

    def to_theirs(self, name: str) -> tuple[str, NameRule] | None:
        """The other format's name and rule of the canonical ``name``; None where no rule fits."""
        for rule in self.rules:
            if (theirs := rule.to_theirs(name)) is not None:
                return theirs, rule
        return None


def encoder_name(entry: str | Mapping[str, Any]) -> str:
    """The registered name in an encoder's recipe entry, which is the name itself or ``{type: name, ...}``."""
    return entry if isinstance(entry, str) else str(entry["type"])


def meta_key_map() -> KeyMap:
    """Names of Meta's ``consolidated.NN.pth``."""
    return KeyMap(_meta_rules(""), derived=[r"rope\.freqs", r"layers\.\d+\.attention\.inner_attention\.rope\.freqs"])


def hf_key_map() -> KeyMap:
    """Names of Hugging Face's ``LlamaForCausalLM``."""
    return KeyMap(_HF_RULES, derived=[r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"])


def sphinx_key_map(vision: Mapping[str, Any] | None) -> KeyMap:
    """Names of the released SPHINX files.

    Args:
        vision: The recipe's ``vision`` part (only ``branches[].encoders`` matters here); None for a text-only model.
    """
    rules = _meta_rules("llma.")
    unused: list[str] = []
    if vision is not None:
        rules += [
            NameRule("llma.start_img", "vision.start_token"),
            NameRule("llma.end_img", "vision.end_token"),
        ]
        for index, branch in enumerate(vision["branches"]):
            ours = f"vision.branches.{index}."
            names = [encoder_name(entry) for entry in branch["encoders"]]
            projector = "qformer_proj" if "blip2_qformer" in names else "visual_proj"
            rules += [
                NameRule(f"llma.{projector}.0.*", f"{ours}projector.proj.*"),
                NameRule(f"llma.{projector}.1.*", f"{ours}projector.norm.*"),
            ]
            for position, name in enumerate(names):
                if name not in ENCODER_PREFIXES:
                    continue  # released files have no such encoder: its tensors stay without a name there
                prefix, trunk = ENCODER_PREFIXES[name], f"{ours}encoders.{position}.trunk."
                rules += [NameRule(prefix + a, trunk + b) for a, b in _ENCODER_RENAMES.get(name, [])]
                rules.append(NameRule(f"{prefix}*", f"{trunk}*"))
                unused += _UNUSED.get(name, [])
    return KeyMap(rules, unused=unused)
