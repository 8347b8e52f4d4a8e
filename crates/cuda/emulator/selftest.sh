#!/bin/sh
# Tests the emulator, first what a C++ program includes, then the driver.
set -e
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
g++ -O2 -std=c++17 -Wall -Wno-unknown-pragmas -mavx2 -mf16c -mfma -ffp-contract=off -I "$here" \
    "$here/selftest.cpp" -o "$work/selftest" -pthread
for order in forward reverse random; do
    echo "order $order"
    CUDA_EMULATE_ORDER=$order "$work/selftest"
done
ulimit -c 0
for failure in stuck divergent beyond deep nowhere; do
    if ("$work/selftest" $failure) 2>"$work/message"; then
        echo "FAIL $failure was not noticed"
        exit 1
    fi
    grep -q "CUDA emulator: kernel $failure" "$work/message" || { cat "$work/message"; echo "FAIL $failure"; exit 1; }
    echo "ok   $failure is reported: $(sed -n '1p;2p' "$work/message" | tr '\n' ' ')"
done

"$here/build.sh" "$work/lib"
g++ -O1 -std=c++17 -Wall "$here/selftest_driver.cpp" -o "$work/driver" -L"$work/lib" -lcuda -lnvrtc -lcublasLt
export LD_LIBRARY_PATH="$work/lib" DIBIT_EMULATE_MEMORY=1000000 TMPDIR="$work"
headers="$here/../kernels/prelude.cuh $here/../kernels/layout.cuh"
"$work/driver" $headers
if ("$work/driver" $headers stray) >"$work/output" 2>"$work/message"; then
    echo "FAIL a write beyond memory was not noticed"
    exit 1
fi
echo "ok   a write beyond memory is reported: $(cat "$work/message")"
