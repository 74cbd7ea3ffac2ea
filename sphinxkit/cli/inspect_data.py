"""``sphinxkit inspect-data``: what a model will learn from a file of samples or a mixture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sphinxkit.cli.checkpoints import find_checkpoint
from sphinxkit.cli.options import Json
from sphinxkit.errors import DataError, RecipeError, SphinxkitError

if TYPE_CHECKING:
    from rich.text import Text

    from sphinxkit.data.conversations import OverLength
    from sphinxkit.data.mixture import Mixture
    from sphinxkit.data.samples import Sample
    from sphinxkit.formatters import ConversationTemplate, EncodedConversation
    from sphinxkit.tokenizer import Tokenizer

# Neighbouring tokens in two shades, so that their borders can be seen (our choice)
LEARNT_STYLES = ("black on green3", "black on spring_green1")
READ_STYLES = ("grey70", "grey50")
CUT_STYLE = "strike red"
LEARNT_MARKS = ("⟦", "⟧")  # around what is learnt where there are no colours
YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class SampleEncoder:
    """How samples become tokens.

    Args:
        tokenizer: With character spans.
        template: Of conversations.
        max_tokens: The longest sample; None: any length.
        over_length: What happens to a longer one.
        opens_images: Whether a sample whose image cannot be read is a bad one.
    """

    tokenizer: Tokenizer
    template: ConversationTemplate
    max_tokens: int | None
    over_length: OverLength
    opens_images: bool

    def encode(self, sample: Sample) -> EncodedConversation:
        """Token ids and labels.

        Raises:
            DataError: The sample cannot be used.
        """
        from sphinxkit.data.conversations import encode_sample

        if self.opens_images and sample.image is not None:
            sample.open_image()
        return encode_sample(sample, self.template, self.tokenizer, self.max_tokens, self.over_length)


@dataclass(frozen=True, slots=True)
class Shown:
    """A sample to be shown, or why it is a bad one.

    Args:
        id: Of the sample.
        where: "file:line".
        sample: None where its record cannot be read.
        encoded: None where it cannot be used.
        error: Why.
    """

    id: str
    where: str
    sample: Sample | None = None
    encoded: EncodedConversation | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        fields: dict[str, Any] = {"id": self.id, "where": self.where}
        if self.sample is not None:
            image = None if self.sample.image is None else str(self.sample.image)
            fields |= {"task": self.sample.task, "type": self.sample.type, "image": image}
        if self.encoded is not None:
            fields |= {
                "token_ids": self.encoded.token_ids,
                "labels": self.encoded.labels,
                "num_tokens": len(self.encoded.token_ids),
                "num_learnt": _num_learnt(self.encoded),
                "is_truncated": self.encoded.is_truncated,
            }
        return fields if self.error is None else fields | {"error": self.error}


def _num_learnt(encoded: EncodedConversation) -> int:
    from sphinxkit.formatters import IGNORE_INDEX

    return sum(label != IGNORE_INDEX for label in encoded.labels)


def inspect_data(
    source: Annotated[str, typer.Argument(help="JSON lines of samples, or a mixture recipe (name or file).")],
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.model.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint whose tokenizer and conversation template are taken.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Samples to show.")] = 5,
    start: Annotated[int, typer.Option(min=0, help="The first of them: record of the file, sample of the epoch.")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="Number of a mixture's epoch.")] = 0,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder that image paths, of a mixture all its paths, are relative to."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest sample; default: any length.")] = None,
    over_length: Annotated[
        str | None, typer.Option(help="What happens to a longer one: error, truncate or skip. Default: the mixture's.")
    ] = None,
    check_images: Annotated[bool, typer.Option(help="A sample whose image cannot be read is a bad one.")] = True,
    as_json: Json = False,
) -> None:
    """Show samples with the tokens that are learnt in colour, and of a mixture what an epoch will hold.

    Where there are no colours (a pipe, `NO_COLOR`), what is learnt stands between ⟦ and ⟧. A sample that cannot be used
    is shown with its error.

    Examples:

    `sphinxkit inspect-data refcoco_rec.jsonl --model models/sphinx_1k --count 3`

    `sphinxkit inspect-data mixture_finetune --root /data --tokenizer tokenizer.model`
    """
    mixture = open_mixture(source, root)
    if over_length is None:
        over_length = "error" if mixture is None else mixture.over_length
    encoder = _encoder(tokenizer, model, max_tokens, over_length, check_images)
    if encoder is None and mixture is None:
        raise typer.BadParameter("name a --tokenizer or a --model, so that samples can become tokens")
    shown: list[Shown] = []
    fields: dict[str, Any] = {"source": source}
    if mixture is not None:
        fields["table"] = [dataclasses.asdict(row) for row in mixture.table()]
        fields |= {
            "num_samples": mixture.num_samples,
            "num_batches": mixture.num_batches,
            "batch_size": mixture.batch_size,
        }
        if encoder is not None:
            shown = list(_of_mixture(mixture, encoder, epoch, start, count))
    elif encoder is not None:
        num_records, shown = _of_file(Path(source), root, encoder, start, count)
        fields["num_records"] = num_records
    if as_json:
        typer.echo(json.dumps(fields | {"samples": [sample.as_dict() for sample in shown]}))
        return
    if mixture is not None:
        typer.echo(mixture.format_table())
    if encoder is not None:
        _print(shown, encoder)


def open_mixture(source: str, root: Path | None = None) -> Mixture | None:
    """The mixture that a name or a file means, or None for a file of samples.

    Raises:
        RecipeError: A recipe of another kind, or not a valid one; or ``source`` is nothing at all.
        DataError: One of the mixture's files cannot be read.
    """
    from sphinxkit.data.mixture import Mixture
    from sphinxkit.recipe import Recipe

    if Path(source).is_file() and Path(source).suffix not in YAML_SUFFIXES:
        return None
    recipe = Recipe.find(source)
    if recipe.kind != "mixture":
        raise RecipeError(f"{source}: expected kind mixture, got kind {recipe.kind}")
    options = {key: value for key, value in recipe.document.items() if key != "kind"}
    return Mixture(**options | {"folder": str((root or Path()) / str(options.get("folder", "")))})


def _encoder(
    tokenizer: Path | None, model: str | None, max_tokens: int | None, over_length: str, opens_images: bool
) -> SampleEncoder | None:
    from sphinxkit import checkpoint, formatters
    from sphinxkit.tokenizer import Tokenizer

    if over_length not in ("error", "truncate", "skip"):
        raise typer.BadParameter(f"--over-length must be error, truncate or skip, got {over_length!r}")
    if tokenizer is None and model is None:
        return None
    template = formatters.create("sphinx_v1")
    if model is not None:
        with checkpoint.open(checkpoint.resolve(find_checkpoint(model))) as opened:
            template = _template(opened.recipe)
            tokenizer = tokenizer or opened.tokenizer_path
    if tokenizer is None:
        raise DataError(f"{model} has no tokenizer: name one with --tokenizer")
    return SampleEncoder(Tokenizer(tokenizer), template, max_tokens, over_length, opens_images)  # type: ignore[arg-type]


def _template(recipe: dict[str, Any]) -> ConversationTemplate:
    from sphinxkit import formatters

    value = recipe.get("conversation") or "sphinx_v1"
    options = {"type": value} if isinstance(value, str) else dict(value)
    return formatters.create(options.pop("type"), **options)


def _of_mixture(mixture: Mixture, encoder: SampleEncoder, epoch: int, start: int, count: int) -> Iterator[Shown]:
    if start >= mixture.num_samples:
        raise DataError(f"--start {start}: an epoch has {mixture.num_samples} samples")
    for ref, _ in zip(mixture.order(epoch, start), range(count), strict=False):
        try:
            sample = mixture.read(ref)
        except SphinxkitError as error:
            yield Shown(mixture.sample_id(ref), "", error=str(error))
        else:
            yield _shown(sample, encoder)


def _of_file(path: Path, root: Path | None, encoder: SampleEncoder, start: int, count: int) -> tuple[int, list[Shown]]:
    from sphinxkit.data.conversations import read_sample
    from sphinxkit.data.samples import JsonLinesFile

    file = JsonLinesFile(path)
    if start >= len(file):
        raise DataError(f"--start {start}: {path} has {len(file)} records")
    found = []
    for index in range(start, min(start + count, len(file))):
        sample_id, where = f"{path.stem}:{index}", file.where(index)
        try:
            sample = read_sample(file.read(index), sample_id, where, root or path.parent)
        except DataError as error:
            found.append(Shown(sample_id, where, error=str(error)))
        else:
            found.append(_shown(sample, encoder))
    return len(file), found


def _shown(sample: Sample, encoder: SampleEncoder) -> Shown:
    try:
        return Shown(sample.id, sample.where, sample, encoder.encode(sample))
    except DataError as error:
        return Shown(sample.id, sample.where, sample, error=str(error))


# -- text -------------------------------------------------------------------------------------------------------------


def _print(shown: list[Shown], encoder: SampleEncoder) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    has_colour = console.is_terminal and not console.no_color
    for entry in shown:
        console.print(Text(_visible(f"── {_title(entry)}"), "bold"))
        if entry.error is not None:
            console.print(Text(_visible(f"error: {entry.error}"), "bold red"))
        elif entry.sample is not None and entry.encoded is not None:
            console.print(coloured(entry.sample, entry.encoded, encoder, has_colour))
    bad = sum(entry.error is not None for entry in shown)
    console.print(f"{len(shown)} samples, {bad} of them bad", markup=False)


def _title(entry: Shown) -> str:
    parts = [entry.id]
    if entry.sample is not None:
        parts += [entry.sample.task or "no task", str(entry.sample.image or "no image")]
    if entry.encoded is not None:
        parts.append(f"{len(entry.encoded.token_ids)} tokens, {_num_learnt(entry.encoded)} learnt")
        if entry.encoded.is_truncated:
            parts.append("cut off")
    return " · ".join(parts)


def _visible(text: str) -> str:
    """Text without control characters, which a terminal would obey; their pictures stand in their place."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)


def coloured(sample: Sample, encoded: EncodedConversation, encoder: SampleEncoder, has_colour: bool = True) -> Text:
    """A sample's text with what is learnt of it in colour.

    Args:
        sample: The sample.
        encoded: Its tokens.
        encoder: That made them.
        has_colour: False: marks what is learnt with ``LEARNT_MARKS``.
    """
    from rich.text import Text

    from sphinxkit.formatters import IGNORE_INDEX

    source = encoder.template.render(sample.messages).text if sample.messages else sample.text
    _, spans = encoder.tokenizer.encode_with_offsets(source)
    text = Text()
    was_learnt = False
    # the special tokens around the text have names instead of characters
    for position, piece in enumerate(["<s>", *_pieces(source, spans), "</s>"]):
        is_kept = position < len(encoded.token_ids)
        is_learnt = is_kept and encoded.labels[position] != IGNORE_INDEX
        if not has_colour and is_learnt != was_learnt:
            text.append(LEARNT_MARKS[0] if is_learnt else LEARNT_MARKS[1])
        was_learnt = is_learnt
        styles = LEARNT_STYLES if is_learnt else READ_STYLES
        text.append(_visible(piece), styles[position % 2] if is_kept else CUT_STYLE)
    return text.append(LEARNT_MARKS[1] if was_learnt and not has_colour else "")


def _pieces(source: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The text that each token adds: a character of several byte tokens belongs to the first of them."""
    pieces = []
    done = 0
    for _, end in spans:
        pieces.append(source[done : max(done, end)])
        done = max(done, end)
    return pieces
