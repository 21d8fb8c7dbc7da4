"""What the programs share: where the server is, the task, and two tools."""

import os
from pathlib import Path

URL, PROTOCOL = os.environ["URL"], os.environ["PROTOCOL"]
TASK = os.environ["TASK"]
MODEL = "m"


def read_file(path: str) -> str:
    """Read a text file.

    Args:
        path: where it is
    """
    return Path(path).read_text()


def write_file(path: str, content: str) -> str:
    """Write a text file.

    Args:
        path: where it will be
        content: what it will say
    """
    Path(path).write_text(content)
    return "written"
