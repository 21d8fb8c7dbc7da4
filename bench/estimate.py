"""What a conversion was expected to take, beside what it took: `quantize/estimate.py`.

    python -m bench.estimate MODEL [--tokens 1536 --sensitivity fisher ...]

Takes the options of `optiq convert`, writes to a temporary folder, and prints a line for each
phase. Both are seconds on a machine that has nothing else to do; on a busy one only the first is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import optiq
from optiq.cli import options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_model(parser)
    options.add_size(parser)
    options.add_effort(parser)
    options.add_measuring(parser)
    args = parser.parse_args()
    fields = options.measuring(args)
    fields["size"] = args.size
    with TemporaryDirectory() as folder:
        result = optiq.convert(args.model, Path(folder) / "out", **fields)
    rows = [(name, expected, result.phases[name]) for name, expected in result.expected.items()]
    rows.append(("all", sum(result.expected.values()), sum(found for *_, found in rows)))
    print(f"{'phase':24}{'estimated':>10}{'found':>10}{'ratio':>8}")
    for name, expected, found in rows:
        print(f"{name:24}{expected:8.1f} s{found:8.1f} s{found / expected:8.2f}")


if __name__ == "__main__":
    main()
