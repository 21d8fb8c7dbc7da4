"""Operations on model weights: native where possible, else the same maths in `mx.*`.

`reference.py` holds the float64 definition every implementation is tested against.
"""

from .affine import AffineWeight
from .attention import dequantize_kv, quantize_kv, quantized_attention
from .coordinate_descent import Sampled, descend
from .kl import Comparison, compare_logits, kl_divergence, kl_from_logits
from .low_rank import LowRankTerms, gathered_low_rank
from .matmul import linear, mixed_quantized_matmul, quantized_matmul
from .rounding import quantize
from .training import (
    AdamW,
    add_low_rank,
    categorical,
    causal_attention,
    cross_entropy,
    gated,
    rms_norm,
    rotary,
    softmax,
)

__all__ = [
    "AdamW",
    "AffineWeight",
    "Comparison",
    "LowRankTerms",
    "Sampled",
    "add_low_rank",
    "categorical",
    "causal_attention",
    "compare_logits",
    "cross_entropy",
    "dequantize_kv",
    "descend",
    "gated",
    "gathered_low_rank",
    "kl_divergence",
    "kl_from_logits",
    "linear",
    "mixed_quantized_matmul",
    "quantize",
    "quantize_kv",
    "quantized_attention",
    "quantized_matmul",
    "rms_norm",
    "rotary",
    "softmax",
]
