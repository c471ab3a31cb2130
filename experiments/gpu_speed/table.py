#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What tests/gpu/on_gpu.sh measured, as a table: results.csv, and the one of gpu/README.md.

    table.py FOLDER             FOLDER/speed_*.txt and torch_*.txt (JSON of `sparge bench` and of
                                torch_sdpa.py) with FOLDER/ceilings.csv become FOLDER/results.csv
    table.py FOLDER --readme    and FOLDER/results.csv fills gpu/README.md

Effective TOPS are those of dense attention over the visible pairs, by the time of attention alone.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))
from harness import fill_in, markdown, read_csv, write_csv  # noqa: E402

COLUMNS = ("what kernel dtypes dim n heads causal mask sparsity ms ms_quantize ms_predict tops "
           "tops_done ceiling percent_of_ceiling efficiency").split()
# What a kernel multiplies with: the ceiling (of ceilings.cu) of each of its two products; its idea.
LADDER = {
    (1, "f32/f32"): ("f32", "f32", "a thread owns a row, everything from global memory"),
    (2, "f32/f32"): ("f32", "f32", "tiles in shared memory"),
    (3, "int8/int8"): ("dp4a", "dp4a",
                       "the paper's int8 codes, four multiply-adds an instruction (dp4a)"),
    (4, "int8/int8"): ("mma_s8", "mma_s8",
                       "tensor cores (mma.sync), codes copied ahead (cp.async)"),
    (4, "int8/f16"): ("mma_s8", "mma_f16", "the same with P.V in f16"),
    (5, "int8/f16"): ("wgmma_s8", "wgmma_f16",
                      "Hopper: wgmma, bulk copies, roles for warps; P.V in f16"),
    (5, "int8/fp8"): ("wgmma_s8_e4m3", "wgmma_s8_e4m3", "the same with P.V in fp8"),
}


def objects(folder):
    """The JSON lines of what was printed; a step that was stopped has none."""
    for path in sorted([*folder.glob("speed_*.txt"), *folder.glob("torch_*.txt")]):
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("["):
                yield from json.loads(line)


def row_of(x, ceilings):
    ours = x["backend"] == "cuda"
    words, seconds = x["case"].split(), x["seconds_attend"]
    if not seconds:  # it failed its check
        return None
    visible = x["tops"] * x["seconds_total"] / seconds
    row = {
        "what": "kernel" if ours else " ".join(words[:2]), "kernel": x["kernel"],
        "dtypes": words[2], "dim": x["dim"], "n": x["q_len"], "heads": x["heads"],
        "causal": x["causal"], "mask": x["mask"], "sparsity": x["sparsity"], "ms": 1e3 * seconds,
        "tops": visible, "tops_done": x["tops_executed"] * x["seconds_total"] / seconds
    }
    if ours:
        for part in "quantize", "predict":
            if x[f"seconds_{part}"] is not None:
                row[f"ms_{part}"] = 1e3 * x[f"seconds_{part}"]
        row["efficiency"] = x["efficiency"]
        both = [ceilings.get(name) for name in LADDER[x["kernel"], words[2]][:2]]
        if all(both):  # half of the operations each
            row["ceiling"] = 2 / (1 / both[0] + 1 / both[1])
            row["percent_of_ceiling"] = 100 * row["tops_done"] / row["ceiling"]
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}


def cells(rows, kernel, dtypes):
    """Of one kernel, at the largest N at which sparsity was imposed on it."""
    own = [r for r in rows if (r["kernel"], r["dtypes"]) == (str(kernel), dtypes)]
    if not own:
        return ["never run"] * 6
    n = max(int(r["n"]) for r in own)

    def middle(column, mask, share=0.0, among=own):
        found = [float(r[column]) for r in among if r["mask"] == mask and int(r["n"]) == n
                 and r[column] and abs(float(r["sparsity"]) - share) < 0.02]
        return statistics.median(found) if found else None
    values = [middle("tops", "dense"), middle("tops", "random", 0.5), middle("tops", "random", 0.9),
              middle("percent_of_ceiling", "dense")]
    torch = [middle("tops", "dense", among=[r for r in rows if r["what"] == f"torch {x}"])
             for x in ("flash", "cudnn")]
    best = max((x for x in torch if x), default=None)
    return [str(n), *("not measured" if x is None else f"{x:.0f}" for x in values),
            f"{values[0] / best:.2f}x" if best and values[0] else "not measured"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--readme-file", type=Path, default=ROOT / "gpu/README.md",
                        help=argparse.SUPPRESS)
    args = parser.parse_args()
    results = args.folder / "results.csv"
    if not args.readme:
        measured = args.folder / "ceilings.csv"
        ceilings = {r["what"]: float(r["value"]) for r in read_csv(measured)
                    if r["unit"] == "TOPS" and r["value"]} if measured.exists() else {}
        rows = [row for row in (row_of(x, ceilings) for x in objects(args.folder)) if row]
        if not rows:
            sys.exit(f"nothing was measured: no JSON in {args.folder}/speed_*.txt")
        write_csv(results, rows, COLUMNS)
        for r in rows:
            print(f"{r['what']} {r['kernel'] or ''} {r['dtypes']} D {r['dim']} N {r['n']} causal "
                  f"{r['causal']} {r['mask']} {r['sparsity']}: {r['ms']} ms, {r['tops']} TOPS")
        return
    if not results.exists():
        sys.exit(f"{results} is not there: nothing has been measured")
    rows = [r for r in read_csv(results) if (r["dim"], r["causal"]) == ("128", "none")]
    machine = args.folder / "machine.txt"
    note = machine.read_text().strip() if machine.exists() else "Machine unknown"
    note += ". D = 128, 32 heads."
    titles = ["kernel", "idea", "N", "effective TOPS, dense", "at 50 %", "at 90 %",
              "% of the measured ceiling", "over torch SDPA"]
    lines = [[str(kernel), idea, *cells(rows, kernel, dtypes)]
             for (kernel, dtypes), (_, _, idea) in LADDER.items()]
    fill_in(args.readme_file, "gpu_speed", [f"{note} Command: `tests/gpu/on_gpu.sh`.", "",
                                            *markdown(titles, lines, 2)])


if __name__ == "__main__":
    main()
