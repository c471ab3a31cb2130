#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures the cpu backend against its targets, and writes the README's table.

Everything is taken from `sparge bench` and `sparge run` on this machine, now. Writes cases.csv
(every case of every benchmark), table.csv (the figures of the table) and, with --readme, the table
between the markers in the README. A machine that others use gives wrong ratios: the benchmark
refuses several threads then, and so does this.
"""
import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from errors import number  # noqa: E402
from harness import (
    ROOT,
    bench_json,
    fill_in,
    machine_line,
    run_json,
    run_main,
    write_csv,  # noqa: E402
    write_text,
)
from sets import CHOSEN, SMOLLM2  # noqa: E402

LONG = 131072


def bench(program, cases, *options):
    found = bench_json(program, *options)
    cases.extend(found)
    return found


def one(found, case, **where):
    """The only row of that case."""
    rows = [r for r in found if r["case"] == case and all(r[k] == v for k, v in where.items())]
    assert len(rows) == 1, (case, where, [r["case"] for r in found])
    return rows[0]


def imposed(program, cases, repeat):
    """Dense, imposed masks and the predictor's own mask, one thread and two."""
    found = bench(program, cases, "--q-len", "4096,8192", "--dim", "64,128", "--threads", 1,
                  "--repeat", repeat, "--mask-kind", "random,banded", "--sparsity",
                  "0,0.3,0.5,0.7,0.9")
    found += bench(program, cases, "--q-len", 8192, "--dim", 128, "--threads", 1, "--repeat",
                   repeat, "--mask-kind", "predicted")
    found += bench(program, cases, "--q-len", 8192, "--dim", 128, "--threads", 1, "--repeat",
                   repeat, "--qk-dtype", "int12", "--pv-dtype", "int12", "--sparsity", 0)
    bench(program, cases, "--q-len", 22272, "--dim", 128, "--threads", 1, "--repeat",
          3)  # the paper's Fig 10
    return found


def scaling(program, cases, repeat):
    """One thread and two by turns: the ratio of their times over a random half of the blocks."""
    ms = {1: [], 2: []}
    for _ in range(repeat):
        for threads in ms:
            found = bench(program, cases, "--q-len", 8192, "--dim", 128, "--threads", threads,
                          "--repeat", 1, "--sparsity", "0.5")
            ms[threads].append(one(found, "int8/int8 random 0.5")["ms_attend"])
    return statistics.median(ms[1]) / statistics.median(ms[2])


def relative_l1(program, *options):
    """Against attention in double, on 2048 tokens of normal numbers."""
    draw = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{name}.npy") for name in "qkv"]
        for file in files:
            np.save(file, draw.standard_normal((2048, 128), dtype=np.float32))
        return number(run_json(program, "run", *files, "--dense", "--check", *options)["l1"])


def workspace(program):
    """Bytes beside inputs and output for one head of 131072 tokens; the least of attention does to
    see them."""
    draw = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "x.npy")
        np.save(file, draw.standard_normal((LONG, 128), dtype=np.float32))
        return run_json(program, "run", file, file, file, "--theta", -1, "--tau",
                        0)["workspace_bytes"]


def captured(program, cases, repeat):
    """Speed-up over dense f32 on each captured key head at the chosen setting, and the error
    there."""
    rows = []
    for file in sorted(SMOLLM2.glob("*.safetensors")):
        found = bench(program, cases, "--capture", file, "--causal=end", "--threads", 1, "--repeat",
                      repeat, *CHOSEN)
        row = one(found, "int8/int8 predicted causal")
        check = run_json(program, "run", file, "--causal", "--check", *CHOSEN)
        rows.append((file.stem, row["speedup_vs_f32"], row["sparsity"], number(check["l1"])))
    return rows


def torch_times(program, cases, repeat):
    """torch's scaled_dot_product_attention and ours by turns; seconds of each, or None without
    torch."""
    try:
        import time

        import torch
    except ImportError:
        return None
    q, k, v = (torch.randn(1, 1, 8192, 128) for _ in range(3))
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        times = {"torch": [], "dense": [], "half": []}
        for _ in range(repeat):
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
            start = time.perf_counter()
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
            times["torch"].append(1e3 * (time.perf_counter() - start))
            rows = bench(program, cases, "--q-len", 8192, "--dim", 128, "--threads", threads,
                         "--repeat", 1, "--sparsity", "0,0.5")
            times["dense"].append(one(rows, "int8/int8 dense")["ms"])
            times["half"].append(one(rows, "int8/int8 random 0.5")["ms"])
        found[threads] = {name: statistics.median(values) for name, values in times.items()}
    return found


def figures(program, repeat):
    """Rows of the table: what, the least asked, the goal, what was measured."""
    cases, rows = [], []

    def add(what, least, goal, measured):
        rows.append({"figure": what, "at least": least, "goal": goal, "measured": measured})

    found = imposed(program, cases, repeat)

    def dense(dim, case="int8/int8 dense"):
        return one(found, case, q_len=8192, dim=dim)

    add("dense f32, % of the FMA peak (D = 64)", "80 (76)", "88 (84)",
        f"{dense(128)['baseline_pct_peak']:.1f} ({dense(64)['baseline_pct_peak']:.1f})")
    add("dense int8 over dense f32 (D = 64)", "1.50x (1.40x)", "1.68x (1.57x)",
        f"{dense(128)['speedup_vs_f32']:.2f}x ({dense(64)['speedup_vs_f32']:.2f}x)")
    add(
        "dense int8, effective operations, % of the FMA peak (D = 64)", "125", "144", " ".join(
            f"{'' if dim == 128 else '('}"
            f"{dense(dim)['speedup_vs_f32'] * dense(dim)['baseline_pct_peak']:.0f}"
            f"{'' if dim == 128 else ')'}" for dim in (128, 64)))
    int12 = one(found, "int12/int12 dense")
    add(
        "int12 over f32; relative L1 on normal data", "1.35x; 1e-3", "1.52x; 5e-4",
        f"{int12['speedup_vs_f32']:.2f}x; "
        f"{relative_l1(program, '--qk-dtype', 'int12', '--pv-dtype', 'int12'):.1e}"
    )
    for kind in ("random", "banded"):
        measured = [100 * one(found, f"int8/int8 {kind} {share}", q_len=8192, dim=128)["efficiency"]
                    for share in (0.5, 0.7, 0.9)]
        add(f"efficiency at 50 / 70 / 90 %, {kind} mask", "96 / 95 / 93 %", "99 / 98 / 97 %",
            " / ".join(f"{x:.0f}" for x in measured) + " %")
    predicted = one(found, "int8/int8 predicted")
    share = 100 * (predicted["ms_predict"] + predicted["ms_quantize"]) / dense(128)["ms"]
    add("prediction, quantization and packing, share of dense int8", "1.5 %", "0.9 %",
        f"{share:.2f} %")
    add("1 to 2 threads, random 50 %", "1.90x", "1.97x", f"{scaling(program, cases, repeat):.2f}x")
    for name, speedup, sparsity, l1 in captured(program, cases, repeat):
        add(f"{name}, 4096, causal: over f32 (sparsity, L1)", "report", "2.5x",
            f"{speedup:.2f}x ({sparsity:.2f}, {l1:.3f})")
    torch = torch_times(program, cases, repeat)
    for threads in (1, 2):
        t = torch and torch[threads]
        add(
            f"over torch's SDPA in f32, {threads} thread{'s' * (threads > 1)}: dense int8; int8 at "
            "50 %",
            "1.5x; 3x", "2x; 4x", f"{t['torch'] / t['dense']:.2f}x; {t['torch'] / t['half']:.2f}x"
            if t else "torch is not here")
    add("memory beside inputs and output, 131072 tokens, 1 head", "64 MiB", "40 MiB",
        f"{workspace(program) / 2**20:.0f} MiB")
    return cases, rows


def by_isa(program, repeat):
    """Every instruction set that is here but the scalar one: 8192 tokens, one thread, medians."""
    here = [
        isa for isa, yes in run_json(program, "info", "--json")["isa"].items()
        if yes and isa != "scalar"
    ]
    cases, rows = [], []
    found = bench(program, cases, "--isa", ",".join(here), "--q-len", 8192, "--dim", "64,128",
                  "--threads", 1, "--repeat", repeat, "--sparsity", "0,0.5")
    for isa in here:
        for dim in (64, 128):
            dense, half = (one(found, f"int8/int8 {case}", isa=isa, dim=dim)
                           for case in ("dense", "random 0.5"))
            rows.append({
                "instructions": isa, "D": str(dim), "f32, ms":
                f"{dense['ms'] * dense['speedup_vs_f32']:.0f}", "% of FMA peak":
                f"{dense['baseline_pct_peak']:.0f}", "int8, ms": f"{dense['ms']:.1f}",
                "over f32": f"{dense['speedup_vs_f32']:.2f}x", "int8 at 50 %, ms":
                f"{half['ms']:.1f}", "efficiency": f"{100 * half['efficiency']:.0f} %"
            })
    return cases, rows


def fill_table(path, marker, rows, machine, option):
    command = f"Command: `build/venv/bin/python experiments/cpu_speed/run.py {option}`."
    rule = "|---" * len(rows[0]) + "|"
    lines = ["| " + " | ".join(cells) + " |" for cells in (rows[0], *(r.values() for r in rows))]
    fill_in(path, marker, [f"{machine}.", command, "", lines[0], rule, *lines[1:]])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparge", default=str(ROOT / "build/release/tools/sparge"),
                        help="the program")
    parser.add_argument("--repeat", type=int, default=5, help="rounds that count")
    parser.add_argument("--readme", action="store_true",
                        help="write the table into cpu/README.md too")
    parser.add_argument(
        "--isas", action="store_true",
        help="instead, time every instruction set that is here: isas.csv, "
        "and the table of cpu/README.md")
    args = parser.parse_args()
    if args.isas:
        cases, rows = by_isa(args.sparge, args.repeat)
        write_csv(HERE / "isas.csv", cases)
        fill_table(ROOT / "cpu/README.md", "cpu_isas", rows, machine_line(args.sparge), "--isas")
        return
    cases, rows = figures(args.sparge, args.repeat)
    machine = machine_line(args.sparge)
    write_csv(HERE / "cases.csv", cases)
    write_csv(HERE / "table.csv", rows)
    write_text(HERE / "machine.txt", machine + "\n")
    if args.readme:
        fill_table(ROOT / "cpu/README.md", "cpu_speed", rows, machine, "--readme")
    print(machine)
    for row in rows:
        print(f"  {row['figure']:85} {row['at least']:>15} {row['goal']:>15}   {row['measured']}")


if __name__ == "__main__":
    run_main(main)
