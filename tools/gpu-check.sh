#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests, compute-sanitizer, greedy text against the CPU, a bench.
# tools/gpu-check.sh BUNDLE [MODEL] runs what tools/gpu-bundle.sh built, on a model (the bundled one where none is named).
set -uo pipefail
cd "$(dirname "$0")/.."
bundle=${1:?name the folder that tools/gpu-bundle.sh wrote}
model=(${2:+--model "$2"})
dibit=$bundle/dibit
failed=0

step() {
    local name=$1
    shift
    if "$@"; then echo "ok: $name"; else
        echo "FAILED: $name"
        failed=1
    fi
}

same_text() {
    local prompt="The history of the town begins with" kv=$1
    diff <("$dibit" generate "${model[@]}" --dtype f32 --kv "$kv" --device cpu --temperature 0 --max-tokens 64 "$prompt") \
        <("$dibit" generate "${model[@]}" --dtype f32 --kv "$kv" --device cuda --temperature 0 --max-tokens 64 "$prompt")
}

"$dibit" inspect --device cuda "${model[@]}"
for test in "$bundle"/tests/*; do
    step "$(basename "$test")" "$test" --test-threads 1
done
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        for test in "$bundle"/tests/*; do
            step "$tool of $(basename "$test")" compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 5 \
                "$test" --test-threads 1 sanitized
        done
    done
else
    echo "skipped: compute-sanitizer was not found"
fi
for kv in fp16 kivi kvlinc dibit; do
    step "greedy text with $kv" same_text "$kv"
done
step "bench attention" "$dibit" bench attention --device cuda
exit $failed
