#!/usr/bin/env bash
# Fetches NVIDIA's run-time compiler, without a driver or a GPU: tools/nvrtc.sh FOLDER. Prints the folder of its libraries.
set -euo pipefail
folder=${1:?name a folder}
version=13.0.88

if ! ls "$folder"/nvidia/cu13/lib/libnvrtc.so.13 >/dev/null 2>&1; then
    python3 -m pip download --quiet --no-deps --only-binary :all: --platform manylinux2010_x86_64 \
        --platform manylinux2014_x86_64 --dest "$folder" "nvidia-cuda-nvrtc==$version" >&2
    python3 -c 'import sys, zipfile, glob
[zipfile.ZipFile(path).extractall(sys.argv[1]) for path in glob.glob(sys.argv[1] + "/nvidia_cuda_nvrtc-*.whl")]' "$folder"
fi
realpath "$folder/nvidia/cu13/lib"
