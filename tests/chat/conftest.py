"""The small tokenizers of the calibration tests."""

from tests.calibration.conftest import make_tokenizer, tokenizer

__all__ = ["make_tokenizer", "tokenizer"]
