from __future__ import annotations

import pytest
import torch

from sphinxkit.errors import CheckpointError, RecipeError
from sphinxkit.interpolation.rename import parse_rename, place_of_llm, renamed
from sphinxkit.tensor_source import MappingSource

LLM = ["model.embed.weight", "model.layers.0.w", "lm_head.weight"]
VLM = ["vision.w", "lm.model.embed.weight", "lm.model.layers.0.w", "lm.lm_head.weight"]


def source(*names: str) -> MappingSource:
    return MappingSource({name: torch.full((2,), float(number)) for number, name in enumerate(names)})


def test_pairs_as_they_are_typed() -> None:
    assert parse_rename(["llm_into_vlm"]) == "llm_into_vlm"
    assert parse_rename(["model. = lm.model.", "a=b=c"]) == {"model.": "lm.model.", "a": "b=c"}
    with pytest.raises(RecipeError, match="rename 'model': expected llm_into_vlm or PREFIX=PREFIX"):
        parse_rename(["model"])


def test_the_longest_prefix_counts_and_other_names_stay() -> None:
    found = renamed(source("a.b.x", "a.y", "z"), {"a.": "1.", "a.b.": "2."})
    assert list(found.keys()) == ["2.x", "1.y", "z"]
    assert found.read("1.y").tolist() == [1.0, 1.0]
    assert (found.shape("z"), found.dtype("z")) == ((2,), torch.float32)


def test_names_that_meet_and_prefixes_without_use() -> None:
    with pytest.raises(CheckpointError, match=r"rename: 'a.x' and 'b.x' would both be 'c.x'"):
        renamed(source("a.x", "b.x"), {"a.": "c.", "b.": "c."})
    with pytest.raises(RecipeError, match="no tensor has a name that begins with 'q.'"):
        renamed(source("a.x"), {"a.": "c.", "q.": "d."})


def test_place_of_a_language_model() -> None:
    assert place_of_llm(LLM, VLM) == {"model.": "lm.model.", "lm_head.": "lm.lm_head."}


def test_no_place_several_places_and_what_would_be_lost() -> None:
    with pytest.raises(CheckpointError, match=r"model.\* \(3 names\).* no place"):
        place_of_llm([*LLM, "model.layers.1.w"], VLM)
    with pytest.raises(CheckpointError, match="must have one place.*at 'draft.model.', 'lm.model.'"):
        place_of_llm(LLM, [*VLM, "draft.model.embed.weight", "draft.model.layers.0.w"])
    with pytest.raises(CheckpointError, match=r"(?s)lacks tensors of the first model's.*lm.model.layers.1.w"):
        place_of_llm(LLM, [*VLM, "lm.model.layers.1.w"])
