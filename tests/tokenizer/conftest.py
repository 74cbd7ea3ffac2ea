"""Small tokenizers of the kinds that public language models have, trained here."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

SAMPLES = [
    "The quick brown fox jumps over the lazy dog, 1234567 times; it's 3.14 o'clock.",
    "def f(x: int) -> str:\n    return f'{x!r}'  # tabs\there\r\n\n\n",
    "Café naïve ﬁancé e\u0301 Ångström ẞ",
    "你好，世界！ 私は猫です。 안녕하세요",
    "Привет, мир! Γειά σου Κόσμε",
    "مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया ประเทศไทย",
    "😀 👩\u200d👩\u200d👧 🇩🇪 👍🏽 ∑∫√ ½ ①",
    '{"box": [0.125, 0.250, 0.375, 1.000]} <a href="x">y</a> \\frac{1}{2}',
    "   leading and trailing   ",
    "\u00a0\u2003\ufeff zero\u200bwidth",
    "<s> [INST] ### Human: <image>",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
CHAT = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def make_lines(count: int, seed: int = 0) -> list[str]:
    """Lines of mixed scripts, emoji and code, cut and joined anywhere."""
    chosen = random.Random(seed)
    lines = []
    for _ in range(count):
        parts = [chosen.choice(SAMPLES) for _ in range(chosen.randint(1, 3))]
        cuts = [sorted(chosen.randint(0, len(part)) for _ in range(2)) for part in parts]
        glue = chosen.choice(["", " ", "  ", "\n", "\t"])
        lines.append(glue.join(part[start:end] for part, (start, end) in zip(parts, cuts, strict=True)))
    return lines


def write_qwen(folder: Path) -> None:
    """Byte-level with NFC, no beginning of text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    found = Tokenizer(models.BPE())
    found.normalizer = normalizers.NFC()
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, initial_alphabet=alphabet)
    found.train_from_iterator(SAMPLES * 3, trainer)
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CHAT])
    found.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    found.save(str(folder / "tokenizer.json"))
    config = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_llama3(folder: Path) -> None:
    """Byte-level with a beginning of text that the post-processor puts there."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    found = Tokenizer(models.BPE(ignore_merges=True))
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(
        SAMPLES * 3, trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    )
    found.add_special_tokens(LLAMA3)
    begin = (LLAMA3[0], found.token_to_id(LLAMA3[0]))
    found.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{begin[0]} $A", pair=f"{begin[0]} $A {begin[0]} $B", special_tokens=[begin]
            ),
        ]
    )
    found.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": LLAMA3[0], "special": True}, "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_llama2(folder: Path) -> None:
    """SentencePiece's pieces with byte fallback, as transformers converts Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    found = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    text = [line for line in SAMPLES if line.isascii()]
    found.train_from_iterator(text * 3, trainers.BpeTrainer(vocab_size=360, show_progress=False, special_tokens=pieces))
    document = json.loads(found.to_str())
    document["added_tokens"] = [each for each in document["added_tokens"] if each["id"] < 3]
    found = Tokenizer.from_str(json.dumps(document))
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    found.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


WRITERS: dict[str, Callable[[Path], None]] = {"qwen": write_qwen, "llama3": write_llama3, "llama2": write_llama2}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder of a small tokenizer."""
    pytest.importorskip("tokenizers")
    found = {}
    for name, write in WRITERS.items():
        found[name] = tmp_path_factory.mktemp(name)
        write(found[name])
    return found
