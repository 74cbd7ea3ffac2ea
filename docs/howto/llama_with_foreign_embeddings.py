"""sphinxkit's LLaMA on embeddings that are not words: a sequence model over sensor readings.

The model takes embeddings, so other inputs of its width can stand among the words: here a linear layer's readings, then
a question's tokens, then greedy decoding with the key-value cache. The same model is trained on packed samples.
"""

import torch
from torch import nn

from sphinxkit.llama import llama


def main() -> None:
    torch.manual_seed(0)
    model = llama(vocab_size=100, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=128)
    model.init_weights()
    sensor = nn.Linear(6, model.embed_dim)  # the foreign part: six readings per time step

    # training: two samples of different lengths packed into one row; neither attends to the other
    readings = [torch.randn(10, 6), torch.randn(7, 6)]
    targets = torch.randint(0, 100, (17,))
    optimizer = torch.optim.AdamW([*model.parameters(), *sensor.parameters()], lr=1e-2)
    losses = []
    for _ in range(5):
        embeds = sensor(torch.cat(readings))[None]  # (1, 17, 64)
        logits = model(embeds, seq_lens=[10, 7])  # (1, 17, 100)
        loss = nn.functional.cross_entropy(logits[0], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    # answering: readings first, then the question's words, then one token at a time
    question = torch.tensor([[5, 17, 42]])
    with torch.no_grad():
        prompt = torch.cat([sensor(readings[0])[None], model.embed(question)], dim=1)
        cache = model.make_cache(batch_size=1, max_seq_len=32)
        logits = model(prompt, cache=cache, output_positions=slice(-1, None))  # only the last position's
        answer = []
        for _ in range(8):
            token = logits[:, -1:].argmax(-1)
            answer.append(token.item())
            logits = model(model.embed(token), cache=cache)
        # one pass without the cache gives the same tokens
        whole = torch.cat([prompt, model.embed(torch.tensor([answer]))], dim=1)
        again = model(whole)[0, prompt.shape[1] - 1 : -1].argmax(-1)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, answer {answer}")
    assert again.tolist() == answer


if __name__ == "__main__":
    main()
