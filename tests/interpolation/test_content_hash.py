from __future__ import annotations

import hashlib

import torch

from sphinxkit.interpolation.content_hash import ContentHash, Hasher


def by_hand(*lines: str) -> str:
    return hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()


def test_by_hand_and_whatever_the_order() -> None:
    a, b = torch.arange(6, dtype=torch.float32).reshape(2, 3), torch.ones(1, dtype=torch.bfloat16)
    of_a, of_b = hashlib.sha256(a.numpy().tobytes()).hexdigest(), hashlib.sha256(b"\x80\x3f").hexdigest()
    expected = by_hand(f"a float32 2x3 {of_a}", f"b bfloat16 1 {of_b}")
    for names in ("ab", "ba"):
        hasher = Hasher(2)
        for name in names:
            hasher.start(name, {1: {"a": a, "b": b}[name]})
        hasher.start("a", {1: b})  # has been hashed: nothing changes
        assert hasher.results() == [ContentHash(0, None), ContentHash(2, expected)]


def test_only_the_models_asked_for() -> None:
    hasher = Hasher(2, wanted=[0])
    hasher.start("a", {0: torch.ones(2), 1: torch.ones(2)})
    first, second = hasher.results()
    assert (first.tensors, second) == (1, ContentHash(0, None))
