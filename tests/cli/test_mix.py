from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.main import get_command
from typer.testing import CliRunner

import sphinxkit
from sphinxkit import checkpoint
from sphinxkit.cli import app
from sphinxkit.errors import CheckpointError, DataError, RecipeError, SphinxkitError
from sphinxkit.recipe import Recipe
from sphinxkit.tensor_source import MappingSource

_spec = importlib.util.spec_from_file_location("mixing_models", Path(__file__).parents[1] / "mixing_models.py")
assert _spec is not None
assert _spec.loader is not None
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

LOGITS = 1e-5  # the mix is the same bits either way; the bound is only that of running the model twice


COMMAND = get_command(app)  # made once: CliRunner would do so for every call


def run(*arguments: object) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = COMMAND.main([str(argument) for argument in arguments], "sphinxkit", standalone_mode=False)
    assert not code, output.getvalue()
    return output.getvalue()


def fails(*arguments: object, match: str, error: type[SphinxkitError] = CheckpointError) -> None:
    with pytest.raises(error, match=match):
        run(*arguments)


@pytest.fixture(scope="module")
def pair(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return golden / "llama_ens5", models.perturbed(golden / "llama_ens5", folder / "other", num_shards=4)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    return models.language_model(tmp_path / "a", 0), models.language_model(tmp_path / "b", 1)


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_released_pair_gives_the_logits_of_the_mix(pair: tuple[Path, Path], tmp_path: Path, golden: Path) -> None:
    a, b = pair
    run("mix", a, b, "-o", tmp_path / "out", "--beta", 0.3)
    first, second, mixed = (models.read_all(path) for path in (a, b, tmp_path / "out"))
    assert set(mixed) == set(first)
    for key, tensor in mixed.items():
        oracle = 0.3 * first[key].double() + 0.7 * second[key].double()
        torch.testing.assert_close(tensor.double(), oracle, atol=LOGITS, rtol=0)
    loaded, by_hand = sphinxkit.load(tmp_path / "out"), sphinxkit.load(a)
    by_hand.load_state_dict(
        {key: (0.3 * first[key].double() + 0.7 * second[key].double()).float() for key in by_hand.state_dict()}
    )
    tokens = torch.tensor([[1, 20, 30, 40]])
    pixels = loaded.preprocess([golden / "images" / "wide.png"])
    with torch.no_grad():
        logits, expected = loaded(tokens, pixels), by_hand(tokens, pixels)
        alone = sphinxkit.load(a)(tokens, pixels)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)  # tests of parity allow this on logits
    assert (logits - alone).abs().max() > 0.01


@pytest.mark.parametrize("beta", [0, 1])
def test_end_points_are_the_models(pair: tuple[Path, Path], tmp_path: Path, beta: int) -> None:
    out = tmp_path / "out"
    run("mix", *pair, "-o", out, "--beta", beta)
    chosen, mixed = models.read_all(pair[1 - beta]), models.read_all(out)
    assert list(mixed) == list(models.read_all(pair[0]))
    for key, tensor in mixed.items():
        assert torch.equal(tensor.view(torch.int32), chosen[key].view(torch.int32))
    assert (out / "tokenizer.model").read_bytes() == (pair[0] / "tokenizer.model").read_bytes()
    with checkpoint.open(pair[0]) as a, checkpoint.open(out) as o:
        assert (o.format, o.metadata["num_shards"], o.recipe) == (a.format, a.metadata["num_shards"], a.recipe)


def test_any_format_to_any_other(texts: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = texts
    tokens = ("--method", "slerp", "--beta", "0.5")
    with checkpoint.open(b) as opened:
        checkpoint.save(tmp_path / "hf", opened, format="hf")
        checkpoint.save(tmp_path / "meta", opened, format="meta", num_shards=2)
    run("mix", a, b, "-o", tmp_path / "expected", *tokens)
    expected = models.read_all(tmp_path / "expected")
    for source, to in (("hf", "meta"), ("meta", "hf"), ("hf", "sphinx"), ("meta", "sphinxkit")):
        out = tmp_path / f"{source}_{to}"
        shards = ["--shards", 2] if to in ("meta", "sphinx") else []
        run("mix", a, tmp_path / source, "-o", out, "--to", to, *shards, *tokens)
        with checkpoint.open(out) as opened:
            assert opened.format == to
        for key, tensor in models.read_all(out).items():
            assert torch.equal(tensor, expected[key])


def test_rules_and_provenance(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = json.loads(
        run(
            "mix",
            *pair,
            "-o",
            out,
            "--to",
            "sphinxkit",
            "--beta",
            0.5,
            "--rule",
            "llm.layers.{0..1}.*=0.3",
            "--rule",
            "vision.*=keep first",
            "--dtype",
            "bfloat16",
            "--json",
        )
    )
    assert summary["weights"] == [0.5, 0.5]
    a, b, mixed = (models.read_all(path) for path in (*pair, out))
    for key, share in (("llm.layers.1.mlp.up_proj.weight", 0.3), ("llm.layers.2.mlp.up_proj.weight", 0.5)):
        assert torch.equal(mixed[key], (share * a[key] + (1 - share) * b[key]).bfloat16())
    assert torch.equal(mixed["vision.start_token"], a["vision.start_token"].bfloat16())
    said = json.loads((out / "provenance.json").read_text())
    assert said["made_by"].startswith(f"sphinxkit {sphinxkit.__version__}")
    assert (said["beta"], said["method"], said["dtype"]) == (0.5, "linear", "bfloat16")
    assert said["rules"] == {"llm.layers.{0..1}.*": 0.3, "vision.*": "keep first"}
    assert [entry["path"] for entry in said["inputs"]] == [str(path) for path in pair]
    assert [len(entry["files"]) for entry in said["inputs"]] == [2, 4]
    assert said["inputs"][0]["content"]["tensors"] == len(a)
    assert said["inputs"][0]["content"]["sha256"] != said["inputs"][1]["content"]["sha256"]
    run("mix", out, out, "-o", tmp_path / "again", "--beta", 1)
    recorded = json.loads((tmp_path / "again" / "provenance.json").read_text())["inputs"][0]
    assert (recorded["content"], len(recorded["files"][0]["sha256"])) == (None, 64)
    run("mix", *pair, "-o", tmp_path / "bare", "--beta", 0.5, "--no-hash")
    assert json.loads((tmp_path / "bare" / "provenance.json").read_text())["inputs"][0]["content"] is None


def test_three_models_with_a_base_and_options(texts: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = texts
    c, base = (models.language_model(tmp_path / name, seed) for name, seed in (("c", 2), ("base", 3)))
    run("mix", a, b, c, "-o", tmp_path / "out", "--method", "ties", "--option", "density=.5", "--base", base)
    tensors = [models.read_all(path) for path in (base, a, b, c)]
    for key, tensor in models.read_all(tmp_path / "out").items():
        first, *others = (held[key] for held in tensors)
        assert torch.equal(tensor, sphinxkit.interpolation.ties(first, others, density=0.5))
    run("mix", a, b, c, "-o", tmp_path / "thirds", "--weights", "1,1,2", "--normalize")
    mixed = models.read_all(tmp_path / "thirds")["llm.norm.weight"]
    held = [one["llm.norm.weight"] for one in tensors[1:]]
    torch.testing.assert_close(mixed, 0.25 * held[0] + 0.25 * held[1] + 0.5 * held[2])


def test_recipe_file(texts: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text("kind: mix\nmodels: [a, b]\nbeta: 0.25\nrules:\n  llm.norm.weight: keep second\n")
    run("mix", "--recipe", recipe, "-o", tmp_path / "out")
    a, b, mixed = (models.read_all(path) for path in (*texts, tmp_path / "out"))
    key = "llm.lm_head.weight"
    assert torch.equal(mixed[key], 0.25 * a[key] + 0.75 * b[key])
    assert torch.equal(mixed["llm.norm.weight"], b["llm.norm.weight"])
    run("mix", "--recipe", recipe, "--weights", "1,0", "-o", tmp_path / "first", "--rule", "llm.norm.weight=keep first")
    assert all(torch.equal(tensor, a[name]) for name, tensor in models.read_all(tmp_path / "first").items())


def test_shipped_recipes_are_valid() -> None:
    names = ("mix_sphinx", "mix_layers", "mix_ties", "mix_llm_into_vlm")
    assert [Recipe.find(name).kind for name in names] == ["mix"] * 4
    assert run("check", *names).splitlines() == [f"{name}: valid, kind mix" for name in names]


def test_a_recipe_beside_its_base(texts: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "ties.yaml"
    recipe.write_text("kind: mix\nmodels: [one, two]\nbase: b\nmethod: {type: ties, density: 1.0}\n")
    assert run("check", recipe) == f"{recipe}: valid, kind mix\n"
    run("mix", texts[0], "--recipe", recipe, "-o", tmp_path / "out")  # models of the command line, base of the recipe
    first, mixed = (models.read_all(path) for path in (texts[0], tmp_path / "out"))
    assert all(torch.equal(mixed[key], first[key]) for key in first)
    recipe.write_text("kind: mix\nmodels: [a, b]\nmethod: {type: ties, densty: 0.5}\n")
    assert "did you mean 'density'" in CliRunner().invoke(app, ["check", str(recipe)]).stderr


def test_language_models_of_unlike_models(golden: Path, tmp_path: Path) -> None:
    """A multimodal model and a text-only one: the language models alone, or with the tower that one of them has."""
    whole, text, key = golden / "llama_ens5", tmp_path / "text", "llm.layers.1.mlp.up_proj.weight"
    with checkpoint.open(whole) as opened:
        noise = {
            key: opened.read(key) + torch.randn(opened.shape(key), generator=torch.Generator().manual_seed(3))
            for key in opened.keys()  # noqa: SIM118
            if key.startswith("llm.")
        }
        checkpoint.save(text, MappingSource(noise), format="hf", recipe=opened.recipe, part="llm")
    a, b = models.read_all(whole), models.read_all(text)
    fails(
        "mix", whole, text, "-o", tmp_path / "x", "--beta", 0.3, match=r"only in first: vision.start_token.*212 in all"
    )
    run("mix", text, whole, "-o", tmp_path / "alone", "--beta", 0.7, "--llm-only")
    alone = models.read_all(tmp_path / "alone")
    assert set(alone) == set(b)
    assert torch.equal(alone[key], 0.7 * b[key] + (1 - 0.7) * a[key])
    assert json.loads((tmp_path / "alone" / "provenance.json").read_text())["llm_only"] is True
    tower = ("--rule", "vision.*=keep second", "--rule", "llma.*=keep second", "--beta", 0.7)
    alone_only = "holds a language model alone.*--llm-only"
    fails("mix", text, whole, "-o", tmp_path / "x", "--to", "meta", *tower, match=alone_only)
    run("mix", text, whole, "-o", tmp_path / "both", "--to", "sphinx", *tower)
    both = models.read_all(tmp_path / "both")
    assert set(both) == set(a)
    assert all(torch.equal(both[name], a[name]) for name in a if not name.startswith("llm."))
    assert torch.equal(both[key], alone[key])
    with checkpoint.open(tmp_path / "both") as mixed, checkpoint.open(whole) as opened:
        assert mixed.recipe == opened.recipe
    assert listing(tmp_path) == ["alone", "both", "text"]


def test_format_and_shards_of_the_first(pair: tuple[Path, Path], tmp_path: Path) -> None:
    run("mix", pair[1], pair[0], "-o", tmp_path / "out", "--to", "sphinx", "--beta", 1, "--llm-only")
    assert len(list((tmp_path / "out").glob("*.pth"))) == 4


def test_vocabulary_rows(texts: tuple[Path, Path], tmp_path: Path) -> None:
    longer = models.language_model(tmp_path / "longer", 5, vocab=43)
    fails("mix", texts[0], longer, "-o", tmp_path / "out", "--beta", 0.5, match="rows 40 to 42 exist only in second")
    rules = ("--rule", "llm.embed_tokens.weight=overlap second", "--rule", "llm.lm_head.weight=overlap second")
    run("mix", texts[0], longer, "-o", tmp_path / "out", "--beta", 0.5, *rules)
    with checkpoint.open(tmp_path / "out") as opened:
        assert opened.shape("llm.embed_tokens.weight") == (43, 16)
        assert opened.recipe["llm"]["vocab_size"] == 43


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_bad_input_leaves_nothing(texts: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = texts
    out = ("-o", tmp_path / "out")
    deeper = models.language_model(tmp_path / "deeper", 2, layers=3)

    def spoil(key: str, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, math.nan) if key == "llm.norm.weight" else tensor

    nan = models.changed(a, tmp_path / "nan", spoil)
    before = listing(tmp_path)
    fails("mix", a, deeper, *out, "--beta", 0.5, match=r"(?s)only in second: llm.layers.2.*llm.num_layers: 2 against 3")
    nested = tmp_path / "new" / "deep"
    fails("mix", nan, b, "-o", nested, "--beta", 0.5, match="llm.norm.weight in first: 16 NaN, 0 Inf")
    fails("mix", a, b, *out, "--beta", 1.5, match=r"beta 1.5 lies outside \[0, 1\]", error=DataError)
    fails("mix", a, b, *out, match="linear needs a beta", error=DataError)
    fails("mix", a, b, "--beta", 0.5, match="say where the mix should go", error=DataError)
    fails("mix", *out, match="name the models to mix", error=RecipeError)
    fails("mix", a, b, *out, "--method", "ties", match="adds differences to a base model", error=DataError)
    fails("mix", a, tmp_path / "nowhere", *out, "--beta", 0.5, match="no such folder")
    fails("mix", a, b, "-o", a, "--beta", 0.5, "--overwrite", match="is one of the models to mix")
    fails("mix", a, b, *out, "--beta", 0.5, "--to", "gguf", match="unknown checkpoint format 'gguf'")
    fails("mix", a, b, *out, "--weights", "a,b", match="expected numbers", error=DataError)
    fails("mix", a, b, *out, "--option", "x=1", match="name it with --method", error=DataError)
    fails("mix", a, b, *out, "--method", "ties", "--option", "density", match="expected NAME=NUMBER", error=DataError)
    fails("mix", a, b, *out, "--method", "ties", "--option", "=1", match="expected NAME=NUMBER", error=DataError)
    fails("mix", a, b, *out, "--beta", 0.5, "--score", "x", match="--score needs one of them", error=DataError)
    fails("mix", a, b, *out, "--sweep", "0:1:1", match="need --score", error=DataError)
    fails("mix", "--recipe", "sphinx_micro", *out, match="expected kind mix, got kind model", error=RecipeError)
    fails("mix", a, b, *out, "--beta", 0.5, "--tokenizer", tmp_path / "none.model", match="no such file")
    assert listing(tmp_path) == before
    run("mix", nan, b, *out, "--beta", 0.5, "--allow-nonfinite")
    run("mix", a, b, "-o", tmp_path / "beyond", "--beta", 1.5, "--extrapolate")
    first, second, mixed = (models.read_all(path)["llm.norm.weight"] for path in (a, b, tmp_path / "beyond"))
    torch.testing.assert_close(mixed, 1.5 * first - 0.5 * second)


def test_structure_that_shapes_do_not_show(texts: tuple[Path, Path], tmp_path: Path) -> None:
    other = models.language_model(tmp_path / "theta", 4, rope_theta=5000.0)
    out = ("-o", tmp_path / "out", "--beta", 0.5)
    fails("mix", texts[0], other, *out, match=r"llm.rope_theta: 10000.0 against 5000.0")
    run("mix", texts[0], other, *out, "--allow-different-recipes")


def test_tokenizers_must_agree(pair: tuple[Path, Path], tmp_path: Path, golden: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    same_pieces = (other / "tokenizer.model").read_bytes() + b"\x1a\x00"  # with an empty normalizer field
    (other / "tokenizer.model").write_bytes(same_pieces)
    out = ("-o", tmp_path / "out", "--beta", 0.5)
    fails("mix", pair[0], other, *out, match="the tokenizers differ")
    run("mix", pair[0], other, *out, "--tokenizer", golden / "llama_ens5" / "tokenizer.model")


def test_the_unused_group_must_agree(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    with checkpoint.open(pair[1]) as opened:
        checkpoint.save(bare, opened, tokenizer=opened.tokenizer_path)
    fails("mix", pair[0], bare, "-o", tmp_path / "out", "--beta", 0.5, match="only in first: llma.clip")
    run("mix", pair[0], bare, "-o", tmp_path / "out", "--beta", 0.5, "--rule", "llma.*=keep first")
    with checkpoint.open(pair[0]) as a, checkpoint.open(tmp_path / "out") as out:
        assert list(out.unused.keys()) == list(a.unused.keys())


def test_missing_shard(pair: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pair[1], broken)
    (broken / "consolidated.02-of-04.model.pth").unlink()
    fails("mix", pair[0], broken, "-o", tmp_path / "out", "--beta", 0.5, match="consolidated.02-of-04.model.pth")
    assert listing(tmp_path) == ["broken"]


def test_full_disk(texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sphinxkit.tensor_files import safetensors

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.HashingFile, "write", full)
    before = listing(tmp_path)
    fails("mix", *texts, "-o", tmp_path / "out", "--beta", 0.5, match="the disk is full")
    assert listing(tmp_path) == before


KILL = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from sphinxkit import checkpoint, interpolation

folder = Path(sys.argv[1])
torch.set_num_threads(1)
ends = {}
for name in ("a", "b"):
    with checkpoint.open(folder / name) as opened:
        ends[name] = {key: opened.read(key).clone() for key in opened.keys()}

def mix(beta):
    with checkpoint.open(folder / "a") as a, checkpoint.open(folder / "b") as b:
        source = interpolation.MixedSource([a, b], interpolation.create("linear"), (beta, 1 - beta))
        checkpoint.save(folder / "out", source, overwrite=True)

def state():
    with checkpoint.open(folder / "out", verify=True) as opened:
        return [n for n, end in ends.items() if all(torch.equal(opened.read(k), end[k]) for k in end)]

begin = time.perf_counter()
mix(0)
whole = time.perf_counter() - begin
random.seed(0)
seen = []
for attempt in range(10):
    new = attempt % 2
    child = os.fork()
    if not child:
        mix(new)
        os._exit(0)
    time.sleep(random.uniform(0, 1.2 * whole))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = state()
    assert len(found) == 1, found
    seen += found
mix(1)
assert state() == ["a"]
print(*seen, len([path for path in folder.iterdir() if "tmp" in path.name]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        models.language_model(tmp_path / name, seed, layers=2, vocab=1000, dim=128)
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *seen, leftovers = done.stdout.split()
    assert len(seen) == 10
    assert set(seen) <= {"a", "b"}
    assert leftovers == "0"


# ---- sweeps and soups ------------------------------------------------------------------------------------------------

SCORE = """
def closeness(model):
    '''Highest when the mean of a tensor is that of beta 0.5.'''
    return -abs(float(model.llm.norm.weight.detach().mean()) - TARGET)
"""


def sweep_score(texts: tuple[Path, Path], folder: Path, beta: float) -> Path:
    a, b = (models.read_all(path)["llm.norm.weight"].mean().item() for path in texts)
    file = folder / "my_score.py"
    file.write_text(SCORE.replace("TARGET", repr(beta * a + (1 - beta) * b)))
    return file


def test_sweep_in_memory(texts: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = sweep_score(texts, tmp_path, 0.5)
    picture = tmp_path / "curve.png"
    arguments = ["mix", *texts, "--sweep", "0:1:0.25", "--score", f"python:{file}:closeness", "--plot", picture]
    told = json.loads(run(*arguments, "-o", tmp_path / "best", "--json"))
    assert [point["beta"] for point in told["points"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert told["best"]["beta"] == 0.5
    fails(*arguments, "-o", tmp_path / "best", match="best: exists already; pass --overwrite")  # before any scoring
    assert picture.read_bytes().startswith(b"\x89PNG")
    a, b, best = (models.read_all(path)["llm.norm.weight"] for path in (*texts, tmp_path / "best"))
    assert torch.equal(best, 0.5 * a + 0.5 * b)
    said = json.loads((tmp_path / "best" / "provenance.json").read_text())
    assert said["sweep"]["best"] == told["best"]
    assert [len(entry["files"][0]["sha256"]) for entry in said["inputs"]] == [64, 64]
    table = run(*arguments, "--minimize")
    assert "a alone" in table.replace("\n", " ")
    assert "best" in table


def test_sweep_by_command(texts: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = tmp_path / "score.py"
    script.write_text(
        "import json, sys\nsaid = json.load(open(sys.argv[1] + '/provenance.json'))\n"
        "print('scoring')\nprint(json.dumps({'score': said['beta'] * (1 - said['beta'])}))\n"
    )
    told = json.loads(
        run(
            "mix",
            *texts,
            "--sweep",
            "0:1:0.5",
            "--score",
            f"{sys.executable} {script} {{model}}",
            "--json",
            "--plot",
            tmp_path / "s.png",
        )
    )
    assert [point["score"] for point in told["points"]] == [0.0, 0.25, 0.0]


def test_greedy_soup(texts: tuple[Path, Path], tmp_path: Path) -> None:
    third = models.language_model(tmp_path / "c", 7)
    file = sweep_score(texts, tmp_path, 0.5)
    score = ("--method", "greedy_soup", "--score", f"python:{file}:closeness")
    told = json.loads(run("mix", *texts, third, "-o", tmp_path / "out", *score, "--json"))
    members = [Path(path).name for path in told["soup"]["members"]]
    held = {path.name: models.read_all(path)["llm.norm.weight"] for path in (*texts, third)}
    mixed = models.read_all(tmp_path / "out")["llm.norm.weight"]
    torch.testing.assert_close(mixed, torch.stack([held[name] for name in members]).mean(0))
    fails("mix", *texts, third, "-o", tmp_path / "out", *score, match="out: exists already; pass --overwrite")
    assert told["soup"]["score"] >= max(-abs(t.mean().item()) for t in held.values()) - 1


def test_bad_sweeps(texts: tuple[Path, Path], tmp_path: Path) -> None:
    sweep = ("mix", *texts, "--sweep", "0:1:0.5", "--score")
    fails(*sweep, "echo 1", match="must contain {model}", error=DataError)
    fails("mix", *texts, "--sweep", "0:1.5:0.5", "--score", "x {model}", match="beta 1.5 lies outside", error=DataError)
    fails(
        "mix", *texts, texts[0], "--sweep", "0:1:1", "--score", "x {model}", match="between two models", error=DataError
    )


def test_a_sweep_updates_the_model_that_fits(golden: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    whole, text = golden / "llama_ens5", tmp_path / "text"
    with checkpoint.open(whole) as opened:
        checkpoint.save(text, opened, part="llm", tokenizer=opened.tokenizer_path)
    file = tmp_path / "my_score.py"
    file.write_text("def has_tower(model): return 1.0 if model.vision else 0.0\ndef word(model): return 'good'\n")
    sweep = ("--sweep", "0:1:1", "--plot", tmp_path / "s.png", "--json", "--score", f"python:{file}:has_tower")
    tower = ("--rule", "vision.*=keep second", "--rule", "llma.*=drop")
    told = json.loads(run("mix", text, whole, *sweep, *tower, "-o", tmp_path / "best"))
    assert [point["score"] for point in told["points"]] == [1.0, 1.0]
    hashes = [e["content"] for e in json.loads((tmp_path / "best" / "provenance.json").read_text())["inputs"]]
    assert hashes[0] is None  # its files' sums are recorded by its own index, and beta is 0
    assert len(hashes[1]["sha256"]) == 64
    assert [p["score"] for p in json.loads(run("mix", text, whole, *sweep, "--llm-only"))["points"]] == [0.0, 0.0]
    part = ("--rule", "vision.start*=keep second", "--rule", "vision.*=drop", "--rule", "llma.*=drop")
    fails("mix", text, whole, *sweep, *part, match="no model holds the tensors of the mix")
    score = ("--sweep", "0:1:1", "--score", f"python:{file}:word", "--llm-only")
    fails("mix", text, whole, *score, match="must return a number, got 'good'", error=DataError)
