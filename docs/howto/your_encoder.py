import torch
from torch import nn

import sphinxkit
from sphinxkit import encoders
from sphinxkit.features import VisionFeatures


class PatchEncoder(encoders.Encoder):
    def encode(self, pixels):  # (B, 3, S, S), normalised as `info` says
        patches = self.trunk(pixels).flatten(2).transpose(1, 2)  # (B, H*W, D); the prefix is their mean, (B, 1, D)
        return VisionFeatures(prefix=patches.mean(dim=1, keepdim=True), patches=patches, grid=self.grid_size)


@encoders.register("patch_encoder")
def patch_encoder(embed_dim=64, patch_size=14, input_size=224, trainable=False):
    trunk = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)  # your network
    grid = (input_size // patch_size, input_size // patch_size)
    info = encoders.EncoderInfo(mean=(0.5,) * 3, std=(0.5,) * 3, input_size=input_size, source="our example")
    facts = {"name": "patch_encoder", "embed_dim": embed_dim, "num_prefix_tokens": 1, "grid_size": grid}
    return PatchEncoder(trunk, **facts, info=info, trainable=trainable)


assert encoders.check_encoder(encoders.create("patch_encoder", embed_dim=32)) == []
clip = {"type": "clip_vit_large_patch14", "embed_dim": 64, "num_layers": 2, "num_heads": 4}
ours = {"type": "patch_encoder", "embed_dim": 32}
branch = {"encoders": [clip, ours], "mixer": {"type": "channel", "grid": [16, 16]}}
llm = {"type": "llama", "vocab_size": 512, "embed_dim": 48, "num_layers": 2, "num_heads": 4}
model = sphinxkit.build({"kind": "model", "vision": {"image_size": 224, "branches": [branch]}, "llm": llm})
print(model.encode_images(torch.randn(2, 3, 224, 224)).shape)  # (2, 259, 48): start, 1 + 256 tokens, end
