"""What is known of families of models beside their files, each with its source."""

from .family import Caveat, Example, Family, Sampling, family_of
from .table import FAMILIES

__all__ = ["FAMILIES", "Caveat", "Example", "Family", "Sampling", "family_of"]
