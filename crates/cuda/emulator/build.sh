#!/bin/sh
# build.sh DIR: builds the emulator's libcuda, libnvrtc and libcublasLt into DIR, unless they are up to date.
set -e
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 1 ] || { echo "usage: build.sh DIR" >&2; exit 2; }
mkdir -p "$1/include"
into=$(cd "$1" && pwd)
headers="shape.h emulate.h fiber.h warp.h arithmetic.h launch.h"
state=$(cd "$here" && cat *.h *.cpp build.sh | sha256sum | cut -c1-64)
[ "$(cat "$into/state" 2>/dev/null)" = "$state" ] && exit 0
# A number for the version of NVRTC, by which compiled kernels are kept.
number=$((0x$(cd "$here" && cat $headers nvrtc.cpp | sha256sum | cut -c1-7)))
(cd "$here" && cp $headers "$into/include")
flags="-O2 -std=c++17 -Wall -fPIC -shared -mavx2 -mf16c -mfma -pthread "
cd "$here"
g++ $flags driver.cpp stream.cpp memory.cpp -Wl,-soname,libcuda.so.1 -ldl -o "$into/libcuda.so.1"
ln -sf libcuda.so.1 "$into/libcuda.so"
g++ $flags -DHEADERS_HASH=$number nvrtc.cpp -Wl,-soname,libnvrtc.so.13 -ldl -o "$into/libnvrtc.so.13"
ln -sf libnvrtc.so.13 "$into/libnvrtc.so"
g++ $flags cublaslt.cpp -Wl,-soname,libcublasLt.so.13 -L"$into" -lcuda -o "$into/libcublasLt.so.13"
ln -sf libcublasLt.so.13 "$into/libcublasLt.so"
echo "$state" > "$into/state"
