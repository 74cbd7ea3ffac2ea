"""sphinxkit's encoders and mixer inside a plain nn.Module: a classifier on CLIP and ConvNeXt features, mixed.

No recipe, no SphinxModel, no configuration. Small widths make it run in a second; the builders' defaults are the
full-size networks.
"""

import torch
from torch import Tensor, nn

from sphinxkit import encoders
from sphinxkit.mixers import ChannelMixer


class Classifier(nn.Module):
    """Your module: two frozen encoders, one trained head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(
            [
                encoders.clip_vit_large_patch14(embed_dim=64, num_layers=2, num_heads=4),
                encoders.create("convnext_xxlarge", dims=(16, 32, 64, 128), depths=(1, 1, 1, 1)),
            ]
        )
        self.mixer = ChannelMixer([encoder.embed_dim for encoder in self.encoders], grid=(16, 16))
        self.head = nn.Linear(self.mixer.embed_dim, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) CLIP-normalised pixels to (B, num_classes)."""
        mixed = self.mixer([encoder(pixels) for encoder in self.encoders])
        return self.head(mixed.patches.mean(dim=1))


def main() -> None:
    torch.manual_seed(0)
    model = Classifier(num_classes=2).train()  # the frozen encoders stay in eval mode
    pixels = torch.randn(8, 3, 224, 224)
    labels = torch.tensor([0, 1] * 4)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"mixed width {model.mixer.embed_dim}, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None for parameter in model.encoders.parameters())


if __name__ == "__main__":
    main()
