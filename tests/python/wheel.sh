#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# wheel.sh ROOT PYTHON [again]: builds the wheel, looks at what it holds and installs it in PYTHON's
# environment, without a network. `again`: builds one more from the sdist, in another folder, which
# must be the same bytes.
set -euo pipefail
cd "$1"
python=$2
bin=$(dirname "$python")
folder=build/wheel/dist
mkdir -p "$folder"
python/wheel.sh "$python" "$folder"
wheel=$(echo "$folder"/sparge-*.whl)

held=$(mktemp -d)
trap 'rm -r "$held"' EXIT
"$python" -m zipfile -e "$wheel" "$held"

# Python files, one module, its OpenMP, licences and what describes it; nothing of this machine.
others=$(cd "$held" && find . -type f | grep -vxE -e '[.]/sparge/([a-z_]+[.]py|py[.]typed)' \
    -e '[.]/sparge/_sparge[.]abi3[.]so' -e '[.]/sparge[.]libs/libgomp-[0-9a-f]+[.]so[.0-9]*' \
    -e '[.]/sparge-[0-9.]+[.]dist-info/(METADATA|WHEEL|RECORD|sboms/auditwheel[.]cdx[.]json)' \
    -e '[.]/sparge-[0-9.]+[.]dist-info/licenses/(LICENSE|LICENSES/libgomp[.]txt)' || true)
[ -z "$others" ] || { echo "the wheel holds $others"; exit 1; }
[[ $wheel == *-cp39-abi3-manylinux_*_x86_64.whl ]] || { echo "it is $wheel"; exit 1; }
[ "$(stat -c %s "$wheel")" -lt 2000000 ] || { echo "it has $(stat -c %s "$wheel") bytes"; exit 1; }
if grep -rlF -e "$PWD" -e "$HOME/" "$held" || grep -rlFw "$(uname -n)" "$held"/*.dist-info; then
    echo "these hold a path of this machine, or its name"
    exit 1
fi
# A second OpenMP may take the names of the first only whole: GCC 6 has all that are used.
if readelf --version-info "$held"/sparge/_sparge.abi3.so | grep -oE 'Name: G?OMP_[0-9.]+' |
    grep -vE ' (OMP_1[.]0|GOMP_1[.]0|GOMP_4[.]0|GOMP_4[.]5)$'; then
    echo "libgomp of GCC 6 does not have these versions of its names"
    exit 1
fi

if [ "${3:-}" = again ]; then
    other=$held/another/folder
    mkdir -p "$other"
    "$python" -c "import os, scikit_build_core.build as b; b.build_sdist('$held')"
    tar -xf "$held"/sparge-*.tar.gz -C "$other"
    "$other"/sparge-*/python/wheel.sh "$python" "$held"
    cmp "$wheel" "$held"/sparge-*.whl && exit
fi
if ! cmp -s "$wheel" "$bin"/../installed.whl; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
        --force-reinstall "$wheel"
    cp "$wheel" "$bin"/../installed.whl
fi
