"""The same random weights in Hugging Face's LLaMA give the same logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sphinxkit.llama import LlamaModel, llama

# float32 sums in another order: a few 1e-7 of logits of about 3, over two to three layers
LOGITS_TOLERANCE = 2e-5
GRAD_TOLERANCE = 2e-5
NAMES = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "mlp": "mlp",
}


def halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of q_proj or k_proj so that channel 2i of a head becomes i, and 2i + 1 becomes i + D/2."""
    head_dim = weight.shape[0] // num_heads
    order = [2 * i for i in range(head_dim // 2)] + [2 * i + 1 for i in range(head_dim // 2)]
    rows = [head * head_dim + channel for head in range(num_heads) for channel in order]
    return weight[rows]


def hf_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] != "layers":
        return ".".join([NAMES[parts[0]], *parts[1:]])
    return ".".join(["model.layers", parts[1], NAMES[parts[2]], *parts[3:]])


def hf_twin(model: LlamaModel) -> Any:
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default"}
    if model.rope_scaling is not None:
        rope = {"rope_type": "linear", "factor": 1 / model.rope_scaling}
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.embed_dim,
        intermediate_size=model.hidden_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.max_seq_len,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_theta": model.rope_theta, **rope},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    twin = transformers.LlamaForCausalLM(config)
    state = {}
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": model.num_heads, "k_proj": model.num_kv_heads}.get(name.split(".")[-2])
        state[hf_name(name)] = tensor if heads is None else halves(tensor, heads)
    twin.load_state_dict(state, strict=True)
    return twin


@pytest.mark.parametrize(
    ("embed_dim", "num_layers", "num_heads", "num_kv_heads", "theta", "scaling", "eps"),
    [
        (48, 2, 4, 4, 10000.0, None, 1e-5),
        (64, 3, 8, 2, 500000.0, None, 1e-6),
        (48, 3, 6, 1, 100.0, 0.25, 1e-3),
    ],
)
def test_logits_and_gradients_equal_hugging_faces(
    embed_dim: int, num_layers: int, num_heads: int, num_kv_heads: int, theta: float, scaling: float | None, eps: float
) -> None:
    model = llama(
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        hidden_dim=72,
        vocab_size=97,
        max_seq_len=64,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=eps,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=embed_dim**-0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    twin = hf_twin(model)
    ids = torch.randint(97, (3, 23), generator=generator)
    ours, theirs = model(model.embed(ids)), twin(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=LOGITS_TOLERANCE, rtol=0)
    for logits in (ours, theirs):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    their_grads = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        heads = {"q_proj": num_heads, "k_proj": num_kv_heads}.get(name.split(".")[-2])
        grad = parameter.grad if heads is None else halves(parameter.grad, heads)
        torch.testing.assert_close(grad, their_grads[hf_name(name)], atol=GRAD_TOLERANCE, rtol=0)
