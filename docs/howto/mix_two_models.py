"""Tune SPHINX-nano on two domains, one model each, and mix their weights, as SPHINX does with two kinds of captions."""

import sphinxkit
from sphinxkit.nano.world import World, render

DOMAINS = ("real", "synthetic")
STEPS = 20


def tune(domain):
    """Train on captions of one domain; the folder of the model."""
    mixture = {"type": "sphinxkit.nano.world:WorldMixture", "size": 128}
    mixture["sources"] = [{"task": "caption", "domain": domain}]
    plan = {"kind": "train", "model": "nano/model_subimages", "init_from": "nano", "output": f"runs/{domain}"}
    plan |= {
        "data": {"captions": {"mixture": mixture, "batch_size": 8}},
        "steps": STEPS,
        "lr": 3e-4,
        "dtype": "float32",
    }
    return sphinxkit.train(plan).model


def held_out_loss(model):
    """Mean loss per token over new captions of both domains."""
    contexts, captions, images = [], [], []
    for domain in DOMAINS:
        world = World(domain, "val", size=128)
        for index in range(12):
            scene, (question, answer) = world.conversation(index, "caption")
            contexts.append(model.chat_prompt([question])[0])
            captions.append(" " + answer["content"])
            images.append(render(scene))
    scores = model.score(contexts, captions, images)
    return -sum(score.log_likelihood for score in scores) / sum(score.num_tokens for score in scores)


if __name__ == "__main__":
    models = [tune(domain) for domain in DOMAINS]
    result = sphinxkit.mix(models, "mixed", sweep="0:1:0.25", score=held_out_loss, minimize=True)
    for point in result.sweep.points:
        print(f"beta {point.beta}: loss {point.score:.3f}")
    print(f"the best mix is {result.path}: beta {result.weights[0]}")
