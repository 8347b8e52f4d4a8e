#!/bin/sh
# Tests attention by tiles in the emulator, in each of its orders of threads.
set -e
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for head_dim in 64 80 96 112 128 256; do
    g++ -O2 -std=c++17 -Wall -Wno-unknown-pragmas -mavx2 -mf16c -mfma -ffp-contract=off -DHEAD_DIM=$head_dim -I "$here/.." \
        "$here/tiles.cpp" -o "$work/tiles" -pthread
    for order in ${ORDERS:-forward reverse random}; do
        CUDA_EMULATE_ORDER=$order "$work/tiles"
    done
done
