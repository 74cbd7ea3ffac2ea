"""The command line as a user meets it, in a process of its own where that matters."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import sphinxkit
from sphinxkit.cli import app, main
from sphinxkit.cli.options import cpu_has_bf16, parse_dtype, pick_device, pick_dtype
from sphinxkit.errors import CheckpointError, DataError, RecipeError

COMMANDS = sorted(command.name for command in app.registered_commands if command.name)


def run(*arguments: str, stdin: str | None = None) -> str:
    result = CliRunner().invoke(app, arguments, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    text = run(command, "--help")
    assert "Example" in text
    assert f"sphinxkit {command} " in text.split("Example")[1]


def test_version() -> None:
    assert run("--version").strip() == f"sphinxkit {sphinxkit.__version__}"


@pytest.mark.slow
def test_generate_as_a_process(golden: Path) -> None:
    arguments = [
        str(golden / "llama_ens"),
        *("--image", str(golden / "images" / "wide.png")),
        *("--prompt", "What is in the image?"),
        *("--max-new-tokens", "5", "--dtype", "float32", "--device", "cpu", "--json"),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "sphinxkit.cli", "generate", *arguments], capture_output=True, text=True, check=True
    )
    answer = json.loads(result.stdout)
    model = sphinxkit.load(golden / "llama_ens")
    [expected] = model.generate(answer["prompt"], golden / "images" / "wide.png", max_new_tokens=5)
    assert answer["token_ids"] == expected.token_ids
    assert answer["text"] == expected.text.strip()
    assert "### Human: What is in the image?\n### Assistant:" in answer["prompt"]


def test_raw_prompts_and_dtype_said_aloud(golden: Path) -> None:
    arguments = ["generate", str(golden / "llama_ens"), "-p", "Why", "--raw", "--max-new-tokens", "2", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"], catch_exceptions=False)
    assert json.loads(result.stdout)["prompt"] == "Why"
    expected = "bfloat16" if cpu_has_bf16() else "float32"
    assert f"dtype: {expected}" in result.stderr


def test_errors_are_one_line_and_exit_code_1(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sphinxkit.cli", "inspect", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_wrong_usage_is_exit_code_2() -> None:
    assert CliRunner().invoke(app, ["generate"]).exit_code == 2


def test_main_turns_named_errors_into_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sphinxkit", "inspect", "no_such_recipe"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "error: no recipe 'no_such_recipe'" in capsys.readouterr().err


def test_check(tmp_path: Path) -> None:
    assert "sphinx_tiny: valid, kind model, 3,089,373,056 parameters, 259 image tokens" in run("check", "sphinx_tiny")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("kind: model\nllm: llama2_14b\n")
    result = CliRunner().invoke(app, ["check", "sphinx_micro", str(wrong), "--json"])
    assert result.exit_code == 1
    good, bad = json.loads(result.stdout)["recipes"]
    assert good["valid"]
    assert not bad["valid"]
    assert "did you mean 'llama2_13b'" in bad["error"]
    assert "error: " in CliRunner().invoke(app, ["check", str(wrong)]).stderr


@pytest.mark.slow
def test_check_recipes_of_every_kind() -> None:
    from sphinxkit.recipe import shipped_recipes

    text = run("check", *shipped_recipes())
    assert text.count(": valid, kind ") == len(shipped_recipes())
    assert "kind mix\n" in text


def test_inspect_a_recipe_and_a_checkpoint(golden: Path) -> None:
    fields = json.loads(run("inspect", "sphinx_1k_13b", "--json"))
    assert (fields["num_image_tokens"], fields["num_views"], fields["image_size"]) == (1455, 5, 448)
    manifest = json.loads((golden / "manifests" / "llama_ens5.json").read_text())
    visual = {name: shape for name, (shape, _) in manifest.items() if name.startswith("llma.clip.visual.")}
    del visual["llma.clip.visual.proj"]
    assert fields["parts"]["clip_vit_large_patch14"] == sum(math.prod(shape) for shape in visual.values())
    fields = json.loads(run("inspect", str(golden / "llama_ens5"), "--json", "--keys"))
    assert fields["format"] == "sphinx"
    assert fields["dtypes"] == {"float32": len(fields["tensors"])}
    assert "llma.clip.visual.proj" in fields["unused"]
    assert fields["tensors"]["llm.lm_head.weight"] == [512, 64]
    assert "active per token" in run("inspect", str(golden / "mixtral_sparse_ens5"))
    assert "of llm: experts" in run("memory", str(golden / "mixtral_sparse_ens5"), "--text-tokens", "20")
    text = run("inspect", str(golden / "llama_ens5"), "--keys")
    assert "1455 image tokens" in text
    assert "llm.lm_head.weight (512, 64)" in text


def test_memory() -> None:
    fields = json.loads(run("memory", "sphinx_micro", "--dtype", "bfloat16", "--text-tokens", "100", "--json"))
    sizes = fields["dtypes"]["bfloat16"]
    model = sphinxkit.build("sphinx_micro", device="meta")
    tags = 2 * model.llm.embed_dim  # start and end token, beside the parts
    assert sum(sizes["weights"].values()) == 2 * (sum(p.numel() for p in model.parameters()) - tags)
    assert sizes["kv_cache"] >= 2 * 2 * 2 * 16 * 2 * (100 + 1455)  # layers, k and v, heads, width, bytes, positions
    assert sizes["total"] == sum(sizes["weights"].values()) + sizes["kv_cache"] + sizes["activations"]
    text = run("memory", "sphinx_micro", "--dtype", "float32", "--gpu", "t4")
    assert "activations" in text
    assert "fits on t4, left" in text


def test_convert_there_and_back_is_bitwise(golden: Path, tmp_path: Path) -> None:
    import torch

    source = golden / "llama_ens5"
    run("convert", str(source), "-o", str(tmp_path / "ours"))
    run("convert", str(tmp_path / "ours"), "-o", str(tmp_path / "back"), "--to", "sphinx", "--shards", "2")
    for rank in range(2):
        name = f"consolidated.0{rank}-of-02.model.pth"
        before = torch.load(source / name, weights_only=True)["model"]
        after = torch.load(tmp_path / "back" / name, weights_only=True)["model"]
        assert set(before) == set(after)
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "back" / "meta.json").read_text()) == {"llama_type": "llama_ens5"}
    encoders = [json.loads((folder / "encoders.json").read_text()) for folder in (source, tmp_path / "back")]
    assert encoders[1]["clip"]["width"] == encoders[0]["clip"]["width"]
    again = sphinxkit.load(tmp_path / "back")
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(again(ids), sphinxkit.load(source)(ids))


def test_convert_the_language_model_to_hugging_face(golden: Path, tmp_path: Path) -> None:
    run("convert", str(golden / "llama_ens_light"), "-o", str(tmp_path / "hf"), "--to", "hf", "--part", "llm")
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[1, 5, 9, 300]])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)(ids).logits
    ours = sphinxkit.load(golden / "llama_ens_light")(ids)
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=0)  # rounding, logits of scale 8
    with pytest.raises(CheckpointError, match="unknown checkpoint format 'gguf'; known: hf, hf_sphinx, meta"):
        run("convert", str(golden / "llama_ens"), "-o", str(tmp_path / "x"), "--to", "gguf")


def test_verify(golden: Path) -> None:
    text = run("verify", str(golden / "llama_ens_light"), "--device", "cpu")
    assert text.count("ok  ") == 16
    assert "16 of 16 quantities agree" in text
    fields = json.loads(run("verify", str(golden / "llama_ens_light"), "--device", "cpu", "--json"))
    assert fields["failed"] == 0
    half = run("verify", str(golden / "llama_ens_light"), "--device", "cpu", "--dtype", "bfloat16")
    assert "5 of 5 quantities agree" in half  # pixels and logits
    assert "11 more are shown without a claim" in half


def test_verify_notices_a_changed_weight(golden: Path, tmp_path: Path) -> None:
    import shutil

    import torch

    shutil.copytree(golden / "llama_ens_light", tmp_path / "tiny")
    shutil.copytree(golden / "images", tmp_path / "images")
    for shard in (tmp_path / "tiny").glob("*.pth"):
        content = torch.load(shard, weights_only=True)
        content["model"]["llma.norm.weight"] *= 1.01
        torch.save(content, shard)
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "tiny"), "--device", "cpu"])
    assert result.exit_code == 1
    assert "FAIL logits of text" in result.stdout


def test_chat(golden: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    lines = [
        "What is it?",
        f"/image {tmp_path / 'red.png'}",
        "And this?",
        "/image nowhere.png",
        "Well?",
        "/reset",
        "/?",
    ]
    result = CliRunner().invoke(
        app,
        ["chat", str(golden / "llama_ens"), "--max-new-tokens", "3", "--dtype", "float32", "--device", "cpu"],
        input="\n".join(lines) + "\n/exit\n",
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    model = sphinxkit.load(golden / "llama_ens")
    first = model.chat([{"role": "user", "content": "What is it?"}], max_new_tokens=3)
    assert result.stdout.startswith(first)
    assert "nowhere.png" in result.stderr


def test_options() -> None:
    with pytest.raises(DataError, match="--dtype 'auto': expected one of float32, bfloat16, float16"):
        parse_dtype("auto")
    with pytest.raises(DataError, match="--dtype 'fp32': expected one of auto, float32, bfloat16, float16"):
        pick_dtype("fp32", pick_device("cpu"))
    with pytest.raises(DataError, match="--device 'gpu'"):
        pick_device("gpu")
    assert pick_device("cpu").type == "cpu"


def test_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(DataError, match="this machine has no CUDA device"):
        pick_device("cuda")


def test_recipe_override(golden: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("kind: model\nllm: tinyllama_1b\n")
    with pytest.raises(
        CheckpointError, match="'llm.embed_tokens.weight' .* is .512, 64. in the checkpoint, .32000, 2048. in"
    ):
        run("generate", str(golden / "llama_ens"), "-p", "x", "--recipe", str(other), "--device", "cpu")
    with pytest.raises(RecipeError, match="no recipe 'nothing'"):
        run("generate", str(golden / "llama_ens"), "-p", "x", "--recipe", "nothing", "--device", "cpu")
