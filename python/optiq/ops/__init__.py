"""Operations on model weights: native where possible, else the same maths in `mx.*`.

`reference.py` holds the float64 definition every implementation is tested against.
"""

from .kl import kl_from_logits
from .matmul import linear, quantized_matmul

__all__ = ["kl_from_logits", "linear", "quantized_matmul"]
