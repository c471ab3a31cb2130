#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# on_gpu.sh: what is worth knowing from nine minutes on a machine with an H200, what tells most first.
#   OUT=folder tests/gpu/on_gpu.sh     builds, tests, measures; log.txt, on_gpu.csv and more in OUT
#   tests/gpu/on_gpu.sh build          compiles only: build/gpu can be carried to the GPU
#   BIN=build/gpu tests/gpu/on_gpu.sh  takes the programs from there and builds nothing
#   BIN=build/dev tests/gpu/on_gpu.sh model  tries all of it at small sizes on the model of a GPU
# Needs nvcc, gcc, CMake and make, for the speeds libjansson and libcrypto, static; or BIN. Compares
# with torch if python3 has it. No network. Each step is a process of its own under a time limit, and
# none stops the next: one that crashes or hangs is a line. LIMIT is all the time there is, in seconds.
set -u

model=
case "${1:-}" in
-h | --help) sed -n '3,10s/^# //p' "$0"; exit ;;
"" | build) ;;
model) model=_model ;;
*) echo "on_gpu.sh: unknown argument '$1', see on_gpu.sh --help" >&2; exit 2 ;;
esac

began=$(date +%s)
limit=${LIMIT:-530}
to_build=150
[ "${1:-}" != build ] || { limit=3600 to_build=3600; }
seed=${SEED:-$((began % 1000000))}
out=${OUT:-$(dirname "$0")/../../gpu/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
bin=${BIN:+$(cd "$BIN" && pwd)}
cd "$(dirname "$0")/../.." || exit 1
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
    local jobs tools=OFF programs="instructions ceilings test_gpu test_kernels"
    jobs=$(nproc)
    if pkg-config --exists jansson libcrypto cairo libpcre2-8; then
        tools=ON programs+=" bench"
    else
        echo "no bench: it needs jansson, libcrypto, cairo and pcre2 to be built"
    fi
    cmake -S . -B build/gpu -G "Unix Makefiles" -DCMAKE_BUILD_TYPE=Release -DSPARGE_TOOLS=$tools \
        -DSPARGE_TESTS=OFF -DSPARGE_CUDA=ON -DSPARGE_GPU_CHECKS=ON || return
    # -k: one program that does not compile leaves the others
    cmake --build build/gpu --parallel "$jobs" --target $programs -- -k
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
instructions=$bin/tests/gpu/instructions$model
ceilings=$bin/tests/gpu/ceilings$model
test_gpu=$bin/tests/gpu/test_gpu$model
bench=$bin/tests/gpu/bench$model
if [ "${1:-}" = build ]; then
    for file in "$instructions" "$ceilings" "$test_gpu" "$bench"; do
        [ -e "$file" ] || { say "$file was not built"; built=1; }
    done
    exit $built
fi

# ---- Is it right? ----

device_state
say "commit $(git describe --always --dirty 2>/dev/null || echo unknown), seed $seed"
step instructions 40 "$instructions"
status=$?
if [ $status -gt 1 ] && [ $status -ne 77 ] && [ -x "$instructions" ]; then # one took the others down
    for name in $("$instructions" --list); do
        step "instruction_$name" 8 "$instructions" "$name"
    done
fi
step test_gpu 120 "$test_gpu" --seed "$seed" --limit 110 ${model:+--quick devices the_best_kernel}

# ---- How fast is it? ----

echo "$(device_state); commit $(git describe --always --dirty 2>/dev/null || echo unknown)" \
    >"$out/machine.txt"
rm -f "$out"/ceilings.* "$out"/speed_*.txt "$out"/torch_*.txt "$out/results.csv"
step ceilings 40 "$ceilings"
# what there is of it, if it did not come to its end
grep -E '^[a-z0-9_]+,[^,]*,[^,]*,' "$out/ceilings.txt" >"$out/ceilings.csv" 2>/dev/null
tail -n +2 "$out/ceilings.csv" >>"$table"

# Which kernels are right, each asked in a process of its own: one may crash or hang.
right=" "
size="--q-len 449 --dim 64,128"
[ -z "$model" ] || size="--q-len 200 --dim 64"
for kernel in 5:fp8 5:f16 4:f16 4:int8 3:int8 2:f32 1:f32; do
    step "check_${kernel/:/_}" 30 "$bench" bench --backend cuda --json --kernel "${kernel%:*}" \
        --pv-dtype "${kernel#*:}" $size --heads 2 --repeat 1 \
        --causal=none,end --sparsity 0,0.5 --mask-kind random,predicted && right+="$kernel "
done

# speed KERNEL:PV NAME OPTION...: rows of sparge bench; each a process, so that what hangs loses its own
speed() {
    local kernel=$1 name=$2
    shift 2
    case $right in *" $kernel "*) ;; *) left_out+=("speed of $kernel: not right"); return ;; esac
    [ -z "$model" ] || set -- "$@" --q-len 129 --heads 2
    step "speed_${kernel/:/_}_$name" 60 "$bench" bench --backend cuda --json --heads 32 --repeat 7 \
        --kernel "${kernel%:*}" --pv-dtype "${kernel#*:}" "$@"
}
torch() { # NAME OPTION...
    local name=$1
    shift
    step "torch_$name" 40 python3 experiments/gpu_speed/torch_sdpa.py "$@"
}
shares=0,0.3,0.5,0.7,0.9
best=${right# } best=${best%% *}
[ -z "$model" ] || shares=0,0.5,0.9
long="--q-len 32768 --dim 128" short="--q-len 8192 --dim 128" both="--mask-kind random,predicted"
speed 5:fp8 long $long --sparsity $shares $both
torch long $long
speed 4:f16 long $long --sparsity 0,0.5,0.9
speed 5:f16 long $long --sparsity $shares
speed 3:int8 short $short --sparsity 0,0.5,0.9
torch short $short
speed 2:f32 4k --q-len 4096 --dim 128 --sparsity 0,0.5,0.9
speed 1:f32 2k --q-len 2048 --dim 128 --sparsity 0,0.5,0.9
speed 4:int8 long $long --sparsity 0,0.5,0.9
speed 5:fp8 causal $long --causal --sparsity $shares
torch causal $long --causal
speed 5:fp8 64 --q-len 32768 --dim 64 --sparsity $shares
torch 64 --q-len 32768 --dim 64
speed 5:fp8 short $short --sparsity $shares $both
torch flex $long --sparsity 0.5,0.9
speed "${best:-none}" longest --q-len 131072 --dim 128 --heads 8 --mask-kind predicted
for cell in 0 16 8; do # seconds_predict by blocks and by cells
    step "predict_cell_$cell" 40 "$bench" bench --backend cuda --json --heads 32 --repeat 7 $long \
        --mask-kind predicted --min-mass 0.2 --cell $cell ${model:+--q-len 129 --heads 2}
done
step table 20 python3 experiments/gpu_speed/table.py "$out"
[ -e "$out/results.csv" ] && awk -F, 'NR > 1 { printf "%s %s %s D %s N %s causal %s %s %s,%s,TOPS,\n",
    $1, $2, $3, $4, $5, $7, $8, $9, $13 }' "$out/results.csv" >>"$table"
device_state

# ---- What the sanitizer sees: hints, for it does not know all of wgmma and of bulk copies ----

if [ -n "$model" ]; then
    say "the model looks for mistakes itself"
elif command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        step "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$test_gpu" --quick --seed "$seed" --limit 40
    done
else
    left_out+=("compute-sanitizer: not on this machine")
fi

# ---- The host ----

step lscpu 5 lscpu
for isa in amx avx512vnni avxvnni avx2; do # the cpu backend's kernels, bit for bit; 77: the host lacks it
    [ -n "$model" ] ||
        step "kernels_$isa" 20 "$bin/tests/gpu/test_kernels" --isa "$isa" --draws 2000 --seed "$seed"
done
if [ ${#left_out[@]} -eq 0 ]; then
    say "done in $(($(date +%s) - began)) s; nothing was left out"
else
    printf -v list '%s; ' "${left_out[@]}"
    say "done in $(($(date +%s) - began)) s; failed or left out: ${list%; }"
fi
[ ${#left_out[@]} -eq 0 ]
