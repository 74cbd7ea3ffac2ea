from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sphinxkit.acceleration import FusedAccelerator, QuantizedLinear, quantize
from sphinxkit.acceleration.fused import FusedLayers
from sphinxkit.acceleration.quantization import QuantizedExperts
from sphinxkit.errors import CheckpointError, DataError, ShapeError
from sphinxkit.llama import LlamaModel, llama
from sphinxkit.llama.moe import Experts, MixtureOfExperts, MoEOptions
from tests.acceleration.conftest import logits_of

# float32 sums of 64 products in another order
KERNEL_TOLERANCE = 1e-5
# half a step of the grid, which spans 254 steps of the largest value or 15 of a group's range
HALF_STEP = {8: 0.5 / 127, 4: 0.5 / 15}
# of normal weights in groups of 32 (range about 4 deviations): a uniform error of 4 / 15 of a deviation / sqrt(12) is
# 8 % of a product; fourteen products add up as sqrt(14) to 30 %, less what the norms and the residual stream absorb.
# 8 bits: a step is 1 / 127 of a row's largest weight (2.5 deviations), 0.6 % of a product, times sqrt(14), doubled.
LOGITS_RELATIVE_TOLERANCE = {8: 0.045, 4: 0.3}

Builder = Callable[..., LlamaModel]


def weight_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seen_weight(layer: QuantizedLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that a layer multiplies few rows with."""
    return torch.cat([layer(rows) for rows in torch.eye(layer.in_features, dtype=dtype).split(8)]).T.float()


@pytest.mark.parametrize("bits", [8, 4])
def test_every_weight_is_within_half_a_step(bits: int) -> None:
    weight = weight_of()
    found = seen_weight(QuantizedLinear(weight, bits, 32))
    if bits == 8:
        step = weight.abs().amax(1, keepdim=True).expand_as(weight)
    else:
        groups = weight.view(48, 2, 32)
        step = (groups.amax(-1) - groups.amin(-1)).repeat_interleave(32, dim=1)
    assert bool(((found - weight).abs() <= HALF_STEP[bits] * step * 1.001 + KERNEL_TOLERANCE).all())
    assert not torch.equal(found, weight)


def test_four_bits_by_hand() -> None:
    """A group that lies on the grid is stored exactly: 16 codes, scale 0.5, from -1 up."""
    row = torch.arange(32).remainder(16) * 0.5 - 1
    found = seen_weight(QuantizedLinear(row.repeat(48, 2), 4, 32))
    torch.testing.assert_close(found, row.repeat(48, 2), atol=KERNEL_TOLERANCE, rtol=0)


def test_eight_bits_by_hand() -> None:
    row = torch.arange(64) * 2.0 - 1
    row[-1] = 127.0  # scale 1
    found = seen_weight(QuantizedLinear(row.repeat(48, 1), 8))
    torch.testing.assert_close(found, row.repeat(48, 1), atol=KERNEL_TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_meet_the_same_weight_as_few(dtype: torch.dtype) -> None:
    layer = QuantizedLinear(weight_of(dtype=dtype), 8)
    many = layer(torch.eye(64, dtype=dtype)).T.float()
    # the weight is rounded once more
    torch.testing.assert_close(many, seen_weight(layer, dtype), atol=0, rtol=torch.finfo(dtype).eps)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.eye(64, dtype=torch.float64))


@pytest.mark.parametrize("bits", [8, 4])
def test_constant_and_zero_rows_stay_finite(bits: int) -> None:
    weight = torch.zeros(48, 64)
    weight[0] = 3.0
    found = seen_weight(QuantizedLinear(weight, bits, 32))
    torch.testing.assert_close(found, weight, atol=KERNEL_TOLERANCE, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_stays_close(small_llama: Builder, bits: int, batch: int) -> None:
    model = small_llama(embed_dim=64, hidden_dim=96, num_kv_heads=4).requires_grad_(False).eval()
    ids = torch.randint(0, 61, (batch, 9), generator=torch.Generator().manual_seed(3))
    expected = model(model.embed(ids))
    model.accelerator = FusedAccelerator()
    logits_of(model, model.embed(ids))
    quantize(model, bits, 32)
    found = logits_of(model, model.embed(ids), 6, 1, 2)
    difference = float((found - expected).norm() / expected.norm())
    assert 0 < difference < LOGITS_RELATIVE_TOLERANCE[bits]
    torch.testing.assert_close(found, model(model.embed(ids)), atol=KERNEL_TOLERANCE, rtol=0)


def test_only_the_linear_layers_change(small_llama: Builder) -> None:
    sizes = {"embed_dim": 64, "hidden_dim": 96, "num_kv_heads": 4, "vocab_size": 64}
    model = small_llama(**sizes).requires_grad_(False)
    quantize(model, 4, 32)
    kinds = {name.split(".")[-1]: type(module) for name, module in model.named_modules() if name.endswith("_proj")}
    assert set(kinds.values()) == {QuantizedLinear}
    assert len(kinds) == 7
    assert type(model.lm_head) is nn.Linear
    whole = small_llama(**sizes).requires_grad_(False)
    quantize(whole, 8, lm_head=True)
    assert type(whole.lm_head) is QuantizedLinear
    assert "bits=4, group_size=32" in repr(model)
    assert "bits=8" in repr(whole)
    assert torch.equal(copy.deepcopy(model)(torch.ones(1, 2, 64)), model(torch.ones(1, 2, 64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_sixteen_bit(dtype: torch.dtype, bits: int) -> None:
    # scales and zeros of 8 bits' precision shift the grid by up to 2^-9 of its 8 steps, beside half a step
    found = seen_weight(QuantizedLinear(weight_of(dtype=dtype), bits, 32), dtype)
    difference = float((found - weight_of()).norm() / weight_of().norm())
    assert difference < LOGITS_RELATIVE_TOLERANCE[bits]


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"bits": 3}, "bits must be 4 or 8, got 3"),
            ({"bits": 4, "group_size": 16}, r"group_size must be one of \(32, 64, 128, 256\), got 16"),
            ({"bits": 4, "group_size": 128}, r"columns in multiples of 128, got a weight of \(64, 64\)"),
            ({"bits": 8, "lm_head": True}, r"rows in multiples of 16 .* got a weight of \(61, 64\)"),
        ],
    )
    def test_sizes(self, small_llama: Builder, options: dict[str, int], message: str) -> None:
        model = small_llama(embed_dim=64, hidden_dim=96, num_kv_heads=4)
        with pytest.raises(ShapeError, match=message):
            quantize(model, **options)
        assert all(type(module) is not QuantizedLinear for module in model.modules())

    def test_twice(self, small_llama: Builder) -> None:
        model = small_llama(embed_dim=64, hidden_dim=96, num_kv_heads=4)
        quantize(model, 8)
        with pytest.raises(TypeError, match="only plain linear layers can be quantised, but q_proj is QuantizedLinear"):
            quantize(model, 8)

    def test_saving(self, small_llama: Builder) -> None:
        model = small_llama(embed_dim=64, hidden_dim=96, num_kv_heads=4)
        quantize(model, 8)
        with pytest.raises(CheckpointError, match=r"layers.0.attention.q_proj is quantised to 8 bits.*save the model"):
            model.state_dict()

    def test_moving(self, small_llama: Builder) -> None:
        layer = QuantizedLinear(weight_of(), 4, 32)
        assert layer.to("cpu") is layer
        with pytest.raises(CheckpointError, match="has the layout of cpu and cannot be moved"):
            layer.to("meta")


class TestFused:
    @pytest.mark.parametrize("bits", [8, 4])
    def test_it_computes_what_the_modules_compute(self, ready_llama: Builder, bits: int) -> None:
        model = ready_llama(embed_dim=256, hidden_dim=192, num_kv_heads=1, num_heads=4)
        quantize(model, bits, 32)
        embeds = model.embed(torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3)))
        expected = logits_of(model, embeds, 6, 1, 2)
        model.accelerator = accelerator = FusedAccelerator()
        torch.testing.assert_close(logits_of(model, embeds, 6, 1, 2), expected, atol=KERNEL_TOLERANCE, rtol=0)
        assert accelerator.current(model) is not None
        # the modules read the memory that was joined
        torch.testing.assert_close(model(embeds), expected, atol=KERNEL_TOLERANCE, rtol=0)
        attention = model.layers[0].get_submodule("attention")
        q, k = attention.get_submodule("q_proj"), attention.get_submodule("k_proj")
        assert q.codes.untyped_storage().data_ptr() == k.codes.untyped_storage().data_ptr()

    def test_what_cannot_be_joined_goes_through_the_modules(self, ready_llama: Builder) -> None:
        sizes = {"embed_dim": 64, "hidden_dim": 96, "num_kv_heads": 4}
        model = ready_llama(FusedAccelerator(), **sizes)
        quantize(model, 4, 32)
        with pytest.raises(TypeError, match="joined only with rows in multiples of 64"):
            FusedLayers(model)
        embeds = model.embed(torch.arange(5)[None])
        torch.testing.assert_close(logits_of(model, embeds), model(embeds), atol=KERNEL_TOLERANCE, rtol=0)
        half = ready_llama(**sizes)
        half.layers[0].attention.q_proj = QuantizedLinear(half.layers[0].attention.q_proj.weight, 8)
        with pytest.raises(TypeError, match="only some linear layers are quantised"):
            FusedLayers(half)
        whole = ready_llama(**sizes)
        quantize(whole, 8)
        half.layers[0] = whole.layers[0]
        with pytest.raises(TypeError, match="only some linear layers are quantised"):
            FusedLayers(half)
        layers = [QuantizedLinear(weight_of(), bits) for bits in (8, 4)]
        with pytest.raises(TypeError, match="of different kinds"):
            QuantizedLinear.join(layers)


class OnCuda:
    """Stands for the device of a model whose weights are on a CPU."""

    type = "cuda"


class TestTorchao:
    """What is done on CUDA."""

    @pytest.fixture
    def model(self, ready_llama: Builder, monkeypatch: pytest.MonkeyPatch) -> LlamaModel:
        monkeypatch.setattr("sphinxkit.acceleration.quantization._device_of", lambda model: OnCuda())
        return ready_llama(FusedAccelerator(), embed_dim=64, hidden_dim=96, num_kv_heads=4, vocab_size=64)

    @pytest.fixture
    def configs(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object], list[str]]]:
        """A stand-in for the package: what was asked for, and for which modules."""
        found: list[tuple[str, dict[str, object], list[str]]] = []

        def config(name: str) -> Callable[..., object]:
            return lambda *given, **options: (name, {**options, "given": given})

        def quantize_(module: nn.Module, chosen: tuple[str, dict[str, object]], filter_fn: Callable[..., bool]) -> None:
            found.append((*chosen, [name for name, part in module.named_modules() if filter_fn(part, name)]))

        fake = types.ModuleType("torchao.quantization")
        fake.quantize_ = quantize_  # type: ignore[attr-defined]
        for name in ("Int4WeightOnlyConfig", "Int8WeightOnlyConfig"):
            setattr(fake, name, config(name))
        monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
        monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
        return found

    def test_the_linear_layers_are_handed_over(
        self, model: LlamaModel, configs: list[tuple[str, dict[str, object], list[str]]]
    ) -> None:
        quantize(model, 8)
        quantize(model.bfloat16(), 4, 32, lm_head=True)
        [(eight, _, layers), (four, options, whole)] = configs
        assert (eight, four) == ("Int8WeightOnlyConfig", "Int4WeightOnlyConfig")
        assert options["given"] == (32,)
        assert options["int4_packing_format"] == "tile_packed_to_4d"
        assert len(layers) == 14
        assert set(whole) - set(layers) == {"lm_head"}

    def test_what_does_not_fit_is_refused(self, model: LlamaModel, configs: list[object]) -> None:
        with pytest.raises(TypeError, match=r"4 bits on CUDA need weights in torch.bfloat16, got torch.float32"):
            quantize(model, 4, 32)
        with pytest.raises(ShapeError, match=r"columns in multiples of 128, got a weight of \(64, 64\)"):
            quantize(model.bfloat16(), 4, 128)
        with pytest.raises(ShapeError, match="bits must be 4 or 8, got 3"):
            quantize(model, 3)
        assert not configs

    def test_a_missing_package_is_named(self, model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchao.quantization", None)
        with pytest.raises(DataError, match=r'on CUDA need torchao: pip install "sphinxkit\[quant\]"'):
            quantize(model, 8)

    @pytest.mark.integration
    def test_eight_bits_of_the_package_itself(self, model: LlamaModel) -> None:
        pytest.importorskip("torchao.quantization")
        embeds = model.embed(torch.arange(9)[None])
        expected = logits_of(model, embeds)
        quantize(model, 8)
        got = logits_of(model, embeds, 5, 1, 3)
        assert 0 < float((got - expected).norm() / expected.norm()) < LOGITS_RELATIVE_TOLERANCE[8]


def test_other_devices_are_refused(ready_llama: Builder) -> None:
    with pytest.raises(DataError, match="expected a model on a CPU or CUDA, got meta"):
        quantize(ready_llama(embed_dim=64, hidden_dim=96, num_kv_heads=4).to("meta"), 8)


@pytest.mark.gpu
@pytest.mark.integration
@pytest.mark.parametrize("bits", [8, 4])
def test_on_a_gpu(ready_llama: Builder, bits: int) -> None:
    pytest.importorskip("torchao.quantization")
    model = ready_llama(FusedAccelerator(), embed_dim=256, hidden_dim=512, num_kv_heads=4).to("cuda", torch.bfloat16)
    embeds = model.embed(torch.arange(9, device="cuda")[None])
    expected = logits_of(model, embeds).float()
    quantize(model, bits, 32)
    got = logits_of(model, embeds, 5, 1, 3).float()
    assert 0 < float((got - expected).norm() / expected.norm()) < LOGITS_RELATIVE_TOLERANCE[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_experts_compute_with_the_weights_that_their_codes_say(bits: int) -> None:
    torch.manual_seed(0)
    moe = MixtureOfExperts(64, 96, MoEOptions(4, 2)).requires_grad_(False)
    seen, x = copy.deepcopy(moe), torch.randn(2, 5, 64)
    moe.experts = QuantizedExperts(moe.experts, bits, 32)
    for expert, (gate_up, down) in enumerate(moe.experts.layers):
        seen.experts.gate_proj[expert], seen.experts.up_proj[expert] = seen_weight(gate_up).chunk(2)
        seen.experts.down_proj[expert] = seen_weight(down).T
    torch.testing.assert_close(moe(x), seen(x), atol=KERNEL_TOLERANCE, rtol=0)


def test_a_mixture_of_experts_is_quantised_but_for_its_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 32, "embed_dim": 64, "num_layers": 2, "num_heads": 2}
    model = llama(**sizes, hidden_dim=96, moe={"num_experts": 4, "num_experts_per_tok": 2}).requires_grad_(False).eval()
    embeds = model.embed(torch.arange(12)[None])
    before = logits_of(model, embeds)
    with monkeypatch.context() as patch:
        patch.setattr("sphinxkit.acceleration.quantization._device_of", lambda _: torch.device("cuda"))
        with pytest.raises(DataError, match="experts are quantised on a CPU only"):
            quantize(model, 8)
    quantize(model, 8)
    layer = model.layers[1]
    assert [type(part) for part in layer.mlp.children()] == [nn.Linear, QuantizedExperts]
    assert type(layer.attention.o_proj) is QuantizedLinear
    found = logits_of(model, embeds)
    assert 0 < float((found - before).norm() / before.norm()) < LOGITS_RELATIVE_TOLERANCE[8]
    odd = llama(**sizes, hidden_dim=40, moe={"num_experts": 4, "num_experts_per_tok": 2})
    with pytest.raises(ShapeError, match=r"rows in multiples of 16 and columns in multiples of 32.*\(64, 40\)"):
        quantize(odd, 8)
    assert type(odd.layers[0].mlp.experts) is Experts
    assert type(odd.layers[0].attention.q_proj) is nn.Linear
