"""Converts annotation files to conversation JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from sphinxkit.atomic import atomic_file, named_errors
from sphinxkit.data.conversations import write_conversation
from sphinxkit.data.converters import choices, coco, documents, image_folder, llava, regions, vqa
from sphinxkit.data.converters.base import Converted, Converter, Malformed, Problems, Source, is_writable
from sphinxkit.data.permutation import derive_key
from sphinxkit.errors import DataError
from sphinxkit.formatters import tasks
from sphinxkit.registry import suggest

ANY_TASK = "*"

# Format -> task -> converter; the first task is the default. ANY_TASK: conversations that have been worded already.
FORMATS: Mapping[str, Mapping[str, Converter]] = {
    "llava": {ANY_TASK: llava.llava},
    "vqav2": {"vqa": vqa.vqav2},
    "gqa": {"vqa": vqa.gqa},
    "ocrvqa": {"vqa": vqa.ocrvqa},
    "textvqa": {"vqa": vqa.textvqa},
    "textcaps": {"caption": vqa.textcaps},
    "docvqa": {"vqa": documents.docvqa},
    "infographicvqa": {"vqa": documents.docvqa},
    "chartqa": {"vqa": documents.chartqa},
    "scienceqa": {"multiple_choice": choices.scienceqa},
    "aokvqa": {"multiple_choice": choices.aokvqa_choices, "vqa": choices.aokvqa_direct},
    "coco": {"detection": coco.detection, "pose": coco.pose, "caption": coco.caption},
    "coco_captions": {"caption": coco.caption},
    "coco_instances": {"detection": coco.detection},
    "coco_keypoints": {"pose": coco.pose},
    "lvis": {"detection": coco.lvis},
    "objects365": {"detection": coco.objects365},
    "publaynet": {"layout": coco.layout},
    "doclaynet": {"layout": coco.layout},
    "refcoco": {"rec": regions.refcoco, "reg": regions.refcoco},
    "visual_genome": {
        "rec": regions.genome_regions,
        "reg": regions.genome_regions,
        "relation": regions.genome_relations,
        "vqa": regions.genome_questions,
    },
    "flickr30k": {"grounded_caption": regions.flickr30k},
    "imagefolder": {"classification": image_folder.classification},
}
# Other names of the same layouts; case and punctuation play no part.
SPELLINGS = {
    "flickr30kentities": "flickr30k",
    "llava665k": "llava",
    "llavav15mix665k": "llava",
    "objects365v2": "objects365",
    "okvqa": "vqav2",
    "refcocog": "refcoco",
    "refcocoplus": "refcoco",
    "sharegpt": "llava",
    "sharegpt4v": "llava",
    "vg": "visual_genome",
    "vqa": "vqav2",
}
# Options of the tasks that a format implies.
TASK_OPTIONS: Mapping[str, Mapping[str, Any]] = {"doclaynet": {"classes": "doclaynet"}}

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """Result of a conversion.

    Args:
        source: The annotation file or folder.
        format: Format of the source.
        task: The task written.
        output: The file written, or None.
        num_written: Conversations written.
        num_malformed: Records left out.
        malformed: The first malformed records.
        malformed_file: JSON lines file of all malformed records; None if there are none.
    """

    source: str
    format: str
    task: str
    output: str | None
    num_written: int
    num_malformed: int
    malformed: list[Malformed]
    malformed_file: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _choose(format_name: str, task: str | None) -> tuple[str, str, Converter]:
    spellings = {_plain(known): known for known in FORMATS} | SPELLINGS
    name = spellings.get(_plain(format_name), format_name)
    if name not in FORMATS:
        hint = suggest(name, FORMATS) or "."
        raise DataError(f"unknown format {format_name!r}{hint} Known: {', '.join(sorted(FORMATS))}")
    converters = FORMATS[name]
    if ANY_TASK in converters:
        return name, task or "", converters[ANY_TASK]
    chosen = task or next(iter(converters))
    if chosen not in converters:
        hint = suggest(chosen, converters)
        raise DataError(f"format {name!r} has no task {chosen!r}{hint} It has: {', '.join(converters)}")
    return name, chosen, converters[chosen]


def convert_records(
    source: Source,
    format_name: str,
    task: str | None,
    problems: Problems,
    image_prefix: str = "",
    wording: int | None = None,
) -> Iterator[dict[str, Any]]:
    """The conversations of an annotation file, one by one, in bounded memory.

    Args:
        source: Input files.
        format_name: A key of ``FORMATS``.
        task: One of the format's tasks; None: its first. For ready conversations: their label.
        problems: Collects unusable records.
        image_prefix: Prefix of every image path.
        wording: Index of the task's wording; None: any, drawn by the record's id, so that a record always has the same.
    Yields:
        Records as ``write_conversation`` makes them.
    Raises:
        DataError: Unknown format or task, a file that cannot be read, or a malformed record under ``problems.strict``.
    """
    name, chosen, converter = _choose(format_name, task)
    formatter = None if ANY_TASK in FORMATS[name] else tasks.create(chosen, **TASK_OPTIONS.get(name, {}))
    if formatter is not None and wording is not None and not 0 <= wording < len(formatter.wordings):
        raise DataError(f"task {chosen!r}: wording {wording} does not exist, there are {len(formatter.wordings)}")

    def word(converted: Converted) -> list[dict[str, str]]:
        if formatter is None:
            return list(converted.sample)
        drawn = derive_key("wording", chosen, converted.id) % len(formatter.wordings)
        example = formatter.format(converted.sample, drawn if wording is None else wording)
        return [{"role": "user", "content": example.instruction}, {"role": "assistant", "content": example.answer}]

    for converted in converter(source, problems):
        try:
            messages = word(converted)
        except DataError as error:
            problems.add(converted.file, converted.line, f"{converted.id}: {error}")
            continue
        if not is_writable("".join([converted.id, converted.image, *(turn["content"] for turn in messages)])):
            reason = "half of a surrogate pair cannot be written"
            problems.add(converted.file, converted.line, f"{converted.id}: {reason}")
            continue
        image = f"{image_prefix}{converted.image}" if converted.image else ""
        yield write_conversation(converted.id, messages, image=image, task=chosen)


def convert_data(
    source: str | Path | Source,
    format_name: str,
    task: str | None = None,
    output: str | Path | None = None,
    *,
    companion: str | Path | None = None,
    split: str | None = None,
    stream: IO[str] | None = None,
    image_prefix: str = "",
    wording: int | None = None,
    strict: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert an annotation file to conversation JSON lines.

    Malformed records are left out, counted, and listed with file and line in ``<output>.malformed.jsonl``.

    Args:
        source: Annotation file or folder; or a ``Source``, which has companion and split of its own.
        format_name: A key of ``FORMATS``.
        task: One of the format's tasks; None: its first.
        output: File to write (atomically); None: write to ``stream``.
        companion: The format's second file: VQAv2's annotations, TextVQA's OCR tokens, image_data.json, refs(...).p.
        split: Only this split, where records name one.
        stream: Output stream if ``output`` is None.
        image_prefix: Prefix of every image path.
        wording: See ``convert_records``.
        strict: Raise at the first malformed record and write nothing.
        limit: Stop after this many conversations.
        progress: Called from time to time with the number written.
    Raises:
        DataError: As ``convert_records``; neither output nor stream; a file that cannot be read or written; the output
            is one of the inputs.
    """
    if not isinstance(source, Source):
        source = Source(Path(source), None if companion is None else Path(companion), split)
    if output is None and stream is None:
        raise DataError("convert-data: there is neither an output file nor a stream")
    with named_errors(output):
        if not source.path.exists():
            raise DataError(f"{source.path}: there is no such file or folder")
        _refuse_own_input(source, output)
    name, chosen, _ = _choose(format_name, task)
    listing = None if output is None else Path(f"{output}.malformed.jsonl")
    with named_errors(output), ExitStack() as stack:
        target = stream
        if output is not None:
            temporary = stack.enter_context(atomic_file(output))
            target = stack.enter_context(temporary.open("w", encoding="utf-8"))
        sink = _Listing(stack, listing)
        problems = Problems(strict, sink.write if listing is not None else None)
        encode = json.JSONEncoder(ensure_ascii=False).encode
        written = 0
        for record in convert_records(source, name, task, problems, image_prefix, wording):
            if limit is not None and written >= limit:
                break
            if target is not None:
                target.write(encode(record) + "\n")
            written += 1
            if progress is not None and written % 1000 == 0:
                progress(written)
    if listing is not None and not problems.count:
        listing.unlink(missing_ok=True)  # of an earlier run
    return ConversionReport(
        source=str(source.path),
        format=name,
        task=chosen,
        output=None if output is None else str(output),
        num_written=written,
        num_malformed=problems.count,
        malformed=problems.listed,
        malformed_file=str(listing) if listing is not None and problems.count else None,
    )


def _refuse_own_input(source: Source, output: str | Path | None) -> None:
    target = None if output is None else Path(output)
    for path in (source.path, source.companion):
        if path is not None and target is not None and path.is_file() and target.exists() and target.samefile(path):
            raise DataError(f"output {output} is the input; write to another file")


class _Listing:
    """The file of malformed records, opened with the first of them."""

    def __init__(self, stack: ExitStack, path: Path | None) -> None:
        self.stack, self.path = stack, path
        self.file: IO[str] | None = None

    def write(self, problem: Malformed) -> None:
        if self.file is None and self.path is not None:
            temporary = self.stack.enter_context(atomic_file(self.path))
            self.file = self.stack.enter_context(temporary.open("w", encoding="utf-8"))
        if self.file is not None:
            self.file.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")
