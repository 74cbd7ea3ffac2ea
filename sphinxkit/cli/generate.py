"""``sphinxkit generate``: one prompt, one answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sphinxkit.cli.options import Checkpoint, Device, Dtype, Json, RecipeOption, load_model


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question; with --raw the whole prompt.")],
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture that the prompt is about.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not put the prompt through the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of the sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends the answer; may be repeated. Default: the template's.")
    ] = None,
    truncate_left: Annotated[bool, typer.Option(help="Shorten an over-long prompt from the left.")] = False,
    recipe: RecipeOption = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    r"""Answer a prompt, about a picture or without.

    Examples:

    `sphinxkit generate models/sphinx_1k --image photo.jpg --prompt "What is in the picture?"`

    `sphinxkit generate hf://org/repo -i chart.png -p "Convert this chart to a table." --max-new-tokens 200 --json`
    """
    model = load_model(checkpoint, recipe, device, dtype)
    text, ends = (prompt, ()) if raw else model.chat_prompt([{"role": "user", "content": prompt}])
    [answer] = model.generate(
        [text],
        [image],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop) if stop else ends,
        truncate="left" if truncate_left else None,
    )
    if as_json:
        fields = {
            "prompt": text,
            "image": None if image is None else str(image),
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
        }
        typer.echo(json.dumps(fields, ensure_ascii=False))
    else:
        typer.echo(answer.text.strip())
