"""Every variant at micro size, its results and the page that is made of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app
from sphinxkit.errors import RecipeError
from sphinxkit.formatters import tasks
from sphinxkit.nano.ablations import report as report_module
from sphinxkit.nano.ablations import run as run_module
from sphinxkit.nano.ablations.report import CLAIMS, Claim, judge, plot, render, write_page
from sphinxkit.nano.ablations.run import AblationPlan, read_results, run_ablations
from sphinxkit.nano.ablations.variants import CLAIM_NAMES, SHARED, choose_variants, make_variants
from sphinxkit.nano.stages import steps
from sphinxkit.recipe import Recipe, build, shipped_folder
from sphinxkit.training import log

MIX_ATOL = 1e-6  # float32 sums of two products
PLAN = AblationPlan(conversations=4, batch_size=4, num_scenes=2, seeds=(0,), llm={}, dtype="float32")


@pytest.fixture
def micro(micro_recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (run_module, steps):
        monkeypatch.setattr(module, "recipes", lambda: micro_recipes)
    monkeypatch.setattr(log, "plot_losses", lambda folder: None)  # a third of the time
    return micro_recipes


@pytest.fixture(scope="session")
def encoders(micro_recipes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "model"
    torch.manual_seed(11)
    build(micro_recipes / "model.yaml").save(folder)
    return folder


@pytest.mark.parametrize("claim", ["weights", pytest.param(None, marks=pytest.mark.slow)])
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


def test_variants_are_the_shipped_recipes_but_for_what_they_say(tmp_path: Path) -> None:
    plan = AblationPlan()
    for variant in make_variants():
        if variant.recipe is None:
            assert variant.beta is not None
            continue
        document = run_module.training_document(variant, plan, 1, tmp_path)
        Recipe(document)
        shipped = Recipe.find(f"nano/{variant.recipe}").document
        changed = {key for key, value in document.items() if shipped.get(key) != value}
        assert changed <= {"model", "init_from", "output", "data", "steps", "seed", "dtype", "save_every"}, variant.name
        assert sum(stream["batch_size"] for stream in document["data"].values()) == plan.batch_size
        assert {stream["mixture"]["seed"] for stream in document["data"].values()} == {1}
        assert document["steps"] * plan.batch_size == plan.conversations
        branches = document["model"]["vision"]["branches"]
        assert {entry["type"] for branch in branches for entry in branch["encoders"]} == set(variant.encoders)
        assert document["model"]["llm"]["embed_dim"] == plan.llm["embed_dim"]
    # every one of them can be built
    assert [variant.options["size"] for variant in make_variants() if "sub_images" in variant.claims] == [128, 128]
    for name in ("all", "only_blip2", "only_convnext", "sub_images"):
        (variant,) = (variant for variant in make_variants() if variant.name == name)
        assert build(run_module.model_document(variant, plan), device="meta").vision is not None
    # the documents themselves are not touched
    assert "options" not in Recipe.find("nano/finetune").document["data"]["tasks"]["mixture"]


def test_a_variant_starts_from_one_before_it() -> None:
    names = [variant.name for variant in make_variants()]
    assert len(set(names)) == len(names)
    for variant in make_variants():
        assert variant.after is None or names.index(variant.after) < names.index(variant.name)
    for claim in CLAIMS:
        own = {variant.name for variant in choose_variants(claim.name)}
        assert {claim.favoured, *claim.others} <= own
        assert {variant.after for variant in choose_variants(claim.name)} - {None} <= own
    assert sorted(claim.name for claim in CLAIMS) == sorted(CLAIM_NAMES)


def test_one_instruction_for_all_tasks() -> None:
    wordings = SHARED["wordings"]
    assert set(wordings) == set(tasks.names())
    assert wordings["rec"] == "Answer: {phrase}"
    assert wordings["vqa"] == "Answer: {question}"
    assert wordings["layout"] == wordings["text_detection"] == wordings["chart"] == "Answer:"


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


# -- verdicts ---------------------------------------------------------------------------------------------------------

CLAIM = Claim("tasks", "It helps.", "all", ("shared", "one_view"), "answers.loss", ("answers.loss",))


def results(**scores: list[float]) -> list[dict[str, Any]]:
    return [
        {
            **{"variant": variant, "seed": seed, "scores": {"answers.loss": value}, "parameters": 1, "versions": {}},
            **{"plan": {"conversations": 4, "batch_size": 2, "num_scenes": 3, "llm": {}}},
            "seconds": {"training": 30.0, "measuring": 30.0},
        }
        for variant, values in scores.items()
        for seed, value in enumerate(values)
    ]


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


# -- the command ------------------------------------------------------------------------------------------------------


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
