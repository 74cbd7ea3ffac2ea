from __future__ import annotations

from sphinxkit.checkpoint.keymap import KeyMap, NameRule

RULES = KeyMap(
    (
        NameRule("layers.{}.wq.weight", "llm.blocks.{}.q_proj.weight", split_dim=0),
        NameRule("layers.{}.*", "llm.blocks.{}.rest.*"),
        NameRule("experts.{}.{}", "e.{}.of.{}"),
    ),
    unused=(r"old\..*",),
    derived=("freqs",),
)


def test_both_directions_by_hand() -> None:
    for theirs, ours in [
        ("layers.12.wq.weight", "llm.blocks.12.q_proj.weight"),
        ("layers.3.norm.a.b", "llm.blocks.3.rest.norm.a.b"),
        ("experts.4.7", "e.4.of.7"),
    ]:
        found, back = RULES.to_ours(theirs), RULES.to_theirs(ours)
        assert found is not None
        assert back is not None
        assert (found[0], back[0]) == (ours, theirs)
        assert found[1] is back[1]


def test_the_first_rule_that_fits_decides() -> None:
    found = RULES.to_ours("layers.0.wq.weight")
    assert found is not None
    assert found[1].split_dim == 0


def test_names_that_fit_no_rule() -> None:
    for name in (
        "layers.x.wq.weight",
        "layers.1.",
        "blayers.1.wq.weight",
        "layersX1Xwq.weight",
        "experts.1",
        "layers.².",
    ):
        assert RULES.to_ours(name) is None, name
    assert RULES.to_ours(f"layers.{'9' * 5000}.wq.weight") is None
    assert RULES.to_theirs("llm.blocks.-1.q_proj.weight") is None


def test_groups() -> None:
    assert RULES.is_unused("old.a")
    assert not RULES.is_unused("older")
    assert RULES.is_derived("freqs")
    assert not RULES.is_derived("freqs.0")
