"""How far the greedy tokens of several candidates agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from benchmarks.harness import Context
from benchmarks.llama_twins import Step

REFERENCE = "sphinxkit, plain modules"


def differences(
    context: Context, steps: Mapping[str, Callable[[], Step]], reference: str, vocab_size: int, prompt: int, new: int
) -> dict[str, dict[str, float]]:
    """Facts about each candidate's greedy tokens that differ from the reference's.

    All candidates read the reference's tokens, so each is compared at every position, not only up to its first
    difference.

    Args:
        context: Device.
        steps: Candidate -> a maker of its step.
        reference: The candidate that the others are compared with.
        vocab_size: Of the random prompt.
        prompt: Its tokens.
        new: Tokens that are compared.
    """
    ids = torch.randint(3, vocab_size, (1, prompt), device=context.device)
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        line, logits = ids, []
        step = steps[reference]()
        for _ in range(new):
            logits.append(step(line)[0, -1].float())
            line = logits[-1].argmax().view(1, 1)
        for name, make in steps.items():
            step, line, facts = make(), ids, {"tokens that differ": 0.0}
            for position, expected in enumerate(logits):
                token = int(step(line)[0, -1].argmax())
                best = int(expected.argmax())
                if token != best:
                    facts["tokens that differ"] += 1
                    facts.setdefault("first differing token", float(position))
                    facts.setdefault("its logit margin", float(expected[best] - expected[token]))
                line = torch.tensor([[best]], device=ids.device)
            if name != reference:
                found[name] = facts
    spread = float(torch.stack(logits).std())
    return {name: {**facts, "deviation of all logits": spread} for name, facts in found.items()}


def sentence(facts: Mapping[str, Mapping[str, float]]) -> str:
    """The same as a note for the table; empty without facts."""
    told = []
    for name, fact in facts.items():
        if "first differing token" in fact:
            told.append(
                f"{name}: token {fact['first differing token']:.0f} is the first, by a logit margin of "
                f"{fact['its logit margin']:.2g}, {fact['tokens that differ']:.0f} in all"
            )
        else:
            told.append(f"{name}: none")
    if not told:
        return ""
    spread = next(iter(facts.values()))["deviation of all logits"]
    return (
        f"greedy tokens that differ from those of '{REFERENCE}' (logits have a standard deviation of {spread:.2g}): "
        + "; ".join(told)
    )
