#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# reproducible.sh ROOT CMAKE CC: two builds in two folders install the same bytes.
set -euo pipefail

root=$1 cmake=$2 cc=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CCACHE_DISABLE=1 # it would compare an object with itself

mkdir -p "$work/one" "$work/another/and"
tar -C "$root" -c --exclude=./build --exclude=./.git --exclude='*.safetensors' . | tar -C "$work/one" -x
cp -r "$work/one" "$work/another/and/longer"
for folder in one another/and/longer; do
    "$cmake" -S "$work/$folder" -B "$work/$folder/out" -DSPARGE_TOOLS=ON -DCMAKE_C_COMPILER="$cc" \
        -DCMAKE_BUILD_TYPE=RelWithDebInfo >"$work/log" &&
        "$cmake" --build "$work/$folder/out" --parallel 2 >"$work/log" ||
        { cat "$work/log"; exit 1; }
    "$cmake" --install "$work/$folder/out" --prefix "$work/$folder/to" >"$work/log"
done
[ -s "$work/one/to/bin/sparge" ] # something was compared
diff -r "$work/one/to" "$work/another/and/longer/to"
