"""The tiny checkpoints of the public implementation, end to end, and the families that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import sphinxkit
from sphinxkit.errors import DataError
from sphinxkit.evaluation.parity import LOGITS_ATOL, VISUAL_ATOL, GoldenData, compare
from sphinxkit.sphinx_model import SphinxModel

TINY = ["llama_ens", "llama_ens5", "llama_ens_light", "llama_ens5_light", "mixtral_sparse_ens5"]
# Sums over all tokens in float32: measured 1e-6, and any wrong label or cast costs a thousand times that
GRADIENT_RTOL = 1e-4
# of about 8, float32
LOSS_ATOL = 1e-5


@pytest.fixture(scope="module", params=TINY)
def pair(request: pytest.FixtureRequest, golden: Path) -> tuple[SphinxModel, GoldenData]:
    folder = golden / request.param
    return sphinxkit.load(folder), GoldenData(folder)


def test_everything_a_user_sees(pair: tuple[SphinxModel, GoldenData]) -> None:
    model, golden = pair
    results = list(compare(model, golden))
    assert [str(result) for result in results if not result.is_equal] == []
    views = golden.facts["views"]["n_encoder_views"]
    assert len(results) == 3 + views + 2 + 2 + 2 + 6
    assert all(result.tolerance is not None for result in results)


def test_a_batch_keeps_images_and_views_apart(pair: tuple[SphinxModel, GoldenData]) -> None:
    model, golden = pair
    tokens = model.encode_images(model.preprocess([golden.image("wide"), golden.image("tall")]))
    views = golden.facts["views"]["n_encoder_views"]
    per_view = tokens.view(2, views, -1, tokens.shape[-1])[:, :, 1:-1]
    for name, view in (("first_view", 0), ("last_view", -1)):
        expected = golden.tensors.get(f"visual_tokens_batch_wide_tall.{name}.every3rd")
        if expected is not None:
            torch.testing.assert_close(per_view[:, view, ::3], expected, atol=VISUAL_ATOL, rtol=0)


def test_logits_through_the_cache(pair: tuple[SphinxModel, GoldenData]) -> None:
    model, golden = pair
    tokens = golden.tensors["logits.tokens"]
    images = model.encode_images(model.preprocess([golden.image(n) for n in golden.facts["logits"]["images"]]))
    text = model.llm.embed(tokens)
    for name, embeds in (
        ("text", text),
        ("image", torch.cat([text[:, :1], images, text[:, 1:]], dim=1)),
    ):
        cache = model.llm.make_cache(2, embeds.shape[1])
        model.llm(embeds[:, :-3], cache=cache)
        for position in range(-3, 0):
            step = embeds[:, position : position + 1 or None]
            logits = model.llm(step, cache=cache)[:, -1]
        expected = golden.tensors[f"logits.forward_inference_{name}"]
        torch.testing.assert_close(logits, expected, atol=LOGITS_ATOL, rtol=0)


def test_first_and_last_logits_of_generation(pair: tuple[SphinxModel, GoldenData]) -> None:
    """The public implementation starts at the shorter prompt and forces the longer one's own tokens."""
    model, golden = pair
    for fact in golden.facts["generate"]:
        matrix = golden.tensors[f"generate.{fact['name']}.full_token_matrix"]
        shortest = min(fact["prompt_lengths"])
        pixels = None if fact["images"] is None else model.preprocess([golden.image(n) for n in fact["images"]])
        with torch.no_grad():
            logits = model(matrix, pixels)
        first = golden.tensors[f"generate.{fact['name']}.first_step_logits"]
        last = golden.tensors[f"generate.{fact['name']}.last_step_logits"]
        torch.testing.assert_close(logits[:, shortest - 1], first, atol=LOGITS_ATOL, rtol=0)
        torch.testing.assert_close(logits[:, -2], last, atol=LOGITS_ATOL, rtol=0)


def test_single_prompts(pair: tuple[SphinxModel, GoldenData]) -> None:
    model, golden = pair
    for fact in golden.facts["generate"]:
        for row, expected in enumerate(fact["single_prompt_generate_eos_only"]):
            image = None if fact["images"] is None else golden.image(fact["images"][row])
            [answer] = model.generate(fact["prompts"][row], image, max_new_tokens=fact["max_gen_len"], stop=())
            assert answer.token_ids == expected


def _released_names(model: SphinxModel) -> dict[str, Tensor]:
    """Trainable parameters under the released files' names, by hand: the test must not use the key map it checks."""
    renamed = {
        "embed_tokens": "tok_embeddings",
        "attention.q_proj": "attention.wq",
        "attention.k_proj": "attention.wk",
        "attention.v_proj": "attention.wv",
        "attention.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "mlp_norm": "ffn_norm",
        "lm_head": "output",
        "mlp.router": "feed_forward.gate",
        "mlp.experts.gate_proj": "feed_forward.w1",
        "mlp.experts.up_proj": "feed_forward.w3",
        "mlp.experts.down_proj": "feed_forward.w2",
    }
    assert model.vision is not None
    projectors = ["qformer_proj", "visual_proj"] if len(model.vision.branches) == 2 else ["visual_proj"]
    names = {}
    for name, parameter in model.named_parameters():
        if ".encoders." in name:
            continue
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        for branch, projector in enumerate(projectors):
            name = name.replace(f"vision.branches.{branch}.projector.proj", f"{projector}.0")
            name = name.replace(f"vision.branches.{branch}.projector.norm", f"{projector}.1")
        name = name.replace("vision.start_token", "start_img").replace("vision.end_token", "end_img")
        names["llma." + name.removeprefix("llm.")] = parameter
    return names


def test_gradients(pair: tuple[SphinxModel, GoldenData]) -> None:
    model, golden = pair
    named = _released_names(model)
    assert set(named) == set(golden.facts["trainable_parameters"])
    assert {id(p) for p in named.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    for fact in golden.facts["loss"]:
        model.zero_grad()
        token_ids, labels = golden.batch(fact["batch"])
        pixels = None if fact["images"] is None else model.preprocess([golden.image(n) for n in fact["images"]])
        loss = model.loss(token_ids, labels, pixels)
        assert isinstance(loss, Tensor)
        loss.backward()
        norms = {name: float(p.grad.norm()) for name, p in named.items() if p.grad is not None}
        assert len(norms) == fact["n_params_with_grad"]
        for name, expected in fact["grad_norms"].items():
            assert norms[name] == pytest.approx(expected, rel=GRADIENT_RTOL), name
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        assert total == pytest.approx(fact["total_grad_norm"], rel=GRADIENT_RTOL)
        prefix = f"grad.{fact['name']}."
        for key in (key for key in golden.tensors if key.startswith(prefix)):
            gradient, expected = named[key.removeprefix(prefix)].grad, golden.tensors[key]
            assert gradient is not None
            assert (gradient - expected).norm() / expected.norm() < GRADIENT_RTOL
    model.zero_grad()


def test_balance_loss_of_a_mixture_of_experts(golden: Path) -> None:
    folder = golden / "mixtral_sparse_ens5"
    model, data = sphinxkit.load(folder, accelerate=None), GoldenData(folder)
    model.train()
    named = _released_names(model)
    for fact in data.facts["loss"]:
        train = fact["train"]
        model.zero_grad()
        token_ids, labels = data.batch(fact["batch"])
        pixels = None if fact["images"] is None else model.preprocess([data.image(n) for n in fact["images"]])
        sums = model.loss_sums(token_ids, labels, pixels)
        assert sums.balance is not None
        assert float(sums.balance.detach()) == pytest.approx(train["load_balancing"], abs=LOSS_ATOL)
        assert model.load_balancing_weight == train["load_balancing_weight"]
        loss = model.loss(token_ids, labels, pixels)
        assert isinstance(loss, Tensor)
        assert float(loss.detach()) == pytest.approx(train["total"], abs=LOSS_ATOL)
        loss.backward()
        for name, expected in train["grad_norms"].items():
            gradient = named[name].grad
            assert gradient is not None
            assert float(gradient.norm()) == pytest.approx(expected, rel=GRADIENT_RTOL), name


def test_missing_golden_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="golden.json and golden.safetensors not found"):
        GoldenData(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda(golden: Path, name: str, dtype: torch.dtype) -> None:
    model = sphinxkit.load(golden / name, device="cuda", dtype=dtype)
    data = GoldenData(golden / name)
    results = list(compare(model, data))
    assert [str(result) for result in results if not result.is_equal] == []
    assert any(result.tolerance is not None for result in results)
