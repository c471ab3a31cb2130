#!/usr/bin/env bash
# test.sh: installs what is missing, builds, runs every test.
#   ./test.sh              all presets: dev (gcc), clang, asan (address and undefined sanitizers), tsan (threads), and hook
#   ./test.sh dev          the named presets alone
#   ./test.sh hook         the recorder of PyTorch models, in an environment with torch; with the program that dev built
#   ./test.sh --deps       installs and stops
set -euo pipefail
cd "$(dirname "$0")"
. .ci/install.sh

case "${1:-}" in
-h | --help) sed -n '2,6s/^# //p' "$0"; exit ;;
esac

presets=(dev clang asan tsan hook)
[ "$*" = --deps ] || for word in "$@"; do
    case " ${presets[*]} " in
    *" $word "*) ;;
    *) echo "test.sh: there is no preset '$word'; there are $(printf '%s, ' "${presets[@]}" | sed 's/, $//')" >&2; exit 2 ;;
    esac
done

need_packages "${compiler_packages[@]}" "${python_packages[@]}" g++ clang locales libclang-rt-14-dev \
    libomp-14-dev libdnnl-dev libcriterion-dev "${emulator_packages[@]}"
need_python experiments/requirements.txt
[ "${1:-}" = --deps ] && exit

[ $# -eq 0 ] && set -- "${presets[@]}"
for preset in "$@"; do
    echo "== $preset"
    if [ "$preset" = hook ]; then
        if need_python experiments/capture/requirements-hook.txt build/hook-venv; then
            build/hook-venv/bin/python tests/experiments/hook.py build/dev/tools/sparge
        else
            echo "skipped: its packages cannot be installed here"
        fi
        continue
    fi
    cmake --preset "$preset" >build/"$preset".configure.log || { cat build/"$preset".configure.log; exit 1; }
    cmake --build --preset "$preset"
    ctest --preset "$preset"
done
