"""Anthropic's protocol: messages, counting of tokens, models."""

from .dialect import DIALECT as DIALECT
from .messages import count_tokens as count_tokens
from .messages import messages as messages
