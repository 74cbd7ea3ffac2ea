"""Images given in every form, drafts with images, and nothing that stays behind."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sphinxkit.errors import ShapeError
from sphinxkit.sphinx_model import SphinxModel

# Passes over the views one by one or together: sums in another order, of scale 1
SAME_ATOL = 2e-5
# What the allocator of a busy process may keep; a leak of one cache per generation is 15 MB in all
RSS_SLACK = 8 * 2**20


def test_images_in_every_form(model: SphinxModel, golden: Path, images) -> None:
    path = golden / "images" / "wide.png"
    pixels = model.preprocess(path)
    tokens = model.encode_images(pixels).detach()
    with path.open("rb") as file:
        forms = [path, str(path), images[0], pixels[0], tokens[0], pixels, path.read_bytes(), file]
        forms.append(np.asarray(images[0].convert("RGB")))
        answers = [model.generate("What is it?", form, max_new_tokens=8)[0] for form in forms]
    assert all(answer == answers[0] for answer in answers)
    for several in (pixels.expand(2, -1, -1, -1), tokens.expand(2, -1, -1), [pixels[0], tokens[0]]):
        assert model.generate(["What is it?"] * 2, several, max_new_tokens=8) == answers[:2]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 4, 4), r"expected pixels \(3, 224, 224\) of floats .* got \(3, 4, 4\) of float32"),
        (torch.zeros(3, 512, 512, dtype=torch.uint8), r"got \(3, 512, 512\) of uint8"),
        (torch.zeros(5, 7), r"image tokens: expected \(N_img, 64\), got \(5, 7\)"),
    ],
)
def test_tensors_that_are_no_images(model: SphinxModel, image: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        model.generate("What?", [image])


def test_the_same_image_is_encoded_once(model: SphinxModel, golden: Path, images, calls) -> None:
    path = golden / "images" / "wide.png"
    prompts = ["What is it?", "Where is it?", "Why?", "Who?", "And?"]
    pictures = [path, str(path), images[1], None, images[1]]
    together = model.generate(prompts, pictures, max_new_tokens=6)
    assert calls.num_views == 2
    alone = [model.generate(p, i, max_new_tokens=6)[0] for p, i in zip(prompts, pictures, strict=True)]
    assert together == alone


def test_many_images_are_encoded_a_few_at_a_time(model: SphinxModel, images, monkeypatch: pytest.MonkeyPatch) -> None:
    from sphinxkit.sphinx_model import images as images_module

    several = [images[index % 3].rotate(index) for index in range(5)]
    expected = model.generate(["What?"] * 5, several, max_new_tokens=5)
    seen: list[int] = []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels, max_views: (seen.append(len(pixels)), encode(pixels))[1])
    monkeypatch.setattr(images_module, "MAX_VIEWS", 2)
    assert model.generate(["What?"] * 5, several, max_new_tokens=5) == expected
    assert seen == [2, 2, 1]


def test_views_are_encoded_in_chunks(model: SphinxModel, images, calls) -> None:
    pixels = model.preprocess(images)
    expected = model.encode_images(pixels)
    for max_views in (1, 2, 3, 100):
        torch.testing.assert_close(model.encode_images(pixels, max_views), expected, atol=SAME_ATOL, rtol=0)
    with pytest.raises(ShapeError, match="max_views must be at least 1, or None; got 0"):
        model.encode_images(pixels, 0)


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 8])
def test_drafts_change_nothing(model: SphinxModel, images, num_draft_tokens: int) -> None:
    prompts = ["What is in the image? It is red, it is red, it is", "Where?", "Is the square red or blue? It is", "a b"]
    pictures = [images[0], None, images[1], images[2]]
    plain = model.generate(prompts, pictures, max_new_tokens=24)
    drafted = model.generate(prompts, pictures, max_new_tokens=24, num_draft_tokens=num_draft_tokens)
    assert drafted == plain
    assert sum(answer.num_drafted for answer in drafted) > 0
    assert "".join(model.stream(prompts[0], images[0], 24, num_draft_tokens=num_draft_tokens)) == plain[0].text


def _tensor_bytes() -> int:
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) not in (torch.Tensor, torch.nn.Parameter) or thing.layout != torch.strided:
            continue  # other tests' sparse, packed and fake tensors have no storage to look at
        if thing.device.type != "meta":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _generate(model: SphinxModel, images, times: int) -> None:
    for index in range(times):
        image = images[0] if index % 10 == 0 else None
        num_draft_tokens = 2 if index % 3 == 0 else None
        model.generate(["What?", "Where is it?"], [None, image], max_new_tokens=2, num_draft_tokens=num_draft_tokens)
        if index % 20 == 0:
            session = model.session()
            next(session.stream("Why?", max_new_tokens=3), None)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's accounts")
@pytest.mark.slow
def test_two_hundred_generations_leave_nothing_behind(model: SphinxModel, images) -> None:
    _generate(model, images, 20)
    tensors, resident = _tensor_bytes(), _resident_bytes()
    _generate(model, images, 200)
    assert _tensor_bytes() == tensors
    assert _resident_bytes() - resident < RSS_SLACK


@pytest.mark.gpu
def test_two_hundred_generations_leave_nothing_behind_on_a_gpu(golden: Path, images) -> None:
    import sphinxkit

    model = sphinxkit.load(golden / "llama_ens", device="cuda", dtype=torch.bfloat16)
    _generate(model, images, 20)
    gc.collect()
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    _generate(model, images, 200)
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() == reserved
