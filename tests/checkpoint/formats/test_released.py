from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.checkpoint.formats.released import sphinx_key_map, vision_of_type
from sphinxkit.errors import CheckpointError

LLAMA_TYPES = ("llama_ens", "llama_ens5", "llama_ens_light", "llama_ens5_light")
UNUSED_LIGHT = ["llma.dinov2_vitg14.mask_token"]

Copy = Callable[..., Path]


def load_shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    return [torch.load(path, weights_only=True)["model"] for path in paths]


def change_shard(folder: Path, rank: int, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = sorted(folder.glob("consolidated.*.pth"))[rank]
    content = torch.load(path, weights_only=True)
    change(content["model"])
    torch.save(content, path)
    return path


@pytest.mark.parametrize("llama_type", LLAMA_TYPES)
def test_every_tensor_is_the_merge_of_its_slices(golden: Path, llama_type: str) -> None:
    first, second = load_shards(golden / llama_type)
    key_map = sphinx_key_map(vision_of_type(llama_type, ""))
    with checkpoint.open(golden / llama_type) as opened:
        assert opened.format == "sphinx"
        assert len(opened) + len(opened.unused) == len(first)
        for name, a in first.items():
            b = second[name]
            if name.endswith(("tok_embeddings.weight", "wo.weight", "w2.weight")):
                expected = torch.cat([a, b], 1)
            elif name.endswith(("output.weight", "wq.weight", "wk.weight", "wv.weight")) or ".feed_forward.w" in name:
                expected = torch.cat([a, b], 0)
            else:
                expected = a
            found = key_map.to_ours(name)
            source, key = (opened.unused, name) if name in opened.unused else (opened, found[0] if found else "")
            assert source.shape(key) == tuple(expected.shape)
            assert source.dtype(key) == torch.float32
            assert torch.equal(source.read(key), expected), name


def test_what_the_files_say(golden: Path) -> None:
    with checkpoint.open(golden / "llama_ens5_light") as opened:
        assert opened.tokenizer_path == golden / "llama_ens5_light" / "tokenizer.model"
        assert opened.metadata["llama_type"] == "llama_ens5_light"
        assert opened.metadata["num_shards"] == 2
        assert [path.name for path in opened.files] == [f"consolidated.0{rank}-of-02.model.pth" for rank in (0, 1)]
        assert list(opened.unused.keys()) == UNUSED_LIGHT
        assert opened.recipe == {
            "kind": "model",
            "vision": {
                "image_size": 1024,
                "tiler": {"type": "grid", "rows": 2, "cols": 2, "tile_size": 512, "thumbnail": True},
                "branches": [
                    {
                        "encoders": [
                            {
                                "type": "convnext_xxlarge",
                                "input_size": 512,
                                "depths": [1, 1, 1, 1],
                                "dims": [8, 16, 32, 64],
                            },
                            {
                                "type": "dinov2_vit_giant_patch14",
                                "tile_size": 224,
                                "embed_dim": 28,
                                "num_layers": 2,
                                "num_heads": 2,
                            },
                        ],
                        "mixer": {"type": "channel", "grid": [16, 16]},
                        "projector": {"type": "linear", "norm": "layer"},
                    }
                ],
                "mixer": "sequence",
            },
            "llm": {
                "type": "llama",
                "vocab_size": 512,
                "embed_dim": 64,
                "num_layers": 3,
                "num_heads": 4,
                "hidden_dim": 192,
                "num_kv_heads": 2,
                "attention": "auto",
            },
            "conversation": "sphinx_v1",
        }
        opened.recipe["kind"] = "changed"
        assert opened.recipe["kind"] == "model"


def test_shards_are_mapped_and_let_go(golden: Path) -> None:
    folder = golden / "llama_ens_light"
    with checkpoint.open(folder) as opened:
        kept = opened.read("llm.norm.weight")
        expected = kept.clone()
    with pytest.raises(CheckpointError, match="is closed"):
        opened.read("llm.norm.weight")
    with pytest.raises(CheckpointError, match="is closed"):
        opened.unused.read(UNUSED_LIGHT[0])
    assert torch.equal(kept, expected)


def test_replicas_that_differ(released: Copy) -> None:
    folder = released()
    path = change_shard(folder, 1, lambda tensors: tensors["llma.norm.weight"].add_(1))
    with checkpoint.open(folder) as opened:
        with pytest.raises(
            CheckpointError, match=rf"{path.name}: 'llma.norm.weight' should be the same in every shard"
        ):
            opened.read("llm.norm.weight")
        opened.read("llm.lm_head.weight")
    with checkpoint.open(folder, replicas="first") as opened:
        assert torch.equal(opened.read("llm.norm.weight"), load_shards(folder)[0]["llma.norm.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("llma.norm.weight"), r"'llma.norm.weight' is missing in consolidated.01-of-02.model.pth"),
        (lambda t: t.update({"llma.x": torch.zeros(1)}), r"'llma.x' is missing in consolidated.00-of-02.model.pth"),
        (
            lambda t: t.update({"llma.output.weight": torch.zeros(255, 64)}),
            r"consolidated.01-of-02.model.pth: 'llma.output.weight' is \[255, 64\] float32, but \[256, 64\] float32 in",
        ),
        (lambda t: t.update({"llma.norm.weight": torch.zeros(64).half()}), r"is \[64\] float16, but \[64\] float32"),
    ],
)
def test_shards_that_do_not_fit_each_other(released: Copy, change: Callable[[Any], object], message: str) -> None:
    folder = released()
    change_shard(folder, 1, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(folder)


def test_missing_shard(released: Copy) -> None:
    folder = released()
    (folder / "consolidated.01-of-02.model.pth").unlink()
    with pytest.raises(CheckpointError, match=r"shards are missing; fetch them:\n  - consolidated.01-of-02.model.pth"):
        checkpoint.open(folder)


def test_one_shard_twice(released: Copy) -> None:
    folder = released()
    first, second = sorted(folder.glob("consolidated.*.pth"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=f"{second.name} is a copy of {first.name}: every slice is the same"):
        checkpoint.open(folder)


def test_unknown_names_are_listed(released: Copy) -> None:
    folder = released()
    for rank in (0, 1):
        change_shard(folder, rank, lambda tensors: tensors.update({"llma.adapter.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"'llma.adapter.weight' is not a name this format has"):
        checkpoint.open(folder)


def test_truncated_shard(released: Copy) -> None:
    folder = released()
    path = folder / "consolidated.01-of-02.model.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"consolidated.01-of-02.model.pth: not a readable torch file"):
        checkpoint.open(folder)


def test_changed_shard_is_found_when_asked(released: Copy) -> None:
    folder = released()
    path = folder / "consolidated.00-of-02.model.pth"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(
        CheckpointError, match=r"consolidated.00-of-02.model.pth: record .* does not match its checksum"
    ):
        checkpoint.open(folder, verify=True)


def test_configuration_errors_name_the_file(released: Copy, write_json: Callable[..., Path]) -> None:
    folder = released()
    write_json(folder / "config.json", n_headz=4)
    with pytest.raises(CheckpointError, match=r"config.json: unknown keys:\n  - 'n_headz'$"):  # n_heads is there
        checkpoint.open(folder)
    write_json(folder / "config.json", n_headz=..., n_layers=2)
    with pytest.raises(CheckpointError, match=r"config.json and the tensors .*\n.*tensors of layers \[2\] exist"):
        checkpoint.open(folder)
    write_json(folder / "config.json", n_layers=3, multiple_of=256)
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight is \[192, 64\], the configuration asks for \[256, 64\]"
    ):
        checkpoint.open(folder)
    write_json(folder / "config.json", multiple_of=32)
    write_json(folder / "encoders.json", convnext={"kernel_size": 3})
    with pytest.raises(CheckpointError, match=r"encoders.json cannot be followed"):
        checkpoint.open(folder)


@pytest.mark.parametrize(
    ("llama_type", "message"),
    [
        ("mixtral", "meta.json: llama_type 'mixtral' is a mixture of experts whose shards hold whole experts each"),
        ("lama_ens", r"unknown llama_type 'lama_ens'; did you mean 'llama_ens'\?.*Known: llama, llama_ens, llama_ens5"),
        (5, "'llama_type' is 5, expected a name"),
        ("llama", r"'llma.start_img' is not a name this format has"),
    ],
)
def test_types_that_cannot_be_read(
    released: Copy, write_json: Callable[..., Path], llama_type: object, message: str
) -> None:
    folder = released()
    write_json(folder / "meta.json", llama_type=llama_type)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(folder)


def test_tokenizer_of_another_model(released: Copy, golden: Path) -> None:
    folder = released()
    for rank in (0, 1):

        def shorten(tensors: dict[str, torch.Tensor]) -> None:
            tensors["llma.tok_embeddings.weight"] = tensors["llma.tok_embeddings.weight"][:500].clone()
            tensors["llma.output.weight"] = tensors["llma.output.weight"][:250].clone()

        change_shard(folder, rank, shorten)
    with pytest.raises(
        CheckpointError, match=r"tokenizer.model: the tokenizer has 512 pieces but the embedding has 500"
    ):
        checkpoint.open(folder)
    (folder / "tokenizer.model").unlink()
    with checkpoint.open(folder) as opened:
        assert opened.tokenizer_path is None
        assert opened.recipe["llm"]["vocab_size"] == 500


def test_without_configuration_tensors_can_still_be_read(released: Copy, golden: Path) -> None:
    folder = released("llama_ens5")
    (folder / "meta.json").unlink()
    with checkpoint.open(folder) as opened, checkpoint.open(golden / "llama_ens5") as whole:
        assert list(opened.keys()) == list(whole.keys())
        assert not opened.has_recipe
        with pytest.raises(CheckpointError, match=r"there is no meta.json.*llama_type="):
            _ = opened.recipe
    with checkpoint.open(folder, llama_type="llama_ens5") as opened, checkpoint.open(golden / "llama_ens5") as whole:
        assert opened.recipe == whole.recipe
    (folder / "config.json").unlink()
    with (
        checkpoint.open(folder) as opened,
        pytest.raises(CheckpointError, match=r"there is no config.json, so the model's numbers are not known"),
    ):
        _ = opened.recipe


@pytest.mark.parametrize("llama_type", ["llama", "llama_ens5"])
@pytest.mark.parametrize("count", [1, 2])
def test_language_model_alone(
    released: Copy, write_json: Callable[..., Path], golden: Path, llama_type: str, count: int
) -> None:
    folder = released("llama_ens5")
    text = ("llma.tok_embeddings", "llma.layers", "llma.norm", "llma.output")
    with checkpoint.open(golden / "llama_ens5") as whole:
        if count == 1:
            key_map = sphinx_key_map(None)
            tensors = {}
            for key in whole.keys():  # noqa: SIM118
                found = key_map.to_theirs(key)
                if found is not None:
                    tensors[found[0]] = whole.read(key).clone()
            for path in folder.glob("*.pth"):
                path.unlink()
            torch.save(tensors, folder / "consolidated.00-of-01.model.pth")
        else:
            for rank in (0, 1):
                change_shard(folder, rank, lambda t: [t.pop(n) for n in list(t) if not n.startswith(text)])
        write_json(folder / "meta.json", llama_type=llama_type)
        with checkpoint.open(folder) as opened:
            assert opened.recipe == {"kind": "model", "llm": whole.recipe["llm"], "conversation": "sphinx_v1"}
            assert list(opened.keys()) == [key for key in whole.keys() if key.startswith("llm.")]  # noqa: SIM118
            assert torch.equal(opened.read("llm.embed_tokens.weight"), whole.read("llm.embed_tokens.weight"))


def test_no_shards_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no consolidated.NN-of-MM.model.pth in it"):
        checkpoint.open(tmp_path, format="sphinx")


def test_differences_to_a_base(released: Copy) -> None:
    folder = released()
    for path in folder.glob("consolidated.*.pth"):
        path.rename(folder / path.name.replace(".model.", ".model-diff."))
    with pytest.raises(CheckpointError, match=r"only differences to a base model.*delta=True"):
        checkpoint.open(folder)
    with checkpoint.open(folder, delta=True) as opened:
        assert opened.read("llm.norm.weight").shape == (64,)


def test_every_wrong_key_in_one_error(released: Copy) -> None:
    folder = released()

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["llma.adapter.weight"] = torch.zeros(2)
        del tensors["llma.layers.0.attention_norm.weight"]
        del tensors["llma.dinov2_vitg14.norm.weight"]
        tensors["llma.norm.weight"] = torch.zeros(3)
        tensors["llma.start_img"] = torch.zeros(1, 1, 3)
        tensors["llma.end_img"] = tensors["llma.end_img"].long()

    for rank in (0, 1):
        change_shard(folder, rank, damage)
    with pytest.raises(CheckpointError, match="does not fit the model") as caught:
        sphinxkit.load(folder)
    lines = str(caught.value).split("\n  - ")[1:]
    assert len(lines) == 6
    text = "\n".join(lines)
    assert "'llma.adapter.weight' is not a name this format has" in text
    assert (
        "'llm.layers.0.attention_norm.weight' ('llma.layers.0.attention_norm.weight' in the files) is missing" in text
    )
    assert "('llma.dinov2_vitg14.norm.weight' in the files) is missing" in text
    assert "llm.norm.weight is [3], the configuration asks for [64]" in text
    assert "('llma.start_img' in the files) is [1, 1, 3] in the checkpoint, [1, 1, 64] in the model" in text
    assert "('llma.end_img' in the files) is torch.int64 in the checkpoint, torch.float32 in the model" in text
    with pytest.raises(CheckpointError, match="do not fit together") as caught:
        checkpoint.open(folder)
    assert "'llma.adapter.weight' is not a name this format has" in str(caught.value)
    assert "('llma.layers.0.attention_norm.weight' in the files) is missing" in str(caught.value)
    with checkpoint.open(folder, defer_errors=True) as opened:
        assert opened.errors == (
            "'llma.adapter.weight' is not a name this format has",
            "llm.norm.weight is [3], the configuration asks for [64]",
        )


def test_without_an_embedding(released: Copy, write_json: Callable[..., Path]) -> None:
    folder = released()
    for rank in (0, 1):
        change_shard(folder, rank, lambda t: [t.pop(n) for n in ("llma.tok_embeddings.weight", "llma.norm.weight")])
    with pytest.raises(CheckpointError, match="does not fit the model") as caught:
        sphinxkit.load(folder)
    assert "'llm.embed_tokens.weight' ('llma.tok_embeddings.weight' in the files) is missing" in str(caught.value)
    assert "'llm.norm.weight' ('llma.norm.weight' in the files) is missing" in str(caught.value)
    (folder / "tokenizer.model").unlink()
    write_json(folder / "config.json", vocab_size=-1)
    message = (
        r"(?s)no embedding \('llm.embed_tokens.weight', 'llma.tok_embeddings.weight' in the files\); and:.*"
        r"'llma.norm.weight' in the files\) is missing"
    )
    with pytest.raises(CheckpointError, match=message):
        sphinxkit.load(folder)


def test_replicas_and_types_from_load(released: Copy) -> None:
    folder = released()
    change_shard(folder, 1, lambda tensors: tensors["llma.norm.weight"].add_(1))
    (folder / "meta.json").unlink()
    with pytest.raises(CheckpointError, match=r"pass llama_type="):
        sphinxkit.load(folder)
    with pytest.raises(CheckpointError, match=r"pass replicas='first'"):
        sphinxkit.load(folder, llama_type="llama_ens_light")
    model = sphinxkit.load(folder, llama_type="llama_ens_light", replicas="first")
    assert torch.equal(model.llm.norm.weight, load_shards(folder)[0]["llma.norm.weight"])


def test_experts_are_refused_by_name(released: Copy, write_json: Callable[..., Path]) -> None:
    folder = released()
    write_json(folder / "config.json", moe={"num_experts": 8})
    with pytest.raises(CheckpointError, match="config.json: 'moe': a mixture of experts, but the files hold none"):
        checkpoint.open(folder)
    (folder / "meta.json").unlink()
    for rank in (0, 1):
        change_shard(
            folder, rank, lambda t: t.update({"llma.layers.0.feed_forward.experts.0.w1.weight": torch.zeros(1)})
        )
    with pytest.raises(CheckpointError, match=r"experts.0.w1.weight' belongs to a mixture of experts of another kind"):
        checkpoint.open(folder)


def test_reading_by_index_and_iteration(golden: Path) -> None:
    with checkpoint.open(golden / "llama_ens_light") as opened:
        assert list(opened) == list(opened.keys())
        assert torch.equal(opened["llm.norm.weight"], opened.read("llm.norm.weight"))
        with pytest.raises(CheckpointError, match=r"holds no tensor 'llm.nrom.weight'; did you mean 'llm.norm.weight'"):
            _ = opened["llm.nrom.weight"]
        assert [name for name in opened.unused] == list(opened.unused.keys())  # noqa: C416
