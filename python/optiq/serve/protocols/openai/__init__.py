"""OpenAI's protocol: chat completions, completions, models."""

from .chat import chat as chat
from .completions import complete as complete
from .dialect import DIALECT as DIALECT
