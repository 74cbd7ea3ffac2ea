"""What the ablations show: verdicts by a stated rule, a page in Markdown, plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sphinxkit.atomic import atomic_file
from sphinxkit.nano.ablations import AblationPlan
from sphinxkit.nano.arms import BETAS, Arm, choose_arms, make_arms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Sequence[Mapping[str, Any]]

RULE = (
    "A claim *shows* if the arm that it favours is better than every other one that it is compared with, in the mean "
    "over the seeds, by more than the seeds' range: the largest difference between two seeds of one arm. It is "
    "*reversed* if it is worse than one of them by more than that; else the seeds do not tell, and it *does not show*. "
    "With fewer than two seeds of an arm nothing is said."
)


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of the paper and what would show it.

    Args:
        name: As the arms name it.
        text: What is claimed.
        favoured: The arm that should be better.
        others: Those that it is compared with.
        score: By what; lower is better in all of them.
        shown: Scores in the table.
    """

    name: str
    text: str
    favoured: str
    others: tuple[str, ...]
    score: str
    shown: tuple[str, ...]


_ANSWERS = ("answers.loss", "answers.token_accuracy", "answers.exact")
_ENDS = ("real", "synthetic")

CLAIMS = (
    Claim(
        "embeddings",
        "Visual embeddings of different encoders, mixed, serve better than those of any one of them.",
        "all",
        tuple(arm.name for arm in make_arms() if arm.name.startswith("only_")),
        "answers.loss",
        _ANSWERS,
    ),
    Claim(
        "text",
        "Text alone, trained beside captions, keeps the unfrozen language model from forgetting how to write.",
        "captions_text",
        ("captions",),
        "text.perplexity",
        ("text.perplexity", "synthetic.loss"),
    ),
    Claim(
        "weights",
        "The mean of the weights of a model tuned on real captions and one tuned on synthetic ones does better over "
        "both domains than either of them.",
        "beta_0.50",
        _ENDS,
        "both.loss",
        ("real.loss", "synthetic.loss", "both.loss"),
    ),
    Claim(
        "sub_images",
        "Sub-images beside the whole picture help with small objects and small text.",
        "sub_images",
        ("one_view",),
        "answers.loss",
        _ANSWERS,
    ),
    Claim(
        "tasks",
        "Tasks tuned together need instructions of their own. (With a shared one, what is asked about still stands "
        "behind it; a task that asks about nothing in particular can then be told by the picture alone.)",
        "all",
        ("shared",),
        "answers.loss",
        _ANSWERS,
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the arms say of a claim.

    Args:
        word: "shows", "does not show", "is reversed" or "is not decided".
        gain: By how much the favoured arm's mean is better than the best other's; None without results.
        seeds_range: The largest difference between two seeds of an arm that is compared.
    """

    word: str
    gain: float | None = None
    seeds_range: float | None = None


def values(results: Results, arm: str, score: str) -> list[float]:
    """An arm's score with every seed that is done.

    Args:
        results: Of all arms.
        arm: Its name.
        score: The score's name.
    """
    return [float(result["scores"][score]) for result in results if result["arm"] == arm and score in result["scores"]]


def judge(results: Results, claim: Claim) -> Verdict:
    """Say whether a claim shows, by ``RULE``.

    Args:
        results: Of all arms.
        claim: Which.
    """
    found = {arm: values(results, arm, claim.score) for arm in (claim.favoured, *claim.others)}
    if min(len(scores) for scores in found.values()) < 2:
        return Verdict("is not decided")
    gain = min(fmean(found[arm]) for arm in claim.others) - fmean(found[claim.favoured])
    spread = max(max(scores) - min(scores) for scores in found.values())
    word = "shows" if gain > spread else "is reversed" if gain < -spread else "does not show"
    return Verdict(word, gain, spread)


def _cell(found: Sequence[float]) -> str:
    if not found:
        return "not done"
    spread = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else " (one seed)"
    return f"{fmean(found):.3f}{spread}"


def _rows(results: Results, claim: Claim) -> list[str]:
    lines = [f"| arm | {' | '.join(claim.shown)} |", "|---" * (1 + len(claim.shown)) + "|"]
    for arm in choose_arms(claim.name):
        cells = [_cell(values(results, arm.name, score)) for score in claim.shown]
        name = f"**{arm.title}**" if arm.name == claim.favoured else arm.title
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _sentence(verdict: Verdict, claim: Claim) -> str:
    if verdict.gain is None:
        return "The claim **is not decided**: there are fewer than two seeds of an arm."
    side = "better" if verdict.gain >= 0 else "worse"
    return (
        f"The claim **{verdict.word}**: by `{claim.score}` the arm in bold is {abs(verdict.gain):.3f} {side} than the "
        f"best of the others it is compared with ({', '.join(claim.others)}); the seeds' range is "
        f"{verdict.seeds_range:.3f}."
    )


def _undone(results: Results, plan: AblationPlan) -> list[str]:
    done = {(result["arm"], result["seed"]) for result in results}
    return [f"{arm.name}-{seed}" for seed in plan.seeds for arm in make_arms() if (arm.name, seed) not in done]


def _budget(results: Results) -> str:
    if not results:
        return "Nothing is done yet."
    plan, *others = [{key: value for key, value in result["plan"].items() if key != "seeds"} for result in results]
    if any(other != plan for other in others):
        return "The arms below were **not** made with the same budget; see their result files."
    llm = plan["llm"]
    minutes = sum(result["seconds"]["training"] + result["seconds"]["measuring"] for result in results) / 60
    return (
        f"Every arm is trained on {plan['conversations']:,} conversations (one that starts from another: after that "
        f"arm's), in steps of {plan['batch_size']}, and measured on {plan['num_scenes']} unseen scenes of each task. "
        f"The language model is smaller than SPHINX-nano's: width {llm.get('embed_dim', '-')}, "
        f"{llm.get('num_layers', '-')} layers. The {len(results)} results took {minutes:.0f} minutes."
    )


def render(results: Results, plan: AblationPlan | None = None, images: str = "images") -> str:
    """The page.

    Args:
        results: Of the arms that are done.
        plan: Which seeds are wanted; None: the default.
        images: Folder of the plots, as the page names it.
    """
    undone = _undone(results, plan or AblationPlan())
    lines = [
        "# SPHINX's claims, on SPHINX-nano",
        "",
        "Written by `sphinxkit reproduce ablations`, or by `python docs/ablations_page.py` from",
        "`docs/ablations/*.json`; do not edit. How the arms are made is said in `sphinxkit.nano.arms`.",
        "",
        _budget(results),
        "",
        "Scores are means over tasks and seeds, with the seeds' range: `loss` in nats per token of the right answers",
        "(lower is better), `token_accuracy` the share of their tokens that the model holds for the most likely ones,",
        "`exact` the share of answers that are so from end to end. Where that is a few per cent, a model has learnt",
        "the answers' form and hardly looks at the picture yet: such rows compare the first steps of learning, not",
        "what the arms come to in the end.",
        "",
        RULE,
    ]
    for claim in CLAIMS:
        title = claim.name.replace("_", "-").capitalize()
        lines += [
            "",
            f"## {title}",
            "",
            claim.text,
            "",
            *_rows(results, claim),
            "",
            _sentence(judge(results, claim), claim),
        ]
        if any(values(results, arm.name, claim.score) for arm in choose_arms(claim.name)):
            lines += ["", f"![{title}: {claim.score} of every arm and seed]({images}/{_picture(claim)})"]
    lines += ["", "## What is done", ""]
    lines.append(
        "Every arm with every seed." if not undone else f"Not done yet: {', '.join(f'`{name}`' for name in undone)}."
    )
    return "\n".join(lines) + "\n"


def _picture(claim: Claim) -> str:
    return f"ablations_{claim.name}.png"


def plot(results: Results, folder: str | Path) -> list[Path]:
    """Draw every claim that has a result: each seed as a point, each arm's mean as a line.

    Args:
        results: Of the arms that are done.
        folder: Of the pictures.
    Returns:
        The pictures; none without matplotlib (the extra ``plot``).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    place, made = Path(folder), []
    place.mkdir(parents=True, exist_ok=True)
    for claim in CLAIMS:
        arms = [arm for arm in choose_arms(claim.name) if values(results, arm.name, claim.score)]
        if not arms:
            continue
        figure = Figure(
            figsize=(7, 1.2 + 0.4 * len(arms) + (1.5 if claim.name == "weights" else 0)), layout="constrained"
        )
        axes = figure.subplots()
        (_draw_betas if claim.name == "weights" else _draw_arms)(axes, results, claim, arms)
        path = place / _picture(claim)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        made.append(path)
    return made


def _draw_arms(axes: Axes, results: Results, claim: Claim, arms: Sequence[Arm]) -> None:
    for row, arm in enumerate(reversed(arms)):
        found = values(results, arm.name, claim.score)
        color = "tab:orange" if arm.name == claim.favoured else "tab:blue"
        axes.plot(found, [row] * len(found), "o", color=color, alpha=0.7)
        axes.plot([fmean(found)] * 2, [row - 0.3, row + 0.3], "-", color=color)
    axes.set_yticks(range(len(arms)), [arm.title for arm in reversed(arms)])
    axes.set_xlabel(f"{claim.score} (lower is better)")
    axes.grid(axis="x", alpha=0.3)


def _draw_betas(axes: Axes, results: Results, claim: Claim, arms: Sequence[Arm]) -> None:
    names = {beta: {0.0: "synthetic", 1.0: "real"}.get(beta, f"beta_{beta:.2f}") for beta in BETAS}
    for score, color in zip(claim.shown, ("tab:blue", "tab:green", "tab:orange"), strict=True):
        points = [(beta, value) for beta, name in names.items() for value in values(results, name, score)]
        means = [(beta, fmean(found)) for beta, name in names.items() if (found := values(results, name, score))]
        axes.plot(*zip(*points, strict=True), "o", color=color, alpha=0.5)
        axes.plot(*zip(*means, strict=True), "-", color=color, label=score)
    axes.set_xlabel("beta: weight of the real domain's model")
    axes.set_ylabel("loss (lower is better)")
    axes.legend()
    axes.grid(alpha=0.3)


def write_page(results: Results, page: str | Path, images: str | Path, plan: AblationPlan | None = None) -> None:
    """Write the page and its plots.

    Args:
        results: Of the arms that are done.
        page: The file.
        images: Folder of the plots.
        plan: See ``render``.
    """
    import os

    target = Path(page)
    plot(results, images)
    text = render(results, plan, Path(os.path.relpath(images, target.parent)).as_posix())
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
