"""TRL's supervised fine-tuning on the Hugging Face classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sphinxkit
from sphinxkit import nano
from sphinxkit.integrations.transformers import register

SCENE = Path(__file__).resolve().parents[2] / "docs" / "images" / "nano_scene.png"
LOSS = 1e-4  # two language models' float32; logged with four digits or more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trl") / "nano_hf"
    sphinxkit.convert(nano.path(), made, format="hf")
    return made


def trainer(folder: Path, **options: Any) -> Any:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    register()
    image = Image.open(SCENE).convert("RGB")
    said = [("How many shapes are there?", "two", [image]), ("Say hello.", "hello there", [])]
    rows = [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "images": images,
        }
        for question, answer, images in said
    ]
    settings = trl.SFTConfig(
        output_dir=str(folder.parent / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        assistant_only_loss=True,
        max_length=None,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **options,
    )
    return trl.SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(folder, dtype="float32"),
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(folder),
    )


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_that_of_the_answers(folder: Path) -> None:
    """Of a row with an image and one without, in one padded batch; the oracle is sphinxkit's own log-likelihood."""
    made = trainer(folder)
    made.train()
    model = sphinxkit.load(folder)
    prompts = [model.chat_prompt(question)[0] for question in ("How many shapes are there?", "Say hello.")]
    learnt = model.score(prompts, [" two\n###", " hello there\n###"], [SCENE, None])
    wanted = -sum(each.log_likelihood for each in learnt) / sum(each.num_tokens for each in learnt)
    assert made.state.log_history[0]["loss"] == pytest.approx(wanted, abs=LOSS)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_trl_refuses_to_pack_images(option: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="not supported for vision datasets"):
        trainer(folder, **{option: True})
