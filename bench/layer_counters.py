"""What a decoder layer reads and writes for one new token, against stock MLX's launches for it.

    python -m bench.layer_counters

Prints the Markdown table of docs/kernels-counted.md, counted as in metal_counters.py. Of stock MLX
the products are run, with the kernels that it chooses. The rest is derived from the shapes as what
it cannot do without: norms, rotations, the updates of the caches, the activation and the sums read
and write each array once, and attention reads keys and values once for each key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.metal_counters import Figures
from bench.metal_counters import stock as product
from optiq.formats import Format
from optiq.ops.cases import Product
from optiq.ops.layer_cases import LayerCase
from tests.metal.launcher import native_layer, run_layer

W4 = Format("affine", 4, 64)
LLAMA = LayerCase(
    "Llama-3.2-1B", (W4, W4, W4), W4, (W4, W4), W4, keys=512, width=2048, hidden=8192, dim=64,
    heads=32, kv_heads=8,
)  # fmt: skip
GEMMA = LayerCase(
    "Gemma-3-1B", (W4, W4, W4), W4, (W4, W4), W4, keys=512, width=1152, hidden=6912, dim=256,
    heads=4, kv_heads=1, head_norms=True, post_norms=True, gelu=True,
)  # fmt: skip


def ours(case: LayerCase) -> Figures:
    _, c = run_layer(native_layer(case), case.h, *case.caches, case.place)
    lines = 64 * sum(c.lines_read_by_threadgroups)
    return Figures(
        c.dispatches, written=sum(c.bytes_written), other=sum(c.bytes_read), lines=lines,
        barriers=c.barriers, memory=c.threadgroup_memory,
    )  # fmt: skip


def stock(case: LayerCase) -> Figures:
    """At least; float16, in lists of columns of h."""
    layer = case.layer
    total = Figures()
    for w in layer.weights:
        out, inner = w.shape
        total += product(Product(case.batch, out, inner, w.bits, w.group_size, case.dtype))
    queries, keys = layer.heads * layer.dim, layer.kv_heads * layer.dim
    norms = [case.width] * (4 if case.post_norms else 2)
    if case.head_norms:
        norms += [queries, keys]
    gains = [case.width] * (4 if case.post_norms else 2) + [layer.dim] * 2 * case.head_norms
    for columns, gain in zip(norms, gains, strict=True):
        total += derived(case.batch * columns + gain, case.batch * columns)
    for columns in (queries, keys):  # rotated
        total += derived(case.batch * columns, case.batch * columns)
    for _ in range(2):  # into the caches
        total += derived(case.batch * keys, case.batch * keys)
    seen = 2 * case.batch * case.keys * keys
    total += derived(case.batch * queries + seen, case.batch * queries)
    total += derived(2 * case.batch * case.hidden, case.batch * case.hidden)  # gate and up
    for _ in range(2):
        total += derived(2 * case.batch * case.width, case.batch * case.width)
    return total


def derived(read: int, written: int) -> Figures:
    """A launch that reads and writes so many values, each once."""
    return Figures(1, written=2 * written, other=2 * read, lines=2 * read)


def table() -> Iterator[str]:
    for case in (LLAMA, GEMMA):
        for batch in (1, 4, 8):
            some = replace(case, batch=batch)
            a, b = ours(some), stock(some)
            cells = [f"{x / 1e6:.2f} / {y / 1e6:.2f}" for x, y in pairs(a, b)]
            cells = [f"{a.dispatches} / {b.dispatches}", *cells]
            yield f"| {case.name}, batch of {batch} | " + " | ".join(cells) + " |"


def pairs(a: Figures, b: Figures) -> Iterator[tuple[int, int]]:
    yield from ((a.read, b.read), (a.lines, b.lines), (a.written, b.written))


def main() -> None:
    print("| layer | dispatches | read | lines | written |\n" + "|---" * 5 + "|")
    for line in table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
