from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sphinxkit.data.mixture import Mixture, MixtureSource, SampleRef
from sphinxkit.errors import DataError


def write_source(path: Path, count: int, *, is_text: bool = False) -> Path:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    with path.open("w") as file:
        for index in range(count):
            record = {"text": f"t{index}"} if is_text else {"image": f"{index}.png", "conversations": turns}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for name, count in (("a", 23), ("b", 10), ("c", 1)):
        write_source(folder / f"{name}.jsonl", count)
    write_source(folder / "t.jsonl", 13, is_text=True)
    return folder


def make(folder: Path, *specs: dict[str, Any], **options: Any) -> Mixture:
    sources = [MixtureSource(**{"path": "a.jsonl", **spec}) for spec in specs]
    return Mixture(sources, folder=str(folder), **options)


ALL = ({}, {"path": "b.jsonl"}, {"path": "t.jsonl", "type": "text"})


def counts(mixture: Mixture, epoch: int = 0) -> Counter[str]:
    return Counter(mixture.sample_id(ref) for ref in mixture.order(epoch))


def test_an_epoch_holds_every_sample_once(folder: Path) -> None:
    mixture = make(folder, *ALL, batch_size=4)
    assert mixture.num_samples == 46
    assert mixture.num_batches == 8 + 1 + 3 + 1
    assert counts(mixture) == {f"{name}:{i}": 1 for name, n in (("a", 23), ("b", 10), ("t", 13)) for i in range(n)}


def test_epochs_and_seeds_differ_and_repeat_themselves(folder: Path) -> None:
    orders = [list(make(folder, *ALL, batch_size=4, seed=seed).order(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert list(make(folder, *ALL, batch_size=4).order()) == orders[0]


def test_the_order_is_pinned(folder: Path) -> None:
    """A run must be resumable with a later version."""
    mixture = make(folder, {}, {"path": "b.jsonl"}, batch_size=4, seed=3)
    assert [mixture.sample_id(ref) for ref in mixture.order()][:6] == PINNED


def test_batches_hold_one_type_and_small_ones_come_last(folder: Path) -> None:
    mixture = make(folder, *ALL, batch_size=4)
    position, lengths, kinds = 0, [], []
    while position < mixture.num_samples:
        kind, refs = mixture.batch(position)
        assert {mixture.sample_id(ref)[0] for ref in refs} <= ({"t"} if kind == "text" else {"a", "b"})
        assert mixture.batch_length(position) == len(refs)
        lengths.append(len(refs))
        kinds.append(kind)
        position += len(refs)
    assert lengths == [4] * 11 + [1, 1]
    assert len(set(kinds[:5])) == 2 or len(set(kinds[5:11])) == 2  # types are mixed
    dropped = make(folder, *ALL, batch_size=4, remainder="drop")
    assert (dropped.num_samples, dropped.num_batches) == (44, 11)
    assert list(dropped.order()) == list(mixture.order())[:44]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 9), st.integers(0, 100), st.floats(0.05, 1.0), st.floats(0.1, 3.0), st.integers(0, 3), st.booleans()
)
def test_any_mixture_is_the_sum_of_its_parts(
    folder: Path, batch_size: int, seed: int, ratio: float, repeat: float, epoch: int, has_text: bool
) -> None:
    specs = [{"ratio": ratio, "repeat": repeat}, {"path": "b.jsonl"}, *([ALL[2]] if has_text else [])]
    mixture = make(folder, *specs, batch_size=batch_size, seed=seed)
    found = counts(mixture, epoch)
    total = round(23 * ratio * repeat)
    mine = [count for name, count in found.items() if name[0] == "a"]
    assert sum(mine) == total
    assert max(mine, default=0) <= -(-total // 23)  # spread evenly: no record twice before each was there once
    assert all(found[f"b:{index}"] == 1 for index in range(10))
    assert found.total() == mixture.num_samples
    start = seed % (mixture.num_samples + 1)
    assert list(mixture.order(epoch, start)) == list(mixture.order(epoch))[start:]


def test_a_share_of_a_source_is_another_one_in_every_epoch(folder: Path) -> None:
    mixture = make(folder, {"ratio": 0.5})
    assert set(counts(mixture, 0)) != set(counts(mixture, 1))


def test_weights(folder: Path) -> None:
    specs = [{"weight": 3}, {"path": "b.jsonl", "weight": 1}, {"path": "c.jsonl", "weight": 0}]
    mixture = make(folder, *specs, epoch_size=41)
    assert [row.count for row in mixture.table()] == [31, 10, 0]
    found = counts(mixture)
    assert {count for name, count in found.items() if name[0] == "a"} == {1, 2}
    assert mixture.num_samples == 41


@pytest.mark.parametrize(
    ("temperature", "wanted"),
    [(1.0, [46, 20]), (1e9, [33, 33]), (2.0, [40, 26])],  # 66 * sqrt(23) / (sqrt(23) + sqrt(10)) = 39.8
)
def test_temperature(folder: Path, temperature: float, wanted: list[int]) -> None:
    mixture = make(folder, {}, {"path": "b.jsonl"}, temperature=temperature, epoch_size=66)
    assert [row.count for row in mixture.table()] == wanted
    assert make(folder, {}, {"path": "b.jsonl"}, temperature=temperature).num_samples == 33


def test_an_epoch_size_shares_out_the_counts(folder: Path) -> None:
    mixture = make(folder, {}, {"path": "b.jsonl", "repeat": 2}, epoch_size=20)
    assert [row.count for row in mixture.table()] == [11, 9]


def test_the_table(folder: Path) -> None:
    mixture = make(folder, {"task": "vqa"}, {"path": "t.jsonl", "type": "text", "repeat": 2}, batch_size=4)
    lines = mixture.format_table().splitlines()
    assert lines[0].split() == ["source", "type", "records", "in", "epoch", "passes", "share", "task"]
    assert lines[1].split() == ["a", "image-text", "23", "23", "1.00", "46.9%", "vqa"]
    assert lines[2].split() == ["t", "text", "13", "26", "2.00", "53.1%"]
    assert lines[3].split() == ["total", "36", "49", "13", "batches", "of", "4"]
    dropped = make(folder, {}, batch_size=4, remainder="drop").format_table()
    assert dropped.endswith("5 batches of 4, 3 samples dropped")
    assert mixture.names == ["a", "t"]


def test_reading(folder: Path) -> None:
    mixture = make(folder, {"root": "pictures", "task": "vqa"}, {"path": "t.jsonl", "type": "image-text"})
    sample = mixture.read(SampleRef(0, 4, 0))
    assert sample.image == folder / "pictures" / "4.png"
    assert (sample.id, sample.task, sample.where) == ("a:4", "vqa", f"{folder / 'a.jsonl'}:5")
    (folder / "empty.jsonl").write_text('{"text": "x", "image": ""}\n')
    assert make(folder, {"path": "empty.jsonl"}).read(SampleRef(0, 0, 0)).type == "text"
    mixture = make(folder, {"type": "text"})
    with pytest.raises(DataError, match=r"a\.jsonl:1: the sample is image-text, its source 'a' is text"):
        mixture.read(SampleRef(0, 0, 0))


@pytest.fixture
def both(folder: Path) -> Path:
    """Every third of 24 records is a text."""
    lines = [(folder / name).read_text().splitlines() for name in ("a.jsonl", "t.jsonl")]
    rows = [lines[1][index // 3] if index % 3 == 2 else lines[0][index % 23] for index in range(24)]
    (folder / "both.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_a_file_of_images_and_texts(both: Path) -> None:
    mixture = make(both, {"path": "both.jsonl", "repeat": 2}, {"path": "b.jsonl"}, batch_size=4)
    assert [(row.name, row.type, row.size, row.count) for row in mixture.table()] == [
        ("both", "image-text", 16, 32),
        ("both (text)", "text", 8, 16),
        ("b", "image-text", 10, 10),
    ]
    assert counts(mixture) == {f"both:{i}": 2 for i in range(24)} | {f"b:{i}": 1 for i in range(10)}
    for position in range(0, mixture.num_samples, 4):
        kind, refs = mixture.batch(position)
        for ref in refs:
            sample = mixture.read(ref)
            assert sample.type == kind
            assert sample.where == f"{both / sample.id.split(':')[0]}.jsonl:{int(sample.id.split(':')[1]) + 1}"


def test_parts_of_a_file_share_its_weight(both: Path) -> None:
    sources = ({"path": "both.jsonl", "weight": 3.0}, {"path": "b.jsonl", "weight": 1.0})
    assert [row.count for row in make(both, *sources, epoch_size=120).table()] == [60, 30, 30]
    sizes = [row.count for row in make(both, {"path": "both.jsonl"}, {"path": "c.jsonl"}, temperature=2.0).table()]
    assert sum(sizes) == 25
    assert sizes[2] == round(25 / (1 + 24**0.5))


def test_texts_alone_need_no_type(folder: Path) -> None:
    mixture = make(folder, {"path": "t.jsonl"})
    assert [(row.name, row.type, row.count) for row in mixture.table()] == [("t (text)", "text", 13)]
    assert mixture.read(SampleRef(0, 3, 0)).text == "t3"


def test_the_fingerprint_follows_the_order(folder: Path) -> None:
    prints = {
        make(folder, *ALL).fingerprint(),
        make(folder, *ALL, seed=1).fingerprint(),
        make(folder, *ALL, batch_size=2).fingerprint(),
        make(folder, *ALL[:2]).fingerprint(),
        make(folder, {"ratio": 0.5}, *ALL[1:]).fingerprint(),
    }
    assert len(prints) == 5
    assert make(folder, *ALL, max_bad_rate=0.5).fingerprint() in prints


@pytest.mark.parametrize(
    ("specs", "options", "message"),
    [
        ([], {}, "mixture: there are no sources"),
        ([{}], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ([{}], {"epoch_size": 0}, "epoch_size must be at least 1, got 0"),
        ([{}], {"temperature": 0.0}, r"temperature must be positive, got 0\.0"),
        ([{}], {"remainder": "x"}, "remainder must be keep or drop, got 'x'"),
        ([{}], {"over_length": "x"}, "over_length must be error, truncate, skip or continue, got 'x'"),
        ([{}], {"max_bad_rate": 2}, r"max_bad_rate must be in \[0, 1\], got 2"),
        ([{}, {}], {}, r"sources\[1\] \(a\): the name is taken"),
        ([{"type": "x"}], {}, r"sources\[0\] \(a\): type must be text or image-text, got 'x'"),
        ([{"ratio": 0}], {}, r"sources\[0\] \(a\): ratio must be in \(0, 1\], got 0"),
        ([{"repeat": 0}], {}, "repeat must be positive, got 0"),
        ([{"weight": -1}], {"epoch_size": 3}, "weight must not be negative, got -1"),
        ([{"weight": 1}], {}, "weights need an epoch_size"),
        ([{"weight": 0}], {"epoch_size": 3}, "the weights add up to 0"),
        ([{"weight": 1}, {"path": "b.jsonl"}], {"epoch_size": 3}, "either every source has a weight or none"),
        ([{"weight": 1, "ratio": 0.5}], {"epoch_size": 3}, "ratio and repeat do not go with weights or a temperature"),
        ([{"repeat": 2}], {"temperature": 1.0}, "ratio and repeat do not go with weights or a temperature"),
        ([{"path": "none.jsonl"}], {}, r"none\.jsonl: cannot be read"),
    ],
)
def test_faults(folder: Path, specs: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(folder, *specs, **options)


def test_every_fault_at_once(folder: Path) -> None:
    with pytest.raises(DataError, match=r"batch_size .*; remainder .*; sources\[0\] \(a\): ratio"):
        make(folder, {"ratio": 2}, batch_size=0, remainder="x")


def test_sources_as_mappings(folder: Path) -> None:
    assert Mixture([{"path": "b.jsonl"}], folder=str(folder)).num_samples == 10  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"mixture: sources\[0\]: .*unexpected keyword argument 'pth'"):
        Mixture([{"pth": "b.jsonl"}])  # type: ignore[list-item]


def test_positions_outside_the_epoch(folder: Path) -> None:
    mixture = make(folder, {"path": "c.jsonl"})
    with pytest.raises(DataError, match="mixture: sample 1 is outside an epoch of 1"):
        mixture.batch(1)
    with pytest.raises(DataError, match="mixture: sample 1 is outside an epoch of 1"):
        mixture.batch_length(1)


def test_recipes_of_kind_mixture_are_validated_by_this_signature() -> None:
    from sphinxkit.registry import Registry

    model = Registry("recipe", {"mixture": Mixture}).options_model("mixture")
    assert model.model_validate({"sources": [{"path": "a.jsonl"}], "batch_size": 2})
    with pytest.raises(ValueError, match="Extra inputs are not permitted|Unexpected keyword argument"):
        model.model_validate({"sources": [{"path": "a.jsonl", "wieght": 1}]})


def test_published_conversations_are_trimmed_and_our_own_must_be_whole(tmp_path: Path) -> None:
    """ShareGPT's conversations begin with an answer or end with a question."""
    turns = [{"from": who, "value": f"{number}"} for number, who in enumerate(("gpt", "human", "gpt", "human"))]
    (tmp_path / "raw.json").write_text(json.dumps([{"conversations": turns}]))
    sample = make(tmp_path, {"path": "raw.json"}).read(SampleRef(0, 0, 0))
    assert [message["content"] for message in sample.messages] == ["1", "2"]
    (tmp_path / "own.jsonl").write_text(json.dumps({"conversations": turns}))
    with pytest.raises(DataError, match=r"own\.jsonl:1: message 0"):
        make(tmp_path, {"path": "own.jsonl"}).read(SampleRef(0, 0, 0))


def test_locality_reads_every_source_block_by_block(folder: Path) -> None:
    mixture = make(folder, *ALL, batch_size=4, locality=5)
    assert counts(mixture) == counts(make(folder, *ALL, batch_size=4))
    order = [ref for ref in mixture.order() if ref.source == 0]
    blocks = [ref.index // 5 for ref in order]
    assert len([1 for one, other in itertools.pairwise(blocks) if one != other]) == 4  # five blocks
    assert [ref.index for ref in order] != sorted(ref.index for ref in order)
    assert list(mixture.order(0, 9)) == list(mixture.order())[9:]
    assert list(mixture.order(1)) != list(mixture.order())
    assert mixture.fingerprint() != make(folder, *ALL, batch_size=4).fingerprint()
    assert len({ref.source for ref in list(mixture.order())[:24]}) == 3  # sources take turns
    with pytest.raises(DataError, match="locality must be at least 1, got 0"):
        make(folder, {}, locality=0)


PINNED = ["a:6", "a:4", "a:9", "a:18", "a:22", "a:21"]


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "recipes").glob("mixture_*.yaml")), ids=lambda p: p.stem
)
def test_the_shipped_mixtures_open(path: Path, tmp_path: Path) -> None:
    import yaml

    document = yaml.safe_load(path.read_text())
    assert document.pop("kind") == "mixture"
    for source in document["sources"]:
        write_source(tmp_path / source["path"], 40, is_text=source.get("type") == "text")
    mixture = Mixture(**{**document, "epoch_size": 50 if "epoch_size" in document else None, "folder": str(tmp_path)})
    assert {ref.source for ref in mixture.order()} == set(range(len(document["sources"])))
