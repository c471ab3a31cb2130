#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# planted.sh: bugs of timing in kernel 5, planted one at a time, that the tests must not miss: what the model's
# late modes are for (README.md here has the whole table).
#
#     planted.sh ROOT COMPILER OBJECTS...
#
# OBJECTS: those of test_gpu on the model, and libraries; whatever is called *5_hopper* is left out, and of
# a library the planted object comes first.
set -u
root=$1 compiler=$2
shift 2
objects=()
for o in "$@"; do
    [[ $o == *5_hopper* ]] || objects+=("$o")
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
missed=0

# plant NAME FILE OLD NEW: the first place of gpu/FILE that reads OLD becomes NEW; OLD is a text, not a
# pattern. Widths other than 64 are left out, to be compiled sooner.
plant()
{
    mkdir -p "$work/gpu"
    cp "$root"/gpu/5_* "$work/gpu/"
    if ! OLD=$3 NEW=$4 perl -0pi -e 's/\Q$ENV{OLD}\E/$ENV{NEW}/ or $bad = 1; END { exit $bad }' "$work/gpu/$2"; then
        echo "no such text: $1"
        missed=1
        return
    fi
    perl -0pi -e 's/at_width\(w, queue\)/queue(std::integral_constant<int, 64>())/' "$work/gpu/5_hopper.cu"
    "$compiler" -std=c++17 -x c++ -O1 -w -ffp-contract=off -I"$work" -I"$root" -I"$root/tests/cuda_model" \
        -c "$work/gpu/5_hopper.cu" -o "$work/planted.o" &&
        "$compiler" "$work/planted.o" "${objects[@]}" -o "$work/test_gpu" -lm || exit 2
    timeout 60 "$work/test_gpu" --quick --first --limit 50 kernel_5_as_late > "$work/log" 2>&1
    local status=$?
    if [ "$1" = nothing ]; then
        [ $status = 0 ] && return
        cat "$work/log"
        echo "fails without a bug"
        exit 1
    fi
    if [ $status = 0 ]; then
        echo "MISSED  $1"
        missed=1
    else
        echo "caught  $1"
    fi
}

plant nothing 5_hopper.cu 'wgmma_wait<1>();' 'wgmma_wait<1>();'
plant 'scores read without wgmma_wait' 5_hopper.cu 'wgmma_wait<1>();' ''
plant 'wgmma_wait<1> made <2>' 5_hopper.cu 'wgmma_wait<1>();' 'wgmma_wait<2>();'
plant 'V given back before its wait' 5_hopper.cu 'wgmma_wait<0>();
        add_pv<LAMBDA>(t, before.at(), x, f);' 'add_pv<LAMBDA>(t, before.at(), x, f);
        wgmma_wait<0>();'
plant 'v_full announces half of its bytes' 5_hopper.cu 'blocks * v_bytes' 'v_bytes'
plant 'no wait on k_full' 5_hopper.cu 'barrier_wait(&t.k_full[stage.at()], stage.parity());' ''
plant 'no wait on v_full' 5_hopper.cu 'barrier_wait(&t.v_full[before.at()], before.parity());' ''
plant 'phase not flipped' 5_stage.h 'return n / LENGTH % 2;' 'return 0;'
plant 'one warp too few at v_empty' 5_hopper.cu 'barrier_init(&t.v_empty[n], CONSUMER_WARPS);' \
    'barrier_init(&t.v_empty[n], CONSUMER_WARPS - 1);'
exit $missed
