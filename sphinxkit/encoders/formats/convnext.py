"""Published formats of CLIP's ConvNeXts.

Source of the names: open_clip, timm_model.py; timm, models/convnext.py.
"""

from __future__ import annotations

from typing import Any

from sphinxkit.encoders.formats.base import Configs, WeightFormat, named
from sphinxkit.encoders.formats.clip import TEXT_TOWER
from sphinxkit.encoders.formats.configs import mapping, open_clip_config, timm_config


def _by_architecture(name: str) -> dict[str, Any]:
    """Timm's convnext_xxlarge has LayerNorms of epsilon 1e-5, its other ConvNeXts of 1e-6; all have exact GELU.

    Source: timm, models/convnext.py.
    """
    return {"activation": "gelu", "norm_eps": 1e-5 if name.startswith("convnext_xxlarge") else 1e-6}


def _open_clip_options(configs: Configs) -> dict[str, Any]:
    name = mapping((open_clip_config(configs) or {}).get("vision_cfg")).get("timm_model_name")
    return _by_architecture(name) if isinstance(name, str) else {}


def _timm_options(configs: Configs) -> dict[str, Any]:
    config = timm_config(configs)
    if config is None:
        return {}
    eps = mapping(config.get("model_args")).get("norm_eps")
    return _by_architecture(str(config["architecture"])) | ({} if eps is None else {"norm_eps": eps})


CONVNEXT_FORMATS = (
    WeightFormat(
        "open_clip ConvNeXt",
        marks=(r"visual\.trunk\.stem\.0\.weight", r"visual\.trunk\.stages\.0\.blocks\.0\.conv_dw\.weight"),
        rules=named(("visual.trunk.*", "*")),
        skipped=(*TEXT_TOWER, r"visual\.head\..+", r"visual\.trunk\.head\.fc\..+"),
        options=_open_clip_options,
    ),
    WeightFormat(
        "timm ConvNeXt",
        marks=(r"stem\.0\.weight", r"stages\.0\.blocks\.0\.conv_dw\.weight"),
        rules=named(("*", "*")),
        skipped=(r"head\.fc\..+",),
        options=_timm_options,
    ),
)
