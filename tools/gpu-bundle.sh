#!/usr/bin/env bash
# Builds what tools/gpu-check.sh runs on a machine with a GPU and without Rust: the program, and the tests that need a GPU.
# tools/gpu-bundle.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
bundle=${1:-target/gpu-bundle}

rm -rf "$bundle"
mkdir -p "$bundle/tests"
cargo build --release --locked -p dibit
cp target/release/dibit "$bundle/dibit"
cargo test --release --locked -p dibit-cuda --features gpu-tests --no-run --message-format json |
    sed -n 's/.*"name":"\([a-z_]*\)".*"test":true.*"executable":"\([^"]*\)".*/\1 \2/p' |
    while read -r name path; do
        cp "$path" "$bundle/tests/$name"
    done
strip "$bundle/dibit" "$bundle"/tests/*
du -sh "$bundle"
