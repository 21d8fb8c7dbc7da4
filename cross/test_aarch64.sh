#!/usr/bin/env bash
# Runs the op tests with the NEON and scalar kernels on Linux aarch64, emulated by qemu. They are
# the kernels that the macOS wheel has, so this is where their arithmetic is proven. Extra
# arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu qemu-aarch64-static qemu-user-static
make_tools
arm="$cache/aarch64"
system="$arm/root" site="$arm/site"
mkdir -p "$arm"

# Debian 12's Python for arm64, unpacked in a folder. apt gets state of its own, so the machine's
# architectures and package lists stay as they are.
if ! test -e "$arm/.root"; then
  rm -rf "$system" "$arm/apt" "$arm/debs"
  mkdir -p "$system" "$arm/apt/lists/partial" "$arm/apt/cache/archives/partial" "$arm/debs"
  touch "$arm/apt/status"
  cat > "$arm/apt.conf" << CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "";
Dir::State "$arm/apt";
Dir::State::Lists "$arm/apt/lists";
Dir::State::status "$arm/apt/status";
Dir::Cache "$arm/apt/cache";
CONF
  APT_CONFIG="$arm/apt.conf" apt-get -qq update
  (
    cd "$arm/debs"
    APT_CONFIG="$arm/apt.conf" apt-get -qq download libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g \
      python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libexpat1 libffi8 libssl3 \
      libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libcrypt1
  )
  for deb in "$arm"/debs/*.deb; do dpkg-deb -x "$deb" "$system"; done
  touch "$arm/.root"
fi

fetch "$arm/wheels" \
  "manylinux_2_35_aarch64 manylinux_2_28_aarch64 manylinux_2_27_aarch64 manylinux_2_17_aarch64" \
  "mlx==$mlx" "mlx-cpu==$mlx" "nanobind-backend==$backend" numpy pytest pluggy iniconfig packaging \
  pygments jinja2 markupsafe 'hypothesis>=6.100' sortedcontainers
if ! test -e "$site/.unpacked" || test "$arm/wheels" -nt "$site/.unpacked"; then
  rm -rf "$site"
  for wheel in "$arm"/wheels/*.whl; do "$tools/bin/python" -m zipfile -e "$wheel" "$site"; done
  touch "$site/.unpacked"
fi

rm -rf "$arm/dist" "$site/optiq" "$site"/optiq_mlx-*
_PYTHON_HOST_PLATFORM=linux-aarch64 PATH="$tools/bin:$PATH" \
  "$tools/bin/pip" wheel --quiet --no-build-isolation --no-deps --wheel-dir "$arm/dist" . \
  -Cbuild-dir="$cache/build-aarch64" -Cinstall.strip=false \
  -Ccmake.define.CMAKE_TOOLCHAIN_FILE="$root/cross/toolchain/linux-aarch64.cmake" \
  -Ccmake.define.MLX_PREFIX="$site/mlx"
"$tools/bin/python" -m zipfile -e "$arm"/dist/optiq_mlx-*.whl "$site"

# Tests start Python again by sys.executable, which must be this script and not the arm64 program.
# MLX compiles fused operations with the g++ that it finds first, and keeps them in TMPDIR.
mkdir -p "$arm/bin" "$arm/tmp"
ln -sf "$(command -v aarch64-linux-gnu-g++)" "$arm/bin/g++"
cat > "$arm/bin/python" << SCRIPT
#!/bin/sh
export PYTHONHOME="$system/usr" PYTHONPATH="$site" PYTHONDONTWRITEBYTECODE=1
export PATH="$arm/bin:/usr/bin:/bin" TMPDIR="$arm/tmp"
exec qemu-aarch64-static -L "$system" -cpu max "$system/usr/bin/python3.11" "\$@"
SCRIPT
chmod +x "$arm/bin/python"
echo "import sys; sys.executable = '$arm/bin/python'" > "$site/sitecustomize.py"

# What measures memory at the sizes of real models takes hours here, and would measure qemu. The KV
# kernels' probe of another instruction set runs into its time limit, and does what this loop does.
for isa in neon scalar; do
  got="$(OPTIQ_ISA=$isa "$arm/bin/python" -c 'from optiq import _ext; print(_ext.isa())')"
  test "$got" = $isa || { echo "FAIL  asked for the $isa kernels, got '$got'"; exit 1; }
  echo "aarch64 under qemu, $isa kernels:"
  OPTIQ_ISA=$isa "$arm/bin/python" -m pytest -q -p no:cacheprovider tests/ops \
    --deselect tests/ops/test_kl_divergence.py::test_memory_is_bounded \
    --deselect tests/ops/test_kv_kernels.py::test_instruction_sets "$@"
done
