#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# form.sh ROOT [--fix]: clang-format on C and CUDA, ruff on Python, lines of at most 100 columns
# there and in Markdown, and an SPDX line in each source. --fix formats C and CUDA, and sorts the
# imports of Python, in place.
set -euo pipefail
cd "$1"
fix=${2:-}
failed=0

mapfile -t c < <(git ls-files -c -o --exclude-standard '*.c' '*.h' '*.cc' '*.cu' '*.cuh')
mapfile -t text < <(git ls-files -c -o --exclude-standard '*.py' '*.md')
[ ${#c[@]} -gt 100 ] && [ ${#text[@]} -gt 50 ]
ruff=build/venv/bin/ruff

if [ "$fix" = --fix ]; then
    clang-format -i "${c[@]}"
    "$ruff" check --quiet --fix || failed=1
else
    clang-format --dry-run -Werror "${c[@]}" || failed=1
    "$ruff" check --quiet --output-format concise || failed=1
fi
# A table of Markdown cannot be broken: its rows begin with |.
export LC_ALL=C.UTF-8
long=$(grep -nE '^.{101}' "${c[@]}" "${text[@]}" |
    grep -vE '[.]md:[0-9]+: *[|]|# noqa: E402$' || true)
if [ -n "$long" ]; then
    echo "longer than 100 columns:"
    cut -c 1-150 <<<"$long"
    failed=1
fi
mapfile -t sources < <(git ls-files -c -o --exclude-standard | grep -v '/corpus/' |
    grep -E '[.](c|h|cc|cu|cuh|S|ld|py|sh|cmake)$|CMakeLists.txt$|^[.]ci/')
without=$(grep -L 'SPDX-License-Identifier: Apache-2.0' "${sources[@]}" || true)
if [ -n "$without" ]; then
    printf 'without an SPDX line:\n%s\n' "$without"
    failed=1
fi
exit $failed
