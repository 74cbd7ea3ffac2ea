"""Damaged checkpoints of every format, through open, load, inspect, convert: a named error, or the right tensors."""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import sphinxkit
from sphinxkit import checkpoint
from tests.campaign import trial

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(7200)]
NUM_DAMAGED = 500  # about ten minutes of a processor
SEED = 2311
MAX_SECONDS = 1.0  # of processor time of one command above the same with the undamaged checkpoint
MAX_BYTES = 200 * 10**6
WITHOUT_CHECKSUMS = ("hf", "hf_llm")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> dict[str, Path]:
    """A sound checkpoint of each format."""
    folder = tmp_path_factory.mktemp("sound")
    micro = folder / "native"
    torch.manual_seed(0)
    sphinxkit.build("sphinx_micro").save(micro)
    other = folder / "other"
    shutil.copytree(micro, other)
    sphinxkit.convert(micro, folder / "hf", format="hf")
    sphinxkit.convert(micro, folder / "hf_llm", format="hf", part="llm")
    sphinxkit.convert(micro, folder / "meta", format="meta", part="llm", num_shards=2)
    sphinxkit.extract_delta(folder / "meta", folder / "meta", folder / "delta")
    released = folder / "released"
    released.mkdir()
    for path in (golden / "llama_ens_light").iterdir():
        if not path.name.startswith(("golden.", "resized")):
            shutil.copy(path, released)
    shutil.rmtree(other)
    return {path.name: path for path in sorted(folder.iterdir())}


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a folder; what was done."""
    path = rng.choice([each for each in sorted(folder.iterdir()) if each.is_file()])
    data = bytearray(path.read_bytes())
    kinds = ["flip", "cut", "grow", "empty", "gone", "other's", "zeros", "swap", "folder"]
    if path.suffix == ".json":
        kinds += ["values"] * 12
    if path.suffix == ".safetensors":
        kinds += ["header"] * 12
    if path.suffix in (".pth", ".bin"):
        kinds += ["ends"] * 8
    kind = rng.choice(kinds)
    if kind in ("flip", "zeros", "ends") and data:
        for _ in range(rng.choice((1, 1, 4))):
            places = (
                rng.randrange(len(data)),
                rng.randrange(min(len(data), 2000)),
                len(data) - 1 - rng.randrange(min(len(data), 2000)),
            )
            place = rng.choice(places[1:] if kind == "ends" else places)
            data[place] = 0 if kind == "zeros" else data[place] ^ 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data) + 1) :]
    elif kind == "grow":
        data += rng.randbytes(rng.choice((1, 8, 5000)))
    elif kind == "empty":
        data.clear()
    elif kind == "swap" and len(data) > 2:
        size = rng.randrange(1, len(data) // 2 + 1)
        data[:size], data[-size:] = data[-size:], data[:size]
    elif kind == "other's":
        data = bytearray(rng.choice([each for each in sorted(folder.iterdir()) if each.is_file()]).read_bytes())
    elif kind in ("values", "header"):
        with suppress(ValueError, struct.error, KeyError, TypeError, AttributeError, IndexError):  # damaged before
            data = _with_header(data, rng) if kind == "header" else bytearray(_json(_changed(json.loads(data), rng)))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(data)
    return f"{path.name}: {kind}"


def _json(value: Any) -> bytes:
    return json.dumps(value, default=repr).encode("utf-8", "surrogatepass")


def _changed(value: Any, rng: random.Random) -> Any:
    try:
        return trial.damaged(value, rng)
    except (TypeError, OverflowError):
        return value


def _with_header(data: bytearray, rng: random.Random) -> bytearray:
    """A safetensors file whose header lies."""
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.2:
        return bytearray(struct.pack("<Q", rng.choice((0, 1, size + 1, size - 1, 2**32, 2**63, 2**64 - 1))) + data[8:])
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    one, two = rng.choice(names), rng.choice(names)
    kind = rng.randrange(7)
    if kind == 0:
        header[one], header[two] = header[two], header[one]
    elif kind == 1:
        header[one]["dtype"] = rng.choice(("F64", "F16", "BF16", "I8", "X", None, [], 3))
    elif kind == 2:
        header[one]["shape"] = rng.choice(
            ([], [0], [-1], [2**62, 4], [1e400], "x", None, [1] * 70, header[two]["shape"][::-1])
        )
    elif kind == 3:
        header[one]["data_offsets"] = rng.choice(
            ([0, 2**63], [0], [-8, 8], ["a", "b"], [8, 0], None, [0.5, 9], header[two]["data_offsets"])
        )
    elif kind == 4:
        header[f"{one}.more"] = header.pop(one)
    elif kind == 5:
        header["__metadata__"] = rng.choice(([], "x", 1, {"a": 1}, {"a": {"b": []}}, None))
    else:
        header = _changed(header, rng)
    encoded = _json(header)
    encoded += b" " * (-len(encoded) % 8)
    return bytearray(struct.pack("<Q", len(encoded)) + encoded) + data[8 + size :]


def read_everything(folder: Path, is_delta: bool, **options: Any) -> None:
    with checkpoint.open(folder, delta=is_delta, verify=True, **options) as opened:
        for source in (opened, opened.unused):
            for key in source.keys():  # noqa: SIM118
                assert tuple(source.read(key).shape) == source.shape(key)


def test_damaged_checkpoints(sound: dict[str, Path], tmp_path: Path) -> None:
    rng = random.Random(SEED)
    here, out = tmp_path / "here", tmp_path / "out"
    weights = {name: sphinxkit.load(str(path)).state_dict() for name, path in sound.items() if name != "delta"}
    usual: dict[str, dict[str, float]] = {}
    counts: Counter[str] = Counter()
    faults: dict[str, str] = {}

    def tried(name: str) -> tuple[dict[str, str], dict[str, float]]:
        loaded: list[Any] = []
        is_delta = name == "delta"
        steps = {"open": lambda: read_everything(here, is_delta)}
        if name in WITHOUT_CHECKSUMS:
            steps["as a folder of any model"] = lambda: read_everything(here, is_delta, format="safetensors")
        if is_delta:
            steps["apply"] = lambda: sphinxkit.apply_delta(sound["meta"], here, out / "applied")
        else:
            steps["load"] = lambda: loaded.append(sphinxkit.load(str(here)))
            steps["inspect"] = lambda: sphinxkit.inspect(str(here)).to_dict()
            steps["convert"] = lambda: sphinxkit.convert(here, out / "converted")
        said, seconds = {}, {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step, work in steps.items():
                started = time.process_time()
                said[step] = trial.outcome(work)
                seconds[step] = time.process_time() - started
        if (
            loaded
            and name not in WITHOUT_CHECKSUMS
            and any(
                key not in (state := loaded[0].state_dict()) or not torch.equal(state[key], tensor)
                for key, tensor in weights[name].items()
            )
        ):
            said["load"] = "FAULT: other tensors in silence"
        if out.exists():
            shutil.rmtree(out)
        return said, seconds

    for name, path in sound.items():
        shutil.copytree(path, here)
        said, usual[name] = tried(name)
        assert set(said.values()) == {"fine"}, (name, said)
        shutil.rmtree(here)
    slowest = 0.0
    names = sorted(sound)
    for index in range(NUM_DAMAGED):
        name = names[index % len(names)]
        shutil.copytree(sound[name], here)
        done = "; ".join(damage(here, rng) for _ in range(rng.choice((1, 1, 1, 2))) if any(here.iterdir()))
        before = trial.peak()
        said, seconds = tried(name)
        slowest = max(slowest, *seconds.values())
        where = f"{name}, number {index}: {done}"
        counts["named errors"] += sum(each != "fine" and not each.startswith("FAULT") for each in said.values())
        counts["fine"] += sum(each == "fine" for each in said.values())
        for step, each in said.items():
            if each.startswith("FAULT"):
                faults.setdefault(f"{step}: {each}", where)
        for step in seconds:
            if seconds[step] > usual[name][step] + MAX_SECONDS:
                faults.setdefault(f"{name}, {step}: {seconds[step]:.1f} s", where)
        if trial.peak() - before > MAX_BYTES:
            faults.setdefault(f"{name}: {trial.peak() - before} bytes more", where)
        shutil.rmtree(here)
    trial.say(counts, f"{NUM_DAMAGED} damaged checkpoints of {len(names)} formats, the slowest {slowest:.2f} s")
    assert not faults, trial.shown(faults)
