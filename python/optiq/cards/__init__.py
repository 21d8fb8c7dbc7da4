"""The model card of an exported folder.

gather.py reads what was recorded, facts.py holds it, page.py and front_matter.py say it.
"""

from .card import Card

__all__ = ["Card"]
