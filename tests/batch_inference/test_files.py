from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sphinxkit.batch_inference import answer_file, part_path
from sphinxkit.batch_inference.rank_files import open_part
from sphinxkit.cli import app
from sphinxkit.errors import DataError
from sphinxkit.generation import Generation, Sampling

DEFAULTS = Sampling(max_new_tokens=8)


def read(path: Path, keep_request: bool = False) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines if keep_request else [{key: line[key] for key in line if key != "request"} for line in lines]


def test_every_row_is_answered_as_by_itself_in_the_inputs_order(model, rows, write, expected, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    summary = answer_file(
        model,
        write(rows),
        tmp_path / "out.jsonl",
        DEFAULTS,
        batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (summary.num_rows, summary.num_answered, summary.num_errors, summary.num_skipped) == (11, 11, 0, 0)
    assert summary.is_complete
    assert read(tmp_path / "out.jsonl") == expected(rows)
    assert seen == [(done, 11) for done in range(1, 12)]
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.done"))


def test_sampled_rows_do_not_depend_on_the_batch(model, rows, write, expected, tmp_path: Path) -> None:
    source = write(rows[:5])
    defaults = Sampling(8, temperature=1.0, top_p=0.9, seed=3)
    answer_file(model, source, tmp_path / "a.jsonl", defaults, batch_size=4)
    assert read(tmp_path / "a.jsonl") == expected(rows[:5], temperature=1.0, top_p=0.9, seed=3)


def test_two_ranks_give_the_file_of_one(model, rows, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = write(rows), tmp_path / "two.jsonl"
    answer_file(model, source, tmp_path / "one.jsonl", DEFAULTS, batch_size=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    first = answer_file(model, source, output, DEFAULTS, batch_size=3)
    assert not first.is_complete
    assert first.output == part_path(output, 0, 2, is_done=True)
    assert {line["index"] for line in read(first.output)} == {0, 2, 4, 6, 8, 10}
    assert not output.exists()
    second = answer_file(model, source, output, DEFAULTS, rank=1, world_size=2, batch_size=3)
    assert second.is_complete
    assert second.num_answered == 5
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not list(tmp_path.glob("two.jsonl.*"))
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(DataError, match="RANK in the environment must be a number, got 'first'"):
        answer_file(model, source, output, DEFAULTS)


@pytest.mark.slow
def test_torchrun(golden: Path, rows, write, expected, tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29641", "-m", "sphinxkit.cli"]
    arguments = ["generate", str(golden / "llama_ens"), "--input", str(write(rows)), "--device", "cpu"]
    rest = ["--output", str(tmp_path / "out.jsonl"), "--dtype", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, *command, *arguments, *rest], check=True, env=environment, capture_output=True)
    assert read(tmp_path / "out.jsonl") == expected(rows)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(golden: Path, rows, write, expected, tmp_path: Path) -> None:
    many = [{**row, "id": index, "max_new_tokens": 12} for index, row in enumerate(rows * 3)]
    source, output = write(many), tmp_path / "out.jsonl"
    arguments = ["generate", str(golden / "llama_ens"), "--input", str(source), "--output", str(output)]
    arguments += ["--dtype", "float32", "--device", "cpu", "--batch-size", "2", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sphinxkit.cli", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    part = part_path(output, 0, 1)
    deadline = time.monotonic() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = part.read_bytes()[: part.read_bytes().rfind(b"\n") + 1]
    done = whole.count(b"\n")
    assert done < len(many)
    part.write_bytes(whole + b'{"index": 7, "id": "q7", "te')  # what a kill in the middle of a write leaves
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    fields = json.loads(result.stdout)
    assert (fields["skipped"], fields["answered"], fields["complete"]) == (done, len(many) - done, True)
    assert read(output) == expected(many)


def test_another_number_of_ranks_goes_on(model, rows, write, expected, tmp_path: Path) -> None:
    source, output = write(rows), tmp_path / "out.jsonl"
    answer_file(model, source, output, DEFAULTS, rank=1, world_size=3)
    summary = answer_file(model, source, output, DEFAULTS)
    assert summary.num_skipped == 4
    assert summary.is_complete
    assert read(output) == expected(rows)
    assert not list(tmp_path.glob("out.jsonl.*"))


def test_images_must_lie_under_the_root_that_is_named(model, write, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "out.jsonl"
    images.mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "secret.png")
    Image.new("RGB", (3, 2)).save(images / "own.png")
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "inner.png").symlink_to(images / "own.png")
    outside = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "../../../../../../etc/passwd"]
    inside = ["own.png", "inner.png", "./x/../own.png"]
    source = write([{"prompt": "What?", "image": name, "max_new_tokens": 1} for name in outside + inside])
    summary = answer_file(model, source, output, DEFAULTS, root=images)
    assert (summary.num_answered, summary.num_errors) == (3, 4)
    lines = read(output)
    for name, line in zip(outside, lines, strict=False):
        assert f"image {name!r} is not below the folder of images, {images}" in line["error"]
    assert len({line["text"] for line in lines[4:]}) == 1
    with pytest.raises(DataError, match=r"root .*nowhere: there is no such folder"):
        answer_file(model, source, output, DEFAULTS, root=tmp_path / "nowhere")


def test_a_bad_row_is_reported_in_its_place_and_tried_again(model, rows, write, expected, tmp_path: Path) -> None:
    bad: list[Any] = [
        rows[0],
        b"{not json",
        rows[1],
        {"id": "gone", "prompt": "What?", "image": "nowhere.png"},
        {"id": 5, "prompt": "long " * 5000},
        b"[1]",
        b"\xff\xfe",
    ]
    source, output = write(bad), tmp_path / "out.jsonl"
    summary = answer_file(model, source, output, DEFAULTS, batch_size=2)
    assert (summary.num_answered, summary.num_errors) == (2, 5)
    answers = read(output)
    assert [answer["index"] for answer in answers] == list(range(7))
    assert [answers[0]["text"], answers[2]["text"]] == [answer["text"] for answer in expected(rows[:2])]
    assert answers[1]["error"].startswith("row 1: not JSON")
    assert answers[3]["id"] == "gone"
    assert "nowhere.png: there is no such file" in answers[3]["error"]
    assert answers[4]["id"] == 5
    assert "the context holds 4096" in answers[4]["error"]
    assert "expected a JSON object, got list" in answers[5]["error"]
    (tmp_path / "nowhere.png").write_bytes((tmp_path / "wide.png").read_bytes())
    again = answer_file(model, source, output, DEFAULTS)
    assert (again.num_skipped, again.num_answered, again.num_errors) == (2, 1, 4)
    assert read(output)[3]["text"] == expected([{"prompt": "What?", "image": "wide.png"}])[0]["text"]
    source = write([*bad[:1], rows[2], *bad[2:]])  # the row that was no JSON is mended
    mended = answer_file(model, source, output, DEFAULTS)
    assert (mended.num_skipped, mended.num_answered, mended.num_errors) == (3, 1, 3)


HOSTILE: dict[str, bytes] = {
    "nested too deeply": b"[" * 100_000,
    "meta that nests": b'{"prompt": "a", "meta": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a number beyond all floats": b'{"id": "x", "prompt": "a", "temperature": 1' + b"0" * 400 + b"}",
    "infinity": b'{"id": "x", "prompt": "a", "temperature": 1e400}',
    "not a number": b'{"id": "x", "prompt": "a", "top_p": NaN}',
    "meta beyond all floats": b'{"id": "x", "prompt": "a", "meta": [1e400]}',
    "meta that is no number": b'{"id": "x", "prompt": "a", "meta": {"a": -Infinity}}',
    "a seed of 41 digits": b'{"id": "x", "prompt": "a", "seed": 1' + b"0" * 40 + b"}",
    "half a surrogate pair": b'{"id": "\\ud800", "prompt": "a \\udfff"}',
    "a path that no file has": b'{"id": "x", "prompt": "a", "image": "a\\u0000b.png"}',
    "a path without end": b'{"id": "x", "prompt": "a", "image": "' + b"a" * 100_000 + b'"}',
    "messages of nothing": b'{"id": "x", "messages": [null]}',
}


def test_no_row_ends_the_run(model, write, tmp_path: Path) -> None:
    """Each gets an error line or an answer in its place, the output is UTF-8, and the others are answered."""
    good = {"prompt": "What?", "max_new_tokens": 2}
    rows = [row for bad in HOSTILE.values() for row in (good, bad)]
    output = tmp_path / "out.jsonl"
    summary = answer_file(model, write(rows), output, DEFAULTS, batch_size=3)
    assert summary.is_complete
    answers = [json.loads(line) for line in output.read_bytes().decode("utf-8").splitlines()]
    assert [answer["index"] for answer in answers] == list(range(len(rows)))
    assert not any("error" in answer for answer in answers[::2])
    told = dict(zip(HOSTILE, answers[1::2], strict=True))
    assert [name for name, answer in told.items() if "error" not in answer] in ([], ["meta that nests"])
    assert "nested too deeply" in told["nested too deeply"]["error"]
    assert "temperature is beyond all floats" in told["a number beyond all floats"]["error"]
    assert "not JSON: 1e400 is no finite number" in told["infinity"]["error"]
    assert "not JSON: 1e400 is no finite number" in told["meta beyond all floats"]["error"]
    assert "not JSON: -Infinity is no finite number" in told["meta that is no number"]["error"]
    assert told["half a surrogate pair"]["id"] == "\ud800"
    assert "half a surrogate pair" in told["half a surrogate pair"]["error"]
    before = output.read_bytes()
    again = answer_file(model, write(rows), output, DEFAULTS, batch_size=3)
    assert (again.num_answered, again.num_skipped + again.num_errors) == (0, len(rows))
    assert output.read_bytes() == before


def test_pipes(model, write, tmp_path: Path) -> None:
    """A pipe as the output is written and never read; as the input, which is read more than once, it is refused."""
    source, pipe = write([{"prompt": "What?", "max_new_tokens": 2}]), tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="pipe: is a pipe or a device; it is read more than once"):
        answer_file(model, pipe, tmp_path / "out.jsonl", DEFAULTS)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(pipe.read_text)
        assert answer_file(model, source, pipe, DEFAULTS).is_complete
        assert json.loads(written.result())["index"] == 0
    assert pipe.is_fifo()


def test_a_missing_image_beside_a_short_and_a_running_row(model, rows, write, expected, tmp_path: Path) -> None:
    """The short row has ended when the next ones join, and its image took more room than they need."""
    mixed = [
        {"id": 0, "prompt": "How many?", "image": "wide.png", "max_new_tokens": 1},
        {"id": 1, "prompt": "Tell a long story", "max_new_tokens": 40},
        {"id": 2, "prompt": "What?", "image": "missing.png"},
        {"id": 3, "prompt": "Why?", "max_new_tokens": 5},
        {"id": 4, "prompt": "Who?", "max_new_tokens": 5},
    ]
    source = write(mixed)
    kept = [row for row in mixed if row["id"] != 2]
    wanted = {row["id"]: answer["text"] for row, answer in zip(kept, expected(kept), strict=True)}
    for size in (2, 3):
        answer_file(model, source, tmp_path / f"{size}.jsonl", DEFAULTS, batch_size=size)
        found = read(tmp_path / f"{size}.jsonl")
        assert {answer["id"]: answer["text"] for answer in found if "error" not in answer} == wanted


def test_question_files_of_llava(model, write, expected, tmp_path: Path) -> None:
    row = {"question_id": 7, "image": "wide.png", "text": "What is in the image?", "category": "conv"}
    answer_file(model, write([row]), tmp_path / "out.jsonl", DEFAULTS)
    [answer] = read(tmp_path / "out.jsonl")
    assert answer["id"] == 7
    assert answer["text"] == expected([{"prompt": row["text"], "image": "wide.png"}])[0]["text"]


def test_another_model_does_not_continue_answers(model, rows, write, tmp_path: Path) -> None:
    source, output = write(rows[:1]), tmp_path / "out.jsonl"
    answer_file(model, source, output, DEFAULTS)
    with torch.no_grad():
        model.llm.norm.weight *= 1.5
        try:
            with pytest.raises(DataError, match="the row, the options or the model have changed since"):
                answer_file(model, source, output, DEFAULTS)
        finally:
            model.llm.norm.weight /= 1.5


def test_rows_that_were_added_are_answered(model, rows, write, expected, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    answer_file(model, write(rows[:2]), output, DEFAULTS)
    summary = answer_file(model, write(rows[:4]), output, DEFAULTS)
    assert (summary.num_skipped, summary.num_answered) == (2, 2)
    assert read(output) == expected(rows[:4])


def test_answers_to_something_else_are_not_mixed_up(model, rows, write, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    answer_file(model, write(rows[:2]), output, DEFAULTS)
    for changed, defaults in (
        ([rows[0], {**rows[1], "prompt": "Who?"}], DEFAULTS),
        ([rows[0], b"{"], DEFAULTS),
        (rows[:2], Sampling(max_new_tokens=9, temperature=0.5)),
    ):
        with pytest.raises(DataError, match="answers another request than row"):
            answer_file(model, write(changed), output, defaults)
        for part in tmp_path.glob("out.jsonl.*"):
            part.unlink()
    with pytest.raises(DataError, match="answers row 1, but .* has 1 rows"):
        answer_file(model, write(rows[:1]), output, DEFAULTS)
    output.write_text("hello\n")
    with pytest.raises(DataError, match="line 1: not an answer of this command"):
        answer_file(model, write(rows[:2]), output, DEFAULTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 is not one of 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
    ],
)
def test_bad_options(model, rows, write, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        answer_file(model, write(rows[:1]), tmp_path / "out.jsonl", DEFAULTS, **options)


def test_bad_files(model, rows, write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is the input"):
        answer_file(model, write(rows), tmp_path / "in.jsonl", DEFAULTS)
    with pytest.raises(DataError, match="there are no rows"):
        answer_file(model, write([b"", b"  "]), tmp_path / "out.jsonl", DEFAULTS)
    with pytest.raises(DataError, match="input .*gone.jsonl: cannot be read: No such file"):
        answer_file(model, tmp_path / "gone.jsonl", tmp_path / "out.jsonl", DEFAULTS)


def test_a_part_has_one_writer(model, rows, write, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with (
        open_part(output, 0, 1),
        pytest.raises(DataError, match="out.jsonl.rank-0-of-1.part: another process is writing it"),
    ):
        answer_file(model, write(rows), output, DEFAULTS)


def test_parts_that_never_hold_still(model, rows, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sphinxkit.batch_inference import rank_files

    monkeypatch.setattr(rank_files, "find_parts", lambda output: [tmp_path / "gone"])
    with pytest.raises(DataError, match="renamed and removed while they are read"):
        answer_file(model, write(rows), tmp_path / "out.jsonl", DEFAULTS)


def test_a_finished_run_has_nothing_to_do(model, rows, write, tmp_path: Path) -> None:
    source, output = write(rows[:3]), tmp_path / "out.jsonl"
    answer_file(model, source, output, DEFAULTS)
    before = output.read_bytes()
    again = answer_file(model, source, output, DEFAULTS)
    assert (again.num_skipped, again.num_answered, again.is_complete) == (3, 0, True)
    assert output.read_bytes() == before
    assert not list(tmp_path.glob("out.jsonl.*"))


def test_meta_is_copied_and_messages_are_taken(model, write, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Where?"},
    ]
    source = write([{"messages": messages, "meta": {"gt": [1, "é"]}, "max_new_tokens": 4}])
    answer_file(model, source, tmp_path / "out.jsonl", DEFAULTS)
    [answer] = read(tmp_path / "out.jsonl")
    assert answer["meta"] == {"gt": [1, "é"]}
    assert answer["text"] == model.chat(messages, max_new_tokens=4)
    assert "id" not in answer


def test_white_space_stays_after_a_raw_prompt_alone(model, write, tmp_path: Path, monkeypatch) -> None:
    rows = [{"prompt": "What?"}, {"messages": [{"role": "user", "content": "What?"}]}]
    monkeypatch.setattr("sphinxkit.generation.GeneratedSequence.result", lambda self: Generation(" a b\n", [1], "eos"))
    for raw, texts in ((False, ["a b", "a b"]), (True, [" a b\n", "a b"])):
        output = tmp_path / f"{raw}.jsonl"
        answer_file(model, write(rows), output, DEFAULTS, raw=raw)
        assert [answer["text"] for answer in read(output)] == texts


def test_speculation_and_bigger_batches_change_nothing(model, rows, write, expected, tmp_path: Path) -> None:
    answer_file(model, write(rows), tmp_path / "out.jsonl", DEFAULTS, batch_size=8, num_draft_tokens=4)
    assert read(tmp_path / "out.jsonl") == expected(rows)


def test_memory_is_let_go_of(model, rows, write, tmp_path: Path) -> None:
    with torch.inference_mode():
        answer_file(model, write(rows[:3]), tmp_path / "out.jsonl", DEFAULTS)
    assert len(read(tmp_path / "out.jsonl")) == 3


def test_an_output_that_cannot_be_written_is_named(
    model, rows, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(rows[:2])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/out.jsonl: cannot be written: .*(Not a directory|File exists)"):
        answer_file(model, source, tmp_path / "file" / "out.jsonl", DEFAULTS)
    with pytest.raises(DataError, match=r"cannot be written: .*Is a directory"):
        answer_file(model, source, tmp_path, DEFAULTS)
    monkeypatch.setattr("os.fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(DataError, match=r"out.jsonl: cannot be written: .*No space left on device"):
        answer_file(model, source, tmp_path / "out.jsonl", DEFAULTS)
    assert not (tmp_path / "out.jsonl").exists()
