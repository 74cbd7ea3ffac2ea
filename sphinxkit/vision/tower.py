"""From pixels to the visual tokens that the language model reads: views, encoders, mixers, projectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from sphinxkit.errors import ShapeError
from sphinxkit.features import VisionFeatures
from sphinxkit.pixels import check_pixels

if TYPE_CHECKING:
    from sphinxkit.encoders import Encoder

MAX_VIEWS = 40  # what callers who want answers encode at once: eight images of five views; our choice
# Of the views that a CPU encodes at once where a bound is asked for. More needs memory beyond what malloc keeps, which
# the kernel maps and clears again for every layer: ConvNeXt-XXL in bfloat16 on five views of 512, one thread: all at
# once 40.6 s in the process and 4.9 s in the kernel (2.0 M page faults), two at a time 40.2 s and 1.4 s (0.7 M).
CPU_PIXELS = 2 * 512 * 512


class Tiler(Protocol):
    """What a tower asks of a tiler; ``sphinxkit.tilers.GridTiler`` is one."""

    @property
    def num_views(self) -> int:
        """Views of one image."""
        ...

    @property
    def is_tile(self) -> Sequence[bool]:
        """For each view whether it is a sub-image; a view of the whole image is none."""
        ...

    def tile(self, pixels: Tensor, tile_size: int | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, V, 3, T, T)."""
        ...


class VisionBranch(nn.Module):
    """Encoders whose features are mixed on one grid and projected to the language model's width.

    Args:
        encoders: Run on the same views, in order.
        projector: (..., sum of widths) -> (..., D).
        mixer: Joins the encoders' features; may be None for a single encoder.
        tile_sizes: Side in pixels of each encoder's views; None takes the tiler's own.
    Shape:
        views: one (B, V, 3, T_i, T_i) per encoder
        return: one (B, V_g, N_g, D) per group of views with the same number of tokens, in view order
    Raises:
        ShapeError: Several encoders without a mixer, or lists of different lengths.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        projector: nn.Module,
        mixer: nn.Module | None = None,
        tile_sizes: Sequence[int | None] | None = None,
    ) -> None:
        super().__init__()
        if mixer is None and len(encoders) != 1:
            raise ShapeError(f"vision branch: {len(encoders)} encoders need a mixer")
        self.tile_sizes = tuple(tile_sizes) if tile_sizes is not None else (None,) * len(encoders)
        if len(self.tile_sizes) != len(encoders):
            raise ShapeError(f"vision branch: {len(encoders)} encoders but {len(self.tile_sizes)} tile sizes")
        self.encoders: Sequence[Encoder] = nn.ModuleList(encoders)  # type: ignore[assignment]
        self.mixer = mixer
        self.projector = projector

    @property
    def is_pooled(self) -> bool:
        """Whether the mixer treats sub-images unlike the whole image."""
        return getattr(self.mixer, "tile_pool", 1) != 1

    def forward(
        self, views: Sequence[Tensor], groups: Sequence[tuple[slice, bool]], max_views: int | None = None
    ) -> list[Tensor]:
        """Tokens of each group of views; a group is (which views, whether they are sub-images)."""
        return self.mix([encode() for encode in self.encodings(views, max_views)], groups, *views[0].shape[:2])

    def encodings(self, views: Sequence[Tensor], max_views: int | None = None) -> list[Callable[[], VisionFeatures]]:
        """The work of each encoder, not begun; none needs another's."""
        return [
            partial(_encode, encoder, view.flatten(0, 1), max_views)
            for encoder, view in zip(self.encoders, views, strict=True)
        ]

    def mix(
        self,
        features: Sequence[VisionFeatures],
        groups: Sequence[tuple[slice, bool]],
        batch_size: int,
        num_views: int,
    ) -> list[Tensor]:
        """Tokens of each group of views out of one feature per encoder, of all views."""
        return [
            rearrange(
                self.project([_select(feature, batch_size, num_views, selected) for feature in features], is_tile),
                "(b v) n d -> b v n d",
                b=batch_size,
            )
            for selected, is_tile in groups
        ]

    def project(self, features: Sequence[VisionFeatures], is_tile: bool) -> Tensor:
        """Mix one feature per encoder and project: (B, N, D)."""
        mixed = features[0] if self.mixer is None else self.mixer(features, is_tile=is_tile)
        weight = next(self.projector.parameters(), None)
        tokens = mixed.tokens() if weight is None else mixed.tokens().to(weight.dtype)
        projected: Tensor = self.projector(tokens)
        return projected

    def num_tokens(self, is_tile: bool) -> int:
        """Tokens of one view, found by sending zeros through everything behind the encoders."""
        place = next(self.parameters(), torch.empty(0))

        def zeros(count: int, width: int) -> Tensor:
            return torch.zeros(1, count, width, device=place.device, dtype=place.dtype)

        features = [
            VisionFeatures(
                zeros(encoder.num_prefix_tokens, encoder.embed_dim),
                zeros(encoder.grid_size[0] * encoder.grid_size[1], encoder.embed_dim),
                encoder.grid_size,
            )
            for encoder in self.encoders
        ]
        with torch.no_grad():
            return self.project(features, is_tile).shape[1]


def _encode(encoder: Encoder, views: Tensor, max_views: int | None) -> VisionFeatures:
    """Features of (B, 3, T, T) views, at most ``max_views`` of them at once (on a CPU, fewer where they are large)."""
    if max_views is not None and views.device.type == "cpu":
        max_views = min(max_views, max(1, CPU_PIXELS // views[0, 0].numel()))
    if max_views is None or len(views) <= max_views:
        features: VisionFeatures = encoder(views)
        return features
    parts = [encoder(part) for part in torch.split(views, max_views)]
    prefix, patches = (torch.cat([getattr(part, name) for part in parts]) for name in ("prefix", "patches"))
    return VisionFeatures(prefix, patches, parts[0].grid)


def _select(features: VisionFeatures, batch_size: int, num_views: int, views: slice) -> VisionFeatures:
    if len(range(*views.indices(num_views))) == num_views:
        return features

    def take(tokens: Tensor) -> Tensor:
        return rearrange(rearrange(tokens, "(b v) n d -> b v n d", b=batch_size)[:, views], "b v n d -> (b v) n d")

    return VisionFeatures(take(features.prefix), take(features.patches), features.grid)


class _Streams:
    """CUDA streams that jobs run on side by side.

    They are kept: every stream has memory of its own in torch's allocator.
    """

    def __init__(self) -> None:
        self._streams: list[Any] = []

    def run(
        self, jobs: Sequence[Callable[[], VisionFeatures]], inputs: Sequence[Tensor], device: torch.device
    ) -> list[VisionFeatures]:
        """What the jobs return. All begin after what the current stream has to do, and it goes on after all of them.

        Args:
            jobs: Each needs ``inputs`` and nothing of another job.
            inputs: Tensors of the current stream.
            device: Where all of it happens.
        """
        cuda = torch.cuda
        while len(self._streams) < len(jobs):
            self._streams.append(cuda.Stream(device))  # type: ignore[no-untyped-call]
        current = cuda.current_stream(device)
        found = []
        for job, stream in zip(jobs, self._streams, strict=False):
            stream.wait_stream(current)
            with cuda.stream(stream):
                features = job()
            for tensor in inputs:  # else their memory could be given away while the job reads it
                tensor.record_stream(stream)
            for tensor in (features.prefix, features.patches):  # likewise, while the current stream reads it
                tensor.record_stream(current)
            found.append(features)
        for stream in self._streams[: len(jobs)]:
            current.wait_stream(stream)
        return found


class VisionTower(nn.Module):
    """Everything between pixels and the language model's input.

    Every view's tokens are the branches' tokens joined in sequence, between one learnt start token and one end token
    that all views share; the views follow each other in the tiler's order.

    Args:
        branches: Each gives tokens of the language model's width.
        mixer: Joins the branches' tokens of a view: a sequence of (B, N_i, D) -> (B, N, D).
        embed_dim: Width D of the language model.
        image_size: Side of the preprocessed image in pixels.
        tiler: Cuts the image into views.
    Shape:
        pixels: (B, 3, image_size, image_size), CLIP-normalised
        return: (B, N_img, D)
    Raises:
        ShapeError: The pixels have another size, or ``max_views`` is not positive.
    Source: SPHINX, arXiv:2311.07575, sections 3.1 and 3.3; LLaMA2-Accessory, accessory/model/LLM/llama_ens5.py.
    """

    def __init__(
        self,
        branches: Sequence[VisionBranch],
        mixer: nn.Module,
        *,
        embed_dim: int,
        image_size: int,
        tiler: Tiler,
    ) -> None:
        super().__init__()
        self.branches: Sequence[VisionBranch] = nn.ModuleList(branches)  # type: ignore[assignment]
        self.mixer = mixer
        self.image_size = image_size
        self.tiler = tiler
        self.start_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.end_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self._uses_streams = False
        self._streams = _Streams()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have no streams yet."""
        return {**self.__dict__, "_streams": _Streams()}

    def use_streams(self, enabled: bool = True) -> None:
        """Let all encoders of all branches run side by side, each on a CUDA stream of its own; off by default.

        The results are the same. It can only gain where one encoder leaves parts of the GPU idle (few views), and costs
        memory, as streams share none. Elsewhere than on CUDA, and while gradients are recorded, encoders run one after
        the other as ever. Not yet run on CUDA: ``python -m benchmarks gpu`` compares both.

        Args:
            enabled: False goes back to one after the other.
        """
        self._uses_streams = enabled

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the start and end token from N(0, 0.02), our choice (as the language model's embeddings)."""
        for token in (self.start_token, self.end_token):
            nn.init.normal_(token, std=0.02, generator=generator)

    @property
    def groups(self) -> list[tuple[slice, bool]]:
        """Views that follow each other and are treated alike: (which, whether they are sub-images)."""
        if not any(branch.is_pooled for branch in self.branches):
            return [(slice(0, self.tiler.num_views), False)]
        flags = self.tiler.is_tile
        starts = [view for view in range(len(flags)) if view == 0 or flags[view] != flags[view - 1]]
        return [(slice(start, stop), flags[start]) for start, stop in pairwise([*starts, len(flags)])]

    @property
    def num_tokens(self) -> int:
        """Visual tokens of one image, N_img: every view's, its start and end token included."""
        return sum(
            (2 + sum(branch.num_tokens(is_tile) for branch in self.branches)) * (views.stop - views.start)
            for views, is_tile in self.groups
        )

    def views(self, pixels: Tensor) -> dict[int | None, Tensor]:
        """Every view stream that some encoder asks for, by tile size: (B, V, 3, T, T) each."""
        check_pixels(pixels, "vision tower")
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ShapeError(
                f"vision tower: expected pixels of {self.image_size}x{self.image_size}, got "
                f"{pixels.shape[-2]}x{pixels.shape[-1]} (H x W); model.preprocess makes them"
            )
        sizes = {size for branch in self.branches for size in branch.tile_sizes}
        return {size: self.tiler.tile(pixels, size) for size in sizes}

    def forward(self, pixels: Tensor, max_views: int | None = None) -> Tensor:
        """Visual tokens of a batch of images, start and end tokens included.

        Args:
            pixels: Of the images.
            max_views: An encoder runs on at most this many views at once, which bounds its memory; None: on all. On a
                CPU a bound also means at most ``CPU_PIXELS`` at once, which is faster.
        """
        if max_views is not None and max_views < 1:
            raise ShapeError(f"vision tower: max_views must be at least 1, or None; got {max_views}")
        streams = self.views(pixels)
        groups = self.groups
        views = [[streams[size] for size in branch.tile_sizes] for branch in self.branches]
        if not self._uses_streams or pixels.device.type != "cuda" or torch.is_grad_enabled():
            outputs = [branch(own, groups, max_views) for branch, own in zip(self.branches, views, strict=True)]
        else:
            jobs = (branch.encodings(own, max_views) for branch, own in zip(self.branches, views, strict=True))
            features = iter(self._streams.run(list(chain(*jobs)), list(streams.values()), pixels.device))
            outputs = [
                branch.mix([next(features) for _ in branch.encoders], groups, *own[0].shape[:2])
                for branch, own in zip(self.branches, views, strict=True)
            ]
        parts = []
        for per_branch in zip(*outputs, strict=True):
            batch_size, num_views = per_branch[0].shape[:2]
            tokens = self.mixer([branch_tokens.flatten(0, 1) for branch_tokens in per_branch])
            start = self.start_token.expand(batch_size * num_views, -1, -1)
            end = self.end_token.expand(batch_size * num_views, -1, -1)
            tokens = torch.cat([start, tokens, end], dim=1)
            parts.append(rearrange(tokens, "(b v) n d -> b (v n) d", v=num_views))
        return torch.cat(parts, dim=1)
