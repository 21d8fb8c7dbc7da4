"""HTML pages that open offline: about a conversion, a comparison, a frontier, a cache's formats."""

from .conversion import conversion_page, write, write_page

__all__ = ["conversion_page", "write", "write_page"]
