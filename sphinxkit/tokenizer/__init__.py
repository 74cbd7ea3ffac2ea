"""Text to token ids and back: SentencePiece models and ``tokenizer.json`` files behind one interface."""

from sphinxkit.tokenizer.tokenizer import IncrementalDecoder, Tokenizer

__all__ = ["IncrementalDecoder", "Tokenizer"]
