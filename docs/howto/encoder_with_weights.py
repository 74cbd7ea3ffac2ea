"""An encoder with somebody's weights: any CLIP ViT file in, tokens out.

Here a small CLIP is made and saved by open_clip, in the place of a file that you downloaded. For the real one write
``weights="pretrained"``, the path of a file, or ``"hf://openai/clip-vit-large-patch14"``, and leave the sizes out.
"""

import logging
import tempfile
from pathlib import Path

import open_clip
import torch

from sphinxkit import encoders


def a_file_from_somewhere(folder: Path) -> Path:
    """A CLIP of 64 channels, saved as open_clip's training saves it."""
    vision = {"image_size": 224, "patch_size": 32, "width": 64, "layers": 2, "head_width": 16}
    text = {"context_length": 7, "vocab_size": 31, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(32, vision, text)
    path = folder / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, path)
    return path


def main() -> None:
    torch.manual_seed(0)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # says which format was found
    with tempfile.TemporaryDirectory() as folder:
        encoder = encoders.create(
            "clip_vit_large_patch14",
            weights=a_file_from_somewhere(Path(folder)),
            activation="gelu",  # this file does not say it; files of the hub do
            patch_size=32,
            embed_dim=64,
            num_layers=2,
            num_heads=4,
        )
    features = encoder(torch.randn(1, 3, 224, 224))
    print(f"{features.prefix.shape[1]} class token and {features.grid} patches of width {encoder.embed_dim}")
    assert features.tokens().shape == (1, 50, 64)


if __name__ == "__main__":
    main()
