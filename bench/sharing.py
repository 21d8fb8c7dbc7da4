"""A conversion in several ranks against one, with one thread each: seconds by phase.

    python -m bench.sharing MODEL [--ranks 2] [--rounds 1] [--options JSON]

The runs go in turn. Beside the seconds of a clock there are those of the processor, of all ranks:
with other programs beside it, a clock says little. The results must be the same to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.ports import hostfile

CONVERT = """
import json, sys, time, optiq
model, out, options = sys.argv[1:]
found = optiq.convert(model, out, **json.loads(options))
print(json.dumps([time.process_time(), found.seconds, dict(found.phases)]))
"""


def convert(model: Path, out: Path, ranks: int, options: dict[str, Any]) -> float:
    """Print what it took; returns the seconds of the clock."""
    command = [sys.executable, "-c", CONVERT, str(model), str(out), json.dumps(options)]
    env = {**os.environ, "OPTIQ_NUM_THREADS": "1"}
    if ranks > 1:
        env["MLX_HOSTFILE"] = str(hostfile(out.parent, ranks))
    each = [env | ({"MLX_RANK": str(rank)} if ranks > 1 else {}) for rank in range(ranks)]
    started = time.monotonic()
    running = [subprocess.Popen(command, env=e, stdout=subprocess.PIPE) for e in each]
    found = [json.loads(process.communicate()[0]) for process in running]
    took = time.monotonic() - started
    busy = ", ".join(f"{cpu:.1f}" for cpu, _, _ in found)
    phases = ", ".join(f"{phase} {s:.1f}" for phase, s in found[0][2].items())
    print(f"{ranks} ranks: {took:.1f} s (processor {busy} s): {phases}", flush=True)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--options", type=json.loads, default={}, help='JSON: {"effort": "quick"}')
    args = parser.parse_args()
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            outs = [Path(folder) / str(ranks) / "out" for ranks in (1, args.ranks)]
            for out in outs:
                out.parent.mkdir()
            one, several = (
                convert(args.model, out, ranks, args.options)
                for out, ranks in zip(outs, (1, args.ranks), strict=True)
            )
            weights = [(out / "model.safetensors").read_bytes() for out in outs]
            same = "the same" if weights[0] == weights[1] else "OTHER"
            print(f"{one / several:.2f} times as fast, {same} weights")


if __name__ == "__main__":
    main()
