"""Encoders and models of a few thousand parameters that see what SPHINX-nano sees."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sphinxkit.recipe import shipped_folder

VIEW = 64
ENCODERS: list[list[dict[str, Any]]] = [
    [
        {
            **{"type": "blip2_qformer", "image_size": VIEW, "patch_size": 32, "vision_dim": 8, "vision_layers": 1},
            **{"vision_heads": 2, "vision_hidden_dim": 16, "embed_dim": 8, "num_layers": 1, "num_heads": 2},
            **{"hidden_dim": 16, "num_query_tokens": 2},
        }
    ],
    [
        {
            **{"type": "clip_vit_large_patch14", "image_size": VIEW, "patch_size": 16, "embed_dim": 16},
            **{"num_layers": 1, "num_heads": 2},
        },
        {"type": "convnext_xxlarge", "input_size": VIEW, "dims": [4, 8, 8, 16], "depths": [1, 1, 1, 1]},
        {
            **{"type": "dinov2_vit_giant_patch14", "input_size": VIEW, "patch_size": 16, "pretrain_image_size": VIEW},
            **{"embed_dim": 16, "num_layers": 1, "num_heads": 2},
        },
    ],
]
LLM = {
    **{"type": "llama", "vocab_size": 960, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 32},
    "max_seq_len": 1024,
}


def micro_model(side: int = 1) -> dict[str, Any]:
    """A model recipe of one view of 64 pixels, or of ``side`` x ``side`` sub-images and the whole."""
    linear = {"type": "linear", "norm": "layer"}
    tiler = {"type": "grid", "rows": side, "cols": side, "tile_size": VIEW, "thumbnail": side > 1}
    mixer = {"type": "channel", "grid": [2, 2]}
    return {
        "kind": "model",
        "vision": {
            "image_size": side * VIEW,
            "tiler": tiler,
            "branches": [
                {"encoders": ENCODERS[0], "projector": linear},
                {"encoders": ENCODERS[1], "mixer": mixer, "projector": linear},
            ],
            "mixer": "sequence",
        },
        "llm": LLM,
        "conversation": "sphinx_v1",
        "tokenizer": "tokenizer.model",
    }


@pytest.fixture(scope="session")
def micro_recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped recipes with micro models, two steps and a few samples in each."""
    folder = tmp_path_factory.mktemp("recipes")
    shipped = shipped_folder() / "nano"
    shutil.copy(shipped / "tokenizer.model", folder)
    for path in shipped.glob("*.yaml"):
        document = yaml.safe_load(path.read_text())
        if document["kind"] == "model":
            document = micro_model(2 if path.stem == "model_subimages" else 1)
        else:
            for stream in document["data"].values():
                stream["batch_size"] = 4
            document |= {"steps": 2, "num_workers": 0, "log_every": 1, "dtype": "float32", "async_save": False}
        (folder / path.name).write_text(yaml.safe_dump(document))
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
