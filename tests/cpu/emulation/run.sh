#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# run.sh [-m MODEL] [-t SECONDS] PROGRAM [ARGUMENT...]
# Runs a single-threaded program linked with -static -no-pie on an emulated CPU: Bochs, and the
# monitor beside this file in place of an operating system. Prints what the program prints and exits
# as it exits; 139: it faulted (the vector is printed), 124: it did not exit in time, 126: it cannot
# be loaded, 127: no Bochs here.
# MODEL: corei7_icelake_u (AVX-512 VNNI; the default), corei7_haswell_4770 (AVX2), sapphire_rapids
# (AVX-VNNI; Bochs 3), others by `bochs --help cpu`.
set -euo pipefail

model=corei7_icelake_u seconds=120
while getopts m:t: option; do
    case $option in
    m) model=$OPTARG ;;
    t) seconds=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || { sed -n '2s/^# /usage: /p' "$0" >&2; exit 2; }
program=$(realpath "$1")
shift
command -v bochs >/dev/null || { echo "not on this machine: bochs is not installed" >&2; exit 127; }

here=$(dirname "$(readlink -f "$0")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# The ROM: the monitor with the program and its arguments inside. ips, the instructions in a second of
# the emulated clock, are few, so that the emulated serial ports, which carry the output, are fast.
strip -o program "$program" || exit 126
: >arguments
for argument in "$(basename "$program")" "$@"; do printf '%s\0' "$argument" >>arguments; done
gcc -O1 -Wall -Wextra -ffreestanding -fno-stack-protector -fcf-protection=none -fno-pie \
    -mno-red-zone -mgeneral-regs-only -c "$here/monitor.c" "$here/boot.S" || exit 126
# The ROM holds 1.9 MB; a larger program shows as sections that overlap.
ld -T "$here/link.ld" -z noexecstack --oformat binary -o rom boot.o monitor.o || exit 126

cat >bochsrc <<R
display_library: term
romimage: file=rom
vgaromimage: file=vgarom
vga: extension=none
plugin_ctrl: unmapped=true, serial=true
memory: guest=256, host=256
cpu: model=$model, count=1, ips=20000000, reset_on_triple_fault=0
clock: sync=none, time0=local
com1: enabled=1, mode=file, dev=stdout
com2: enabled=1, mode=file, dev=stderr
com3: enabled=1, mode=file, dev=status
log: log
panic: action=fatal
R
echo continue >commands
truncate -s 512 vgarom # Bochs insists on one
: >stdout
: >stderr
: >status
# Bochs ends with 1 whatever happened, and does not heed SIGTERM.
{
    TERM=vt100 timeout -s KILL "$seconds" bochs -q -f bochsrc -rc commands </dev/null >screen 2>&1 || true
} 2>/dev/null
cat stdout
cat stderr >&2
status=$(od -An -tu1 status | tr -d ' ')
if [ -z "$status" ]; then
    echo "run.sh: no exit seen in $seconds s with model $model" >&2
    grep -hs 'PANIC' screen log | sort -u >&2 || true
    exit 124
fi
exit "$status"
