"""LLaMA's descendants against transformers: the same random weights through both directions of the "hf" format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphinxkit import checkpoint, llama
from sphinxkit.checkpoint.formats.hf import rotary_to_halves
from sphinxkit.llama import LlamaModel
from sphinxkit.llama.moe import MoEOptions
from sphinxkit.tensor_source import ModuleSource

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

# float32 sums in another order: measured up to 2e-6 on logits of about 3
ATOL = 2e-5
VOCABULARY, WIDTH = 50, 40

Case = tuple[str, dict[str, Any], dict[str, Any]]

# name -> class, what differs from the common numbers, what the model here must be built with
CASES: dict[str, Case] = {
    "llama3": (
        "Llama",
        {
            "rope_theta": 500.0,
            "rope_scaling": {
                **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 16,
            },
        },
        {"rope_theta": 500.0},
    ),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_theta": 1e5}, {"tie_embeddings": True}),
    "yi": ("Llama", {"rope_theta": 5e6, "num_key_value_heads": 1}, {"num_kv_heads": 1}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"rope_scaling": 0.25}),
    "dynamic": (
        "Llama",
        {"max_position_embeddings": 10, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
        {"max_seq_len": 30},
    ),
    "mistral": ("Mistral", {"sliding_window": 6}, {"sliding_window": 6}),
    "mistral without a window": ("Mistral", {"sliding_window": None, "head_dim": 6}, {"head_dim": 6}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True, "tie_embeddings": True}),
    "qwen2 yarn": (
        "Qwen2",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {"qkv_bias": True, "max_seq_len": 128},
    ),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e6},
        {"moe": MoEOptions(4, 2, 0.002), "rope_theta": 1e6},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}, {"qk_norm": True, "head_dim": 16}),
    "qwen3 window": (
        "Qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        {"qk_norm": True, "head_dim": 16, "sliding_window": 5},
    ),
    "qwen3 yarn": (
        "Qwen3",
        {
            "head_dim": 12,
            "rope_scaling": {
                **{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 4.0},
                **{"beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False},
            },
        },
        {"qk_norm": True, "max_seq_len": 128},
    ),
}


def their_model(name: str) -> Any:
    kind, changes, _ = CASES[name]
    options = {
        **{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 56, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
        **{"rope_theta": 1000.0, "attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2, **changes},
    }
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.ndim == 1:
                parameter.normal_(std=0.5, generator=generator)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return theirs


def our_model(folder: Path, attention: str = "sdpa") -> tuple[nn.ModuleDict, dict[str, Any]]:
    with checkpoint.open(folder) as opened:
        recipe = opened.recipe
        options = {key: value for key, value in recipe["llm"].items() if key not in ("type", "attention")}
        with torch.device("meta"):
            model = llama.create("llama", attention=attention, **options)
        wrapped = nn.ModuleDict({"llm": model})
        checkpoint.load_into(wrapped, opened)
    return wrapped, recipe


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_as_transformers(name: str, tmp_path: Path) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    wrapped, recipe = our_model(tmp_path / "theirs")
    model: LlamaModel = wrapped["llm"]
    assert {key: getattr(model, key) for key in CASES[name][2]} == CASES[name][2]
    ids = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(1))

    ours, expected = model(model.embed(ids)), theirs(ids).logits
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)
    for logits in (ours, expected):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    check_gradients(model, theirs)

    check_decoding(model, theirs, ids[:1, :7])

    checkpoint.save(tmp_path / "ours", ModuleSource(wrapped), format="hf", recipe=recipe)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, atol=0, rtol=0)  # the same tensors, bit for bit
    without_window = name == "mistral without a window"  # Llama computes the same
    assert type(again).__name__ == ("LlamaForCausalLM" if without_window else type(theirs).__name__)


def check_gradients(model: LlamaModel, theirs: Any) -> None:
    key_map = checkpoint.formats.hf.hf_key_map()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name in [name for name in grads if ".mlp.experts." in name or ".mlp.gate.weight" in name]:
        layer, grad = model.layers[int(name.split(".")[2])].mlp, grads[name]
        own = layer.router.weight.grad  # here and in files the matrices of experts are apart
        if "gate_up" in name:
            own = torch.cat([layer.experts.gate_proj.grad, layer.experts.up_proj.grad], 1)
        elif "down" in name:
            own = layer.experts.down_proj.grad.transpose(1, 2)
        torch.testing.assert_close(own, grad, atol=ATOL, rtol=0, msg=name)
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name or ".mlp.router." in name:
            continue
        found = key_map.to_theirs(f"llm.{name}")
        assert found is not None
        heads = {None: None, "query": model.num_heads, "key": model.num_kv_heads, "head": 1}[found[1].rotary]
        grad = parameter.grad if heads is None else rotary_to_halves(parameter.grad, heads)
        torch.testing.assert_close(grad, grads[found[0]], atol=ATOL, rtol=0, msg=name)


def check_decoding(model: LlamaModel, theirs: Any, ids: Tensor) -> None:
    """A prompt and single tokens through both caches, greedily."""
    cache = model.make_cache(1, 24)
    with torch.no_grad():
        past = transformers.DynamicCache(config=theirs.config)
        logits, expected = model.prefill(model.embed(ids), cache), theirs(ids, past_key_values=past).logits[:, -1:]
        for _ in range(12):
            torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)
            token = expected.argmax(-1)
            assert torch.equal(logits.argmax(-1), token)
            logits, expected = model.decode(token, cache), theirs(token, past_key_values=past).logits
