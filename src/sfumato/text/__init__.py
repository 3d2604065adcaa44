"""Prompts to embeddings: a tokenizer of words plus bytes, and a small transformer encoder trained with the denoiser."""

from sfumato.text.encoder import TextConfig, TextEncoder
from sfumato.text.tokenizer import Tokenizer, learn_words, pad

__all__ = ["TextConfig", "TextEncoder", "Tokenizer", "learn_words", "pad"]
