"""OpenAI's Responses: /v1/responses, and counting of its input."""

from .responses import count_input as count_input
from .responses import respond as respond
