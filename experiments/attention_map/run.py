#!/usr/bin/env python3
"""Runs SpargeAttn on the committed capture of a real model, head by head: dense and sparse, f32 and int8.

Prints a table, writes it to out.csv beside this file, and the block maps of one head a layer (true
attention, predicted mask, what lambda dropped) to paper_figs/attention_map.csv.
"""
import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CAPTURE = ROOT / "experiments/capture/smollm2-135m"

# Two operating points. "default" is what the program does when nothing is said. "chosen" is one setting for
# all nine heads that keeps each within the relative L1 of 0.09 that the paper allows a language model; it
# was picked by hand on these very heads, so it says what is possible, not what a tuner would find blind.
SETTINGS = {
    "default": ["--theta", "0.6", "--tau", "0.98"],
    "chosen": ["--sink", "--theta", "0.4", "--tau", "0.98", "--lambda", "-5"],
}
F32 = ["--qk", "f32", "--pv", "f32"]
VARIANTS = [("dense", "f32", ["--dense", *F32]), ("dense", "int8", ["--dense"]),
            ("default", "int8", SETTINGS["default"]),
            ("chosen", "f32", SETTINGS["chosen"] + F32), ("chosen", "int8", SETTINGS["chosen"])]

COLUMNS = ["layer", "head", "attention", "arithmetic", "sparsity", "sparsity_qk", "l1", "worst_row_l1",
           "mask_worst_row_l1", "seconds_predict", "seconds_quantize", "seconds_attend", "seconds_total"]
MAP_HEADS = {(6, 7), (12, 5), (21, 0)}  # (layer, query head) in the figure, at the chosen setting


def run(sparge, files, options):
    """One `sparge run`; returns its JSON."""
    done = subprocess.run([sparge, "run", *files, "--causal", *options], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    return json.loads(done.stdout)


def write_head(folder, tensors, h):
    """q of query head h with its key head, as the three files that `sparge run` takes: float32, so that
    the output is not rounded to the float16 of the capture."""
    heads, kv_heads = tensors["q"].shape[1], tensors["k"].shape[1]
    files = []
    for name in "qkv":
        head = h if name == "q" else h * kv_heads // heads
        files.append(str(Path(folder) / f"{name}.npy"))
        np.save(files[-1], tensors[name][0, head].astype(np.float32))
    return files


def block_maps(sparge, files, folder):
    """Block maps of one head: mean attention [nq, nk], kept [nq, nk], share of rows that computed P.V."""
    dump = str(Path(folder) / "dump")
    mass = str(Path(folder) / "mass.npy")
    run(sparge, files, [*SETTINGS["chosen"], "--dump", dump])
    subprocess.run([sparge, "map", *files, "--causal", *SETTINGS["chosen"], "-o",
                    str(Path(folder) / "map.png"), "--map-out", mass], check=True, stdout=subprocess.DEVNULL)
    return (np.load(mass)[0, 0], np.load(f"{dump}/mask.npy")[0, 0], np.load(f"{dump}/pv_done.npy")[0, 0])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparge", default=str(ROOT / "build/release/tools/sparge"), help="the program")
    args = parser.parse_args()
    manifest = json.loads((CAPTURE / "manifest.json").read_text())

    print(f"{manifest['model']}, {manifest['tokens']} tokens, causal")
    print(f"{'layer':>5} {'head':>4}  {'attention':9} {'math':4} {'sparsity':>8} {'qk only':>8} "
          f"{'rel. L1':>8} {'worst row':>9} {'seconds':>8}")
    rows, maps = [], []
    for entry in manifest["files"]:
        tensors = load_file(CAPTURE / entry["file"])
        for h, head in enumerate(entry["query_heads"]):
            with tempfile.TemporaryDirectory() as folder:
                files = write_head(folder, tensors, h)
                for attention, arithmetic, options in VARIANTS:
                    result = run(args.sparge, files, [*options, "--check"])
                    row = {"layer": entry["layer"], "head": head, "attention": attention,
                           "arithmetic": arithmetic} | {c: result[c] for c in COLUMNS[4:]}
                    rows.append(row)
                    print(f"{row['layer']:5} {head:4}  {attention:9} {arithmetic:4} {row['sparsity']:8.3f} "
                          f"{row['sparsity_qk']:8.3f} {row['l1']:8.2g} {row['worst_row_l1']:9.2g} "
                          f"{row['seconds_total']:8.2f}", flush=True)
                if (entry["layer"], head) in MAP_HEADS:
                    mass, mask, done = block_maps(args.sparge, files, folder)
                    maps += [(entry["layer"], head, i, j, f"{mass[i, j]:.6g}", int(mask[i, j]), f"{done[i, j]:.6g}")
                             for i, j in np.ndindex(mass.shape) if mass[i, j] > 0]

    with open(HERE / "out.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    with open(ROOT / "paper_figs/attention_map.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "head", "q_block", "k_block", "mass", "kept", "pv_done"])
        writer.writerows(maps)


if __name__ == "__main__":
    main()
