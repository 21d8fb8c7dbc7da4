"""Static figures of our quantized products on Apple's M1 and M2 GPUs, beside MLX's kernels.

    make agx               once, as root on Debian: builds Mesa's compiler
    python -m bench.agx    a Markdown table for docs/kernels-counted.md

Nothing runs. docs/kernels-counted.md says what these figures do not know.
"""

from __future__ import annotations

import sys

from .compiler import AgxError, built
from .figures import kernels, measure

HEAD = (
    "job", "registers", "threads a core", "spills", "code", "loop", "threadgroup bytes",
    "instructions / weight", "loads / weight", "cycles / weight and row",
)  # fmt: skip


def main() -> int:
    if not built():
        print("build/agx is not there; run: make agx", file=sys.stderr)
        return 1
    print(f"| {' | '.join(HEAD)} |")
    print("|---" * len(HEAD) + "|")
    for kernel in kernels():
        try:
            f = measure(kernel)
        except AgxError as error:
            reason = str(error).strip().splitlines()[-1][:80]
            print(f"| {kernel.job} | does not compile here: {reason} |" + " |" * (len(HEAD) - 2))
            continue
        cells = [f.registers, f.threads, f.spills, f.code, f.loop, f.threadgroup]
        ratios = [f.instructions, f.loads, f.cycles]
        line = [kernel.job, *map(str, cells), *(f"{r:.2f}" for r in ratios)]
        print(f"| {' | '.join(line)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
