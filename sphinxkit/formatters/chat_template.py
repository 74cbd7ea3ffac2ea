"""A conversation template as the Jinja text that transformers and vLLM read (``chat_template.jinja``)."""

from __future__ import annotations

import re

from sphinxkit.errors import DataError
from sphinxkit.formatters.base import ConversationTemplate
from sphinxkit.formatters.jinja import JinjaTemplate
from sphinxkit.formatters.messages import IMAGE_PLACEHOLDER
from sphinxkit.formatters.tasks.coordinates import DECIMALS

# A message's words: texts of its parts are joined; parts of type image are counted. One image stands before all text.
_READ = """\
{%- set seen = namespace(images=0, said=[]) -%}
{%- for message in messages -%}
{%- set words = namespace(text="") -%}
{%- if message["content"] is string -%}
{%- set words.text = message["content"] -%}
{%- else -%}
{%- for part in message["content"] -%}
{%- if part["type"] in ("image", "image_url") -%}
{%- set seen.images = seen.images + 1 -%}
{%- elif part["type"] == "text" -%}
{%- set words.text = words.text + part["text"] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set seen.said = seen.said + [{"role": message["role"], "content": words.text.replace(IMAGE, "").strip()}] -%}
{%- endfor -%}
{%- if seen.images > 1 -%}
{{- raise_exception("SPHINX reads one image a conversation") -}}
{%- endif -%}
"""

# Lists of points or boxes, "[0.101,0.300;0.599,0.802]", whose numbers are rounded: `coordinate_grid.move_to_grid`.
_GRID = """\
{%- macro on_grid(text) -%}
{%- for piece in text.split("[") -%}
{%- set inner = piece.split("]")[0] -%}
{%- set fits = namespace(all=not loop.first and "]" in piece, text="") -%}
{%- for group in inner.split(";") -%}
{%- set numbers = group.split(",") -%}
{%- if not 2 <= numbers|length <= 4 -%}
{%- set fits.all = false -%}
{%- endif -%}
{%- if not loop.first -%}
{%- set fits.text = fits.text + ";" -%}
{%- endif -%}
{%- for number in numbers -%}
{%- set core = number.strip() -%}
{%- set halves = core.split(".") -%}
{%- if halves|length == 2 and halves[0] in ("", "0", "1") and halves[1].isascii() and halves[1].isdigit() -%}
{%- set steps = [(core|float * STEPS)|round|int, STEPS]|min -%}
{%- set core = FORMAT|format(steps / STEPS) -%}
{%- else -%}
{%- set fits.all = false -%}
{%- endif -%}
{%- set fits.text = fits.text + ("" if loop.first else ",") + number.replace(number.strip(), core) -%}
{%- endfor -%}
{%- endfor -%}
{{- ("" if loop.first else "[") + (fits.text + piece[inner|length:] if fits.all else piece) -}}
{%- endfor -%}
{%- endmacro -%}
"""

_TURNS = """\
{%- set given = seen.said|length > 0 and seen.said[0]["role"] == "system" -%}
{%- set system = seen.said[0]["content"] if given else SYSTEM -%}
{{- SYSTEM_TEXT -}}
{{- OPENING -}}
{%- for message in (seen.said[1:] if given else seen.said) -%}
{%- if message["role"] != ("user" if loop.index0 % 2 == 0 else "assistant") -%}
{{- raise_exception("user and assistant speak in turn, the user first; got " + message["role"]) -}}
{%- elif not message["content"] -%}
{{- raise_exception("a message is empty") -}}
{%- endif -%}
{%- if message["role"] == "user" -%}
{{- USER + GAP + USER_CONTENT + USER_END -}}
{%- else -%}
{{- ASSISTANT -}}
{%- generation -%}
{{- GAP + message["content"] + SEPARATOR -}}
{%- endgeneration -%}
{{- TAIL -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and seen.said[-1]["role"] == "user" -%}
{{- ASSISTANT -}}
{%- endif -%}
"""


def chat_template(template: ConversationTemplate, *, has_bos: bool) -> str:
    """The Jinja text that writes what ``template.render`` writes.

    In front stand the beginning-of-sentence token and, where a message holds one, the image's token. An answer's span
    is marked with ``{% generation %}``, which transformers' ``return_assistant_tokens_mask`` reads.

    Args:
        template: Of the model. The text of a :class:`JinjaTemplate` is kept, with the marks that it has.
        has_bos: Whether the tokenizer begins a text with beginning-of-sentence.
    Raises:
        DataError: The template is of a class that this function does not know.
    """
    names = {"IMAGE": IMAGE_PLACEHOLDER}
    front = ("{{- bos_token -}}\n" if has_bos else "") + "{%- if seen.images -%}\n{{- IMAGE -}}\n{%- endif -%}\n"
    if isinstance(template, JinjaTemplate):
        system = f'[{{"role": "system", "content": {template.system!a}}}] + ' if template.system else ""
        given = '(seen.said if seen.said[0]["role"] == "system" else ' if system else "("
        rest = "{%- set messages = " + given + system + "seen.said) -%}\n" + '{%- set bos_token = "" -%}\n'
        return _filled(_READ + front, names) + rest + template.source
    if type(template) is not ConversationTemplate:
        raise DataError(f"conversation {template.name!r}: a {type(template).__name__} has no chat template in Jinja")
    grid = template.coordinate_grid
    names |= {
        "SYSTEM": template.system,
        "OPENING": template.opening,
        "USER": template.roles["user"],
        "ASSISTANT": template.roles["assistant"],
        "GAP": template.gap,
        "SEPARATOR": template.separator,
        "USER_END": template.separator + template.tail if template.user_separator is None else template.user_separator,
        "TAIL": template.tail,
    }
    frame = template.system_frame
    if frame is None:
        system_text = '(raise_exception("this model has no place for a system text") if system else "")'
    else:
        system_text = f'({frame[0]!a} + system + {frame[1]!a} if system else "")'
    code = {
        "SYSTEM_TEXT": system_text,
        "USER_CONTENT": 'message["content"]' if grid is None else 'on_grid(message["content"])',
        "STEPS": str(grid),
        "FORMAT": ascii(f"%.{DECIMALS}f"),
    }
    return _filled(_READ + front + ("" if grid is None else _GRID) + _TURNS, names, code)


def _filled(text: str, names: dict[str, str], code: dict[str, str] | None = None) -> str:
    """The text with names in capitals replaced by string literals, and by the code that stands for them."""
    values = {name: ascii(value) for name, value in names.items()} | (code or {})
    words = re.compile(rf"\b({'|'.join(values)})\b")
    return words.sub(lambda found: values[found.group()], text)
