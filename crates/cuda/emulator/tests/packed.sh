#!/bin/sh
# Tests attend_packed in the emulator, in each of its orders of threads.
set -e
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for macros in "-DHEAD_DIM=64 -DLATE_VALUES=1" "-DHEAD_DIM=128" "-DHEAD_DIM=128 -DLATE_VALUES=1" "-DHEAD_DIM=128 -DBIAS=1" "-DHEAD_DIM=128 -DINTEGER_KEYS=1 -DINTEGER_VALUES=1" "-DHEAD_DIM=64 -DKEY_PLANES=1 -DVALUE_COLUMNS=2" \
    "-DHEAD_DIM=128 -DBIAS=1 -DKEY_PLANES=1 -DVALUE_COLUMNS=3" "-DHEAD_DIM=128 -DVALUE_COLUMNS=3 -DINTEGER_VALUES=1" "-DHEAD_DIM=128 -DKEY_PLANES=1 -DLATE_VALUES=1" \
    "-DHEAD_DIM=64 -DPAGE_SINKS=1" "-DHEAD_DIM=128 -DBIAS=1 -DKEY_PLANES=1 -DVALUE_COLUMNS=3 -DPAGE_SINKS=1"; do
    g++ -O2 -std=c++17 -Wall -Wno-unknown-pragmas -mavx2 -mf16c -mfma -ffp-contract=off $macros -I "$here/.." \
        "$here/packed.cpp" -o "$work/packed" -pthread
    for order in ${ORDERS:-forward reverse random}; do
        CUDA_EMULATE_ORDER=$order "$work/packed"
    done
done
