#!/usr/bin/env bash
# Makes cross/evidence.json again, from wheels that their projects build on Macs for macOS 14 or
# older: those optiq loads beside, and large C++ programs that use much of Apple's libraries.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_tools
fetch "$cache/evidence" macosx_14_0_arm64 "mlx==$mlx" "mlx-metal==$mlx" \
  "nanobind-backend==$backend" numpy==2.4.6 onnxruntime==1.32.0 pyarrow==26.0.1 duckdb==2.0.1
"$tools/bin/python" -m cross.evidence "$cache"/evidence/*.whl > "$cache/evidence.json"
mv "$cache/evidence.json" cross/evidence.json
echo "$(grep -c '": "[0-9.]*",*$' cross/evidence.json) symbols in cross/evidence.json"
