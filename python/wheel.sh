#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# wheel.sh PYTHON FOLDER: builds the wheel to give away, with OpenMP inside, and audits it.
#
# PYTHON's environment has tests/python/requirements.txt. What is compiled stands in build/wheel.
# The wheel runs on Linux of this machine's glibc and later, on any Python from 3.9 on.
set -euo pipefail
python=$1 folder=$(realpath "$2")
cd "$(dirname "$0")/.."
PATH=$(dirname "$(realpath -s "$python")"):$PATH
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-315532800} # 1980, where the time of zip begins

plain=$(mktemp -d)
trap 'rm -r "$plain"' EXIT
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir "$plain" .
rm -f "$folder"/sparge-*.whl
{
    auditwheel repair --wheel-dir "$folder" "$plain"/sparge-*.whl
    abi3audit --strict "$folder"/sparge-*.whl
} >"$plain"/log 2>&1 || { cat "$plain"/log >&2; exit 1; }
