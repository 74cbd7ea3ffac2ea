from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from sphinxkit.cli import app
from sphinxkit.cli.inspect_data import LEARNT_STYLES, coloured
from sphinxkit.data.inspection import InspectedSample, SampleEncoder
from sphinxkit.data.samples import Sample
from sphinxkit.errors import DataError, RecipeError
from sphinxkit.formatters import IGNORE_INDEX, sphinx_v1
from sphinxkit.tokenizer import Tokenizer

ANSWERED = "### Human: What is [it]?\n### Assistant:⟦ A réd 🙂.\n###⟧ Human: Sure?\n### Assistant:⟦ Yes.\n###⟧</s>"


@pytest.fixture
def tokenizer(golden: Path) -> str:
    return str(golden / "llama_ens5" / "tokenizer.model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    turns = [
        {"from": "human", "value": "<image>\nWhat is [it]?"},
        {"from": "gpt", "value": "A réd 🙂."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    records: list[Any] = [
        {"image": "a.png", "task": "vqa", "conversations": turns},
        {"image": "bad.png", "conversations": turns},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "t.jsonl").write_text('{"text": "Once [bold]\\u001b[31mupon a time."}\n{"text": ""}\n')
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_text("no image")
    recipe = "kind: mixture\nsources: [{path: a.jsonl}, {path: t.jsonl, type: text, repeat: 2}]\nbatch_size: 2\n"
    (tmp_path / "mixture.yaml").write_text(recipe)
    return tmp_path


def run(*arguments: object, **options: Any) -> Result:
    result = CliRunner().invoke(app, ["inspect-data", *map(str, arguments)], catch_exceptions=False, **options)
    assert result.exit_code == 0, result.output
    return result


def test_learnt_tokens_are_marked_where_there_is_no_colour(folder: Path, tokenizer: str) -> None:
    text = run(folder / "a.jsonl", "--tokenizer", tokenizer).stdout
    assert f"── a:0 · vqa · {folder}/a.png · " in text
    assert ANSWERED in text
    assert "── a:1 · no task · " in text
    assert "error: sample a:1: image " in text
    assert text.endswith("2 samples, 1 of them bad\n")


def test_learnt_tokens_are_coloured(folder: Path, tokenizer: str) -> None:
    encoder = SampleEncoder(Tokenizer(tokenizer), sphinx_v1(), None, "error", opens_images=False)
    messages = (
        {"role": "user", "content": "Is it réd 🙂?"},
        {"role": "assistant", "content": "No 🙂."},
    )
    sample = Sample("a:0", "", messages, "", None, "a:1")
    encoded = encoder.encode(sample)
    text = coloured(InspectedSample("a:0", "a:1", sample, encoded, encoder.pieces(sample)))
    assert text.plain == f"<s>{sphinx_v1().render(messages).text}</s>"
    learnt = [text.plain[span.start : span.end] for span in text.spans if span.style in LEARNT_STYLES]
    assert "".join(learnt) == " No 🙂.\n###"
    assert len([span for span in text.spans if span.start < span.end]) <= len(encoded.token_ids)
    forced = CliRunner(env={"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": ""})
    result = forced.invoke(app, ["inspect-data", str(folder / "a.jsonl"), "--tokenizer", tokenizer], color=True)
    assert "\x1b[30;48;5;" in result.stdout
    assert "⟦" not in result.stdout


def test_plain_text_is_shown_as_it_is(folder: Path, tokenizer: str) -> None:
    text = run(folder / "t.jsonl", "--tokenizer", tokenizer).stdout
    assert "<s>⟦Once [bold]␛[31mupon a time.</s>⟧" in text
    assert "\x1b" not in text
    assert "error: " in text
    assert "'text' must be a text that is not empty" in text


def test_a_file_as_json_with_a_models_tokenizer_and_template(folder: Path, golden: Path) -> None:
    fields = json.loads(run(folder / "a.jsonl", "--model", golden / "llama_ens5", "--json").stdout)
    assert fields["num_records"] == 2
    good, bad = fields["samples"]
    tokenizer = Tokenizer(golden / "llama_ens5" / "tokenizer.model")
    assert "What is [it]?" in tokenizer.decode(good["token_ids"])
    learnt = [label for label in good["labels"] if label != IGNORE_INDEX]
    assert tokenizer.decode(learnt).split() == ["A", "réd", "🙂.", "###", "Yes.", "###"]
    assert (good["id"], good["type"], good["task"]) == ("a:0", "image-text", "vqa")
    assert good["num_tokens"] == len(good["token_ids"]) == len(good["labels"])
    assert good["num_learnt"] == len(learnt)
    assert good["where"] == f"{folder}/a.jsonl:1"
    assert "bad.png" in bad["error"]
    assert "token_ids" not in bad
    last = json.loads(
        run(
            folder / "a.jsonl", "--model", golden / "llama_ens5", "--json", "--no-check-images", "--start", 1, "-n", 9
        ).stdout
    )
    assert [(sample["id"], "error" in sample) for sample in last["samples"]] == [("a:1", False)]


def test_over_length(folder: Path, tokenizer: str) -> None:
    arguments = (folder / "a.jsonl", "--tokenizer", tokenizer, "-n", 1, "--max-tokens", 62)
    assert "error: sample a:0: " in run(*arguments).stdout
    cut = run(*arguments, "--over-length", "truncate").stdout
    assert "62 tokens" in cut
    assert "cut off" in cut
    [sample] = json.loads(run(*arguments, "--over-length", "truncate", "--json").stdout)["samples"]
    assert sample["is_truncated"]


def test_a_mixture(folder: Path, tokenizer: str) -> None:
    arguments = (folder / "mixture.yaml", "--root", folder)
    table = run(*arguments).stdout
    assert "3 batches of 2" in table
    assert "t       text" in table
    assert "2.00" in table
    fields = json.loads(run(*arguments, "--tokenizer", tokenizer, "--json").stdout)
    assert [(row["name"], row["size"], row["count"]) for row in fields["table"]] == [("a", 2, 2), ("t", 2, 4)]
    assert (fields["num_samples"], fields["num_batches"], fields["batch_size"]) == (6, 3, 2)
    assert len(fields["samples"]) == 5
    shown = {sample["id"]: sample for sample in fields["samples"]}
    assert all(("error" in shown[name]) == (name in ("a:1", "t:1")) for name in shown)
    other = json.loads(run(*arguments, "--tokenizer", tokenizer, "--json", "--epoch", 1, "--start", 4).stdout)
    assert len(other["samples"]) == 2
    text = run(*arguments, "--tokenizer", tokenizer, "-n", 6).stdout
    assert text.index("share") < text.index("── ")
    assert ANSWERED in text


def test_faults(folder: Path, tokenizer: str, golden: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: name a tokenizer or a model, so that samples can become tokens"):
        run(folder / "a.jsonl")
    with pytest.raises(DataError, match="over_length: expected one of error, truncate, skip, continue, got 'cut'"):
        run(folder / "a.jsonl", "--tokenizer", tokenizer, "--over-length", "cut")
    with pytest.raises(RecipeError, match="no recipe 'mixture_finetun'.*did you mean 'mixture_finetune'"):
        run("mixture_finetun", "--tokenizer", tokenizer)
    with pytest.raises(RecipeError, match="sphinx_13b.yaml: expected kind mixture, got kind model"):
        run("sphinx_13b", "--tokenizer", tokenizer)
    with pytest.raises(DataError, match=r"start 2: .*a\.jsonl has 2 records"):
        run(folder / "a.jsonl", "--tokenizer", tokenizer, "--start", 2)
    with pytest.raises(DataError, match=r"start 6: an epoch has 6 samples"):
        run(folder / "mixture.yaml", "--root", folder, "--tokenizer", tokenizer, "--start", 6)
    with pytest.raises(DataError, match=r"mixture_finetune|cannot be read"):
        run("mixture_finetune", "--root", folder)
    bare = folder / "bare"
    bare.mkdir()
    for file in (golden / "llama_ens_light").iterdir():
        if file.name != "tokenizer.model":
            (bare / file.name).symlink_to(file)
    with pytest.raises(DataError, match="bare has no tokenizer; pass --tokenizer"):
        run(folder / "a.jsonl", "--model", bare)
