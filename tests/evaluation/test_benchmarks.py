from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sphinxkit.errors import DataError
from sphinxkit.evaluation import benchmarks, metrics
from sphinxkit.formatters import tasks

GOLDEN_TOLERANCE = 1e-9  # the issue's; counts are exact, so only the last bits of a division may differ
GOLDEN = ["refcocog_val", "vsr_val", "chartqa_test_augmented", "Qbench_dev"]
NAMED = [
    *(
        "gqa_testdev_balanced",
        "ai2diagram_test",
        "chartqa_test_human",
        "MME_benchmark",
        "scienceqa_test_img",
        "docvqa_val",
    ),
    *("okvqa_val", "textvqa_val", "vizwiz_val", "ocrvqa_val", "refcocog_test", "refcoco_val", "refcoco_testA"),
    *("refcoco_testB", "refcoco+_val", "refcoco+_testA", "refcoco+_testB", *GOLDEN),
]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_scores(golden: Path, name: str) -> None:
    folder = golden / "scoring"
    report = benchmarks.score(name, folder / f"{name}.annotations.json", folder / f"{name}.predictions.json")
    wanted = json.loads((folder / f"{name}.predictions.json").read_text())["scores"]
    assert report.scores == {key: pytest.approx(value, abs=GOLDEN_TOLERANCE) for key, value in wanted.items()}


@pytest.mark.parametrize("name", NAMED)
def test_every_named_benchmark_has_a_metric_and_a_task(name: str) -> None:
    benchmark = benchmarks.get(name)
    assert benchmark.name == name
    assert metrics.get(benchmark.metric)
    assert benchmark.task == "" or tasks.create(benchmark.task)


def test_every_benchmark_has_a_metric_and_a_task() -> None:
    for name in benchmarks.names():
        benchmark = benchmarks.get(name)
        assert metrics.get(benchmark.metric)
        assert benchmark.task == "" or tasks.create(benchmark.task)


def test_the_public_configurations_names_are_known() -> None:
    assert benchmarks.get("mme").name == "MME_benchmark"


def test_unknown_benchmark() -> None:
    with pytest.raises(DataError, match="unknown benchmark 'refcocog_vall'; did you mean 'refcocog_val'"):
        benchmarks.get("refcocog_vall")


def _score(tmp_path: Path, name: str, annotations: Any, predictions: Any) -> benchmarks.Report:
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    (tmp_path / "p.json").write_text(json.dumps(predictions))
    return benchmarks.score(name, tmp_path / "a.json", tmp_path / "p.json")


def test_keys_of_the_scores(tmp_path: Path) -> None:
    annotation = {"image_path": "count/1.jpg", "question": "?", "question_id": 0, "gt_answers": "yes"}
    wanted = {
        "gqa_testdev_balanced": {"accuracy": 1.0},
        "scienceqa_test_img": {"accuracy": 1.0},
        "ocrvqa_val": {"accuracy": 1.0},
        "docvqa_val": {"anls": 1.0},
        "okvqa_val": {"vqa_accuracy": 1.0, "accuracy": 1.0},
        "chartqa_test_human": {"relaxed_accuracy": 1.0, "reference_swapped_arguments": 1.0},
        "MME_benchmark": {"perception": 100.0, "cognition": 0.0, "categories": {"count": 100.0}},
    }
    for name, scores in wanted.items():
        assert _score(tmp_path, name, [annotation], ["yes"]).scores == scores


def test_a_task_is_a_benchmark(tmp_path: Path) -> None:
    annotation = {"question_id": 0, "gt_answers": "dog"}
    report = _score(tmp_path, "classification", [annotation], ["This is a dog."])
    assert report.scores == {"accuracy": 1.0}
    assert report.metric == "classification_accuracy"


def test_the_manifest_says_how_and_from_what(tmp_path: Path) -> None:
    annotation = {"question_id": 0, "gt_answers": "yes"}
    predictions = {"predictions": ["yes"], "manifest": {"template": "sphinx_v1", "temperature": 0.0}}
    report = _score(tmp_path, "vsr_val", [annotation], predictions).to_dict()
    assert report["manifest"]["generation"] == predictions["manifest"]
    assert len(report["manifest"]["annotations"]["sha256"]) == 64
    assert set(report["manifest"]["versions"]) == {"sphinxkit", "python"}
    assert json.loads(json.dumps(report)) == report


def test_what_benchmarks_add_to_their_tasks() -> None:
    assert benchmarks.get("scienceqa_test_img").answer_start == "The answer is"
    doclaynet = benchmarks.get("doclaynet_val")
    assert "Page-footer" in tasks.create(doclaynet.task, **dict(doclaynet.task_options)).prompt()
