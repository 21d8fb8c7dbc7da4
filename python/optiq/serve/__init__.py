"""A server for OpenAI's and Anthropic's clients, around an engine that answers many at once.

`optiq.serve` is this package and, when called, the function `serve.server.serve`: importing a
package puts it into its parent under its name, where the function would be.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, model: Any, **options: Any) -> None:
        """See `optiq.serve.server.serve`."""
        from .server import serve

        serve(model, **options)


sys.modules[__name__].__class__ = _Callable
