from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphinxkit import checkpoint, llama
from sphinxkit.checkpoint import MappingSource, ModuleSource
from sphinxkit.checkpoint.formats.hf import hf_key_map, rotary, rotary_to_halves, rotary_to_pairs
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.files import read_tensor_files

Model = tuple[MappingSource, dict[str, Any]]

# float32 sums in another order; measured 1e-7 on logits of scale 0.6
LOGITS_ATOL = 2e-6


@pytest.fixture
def folder(tmp_path: Path, text_model: Model) -> Path:
    source, recipe = text_model
    return checkpoint.save(tmp_path / "hf", source, format="hf", recipe=recipe)


def test_files_are_those_of_hugging_face(folder: Path, text_model: Model) -> None:
    from safetensors.torch import load_file

    source, _ = text_model
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    tensors = load_file(folder / "model.safetensors")
    key = source.read("llm.layers.1.attention.k_proj.weight")
    assert torch.equal(tensors["model.layers.1.self_attn.k_proj.weight"], rotary_to_halves(key, 2))
    assert torch.equal(tensors["lm_head.weight"], source.read("llm.lm_head.weight"))
    config = json.loads((folder / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["torch_dtype"] == "float32"


@pytest.mark.parametrize("layout", ["one", "sharded", "bin", "sharded bin"])
def test_reads_what_it_wrote(folder: Path, text_model: Model, same: Callable[..., None], layout: str) -> None:
    from safetensors.torch import load_file

    source, recipe = text_model
    if layout == "sharded":
        folder = checkpoint.save(folder, source, format="hf", recipe=recipe, max_shard_bytes=20_000, overwrite=True)
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    if "bin" in layout:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.rotary_emb.inv_freq"] = torch.ones(4)
        (folder / "model.safetensors").unlink()
        if layout == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            names = sorted(tensors)
            files = {"pytorch_model-1.bin": names[:5], "pytorch_model-2.bin": names[5:]}
            for name, keys in files.items():
                torch.save({key: tensors[key] for key in keys}, folder / name)
            weight_map = {key: name for name, keys in files.items() for key in keys}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with checkpoint.open(folder) as opened:
        assert opened.format == "hf"
        same(opened, source)
        assert opened.recipe == recipe


def test_tied_embeddings(folder: Path, write_json: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", tie_word_embeddings=True)
    with checkpoint.open(folder) as opened:
        assert "llm.lm_head.weight" not in opened.keys()  # noqa: SIM118
        assert opened.recipe["llm"]["tie_embeddings"] is True


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(("heads", "kv_heads", "layers", "factor"), [(4, 2, 2, None), (6, 6, 1, 2.0)])
def test_transformers_computes_the_same_both_ways(
    tmp_path: Path, heads: int, kv_heads: int, layers: int, factor: float | None
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16 * heads,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_scaling=None if factor is None else {"rope_type": "linear", "factor": factor, "rope_theta": 3000.0},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(0, 40, (2, 9))
    with checkpoint.open(tmp_path / "theirs") as opened:
        recipe = opened.recipe
        options = {key: value for key, value in recipe["llm"].items() if key not in ("type", "attention")}
        with torch.device("meta"):
            model = llama.create("llama", attention="eager", **options)
        wrapped = torch.nn.ModuleDict({"llm": model})
        checkpoint.load_into(wrapped, opened)
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(model(model.embed(ids)), expected, atol=LOGITS_ATOL, rtol=0)
    checkpoint.save(tmp_path / "ours", ModuleSource(wrapped), format="hf", recipe=recipe)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)  # the same tensors, bit for bit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "phi3"}, "config.json: model_type is 'phi3'; known: llama, mistral, mixtral, qwen2, qwen3"),
        ({"logit_scale": 0.5}, "unknown key 'logit_scale' with the value 0.5"),
        ({"hiden_act": "silu"}, "unknown key 'hiden_act' with the value 'silu'(?!; did)"),
        ({"quantization_config": {"bits": 4}}, r"unknown key 'quantization_config' with the value \{'bits': 4\}"),
        ({"sliding_window": 8}, "'sliding_window' is 8, which model_type 'llama' has not"),
        (
            {"model_type": "qwen3", "head_dim": 8, "use_sliding_window": True, "max_window_layers": 1},
            "'layer_types' or 'max_window_layers': the sliding window is for some layers only",
        ),
        ({"hidden_size": ...}, "'hidden_size' is None, expected a positive whole number"),
        ({"attention_bias": True}, "'attention_bias' is True; the model here only has False"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; the model here only has 'silu'"),
        ({"head_dim": 16}, r"q_proj.weight is \[32, 32\], the configuration asks for \[64, 32\]"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rotary scaling 'longrope' is not known"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 0}},
            "'rope_scaling.factor' is 0, expected a positive number",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "mrope_section": [1]}},
            r"unknown key 'mrope_section' of the rotary scaling with the value \[1\]",
        ),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5; the model here only has 1.0"),
        ({"num_hidden_layers": 1}, r"tensors of layers \[1\] exist"),
        ({"intermediate_size": 41}, r"gate_proj.weight is \[40, 32\], the configuration asks for \[41, 32\]"),
    ],
)
def test_configurations_that_do_not_fit(
    folder: Path, write_json: Callable[..., Path], changes: dict[str, object], message: str
) -> None:
    write_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(folder)


def test_unknown_tensors_and_no_llama(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"attention.q_proj.bias exists, the configuration has no such tensor"):
        checkpoint.open(folder)
    save_file(tensors | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.o_proj.bias' is not a name this format has"):
        checkpoint.open(folder)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no 'model.embed_tokens.weight', so it is not a Llama"):
        checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"needs model.safetensors or pytorch_model.bin, and config.json"):
        checkpoint.open(folder, format="hf")


def test_index_that_is_not_true(tmp_path: Path, text_model: Model, write_json: Callable[..., Path]) -> None:
    source, recipe = text_model
    folder = checkpoint.save(tmp_path / "hf", source, format="hf", recipe=recipe, max_shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    true = json.loads(index.read_text())["weight_map"]
    first, last = min(true.values()), max(true.values())
    name = next(key for key, file in true.items() if file == first)
    write_json(index, weight_map=true | {name: last})
    with pytest.raises(CheckpointError, match=rf"'{name}' should be in {last} but is not"):
        checkpoint.open(folder)
    write_json(index, weight_map=true | {name: "../other.safetensors"})
    with pytest.raises(CheckpointError, match=r"names files outside its folder:\n  - ../other.safetensors"):
        checkpoint.open(folder)
    write_json(index, weight_map=["a"])
    with pytest.raises(CheckpointError, match=r"has no weight_map of tensor names to file names"):
        read_tensor_files(index)
    write_json(index, weight_map=true)
    (folder / last).write_bytes((folder / first).read_bytes())
    with pytest.raises(CheckpointError, match=rf"is in {first} and in {last}"):
        checkpoint.open(folder)
    (folder / last).unlink()
    with pytest.raises(CheckpointError, match=rf"files that {index.name} names are missing; fetch them:\n  - {last}"):
        checkpoint.open(folder)


def test_an_index_names_what_is_derived(tmp_path: Path, text_model: Model, write_json: Callable[..., Path]) -> None:
    """A tied head and rotary frequencies may be listed and lie in no file, as transformers allows."""
    source, recipe = text_model
    recipe = recipe | {"llm": recipe["llm"] | {"tie_embeddings": True}}
    tied = MappingSource({key: source.read(key) for key in source.keys() if key != "llm.lm_head.weight"})  # noqa: SIM118
    folder = checkpoint.save(tmp_path / "hf", tied, format="hf", recipe=recipe, max_shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    true = json.loads(index.read_text())["weight_map"]
    more = dict.fromkeys(["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"], max(true.values()))
    write_json(index, weight_map=true | more)
    with checkpoint.open(folder) as opened:
        assert sorted(opened.keys()) == sorted(tied.keys())
    write_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' should be in .* but is not"):
        checkpoint.open(folder)


def test_shards_without_their_index(tmp_path: Path, text_model: Model) -> None:
    source, recipe = text_model
    folder = checkpoint.save(tmp_path / "hf", source, format="hf", recipe=recipe, max_shard_bytes=20_000)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"shards without their index; fetch model.safetensors.index.json"):
        checkpoint.open(folder)


def test_a_tokenizer_may_have_fewer_pieces_than_rows_but_not_more(
    tmp_path: Path, text_model: Model, golden: Path
) -> None:
    source, recipe = text_model
    tokenizer = golden / "llama_ens" / "tokenizer.model"
    with pytest.raises(
        CheckpointError, match=r"hf: the tokenizer has 512 pieces but the embedding has 24 rows; it is not the"
    ):
        checkpoint.save(tmp_path / "hf", source, format="hf", recipe=recipe, tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
    padded = {key: source.read(key) for key in source.keys()}  # noqa: SIM118
    for key in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
        padded[key] = torch.zeros(520, 32)
    folder = checkpoint.save(
        tmp_path / "hf", MappingSource(padded), format="hf", recipe=recipe, tokenizer=tokenizer.read_bytes()
    )
    with checkpoint.open(folder) as opened:
        assert opened.tokenizer_path == folder / "tokenizer.model"
        assert opened.recipe["llm"]["vocab_size"] == 520


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        ({"eos_token_id": 2}, None, None),  # Llama's own: nothing to say in a recipe
        ({"eos_token_id": None}, None, None),
        ({"eos_token_id": 5}, None, [5]),
        ({"eos_token_id": [2, 5]}, None, [2, 5]),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 7, 5]}, [2, 7, 5]),
        ({"eos_token_id": [5, 99999]}, {}, [5]),  # an id without a row is never written
    ],
)
def test_ids_that_end_an_answer(
    folder: Path,
    tmp_path: Path,
    write_json: Callable[..., Path],
    config: dict[str, object],
    generation_config: dict[str, object] | None,
    expected: list[int] | None,
) -> None:
    write_json(folder / "config.json", **config)
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    with checkpoint.open(folder) as opened:
        assert opened.recipe.get("end_ids") == expected
        again = checkpoint.save(tmp_path / "again", opened, format="hf")
    stated = json.loads((again / "config.json").read_text()).get("eos_token_id")
    assert stated == (expected or config["eos_token_id"])


def test_rows_beyond_the_tokenizer(tmp_path: Path, text_model: Model, golden: Path) -> None:
    """Formats that have a place for them keep them; the others say so before anything is written."""
    source, recipe = text_model
    padded = {key: source.read(key) for key in source.keys()}  # noqa: SIM118
    for key in ("llm.embed_tokens.weight", "llm.lm_head.weight"):
        padded[key] = torch.ones(513, 32)
    how = {"recipe": recipe, "tokenizer": golden / "llama_ens" / "tokenizer.model"}
    for name in ("sphinxkit", "hf"):
        folder = checkpoint.save(tmp_path / name, MappingSource(padded), format=name, **how)
        with checkpoint.open(folder) as opened:
            assert opened.shape("llm.embed_tokens.weight") == (513, 32)
            assert opened.tokenizer_path == folder / "tokenizer.model"
    for name in ("sphinx", "meta"):
        with pytest.raises(
            CheckpointError, match=rf"513 rows and the tokenizer 512 pieces; format '{name}' has no place"
        ):
            checkpoint.save(tmp_path / name, MappingSource(padded), format=name, **how)
        assert not (tmp_path / name).exists()


def test_a_head_of_its_own_beside_tied_embeddings(folder: Path, write_json: Callable[..., Path]) -> None:
    write_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but .*'lm_head.weight' that differs from"):
        checkpoint.open(folder)


@pytest.mark.parametrize("changes", [{"model_type": "qwen2_moe"}, {"num_local_experts": 8}])
def test_mixtures_of_experts(folder: Path, write_json: Callable[..., Path], changes: dict[str, object]) -> None:
    write_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=r"'\w+' is a mixture of experts; of those only 'mixtral' is known"):
        checkpoint.open(folder)


def test_a_tensor_that_the_index_does_not_list(
    tmp_path: Path, text_model: Model, write_json: Callable[..., Path]
) -> None:
    source, recipe = text_model
    folder = checkpoint.save(tmp_path / "hf", source, recipe=recipe, format="hf", max_shard_bytes=20_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    file = index.pop("model.norm.weight")
    write_json(path, weight_map=index)
    with pytest.raises(CheckpointError, match=rf"'model.norm.weight' is in {file} but not in model.safetensors.index"):
        checkpoint.open(folder)


def test_without_an_embedding_all_else_is_listed_too(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    save_file({**tensors, "what": tensors["lm_head.weight"].clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not fit together") as caught:
        checkpoint.open(folder)
    assert "'what' is not a name this format has" in str(caught.value)
    assert "there is no 'model.embed_tokens.weight'" in str(caught.value)
    assert "('model.norm.weight' in the files) is missing" in str(caught.value)


def test_rotary_order_by_hand() -> None:
    # one head of width 6: Hugging Face keeps the even rows of Meta's first, then the odd ones
    pairs = torch.tensor([[0], [1], [2], [3], [4], [5]])
    halves = torch.tensor([[0], [2], [4], [1], [3], [5]])
    assert rotary_to_halves(pairs, 1).tolist() == halves.tolist()
    assert rotary_to_pairs(halves, 1).tolist() == pairs.tolist()
    two_heads = torch.tensor([[0], [2], [1], [3], [4], [6], [5], [7]])
    assert rotary_to_pairs(two_heads, 2).flatten().tolist() == list(range(8))


@given(heads=st.integers(1, 5), half=st.integers(1, 4), width=st.integers(1, 3))
def test_rotary_order_there_and_back(heads: int, half: int, width: int) -> None:
    rows = heads * 2 * half
    tensor = torch.arange(rows * width).reshape(rows, width)
    assert torch.equal(rotary_to_pairs(rotary_to_halves(tensor, heads), heads), tensor)
    assert torch.equal(rotary_to_halves(rotary_to_pairs(tensor, heads), heads), tensor)


def test_only_query_and_key_are_reordered() -> None:
    key_map = hf_key_map()
    tensor = torch.arange(8).reshape(8, 1)
    query = key_map.to_ours("model.layers.0.self_attn.q_proj.weight")
    key = key_map.to_ours("model.layers.0.self_attn.k_proj.weight")
    value = key_map.to_ours("model.layers.0.self_attn.v_proj.weight")
    assert query is not None
    assert key is not None
    assert value is not None
    reorder_query, reorder_key = rotary(rotary_to_pairs, query[1], 2, 1), rotary(rotary_to_pairs, key[1], 2, 1)
    assert reorder_query is not None
    assert reorder_key is not None
    assert torch.equal(reorder_query(tensor), rotary_to_pairs(tensor, 2))
    assert torch.equal(reorder_key(tensor), rotary_to_pairs(tensor, 1))
    assert rotary(rotary_to_pairs, value[1], 2, 1) is None
