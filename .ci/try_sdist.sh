#!/usr/bin/env bash
# Unpacks a source distribution into an empty folder, installs it from there as a developer does, and runs its tests.
#
#   .ci/try_sdist.sh SDIST PYTHON "pip's arguments for torch" "those for transformers" [pytest arguments]
set -euo pipefail
sdist=$(realpath "$1") python=$2 torch=$3 transformers=$4
shift 4
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
pip --upgrade "pip>=24"
# shellcheck disable=SC2086
pip $torch
mkdir "$folder/source"
tar -xzf "$sdist" -C "$folder/source" --strip-components 1
cd "$folder/source"
GPTQ_BACKEND_CUDA=0 GPTQ_BACKEND_REQUIRE_NATIVE=1 pip --editable ".[transformers,test]" "$transformers"
"$folder/venv/bin/python" -m pytest -q --collect-only -m "" >"$folder/collected" || { cat "$folder/collected" && exit 1; }
tail -n 1 "$folder/collected"
"$folder/venv/bin/python" -m pytest -q "$@"
