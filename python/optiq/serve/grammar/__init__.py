"""Structured output: forms of answers, and the guides that hold a model to them."""

from .form import AnswerForm, Tool
from .grammars import Grammars

__all__ = ["AnswerForm", "Grammars", "Tool"]
