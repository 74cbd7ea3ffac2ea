from __future__ import annotations

import hashlib
import json
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.checkpoint.verify import Verification, torch_files_checks
from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files import checksums
from sphinxkit.tensor_files.checksums import Check, compare
from sphinxkit.tensor_files.torch_zip import zip_checks

Copy = Callable[..., Path]


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def own(golden: Path, tmp_path: Path) -> Path:
    sphinxkit.load(golden / "llama_ens_light").save(tmp_path / "own")
    return tmp_path / "own"


def test_a_byte_of_our_own_tensors(own: Path, tmp_path: Path) -> None:
    flip(own / "model.safetensors", -3)
    message = r"(?s)tampered with; fetch them again:\n  - model.safetensors does not match its SHA-256\n.*verify=False"
    with pytest.raises(CheckpointError, match=message):
        sphinxkit.load(own)
    sphinxkit.load(own, verify=False)
    with checkpoint.open(own) as opened:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.save(tmp_path / "copy", opened)
        assert not (tmp_path / "copy").exists()
        checkpoint.save(tmp_path / "copy", opened, verify=False)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(own, verify=True)


@pytest.mark.parametrize("name", ["recipe.yaml", "tokenizer.model"])
def test_the_small_files_are_part_of_it(own: Path, name: str) -> None:
    path = own / name
    content = path.read_bytes()
    facts = json.loads((own / "model.safetensors.index.json").read_text())["metadata"]["files"][name]
    assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"files that the index names are missing; fetch them:\n  - {name}"):
        sphinxkit.load(own)
    path.write_bytes(
        content.replace(b"polite answers", b"Polite answers") if name == "recipe.yaml" else content[:-1] + b"\x01"
    )
    with pytest.raises(CheckpointError, match=rf"{name} does not match its SHA-256"):
        sphinxkit.load(own)
    with pytest.raises(CheckpointError, match=rf"{name} does not match its SHA-256"):
        checkpoint.open(own, verify=True)


def test_a_tensor_taken_out_of_the_index(own: Path) -> None:
    path = own / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["llm.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'llm.norm.weight' is in model.safetensors but not in model"):
        sphinxkit.load(own, verify=False)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bit_of_a_released_shard(released: Copy, tmp_path: Path, rank: int) -> None:
    folder = released()
    path = folder / f"consolidated.0{rank}-of-02.model.pth"
    record = next(check for check in zip_checks(path) if "/data/" in check.message)
    flip(path, record.end - 1)
    message = rf"{path.name}: record \S+/data/\d+ does not match its checksum"
    with pytest.raises(CheckpointError, match=message):
        sphinxkit.load(folder)
    with checkpoint.open(folder) as opened, pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "copy", opened, unused=opened.unused)
    assert not (tmp_path / "copy").exists()


def test_a_damaged_replica_is_called_damaged(released: Copy) -> None:
    folder = released()
    path = folder / "consolidated.01-of-02.model.pth"
    norm = next(iter(torch.load(path, weights_only=True)["model"][n] for n in ["llma.norm.weight"]))
    position = path.read_bytes().index(norm.numpy().tobytes())
    flip(path, position)
    with pytest.raises(CheckpointError, match="record .* does not match its checksum"):
        sphinxkit.load(folder)
    with pytest.raises(CheckpointError, match=r"should be the same in every shard .*replicas='first'"):
        sphinxkit.load(folder, verify=False)
    sphinxkit.load(folder, verify=False, replicas="first")


def test_hf_bin_files(tmp_path: Path, text_model: tuple[checkpoint.MappingSource, dict[str, object]]) -> None:
    source, recipe = text_model
    folder = checkpoint.save(tmp_path / "hf", source, recipe=recipe, format="hf")
    with checkpoint.open(folder, verify=True) as opened:  # nothing to compare, so nothing wrong
        with opened.verifying():
            opened.read("llm.norm.weight")
        tensors = {"model.norm.weight": opened.read("llm.norm.weight").clone()}
        for key in opened.keys():  # noqa: SIM118
            tensors[opened.name_in_files(key)] = opened._tensors[key].parts[0].view().clone()
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    checkpoint.open(folder, verify=True).close()
    record = next(check for check in zip_checks(folder / "pytorch_model.bin") if check.message.count("/data/"))
    flip(folder / "pytorch_model.bin", record.begin)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: record .* does not match"):
        checkpoint.open(folder, verify=True)


def test_files_without_checksums(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert zip_checks(tmp_path / "old.pth") == []


def test_a_damaged_list_of_records(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(2)}, path)
    raw = path.read_bytes()
    position = raw.index(b"PK\x01\x02")
    path.write_bytes(raw[:position] + b"PX" + raw[position + 2 :])
    with pytest.raises(CheckpointError, match=r"x.pth: its list of records is damaged: .*fetch the file again"):
        zip_checks(path)


def test_slices_take_turns(tmp_path: Path) -> None:
    files = [tmp_path / "0.pth", tmp_path / "1.pth"]
    for file in files:
        torch.save({"a": torch.zeros(2), "b": torch.ones(3)}, file)
    checks = torch_files_checks(files)
    assert [check.file for check in checks[:4]] == [*files, *files]
    assert len(checks) == len(zip_checks(files[0])) + len(zip_checks(files[1]))
    assert compare(checks) == []


def check_of(path: Path, content: bytes) -> Check:
    path.write_bytes(content)
    return Check(path, 0, len(content), "crc32", f"{zlib.crc32(content):08x}", f"{path.name} differs")


def test_neither_side_runs_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphinxkit.checkpoint.verify._WINDOW", 300)
    monkeypatch.setattr(checksums, "_CHUNK", 100)
    content = bytes(2000)
    hashed: list[int] = []
    waited = threading.Event()
    original = Verification._progress

    def progress(self: Verification, num_bytes: int) -> None:
        hashed.append(num_bytes)
        if sum(hashed) > 300:
            waited.set()
        original(self, num_bytes)

    monkeypatch.setattr(Verification, "_progress", progress)
    with Verification("x", lambda: [check_of(tmp_path / "x", content)]) as running:
        assert waited.wait(10)
        assert sum(hashed) == 400  # it stopped one piece beyond the window
        running.copied(700)  # comes back although 700 bytes are more than the window ahead of nothing
        assert sum(hashed) >= 400
    assert sum(hashed) == 2000  # the rest when the block is left


def test_a_block_that_fails_before_reading_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sphinxkit.checkpoint.verify._WINDOW", 0)
    check = check_of(tmp_path / "x", b"abc")
    wrong = Check(check.file, 0, 3, "crc32", "0", "wrong")
    with pytest.raises(CheckpointError, match="the keys"), Verification("x", lambda: [wrong]):
        raise CheckpointError("the keys")

    def read_and_fail(error: Exception) -> None:
        with Verification("x", lambda: [wrong]) as running:
            running.copied(3)
            raise error

    with pytest.raises(KeyError):
        read_and_fail(KeyError("not ours"))
    with pytest.raises(CheckpointError, match=r"x: files are truncated .*\n  - wrong\n"):
        read_and_fail(CheckpointError("copies differ"))


def test_what_goes_wrong_in_the_thread_is_raised(tmp_path: Path) -> None:
    def broken() -> list[Check]:
        raise CheckpointError("its list of records is damaged")

    with pytest.raises(CheckpointError, match="list of records"), Verification("x", broken) as running:
        running.copied(2**40)  # must not wait for a thread that is gone
