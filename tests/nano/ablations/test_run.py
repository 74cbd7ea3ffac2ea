"""Every variant at micro size, its results and the page that is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.errors import RecipeError
from sphinxkit.nano.ablations import report as report_module
from sphinxkit.nano.ablations import run as run_module
from sphinxkit.nano.ablations.report import CLAIMS, write_page
from sphinxkit.nano.ablations.run import AblationPlan, read_results, run_ablations
from sphinxkit.nano.ablations.variants import CLAIM_NAMES, choose_variants, make_variants
from sphinxkit.nano.stages import steps
from sphinxkit.training import log
from tests.nano.ablations.claims import results

MIX_ATOL = 1e-6  # float32 sums of two products


PLAN = AblationPlan(conversations=4, batch_size=4, num_scenes=2, seeds=(0,), llm={}, dtype="float32")


@pytest.fixture
def micro(micro_recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (run_module, steps):
        monkeypatch.setattr(module, "recipes", lambda: micro_recipes)
    monkeypatch.setattr(log, "plot_losses", lambda folder: None)  # a third of the time
    return micro_recipes


@pytest.mark.slow
@pytest.mark.parametrize("claim", ["weights", None])
def test_every_variant(claim: str | None, micro: Path, encoders: Path, tmp_path: Path) -> None:
    told: list[str] = []

    def run(plan: AblationPlan = PLAN, **options: Any) -> str | None:
        told.clear()
        return run_ablations(
            tmp_path, encoders, plan=plan, claim=claim, report=lambda name, _: told.append(name), **options
        )

    assert run(minutes=0.0) == "real-0"
    assert not told
    assert run() is None
    variants = choose_variants(claim)
    in_order = [f"{variant.name}-0" for name in CLAIM_NAMES for variant in choose_variants(name) if variant in variants]
    assert list(dict.fromkeys(told)) == list(dict.fromkeys(in_order))
    results = read_results(tmp_path / "results")
    assert {result["variant"] for result in results} == {variant.name for variant in variants}
    claims = [each for each in CLAIMS if claim in (None, each.name)]
    for each in claims:
        for variant in choose_variants(each.name):
            (found,) = (result for result in results if result["variant"] == variant.name)
            assert set(each.shown) <= set(found["scores"])
    # a mix lies between its ends
    weights = {
        name: sphinxkit.load(tmp_path / "runs" / f"{name}-0" / "model").state_dict()["llm.lm_head.weight"]
        for name in ("real", "synthetic", "beta_0.75")
    }
    mixed = 0.75 * weights["real"] + 0.25 * weights["synthetic"]
    assert torch.allclose(weights["beta_0.75"], mixed, atol=MIX_ATOL)
    assert not torch.allclose(weights["real"], weights["synthetic"], atol=MIX_ATOL)
    # encoders are the trained ones and stay so
    trained = encoder_states(encoders)
    for variant in variants:
        own = encoder_states(tmp_path / "runs" / f"{variant.name}-0" / "model")
        assert set(own) == set(variant.encoders)
        for name, state in own.items():
            assert all(torch.equal(tensor, trained[name][key]) for key, tensor in state.items())
    # nothing is computed twice, also where runs are gone
    before = {path: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert run() is None
    assert not told
    assert {path: path.read_bytes() for path in (tmp_path / "results").iterdir()} == before
    with pytest.raises(RecipeError, match=r"real-0.json: was made with another budget; what differs: conversations"):
        run(AblationPlan(8, 4, 2, (0,), {}, "float32"))
    # the page
    write_page(results, tmp_path / "page.md", tmp_path / "pictures", PLAN)
    page = (tmp_path / "page.md").read_text()
    assert ("Every variant with every seed." in page) == (claim is None)
    assert page.count("is not decided") == len(CLAIMS)
    for each in claims:
        assert f"](pictures/ablations_{each.name}.png)" in page
        assert (tmp_path / "pictures" / f"ablations_{each.name}.png").read_bytes().startswith(b"\x89PNG")


def encoder_states(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    vision = sphinxkit.load(checkpoint).vision
    assert vision is not None
    return {encoder.name: encoder.state_dict() for branch in vision.branches for encoder in branch.encoders}


def test_a_variant_resumes_where_it_stopped(
    micro: Path, encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = AblationPlan(12, 4, 2, (3,), {}, "float32")
    seen: list[int] = []

    def report(name: str, record: Any) -> None:
        if "step" in record:
            seen.append(record["step"])

    answers = iter([False, False, True])  # before the variant, behind its first step, behind its second
    with monkeypatch.context() as patch:
        patch.setattr(steps.TimeLimit, "is_over", property(lambda _: next(answers)))
        assert run_ablations(tmp_path, encoders, plan=plan, claim="weights", report=report) == "real-3"
    assert not (tmp_path / "results").exists()
    with monkeypatch.context() as patch:
        more = iter([False, True])  # before the variant, before the next; not behind the last step
        patch.setattr(steps.TimeLimit, "is_over", property(lambda _: next(more)))
        assert run_ablations(tmp_path, encoders, plan=plan, claim="weights", report=report) == "synthetic-3"
    assert seen == [0, 1, 2]
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["real-3.json"]


def test_what_is_refused(tmp_path: Path, micro: Path, encoders: Path) -> None:
    with pytest.raises(RecipeError, match=r"no claim 'weight'; did you mean 'weights'.*Claims: weights, text, "):
        run_ablations(tmp_path, encoders, claim="weight")
    model = sphinxkit.load(encoders)
    assert model.vision is not None
    blind = type("Blind", (), {"vision": None})()
    variant = make_variants()[0]
    with pytest.raises(RecipeError, match="there is no vision tower"):
        run_module.make_start(variant, PLAN, 0, tmp_path, blind)
    model.vision.branches = model.vision.branches[1:]
    with pytest.raises(RecipeError, match="checkpoint has no blip2_qformer, but clip_vit_large_patch14, convnext"):
        run_module.make_start(variant, PLAN, 0, tmp_path, model)
    (tmp_path / "x.json").write_text('{"variant": "all"}')
    with pytest.raises(RecipeError, match=r"x.json: is not the result of a variant \(KeyError\('seed'\)\)"):
        read_results(tmp_path)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "runs" / "ablations"
    seen: list[Any] = []

    def run(place: Path, encoders: Path, **options: Any) -> str:
        seen.append((place, encoders, options["claim"], options["minutes"], options["plan"].conversations))
        (output / "results").mkdir(parents=True)
        for result in results(all=[1.0, 1.0], shared=[2.0, 2.0]):
            (output / "results" / f"{result['variant']}-{result['seed']}.json").write_text(json.dumps(result))
        return "one_view-0"

    monkeypatch.setattr(report_module, "run_ablations", run)
    arguments = ["reproduce", "ablations", "-o", str(output), "--claim", "tasks", "--minutes", "5"]
    arguments += ["--conversations", "640"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert seen == [(output, tmp_path / "runs" / "nano" / "encoders" / "model", "tasks", 5.0, 640)]
    assert result.stdout == "tasks: shows\n"
    assert result.stderr.endswith("stopped; the next call resumes with one_view-0\n")
    assert "## Tasks" in (output / "ablations.md").read_text()
    assert (output / "images" / "ablations_tasks.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nano", "--claim", "text"], "--claim, --conversations and --encoders are for ablations"),
        (["nano", "--encoders", "x"], "--claim, --conversations and --encoders are for ablations"),
        (["ablations", "--last", "mixed"], "--last is for nano"),
    ],
)
def test_options_of_the_other_subject(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["reproduce", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
