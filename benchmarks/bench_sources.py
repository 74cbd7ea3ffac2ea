"""Sources: lines, members of tars and rows indexed and opened by 8 processes; loading a sample against plain PIL.

The competitor of the index is what sphinxkit did before: every process reads every file and keeps 17 bytes a record.
"MB of all" is what the memory of all processes grew by, a shared page counted once (Pss in ``smaps_rollup``).
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import shutil
import tarfile
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_tilers import PADDING, photograph
from benchmarks.harness import Case, Context, Sample
from benchmarks.process import in_fresh_process

DEVICES = ("cpu",)
PROCESSES = 8
SHARDS = 20
READS = 20  # records that each process reads, at random
MAX_SECONDS = 1200
PICTURES = 32
TOKENIZER = Path(__file__).parents[1] / "recipes" / "sphinx_micro.model"


def cases(context: Context) -> Iterator[Case]:
    yield from _lines(context)
    yield from _members(context)
    yield from _rows(context)
    yield from _loading(context)


def _index_case(context: Context, name: str, count: int, ending: str, *, others: dict[str, str]) -> Case:
    folder = context.scratch / ending
    candidates = {"sphinxkit": "index_and_open", **others}
    return Case(
        f"{count} {name}, {sum(path.stat().st_size for path in folder.iterdir()) / 1e9:.2g} GB",
        {who: _candidate(function, folder / f"*.{ending}", context) for who, function in candidates.items()},
        amount=count,
        unit="records",
        repeats=1,
        max_seconds=MAX_SECONDS,
    )


def _lines(context: Context) -> Iterator[Case]:
    count = context.pick(10_000_000, 2_000)
    folder = _folder(context, "jsonl")
    draw = random.Random(0)
    with (folder / "0.jsonl").open("w") as file:
        for number in range(count // SHARDS):
            image = f'"image": "{number:09d}.jpg", ' if number % 4 else ""
            answer = "x" * draw.randrange(60)
            file.write(f'{{{image}"conversations": [{{"from": "human", "value": "What?"}}, ')
            file.write(f'{{"from": "gpt", "value": "{answer}"}}]}}\n')
    _copy(folder / "0.jsonl")
    yield _index_case(context, "JSON lines", count, "jsonl", others={"every process reads all": "scan_and_open"})
    _delete(folder)


def _members(context: Context) -> Iterator[Case]:
    count = context.pick(1_000_000, 400)
    folder = _folder(context, "tar")
    picture = bytes(400)
    with tarfile.open(folder / "0.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(count // SHARDS // 2):
            for ending, content in (("jpg", picture), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{number:09d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    _copy(folder / "0.tar")
    others = {"tarfile, one process": "list_members"}
    yield _index_case(context, "members of tars, two a record", count, "tar", others=others)
    _delete(folder)


def _rows(context: Context) -> Iterator[Case]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        yield Case("rows of Parquet", skip="pyarrow is not installed")
        return
    count = context.pick(1_000_000, 400)
    folder = _folder(context, "parquet")
    words = ["one", "two", "three", "four"]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=40)) for _ in range(count // SHARDS)]
    table = pyarrow.table({"text": texts, "url": [f"https://example.org/{n}" for n in range(len(texts))]})
    pyarrow.parquet.write_table(table, folder / "0.parquet", row_group_size=1000)
    _copy(folder / "0.parquet")
    yield _index_case(context, "rows of Parquet", count, "parquet", others={})
    _delete(folder)


def _folder(context: Context, name: str) -> Path:
    folder = context.scratch / name
    folder.mkdir()
    return folder


def _copy(first: Path) -> None:
    for shard in range(1, SHARDS):
        shutil.copy(first, first.with_stem(str(shard)))


def _delete(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _candidate(function: str, pattern: Path, context: Context) -> Callable[[], Sample]:
    def call() -> Sample:
        target = f"benchmarks.bench_sources:{function}"
        return in_fresh_process(target, timeout=MAX_SECONDS, fresh=not context.micro, pattern=str(pattern))

    return call


def index_and_open_setup(pattern: str) -> None:
    """Import outside the clock."""
    import sphinxkit.data.mixture  # noqa: F401


def index_and_open(pattern: str) -> Sample:
    """Index, then open in all processes."""
    from sphinxkit.data.sources import index_data

    with tempfile.TemporaryDirectory() as cache:
        os.environ["SPHINXKIT_CACHE"] = cache
        try:
            begin, cpu = time.perf_counter(), _processor_seconds()
            report = index_data(pattern)
            seconds = time.perf_counter() - begin
            opened, memory = _in_processes(_open_ours, pattern)
        finally:
            del os.environ["SPHINXKIT_CACHE"]
        size = Path(report.file).stat().st_size
    extra = {"index s": seconds, "open s": opened, "index bytes a record": size / report.records, "MB of all": memory}
    return Sample(seconds + opened, extra=extra, cpu_seconds=_processor_seconds() - cpu)


def _open_ours(pattern: str) -> object:
    from sphinxkit.data.sources import open_source

    source = open_source(pattern)
    draw = random.Random(os.getpid())
    for _ in range(READS):
        source.read(draw.randrange(len(source)))
    return source


scan_and_open_setup = index_and_open_setup


def scan_and_open(pattern: str) -> Sample:
    """As it was before: each process reads all lines."""
    cpu = _processor_seconds()
    opened, memory = _in_processes(_open_before, pattern)
    return Sample(opened, extra={"MB of all": memory}, cpu_seconds=_processor_seconds() - cpu)


def _open_before(pattern: str) -> object:
    found = []
    for path in sorted(Path(pattern).parent.glob(Path(pattern).name)):
        offsets, lines, images = array("Q"), array("Q"), bytearray()
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    offsets.append(offset)
                    lines.append(number)
                    images.append(b'"image' in line)
                offset += len(line)
        found.append((offsets, lines, images))
    return found


def list_members(pattern: str) -> Sample:
    """Python's own reader of tars."""
    begin, count = time.perf_counter(), 0
    for path in sorted(Path(pattern).parent.glob(Path(pattern).name)):
        with tarfile.open(path) as archive:
            count += len(archive.getmembers())
    return Sample(time.perf_counter() - begin, extra={"members": count})


def _processor_seconds() -> float:
    """Of this process and those that it started and that have ended."""
    return sum(os.times()[:4])


def _pss() -> int:
    """Memory of this process in bytes; of a page that n processes map, it has a part of 1 / n."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])


def _in_processes(opener: Callable[[str], object], pattern: str) -> tuple[float, float]:
    """Seconds until all have opened, and the megabytes that the memory of all together grew by."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(PROCESSES)
    pipes = [context.Pipe(duplex=False) for _ in range(PROCESSES)]
    children = [context.Process(target=_open_one, args=(opener, pattern, barrier, end)) for _, end in pipes]
    for child in children:
        child.start()
    results = [begin.recv() for begin, _ in pipes]
    for child in children:
        child.join()
    return max(seconds for seconds, _ in results), sum(grown for _, grown in results) / 1e6


def _open_one(opener: Callable[[str], object], pattern: str, barrier: Any, pipe: Connection) -> None:
    barrier.wait()
    before = _pss()
    barrier.wait()
    begin = time.perf_counter()
    opened = opener(pattern)
    seconds = time.perf_counter() - begin
    barrier.wait()
    grown = _pss() - before
    barrier.wait()
    del opened
    pipe.send((seconds, grown))


def _loading(context: Context) -> Iterator[Case]:
    from sphinxkit.formatters import create
    from sphinxkit.tokenizer import Tokenizer

    size, count = context.pick((224, PICTURES), (28, 2))
    folder = _folder(context, "pictures")
    shape = context.pick((640, 480), (64, 48))
    pictures = []
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number in range(count):
            buffer = io.BytesIO()
            photograph(*shape, seed=number).save(buffer, "JPEG", quality=90)
            (folder / f"{number}.jpg").write_bytes(buffer.getvalue())
            pictures.append((folder / f"{number}.jpg", f"a caption of picture {number} that says a little"))
            for ending, content in (("jpg", buffer.getvalue()), ("txt", pictures[-1][1].encode())):
                info = tarfile.TarInfo(f"{number:04d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    lines = [
        {"image": path.name, "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": text}]}
        for path, text in pictures
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer, template = Tokenizer(TOKENIZER), create("sphinx_v1")
    yield Case(
        f"load {count} samples, JPEG {shape[0]}x{shape[1]} to {size}, with captions",
        {
            "sphinxkit": lambda: _load(folder / "a.tar", tokenizer, template, size),
            "sphinxkit, image files": lambda: _load(folder / "a.jsonl", tokenizer, template, size),
            "plain PIL": lambda: [_plain(path, text, tokenizer, size) for path, text in pictures],
        },
        amount=count,
        unit="samples",
        max_seconds=120,
    )


def _load(path: Path, tokenizer: Any, template: Any, size: int) -> list[Tensor]:
    from sphinxkit.data.collate import ExampleMaker
    from sphinxkit.data.loading import MixtureLoader
    from sphinxkit.data.mixture import Mixture, MixtureSource

    mixture = Mixture([MixtureSource(str(path), task="caption")], batch_size=8)
    maker = ExampleMaker(template, tokenizer, size, 2048, 64)
    return [example.pixels for batch in MixtureLoader(mixture, maker, num_epochs=1) for example in batch.samples]


def _plain(path: Path, text: str, tokenizer: Any, size: int) -> Tensor:
    """What every loader must do: decode, pad, resize, normalise, tokenise."""
    import numpy as np
    from PIL import Image

    from sphinxkit.pixels import CLIP_MEAN, CLIP_STD

    image = Image.open(path).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), PADDING)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    values = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    pixels = (values - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    tokenizer.encode(f"Describe the picture. {text}", bos=True, eos=True)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
