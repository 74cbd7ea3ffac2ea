"""Chart to table."""

from __future__ import annotations

from dataclasses import dataclass

from sphinxkit.formatters.tasks.base import Example, FixedTask, ParseResult, register, require
from sphinxkit.formatters.tasks.words import read_words
from sphinxkit.geometry import ImageGeometry


@dataclass(frozen=True, slots=True)
class ChartSample:
    """A chart's numbers.

    Args:
        table: The table as text; its notation is the data set's.
    """

    table: str


@register("chart")
class Chart(FixedTask[ChartSample, str]):
    """Chart to table.

    Source: the SPHINX authors' published prompts (default wording); the other wording is our choice.
    """

    name = "chart"
    metric = "anls"
    wordings = ("Convert this chart to a table.", "Write down the data of this chart as a table.")

    def format(self, sample: ChartSample, wording: int = 0) -> Example:
        """The sample as question and answer.

        Raises:
            DataError: The table is empty, or there is no such wording.
        """
        return Example(self.prompt(wording), require(self.name, "table", sample.table))

    def parse(self, text: str, geometry: ImageGeometry | None = None) -> ParseResult[str]:
        """The table's text; the image size is not used."""
        return read_words(text)

    def items(self, sample: ChartSample) -> tuple[str, ...]:
        """The table's text."""
        return (sample.table.strip(),)
