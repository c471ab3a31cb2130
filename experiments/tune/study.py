#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The tuner beyond the committed captures: what its thresholds cost on texts that it has not seen,
and what it takes.

    study.py grid               against an exhaustive grid and the authors' search: grid.csv
                                (an hour on two cores)
    study.py model TUNE JUDGE   every head of the model, judged on other texts: model.csv,
                                judge.csv, model_*.json
    study.py length CAPTURE     seconds and products by length: length.csv (on an idle machine)
    study.py readme             the tables of README.md here, from those files and out.csv of run.py

TUNE, JUDGE and CAPTURE are folders that experiments/capture/smollm2.py writes; README.md has its
commands.
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from errors import cell, number, relative_l1, worst  # noqa: E402
from harness import ROOT, fill_in, read_csv, run_main, run_program, write_csv  # noqa: E402
from run import PAIRS, TABLE, row_of, tune  # noqa: E402
import sets  # noqa: E402

LENGTHS = [1024, 2048, 4096, 8192]
REPEAT = 5


# ---- Against whole calls ----------------------------------------------------------------------

GRID = [
    "layer", "head", "search", "theta", "tau", "lambda", "mask_sparsity", "sparsity", "l1", "calls",
    "dense_passes"
]


def grid_head(program, entry, h, l1, l2):
    """The two searches by whole calls over one head."""
    qkv = sets.head_of(entry.path, h)
    _, tokens, dim = qkv[0].shape
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.bin" for name in "qkv"]
        for file, x in zip(files, qkv):
            x.tofile(file)
        done = run_program([program, *files, tokens, dim, 1, 1, l1, l2], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    return [dict(zip(GRID, [entry.layer, entry.heads[h], *line.split(",")]))
            for line in done.stdout.split()]


def grid(args):
    l1, l2 = PAIRS[0]
    jobs = [(entry, h) for entry in sets.entries(sets.SMOLLM2) for h in range(len(entry.heads))]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = sum(pool.map(lambda job: grid_head(args.grid, *job, l1, l2), jobs), [])
    with tempfile.TemporaryDirectory() as folder:
        heads, _ = tune(args.sparge, [sets.SMOLLM2], Path(folder) / "params.json", l1, l2)
    rows += [{
        "search": "tuner", "sparsity": head["in_sample"]["sparsity"], "l1": head["in_sample"]["l1"]
    } | {key: head[key] for key in GRID if key in head} for head in heads]
    write_csv(HERE / "grid.csv", columns=GRID,
              rows=sorted(rows, key=lambda row: (row["layer"], row["head"])))


# ---- The whole model --------------------------------------------------------------------------

def judge_file(params, entry):
    """Relative L1 of every head of a capture against dense attention in f32, and its sparsity."""
    found = sets.tensors(entry.path)
    got, sparsity = sets.attention(entry, found, sets.read_params(params))
    l1 = relative_l1(got[0], sets.dense(entry, found)[0], f"{entry.path} under {params}: o")
    return [{
        "text": entry.path.parent.name, "layer": entry.layer, "head": head, "sparsity": round(s, 6),
        "l1": cell(x, 6)
    } for head, s, x in zip(entry.heads, sparsity, l1)]


def model(args):
    l1, l2 = PAIRS[0]
    texts = sorted(path.parent for path in Path(args.tune).glob("*/manifest.json"))
    others = [
        entry for path in sorted(Path(args.judge).glob("*/manifest.json"))
        for entry in sets.entries(path.parent)
    ]
    if not texts or not others:
        sys.exit("study.py: no captures in these folders; README.md says how they are made")
    rows, judged = [], []
    for bound in "worst", "mean":
        params = HERE / f"model_{bound}.json"
        heads, summary = tune(args.sparge, texts, params, l1, l2, "--bound", bound)
        print(bound, summary, flush=True)
        means = {
            "mean_l1_in": "in_sample", "first_mean_l1_out": "held_out_first", "mean_l1_out":
            "held_out"
        }
        rows += [{"bound": bound, "l1": l1, "l2": l2} | row_of(head) |
                 {name: (head[of] or {}).get("l1") for name, of in means.items()} for head in heads]
        with ThreadPoolExecutor(args.jobs) as pool:
            judged += [
                {"bound": bound} | row
                for found in pool.map(lambda entry: judge_file(params, entry), others)
                for row in found
            ]
    for row in rows:
        del row["seconds"]  # they depend on what else runs: length.csv has those of a quiet machine
    write_csv(HERE / "model.csv", rows,
              ["bound", "l1", "l2", *TABLE[:-1], "mean_l1_in", "first_mean_l1_out", "mean_l1_out"])
    write_csv(HERE / "judge.csv", judged)


# ---- By length --------------------------------------------------------------------------------

def length(args):
    l1, l2 = PAIRS[0]
    rows = []
    for tokens in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            for entry in sets.entries(args.capture):
                file = sets.copied(entry, sets.beginning(sets.tensors(entry.path), tokens),
                              Path(folder) / entry.path.stem / entry.path.name)
                runs = [
                    tune(args.sparge, [file],
                         Path(folder) / "params.json", l1, l2) for _ in range(REPEAT)
                ]
                heads = runs[0][0]
                spent = statistics.median(summary["seconds"] for _, summary in runs)
                rows.append({
                    "file":
                    file.stem, "tokens":
                    tokens, "heads":
                    len(heads), "seconds":
                    f"{spent:.3f}", "seconds_per_head":
                    f"{spent / len(heads):.4f}", "dense_passes":
                    f"{statistics.mean(h['dense_passes'] for h in heads):.3f}", "sparsity":
                    f"{statistics.mean(h['in_sample']['sparsity'] for h in heads):.4f}"
                })
                print(rows[-1], flush=True)
    write_csv(HERE / "length.csv", rows)


# ---- README.md --------------------------------------------------------------------------------

def table_committed():
    """Nine heads at each pair of bounds; head by head they stand in out.csv."""
    lines = [
        "| l1, l2 | sparsity | worst L1 | on the other text, as found: sparsity, worst L1 | "
        "backed off: lambda, tau, dense | then: sparsity, worst L1 | products |", "|---" * 7 + "|"
    ]
    rows = read_csv(HERE / "out.csv")
    for l1, l2 in dict.fromkeys((r["l1"], r["l2"]) for r in rows):
        found = [r for r in rows if (r["l1"], r["l2"]) == (l1, l2)]

        def mean(key, found=found, digits=3):
            return cell(statistics.mean(float(r[key]) for r in found), digits)

        def largest(key, found=found):
            return cell(worst([number(r[key]) for r in found]))

        ways = ", ".join(
            str(sum(r["back_off"] == way for r in found))
            for way in ("lambda lowered", "tau raised", "left dense"))
        lines.append(f"| {l1}, {l2} | {mean('sparsity')} | {largest('l1_in')} | "
                     f"{mean('first_sparsity_out')}, {largest('first_l1_out')} | {ways} | "
                     f"{mean('sparsity_out')}, {largest('l1_out')} | "
                     f"{mean('dense_passes', digits=2)} |")
    return lines


def table_grid():
    lines = [
        "| layer | head | exhaustive: sparsity, L1, products | authors' search | tuner | given up "
        "|",
        "|---" * 6 + "|"
    ]
    rows = read_csv(HERE / "grid.csv")
    for layer, head in sorted({(int(r["layer"]), int(r["head"])) for r in rows}):
        found = {r["search"]: r for r in rows if (int(r["layer"]), int(r["head"])) == (layer, head)}
        cells = [
            f"{cell(r['sparsity'])}, {cell(r['l1'])}, "
            f"{float(r['dense_passes']):.{2 if name == 'tuner' else 0}f}"
            for name, r in ((name, found[name]) for name in ("exhaustive", "authors", "tuner"))
        ]
        lost = float(found["exhaustive"]["sparsity"]) - float(found["tuner"]["sparsity"])
        lines.append(f"| {layer} | {head} | " + " | ".join(cells) + f" | {lost:.3f} |")
    return lines


def share(values, bound):
    return f"{100 * sum(v <= bound for v in values) / len(values):.1f} %"


def table_model():
    lines = [
        "| the bound is on | sparsity | heads within l2 on the text left out: at first, after "
        "backing off | "
        "lambda lowered, tau raised, dense | sparsity on five other texts | heads within l2 there, "
        "mean of the "
        "five | pairs of head and text within l2 | worst pair | products |", "|---" * 9 + "|"
    ]
    tuned, judged = read_csv(HERE / "model.csv"), read_csv(HERE / "judge.csv")
    for bound in "worst", "mean":
        rows = [r for r in tuned if r["bound"] == bound]
        seen = [r for r in judged if r["bound"] == bound]
        l2 = float(rows[0]["l2"])
        key = ("first_l1_out", "l1_out") if bound == "worst" else ("first_mean_l1_out",
                                                                   "mean_l1_out")
        mean = [
            statistics.mean(
                number(r["l1"]) for r in seen if (r["layer"], r["head"]) == (t["layer"], t["head"]))
            for t in rows
        ]
        count = [
            sum(r["back_off"] == way for r in rows) for way in ("lambda lowered", "tau raised")
        ]
        pairs = [number(r["l1"]) for r in seen]
        lines.append("| " + " | ".join([
            "every text" if bound == "worst" else "the mean of the texts",
            cell(statistics.mean(float(r["sparsity"]) for r in rows)), ", ".join(
                share([number(r[k]) for r in rows], l2)
                for k in key), f"{count[0]}, {count[1]}, {sum(r['dense'] == 'True' for r in rows)}",
            cell(statistics.mean(float(r["sparsity"]) for r in seen)),
            share(mean, l2),
            share(pairs, l2),
            cell(worst(pairs)),
            cell(statistics.mean(float(r["dense_passes"]) for r in rows), 2)
        ]) + " |")
    return lines


def table_length():
    rows = read_csv(HERE / "length.csv")
    lines = ["| tokens | " + " | ".join(f"{f}: seconds a head, products, sparsity" for f in
                                        sorted({r["file"] for r in rows})) + " |",
             "|---" * (1 + len({r["file"] for r in rows})) + "|"]
    for tokens in sorted({int(r["tokens"]) for r in rows}):
        here = sorted((r for r in rows if int(r["tokens"]) == tokens), key=lambda r: r["file"])
        lines.append(f"| {tokens} | " + " | ".join(
            f"{cell(r['seconds_per_head'], 3)}, {cell(r['dense_passes'], 2)}, {cell(r['sparsity'])}"
            for r in here) + " |")
    return lines


def readme(_args):
    for name, table in [("table", table_committed), ("grid", table_grid), ("model", table_model),
                        ("length", table_length)]:
        fill_in(HERE / "README.md", name, table())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparge", default=str(ROOT / "build/release/tools/sparge"),
                        help="the program")
    parser.add_argument("--jobs", type=int, default=2,
                        help="at a time, of grid and of judging (default: 2)")
    what = parser.add_subparsers(required=True)
    by_grid = what.add_parser("grid")
    by_grid.add_argument(
        "--grid", default=str(ROOT / "build/release/tools/tune_grid"),
        help="the program; cmake --build --preset release --target tune_grid makes it")
    by_grid.set_defaults(run=grid)
    by_model = what.add_parser("model")
    by_model.add_argument("tune")
    by_model.add_argument("judge")
    by_model.set_defaults(run=model)
    by_length = what.add_parser("length")
    by_length.add_argument("capture")
    by_length.set_defaults(run=length)
    what.add_parser("readme").set_defaults(run=readme)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_main(main)
