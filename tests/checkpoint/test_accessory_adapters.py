from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.errors import CheckpointError

RANK = 3
COLUMN = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3")
ROW = ("attention.wo", "feed_forward.w2")
TOLERANCE = 1e-6  # one float32 addition in another order
Change = Callable[[dict[str, Tensor], int], dict[str, Tensor]]


def write(golden: Path, target: Path, change: Change) -> Path:
    """A released folder in two shards whose tensors went through ``change(tensors, rank)``."""
    shutil.copytree(golden / "llama_ens", target, ignore=shutil.ignore_patterns("golden*"))
    for rank, file in enumerate(sorted(target.glob("*.pth"))):
        torch.save({"model": change(torch.load(file)["model"], rank)}, file)
    (target / "meta.json").write_text(json.dumps({"llama_type": "llama_ens_peft"}))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "lora_rank": RANK, "bias_tuning": False}))
    return target


def factors(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The factors in one of two shards: wq, wk, wv, w1, w3 are cut along the output, wo and w2 along the input."""
    found = {}
    for name in (*COLUMN, *ROW):
        weight = tensors[f"llma.layers.0.{name}.weight"]
        rows, cols = (
            (2 * weight.shape[0], weight.shape[1]) if name in COLUMN else (weight.shape[0], 2 * weight.shape[1])
        )
        generator = torch.Generator().manual_seed(len(name) * 31 + ord(name[-1]))
        down = torch.randn(RANK, cols, generator=generator)
        up = torch.randn(rows, RANK, generator=generator)
        found[f"llma.layers.0.{name}.lora_a.weight"] = down if name in COLUMN else down.chunk(2, 1)[rank].clone()
        found[f"llma.layers.0.{name}.lora_b.weight"] = up.chunk(2, 0)[rank].clone() if name in COLUMN else up
    return found


@pytest.fixture
def merged(golden: Path) -> dict[str, Tensor]:
    """What the model has to hold, shard by shard: output + lora_b(lora_a(x)) is weight + b @ a, not scaled."""
    found: dict[str, Tensor] = {}
    shards = [torch.load(file)["model"] for file in sorted((golden / "llama_ens").glob("*.pth"))]
    made = [factors(shard, rank) for rank, shard in enumerate(shards)]
    for name in (*COLUMN, *ROW):
        key, dim = f"llma.layers.0.{name}.", 0 if name in COLUMN else 1
        parts = [
            shard[f"{key}weight"] + own[f"{key}lora_b.weight"] @ own[f"{key}lora_a.weight"]
            for shard, own in zip(shards, made, strict=True)
        ]
        found[f"{key}weight"] = torch.cat(parts, dim)
    return found


def check(opened: checkpoint.Checkpoint, merged: dict[str, Tensor], plain: checkpoint.Checkpoint) -> None:
    key_map = checkpoint.sphinx_key_map(None)
    for name, wanted in merged.items():
        found = key_map.to_ours(name)
        assert found is not None
        torch.testing.assert_close(opened.read(found[0]), wanted, rtol=0, atol=TOLERANCE)
        assert not torch.equal(plain.read(found[0]), wanted)
    key = "llm.layers.1.attention.q_proj.weight"  # has no factors
    assert torch.equal(opened.read(key), plain.read(key))


def test_factors_beside_their_matrices_are_merged(golden: Path, tmp_path: Path, merged: dict[str, Tensor]) -> None:
    folder = write(golden, tmp_path / "m", lambda tensors, rank: tensors | factors(tensors, rank))
    with checkpoint.open(folder) as opened, checkpoint.open(golden / "llama_ens") as plain:
        assert opened.recipe == plain.recipe
        assert set(opened) == set(plain)
        check(opened, merged, plain)


def test_a_folder_of_factors_is_laid_over_its_base(golden: Path, tmp_path: Path, merged: dict[str, Tensor]) -> None:
    def trained(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        norms = {name: tensor * 1.5 for name, tensor in tensors.items() if name == "llma.layers.1.ffn_norm.weight"}
        return norms | factors(tensors, rank)

    tuned = write(golden, tmp_path / "tuned", trained)
    base = golden / "llama_ens"
    with pytest.raises(CheckpointError, match=r"q_proj\.weight' without the matrix; lay the folder over its base"):
        checkpoint.open(tuned)
    with checkpoint.open(base) as plain, checkpoint.open(base) as under:
        opened = checkpoint.overlay(under, tuned, defer_errors=True)
        check(opened, merged, plain)
        norm = "llm.layers.1.mlp_norm.weight"
        torch.testing.assert_close(opened.read(norm), plain.read(norm) * 1.5, rtol=0, atol=0)
    model = sphinxkit.load(base, overlay=tuned)
    wanted = merged["llma.layers.0.attention.wo.weight"]
    torch.testing.assert_close(model.llm.layers[0].attention.o_proj.weight.data, wanted, rtol=0, atol=TOLERANCE)


BIAS = "llma.layers.0.attention.wo.bias"


def test_biases_that_are_zero_add_nothing_and_others_are_refused(golden: Path, tmp_path: Path) -> None:
    zero = write(golden, tmp_path / "zero", lambda tensors, rank: tensors | {BIAS: torch.zeros(32)})
    with checkpoint.open(zero) as opened, checkpoint.open(golden / "llama_ens") as plain:
        assert set(opened) == set(plain)
    tuned = write(golden, tmp_path / "tuned", lambda tensors, rank: tensors | {BIAS: torch.eye(32)[0]})
    with pytest.raises(CheckpointError, match=rf"'{BIAS}' is a tuned bias, for which the language model here has no"):
        checkpoint.open(tuned)


A, B = "llma.layers.0.attention.wq.lora_a.weight", "llma.layers.0.attention.wq.lora_b.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.pop(B), rf"'{B}' is missing"),
        (
            lambda made: made.update({B: made[B][:, :2]}),
            r"lora_a\.weight' is \[3, \d+\], '.*lora_b\.weight' is \[\d+, 2\]",
        ),
        (lambda made: made.update({A: made[A][:, :5]}), r"q_proj\.weight' is \[.*\], its LoRA factors make \[\d+, 5\]"),
        (lambda made: made.update({"llma.wq.lora_a.weight": made[A]}), r"there is no matrix 'llma\.wq\.weight'"),
    ],
)
def test_factors_that_do_not_fit(
    golden: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    def broken(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
        made = factors(tensors, rank)
        change(made)
        return tensors | made

    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(write(golden, tmp_path / "m", broken))
