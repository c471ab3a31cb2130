#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# test.sh: installs what is missing, builds, tests.
#   ./test.sh              what is quick: gcc, the form of the sources, a part under the sanitizers
#   ./test.sh all          everything: dev (gcc), clang, asan (address and undefined sanitizers), tsan
#                          (threads), and torch; emulated processors and reproducible builds in dev
#   ./test.sh cpu          the quick tests of a folder, built by gcc: api (of sparge.h), common, ref,
#                          cpu, gpu, cuda_model, methods, tune, tools, experiments, install, form,
#                          python
#   ./test.sh dev asan     everything in these builds
#   ./test.sh torch        what is for torch, in an environment with it: the package, the recorder of
#                          models
#   ./test.sh planted      plants the bugs of tests/planted, which the tests must see; half an hour
#   ./test.sh --deps       installs and stops
set -euo pipefail
cd "$(dirname "$0")"
. .ci/install.sh

case "${1:-}" in
-h | --help) sed -n '3,14s/^# //p' "$0"; exit ;;
esac

builds=(dev clang asan tsan torch)
folders=(api common ref cpu gpu cuda_model methods tune tools experiments install form python)
words=" ${builds[*]} ${folders[*]} planted "
case "$*" in
"" | all | --deps) ;;
*)
    for word in "$@"; do
        [[ $words == *" $word "* ]] || {
            echo "test.sh: there is no '$word'; there are all,$(printf ' %s,' $words | sed 's/,$//')" >&2
            exit 2
        }
    done
    ;;
esac
case "$*" in
"") echo "At most 10 minutes on two idle cores, and at first 5 more to build; ./test.sh all takes 40" ;;
all) echo "At most 40 minutes on two idle cores, and at first 10 more to build" ;;
esac

need_packages "${compiler_packages[@]}" "${python_packages[@]}" g++ clang locales libclang-rt-14-dev \
    libomp-14-dev libdnnl-dev libcriterion-dev clang-format "${emulator_packages[@]}"
need_python experiments/requirements.txt
need_python tests/python/requirements.txt build/python-venv
[ "$*" = --deps ] && exit

# prepare BUILD [TARGET...]: configured, and built, whole where no targets are given
prepare() {
    local build=$1 log=build/$1.configure.log
    cmake --preset "$build" >"$log" || { cat "$log"; exit 1; }
    cmake --build --preset "$build" ${2:+--target "${@:2}"}
}

# folder NAME: its quick tests, and before them what they take
folder() {
    local targets=(tests/"$1"/all)
    case $1 in
    gpu | tools | experiments) targets+=(tools/all experiments/lm/all tests/cuda_model/all) ;;
    python) targets+=(tools/all) ;;
    install) targets=(tools/all experiments/lm/all sparge_shared sparge_static) ;;
    esac
    prepare dev "${targets[@]}"
    ctest --preset dev -L "^$1\$" -LE slow
}

# with_torch: the package in an environment of its own, by pytest, and the recorder
with_torch() {
    local python=$PWD/build/torch-venv/bin/python
    need_python tests/python/requirements-torch.txt build/torch-venv ||
        { echo "skipped: its packages cannot be installed here"; return; }
    prepare dev tools/all
    tests/python/wheel.sh "$PWD" "$python"
    SPARGE_PROGRAM=build/dev/tools/sparge \
        "$python" -m pytest tests/python/torch tests/python/test_{process,readme,tour}.py
    "$python" tests/experiments/recorder.py build/dev/tools/sparge
}

# whole BUILD [OPTION...]: all its tests, but for what the options of ctest leave out
whole() {
    if [ "$1" = torch ]; then
        with_torch
    else
        prepare "$1"
        ctest --preset "$@"
    fi
}

quick=()
case "$*" in
"") set -- dev asan tsan; quick=(-LE slow) ;;
all) set -- "${builds[@]}" ;;
esac
for word in "$@"; do
    echo "== $word"
    if [[ " ${builds[*]} " == *" $word "* ]]; then
        whole "$word" "${quick[@]}"
    elif [ "$word" = planted ]; then
        build/venv/bin/python tests/planted/run.py
    else
        folder "$word"
    fi
done
echo "test.sh: fine, after $((SECONDS / 60)) min $((SECONDS % 60)) s"
