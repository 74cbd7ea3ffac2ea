"""Small files that unfold to gigabytes cost the command little more than a good file of their kind."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sphinxkit.recipe.recipe import shipped_recipes

MAX_BYTES = 200 * 10**6  # above the same command on a good file
MICRO = shipped_recipes()["sphinx_micro"]

Lines = tuple[list[object], list[object]]
"""A command on a good file and on a bomb."""


def measured(arguments: list[object], folder: Path) -> tuple[int, float, int, str]:
    """Exit code, seconds of processor time, peak bytes, and what was said."""
    with (folder / "said").open("w+") as said:
        command = [sys.executable, "-m", "sphinxkit", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        return process.returncode, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, said.read()


def recipes(folder: Path, change: Callable[[dict], object]) -> Lines:
    document = yaml.safe_load(MICRO.read_text()) | {"tokenizer": None}
    good, bad = folder / "good.yaml", folder / "bad.yaml"
    good.write_text(yaml.safe_dump(document))
    change(document)
    bad.write_text(yaml.safe_dump(document))
    return ["check", good], ["check", bad]


def aliases(folder: Path, golden: Path) -> Lines:
    good, _ = recipes(folder, lambda document: None)
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 10)}]" for n in range(9)]
    (folder / "bad.yaml").write_text("\n".join(lines) + "\n")
    return good, ["check", folder / "bad.yaml"]


def layers(folder: Path, golden: Path) -> Lines:
    return recipes(folder, lambda document: document["llm"].update(num_layers=100_000))


def encoder_layers(folder: Path, golden: Path) -> Lines:
    encoder = {"type": "clip_vit_large_patch14", "num_layers": 100_000}
    return recipes(folder, lambda document: document["vision"]["branches"][1]["encoders"].__setitem__(0, encoder))


def grid(folder: Path, golden: Path) -> Lines:
    mixer = {"type": "channel", "grid": [10**9, 10**9]}
    return recipes(folder, lambda document: document["vision"]["branches"][1].update(mixer=mixer))


def rows(folder: Path, golden: Path) -> Lines:
    return recipes(folder, lambda document: document["vision"]["tiler"].update(rows=10**5, cols=10**5))


def deflated(folder: Path, golden: Path) -> Lines:
    good, bad = golden / "llama_ens_light", folder / "model"
    shutil.copytree(good, bad)
    with zipfile.ZipFile(bad / "consolidated.00-of-02.model.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * (1200 * 10**6) + b".")
    return ["inspect", good], ["inspect", bad]


def references(folder: Path, golden: Path) -> Lines:
    lines = []
    for name, content in (("good", pickle.dumps([], protocol=2)), ("bad", b"\x80\x02]r\xff\xff\xff\x1f.")):
        (folder / name).mkdir()
        (folder / name / "refs(unc).p").write_bytes(content)
        (folder / name / "instances.json").write_text('{"images": [], "annotations": [], "categories": []}')
        lines.append(["convert-data", folder / name, "--format", "refcoco", "-o", folder / f"{name}.jsonl"])
    return lines[0], lines[1]


def asked(folder: Path, image: Path) -> Lines:
    Image.new("RGB", (64, 64), "red").save(folder / "good.png")
    ask = ["generate", "nano", "--prompt", "How many?", "--max-new-tokens", 1, "--dtype", "float32", "--device", "cpu"]
    return [*ask, "-i", folder / "good.png"], [*ask, "-i", image]


def device(folder: Path, golden: Path) -> Lines:
    return asked(folder, Path("/dev/zero"))


def pipe(folder: Path, golden: Path) -> Lines:
    os.mkfifo(folder / "pipe.png")
    return asked(folder, folder / "pipe.png")


def picture(folder: Path, golden: Path) -> Lines:
    side = 30_000

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes((side // 8 + 1) * side), 9)) + chunk(b"IEND", b"")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data)
    return asked(folder, folder / "bad.png")


BOMBS = (aliases, layers, encoder_layers, grid, rows, deflated, references, device, pipe, picture)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_little_more_than_a_good_file(
    bomb: Callable[[Path, Path], Lines], tmp_path: Path, golden: Path
) -> None:
    good, bad = bomb(tmp_path, golden)
    usual = measured(good, tmp_path)
    assert usual[0] == (1 if bomb is references else 0) or "0 conversations" in usual[3], usual[3]
    code, seconds, peak, said = measured(bad, tmp_path)
    more = f"{seconds - usual[1]:+.2f} s | {(peak - usual[2]) / 1e6:+.0f} MB"
    sys.stdout.write(f"\n| {bomb.__name__} | {more} | {said.strip()[-110:]!r} |\n")
    assert code == 1, said
    assert "Traceback" not in said
    assert "error: " in said
    assert peak - usual[2] < MAX_BYTES
