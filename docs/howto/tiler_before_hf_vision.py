"""sphinxkit's tiler in front of a Hugging Face vision model: one photograph, five views, 16x16 patches per crop.

``untile`` joins the crops' patch maps into one map of the whole image. Weights are random; use
``AutoModel.from_pretrained`` for real ones. Pixels are CLIP-normalised; ``renormalize`` changes their statistics.
"""

import torch
from einops import rearrange
from PIL import Image
from transformers import ViTConfig, ViTModel

from sphinxkit.pixels import renormalize
from sphinxkit.tilers import GridTiler, preprocess


def main() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=224,
        patch_size=14,
    )
    backbone = ViTModel(config, add_pooling_layer=False).eval()

    tiler = GridTiler(rows=2, cols=2, tile_size=224)  # a 448 image: the whole at 224, then four crops
    photograph = Image.linear_gradient("L").resize((640, 427)).convert("RGB")
    pixels = preprocess(photograph, tiler.image_size[0])  # padded to a square, resized, normalised: (1, 3, 448, 448)
    views = tiler.tile(pixels)  # (1, 5, 3, 224, 224)

    flat = renormalize(views.flatten(0, 1), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # this ViT's own statistics
    with torch.no_grad():
        tokens = backbone(pixel_values=flat).last_hidden_state  # (5, 1 + 256, 32)

    maps = rearrange(tokens[:, 1:], "v (h w) d -> 1 v d h w", h=16)
    whole = tiler.untile(maps)  # (1, 32, 32, 32): twice the resolution of a single 224 view
    print(f"{tiler.num_views} views, {tokens.shape[0] * tokens.shape[1]} tokens, map {tuple(whole.shape)}")
    assert whole.shape == (1, 32, 32, 32)
    assert torch.equal(tiler.untile(views), pixels)  # crops are copies of the pixels


if __name__ == "__main__":
    main()
