"""Chat templates in Jinja, with exact spans of the answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sphinxkit.errors import DataError, RegistryError
from sphinxkit.formatters.base import ConversationTemplate, RenderedConversation
from sphinxkit.formatters.messages import Message, check_messages

_PROBE: Sequence[Message] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(frozen=True, slots=True)
class JinjaTemplate(ConversationTemplate):
    """Conversation template in Jinja.

    To find the answers, the template is rendered with a marker in place of each message. An answer begins where its
    prompt ends. It ends after the text that the template appends to it (its end token), without trailing white space.

    Args:
        source: The template's text.
        eos_token: Value of ``eos_token`` in the template.
    """

    source: str = ""
    eos_token: str = ""

    @classmethod
    def parse(cls, source: str, system: str, eos_token: str) -> JinjaTemplate:
        """Try a template.

        Args:
            source: Its text.
            system: Text of a system message that is put in front of conversations without one; "" for none.
            eos_token: Value of ``eos_token`` in the template.
        Raises:
            RegistryError: It is no template, or what it writes cannot be divided into questions and answers.
        """
        options: dict[str, Any] = {"name": "jinja", "opening": "", "roles": {}, "ends_with_eos": False}
        probe = cls(**options, system=system, separator="", stop=(), source=source, eos_token=eos_token)
        try:
            rendered = probe.render(_PROBE)
        except DataError as error:
            raise RegistryError(f"conversation 'jinja': {error}") from error
        start, end = rendered.answer_spans[0]
        gap, _, ending = rendered.text[start:end].rpartition("b")
        stop = (ending,) if ending else ()
        specials = (eos_token,) if eos_token in ending and eos_token else ()
        return cls(
            **options,
            system=system,
            separator=ending,
            stop=stop,
            gap=gap,
            specials=specials,
            source=source,
            eos_token=eos_token,
        )

    def render(self, messages: Sequence[Message], answer_start: str = "") -> RenderedConversation:
        """See ``ConversationTemplate.render``.

        Raises:
            DataError: As there; or the template refuses the messages, or changes their words.
        """
        check_messages(messages)
        said = [{"role": each["role"], "content": self._content(each)} for each in messages]
        if self.system and said[0]["role"] != "system":
            said.insert(0, {"role": "system", "content": self.system})
        marked = [{**each, "content": _mark(index)} for index, each in enumerate(said)]
        opens = said[-1]["role"] == "user"
        pattern = self._run(marked, opens)
        text, spans = "", []
        places: dict[int, int] = {}
        for piece in _MARK.split(pattern):
            if piece.isdigit() and int(piece) < len(said):
                places[int(piece)] = len(text)
                piece = said[int(piece)]["content"]
            text += piece
        if text != self._run(said, opens) or len(places) < sum(each["role"] != "system" for each in said):
            raise DataError("conversation: the template changes the words of a message, so its labels cannot be told")
        for index, each in enumerate(said):
            if each["role"] == "assistant":
                spans.append(self._span(text, marked, said, places, index))
        if answer_start and not opens:
            raise DataError(f"conversation: answer_start {answer_start!r} needs a last message of the user")
        words = answer_start.strip()
        return RenderedConversation(text + (f"{self.gap}{words}" if words else ""), tuple(spans))

    def _span(
        self, text: str, marked: Sequence[Message], said: Sequence[Message], places: dict[int, int], index: int
    ) -> tuple[int, int]:
        question = places[index - 1] + len(said[index - 1]["content"])
        header = self._behind(marked[:index], True)
        answer_end = places[index] + len(said[index]["content"])
        behind = self._behind(marked[: index + 1], False)
        ending = behind.rstrip() or behind
        if not text.startswith(header, question) or not text.startswith(ending, answer_end):
            raise DataError(
                f"conversation: the template writes message {index} otherwise when others follow, so its labels cannot "
                "be told"
            )
        return question + len(header), answer_end + len(ending)

    def _behind(self, marked: Sequence[Message], opens: bool) -> str:
        """What the template puts behind the last of some messages."""
        return self._run(marked, opens).rpartition(_mark(len(marked) - 1))[2]

    def _run(self, messages: Sequence[Message], opens: bool) -> str:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = raise_exception
        try:
            found: str = environment.from_string(_GENERATION.sub("", self.source)).render(
                messages=list(messages), add_generation_prompt=opens, bos_token="", eos_token=self.eos_token
            )
        except (TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
            raise DataError(f"conversation: the template fails: {error}") from error
        return found


_MARK = re.compile("\ue000(\\d+)\ue001")
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks for transformers, which only it knows


def _mark(index: int) -> str:
    """Stands for a message; characters of private use, which no text has."""
    return f"\ue000{index}\ue001"


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
