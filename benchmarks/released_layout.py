"""Write a released-style SPHINX checkpoint of full size with random values.

``python -m benchmarks.released_layout FOLDER`` writes what a released SPHINX-Tiny directory holds: bf16 shards
``consolidated.NN-of-MM.model.pth``, ``tokenizer.model``, ``config.json``, ``meta.json``. Names, shapes and the split
over shards come from the manifests of the public implementation in ``tests/golden/manifests``.
"""

from __future__ import annotations

import argparse
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
Manifest = dict[str, list[Any]]  # name -> [shape, dimension that is split over shards or null]


def pad_tokenizer(model: bytes, num_pieces: int, vocab_size: int) -> bytes:
    """A SentencePiece model with unused pieces appended until it has ``vocab_size``.

    A serialised protocol buffer followed by more entries of a repeated field is one with those entries appended, so the
    pieces (field 1: text, score, type NORMAL) are written behind it by hand.

    Args:
        model: ``tokenizer.model``.
        num_pieces: How many it has.
        vocab_size: How many it shall have.
    """
    added = bytearray()
    for index in range(num_pieces, vocab_size):
        text = f"<unused{index}>".encode()
        # far below every merge that the tokenizer knows, so that encoding never makes one
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1e6 - index) + b"\x18\x01"
        added += b"\x0a" + bytes([len(piece)]) + piece
    return model + bytes(added)


def random_tensor(name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The whole tensor of one name: the same in every call, whichever shard asks."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.empty(shape, dtype=dtype).normal_(std=0.02, generator=generator)
    return values + 1 if len(shape) == 1 and name.endswith("weight") else values


def write_shards(manifest: Manifest, folder: Path, num_shards: int, dtype: torch.dtype) -> int:
    """Write the shards, one after the other; the bytes of all tensors, counted once."""
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for rank in range(num_shards):
        shard = {}
        for name, (shape, dim) in manifest.items():
            tensor = random_tensor(name, shape, dtype)
            total += tensor.nbytes if rank == 0 else 0
            shard[name] = tensor if dim is None else tensor.chunk(num_shards, dim)[rank].contiguous().clone()
        torch.save({"model": shard}, folder / f"consolidated.{rank:02}-of-{num_shards:02}.model.pth")
        del shard
    return total


def write_layout(folder: Path, llama_type: str = "llama_ens_light", num_shards: int = 2) -> int:
    """Write a whole directory in bf16.

    Args:
        folder: Made if it is not there.
        llama_type: The public implementation's name of the model; one of the manifests.
        num_shards: Tensor-parallel shards.
    Returns:
        The weights' bytes, each tensor counted once.
    """
    manifest = json.loads((GOLDEN / "manifests" / f"{llama_type}.json").read_text())
    facts = json.loads((GOLDEN / "manifests" / "index.json").read_text())[llama_type]
    total = write_shards(manifest, folder, num_shards, torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(facts["config"]))
    (folder / "meta.json").write_text(json.dumps({"llama_type": llama_type}))
    small = GOLDEN / llama_type
    pieces = json.loads((small / "config.json").read_text())["vocab_size"]
    padded = pad_tokenizer((small / "tokenizer.model").read_bytes(), pieces, facts["vocab_size"])
    (folder / "tokenizer.model").write_bytes(padded)
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--type", default="llama_ens_light", help="default: SPHINX-Tiny, 3.1 B parameters, 6.2 GB")
    parser.add_argument("--shards", type=int, default=2)
    options = parser.parse_args()
    print(f"{write_layout(options.folder, options.type, options.shards) / 1e9:.2f} GB of weights in {options.folder}")
