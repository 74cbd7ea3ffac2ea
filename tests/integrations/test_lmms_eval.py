"""The model class in lmms-eval, and lmms-eval's scores beside ours."""

from __future__ import annotations

import json
import random
import struct
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from sphinxkit import nano
from sphinxkit.errors import DataError
from sphinxkit.evaluation import score
from sphinxkit.geometry import Box, ImageGeometry
from sphinxkit.integrations import lmms_eval
from sphinxkit.integrations.lmms_eval import SphinxForLmmsEval, frame_of, manifest, move_boxes

SCENE = Path(__file__).resolve().parents[2] / "docs" / "images" / "nano_scene.png"
TALL = ImageGeometry(50, 100)  # 25 pixels of padding at the left and at the right
PLACE = ("refcoco_made", "test")
SAME = 1e-5  # of log-likelihoods: rows of a batch are padded to other lengths


def test_boxes_move_to_the_image() -> None:
    text = "the dog [0.25, 0.1, .5, 0.6] and [1, 2]"
    assert move_boxes(text, TALL, "pixels").startswith("the dog [0.000000, 10.000000, 25.000000, 60.000000] and [1, 2]")
    assert move_boxes(text, TALL, "image") == "the dog [0.000000, 0.100000, 0.500000, 0.600000] and [1, 2]"
    assert move_boxes(text, TALL, "square") == text
    several = move_boxes("[0.5,0,0.75,1;0.25,0.5,0.5,1]", TALL, "image")
    assert several == "[0.500000, 0.000000, 1.000000, 1.000000; 0.000000, 0.500000, 0.500000, 1.000000]"


def test_boxes_in_the_padding_and_swapped_corners_are_kept() -> None:
    assert move_boxes("[0, 0, 1, 1]", TALL, "pixels") == "[-25.000000, 0.000000, 75.000000, 100.000000]"
    assert move_boxes("[0.75, 0, 0.25, 1]", TALL, "image") == "[1.000000, 0.000000, 0.000000, 1.000000]"


def test_the_frame_is_the_tasks() -> None:
    frames = {task: frame_of(task) for task in ("refcoco+_bbox_rec_val", "refcocog_grounding_test", "refcoco_bbox_val")}
    assert list(frames.values()) == ["image", "pixels", "square"]
    assert frame_of("vqav2_val") == "square"


def test_pictures_are_read_as_everywhere(tmp_path: Path) -> None:
    """16-bit grey is scaled, not clipped to white."""
    picture = Image.frombytes("I;16", (2, 1), struct.pack("=2H", 257 * 100, 65535))
    picture.save(tmp_path / "deep.png")
    for source in (picture, str(tmp_path / "deep.png")):
        found = lmms_eval._single([source])
        assert found is not None
        assert [found.getpixel((x, 0))[0] for x in range(2)] == [100, 255]
    assert lmms_eval._single([]) is None


@pytest.fixture(scope="module")
def asked() -> Any:
    pytest.importorskip("lmms_eval")
    model = SphinxForLmmsEval(str(nano.path()), device="cpu", batch_size=2)
    model.task_dict = {"refcoco_made": {"test": [{"n": 0}, {"n": 1}]}}
    return model


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def turn(text: str, *, images: int = 1) -> list[dict[str, Any]]:
    pictures = [{"type": "image", "url": Image.open(SCENE)}] * images
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


@pytest.mark.integration
def test_answers_are_those_of_chat(asked: Any) -> None:
    questions = ["How many circles are there?", "How many shapes are there?"]
    made = [
        request("", lambda doc: turn(questions[doc["n"]]), {"max_new_tokens": 20, "until": ["\n\n"]}, n, *PLACE)
        for n in (1, 0)
    ]
    want = [asked.model.chat(question, SCENE, max_new_tokens=20) for question in questions]
    assert asked.generate_until(made) == want[::-1]
    made[0].args[2]["until"] = [want[1][1:]]  # a task's stop string; the settings of the two now differ
    assert asked.generate_until(made) == [want[1][:1], want[0]]


@pytest.mark.integration
def test_questions_with_and_without_an_image_in_one_batch(asked: Any) -> None:
    made = [request("", lambda doc: turn("Hi", images=doc["n"]), {"max_new_tokens": 8}, n, *PLACE) for n in (0, 1)]
    want = [asked.model.chat("Hi", image, max_new_tokens=8) for image in (None, SCENE)]
    assert asked.generate_until(made) == want


@pytest.mark.integration
def test_sampling_is_the_tasks(asked: Any) -> None:
    def said(**settings: Any) -> list[str]:
        given = {"max_new_tokens": 12, **settings}
        return asked.generate_until([request("", lambda doc: turn("Hi"), given, n, *PLACE) for n in (0, 1)])

    greedy = said()
    assert said(temperature=5.0, do_sample=False) == greedy == said(temperature=0)
    assert len({*said(temperature=5.0), *greedy}) == 3  # each row has a seed of its own
    assert said(temperature=5.0) == said(temperature=5.0, do_sample=True)
    with pytest.raises(DataError, match="refcoco_made: 2 of 2 .* num_beams=3: there is no beam search; pass --gen_kw"):
        said(num_beams=3)


@pytest.mark.integration
def test_boxes_are_written_in_the_tasks_frame(asked: Any) -> None:
    asked.task_dict["refcoco_bbox_rec_val"] = {"test": [{}]}
    wide = Image.open(SCENE).convert("RGB").crop((0, 0, 64, 32))
    content = [{"type": "image", "url": wide}, {"type": "text", "text": "the red circle"}]

    def ask(task: str) -> str:
        made = request("", lambda doc: [{"role": "user", "content": content}], {"max_new_tokens": 30}, 0, task, "test")
        return asked.generate_until([made])[0]

    class Fixed:
        text = " [0.25,0.375,0.5,0.75]"

    answer = "sphinxkit.integrations.lmms_eval.answer_requests"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer, lambda _, requests, **k: (SimpleNamespace(request=r, generation=Fixed) for r in requests))
        assert ask("refcoco_made") == "[0.25,0.375,0.5,0.75]"
        assert ask("refcoco_bbox_rec_val") == "[0.250000, 0.250000, 0.500000, 1.000000]"


@pytest.mark.integration
def test_a_question_that_cannot_be_asked_is_an_empty_answer(asked: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = [request("", lambda doc: turn("Hi", images=1 + doc["n"]), {"max_new_tokens": 8}, n, *PLACE) for n in (0, 1)]
    first, second = asked.generate_until(made)
    assert first == asked.model.chat("Hi", SCENE, max_new_tokens=8)
    assert second == ""
    wanted = "refcoco_made: 1 of 2 questions cannot be asked; number 1: the model reads one image a question, got 2"
    assert wanted in caplog.text
    with pytest.raises(DataError, match="refcoco_made: 2 of 2 questions cannot be asked; number 0: .* got 2"):
        asked.generate_until(made[1:] * 2)
    film = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "Hi"}]}]
    with pytest.raises(DataError, match="the model reads images and text, got video or audio"):
        asked.generate_until([request("", lambda doc: film, {}, 0, *PLACE)] * 2)


@pytest.mark.integration
def test_rounds_see_the_answers_before(asked: Any) -> None:
    seen = []

    def to_messages(doc: Any, round_idx: int | None = None, previous_output: Any = None, **_: Any) -> Any:
        if round_idx is None:
            return turn("How many circles are there?")
        seen.append(previous_output)
        return turn("How many shapes are there?"), round_idx == 2, previous_output, None

    [said] = asked.generate_until_multi_round([request("", to_messages, {"max_new_tokens": 9}, 0, *PLACE)])
    assert said == [asked.model.chat(f"How many {what} are there?", SCENE) for what in ("circles", "shapes")]
    assert seen == [said[:1], said]


@pytest.mark.integration
def test_loglikelihood_is_score(asked: Any) -> None:
    question = "How many circles are there?"
    prompt, _ = asked.model.chat_prompt(question)
    words = ("one", "two", "three")
    want = asked.model.score([prompt] * 3, [f" {word}" for word in words], [SCENE] * 3)
    for given in (words, [f" {word}" for word in words]):  # as a target, and with lmms-eval's delimiter
        made = [request(question, word, lambda doc: [Image.open(SCENE)], 0, *PLACE) for word in given]
        made[0].args = (question, lambda doc, text=given[0]: text, *made[0].args[2:])
        found = asked.loglikelihood(made)
        assert [each for each, _ in found] == pytest.approx([each.log_likelihood for each in want], abs=SAME)
        assert [is_greedy for _, is_greedy in found] == [each.is_greedy for each in want]
    [alone] = asked.model.score([prompt], [" one"])
    assert asked.loglikelihood([request(question, "one")])[0][0] == pytest.approx(alone.log_likelihood, abs=SAME)
    assert abs(alone.log_likelihood - want[0].log_likelihood) > 10 * SAME


@pytest.mark.integration
def test_unknown_settings_are_errors() -> None:
    pytest.importorskip("lmms_eval")
    with pytest.raises(DataError, match="boxes must be square, image or pixels, got 'left'"):
        SphinxForLmmsEval(str(nano.path()), boxes="left")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="dtype: expected a floating torch dtype .* got 'half8'"):
        SphinxForLmmsEval(str(nano.path()), dtype="half8")


@pytest.mark.integration
def test_the_entry_point_names_the_class() -> None:
    registry = pytest.importorskip("lmms_eval.models").MODEL_REGISTRY_V2
    [found] = [each for each in entry_points(group="lmms_eval.models") if each.name == "sphinxkit"]
    assert found.load() is manifest
    registry.register_manifest(manifest(), overwrite=True)
    assert registry.get_model_class("sphinxkit") is SphinxForLmmsEval


def ours(tmp_path: Path, benchmark: str, golds: list[dict[str, Any]], answers: list[str]) -> Any:
    rows = [{"question_id": n, "image_path": "a.png", "question": "?", **gold} for n, gold in enumerate(golds)]
    (tmp_path / "gold.json").write_text(json.dumps(rows))
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    return score(benchmark, tmp_path / "gold.json", tmp_path / "answers.json").scores


@pytest.mark.integration
def test_refcoco_is_scored_alike(tmp_path: Path) -> None:
    """400 made boxes around the gold ones, some of them unreadable, swapped, several or in the padding."""
    rec = pytest.importorskip("lmms_eval.tasks.refcoco.utils_rec")
    drawn = random.Random(0)
    golds, answers, given = [], [], []
    for _ in range(400):
        width, height = drawn.randint(20, 640), drawn.randint(20, 640)
        image = ImageGeometry(width, height)
        (x1, x2), (y1, y2) = (sorted(drawn.sample(range(side + 1), 2)) for side in (width, height))
        square = image.box_to_square(Box(x1, y1, x2, y2))
        a, b, c, d = (f"{value + drawn.gauss(0, 0.05):.3f}" for value in (square.x1, square.y1, square.x2, square.y2))
        forms = [f"[{a},{b},{c},{d}]"] * 5 + [f"It is at [{a}, {b}, {c}, {d}].", "none", f"[{a},{b},{c}]"]
        answers.append(drawn.choice([*forms, f"[{c},{b},{a},{d}]", f"[{a},{b},{c},{d};0.1,0.1,0.2,0.2]"]))
        golds.append({"width": width, "height": height, "gt_answers": [x1, y1, x2, y2]})
        doc = {"question_id": 0, "answer": "", "bbox": [x1 / width, y1 / height, x2 / width, y2 / height]}
        given.append(rec.refcoco_bbox_rec_process_result(doc, [move_boxes(answers[-1], image, "image")]))
    theirs = rec.refcoco_bbox_rec_acc05([each["refcoco_ACC@0.5"] for each in given])
    assert ours(tmp_path, "refcoco_val", golds, answers)["precision_at_1"] == pytest.approx(theirs)
    assert 0.2 < theirs < 0.6


@pytest.mark.integration
def test_vqa_is_scored_alike(tmp_path: Path) -> None:
    vqa = pytest.importorskip("lmms_eval.tasks.vqav2.utils")
    drawn = random.Random(0)
    words = (
        "a the dog Dogs yes No two 2 ten none 1,000 3.5 don't dont isnt it's its t-shirt red/blue oclock what? \tred"
    )
    golds, answers, theirs = [], [], []
    for _ in range(400):
        pool = [" ".join(drawn.choices(words.split(" "), k=drawn.randint(1, 3))) for _ in range(3)]
        people = drawn.choices(pool, k=10)
        answers.append(drawn.choice([pool[0], f"The {pool[0]}.", pool[0].upper(), "none of these"]))
        told = [{"answer": each, "answer_id": number} for number, each in enumerate(people)]
        golds.append({"gt_answers": people})
        found = vqa.vqav2_process_results_val({"question_id": 0, "answers": told}, [answers[-1]])
        theirs.append(found["exact_match"])
    assert ours(tmp_path, "vqav2_val", golds, answers)["vqa_accuracy"] == pytest.approx(sum(theirs) / len(theirs))
    assert 0.3 < sum(theirs) / len(theirs) < 0.9


@pytest.mark.integration
@pytest.mark.parametrize("last", ["maybe", "y"])  # the one answer that both read differently
def test_mme_is_scored_alike(last: str, tmp_path: Path) -> None:
    mme = pytest.importorskip("lmms_eval.tasks.mme.utils")
    answers = ["Yes, it is", "no.", "yes", "Yes", "no", "no", last, "No"]
    golds, given = [], []
    for n, answer in enumerate(answers):
        category, gold = ("color", "count")[n // 4], ("Yes", "No")[n % 2]
        image = f"{category}/{n // 2}.png"
        golds.append({"image_path": image, "gt_answers": gold})
        given.append(mme.mme_process_results({"answer": gold, "category": category, "question_id": image}, [answer]))
    theirs = mme.mme_aggregate_results([each["mme_perception_score"] for each in given])
    found = ours(tmp_path, "MME_benchmark", golds, answers)["perception"]
    assert (found == pytest.approx(theirs)) == (last == "maybe")
    assert 0 < theirs < 400
