"""From a SentencePiece ``tokenizer.model`` to the files that AutoTokenizer reads; ids of special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sphinxkit.errors import CheckpointError
from sphinxkit.tensor_files.tokenizer_files import JSON_NAME, SENTENCEPIECE_NAME, parse_json

CONFIG_NAME = "tokenizer_config.json"
_SPACE = "\u2581"
_BPE = 2  # trainer_spec.model_type
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_TYPE, _USER_DEFINED = 3, 4
_MODEL_TYPE, _CHARSMAP, _DUMMY_PREFIX, _NO_EXTRA_SPACES, _ESCAPES = 3, 2, 3, 4, 5  # fields of these two


def special_ids(files: Mapping[str, bytes]) -> dict[str, int]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, as far as a tokenizer has them.

    Args:
        files: From :func:`~sphinxkit.tensor_files.tokenizer_files.read_tokenizer_files`.
    Raises:
        CheckpointError: A file is damaged.
    """
    if SENTENCEPIECE_NAME in files:
        model = _processor(files[SENTENCEPIECE_NAME])
        found = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
        return {f"{name}_token_id": token for name, token in found.items() if token >= 0}
    if JSON_NAME not in files or CONFIG_NAME not in files:
        return {}
    document, config = parse_json(files[JSON_NAME], JSON_NAME), parse_json(files[CONFIG_NAME], CONFIG_NAME)
    vocab = (document.get("model") or {}).get("vocab")
    ids: dict[Any, int] = dict(vocab) if isinstance(vocab, dict) else {}
    ids |= {each["content"]: each["id"] for each in document.get("added_tokens") or ()}
    names = {name: config.get(f"{name}_token") for name in ("bos", "eos", "pad")}
    texts = {name: each.get("content") if isinstance(each, dict) else each for name, each in names.items()}
    return {f"{name}_token_id": ids[text] for name, text in texts.items() if text is not None and text in ids}


def from_sentencepiece(content: bytes) -> dict[str, str]:
    """``tokenizer.json`` and ``tokenizer_config.json`` with the ids of a SentencePiece model, BOS in front.

    Special tokens that a text spells out are those tokens there, while SentencePiece takes them for text.

    Args:
        content: Of the ``tokenizer.model``.
    Raises:
        CheckpointError: Not a SentencePiece model, or one that the ``tokenizers`` library cannot follow exactly
            (unigrams, a table of characters to replace, other rules for spaces).
    Source: transformers, convert_slow_tokenizer.py, LlamaConverter and SpmConverter.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    model = _processor(content)
    specs = {number: dict(_fields(value)) for number, value in _fields(content) if number in (_TRAINER, _NORMALIZER)}
    trainer, normalizer = specs.get(_TRAINER, {}), specs.get(_NORMALIZER, {})
    unlike = {
        "it is no BPE model": trainer.get(_MODEL_TYPE, 1) != _BPE,
        "it replaces characters": bool(normalizer.get(_CHARSMAP)),
        "it drops spaces": bool(normalizer.get(_NO_EXTRA_SPACES, True)),
        "it keeps spaces as they are": not normalizer.get(_ESCAPES, True),
    }
    reasons = [reason for reason, holds in unlike.items() if holds]
    if reasons:
        raise CheckpointError(f"{SENTENCEPIECE_NAME}: has no exact {JSON_NAME}: {', '.join(reasons)}")
    pieces: list[str] = [model.id_to_piece(token) for token in range(model.get_piece_size())]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    special = [token for token in range(len(pieces)) if model.is_control(token) or model.is_unknown(token)]
    kinds = [dict(_fields(piece)).get(_TYPE) for number, piece in _fields(content) if number == _PIECE]
    whole = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _USER_DEFINED}
    plain = {
        piece: token
        for piece, token in vocab.items()
        if not (model.is_byte(token) or model.is_unused(token) or token in special or piece in whole)
    }
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, token in plain.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in plain and right in plain:
                merges.append((-model.get_score(token), plain[left], plain[right], left, right))
    unk = pieces[model.unk_id()] if model.unk_id() >= 0 else None
    has_bytes = any(model.is_byte(token) for token in range(len(pieces)))
    # equal scores are one piece's, whose cuts come in the order of their ids
    bpe = models.BPE(
        vocab=vocab,
        merges=[(left, right) for _, _, _, left, right in sorted(merges)],
        unk_token=unk,
        fuse_unk=True,
        byte_fallback=has_bytes,
        ignore_merges=bool(whole),
    )
    tokenizer = Tokenizer(bpe)
    if whole:  # SentencePiece never cuts them: the longest that begins at a place is one piece there
        longest_first = "|".join(re.escape(piece) for piece in sorted(whole, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
    tokenizer.add_special_tokens([AddedToken(pieces[token], normalized=False, special=True) for token in special])
    has_prefix = bool(normalizer.get(_DUMMY_PREFIX, True))
    prefix = [normalizers.Prepend(_SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    ids = special_ids({SENTENCEPIECE_NAME: content})
    names = {name: pieces[ids[f"{name}_id"]] for name in ("bos_token", "eos_token", "pad_token") if f"{name}_id" in ids}
    if bos := names.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, ids["bos_token_id"])]
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "unk_token": unk,
        "add_bos_token": bos is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {JSON_NAME: tokenizer.to_str(pretty=False), CONFIG_NAME: json.dumps(config, indent=2) + "\n"}


def _processor(content: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        if not content:
            raise RuntimeError("it is empty")
        return SentencePieceProcessor(model_proto=content)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{SENTENCEPIECE_NAME}: not a SentencePiece model: {error}") from error


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a message of protocol buffers: an integer or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}[kind] if kind != 2 else varint()
        yield number, message[place : place + length]
        place += length
