from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks import report, results
from benchmarks.results import CaseRecord, Ceilings, Document, Measurement, WorkRecord


def measurement(median: float) -> Measurement:
    return Measurement(median=median, low=median, high=median, best=median, repeats=1, calls_per_repeat=1)


def document(device: str = "cpu", micro: bool = False) -> Document:
    return Document(
        date="2026-01-02T03:04:05+00:00",
        device=device,
        micro=micro,
        note="A note.",
        machine={"cpu": "Some CPU", "cores": 2},
        versions={"torch": "2.0"},
        load_average=[0.5, 1.5],
        ceilings=Ceilings(copy_bandwidth=1e9, read_bandwidth=1e9, matmul={"float32": 1e12}),
        results=[
            CaseRecord(
                benchmark="mixers",
                case="a | b",
                status="ok",
                work=WorkRecord(read_bytes=1e9),
                unit="views",
                amount=10,
                candidates={"sphinxkit": measurement(2.0), "other": measurement(3.0)},
                speedup={"other": 1.5},
                cpu_speedup={"other": 1.2},
            ),
            CaseRecord(benchmark="mixers", case="c", status="skipped", reason="out of time"),
        ],
    )


def test_document_survives_writing_and_reading(tmp_path: Path) -> None:
    original = document()
    original.write(tmp_path / "a.json")
    assert results.read(tmp_path / "a.json") == original
    assert original.results[0].candidates["sphinxkit"].over_floor == 2.0  # 1e9 bytes at 1e9 per second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unknown": 1}, "Extra inputs are not permitted"),
        ({"device": "abacus"}, "Input should be 'cpu' or 'cuda'"),
        ({"results": [{"benchmark": "a", "case": "b", "status": "ok"}]}, "ok, but nothing was measured"),
        ({"results": [{"benchmark": "a", "case": "b", "status": "failed"}]}, "failed without a reason"),
    ],
)
def test_invalid_documents_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Document.model_validate({**document().model_dump(), **change})


def test_times_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="times out of order"):
        Measurement(median=1, low=2, high=3, best=1, repeats=1, calls_per_repeat=1)


def test_table_has_the_numbers_and_says_what_did_not_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document().write(tmp_path / "a.json")
    written = report.write([tmp_path / "a.json"], tmp_path / "RESULTS.md")
    text = written[0].read_text()
    assert "Not yet run on CUDA." in text
    assert "| a / b | **sphinxkit** | 2 s (2 s to 2 s) | 5 views/s | 2 |  |  |  |  |" in text
    assert "|  | other | 3 s (3 s to 3 s) | 3.333 views/s | 3 |  | 1.50 (1.20) |  |  |" in text
    assert "- c: skipped: out of time" in text
    assert "| matmul float32 | 1 TFLOP/s |" in text
    assert "A note." in text
    assert "2026-01-02" in text
    assert written[1] == tmp_path / "plots" / "a.svg"
    assert "plots/a.svg" in text


def test_micro_documents_say_that_they_mean_nothing_and_do_not_count_as_cuda(tmp_path: Path) -> None:
    document("cuda", micro=True).write(tmp_path / "a.json")
    text = report.write([tmp_path / "a.json"], tmp_path / "RESULTS.md")[0].read_text()
    assert "these numbers mean nothing" in text
    assert "Not yet run on CUDA." in text


def test_plots_are_reproducible(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document().write(tmp_path / "a.json")
    first = report.write([tmp_path / "a.json"], tmp_path / "RESULTS.md")[1].read_bytes()
    assert report.write([tmp_path / "a.json"], tmp_path / "RESULTS.md")[1].read_bytes() == first
