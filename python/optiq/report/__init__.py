"""The HTML report of one conversion: a single file that opens offline."""

from .html import render, write

__all__ = ["render", "write"]
