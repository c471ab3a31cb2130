#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What ptxas gives every kernel: registers, shared memory, spills. `--check` keeps it from changing
unseen.

    gpu/resources.py                  sm_80 and sm_90 (kernel 5: sm_90a), printed
    gpu/resources.py --all --write    every architecture this nvcc has, into resources.csv
    gpu/resources.py --check          against resources.csv; no spill in 4_mma, 5_hopper, no wgmma
                                      serialised, no setmaxnreg ignored; 77: nvcc is not on this
                                      machine

Shared memory is what ptxas knows of; the dynamic part stands at each launch in the source. Another
version of nvcc gives other numbers: --check then compares nothing, but still looks for spills and
messages.
"""
import argparse
import csv
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

GPU = Path(__file__).resolve().parent
sys.path.insert(0, str(GPU.parent / "experiments"))
from harness import write_csv  # noqa: E402

TABLE = GPU / "resources.csv"
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-I."]  # as in CMakeLists.txt
CHECKED = ["sm_80", "sm_90"]
OTHERS = ["sm_86", "sm_89", "sm_100", "sm_120"]
HOPPER = {"5_hopper": "sm_90a"}  # instructions of this architecture alone
# Of tests/gpu, for sm_90a: looked at, but not in the table.
PROGRAMS = ["instructions", "language", "products", "ceilings"]
NO_SPILLS = ["4_mma", "5_hopper"]
COLUMNS = [
    "file", "kernel", "arch", "registers", "shared", "stack", "spill_stores", "spill_loads", "nvcc"
]

STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# wgmma serialised, setmaxnreg ignored. C7519 says that an arrive was injected, which costs nothing.
BAD_MESSAGE = re.compile(r"C75(08|1[0-8]|2[0-9])\b")


def nvcc_version():
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True)
    found = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    return found.group(1) if found else "unknown"


def known_architectures():
    done = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True)
    return set(done.stdout.split())


def source(file):
    return f"{'tests/' * (file in PROGRAMS)}gpu/{file}.cu"


def compile_one(job):
    """What the compiler said of one file for one architecture; the device's part is compiled."""
    file, arch = job
    number = arch.removeprefix("sm_")
    command = [
        "nvcc", *FLAGS, "-Xptxas", "-v", "-gencode", f"arch=compute_{number},code={arch}", "-cubin",
        "-o", "/dev/null", source(file)
    ]
    done = subprocess.run(command, cwd=GPU.parent, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode != 0:
        sys.exit(f"{source(file)} does not compile for {arch}:\n{said}")
    return file, arch, said


def demangle(names):
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True,
                          check=True)
    plain = [
        re.sub(r"^void |sparge::|\((int|bool)\)", "", name) for name in done.stdout.split("\n")
    ]
    return [name.split("(")[0] for name in plain]


def rows_of(file, arch, said, version):
    """A row for each kernel: its lines of `ptxas -v` follow the line that names it."""
    rows, row = [], None
    for line in said.split("\n"):
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            row = dict.fromkeys(COLUMNS, 0)
            row |= {"file": file, "kernel": m.group(1), "arch": arch, "nvcc": version}
            rows.append(row)
        elif row and (m := STACK.search(line)):
            row["stack"], row["spill_stores"], row["spill_loads"] = map(int, m.groups())
        elif row and (m := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            row["registers"], row["shared"] = int(m.group(1)), int(shared.group(1)) if shared else 0
    for row, name in zip(rows, demangle([r["kernel"] for r in rows])):
        row["kernel"] = name
    return rows


def look(architectures, jobs):
    """The rows of all files, and the messages that must not be there."""
    work = []
    for path in sorted(GPU.glob("*.cu")):
        only = HOPPER.get(path.stem)
        work += [(path.stem, arch) for arch in ([only] if only else architectures)]
    work += [(program, "sm_90a") for program in PROGRAMS]
    work.sort(key=lambda job: job[0] not in
              ("5_hopper", "4_mma", "ceilings"))  # the long ones first
    version, rows, bad = nvcc_version(), [], []
    with ThreadPoolExecutor(jobs) as pool:
        for file, arch, said in pool.map(compile_one, work):
            lines = [line.strip() for line in said.split("\n")]
            bad += [f"{file} {arch}: {line}" for line in lines if BAD_MESSAGE.search(line)]
            if file not in PROGRAMS:
                rows += rows_of(file, arch, said, version)
    rows.sort(key=lambda r: (r["file"], r["kernel"], int(re.sub(r"\D", "", r["arch"]))))
    return rows, bad


def key(row):
    return row["file"], row["kernel"], row["arch"]


def text(row):
    return {k: str(v) for k, v in row.items()}


def differences(rows):
    """Between the committed table and these rows, as sentences; None if it is of another nvcc."""
    with open(TABLE, newline="") as file:
        old = {
            key(r): r for r in csv.DictReader(file) if r["arch"] in {row["arch"] for row in rows}
        }
    new = {key(r): text(r) for r in rows}
    if {r["nvcc"] for r in old.values()} != {r["nvcc"] for r in new.values()}:
        return None
    found = [f"{' '.join(k)}: not in resources.csv" for k in new if k not in old]
    found += [
        f"{' '.join(k)}: in resources.csv, but not in the source" for k in old if k not in new
    ]
    found += [
        f"{' '.join(k)}: {column} is {new[k][column]}, was {old[k][column]}" for k in new
        if k in old for column in COLUMNS[3:-1] if new[k][column] != old[k][column]
    ]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also " + ", ".join(OTHERS))
    parser.add_argument("--write", action="store_true", help="write resources.csv")
    parser.add_argument("--check", action="store_true", help="compare with resources.csv")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    args = parser.parse_args()
    if not shutil.which("nvcc"):
        print("nvcc is not on this machine")
        sys.exit(77)
    wanted, known = CHECKED + (OTHERS if args.all else []), known_architectures()
    for arch in wanted:
        if arch not in known:
            print(f"{arch}: nvcc {nvcc_version()} does not compile for it")
    rows, bad = look([arch for arch in wanted if arch in known], args.jobs)
    if args.write:
        write_csv(TABLE, rows, COLUMNS)
    if not args.check:
        for row in rows:
            print(
                f"{row['file']:9} {row['arch']:7} {row['registers']:4} registers"
                f" {row['shared']:6} shared {row['stack']:5} stack"
                f" {row['spill_stores']:4}/{row['spill_loads']} spilled  {row['kernel']}")
    failures = bad
    if args.check:
        failures += [f"{' '.join(key(r))}: spills {r['spill_stores']} bytes" for r in rows
                     if r["file"] in NO_SPILLS and r["spill_stores"] + r["spill_loads"]]
        changed = differences(rows)
        if changed is None:
            print(f"resources.csv is of another nvcc than {nvcc_version()}:",
                  "registers are not compared")
        failures += changed or []
    for line in failures:
        print(line)
    if args.check and not failures:
        print(f"{len(rows)} kernels: as in resources.csv, no spills, no message")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
