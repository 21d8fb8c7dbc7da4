"""HTML pages that open offline: about a conversion, about a frontier, about formats of a cache."""

from .conversion import conversion_page, write

__all__ = ["conversion_page", "write"]
