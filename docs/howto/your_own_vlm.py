"""Your own VLM: an encoder of timm, a projector and a language model like Qwen3, in one recipe, trained for some steps.

Small widths and random weights make it run in seconds on a CPU. At full size the encoder is `{type: timm, model:
vit_base_patch16_siglip_224, weights: pretrained}` and the language model `{type: from_config, path: hf://Qwen/Qwen3-0.6B}`;
nothing else of the recipe changes.
"""

import tempfile
from pathlib import Path

import sphinxkit
from sphinxkit.nano.world import World, render
from sphinxkit.recipe import shipped_recipes

SIGLIP = {"type": "timm", "model": "vit_base_patch16_siglip_224", "input_size": 64}
SMALL_SIGLIP = {"embed_dim": 48, "depth": 2, "num_heads": 4}
SMALL_QWEN3 = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "hidden_dim": 128}

MODEL = {
    "kind": "model",
    "vision": {"image_size": 64, "branches": [{"encoders": [SIGLIP | SMALL_SIGLIP], "projector": "linear"}]},
    "llm": {"type": "qwen3_0_6b", **SMALL_QWEN3, "vocab_size": 960, "max_seq_len": 512},
    "conversation": "vicuna",
    "tokenizer": str(shipped_recipes()["nano/model"].parent / "tokenizer.model"),
}
WORLD = {"type": "sphinxkit.nano.world:WorldMixture", "size": 64, "sources": [{"task": "caption"}]}


def main(steps: int = 12) -> None:
    with tempfile.TemporaryDirectory() as folder:
        losses = []
        plan = {
            **{"kind": "train", "model": MODEL, "data": {"captions": {"mixture": WORLD, "batch_size": 8}}},
            **{"train": ["llm", "projectors", "image_delimiters", "encoders"], "allow_random_encoders": True},
            **{"output": f"{folder}/run", "steps": steps, "lr": 3e-3, "pack_tokens": 2048, "num_workers": 0},
            **{"device": "cpu", "dtype": "float32", "save_every": None, "log_every": 1, "export": True},
        }

        class Losses(sphinxkit.training.Callback):
            def on_step(self, record):
                losses.append(record["loss"])

        sphinxkit.train(plan, callbacks=[Losses()])
        model = sphinxkit.load(Path(folder) / "run" / "model")
        picture = render(World(size=64).scene(0))
        answer = model.chat("Describe the image.", picture, max_new_tokens=8)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {steps} steps; it says {answer!r}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
