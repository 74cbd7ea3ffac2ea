"""Benchmarks by name, and scoring of prediction files."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sphinxkit.errors import DataError
from sphinxkit.evaluation import metrics
from sphinxkit.evaluation.annotation import Annotation, Record
from sphinxkit.evaluation.coco_eval import is_results, score_results
from sphinxkit.evaluation.inputs import read_annotations, read_predictions
from sphinxkit.registry import suggest
from sphinxkit.tensor_files.checksums import file_sha256
from sphinxkit.version import __version__


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    Args:
        name: Stem of its annotation file.
        metric: Name in ``metrics.registry``.
        task: Task whose instruction is used; "" if a question is the whole instruction.
        max_new_tokens: Longest answer. Source: LLaMA2-Accessory, accessory/eval_mm/annotations; our choice for the
            benchmarks that it does not have.
        answer_start: Beginning of the answer, appended to the prompt.
        task_options: Options of the task, as (name, value).
        split: Split to take from a file that holds several (OCR-VQA's and ScienceQA's own files); "": all.
        needs_image: Leave out the questions without an image of such a file (ScienceQA).
        answer_key: The answer's name where an answer file holds several by question (A-OKVQA).
    """

    name: str
    metric: str
    task: str
    max_new_tokens: int = 10
    answer_start: str = ""
    task_options: tuple[tuple[str, str], ...] = ()
    split: str = ""
    needs_image: bool = False
    answer_key: str = "answer"

    def read(self, annotations: str | Path, split: str | None = None) -> list[Annotation]:
        """The benchmark's questions in a file.

        Args:
            annotations: See ``inputs.read_annotations``.
            split: Another split than the benchmark's.
        Raises:
            DataError: As ``inputs.read_annotations``.
        """
        found = read_annotations(annotations, self.split if split is None else split)
        return [each for each in found if each.image_path or not (self.needs_image and each.split)]


def _table() -> dict[str, Benchmark]:
    rows = [
        *(("gqa_testdev_balanced", "accuracy", "vqa", 10), ("vsr_val", "accuracy", "", 10)),
        *(("vsr_test", "accuracy", "", 10), ("ai2diagram_test", "accuracy", "vqa", 10)),
        *((f"scienceqa_{split}_{part}", "accuracy", "", 10) for part in ("img", "all") for split in ("test", "val")),
        *(("aokvqa_val", "aokvqa_choice", "multiple_choice", 10), ("aokvqa_val_direct", "aokvqa_direct", "vqa", 10)),
        *((f"mmbench_dev_{language}", "mmbench", "multiple_choice", 10) for language in ("en", "cn")),
        *(("Qbench_dev", "accuracy", "", 10), ("Qbench_test", "accuracy", "", 10)),
        *(("ocrvqa_val", "accuracy", "vqa", 20), ("ocrvqa_test", "accuracy", "vqa", 20)),
        *(("okvqa_val", "vqa_accuracy", "vqa", 10), ("vqav2_val", "vqa_accuracy", "vqa", 10)),
        *(("textvqa_val", "vqa_accuracy", "vqa", 10), ("vizwiz_val", "vqa_accuracy", "vizwiz", 10)),
        *(("docvqa_val", "anls", "vqa", 32), ("infographicvqa_val", "anls", "vqa", 32)),
        *(
            ("chartqa_test_human", "relaxed_accuracy", "vqa", 10),
            ("chartqa_test_augmented", "relaxed_accuracy", "vqa", 10),
        ),
        ("MME_benchmark", "mme", "vqa", 10),
        *((f"pope_{subset}", "pope", "vqa", 10) for subset in ("random", "popular", "adversarial")),
        *(
            (f"refcoco{plus}_{split}", "precision_at_1", "rec", 30)
            for plus in ("", "+")
            for split in ("val", "testA", "testB")
        ),
        *((f"refcocog_{split}", "precision_at_1", "rec", 30) for split in ("val", "test")),
        *(("coco_caption_val", "caption", "caption", 64), ("textcaps_val", "caption", "caption", 64)),
        *(("coco_detection_val", "detection_f1", "detection", 1024), ("coco_pose_val", "pck", "pose", 512)),
        *(("publaynet_val", "layout_f1", "layout", 1024), ("doclaynet_val", "layout_f1_doclaynet", "layout", 1024)),
        ("flickr30k_entities_test", "grounded_recall", "grounded_caption", 512),
    ]
    table = {name: Benchmark(name, metric, task, length) for name, metric, task, length in rows}
    for name in table:
        if name.startswith("scienceqa_"):
            split, needs_image = name.split("_")[1], name.endswith("_img")
            table[name] = replace(table[name], answer_start="The answer is", split=split, needs_image=needs_image)
    for split in ("val", "test"):
        table[f"ocrvqa_{split}"] = replace(table[f"ocrvqa_{split}"], split=split)
    table["aokvqa_val"] = replace(table["aokvqa_val"], answer_key="multiple_choice")
    table["aokvqa_val_direct"] = replace(table["aokvqa_val_direct"], answer_key="direct_answer")
    table["doclaynet_val"] = replace(table["doclaynet_val"], task_options=(("classes", "doclaynet"),))
    return table


BENCHMARKS = _table()
# The public configuration calls the same files so.
ALIASES = {
    "ai2diagram": "ai2diagram_test",
    "gqa_testdev": "gqa_testdev_balanced",
    "mme": "MME_benchmark",
    "scienceqa_test": "scienceqa_test_img",
}
# A task's answer that words its gold answer ("This is a {class}.") has to be read before it is compared.
TASK_METRICS = {"classification": "classification_accuracy"}
# Metrics of answers that are boxes, with or without labels.
BOX_METRICS = frozenset(
    (
        *("precision_at_1", "detection_f1", "layout_f1", "layout_f1_doclaynet", "text_detection_f1"),
        *("grounded_recall", "relation_recall"),
    )
)
TASK_MAX_NEW_TOKENS = 1024  # for a task as a benchmark; our choice


def names() -> list[str]:
    """Every benchmark, and every task: a task is a benchmark whose ``gt_answers`` may be the task's own answers."""
    from sphinxkit.formatters import tasks

    return sorted({*BENCHMARKS, *ALIASES, *tasks.names()})


def get(name: str) -> Benchmark:
    """The benchmark, or the task as a benchmark, called ``name``.

    Raises:
        DataError: There is none; the message suggests the closest name and lists all.
    """
    from sphinxkit.formatters import tasks

    found = BENCHMARKS.get(ALIASES.get(name, name))
    if found is not None:
        return found
    if name in tasks.names():
        metric = TASK_METRICS.get(name) or tasks.create(name).metric
        return Benchmark(name, metric, name, TASK_MAX_NEW_TOKENS)
    raise DataError(f"unknown benchmark {name!r}{suggest(name, names()) or '.'} Known: {', '.join(names())}")


@dataclass(frozen=True, slots=True)
class Report:
    """Scores of one benchmark.

    Args:
        benchmark: Name of the benchmark.
        metric: Name of the metric.
        count: Number of questions.
        scores: Scores by the benchmark's own rules.
        unparsable: Number of answers that the strict rules could not parse.
        lenient: Scores with the tolerant parser, if defined.
        notes: Remarks on the numbers.
        manifest: How the answers were made (as the predictions file tells), the files' hashes, the versions.
        unread: Number of answers that the tolerant parser could not read, either; None: as ``unparsable``.
    """

    benchmark: str
    metric: str
    count: int
    scores: dict[str, Any]
    unparsable: int
    lenient: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    manifest: dict[str, Any] = field(default_factory=dict)
    unread: int | None = None

    @property
    def is_doubtful(self) -> bool:
        """Whether the scores are unreliable: questions failed, or neither parser could read any answer."""
        errors = self.manifest.get("generation", {}).get("errors", 0)
        return bool(errors) or 0 < self.count == (self.unparsable if self.unread is None else self.unread)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "benchmark": self.benchmark,
            "metric": self.metric,
            "count": self.count,
            "scores": self.scores,
            "unparsable": self.unparsable,
            "lenient": self.lenient,
            "notes": list(self.notes),
            "manifest": self.manifest,
        }


def _record(benchmark: Benchmark, gold: Annotation, answer: str, box_format: str | None) -> Record:
    from sphinxkit.formatters import tasks

    if box_format is None:
        return Record(gold, answer)
    if benchmark.metric not in BOX_METRICS:
        raise DataError(f"benchmark {benchmark.name!r} has no boxes: a box format cannot be given")
    label = str(gold.fields.get("category", gold.question))
    return Record(gold, answer, tasks.read_boxes_of(box_format, answer, gold.geometry, label))


def score(
    benchmark: str,
    annotations: str | Path,
    predictions: str | Path,
    *,
    split: str | None = None,
    box_format: str | None = None,
) -> Report:
    """Score a file of predictions.

    COCO's own results (``image_id``, ``category_id``, ``bbox``, ``score``) of a detection benchmark are scored by
    COCO's evaluation; see ``coco_eval.score_results``.

    Args:
        benchmark: A name of ``BENCHMARKS`` or of a task.
        annotations: See ``inputs.read_annotations``.
        predictions: See ``inputs.read_predictions``.
        split: Split to take from a file that holds several; None: the benchmark's.
        box_format: The answers' format, a key of ``tasks.BOX_FORMATS``; None: the task's own. It is never guessed.
    Raises:
        DataError: Unknown benchmark or box format, a box format for a benchmark without boxes, or a file that cannot be
            scored; names file and line.
    """
    chosen = get(benchmark)
    generation: dict[str, Any] = {}
    if chosen.task == "detection" and is_results(predictions):
        count, result = score_results(annotations, predictions)
    else:
        golds = chosen.read(annotations, split)
        given = read_predictions(predictions, golds, chosen.answer_key)
        generation, count = given.manifest, len(golds)
        records = [_record(chosen, *pair, box_format) for pair in zip(golds, given.answers, strict=True)]
        result = metrics.score(chosen.metric, records)
    manifest = {
        "generation": generation,
        "annotations": {"path": str(annotations), "sha256": file_sha256(annotations)},
        "predictions": {"path": str(predictions), "sha256": file_sha256(predictions)},
        "task": chosen.task,
        "box_format": box_format,
        "versions": {"sphinxkit": __version__, "python": platform.python_version()},
    }
    return Report(
        chosen.name,
        chosen.metric,
        count,
        result.scores,
        result.unparsable,
        result.lenient,
        result.notes,
        manifest,
        result.unread,
    )
