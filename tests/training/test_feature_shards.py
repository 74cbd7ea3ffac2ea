from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sphinxkit.training import feature_shards
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.feature_shards import FeatureShards

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bits_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.5, -0.0, torch.nan], [torch.inf, 1e-3, 7.0]]).to(dtype)
    FeatureShards(tmp_path / "new").add(A, tensor)
    found = FeatureShards(tmp_path / "new").get(A)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_writers_see_each_others_tensors_and_have_their_own_files(tmp_path: Path) -> None:
    first, second = FeatureShards(tmp_path), FeatureShards(tmp_path)
    assert first.get(A) is None
    second.add(A, torch.ones(2))
    first.add(B, torch.zeros(3))
    second.add(C, torch.full((1,), 5.0))
    for shards in (first, second):
        shards.refresh()
    assert [shards.get(key).tolist() for shards in (first, second) for key in (A, B, C)] == [  # type: ignore[union-attr]
        *([1.0, 1.0], [0.0] * 3, [5.0]),
        *([1.0, 1.0], [0.0] * 3, [5.0]),
    ]
    assert len(list(tmp_path.iterdir())) == 4  # two shards for any number of tensors


def test_a_full_shard_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_shards, "SHARD_BYTES", 7)
    shards = FeatureShards(tmp_path)
    for key in (A, B, C):
        shards.add(key, torch.ones(1))
    assert sorted(path.stat().st_size for path in tmp_path.glob("*.data")) == [4, 8]


def test_killed_writers_and_damaged_files(tmp_path: Path) -> None:
    shards = FeatureShards(tmp_path)
    for value, key in enumerate((A, B, C)):
        shards.add(key, torch.full((2,), float(value)))
    [data], [keys] = tmp_path.glob("*.data"), tmp_path.glob("*.keys")
    keys.write_bytes(keys.read_bytes()[:-1])  # the entry of C is not finished
    content = bytearray(data.read_bytes())
    content[9] ^= 1  # of B
    data.write_bytes(content)
    again = FeatureShards(tmp_path)
    found = again.get(A)
    assert found is not None
    assert found.tolist() == [0.0, 0.0]
    assert (again.get(B), again.get(C)) == (None, None)
    again.add(B, torch.ones(2))
    assert FeatureShards(tmp_path).get(B) is not None
    data.unlink()
    assert FeatureShards(tmp_path).get(A) is None


def test_disk_errors_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"file/cache cannot be written: Not a directory"):
        FeatureShards(tmp_path / "file" / "cache").add(A, torch.ones(1))
    for suffix in (".data", ".keys"):
        shards = FeatureShards(tmp_path / suffix[1:])
        shards.add(A, torch.ones(1))
        [path] = shards.folder.glob(f"*{suffix}")
        path.unlink()
        path.symlink_to("/dev/full")
        with pytest.raises(TrainingError, match=rf"{suffix} cannot be written: No space left on device"):
            shards.add(B, torch.ones(1))
    (tmp_path / "a.keys").mkdir()
    with pytest.raises(TrainingError, match=r"a.keys cannot be read: Is a directory"):
        FeatureShards(tmp_path)
