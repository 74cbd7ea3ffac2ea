from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from sphinxkit.errors import DataError
from sphinxkit.formatters import tasks
from sphinxkit.formatters.segmentation import (
    SamSegmenter,
    SegmentationPrompt,
    Segmenter,
    check_prompts,
    prompts_from_items,
)
from sphinxkit.formatters.tasks import GroundedPhrase, Keypoints
from sphinxkit.geometry import Box, ImageGeometry, Point

GOLDEN = Path(__file__).parents[1] / "golden"
SIZE = 64
# Bilinear resizing in uint8 (PIL, ours) and float (torchvision, theirs): half a level each way, over the smallest std.
PIXEL_TOLERANCE = 1.5 / 255 / 0.224
# Share of pixels whose mask may differ because of that, at the edges of the masks: 2e-4 seen.
MASK_TOLERANCE = 0.005


@pytest.fixture(scope="module")
def sam() -> torch.nn.Module:
    """A small SAM with random weights."""
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            **{"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"image_size": SIZE, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 64},
            **{"num_pos_feats": 8, "initializer_range": 0.02},
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": SIZE, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            **{"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
        },
    )
    model = SamModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the norms stay as they are
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def wide() -> Image.Image:
    return Image.open(GOLDEN / "images" / "wide.png").convert("RGB")


def test_prompts_come_from_answers() -> None:
    geometry = ImageGeometry(100, 100)
    text = "<p>A dog</p>[0.1,0.2,0.3,0.4;0.5,0.5,0.6,0.6] and <p>a cat</p>[0.0,0.0,1.0,1.0]."
    items = tasks.create("grounded_caption").parse(text, geometry).items
    prompts = prompts_from_items(items)
    assert [prompt.label for prompt in prompts] == ["A dog", "A dog", "a cat"]
    assert prompts[2] == SegmentationPrompt("a cat", Box(0.0, 0.0, 100.0, 100.0))
    points = {"nose": Point(1.0, 2.0), "left_eye": Point(3.0, 4.0)}
    mixed = prompts_from_items([Box(0, 0, 1, 1), Point(5.0, 6.0), "words", Keypoints(points), GroundedPhrase("x", ())])
    assert mixed == [
        SegmentationPrompt(box=Box(0, 0, 1, 1)),
        SegmentationPrompt(points=(Point(5.0, 6.0),)),
        SegmentationPrompt("person", points=(Point(1.0, 2.0), Point(3.0, 4.0))),
    ]
    check_prompts(prompts + mixed, geometry)


def test_bad_prompts() -> None:
    geometry = ImageGeometry(10, 20)
    with pytest.raises(DataError, match=r"prompt 1 \('x'\) has neither box nor points"):
        check_prompts([SegmentationPrompt(points=(Point(1, 1),)), SegmentationPrompt("x")], geometry)
    for prompt in (SegmentationPrompt(box=Box(0, 0, 11, 1)), SegmentationPrompt(points=(Point(0, 21),))):
        with pytest.raises(DataError, match="prompt 0 reaches out of the 10x20 image"):
            check_prompts([prompt], geometry)


def test_a_segmenter_is_anything_with_segment(wide: Image.Image) -> None:
    class Boxes:
        def segment(self, image: Image.Image, prompts: Sequence[SegmentationPrompt]) -> torch.Tensor:
            return torch.zeros(len(prompts), image.height, image.width, dtype=torch.bool)

    segmenter: Segmenter = Boxes()
    assert segmenter.segment(wide, [SegmentationPrompt()]).shape == (1, 427, 640)


PROMPTS = [
    SegmentationPrompt("a", box=Box(100.0, 50.0, 300.0, 400.0)),
    SegmentationPrompt("b", points=(Point(320.0, 200.0), Point(10.0, 420.0))),
    SegmentationPrompt("c", Box(0.0, 0.0, 640.0, 427.0), (Point(100.0, 100.0),)),
]


def test_sam_equals_its_own_processor(sam: torch.nn.Module, wide: Image.Image) -> None:
    from transformers import SamImageProcessor, SamProcessor

    processor = SamProcessor(
        SamImageProcessor(
            size={"longest_edge": SIZE},
            pad_size={"height": SIZE, "width": SIZE},
            mask_size={"longest_edge": SIZE // 2},
            mask_pad_size={"height": SIZE // 2, "width": SIZE // 2},
        )
    )
    segmenter = SamSegmenter(sam)
    masks = segmenter.segment(wide, PROMPTS)
    assert masks.shape == (3, 427, 640)
    assert masks.dtype == torch.bool
    for mask, prompt in zip(masks, PROMPTS, strict=True):
        boxes = prompt.box and [[[prompt.box.x1, prompt.box.y1, prompt.box.x2, prompt.box.y2]]]
        points = [[[[point.x, point.y] for point in prompt.points]]] if prompt.points else None
        inputs = processor(wide, input_boxes=boxes, input_points=points, return_tensors="pt")
        pixels, _ = segmenter._pixels(wide)
        assert (pixels - inputs["pixel_values"]).abs().max() <= PIXEL_TOLERANCE
        with torch.no_grad():
            output = sam(
                **{key: inputs[key] for key in inputs if key not in ("original_sizes", "reshaped_input_sizes")}
            )
        theirs = processor.image_processor.post_process_masks(
            output.pred_masks,
            inputs["original_sizes"],
            inputs["reshaped_input_sizes"],
            pad_size={"height": SIZE, "width": SIZE},
        )[0][0, int(output.iou_scores[0, 0].argmax())]
        assert 0.02 < mask.float().mean() < 0.98  # a mask of all or nothing would prove little
        assert (mask != theirs).float().mean() < MASK_TOLERANCE


def test_each_prompt_has_its_own_mask(sam: torch.nn.Module, wide: Image.Image) -> None:
    segmenter = SamSegmenter(sam)
    together = segmenter.segment(wide, PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        assert torch.equal(segmenter.segment(wide, [prompt])[0], together[index])
    assert segmenter.segment(wide, []).shape == (0, 427, 640)
    assert segmenter.segment(Image.new("L", (1, 50)), [SegmentationPrompt(box=Box(0, 0, 1, 50))]).shape == (1, 50, 1)


def test_sam_from_a_folder(sam: torch.nn.Module, wide: Image.Image, tmp_path: Path) -> None:
    sam.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = SamSegmenter.from_pretrained(tmp_path)
    assert torch.equal(loaded.segment(wide, PROMPTS), SamSegmenter(sam).segment(wide, PROMPTS))


def test_bad_prompts_are_refused_before_any_work(sam: torch.nn.Module, wide: Image.Image) -> None:
    with pytest.raises(DataError, match="prompt 0 reaches out of the 640x427 image"):
        SamSegmenter(sam).segment(wide, [SegmentationPrompt(box=Box(0, 0, 641, 1))])


def test_other_models_are_refused() -> None:
    with pytest.raises(DataError, match="expected a transformers SamModel, got Linear"):
        SamSegmenter(torch.nn.Linear(1, 1))


def test_transformers_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"SAM needs transformers: pip install 'sphinxkit\[sam\]'"):
        SamSegmenter.from_pretrained("anything")


def test_importing_formatters_costs_no_torch_and_no_transformers() -> None:
    code = (
        "import sys; from sphinxkit.formatters import tasks; import sphinxkit.tokenizer; "
        "print([m for m in ('torch', 'transformers', 'sentencepiece', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
