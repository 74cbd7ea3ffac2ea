from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sphinxkit.errors import DataError
from sphinxkit.evaluation.rewards import boxes_reward, format_reward, iou_reward, keypoints_reward

SIZE = {"width": [200, 200], "height": [100, 100]}  # padded to 200 x 200: 50 pixels above


def test_iou() -> None:
    # the box of the answer is [20, 10, 120, 60]
    answers = ["[0.100,0.300,0.600,0.550]", "no box"]
    assert iou_reward(answers, box=[[20, 10, 120, 60]] * 2, **SIZE) == pytest.approx([1.0, 0.0])
    assert iou_reward(answers, box=[[20, 10, 120, 35]] * 2, **SIZE) == pytest.approx([0.5, 0.0])


def test_trls_ways_of_giving_completions_and_pictures() -> None:
    parts = [{"type": "text", "text": "[0.100,0.300,"}, {"type": "text", "text": "0.600,0.550]"}]
    answers = [
        [{"role": "assistant", "content": "[0.100,0.300,0.600,0.550]"}],
        [{"role": "user", "content": "again"}, {"role": "assistant", "content": parts}],
    ]
    more = {"prompts": ["x"] * 2, "completion_ids": [[1], [2]], "trainer_state": None, "log_extra": print}
    image = [SimpleNamespace(size=(200, 100))] * 2
    assert iou_reward(answers, box=[(20, 10, 120, 60)] * 2, image=image, **more) == pytest.approx([1.0, 1.0])


def test_other_models_boxes() -> None:
    answer = '[{"bbox_2d": [20, 10, 120, 60], "label": "dog"}]'
    assert iou_reward([answer] * 2, box_format="qwen2_5_vl", box=[[20, 10, 120, 60]] * 2, **SIZE) == [1.0, 1.0]
    wanted = {"boxes": [[[20, 10, 120, 60]]] * 2, "labels": [["dog"], ["cat"]]}
    assert boxes_reward([answer] * 2, box_format="qwen2_5_vl", **wanted, **SIZE) == [1.0, 0.0]
    assert format_reward([answer, "x"], box_format="qwen2_5_vl", **SIZE) == [1.0, 0.0]


def test_several_boxes() -> None:
    one = "<p>dog</p>[0.100,0.300,0.600,0.550]"
    two = "<p>dog</p>[0.100,0.300,0.600,0.550;0.000,0.250,0.100,0.300]"
    gold = [[20, 10, 120, 60], [150, 20, 170, 40]]
    # one of two found: 2 * 1 / (1 + 2); the second box of the other answer overlaps nothing: 2 * 1 / (2 + 2)
    assert boxes_reward([one, two], boxes=[gold] * 2, **SIZE) == pytest.approx([2 / 3, 1 / 2])
    half = [[20, 10, 120, 35]]
    assert boxes_reward([one, two], boxes=[half] * 2, **SIZE) == pytest.approx([2 * 0.5 / 2, 2 * 0.5 / 3])
    labels = [["dog", "cat"], ["cat", "cat"]]
    assert boxes_reward([one, two], boxes=[gold] * 2, labels=labels, **SIZE) == pytest.approx([2 / 3, 0.0])
    assert boxes_reward(["<p>dog</p>[]", one], boxes=[[], []], **SIZE) == [1.0, 0.0]


def test_key_points() -> None:
    answer = "<p>nose</p>[0.150,0.350] <p>left_knee</p>[0.300,0.500]"  # (30, 20) and (60, 50)
    gold = {"nose": [30, 20], "left_knee": [70, 50], "left_ear": None}
    # COCO's sigma of a knee is 0.087; the distance is 10 and the area 5000
    wanted = (1 + math.exp(-(10**2) / (2 * 5000 * (2 * 0.087) ** 2))) / 2
    rewards = keypoints_reward([answer, "nothing"], keypoints=[gold] * 2, area=[5000, 5000], **SIZE)
    assert rewards == pytest.approx([wanted, 0.0])


def test_format() -> None:
    answers = ["[0.100,0.300,0.600,0.550]", "[0.100, 0.300, 0.600, 0.550"]
    assert format_reward(answers, **SIZE) == [1.0, 0.5]
    assert format_reward(["a cat", ""], **SIZE) == [0.0, 0.0]
    tasks = ["detection", "pose"]
    assert format_reward(["<p>dog</p>[]", "<p>nose</p>[0.150,0.350]"], task=tasks, **SIZE) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("reward", "completions", "columns", "message"),
    [
        (
            iou_reward,
            ["x"] * 2,
            {"box": [[1, 2, 3, 4]]},
            "the column 'box' must have one value for each of 2 completions",
        ),
        (iou_reward, ["[0.1,0.3,0.6,0.5]"] * 2, {"box": [[1, 2, 3]] * 2}, r"expected 4 numbers, got \[1, 2, 3\]"),
        (iou_reward, ["[0.1,0.3,0.6,0.5]"] * 2, {"box": ["abcd"] * 2}, "expected 4 numbers, got 'abcd'"),
        (iou_reward, [3, 4], {"box": [[1, 2, 3, 4]] * 2}, "a completion must be a text or a list of messages, got 3"),
        (boxes_reward, ["x"] * 2, {"boxes": [[]] * 2, "labels": [["a"]] * 2}, "0 boxes but 1 labels"),
        (keypoints_reward, ["x"] * 2, {"keypoints": [3] * 2, "area": [1, 1]}, r"key points must be \{name"),
        (format_reward, ["x"] * 2, {"task": ["rec"]}, "the column 'task' must have one value"),
    ],
)
def test_bad_columns(reward: Any, completions: list[Any], columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        reward(completions, **columns, **SIZE)


def test_sizes_are_needed() -> None:
    with pytest.raises(DataError, match="the column 'width' must have"):
        format_reward(["x"])


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")  # TRL's own, of older names of transformers
def test_trls_grpo_takes_the_rewards(tmp_path: Path) -> None:
    """One step of a tiny random model; every reward is called with TRL's own arguments."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "</s>", *"[]0123456789.,<p>/dog"])}
    letters = Tokenizer(models.WordLevel(words, **{"unk_token": "<pad>"}))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, **{"pad_token": "<pad>", "eos_token": "</s>"})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **sizes))
    row = {"prompt": "dog", "box": [20, 10, 120, 60], "boxes": [[20, 10, 120, 60]], "labels": ["dog"]}
    more = {
        "width": 200,
        "height": 100,
        "task": "rec",
        "keypoints": {"nose": [30, 20], "left_ear": None},
        "area": 5000.0,
    }
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=8,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
    )
    rewards = [iou_reward, boxes_reward, keypoints_reward, format_reward]
    table = datasets.table.InMemoryTable.from_pydict({name: [value] * 4 for name, value in {**row, **more}.items()})
    data = datasets.Dataset(table, fingerprint="rewards")
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=rewards, args=settings, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert {f"rewards/{reward.__name__}/mean" for reward in rewards} <= set(logged)
