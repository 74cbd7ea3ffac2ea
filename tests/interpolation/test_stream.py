from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sphinxkit import checkpoint, interpolation
from sphinxkit.errors import CheckpointError, DataError, RecipeError
from sphinxkit.interpolation import MixedSource, create, update_in_place
from sphinxkit.interpolation.method import BLOCK
from sphinxkit.interpolation.methods.dare import tensor_seed
from sphinxkit.interpolation.stream import CHUNK, count_nonfinite, within
from sphinxkit.tensor_source import ChunkedSource, MappingSource
from tests.interpolation.stream_cases import EMBED, UP, Make, mix

SUM_OF_SQUARES = 1e-6  # relative; slerp's angle is summed chunk by chunk instead of at once, in float64


@pytest.mark.parametrize(
    "method", ["linear", "slerp", "wise_ft", "uniform_soup", "ema", "task_arithmetic", "ties", "dare"]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_streams_what_the_op_computes(method: str, threads: int) -> None:
    size = 2 * CHUNK + BLOCK + 17  # several jobs, several blocks, a rest
    generator = torch.Generator().manual_seed(0)
    a, b, base = (torch.randn(size, generator=generator) for _ in range(3))
    weights = None if method in ("uniform_soup", "ema") else (0.3, 0.7)
    expected: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: interpolation.linear((a, b), (0.3, 0.7)),
        "slerp": lambda: interpolation.slerp(a, b, 0.7),
        "wise_ft": lambda: interpolation.wise_ft(a, b, 0.7),
        "uniform_soup": lambda: interpolation.uniform_soup((a, b)),
        "ema": lambda: interpolation.ema(a, b, 0.9),
        "task_arithmetic": lambda: interpolation.task_arithmetic(base, (a, b), (0.3, 0.7)),
        "ties": lambda: interpolation.ties(base, (a, b), (0.3, 0.7)),
        "dare": lambda: interpolation.dare(base, (a, b), (0.3, 0.7), seed=tensor_seed(0, "x")),
    }
    source = MixedSource(
        [MappingSource({"x": a}), MappingSource({"x": b})],
        create(method),
        weights,
        base=MappingSource({"x": base}),
        num_threads=threads,
    )
    pieces = list(source.chunks("x"))
    assert max(piece.numel() for piece in pieces) <= CHUNK
    torch.testing.assert_close(torch.cat(pieces), expected[method](), atol=SUM_OF_SQUARES, rtol=SUM_OF_SQUARES)
    assert torch.equal(source.read("x"), torch.cat(pieces))


def test_is_a_chunked_source_with_shapes_and_dtypes(make_model: Make) -> None:
    source = mix(make_model(0, torch.bfloat16), make_model(1, torch.bfloat16))
    assert isinstance(source, ChunkedSource)
    assert list(source.keys()) == list(make_model(0).keys())
    assert (source.shape(EMBED), source.dtype(EMBED)) == ((6, 4), torch.bfloat16)
    with pytest.raises(CheckpointError, match="the mix holds no tensor 'nothing'"):
        source.read("nothing")


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_end_points_keep_bits_and_dtypes(make_model: Make, beta: float) -> None:
    a, b = make_model(0, torch.float16), make_model(1, torch.float32)
    chosen = a if beta == 1 else b
    source = mix(a, b, beta=beta)
    for key in source.keys():  # noqa: SIM118
        assert source.dtype(key) == chosen.dtype(key)
        assert torch.equal(source.read(key), chosen.read(key))


def test_dtypes(make_model: Make) -> None:
    half, brain = make_model(0, torch.float16), make_model(1, torch.bfloat16)
    assert mix(half, brain).dtype(UP) == torch.float32
    assert mix(half, brain, dtype="first").dtype(UP) == torch.float16
    asked = mix(half, half, beta=1, dtype=torch.bfloat16)
    assert asked.read(UP).dtype == torch.bfloat16
    assert torch.equal(asked.read(UP), half.read(UP).bfloat16())


def test_layers_and_parts_by_rule(make_model: Make) -> None:
    a, b = make_model(0), make_model(1)
    source = mix(a, b, rules={"llm.layers.{0..1}.*": 0.25, "vision.*": "keep second", EMBED: {"method": "slerp"}})
    assert torch.equal(source.read(UP), interpolation.linear((a.read(UP), b.read(UP)), (0.25, 0.75)))
    last = "llm.layers.2.mlp.up_proj.weight"
    assert torch.equal(source.read(last), interpolation.lerp(a.read(last), b.read(last), 0.5))
    assert torch.equal(source.read("vision.start_token"), b.read("vision.start_token"))


def test_a_rule_with_its_own_method(make_model: Make) -> None:
    a, b, base = make_model(0), make_model(1), make_model(2)
    rules = {UP: {"method": {"type": "ties", "density": 0.5}, "weights": [1, 1]}, "vision.*": "keep base"}
    source = mix(a, b, rules=rules, base=base)
    assert torch.equal(source.read(UP), interpolation.ties(base.read(UP), (a.read(UP), b.read(UP)), density=0.5))
    assert torch.equal(source.read("vision.start_token"), base.read("vision.start_token"))


def test_methods_that_set_their_weights_take_no_others(make_model: Make) -> None:
    a, b = make_model(0), make_model(1)
    assert create("uniform_soup").weights((0.5, 0.5), 2) == (0.5, 0.5)
    with pytest.raises(DataError, match=r"uniform_soup sets its weights itself: \[0.5, 0.5\], so beta or weights"):
        MixedSource([a, b], create("uniform_soup"), (0.3, 0.7))
    with pytest.raises(DataError, match="ema sets its weights itself"):
        MixedSource([a, b], create("ema"), (0.5, 0.5))
    source = mix(a, b, beta=0.3, rules={UP: {"method": "uniform_soup"}})
    assert torch.equal(source.read(UP), 0.5 * a.read(UP) + 0.5 * b.read(UP))  # the mean, not the mix's 0.3
    with pytest.raises(DataError, match="rule 'llm.*': uniform_soup sets its weights itself"):
        mix(a, b, rules={"llm.*": {"method": "uniform_soup", "beta": 0.3}})


def test_not_every_tensor_is_floating_point() -> None:
    a, b = (MappingSource({"ids": torch.arange(3), "w": torch.ones(2)}) for _ in range(2))
    assert torch.equal(mix(a, b).read("ids"), torch.arange(3))
    other = MappingSource({"ids": torch.zeros(3, dtype=torch.int64), "w": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"ids: stored as torch.int64, which is not mixed, and first and second"):
        mix(a, other).read("ids")
    assert torch.equal(mix(a, other, rules={"ids": "keep second"}).read("ids"), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(mix(a, other, beta=0).read("ids"), torch.zeros(3, dtype=torch.int64))
    odd = MappingSource({"ids": torch.zeros(3, dtype=torch.int32), "w": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"ids: stored as torch.int64, torch.int32, which cannot be mixed"):
        mix(a, odd)


def test_nothing_is_dropped_or_invented_silently(make_model: Make) -> None:
    a, b = make_model(0, vision__extra=(2,)), make_model(1, vision__other=(3,))
    with pytest.raises(CheckpointError, match=r"(?s)only in first: vision\.extra.*only in second: vision\.other.*rule"):
        mix(a, b)
    source = mix(a, b, rules={"vision.extra": "keep first", "vision.other": "drop"})
    assert torch.equal(source.read("vision.extra"), a.read("vision.extra"))
    assert "vision.other" not in source.keys()  # noqa: SIM118
    with pytest.raises(CheckpointError, match="to be kept from second, which does not hold it"):
        mix(a, b, rules={"vision.extra": "keep second", "vision.other": "drop"})


def test_many_missing_names_are_cut_short(make_model: Make) -> None:
    extra = {f"vision__x{i}": (1,) for i in range(20)}
    with pytest.raises(CheckpointError, match=r"\(20 in all\)"):
        mix(make_model(0, **extra), make_model(1))


def test_vocabulary_mismatch_names_the_rows(make_model: Make) -> None:
    a, b = make_model(0), make_model(1, llm__embed_tokens__weight=(9, 4))
    with pytest.raises(
        CheckpointError, match=r"\[6, 4\] in first, \[9, 4\] in second: rows 6 to 8 exist only in second"
    ):
        mix(a, b)
    both = interpolation.lerp(a.read(EMBED), b.read(EMBED)[:6], 0.5)
    longer = mix(a, b, rules={EMBED: "overlap second"})
    assert longer.shape(EMBED) == (9, 4)
    assert torch.equal(longer.read(EMBED), torch.cat([both, b.read(EMBED)[6:]]))
    assert torch.equal(mix(a, b, rules={EMBED: "overlap first"}).read(EMBED), both)
    kept = mix(a, b, beta=0, rules={EMBED: "overlap first"})
    assert torch.equal(kept.read(EMBED), b.read(EMBED)[:6])


def test_other_shapes_do_not_overlap(make_model: Make) -> None:
    a, b = make_model(0), make_model(1, llm__embed_tokens__weight=(6, 5))
    with pytest.raises(CheckpointError, match=r"\[6, 4\] in first, \[6, 5\] in second\n"):
        mix(a, b)
    with pytest.raises(CheckpointError, match="overlap wants shapes that differ in the first dimension only"):
        mix(a, b, rules={EMBED: "overlap first"})
    one_row = make_model(1, llm__embed_tokens__weight=(7, 4))
    with pytest.raises(CheckpointError, match="row 6 exists only in second"):
        mix(a, one_row)


def test_missing_keep_takes_the_first_that_holds_it(make_model: Make) -> None:
    a, b = make_model(0), make_model(1, vision__extra=(2,))
    assert torch.equal(mix(a, b, missing="keep").read("vision.extra"), b.read("vision.extra"))


def test_weights_are_checked(make_model: Make) -> None:
    a, b = make_model(0), make_model(1)
    with pytest.raises(DataError, match=r"weights \[1.5, -0.5\] \(beta\) lie outside \[0, 1\]"):
        mix(a, b, beta=1.5)
    assert torch.equal(mix(a, b, beta=1.5, extrapolate=True).read(UP), interpolation.lerp(a.read(UP), b.read(UP), -0.5))
    with pytest.raises(DataError, match="sum to 0.9, not 1"):
        MixedSource([a, b], create("linear"), (0.5, 0.4))
    with pytest.raises(DataError, match="linear needs a beta"):
        MixedSource([a, b], create("linear"))
    with pytest.raises(DataError, match="slerp takes at most 2 models, got 3"):
        MixedSource([a, b, a], create("slerp"), (0.2, 0.3, 0.5))
    with pytest.raises(DataError, match="no models"):
        MixedSource([], create("linear"))
    with pytest.raises(DataError, match="ties adds differences to a base model"):
        MixedSource([a, b], create("ties"))
    with pytest.raises(DataError, match="sum to 0 and cannot be normalised"):
        create("linear").weights((1, -1), 2, normalize=True)
    assert create("linear").weights((1, 3), 2, normalize=True) == (0.25, 0.75)


def test_weights_that_leave_nothing(make_model: Make) -> None:
    with pytest.raises(DataError, match="linear: every weight is 0"):
        MixedSource([make_model(0), make_model(1)], create("linear"), (0, 0), extrapolate=True)


def test_rules_are_checked(make_model: Make) -> None:
    a, b = make_model(0), make_model(1)
    with pytest.raises(RecipeError, match="no tensor has a name like 'audio"):
        mix(a, b, rules={"audio.*": 0.5})
    with pytest.raises(DataError, match=r"rule 'llm.*': weights \[1.5, -0.5\]"):
        mix(a, b, rules={"llm.*": 1.5})
    with pytest.raises(DataError, match=r"rule 'llm.*': ties needs a base model"):
        mix(a, b, rules={"llm.*": {"method": "ties"}})
    with pytest.raises(DataError, match="a rule names the base, but there is no base model"):
        mix(a, b, rules={"llm.*": "keep base"})
    with pytest.raises(RecipeError, match=r"rule 'llm.\*': unknown mixing method 'slurp'; did you mean 'slerp'"):
        mix(a, b, rules={"llm.*": {"method": "slurp"}})
    with pytest.raises(CheckpointError, match="the base does not hold it"):
        MixedSource([a, b], create("task_arithmetic"), base=MappingSource({}))


def test_methods_without_dropping_are_copies(make_model: Make) -> None:
    a, b, base = make_model(0), make_model(1), make_model(2)
    for method, weights, expected in (
        (create("task_arithmetic"), (0, 0), base),
        (create("ties", density=1.0), (0, 1), b),
        (create("dare", drop_rate=0.0), (1, 0), a),
        (create("ema", decay=0.0), None, b),
        (create("ties"), (0, 0), base),
        (create("dare"), (0, 0), base),
    ):
        source = MixedSource([a, b], method, weights, base=base)
        assert torch.equal(source.read(UP), expected.read(UP))
    for method, option in (("ties", {"density": 0.0}), ("dare", {"drop_rate": 1.0}), ("ema", {"decay": 2.0})):
        with pytest.raises(DataError, match="must be in"):
            create(method, **option)


def test_counting() -> None:
    tensor = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert count_nonfinite(tensor) == (1, 2)
    assert count_nonfinite(torch.arange(3)) == (0, 0)
    assert not within(tensor, 10)
    assert within(torch.tensor([10.0, -10.0]), 10)
    assert not within(torch.tensor([10.5]), 10)
    assert within(torch.empty(0), 1)
    assert within(torch.ones(2).to(torch.float8_e4m3fn), 1)


def test_update_in_place(make_model: Make) -> None:
    a, b = make_model(0), make_model(1)
    memory = {key: torch.zeros(a.shape(key), dtype=torch.bfloat16) for key in a.keys()}  # noqa: SIM118
    memory[UP] = torch.zeros(4, 5, dtype=torch.bfloat16).T  # not contiguous
    places = {key: tensor.data_ptr() for key, tensor in memory.items()}
    source = mix(a, b)
    update_in_place(memory, source)
    for key, tensor in memory.items():
        assert torch.equal(tensor, source.read(key).bfloat16())
        assert tensor.data_ptr() == places[key]
    with pytest.raises(CheckpointError, match="do not hold the same tensors"):
        update_in_place({UP: memory[UP]}, source)
    with pytest.raises(CheckpointError, match=r"the mix is \[5, 4\], asked for \[4\]"):
        source.read_into(UP, torch.zeros(4))


def test_some_tensors_of_a_mix(make_model: Make) -> None:
    a, b = make_model(0), make_model(1)
    whole = mix(a, b)
    part = whole.only(lambda key: key == UP)
    assert list(part.keys()) == [UP]
    assert list(whole.keys()) == list(a.keys())
    assert torch.equal(part.read(UP), whole.read(UP))
    assert torch.equal(torch.cat(list(part.chunks(UP))), whole.read(UP).flatten())
    assert (part.shape(UP), part.dtype(UP)) == (whole.shape(UP), whole.dtype(UP))
    out = torch.zeros(part.shape(UP))
    part.read_into(UP, out)
    assert torch.equal(out, whole.read(UP))
    with pytest.raises(CheckpointError, match=f"the mix holds no tensor '{EMBED}'"):
        part.read(EMBED)


def test_content_hash_by_hand() -> None:
    a = MappingSource({"b": torch.tensor([1.0, 2.0]), "a": torch.zeros(1, 1, dtype=torch.float16)})
    source = mix(a, a, beta=1, hash_inputs=True)
    for key in source.keys():  # noqa: SIM118
        source.read(key)
    data = hashlib.sha256(b"\x00\x00\x80\x3f\x00\x00\x00\x40").hexdigest()
    zero = hashlib.sha256(b"\x00\x00").hexdigest()
    lines = f"a float16 1x1 {zero}\nb float32 2 {data}\n"
    first, second = source.input_hashes()
    assert (first.tensors, first.sha256) == (2, hashlib.sha256(lines.encode()).hexdigest())
    assert (second.tensors, second.sha256) == (0, None)
    assert mix(a, a).input_hashes() == []


BOUND_EXTRA = 300e6  # bytes above three times the largest tensor that the design allows


MEMORY_CHILD = """
import sys, threading, time
from pathlib import Path
from sphinxkit import checkpoint, interpolation

def anon():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

peak = before = anon()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anon())

thread = threading.Thread(target=watch)
thread.start()
folder = Path(sys.argv[1])
with checkpoint.open(folder / "a") as a, checkpoint.open(folder / "a") as b:
    source = interpolation.MixedSource([a, b], interpolation.create(sys.argv[2]), (0.5, 0.5), hash_inputs=True)
    checkpoint.save(folder / "out", source, overwrite=True)
done.set()
thread.join()
print(max(peak, anon()) - before)
"""


def write_model(folder: Path, total_bytes: int, num_tensors: int) -> None:
    rows = total_bytes // 2 // num_tensors // 1024
    names = [f"llm.layers.{index}.mlp.up_proj.weight" for index in range(num_tensors)]
    noise = torch.randn(rows, 1024).bfloat16()
    checkpoint.save(folder / "a", MappingSource(dict.fromkeys(names, noise)), checksum=False)


def grown(folder: Path, method: str) -> int:
    """Peak anonymous memory, above the level after imports, of mixing a model with itself in a process of its own."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", MEMORY_CHILD, str(folder), method], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's RssAnon")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    # 100 MB each: three tensors of 2 MB, the threads' chunks and torch's own growth, not the 300 MB of loading it all
    write_model(tmp_path, 100 * 10**6, 50)
    assert grown(tmp_path, "linear") < 3 * 2e6 + 80e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's RssAnon")
def test_memory_bound_for_four_gigabytes(tmp_path: Path) -> None:
    largest = 4 * 10**9 // 20
    write_model(tmp_path, 4 * 10**9, 20)
    for method in ("linear", "slerp"):
        assert grown(tmp_path, method) < 3 * largest + BOUND_EXTRA, method
