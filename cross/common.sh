# Sourced by the scripts beside it. Everything downloaded or built stays under build/cross.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
cache="$root/build/cross"
tools="$cache/tools"
dist="$root/dist"
mkdir -p "$cache" "$dist"
export PIP_DISABLE_PIP_VERSION_CHECK=1 CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-2}"

# The versions that pyproject.toml pins, so that they are written down once.
pin() {
  local version
  version="$(sed -n "s/^ *\"$1==\([0-9.]*\)[;\"].*/\1/p" pyproject.toml | head -1)"
  test -n "$version" || { echo "pyproject.toml pins no $1" >&2; exit 1; }
  echo "$version"
}
mlx="$(pin mlx)"
nanobind="$(pin nanobind)"
backend="$(pin nanobind-backend)"

# need PROGRAM PACKAGE ...: names all Debian packages that are missing, in one command.
need() {
  local missing=()
  while [ $# -gt 0 ]; do
    command -v "$1" > /dev/null || missing+=("$2")
    shift 2
  done
  [ ${#missing[@]} -eq 0 ] && return
  echo "missing on this machine; on Debian 12: apt-get install ${missing[*]}" >&2
  exit 1
}

# A virtual environment with the tools; made again when the list changes.
make_tools() {
  local stamp="$tools/.$(echo "$nanobind" | cat cross/requirements.txt - | sha256sum | cut -c1-16)"
  test -e "$stamp" && return
  rm -rf "$tools"
  "${PYTHON:-python3}" -m venv "$tools"
  "$tools/bin/pip" install --quiet -r cross/requirements.txt "nanobind==$nanobind"
  touch "$stamp"
}

# fetch FOLDER "PLATFORM ..." REQUIREMENT ...: wheels for another machine, once.
fetch() {
  local folder="$1" platforms=() platform
  for platform in $2; do platforms+=(--platform "$platform"); done
  shift 2
  local stamp="$folder/.$(echo "${platforms[*]} $*" | sha256sum | cut -c1-16)"
  test -e "$stamp" && return
  rm -rf "$folder"
  mkdir -p "$folder"
  "$tools/bin/pip" download --quiet --dest "$folder" "${platforms[@]}" --python-version 3.11 \
    --only-binary=:all: --no-deps "$@"
  touch "$stamp"
}
