#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The committed capture of a real model, head by head: dense and sparse, f32 and int8; the first
table of the README.

L1 is against dense attention in double, mask_worst_row_l1 against the textbook formula over the
same mask.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from item import Job, run  # noqa: E402
from sets import CHOSEN, SMOLLM2, heads, write_head  # noqa: E402

# Two operating points. "default" is what the program does when nothing is said.
SETTINGS = {"default": ["--theta", "0.6", "--tau", "0.98"], "chosen": CHOSEN}
F32 = ["--qk-dtype", "f32", "--pv-dtype", "f32"]
VARIANTS = [("dense", "f32", ["--dense", *F32]), ("dense", "int8", ["--dense"]),
            ("default", "int8", SETTINGS["default"]),
            ("chosen", "f32", SETTINGS["chosen"] + F32), ("chosen", "int8", SETTINGS["chosen"])]
FIGURES = ["sparsity", "sparsity_qk", "l1", "worst_row_l1", "mask_worst_row_l1"]
TIMES = ["seconds_predict", "seconds_quantize", "seconds_attend", "seconds_total"]
HEADS = heads(SMOLLM2)


def measure(key, how):
    files = write_head(*HEADS[key["layer"], key["head"]], how.folder)
    rows = []
    for attention, arithmetic, options in VARIANTS:
        result = how.sparge("run", *files, "--causal", *options, "--check")
        rows.append({"attention": attention, "arithmetic": arithmetic}
                    | {name: result[name] for name in FIGURES + TIMES})
    return rows


if __name__ == "__main__":
    run(__file__, [Job({"layer": layer, "head": head}, 5, smoke=True) for layer, head in HEADS],
        measure, TIMES)
