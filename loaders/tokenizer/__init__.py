"""Tokenizers of checkpoints: text to token ids and back, chat templates, and text decoded while a model generates."""

from .decoding import DecodeStream
from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["DecodeStream", "Tokenizer", "load_tokenizer"]
