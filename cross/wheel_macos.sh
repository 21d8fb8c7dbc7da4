#!/usr/bin/env bash
# Builds the macOS arm64 wheel on Linux into dist/ and checks it. See cross/README.md.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need clang++-19 clang-19 ld64.lld-19 lld-19 llvm-ar-19 llvm-19
make_tools

# One wheel serves macOS 14 and later, so it must fit the MLX wheels of all of them.
for version in 14_0 15_0 26_0; do
  fetch "$cache/macos-$version" "macosx_${version}_arm64" "mlx==$mlx" "mlx-metal==$mlx" \
    "nanobind-backend==$backend"
done
prefix="$cache/macos-mlx-$mlx"
test -d "$prefix" || {
  "$tools/bin/python" -m zipfile -e "$cache"/macos-14_0/mlx_metal-*.whl "$prefix.part"
  mv "$prefix.part" "$prefix"
}

export CROSS_PYTHON="$tools/bin/python" CROSS_STUBS="$cache/stubs"
export ZIG_GLOBAL_CACHE_DIR="$cache/zig" ZIG_LOCAL_CACHE_DIR="$cache/zig"
"$tools/bin/python" -m cross.stubs "$CROSS_STUBS"

rm -f "$dist"/optiq_mlx-*-macosx_*.whl
# scikit-build-core takes the wheel's platform tag from the first variable. Nothing may touch the
# extension after the link, which signs it, so nothing is stripped.
_PYTHON_HOST_PLATFORM=macosx-14.0-arm64 PATH="$tools/bin:$PATH" \
  "$tools/bin/pip" wheel --quiet --no-build-isolation --no-deps --wheel-dir "$dist" . \
  -Cbuild-dir="$cache/build-macos" -Cinstall.strip=false \
  -Ccmake.define.CMAKE_TOOLCHAIN_FILE="$root/cross/toolchain/macos-arm64.cmake" \
  -Ccmake.define.MLX_PREFIX="$prefix/mlx"
PATH="$tools/bin:$PATH" "$tools/bin/python" -m cross.verify "$dist"/optiq_mlx-*-macosx_*.whl \
  "$cache"/macos-14_0 "$cache"/macos-15_0 "$cache"/macos-26_0
