import sphinxkit
from sphinxkit.nano.world import World, render

siglip = {"type": "timm", "model": "vit_base_patch16_siglip_224", "input_size": 64}  # weights: pretrained
siglip |= {"embed_dim": 64, "depth": 2, "num_heads": 4}  # small, to run on a CPU
llm = {"type": "qwen3_0_6b", "embed_dim": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
llm |= {"hidden_dim": 256, "vocab_size": 960, "max_seq_len": 512}  # or {type: from_config, path: hf://Qwen/Qwen3-0.6B}
vision = {"image_size": 64, "branches": [{"encoders": [siglip], "projector": "mlp"}]}
model = {"kind": "model", "vision": vision, "llm": llm, "tokenizer": str(sphinxkit.nano.path() / "tokenizer.model")}
world = {"type": "sphinxkit.nano.world:WorldMixture", "size": 64, "sources": ["caption"]}
plan = {"kind": "train", "model": model, "data": {"world": {"mixture": world, "batch_size": 8}}, "output": "my_vlm"}
plan |= {"train": ["llm", "projectors", "image_delimiters", "encoders"], "steps": 200, "lr": 3e-3, "dtype": "float32"}
run = sphinxkit.train(plan)
answer = sphinxkit.load(run.model).ask("caption", render(World(size=64).scene(0)), max_new_tokens=16).text
print(f"loss {run.losses[0]:.2f} -> {run.losses[-1]:.2f}; it says {answer!r}")
