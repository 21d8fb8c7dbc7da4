#!/bin/sh
# Builds agx_static in a Debian trixie tree, from `apt-get source mesa`. As root; about 10 minutes
# on two cores, 3 GB. usage: build.sh FOLDER
set -e
here=$(cd "$(dirname "$0")" && pwd)
root=$(realpath -m "$1")
mirror=${MIRROR:-$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d 2>/dev/null | head -1 | tr -d " ")} # the mirror that apt uses here
jobs=${JOBS:-2}

if [ ! -x "$root/usr/bin/apt-get" ]; then
  tools=$root.debootstrap # unpacked, not installed
  mkdir -p "$tools"
  (cd "$tools" && apt-get download debootstrap && dpkg -x debootstrap_*.deb .)
  DEBOOTSTRAP_DIR=$tools/usr/share/debootstrap nice -n 19 "$tools/usr/sbin/debootstrap" \
    --variant=minbase --include=ca-certificates trixie "$root" "$mirror"
fi
echo "deb-src $mirror trixie main" > "$root/etc/apt/sources.list.d/src.list"
cp /etc/resolv.conf "$root/etc/resolv.conf"
mkdir -p "$root/proto"
cp "$here/agx_static.c" "$here/link.sh" "$root/proto/"

cat > "$root/proto/inside.sh" <<'END'
set -e
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
apt-get update -q
apt-get install -y -q --no-install-recommends gcc g++ meson ninja-build python3-mako python3-yaml \
  python3-packaging python3-ply llvm-19 llvm-19-dev clang-19 libclang-19-dev libclang-cpp19-dev \
  libclc-19 libclc-19-dev libllvmspirvlib-19-dev llvm-spirv-19 spirv-tools spirv-headers bison \
  flex pkgconf libdrm-dev zlib1g-dev libzstd-dev libexpat1-dev glslang-tools dpkg-dev
mkdir -p /src
cd /src
ls -d mesa-*/ > /dev/null 2>&1 || apt-get source -q mesa
cd mesa-*/
# The gallium driver is only configured, so that src/asahi is; b_ndebug=false keeps the assertions
# that tell when the compiler meets what it cannot do.
[ -f /build/build.ninja ] || meson setup /build -Dbuildtype=release -Db_ndebug=false \
  -Dplatforms= -Dgallium-drivers=asahi -Dvulkan-drivers= -Dtools=asahi -Dmesa-clc=enabled \
  -Dglx=disabled -Degl=disabled -Dgbm=disabled -Dopengl=false -Dgles1=disabled -Dgles2=disabled \
  -Dllvm=enabled -Dshared-llvm=enabled -Dzstd=disabled -Dvideo-codecs= -Dxmlconfig=disabled \
  -Dexpat=disabled -Dlibunwind=disabled -Dlmsensors=disabled
ninja -j$1 -C /build src/asahi/clc/asahi_clc
sh /proto/link.sh
END
nice -n 19 chroot "$root" sh /proto/inside.sh "$jobs"
ls -l "$root/proto/agx_static"
