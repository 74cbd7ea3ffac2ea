"""Folders that transformers wrote, mixed and read by transformers again; the same folders mixed by mergekit."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.checkpoint import ModuleSource
from tests.recipe.test_other_models import llm, read, write

SMALL = {"vocab_size": 64, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 16, "tie_embeddings": True},
    "mistral": {"sliding_window": 8},
    "llama": {
        "rope_scaling": {
            **{"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_seq_len": 64,
        }
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_mixes_of_language_models_that_the_library_knows(family: str, tmp_path: Path) -> None:
    """By canonical names and by the files' own the result is the same; it loads with every option."""
    recipe = {"kind": "model", "llm": {"type": "llama", **SMALL, **FAMILIES[family]}}
    states = []
    for index in range(2):
        torch.manual_seed(index)
        model = sphinxkit.build(recipe)
        states.append({key: tensor.clone() for key, tensor in model.state_dict().items()})
        folder = tmp_path / str(index)
        checkpoint.save(folder, ModuleSource(model), format="hf", recipe=sphinxkit.Recipe(recipe).resolved())
    folders = [tmp_path / "0", tmp_path / "1"]
    sphinxkit.mix(folders, tmp_path / "mixed", beta=0.25)
    mixed = sphinxkit.load(tmp_path / "mixed")
    for key, tensor in mixed.state_dict().items():
        assert torch.equal(tensor, 0.25 * states[0][key] + 0.75 * states[1][key])
    for option, value in FAMILIES[family].items():
        found = getattr(mixed.llm, option, None)
        assert found == value or (
            option == "tie_embeddings" and mixed.llm.lm_head.weight is mixed.llm.embed_tokens.weight
        )
    sphinxkit.mix(folders, tmp_path / "by_name", beta=0.25, format="safetensors")
    one, other = read(tmp_path / "mixed"), read(tmp_path / "by_name")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def tiny_llava(seed: int) -> Any:
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 66,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=65,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_a_tuned_llama_into_a_llava_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vlm = tiny_llava(0)
    vlm.save_pretrained(tmp_path / "vlm")
    torch.manual_seed(7)
    numbers = vlm.config.text_config.to_dict() | {"vocab_size": 64}
    tuned = transformers.LlamaForCausalLM(transformers.LlamaConfig(**numbers)).eval()
    tuned.save_pretrained(tmp_path / "llm")
    sphinxkit.mix([tmp_path / "vlm", tmp_path / "llm"], tmp_path / "out", beta=0, rename="llm_into_vlm")
    mixed = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(64, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(mixed(input_ids=ids).logits[..., :64], tuned(input_ids=ids).logits)
    tower = [key for key in vlm.state_dict() if "vision_tower" in key or "projector" in key]
    assert tower
    assert all(torch.equal(mixed.state_dict()[key], vlm.state_dict()[key]) for key in tower)

    other = tiny_llava(1)
    other.save_pretrained(tmp_path / "other", max_shard_size="40KB")
    sphinxkit.mix([tmp_path / "vlm", tmp_path / "other"], tmp_path / "half", beta=0.5)
    half = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "half").state_dict()
    for key, tensor in vlm.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(half[key], 0.5 * tensor + 0.5 * other.state_dict()[key])


@pytest.mark.integration
@pytest.mark.skipif("SPHINXKIT_MERGEKIT" not in os.environ, reason="SPHINXKIT_MERGEKIT does not name a mergekit-yaml")
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
def test_mergekit_makes_the_same_of_the_same_folders(method: str, tmp_path: Path) -> None:
    layer = "model.layers.{}."
    names = [f"mlp.{name}_proj" for name in ("gate", "up", "down")] + [f"self_attn.{name}_proj" for name in "kvo"]

    def whole(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tensors = llm(seed)
        for start in map(layer.format, range(2)):
            tensors |= {f"{start}{name}.weight": torch.randn(8, 8, generator=generator) for name in names}
            tensors |= {f"{start}{name}_layernorm.weight": torch.ones(8) for name in ("input", "post_attention")}
        return {key: tensor.bfloat16() for key, tensor in tensors.items()}

    numbers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 12, **numbers}
    first, second, base = (write(tmp_path / str(seed), whole(seed), **config) for seed in range(3))
    lines = "".join(
        f"  - {{model: {path}, parameters: {{weight: {weight}}}}}\n" for path, weight in ((first, 0.75), (second, 0.25))
    )
    ancestor = {"linear": "", "slerp": f"base_model: {first}\n", "task_arithmetic": f"base_model: {base}\n"}[method]
    text = f"models:\n{lines}merge_method: {method}\n{ancestor}parameters: {{normalize: false, t: 0.25}}\n"
    (tmp_path / "plan.yaml").write_text(text + "dtype: float32\nout_dtype: bfloat16\n")
    program = os.environ["SPHINXKIT_MERGEKIT"]
    command = [program, tmp_path / "plan.yaml", tmp_path / "theirs", "--allow-crimes", "--no-copy-tokenizer"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    options: dict[str, Any] = {"base": base} if method == "task_arithmetic" else {}
    weights = None if method == "slerp" else [0.75, 0.25]
    beta = 0.75 if method == "slerp" else None
    sphinxkit.mix(
        [first, second], tmp_path / "ours", method=method, beta=beta, weights=weights, format="safetensors", **options
    )
    ours = read(tmp_path / "ours")
    theirs = {
        key: tensor for file in (tmp_path / "theirs").glob("*.safetensors") for key, tensor in load_file(file).items()
    }
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if method == "slerp":  # the angle in float32 and float64: a rounding of bf16
            torch.testing.assert_close(tensor, theirs[key], rtol=2**-7, atol=1e-6)
        else:  # weights are powers of two, so nothing is rounded before bf16
            assert torch.equal(tensor, theirs[key])
