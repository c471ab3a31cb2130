#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The committed capture of a real model, head by head: dense and sparse, f32 and int8; the first
table of the README.

L1 is against dense attention in double, mask_worst_row_l1 against the textbook formula over the
same mask.
"""
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from errors import l1, row_l1  # noqa: E402
from item import Job, run  # noqa: E402
from sets import CHOSEN, F32, SMOLLM2, head_of, heads  # noqa: E402

import sparge  # noqa: E402

# Two operating points. "default" is what is done when nothing is said.
SETTINGS = {"dense": {}, "default": {"theta": 0.6, "tau": 0.98}, "chosen": CHOSEN}
VARIANTS = [("dense", "f32"), ("dense", "int8"), ("default", "int8"), ("chosen", "f32"),
            ("chosen", "int8")]
FIGURES = ["sparsity", "sparsity_qk", "l1", "worst_row_l1", "mask_worst_row_l1"]
TIMES = ["seconds_predict", "seconds_quantize", "seconds_attend", "seconds_total"]
HEADS = heads(SMOLLM2)


def measure(key, how):
    qkv, rows = head_of(*HEADS[key["layer"], key["head"]]), []
    want = sparge.oracle(*qkv, is_causal="end")
    for attention, arithmetic in VARIANTS:
        options = SETTINGS[attention] | (F32 if arithmetic == "f32" else {}) | {"is_causal": "end"}
        start = time.perf_counter()
        if attention == "dense":
            mask, (got, stats) = None, sparge.attend(*qkv, None, return_stats=True, **options)
        else:
            got, mask, stats = sparge.attention(*qkv, return_mask=True, return_stats=True,
                                                **options)
        seconds = time.perf_counter() - start
        masked = want if mask is None else sparge.oracle(*qkv, mask=mask, is_causal="end")
        figures = [stats.sparsity, 1 - stats.counts.density_blocks, l1(got, want),
                   row_l1(got, want).max(), row_l1(got, masked).max(), stats.seconds_predict,
                   stats.seconds_quantize, stats.seconds_attend, seconds]
        rows.append({"attention": attention, "arithmetic": arithmetic}
                    | {name: f"{x:.9g}" for name, x in zip(FIGURES + TIMES, figures)})
    return rows


if __name__ == "__main__":
    run(__file__, [Job({"layer": layer, "head": head}, 5, smoke=True) for layer, head in HEADS],
        measure, TIMES)
