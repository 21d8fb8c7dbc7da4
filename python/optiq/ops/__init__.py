"""Operations on model weights: native where possible, else the same maths in `mx.*`.

`reference.py` holds the float64 definition every implementation is tested against.
"""

from .affine import AffineWeight, quantize
from .kl import Comparison, compare_logits, kl_divergence, kl_from_logits
from .matmul import linear, quantized_matmul

__all__ = [
    "AffineWeight",
    "Comparison",
    "compare_logits",
    "kl_divergence",
    "kl_from_logits",
    "linear",
    "quantize",
    "quantized_matmul",
]
