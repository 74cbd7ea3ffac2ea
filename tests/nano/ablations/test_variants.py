from __future__ import annotations

from pathlib import Path

from sphinxkit.formatters import tasks
from sphinxkit.nano.ablations import run as run_module
from sphinxkit.nano.ablations.report import CLAIMS
from sphinxkit.nano.ablations.run import AblationPlan
from sphinxkit.nano.ablations.variants import CLAIM_NAMES, SHARED, choose_variants, make_variants
from sphinxkit.recipe import Recipe, build


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
