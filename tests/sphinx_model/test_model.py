from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import sphinxkit
from sphinxkit.errors import CheckpointError, DataError, ShapeError
from sphinxkit.sphinx_model import SphinxModel

# One forward pass computed in two ways in float32: sums of some hundred terms in another order, logits of scale 8
SAME_ATOL = 2e-5


@pytest.fixture(scope="module")
def pixels(model: SphinxModel, golden: Path) -> Tensor:
    return model.preprocess([golden / "images" / "wide.png", golden / "images" / "tall.png"])


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


TEXT = ids([1, 281, 413, 419, 262], [1, 300, 17, 44, 263])


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=SAME_ATOL, rtol=0)


def test_rows_of_a_batch_are_single_rows(model: SphinxModel, pixels: Tensor) -> None:
    both = model(TEXT, pixels)
    for row in range(2):
        close(model(TEXT[row : row + 1], pixels[row : row + 1]), both[row : row + 1])


def test_images_for_some_rows(model: SphinxModel, pixels: Tensor) -> None:
    mixed = model(TEXT, pixels[:1], image_rows=[1])
    close(mixed[:1], model(TEXT[:1]))
    close(mixed[1:], model(TEXT[1:], pixels[:1]))


def test_images_in_another_order(model: SphinxModel, pixels: Tensor) -> None:
    close(model(TEXT, pixels, image_rows=[1, 0]), model(TEXT, pixels.flip(0)))


def test_packed_samples_are_separate_samples(model: SphinxModel, pixels: Tensor) -> None:
    packed = torch.cat([TEXT[:1, :3], TEXT[1:], TEXT[:1]], dim=1)
    logits = model(packed, pixels[:1], image_rows=[1], seq_lens=[3, 5, 5])
    close(logits[:, :3], model(TEXT[:1, :3]))
    close(logits[:, 3:8], model(TEXT[1:], pixels[:1]))
    close(logits[:, 8:], model(TEXT[:1]))


def test_later_tokens_never_change_earlier_logits(model: SphinxModel, pixels: Tensor) -> None:
    changed = TEXT.clone()
    changed[:, 3:] = 99
    close(model(changed, pixels)[:, :3], model(TEXT, pixels)[:, :3])


def test_loss_is_cross_entropy_of_the_labelled_tokens(model: SphinxModel, pixels: Tensor) -> None:
    labels = TEXT.clone()
    labels[:, :2] = -100
    labels[1, 3] = -100
    log_probs = torch.log_softmax(model(TEXT, pixels).double(), dim=-1)
    picked = [log_probs[row, column - 1, TEXT[row, column]] for row, column in ((0, 2), (0, 3), (0, 4), (1, 2), (1, 4))]
    expected = -torch.stack(picked).mean()
    loss = model.loss(TEXT, labels, pixels)
    assert isinstance(loss, Tensor)
    close(loss.double(), expected)
    total, count = model.loss(TEXT, labels, pixels, reduction="none")
    assert count == 5
    close(total.double(), 5 * expected)


def test_packed_loss_does_not_learn_across_samples(model: SphinxModel) -> None:
    packed = torch.cat([TEXT[:1], TEXT[1:]], dim=1)
    total, count = model.loss(packed, packed, seq_lens=[5, 5], reduction="none")
    expected, number = model.loss(TEXT, TEXT, reduction="none")
    assert count == number == 8
    close(total / count, expected / number)


def test_nothing_labelled_is_zero_with_a_graph(model: SphinxModel) -> None:
    loss = model.loss(TEXT, torch.full_like(TEXT, -100))
    assert isinstance(loss, Tensor)
    assert loss.item() == 0.0
    loss.backward()
    gradients = [parameter.grad for parameter in model.llm.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    model.zero_grad()


def test_frozen_encoders_stay_frozen_in_training(model: SphinxModel, pixels: Tensor) -> None:
    before = model(TEXT, pixels)
    model.train()
    try:
        loss = model.loss(TEXT, TEXT, pixels)
        assert isinstance(loss, Tensor)
        loss.backward()
        close(model(TEXT, pixels), before)
    finally:
        model.eval()
    assert model.vision is not None
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any(".encoders." in name for name in with_gradient)
    assert {"vision.start_token", "vision.branches.1.projector.proj.weight", "llm.lm_head.weight"} <= with_gradient
    model.zero_grad()


def test_generation_in_a_batch_is_generation_one_by_one(model: SphinxModel, images: list[Image.Image]) -> None:
    prompts = ["What is in the image?", "Where?", "Is the square red or blue? It is"]
    pictures = [images[0], None, images[1]]
    together = model.generate(prompts, pictures, max_new_tokens=12)
    alone = [model.generate([p], [i], max_new_tokens=12)[0] for p, i in zip(prompts, pictures, strict=True)]
    assert together == alone


def test_streaming_writes_what_generate_writes(model: SphinxModel, images: list[Image.Image]) -> None:
    for image in (None, images[2]):
        [answer] = model.generate("What is it?", image, max_new_tokens=20)
        assert "".join(model.stream("What is it?", image, max_new_tokens=20)) == answer.text


def test_stop_strings_cut_text_and_ids(model: SphinxModel) -> None:
    [free] = model.generate("What is it?", max_new_tokens=20, stop=())
    assert model.tokenizer is not None
    stop = free.text[3:5]
    [cut] = model.generate("What is it?", max_new_tokens=20, stop=(stop,))
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]
    assert free.token_ids[: len(cut.token_ids)] == cut.token_ids


def test_the_prompt_takes_no_part_in_a_stop_match(model: SphinxModel) -> None:
    [free] = model.generate("What is it?\n##", max_new_tokens=6, stop=())
    [again] = model.generate("What is it?\n##", max_new_tokens=6, stop=("##" + free.text[:1],))
    assert again == free


def test_an_image_without_words(model: SphinxModel, images: list[Image.Image]) -> None:
    [answer] = model.generate([""], [images[0]], max_new_tokens=4, stop=None)
    logits = model(ids([1]), model.preprocess(images[0]))
    assert answer.token_ids[0] == int(logits[0, 0].argmax())


def test_chat_applies_the_template(model: SphinxModel, images: list[Image.Image]) -> None:
    question = [{"role": "user", "content": "What is this?"}]
    prompt, stop = model.chat_prompt(question)
    assert prompt.endswith("### Human: What is this?\n### Assistant:")
    [answer] = model.generate(prompt, images[0], max_new_tokens=8, stop=stop)
    assert model.chat(question, images[0], max_new_tokens=8) == answer.text.strip()


def test_truncation_keeps_the_first_token_and_the_image(model: SphinxModel, images: list[Image.Image]) -> None:
    tokenizer, limit = model.tokenizer, model.llm.max_seq_len
    assert tokenizer is not None
    long = "What is it? " * 2000
    with pytest.raises(
        DataError, match=r"prompt 0 takes \d+ positions, 291 of them image tokens.* but the context holds 4096"
    ):
        model.generate(long, images[0])
    [prompt] = model.embed_prompts([long], [images[0]], truncate="left")
    embedded = prompt.embeds
    assert len(embedded) == limit - 1
    token_ids = tokenizer.encode(long, bos=True)
    expected = model.llm.embed(torch.tensor([token_ids[0], *token_ids[-(limit - 292 - 1) :]]))
    close(torch.cat([embedded[:1], embedded[292:]]), expected)
    close(embedded[1:292], model.encode_images(model.preprocess(images[0]))[0])


def test_scores_add_up(model: SphinxModel) -> None:
    context, continuation = "The quick fox looks at", " the picture in the morning."
    [score] = model.score([context], [continuation])
    assert model.tokenizer is not None
    token_ids = model.tokenizer.encode(context + continuation, bos=True)
    start = len(model.tokenizer.encode(context, bos=True))
    labels = torch.tensor([[-100] * start + token_ids[start:]])
    total, count = model.loss(torch.tensor([token_ids]), labels, reduction="none")
    assert score.num_tokens == int(count) == len(token_ids) - start
    assert score.log_likelihood == pytest.approx(-float(total.detach()), abs=SAME_ATOL)
    assert score.mean_nll == pytest.approx(float((total / count).detach()), abs=SAME_ATOL)
    assert not score.is_greedy


def test_a_greedy_continuation_is_known_as_such(model: SphinxModel) -> None:
    prompt = "What is in the image?"
    [answer] = model.generate(prompt, max_new_tokens=1, stop=())
    [score] = model.score([prompt], [answer.text])
    assert score.is_greedy == (score.num_tokens == 1)


def test_save_and_load(model: SphinxModel, pixels: Tensor, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    again = sphinxkit.load(tmp_path / "saved")
    state = again.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(again(TEXT, pixels), model(TEXT, pixels))
    assert again.chat([{"role": "user", "content": "Why?"}], max_new_tokens=5) == model.chat(
        [{"role": "user", "content": "Why?"}], max_new_tokens=5
    )
    with pytest.raises(CheckpointError, match="exists already"):
        model.save(tmp_path / "saved")


def test_a_model_assembled_by_hand_says_that_it_needs_a_recipe(model: SphinxModel, tmp_path: Path) -> None:
    by_hand = SphinxModel(model.llm, model.vision, tokenizer=model.tokenizer)
    with pytest.raises(CheckpointError, match="assembled by hand: set model.recipe_yaml"):
        by_hand.save(tmp_path / "saved")
    with pytest.raises(DataError, match="has no conversation template"):
        by_hand.chat([{"role": "user", "content": "Why?"}])


def test_text_models_refuse_images(model: SphinxModel, images: list[Image.Image]) -> None:
    blind = SphinxModel(model.llm, tokenizer=model.tokenizer)
    with pytest.raises(DataError, match="has no vision tower"):
        blind.generate("What?", images[0])
    with pytest.raises(DataError, match="has no tokenizer"):
        SphinxModel(model.llm).generate("What?")


@pytest.mark.parametrize(
    ("prompts", "pictures", "options", "message"),
    [
        ([], None, {}, "there are no prompts"),
        ([""], None, {}, "prompt 0 is empty"),
        (["a", " \n"], None, {}, "prompt 1 is empty"),
        ([3], None, {}, "prompt 0 is not text"),
        (["a"], ["x.png", "y.png"], {}, "2 images for 1 prompts"),
        (["a", "b"], ["x.png"], {}, "1 images for 2 prompts"),
        (["a"], ["nowhere.png"], {}, "nowhere.png"),
        (["a"], None, {"truncate": "right"}, "truncate must be None or 'left', got 'right'"),
        (["a"], None, {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_bad_requests(model: SphinxModel, prompts: list, pictures: list, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.generate(prompts, pictures, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_ids": TEXT[0]}, r"expected \(B, S\), got \(5,\)"),
        ({"image_rows": [0]}, "0 images for 1 rows"),
        ({"num_images": 1}, "1 images for 2 rows"),
        ({"num_images": 2, "image_rows": [0]}, "2 images for 1 rows"),
        ({"num_images": 2, "image_rows": [0, 0]}, "none twice"),
        ({"num_images": 1, "image_rows": [2]}, "each must be one of the 2 rows"),
        ({"seq_lens": [5, 5]}, "must be positive and fill the single row"),
        ({"token_ids": TEXT[:1], "seq_lens": [5, 0]}, "must be positive"),
        ({"token_ids": TEXT[:1], "seq_lens": [2, 2]}, r"\(sum 4\)"),
    ],
)
def test_bad_shapes(model: SphinxModel, pixels: Tensor, arguments: dict, message: str) -> None:
    arguments = {"token_ids": TEXT} | arguments
    if "num_images" in arguments:
        arguments["pixels"] = pixels[: arguments.pop("num_images")]
    with pytest.raises(ShapeError, match=message):
        model(**arguments)


def test_what_is_no_tensor_has_no_image_tokens(model: SphinxModel, images: list[Image.Image]) -> None:
    for wrong in (images[0], "photo.jpg", None):
        with pytest.raises(DataError, match=r"encode_images: expected a tensor of floating pixels \(B, 3, H, W\), got"):
            model.encode_images(wrong)


def test_labels_must_match(model: SphinxModel) -> None:
    with pytest.raises(ShapeError, match=r"labels \(2, 4\) do not match token_ids \(2, 5\)"):
        model.loss(TEXT, TEXT[:, 1:])


def test_bad_scores(model: SphinxModel) -> None:
    with pytest.raises(DataError, match="2 contexts but 1 continuations"):
        model.score(["a", "b"], ["c"])
    for wrong in ("text", None, 3, ["a", None]):
        with pytest.raises(DataError, match="score: contexts and continuations are lists of texts, got"):
            model.score(wrong, ["c"])
        with pytest.raises(DataError, match="score: contexts and continuations are lists of texts, got"):
            model.score(["a", "b"], wrong)
    with pytest.raises(DataError, match="adds no token"):
        model.score(["a"], [""])
    with pytest.raises(DataError, match="the context holds 4096"):
        model.score(["a"], [" b" * 5000])


def test_bfloat16_is_close(model: SphinxModel, pixels: Tensor, golden: Path) -> None:
    half = sphinxkit.load(golden / "llama_ens", dtype=torch.bfloat16)
    logits = half(TEXT, pixels)
    assert logits.dtype == torch.bfloat16
    reference = model(TEXT, pixels)
    error = (logits.float() - reference).norm() / reference.norm()
    # eight bits of mantissa, through three layers and the encoders; a wrong cast or order costs far more
    assert error < 0.03
    assert half.generate("What?", max_new_tokens=3)[0].token_ids
