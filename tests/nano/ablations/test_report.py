from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sphinxkit.nano.ablations.report import Claim, judge, plot, render
from sphinxkit.nano.ablations.run import read_results
from sphinxkit.recipe import shipped_folder
from tests.nano.ablations.claims import results

CLAIM = Claim("tasks", "It helps.", "all", ("shared", "one_view"), "answers.loss", ("answers.loss",))


@pytest.mark.parametrize(
    ("scores", "word", "gain"),
    [
        ({"all": [1.0, 1.1], "shared": [1.5, 1.5], "one_view": [1.4, 1.45]}, "shows", 0.375),
        ({"all": [1.0, 1.4], "shared": [1.5, 1.5], "one_view": [1.4, 1.5]}, "does not show", 0.25),
        ({"all": [1.0, 1.0], "shared": [0.5, 0.6], "one_view": [1.4, 1.5]}, "is reversed", -0.45),
        ({"all": [1.0, 1.0], "shared": [0.9, 1.0], "one_view": [1.4, 1.5]}, "does not show", -0.05),
    ],
)
def test_verdicts(scores: dict[str, list[float]], word: str, gain: float) -> None:
    verdict = judge(results(**scores), CLAIM)
    assert verdict.word == word
    assert verdict.gain == pytest.approx(gain)


def test_a_claim_about_pictures_is_not_judged_where_no_variant_uses_them() -> None:
    found = results(all=[1.0, 1.0], shared=[0.5, 0.6], one_view=[1.4, 1.5])
    about_pictures = dataclasses.replace(CLAIM, is_about_pictures=True)
    for exact, word in ((0.06, "is not judged"), (0.2, "is reversed")):
        for result in found:
            result["scores"]["answers.exact"] = exact
        assert judge(found, about_pictures).word == word
        assert judge(found, CLAIM).word == "is reversed"


def test_one_seed_decides_nothing() -> None:
    assert judge(results(all=[1.0], shared=[2.0, 2.0], one_view=[2.0, 2.0]), CLAIM).word == "is not decided"
    assert judge([], CLAIM).word == "is not decided"


def test_the_page_says_what_is_not_done(tmp_path: Path) -> None:
    page = render(results(all=[1.0, 1.2], shared=[3.0]))
    assert "| **all four encoders, own instructions** | 1.100 (1.000 to 1.200) | not done | not done |" in page
    assert "| one shared instruction | 3.000 (one seed) |" in page
    assert "`shared-1`" in page
    assert "`all-1`" not in page
    assert "The 3 results took 3 minutes." in page
    assert "Nothing is done yet." in render([])
    mixed = results(all=[1.0]) + [r | {"plan": {"conversations": 9}} for r in results(shared=[1.0])]
    assert "**not** made with the same budget" in render(mixed)
    apart = [r | {"plan": r["plan"] | {"seeds": [r["seed"]]}} for r in results(all=[1.0, 1.2])]
    assert "Every variant is trained on 4 conversations" in render(apart)  # which seeds a call ran is no budget
    assert {path.name for path in plot(results(all=[1.0]), tmp_path)} == {
        "ablations_embeddings.png",
        "ablations_tasks.png",
    }


def test_the_shipped_page_is_what_its_results_give() -> None:
    docs = shipped_folder().parent / "docs"
    if not (docs / "ablations.md").exists():
        pytest.skip("not a checkout")
    assert (docs / "ablations.md").read_text() == render(read_results(docs / "ablations"))
