"""What a decode step over quantized keys and values moves, against stock MLX.

    python -m bench.attention_counters

Prints the Markdown table of docs/kernels-counted.md. Ours is counted: the Metal kernels as planned
for an M3 or M4 Max, run on the CPU emulator. Stock's is derived from the shapes by its algorithms,
each array counted once for each threadgroup row that reads it:

- `sdpa_vector` in two passes (MLX 0.32.4, 64 blocks on such a chip below 5 query heads a key head):
  float16 keys and values once, and the float16 sums of the blocks, written and read.
- two `quantized_matmul` with a softmax between, as mlx-lm's QuantizedKVCache: codes, scales and
  biases once for each query head, and float16 scores written by the first product, read and written
  by the softmax, and read by the second. One width for keys and values is all it has; here the
  bytes are those of the widths of the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from optiq import ops
from optiq.formats import Format
from tests.metal.launcher import plan_quantized_attention, run

GPU = "applegpu_g15s"
BLOCKS = 64


@dataclass
class Shape:
    """One decode step of one layer."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    keys: int = 8192

    @property
    def tokens(self) -> int:
        """Vectors of the cache's keys."""
        return self.kv_heads * self.keys

    def cache(self, bits: int) -> int:
        """Bytes of keys, or of values, in groups of 64 with float16 scale and bias."""
        return self.tokens * (self.dim * bits // 8 + 4 * self.dim // 64)


SHAPES = [Shape("SmolLM2-135M", 9, 3, 64), Shape("Llama-3-8B", 32, 8, 128)]
WIDTHS = [(8, 8), (8, 4), (4, 4)]


@dataclass
class Figures:
    """Bytes of one step."""

    cache: int
    read: int  # in distinct 64-byte lines, summed over threadgroups
    of_a_load: float  # lines that a simdgroup touches in one load of keys or values
    written: int
    dispatches: int


def ours(shape: Shape, k_bits: int, v_bits: int) -> Figures:
    """Counted; records of one vector over and over, whose values do not matter here."""
    records = []
    for bits in (k_bits, v_bits):
        one = ops.quantize_kv(mx.random.normal((shape.dim,)), Format("affine", bits, 64))
        size = (1, shape.kv_heads, shape.keys, one.size)
        records.append(mx.contiguous(mx.broadcast_to(one, size)))
    q = mx.random.normal((1, shape.heads, 1, shape.dim)).astype(mx.float16)
    k, v = ((shape.dim, (64, bits)) for bits in (k_bits, v_bits))
    strides = [[shape.tokens * r.shape[3], shape.keys * r.shape[3], r.shape[3]] for r in records]
    sizes = (1, shape.heads, shape.kv_heads, 1, shape.keys)
    plan = plan_quantized_attention(
        sizes, k, v, *strides, scale=shape.dim**-0.5, causal=True, gpu=GPU
    )
    _, counters = run(plan, [q, *records], [(q.shape, q.dtype)])
    return Figures(
        sum(r.nbytes for r in records),
        64 * sum(counters.lines_read_by_threadgroups),
        sum(counters.lines_of_loads[1:3]) / sum(counters.simdgroup_loads[1:3]),
        sum(counters.bytes_written),
        counters.dispatches,
    )


def stock(shape: Shape) -> int:
    """`sdpa_vector` on 16 bits, read and written."""
    blocks = BLOCKS * shape.heads * (2 * shape.dim + 8)  # values, sum and maximum
    return 4 * shape.tokens * shape.dim + 2 * blocks + 4 * shape.heads * shape.dim


def two_products(shape: Shape, k_bits: int, v_bits: int) -> int:
    """Read and written."""
    repeats = shape.heads // shape.kv_heads
    scores = 4 * 2 * shape.heads * shape.keys
    return repeats * (shape.cache(k_bits) + shape.cache(v_bits)) + scores


def main() -> None:
    print(
        "| model, cache | cache | ours, read + written | of the cache | lines of a load | "
        "`sdpa_vector`, 16 bits | two `quantized_matmul` |\n" + "|---" * 7 + "|"
    )
    for shape in SHAPES:
        for k_bits, v_bits in WIDTHS:
            f = ours(shape, k_bits, v_bits)
            total = f.read + f.written
            others = (stock(shape), two_products(shape, k_bits, v_bits))
            cells = [f"{shape.name}, K{k_bits} V{v_bits}", f"{f.cache / 1e6:.2f}"]
            cells += [f"{total / 1e6:.2f}", f"{total / f.cache:.3f}", f"{f.of_a_load:.1f}"]
            cells += [f"{other / 1e6:.2f} ({other / total:.1f}x)" for other in others]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
