"""Report of the ablations: verdicts by a fixed rule, a Markdown page, plots."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sphinxkit.atomic import atomic_file
from sphinxkit.nano.ablations.run import AblationPlan, read_results, run_ablations
from sphinxkit.nano.ablations.variants import BETAS, Variant, choose_variants, make_variants
from sphinxkit.nano.stages.steps import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Sequence[Mapping[str, Any]]

RULE = (
    "A claim *shows* if the variant that it favours is better than every other one that it is compared with, in the "
    "mean over the seeds, by more than the seeds' range: the largest difference between two seeds of one variant. It "
    "is *reversed* if the favoured variant is worse than one of them by more than that. Otherwise the seeds cannot "
    "tell, and it *does not show*. With fewer than two seeds of a variant nothing is decided. A claim about pictures "
    "is *not judged* while no variant gives enough answers exactly: then none has learned to use the picture, and the "
    "loss compares the form of answers alone."
)
MIN_EXACT = 0.2  # of answers.exact, for a claim about pictures to be judged; our choice


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of the paper and the comparison that tests it.

    Args:
        name: Name, as the variants use it.
        text: The claim.
        favoured: The variant that should be better.
        others: The variants that it is compared with.
        score: The score that is compared; lower is better for all of them.
        shown: Scores in the table.
        is_about_pictures: Judge it only if a variant has learned to use the picture (``MIN_EXACT``).
    """

    name: str
    text: str
    favoured: str
    others: tuple[str, ...]
    score: str
    shown: tuple[str, ...]
    is_about_pictures: bool = False


_ANSWERS = ("answers.loss", "answers.token_accuracy", "answers.exact")
_ENDS = ("real", "synthetic")

CLAIMS = (
    Claim(
        "embeddings",
        "The mixed visual embeddings of different encoders work better than those of any one of them.",
        "all",
        tuple(variant.name for variant in make_variants() if variant.name.startswith("only_")),
        "answers.loss",
        _ANSWERS,
        is_about_pictures=True,
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
        is_about_pictures=True,
    ),
    Claim(
        "tasks",
        "Tasks tuned together need instructions of their own. (With a shared one, what is asked about still follows "
        "it; a task that asks about nothing in particular can then only be recognised from the picture.)",
        "all",
        ("shared",),
        "answers.loss",
        _ANSWERS,
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the results say about a claim.

    Args:
        word: "shows", "does not show", "is reversed", "is not decided" or "is not judged".
        gain: How much the favoured variant's mean is better than the best other's; None without results.
        seeds_range: The largest difference between two seeds of a compared variant.
    """

    word: str
    gain: float | None = None
    seeds_range: float | None = None


def values(results: Results, variant: str, score: str) -> list[float]:
    """A variant's score for every seed that is done."""
    return [
        float(result["scores"][score])
        for result in results
        if result["variant"] == variant and score in result["scores"]
    ]


def judge(results: Results, claim: Claim) -> Verdict:
    """Whether a claim shows, by ``RULE``.

    Args:
        results: Results of all variants.
        claim: The claim.
    """
    found = {variant: values(results, variant, claim.score) for variant in (claim.favoured, *claim.others)}
    if min(len(scores) for scores in found.values()) < 2:
        return Verdict("is not decided")
    gain = min(fmean(found[variant]) for variant in claim.others) - fmean(found[claim.favoured])
    spread = max(max(scores) - min(scores) for scores in found.values())
    exact = [fmean(values(results, variant, "answers.exact") or [1.0]) for variant in found]
    if claim.is_about_pictures and max(exact) < MIN_EXACT:
        return Verdict("is not judged", gain, spread)
    word = "shows" if gain > spread else "is reversed" if gain < -spread else "does not show"
    return Verdict(word, gain, spread)


def _cell(found: Sequence[float]) -> str:
    if not found:
        return "not done"
    spread = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else " (one seed)"
    return f"{fmean(found):.3f}{spread}"


def _rows(results: Results, claim: Claim) -> list[str]:
    lines = [f"| variant | {' | '.join(claim.shown)} |", "|---" * (1 + len(claim.shown)) + "|"]
    for variant in choose_variants(claim.name):
        cells = [_cell(values(results, variant.name, score)) for score in claim.shown]
        name = f"**{variant.title}**" if variant.name == claim.favoured else variant.title
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _sentence(verdict: Verdict, claim: Claim) -> str:
    if verdict.gain is None:
        return "The claim **is not decided**: there are fewer than two seeds of a variant."
    if verdict.word == "is not judged":
        return (
            f"The claim **is not judged**: in no variant does `answers.exact` reach {MIN_EXACT}, so none has learned "
            "to use the picture at this budget, and the losses compare the form of answers alone."
        )
    side = "better" if verdict.gain >= 0 else "worse"
    return (
        f"The claim **{verdict.word}**: by `{claim.score}` the variant in bold is {abs(verdict.gain):.3f} {side} than "
        f"the best of the others it is compared with ({', '.join(claim.others)}); the seeds' range is "
        f"{verdict.seeds_range:.3f}."
    )


def _undone(results: Results, plan: AblationPlan) -> list[str]:
    done = {(result["variant"], result["seed"]) for result in results}
    return [
        f"{variant.name}-{seed}"
        for seed in plan.seeds
        for variant in make_variants()
        if (variant.name, seed) not in done
    ]


def _budget(results: Results) -> str:
    if not results:
        return "Nothing is done yet."
    plan, *others = [{key: value for key, value in result["plan"].items() if key != "seeds"} for result in results]
    if any(other != plan for other in others):
        return "The variants below were **not** made with the same budget; see their result files."
    llm = plan["llm"]
    minutes = sum(result["seconds"]["training"] + result["seconds"]["measuring"] for result in results) / 60
    return (
        f"Every variant is trained on {plan['conversations']:,} conversations (one that starts from another: after "
        f"that one's), in steps of {plan['batch_size']}, and evaluated on {plan['num_scenes']} unseen scenes of each "
        f"task. The language model is smaller than SPHINX-nano's: width {llm.get('embed_dim', '-')}, "
        f"{llm.get('num_layers', '-')} layers. The {len(results)} results took {minutes:.0f} minutes."
    )


def render(results: Results, plan: AblationPlan | None = None, images: str = "images") -> str:
    """The page, in Markdown.

    Args:
        results: Results of the variants that are done.
        plan: The plan, which has the seeds; None: the default.
        images: Folder of the plots, as the page names it.
    """
    undone = _undone(results, plan or AblationPlan())
    lines = [
        "# SPHINX's claims, on SPHINX-nano",
        "",
        "Written by `sphinxkit reproduce ablations`, or by `python docs/ablations_page.py` from",
        "`docs/ablations/*.json`; do not edit. `sphinxkit.nano.ablations.variants` defines the variants.",
        "",
        _budget(results),
        "",
        "Scores are means over tasks and seeds, with the seeds' range: `loss` in nats per token of the right answers",
        "(lower is better), `token_accuracy` the share of their tokens that the model finds the most likely ones,",
        "`exact` the share of answers of which all tokens are. Where that is a few per cent, a model has learnt the",
        "form of the answers and hardly uses the picture yet: such rows compare the first steps of learning, not final",
        "models.",
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
        if any(values(results, variant.name, claim.score) for variant in choose_variants(claim.name)):
            lines += ["", f"![{title}: {claim.score} of every variant and seed]({images}/{_picture(claim)})"]
    lines += ["", "## What is done", ""]
    listed = ", ".join(f"`{name}`" for name in undone)
    lines.append(f"Not done yet: {listed}." if undone else "Every variant with every seed.")
    return "\n".join(lines) + "\n"


def _picture(claim: Claim) -> str:
    return f"ablations_{claim.name}.png"


def plot(results: Results, folder: str | Path) -> list[Path]:
    """Plot every claim that has a result: each seed as a point, each variant's mean as a line.

    Args:
        results: Results of the variants that are done.
        folder: Folder of the plots.
    Returns:
        The plots; none without matplotlib (the extra ``plot``).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    place, made = Path(folder), []
    place.mkdir(parents=True, exist_ok=True)
    for claim in CLAIMS:
        variants = [variant for variant in choose_variants(claim.name) if values(results, variant.name, claim.score)]
        if not variants:
            continue
        figure = Figure(
            figsize=(7, 1.2 + 0.4 * len(variants) + (1.5 if claim.name == "weights" else 0)), layout="constrained"
        )
        axes = figure.subplots()
        (_draw_betas if claim.name == "weights" else _draw_variants)(axes, results, claim, variants)
        path = place / _picture(claim)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        made.append(path)
    return made


def _draw_variants(axes: Axes, results: Results, claim: Claim, variants: Sequence[Variant]) -> None:
    for row, variant in enumerate(reversed(variants)):
        found = values(results, variant.name, claim.score)
        color = "tab:orange" if variant.name == claim.favoured else "tab:blue"
        axes.plot(found, [row] * len(found), "o", color=color, alpha=0.7)
        axes.plot([fmean(found)] * 2, [row - 0.3, row + 0.3], "-", color=color)
    axes.set_yticks(range(len(variants)), [variant.title for variant in reversed(variants)])
    axes.set_xlabel(f"{claim.score} (lower is better)")
    axes.grid(axis="x", alpha=0.3)


def _draw_betas(axes: Axes, results: Results, claim: Claim, variants: Sequence[Variant]) -> None:
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
        results: Results of the variants that are done.
        page: The file.
        images: Folder of the plots.
        plan: See ``render``.
    """
    target = Path(page)
    plot(results, images)
    text = render(results, plan, Path(os.path.relpath(images, target.parent)).as_posix())
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call of ``reproduce_ablations`` has done.

    Args:
        next: The variant that the next call resumes with; None if all are done.
        verdicts: Claim to its verdict, for the claims that were asked for; empty without results.
        page: The page with tables and plots; None without results.
    """

    next: str | None
    verdicts: Mapping[str, Verdict]
    page: Path | None


def reproduce_ablations(
    output: str | Path,
    encoders: str | Path,
    *,
    conversations: int | None = None,
    claim: str | None = None,
    minutes: float | None = None,
    report: Report | None = None,
) -> Outcome:
    """Run the variants that have no result yet, and write ``ablations.md`` with its plots.

    Args:
        output: Folder of runs, results and page.
        encoders: Checkpoint with the trained encoders: what the stage ``encoders`` of SPHINX-nano writes.
        conversations: Budget of every variant; None: the default of ``AblationPlan``.
        claim: Run only the variants of this claim.
        minutes: Stop after about this long; call again to resume.
        report: Called with a variant's name and each record of its log.
    Raises:
        RecipeError, SphinxkitError: As ``run_ablations``.
    """
    plan = AblationPlan() if conversations is None else AblationPlan(conversations=conversations)
    place = Path(output)
    following = run_ablations(place, encoders, plan=plan, claim=claim, minutes=minutes, report=report)
    results = read_results(place / "results")
    if not results:
        return Outcome(following, {}, None)
    page = place / "ablations.md"
    write_page(results, page, place / "images")
    return Outcome(following, {each.name: judge(results, each) for each in CLAIMS if claim in (None, each.name)}, page)
