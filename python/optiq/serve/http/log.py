"""One line of JSON for each request. Never what a prompt or an answer says."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

logger = logging.getLogger("optiq.serve")


def log_to_stderr() -> None:
    """Show the log, unless the program that we run in has said where it goes."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO)


def line(**values: Any) -> None:
    """Write a line, at this time; values that are None are left out."""
    shown = {name: value for name, value in values.items() if value is not None}
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    logger.info(json.dumps({"time": stamp, **shown}, ensure_ascii=True))


def failure(error: BaseException, request_id: str) -> None:
    """Where an unexpected error was raised. Its message may quote a prompt, so it is left out."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-8:]]
    line(id=request_id, level="error", error=type(error).__name__, where=where)
