#!/usr/bin/env bash
# Builds the Linux wheel for this machine's processor into dist/, checks it, and tries it in a
# fresh virtual environment.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need c++ g++
make_tools
machine="$(uname -m)"
policy="manylinux_2_35_$machine" # what mlx's own wheels ask for
raw="$cache/linux-raw" # before auditwheel
rm -rf "$raw" "$dist"/optiq_mlx-*-manylinux_*_"$machine".whl

# Not in the build folder of the editable install, which it would disturb.
"$tools/bin/pip" wheel --quiet --no-deps --wheel-dir "$raw" . -Cbuild-dir="$cache/build-linux"

# libmlx comes with mlx.
PATH="$tools/bin:$PATH" "$tools/bin/auditwheel" repair --plat "$policy" --only-plat \
  --exclude libmlx.so --wheel-dir "$dist" "$raw"/optiq_mlx-*.whl
wheel="$(echo "$dist"/optiq_mlx-*-"$policy".whl)"

# python/optiq/blas.py loads liboptiq_cpu.so by that name from beside the extension.
"$tools/bin/python" - "$wheel" << 'PYTHON'
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as archive:
    native = sorted(n for n in archive.namelist() if ".so" in n)
if native != ["optiq/_ext.abi3.so", "optiq/liboptiq_cpu.so"]:
    sys.exit(f"FAIL  contents: native files are {native}")
print("ok    contents: the extension and, beside it, liboptiq_cpu.so; nothing grafted")
PYTHON
audit="$("$tools/bin/abi3audit" --strict --summary "$wheel" 2>&1)" ||
  { echo "FAIL  abi3audit: $audit"; exit 1; }
echo "ok    abi3audit: 0 violations of Python 3.10's stable interface"

smoke="$cache/smoke"
rm -rf "$smoke"
"${PYTHON:-python3}" -m venv "$smoke"
"$smoke/bin/pip" install --quiet "$wheel" || { echo "FAIL  pip does not install $wheel"; exit 1; }
cd "$smoke" # so that nothing is imported from the source tree
bin/optiq doctor || { echo "FAIL  optiq doctor"; exit 1; }
bin/python -W error::RuntimeWarning - << 'PYTHON' || { echo "FAIL  the installed wheel"; exit 1; }
import optiq
import mlx.core as mx
from optiq import blas, ops
from optiq.ops import native

assert native.extension is not None, native.reason
assert "site-packages" in optiq.__file__, optiq.__file__
assert blas.provider().endswith("optiq/liboptiq_cpu.so"), blas.provider()
x, w = mx.random.normal((3, 256)), mx.random.normal((64, 256))
codes = mx.quantize(w, 64, 4)
ours = ops.quantized_matmul(x, *codes, group_size=64, bits=4)
error = mx.abs(ours - mx.quantized_matmul(x, *codes, group_size=64, bits=4)).max().item()
assert error < 1e-4, error
PYTHON
echo "ok    installed in a fresh environment; one product agrees with mx: $(basename "$wheel")"
