#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures the cpu backend on this machine, and fills the tables of cpu/README.md.

    run.py [--machine NAME]    `sparge bench`, the package and, where it is installed, torch, by
                               turns: cases.csv, table.csv and machine.txt of machines/NAME, and of
                               no other machine
    run.py --readme            measures nothing: both tables from all of machines/, a column for
                               each

A machine that others use gives wrong ratios. `sparge bench` refuses several threads then; what it
refuses counts as not measured.
"""
import argparse
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "capture")]

import flex  # noqa: E402
from cpu_table import BLOCKS, CAPTURES, CELLS, N, Measured, fill_readme, table  # noqa: E402
from errors import l1  # noqa: E402
from harness import (  # noqa: E402
    ROOT,
    bench_json,
    machine_line,
    processor,
    run_json,
    run_main,
    write_csv,
    write_text,
)
from sets import CHOSEN, SMOLLM2, tensors, wide  # noqa: E402

import sparge  # noqa: E402

LONG = 131072
COMMAND = "`build/full-venv/bin/python experiments/cpu_speed/run.py` on each, then `--readme`"
CHOSEN_WORDS = ["--sink", *(f"--{x.rstrip('_')}={CHOSEN[x]}" for x in CHOSEN if x != "sink")]
INT12 = ["--qk-dtype", "int12", "--pv-dtype", "int12"]
BF16 = ["--qk-dtype", "bf16", "--pv-dtype", "bf16"]


class Bench:
    """sparge bench, whose cases are kept, each with the name of its call."""

    def __init__(self, program, repeat):
        self.program, self.repeat, self.cases = program, repeat, []
        isas = run_json(program, "info", "--json")["isa"]
        self.isas = [name for name, has in isas.items() if has and name != "scalar"] or ["scalar"]
        self.best = self.isas[-1]

    def __call__(self, call, *options, repeat=None):
        found = bench_json(self.program, *options, "--repeat", repeat or self.repeat)
        self.cases += [row | {"call": call} for row in found]
        return found

    def add(self, case, dim, threads, ms):
        """What is not ours, as a case."""
        self.cases.append({"case": case, "isa": "", "threads": threads, "q_len": N, "k_len": N,
                           "dim": dim, "heads": 1, "causal": "none",
                           "ms": float(f"{ms:.9g}"), "call": "turns"})


# ---- torch ------------------------------------------------------------------------------------

class Torch:
    """torch's attention of one head: dense in f32 and bf16; on one thread also FlexAttention, over
    a mask that leaves out half of the key blocks of every query block at random, as ours does."""

    def __init__(self):
        try:
            import torch
        except ImportError:
            torch = None
        self.torch, self.calls = torch, []
        if not torch:
            return
        self.name = f"; torch {torch.__version__}"
        torch.set_num_threads(1)
        half = flex.flex_mask(torch, N, 0.5)[0]
        for dim in (64, 128):
            for dtype, kind in (("f32", torch.float32), ("bf16", torch.bfloat16)):
                inputs = [torch.randn(1, 1, N, dim).to(kind) for _ in range(3)]
                self.add(f"torch sdpa {dtype}", dim, flex.attention(torch, inputs))
                self.add(f"torch flex {dtype}", dim, flex.attention(torch, inputs, half))

    name = ""

    def add(self, case, dim, call):
        """Where it can be called: FlexAttention needs a compiler of C++."""
        try:
            with self.torch.inference_mode():
                call()
            self.calls.append((case, dim, call))
        except Exception as e:  # torch has many kinds; the others go on
            print(f"{case}: {(str(e).strip() or repr(e)).splitlines()[0][:160]}", file=sys.stderr)

    def time(self, bench, threads):
        """The second call of each: the first finds other data in the caches."""
        for case, dim, call in self.calls:
            if threads > 1 and case != "torch sdpa f32":
                continue
            self.torch.set_num_threads(threads)
            with self.torch.inference_mode():
                call()
                bench.add(case, dim, threads, 1e3 * flex.seconds(call))


# ---- Errors and memory ------------------------------------------------------------------------

def dense_l1(dtype):
    """Of dense attention in an arithmetic against that in double, on 2048 tokens of normal
    numbers."""
    draw = np.random.default_rng(1)
    qkv = [draw.standard_normal((1, 2048, 128), dtype=np.float32) for _ in "qkv"]
    got = sparge.attend(*qkv, None, qk_dtype=dtype, pv_dtype=dtype)
    return l1(got, sparge.oracle(*qkv))


def workspaces(bench):
    """Bytes beside inputs and output for one head of 131072 tokens, with keys in words and, where
    the best instruction set has them so, in bytes; the least of attention does to see them."""
    isas = {"avx2": "avx2"} if "avx2" in bench.isas else {}
    if bench.best == "amx" or "vnni" in bench.best:
        isas["vnni"] = bench.best
    x = np.random.default_rng(1).standard_normal((1, LONG, 128), dtype=np.float32)
    stats = {name: sparge.attention(x, x, x, theta=-1, tau=0, isa=isa, return_stats=True)[1]
             for name, isa in isas.items()}
    return {f"workspace {name}": found.workspace_bytes for name, found in stats.items()}


# ---- All of it --------------------------------------------------------------------------------

def each_isa(bench):
    """Dense and imposed masks, in turns within an instruction set and a number of channels."""
    bench("isas", "--isa", ",".join(bench.isas), "--q-len", N, "--dim", "64,128", "--threads", 1,
          "--mask-kind", "random,banded", "--sparsity", "0,0.5,0.7,0.9")
    bench("int12", "--q-len", N, "--dim", 128, "--threads", 1, "--sparsity", 0, *INT12)


def cells(bench):
    """Prediction by the masses of cells, and dense attention beside it."""
    for cell in CELLS:
        bench(f"cell {cell}", "--isa", ",".join(bench.isas), "--q-len", N, "--dim", "64,128",
              "--threads", 1, "--mask-kind", "random,predicted", "--sparsity", 0, "--cell", cell,
              "--min-mass", 0.2, "--theta=-1", "--sink")


def blocks(bench, repeat):
    """Blocks of other sizes, one after the other in every round."""
    for _ in range(repeat):
        for q, k in BLOCKS:
            bench(f"blocks {q} x {k}", "--isa", ",".join(bench.isas), "--q-len", N, "--dim",
                  "64,128", "--threads", 1, "--mask-kind", "random", "--sparsity", "0,0.7",
                  "--block-q", q, "--block-k", k, repeat=1)


def turns(bench, repeat):
    """What is compared with torch, with bf16 and with two threads, one after the other in every
    round."""
    torch = Torch()
    own = {"amx": ["amx", "avx512vnni"]}.get(bench.best, [bench.best])
    bf16 = any(sparge.info()["bf16"].values())
    shape = ["--q-len", N, "--dim", "64,128"]
    for _ in range(repeat):
        bench("turns", *shape, "--isa", ",".join(own), "--threads", 1, "--mask-kind",
              "random,predicted", "--sparsity", "0,0.5,0.9", repeat=1)
        if bf16:
            bench("turns", *shape, "--threads", 1, "--sparsity", "0,0.5,0.9", *BF16, repeat=1)
        torch.time(bench, 1)
        try:
            bench("turns", *shape, "--threads", 2, "--sparsity", "0,0.5", repeat=1)
        except SystemExit as e:
            print(f"not measured: {e}", file=sys.stderr)
        torch.time(bench, 2)
    return torch.name, bf16


def captured(bench):
    """Of each captured key head at the chosen setting: speed over dense f32, sparsity, error."""
    found = {}
    for stem in CAPTURES:
        file = SMOLLM2 / f"{stem}.safetensors"
        rows = bench("capture", "--capture", file, "--causal=end", "--threads", 1, *CHOSEN_WORDS)
        row, = (row for row in rows if row["case"] == "int8/int8 predicted causal")
        qkv = [x[0] for x in wide(tensors(file))]
        got = sparge.attention(*qkv, is_causal=True, **CHOSEN)
        want = sparge.oracle(*qkv, is_causal=True)
        found[stem] = row["speedup_vs_f32"], row["sparsity"], l1(got, want)
    return found


def measure(program, repeat):
    """The cases, the figures that follow, and what was measured beside the program."""
    bench = Bench(program, repeat)
    each_isa(bench)
    cells(bench)
    blocks(bench, repeat)
    beside, bf16 = turns(bench, repeat)
    dtypes = ["int8", "int12"] + ["bf16"] * bf16
    apart = captured(bench) | workspaces(bench) | {
        f"l1 {dtype}": dense_l1(dtype) for dtype in dtypes}
    return bench.cases, table(Measured(bench.cases, apart, bench.best)), beside


# ---- The machine ------------------------------------------------------------------------------

ZEN = {  # family and models, by their first digit of 16
    "zen3": (25, (0x0, 0x2, 0x3, 0x4, 0x5)), "zen4": (25, (0x1, 0x6, 0x7, 0xa)),
    "zen5": (26, (0x0, 0x1, 0x2, 0x3, 0x4, 0x6, 0x7))
}


def machine_name(cpu):
    """zen3, zen4, zen5, or the vendor with family and model; of what /proc/cpuinfo says."""
    if "cpu family" not in cpu:
        sys.exit("what processor this is cannot be seen; give --machine NAME")
    vendor, family, model = cpu["vendor_id"], int(cpu["cpu family"]), int(cpu["model"])
    for name, (of_family, models) in ZEN.items():
        if (vendor, family) == ("AuthenticAMD", of_family) and model >> 4 in models:
            return name
    return f"{vendor.replace('Genuine', '').replace('Authentic', '').lower()}_{family}_{model}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", metavar="NAME",
                        help="what this machine is called (by its processor)")
    parser.add_argument("--sparge", default=str(ROOT / "build/release/tools/sparge"),
                        help="the program")
    parser.add_argument("--repeat", type=int, default=5, help="rounds that count")
    parser.add_argument("--readme", action="store_true",
                        help="write the tables of cpu/README.md, and measure nothing")
    parser.add_argument("--machines", type=Path, default=HERE / "machines", help=argparse.SUPPRESS)
    parser.add_argument("--readme-file", type=Path, default=ROOT / "cpu/README.md",
                        help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.readme:
        return fill_readme(args.machines, args.readme_file, COMMAND)
    name = machine_name(processor()) if args.machine is None else args.machine
    if not re.fullmatch("[a-z0-9_]+", name):
        parser.error(f"--machine is '{name}', it must be of a-z, 0-9 and _")
    cases, rows, beside = measure(args.sparge, args.repeat)
    folder = args.machines / name
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "cases.csv", cases)
    write_csv(folder / "table.csv", rows)
    write_text(folder / "machine.txt", machine_line(args.sparge) + beside + "\n")
    for row in rows:
        print(f"  {row['figure']:75} {row['measured']}")


if __name__ == "__main__":
    run_main(main)
