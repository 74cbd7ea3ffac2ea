from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphinxkit.encoders import Encoder

TINY: dict[str, Any] = {"image_size": 28, "embed_dim": 16, "num_layers": 2, "num_heads": 2}


NAME = "clip_vit_large_patch14"


def open_clip_state(encoder: Encoder) -> dict[str, Tensor]:
    """An encoder's tensors as an open_clip file has them, with a text tower."""
    state = {name.replace("trunk.", "visual."): tensor for name, tensor in encoder.state_dict().items()}
    return {
        **state,
        "visual.proj": torch.zeros(16, 4),
        "logit_scale": torch.zeros(()),
        "ln_final.weight": torch.ones(4),
    }
