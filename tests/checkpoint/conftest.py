from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sphinxkit.checkpoint import MappingSource
from sphinxkit.tensor_source import TensorSource

LLAMA_TYPES = ("llama_ens", "llama_ens5", "llama_ens_light", "llama_ens5_light")

Tensors = dict[str, Tensor]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="session")
def same() -> Callable[[TensorSource, TensorSource], None]:
    """Asserts that two sources agree in names, shapes, dtypes and bits."""

    def check(one: TensorSource, other: TensorSource) -> None:
        assert sorted(one.keys()) == sorted(other.keys())
        for key in one.keys():  # noqa: SIM118
            a, b = one.read(key), other.read(key)
            assert one.shape(key) == tuple(a.shape) == other.shape(key) == tuple(b.shape), key
            assert one.dtype(key) == a.dtype == other.dtype(key) == b.dtype, key
            assert bits(a) == bits(b), key

    return check


@pytest.fixture
def released(golden: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies a tiny released checkpoint, to be damaged."""

    def copy(llama_type: str = "llama_ens_light") -> Path:
        target = tmp_path / llama_type
        target.mkdir()
        for path in (golden / llama_type).iterdir():
            if not path.name.startswith(("golden.", "resized")):
                shutil.copy(path, target)
        return target

    return copy


@pytest.fixture
def write_json() -> Callable[..., Path]:
    """Changes keys of a JSON file; a value of ... removes the key."""

    def write(path: Path, **changes: object) -> Path:
        content = json.loads(path.read_text()) if path.exists() else {}
        for key, value in changes.items():
            if value is ...:
                content.pop(key, None)
            else:
                content[key] = value
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def text_model() -> tuple[MappingSource, dict[str, object]]:
    """A language model in canonical names (grouped-query, odd hidden width) and its recipe."""
    generator = torch.Generator().manual_seed(0)
    vocab, dim, heads, kv_heads, hidden, layers = 24, 32, 4, 2, 40, 2
    shapes: dict[str, tuple[int, ...]] = {"llm.embed_tokens.weight": (vocab, dim)}
    for index in range(layers):
        layer = f"llm.layers.{index}."
        shapes |= {
            f"{layer}attention_norm.weight": (dim,),
            f"{layer}attention.q_proj.weight": (dim, dim),
            f"{layer}attention.k_proj.weight": (kv_heads * dim // heads, dim),
            f"{layer}attention.v_proj.weight": (kv_heads * dim // heads, dim),
            f"{layer}attention.o_proj.weight": (dim, dim),
            f"{layer}mlp_norm.weight": (dim,),
            f"{layer}mlp.gate_proj.weight": (hidden, dim),
            f"{layer}mlp.up_proj.weight": (hidden, dim),
            f"{layer}mlp.down_proj.weight": (dim, hidden),
        }
    shapes |= {"llm.norm.weight": (dim,), "llm.lm_head.weight": (vocab, dim)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    llm = {
        "type": "llama",
        "vocab_size": vocab,
        "embed_dim": dim,
        "num_layers": layers,
        "num_heads": heads,
        "hidden_dim": hidden,
        "num_kv_heads": kv_heads,
        "norm_eps": 1e-6,
        "rope_theta": 5000.0,
        "rope_scaling": 0.25,
        "attention": "auto",
    }
    return MappingSource(tensors), {"kind": "model", "llm": llm, "conversation": "sphinx_v1"}
