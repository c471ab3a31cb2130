#!/usr/bin/env bash
# on_gpu.sh: everything worth knowing from nine minutes on a machine with an H200, what tells most first.
#   OUT=folder gpu/on_gpu.sh     builds, tests, measures; log.txt, on_gpu.csv and more in OUT (gpu/results)
#   gpu/on_gpu.sh build          compiles only
# Needs nvcc, gcc, CMake, make, python3; compares with torch where python3 has it. No network. Each step is
# a process of its own under a time limit, and none stops the next: one that crashes or hangs is a line.
# BIN=folder takes the programs from there and builds nothing; LIMIT is all the time there is, in seconds.
set -u

case "${1:-}" in
-h | --help) sed -n '2,7s/^# //p' "$0"; exit ;;
"" | build) ;;
*) echo "on_gpu.sh: unknown argument '$1', see gpu/on_gpu.sh --help" >&2; exit 2 ;;
esac

began=$(date +%s)
limit=${LIMIT:-530}
to_build=150
[ "${1:-}" != build ] || { limit=3600 to_build=3600; }
seed=${SEED:-$((began % 1000000))}
out=${OUT:-$(dirname "$0")/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
bin=${BIN:+$(cd "$BIN" && pwd)}
cd "$(dirname "$0")/.." || exit 1
log=$out/log.txt
table=$out/on_gpu.csv
left_out=()

say() { echo "$*" | tee -a "$log"; }
left() { echo $((limit - $(date +%s) + began)); }

# What a status means, in words.
meaning() {
    case $1 in
    0) echo "ok" ;;
    77) echo "not possible on this machine" ;;
    124 | 137 | 142) echo "HANGS or is too slow: stopped" ;;
    126 | 127) echo "is not there" ;;
    *) [ "$1" -gt 128 ] && echo "CRASHED with signal $(($1 - 128))" || echo "FAILED with status $1" ;;
    esac
}

# step NAME SECONDS COMMAND...: the command, at most that long and at most as long as there is time. What it
# prints is in the log and in OUT/NAME.txt; a line of on_gpu.csv says how it ended. Returns its status.
step() {
    local name=$1 most=$2 status start t
    shift 2
    t=$(left)
    if [ "$t" -lt 5 ]; then
        left_out+=("$name: no time")
        echo "step $name,,no time," >>"$table"
        return 1
    fi
    [ "$t" -gt "$most" ] && t=$most
    start=$(date +%s)
    say "== $name"
    timeout -k 3 "$t" "$@" </dev/null >"$out/$name.txt" 2>&1
    status=$?
    tail -n 400 "$out/$name.txt" | tee -a "$log"
    say "-- $name: $(meaning $status) ($(($(date +%s) - start)) s)"
    echo "step $name,$status,exit status,0" >>"$table"
    [ $status -eq 0 ] || [ $status -eq 77 ] || left_out+=("$name: $(meaning $status)")
    return $status
}

device_state() {
    local asked=name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu
    say "device: $(timeout 10 nvidia-smi --format=csv,noheader --query-gpu=$asked 2>&1 | head -n 1)"
}

build() {
    local jobs
    jobs=$(nproc)
    cmake -S . -B build/gpu -G "Unix Makefiles" -DCMAKE_BUILD_TYPE=Release \
        -DSPARGE_TOOLS=OFF -DSPARGE_TESTS=OFF -DSPARGE_CUDA=ON -DSPARGE_GPU_CHECKS=ON || return
    # -k: one program that does not compile leaves the others
    cmake --build build/gpu --parallel "$jobs" -- -k
}
export -f build

# ---- Build ----

: >"$log"
echo "what,value,unit,expected" >"$table"
if [ -z "$bin" ]; then
    step build "$to_build" bash -c build
    built=$?
    bin=build/gpu
else
    built=0
fi
probes=$bin/gpu/probes
ceilings=$bin/gpu/ceilings
test_gpu=$bin/tests/gpu/test_gpu
library=$bin/libsparge.so
if [ "${1:-}" = build ]; then
    for file in "$probes" "$ceilings" "$test_gpu" "$library"; do
        [ -e "$file" ] || { say "$file was not built"; built=1; }
    done
    exit $built
fi

# ---- Is it right? ----

device_state
say "commit $(git describe --always --dirty 2>/dev/null || echo unknown), seed $seed"
step probes 40 "$probes"
status=$?
if [ $status -gt 1 ] && [ $status -ne 77 ] && [ -x "$probes" ]; then # one took the others down
    for name in $("$probes" --list); do
        step "probe_$name" 8 "$probes" "$name"
    done
fi
step test_gpu 120 "$test_gpu" --seed "$seed" --limit 110

# ---- How fast is it? ----

device_state
rm -f "$out"/ceilings.* "$out"/results*.csv
step ceilings 40 "$ceilings"
# what there is of it, if it did not come to its end
grep -E '^[a-z0-9_]+,[^,]*,[^,]*,' "$out/ceilings.txt" >"$out/ceilings.csv" 2>/dev/null
tail -n +2 "$out/ceilings.csv" >>"$table"
device_state
measure() { # NAME SECONDS OPTIONS...
    local name=$1 most=$2
    shift 2
    [ "$most" -gt $(($(left) - 5)) ] && most=$(($(left) - 5))
    step "$name" "$most" python3 experiments/gpu_speed/run.py --library "$library" --out "$out" \
        --ceilings "$out/ceilings.csv" --limit $((most - 10)) "$@"
}
measure speed 230 ${RUN_OPTIONS:-}
case $? in
9 | 124 | 137 | 142) # what hung or lost the device has left its rows; the lower rungs are asked alone
    mv "$out/results.csv" "$out/results_until_then.csv" 2>/dev/null
    measure speed_rungs_1_to_4 60 --kernels 1,2,3,4 ${RUN_OPTIONS:-}
    ;;
esac
for file in "$out"/results*.csv; do
    [ -e "$file" ] && awk -F, 'NR > 1 { printf "%s %s %s D %s N %s causal %s sparsity %s,%s,TOPS,\n",
        $1, $2, $3, $4, $5, $7, $8, $15 }' "$file" >>"$table"
done
device_state

# ---- What the sanitizer sees: hints, for it does not know all of wgmma and of bulk copies ----

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        step "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$test_gpu" --quick --seed "$seed" --limit 40
    done
else
    left_out+=("compute-sanitizer: not on this machine")
fi

# ---- The host ----

step lscpu 5 lscpu
for isa in avx512vnni avxvnni avx2; do # the cpu backend's kernels, bit for bit; 77: the host lacks it
    step "kernels_$isa" 20 "$bin/tests/gpu/test_kernels" --isa "$isa" --draws 2000 --seed "$seed"
done
if [ ${#left_out[@]} -eq 0 ]; then
    say "done in $(($(date +%s) - began)) s; nothing was left out"
else
    printf -v list '%s; ' "${left_out[@]}"
    say "done in $(($(date +%s) - began)) s; failed or left out: ${list%; }"
fi
[ ${#left_out[@]} -eq 0 ]
