"""Mixers: channel and sequence mixing of the views of one SPHINX-1k image; moving bytes, nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, Context, Work, nbytes

QUICK = True


def cases(context: Context) -> Iterator[Case]:
    from sphinxkit.features import VisionFeatures
    from sphinxkit.mixers import ChannelMixer, SequenceMixer

    views = context.on(80, 5, 2)
    side = context.pick(16, 4)
    # CLIP-L, ConvNeXt-XXL (native 8x8 at 256 pixels) and DINOv2-g
    widths, sides = context.pick((1024, 3072, 1536), (6, 4, 2)), (side, side // 2, side)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        size = views * sum(w * (1 + s * s) for w, s in zip(widths, sides, strict=True)) * dtype.itemsize
        inputs = []
        for _ in range(context.num_input_sets(size)):
            features = [
                VisionFeatures(
                    context.randn(views, 1, w, dtype=dtype), context.randn(views, s * s, w, dtype=dtype), (s, s)
                )
                for w, s in zip(widths, sides, strict=True)
            ]
            inputs.append((features,))
        mixer = ChannelMixer(widths, grid=(side, side))
        yield Case(
            f"channel, {views} views of {'+'.join(map(str, widths))} on {side}x{side}, {name}",
            {"sphinxkit": lambda features: mixer(features).tokens(), "plain torch": _repeat_and_concatenate},  # noqa: B023
            Work(0, size, views * (1 + side * side) * sum(widths) * dtype.itemsize, dtype=dtype),
            inputs,
            amount=views,
            unit="views",
            tolerance=0,
        )
        width, queries, tokens = context.pick((5120, 32, 257), (8, 2, 17))
        pairs = [
            ([context.randn(views, count, width, dtype=dtype) for count in (queries, tokens)],)
            for _ in range(context.num_input_sets(views * (queries + tokens) * width * dtype.itemsize))
        ]
        yield Case(
            f"sequence, {views} views of {queries}+{tokens} tokens of {width}, {name}",
            {"sphinxkit": SequenceMixer(), "torch.cat": lambda branches: torch.cat(branches, dim=1)},
            Work(0, nbytes(*pairs[0]), nbytes(*pairs[0]), dtype=dtype),
            pairs,
            amount=views,
            unit="views",
            tolerance=0,
        )


def _repeat_and_concatenate(features: list) -> Tensor:
    """The public code's way: sequences with their prefix, the coarse map repeated by index, one concatenation."""
    fine = features[0].grid[0]
    sequences = []
    for feature in features:
        coarse = feature.grid[0]
        patches = feature.patches
        if coarse != fine:
            grid = patches.view(patches.shape[0], coarse, coarse, -1)
            grid = grid.repeat_interleave(fine // coarse, dim=1).repeat_interleave(fine // coarse, dim=2)
            patches = grid.flatten(1, 2)
        sequences.append(torch.cat([feature.prefix, patches], dim=1))
    return torch.cat(sequences, dim=-1)
