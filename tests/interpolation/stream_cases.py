from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sphinxkit.interpolation import MixedSource, create, parse_rules
from sphinxkit.tensor_source import MappingSource

Make = Callable[..., MappingSource]


UP = "llm.layers.1.mlp.up_proj.weight"


EMBED = "llm.embed_tokens.weight"


def mix(*sources: MappingSource, beta: float = 0.5, rules: dict[str, Any] | None = None, **options: Any) -> MixedSource:
    return MixedSource(
        sources, create("linear"), (beta, 1 - beta), rules=parse_rules(rules or {}, len(sources)), **options
    )
