#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# instructions.sh OBJECT...: which instructions the shipped objects of cpu/ hold. Each instruction set stays
# in its own file; a wide instruction anywhere else would be executed on machines that lack it.
set -euo pipefail

failed=0
complain() {
    echo "$1"
    failed=1
}

# An EVEX instruction shows by its first byte, 62, whatever registers it names; 26 to 67 are prefixes.
evex=$'^ +[0-9a-f]+:\t((26|2e|36|3e|64|65|67) )*62 '
seen=
for object in "$@"; do
    code=$(objdump -d -w --insn-width=16 "$object")
    has() { grep -qE -- "$1" <<<"$code"; }
    has '^ +[0-9a-f]+:' || complain "$object: holds no instructions"
    file=$(basename "$object")
    case $file in
    amx.*)
        for name in ldtilecfg tilerelease tileloadd tilestored tilezero tdpbsud tdpbf16ps; do
            has "$name" || complain "$object: no $name"
        done
        ;;
    avx512vnni.*)
        has 'vpdpbusd.*%zmm' || complain "$object: no vpdpbusd on zmm registers"
        has 'vdpbf16ps.*%zmm' || complain "$object: no vdpbf16ps on zmm registers"
        ;;
    avxvnni.*) has '\{vex\} vpdpbusd.*%ymm' || complain "$object: no {vex} vpdpbusd on ymm registers" ;;
    avx2.*) ! has 'vpdp(bu|w)s' || complain "$object: VNNI in an AVX2 file" ;;
    *) ! has '%ymm' || complain "$object: a ymm register in a file for every machine" ;;
    esac
    case $file in
    avx512vnni.* | amx.*) ;;
    *)
        ! has '%zmm' || complain "$object: a zmm register"
        ! has '%k[0-7]' || complain "$object: a mask register"
        ! has "$evex" || complain "$object: an EVEX instruction"
        ;;
    esac
    case $file in
    amx.*) ;;
    *) ! has 'tilecfg|tilerelease|%tmm' || complain "$object: tiles" ;;
    esac
    case $file in
    avx512vnni.*) ;;
    *) ! has 'v(dp|cvtne2?ps2)bf16' || complain "$object: AVX512-BF16" ;;
    esac
    seen="$seen ${file%%.*}"
done
for name in scalar dispatch avx2 avxvnni avx512vnni amx; do
    [[ "$seen " == *" $name "* ]] || complain "no object of $name.c among: $*"
done
exit $failed
