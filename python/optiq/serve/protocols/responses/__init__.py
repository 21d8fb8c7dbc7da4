"""OpenAI's Responses: /v1/responses, counting of its input, and what is stored."""

from .responses import count_input as count_input
from .responses import respond as respond
from .stored import cancel as cancel
from .stored import list_input as list_input
from .stored import retrieve as retrieve
