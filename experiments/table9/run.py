#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tables 4, 9 and 10: token orders of a video, and the self-similarity judge on and off.

Each capture of the video model is reordered in five ways after the position embedding, as in A.1 of
the paper. Thresholds "tuned" are those that the tuner found for each head at (l1, l2) = (0.05,
0.06) in Hilbert's order on another sample (../video/params.json); most of them have no use for the
judge, so there are also thresholds "alike" for all heads. Without a model, attention of the patches
of two clips to each other, with thresholds from another part of each. Without the judge theta is
-1. q_sim and k_sim are means over blocks of 128 and 64 tokens, of k less its mean; sim_k_raw
without that. L1 is against dense f32.
"""
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture"), str(HERE.parent / "video")]

import patches  # noqa: E402
from captured import PARAMS, committed, entries_of, of_user, whole  # noqa: E402
from errors import cell, relative_l1  # noqa: E402
from item import run  # noqa: E402
import sets  # noqa: E402

import sparge  # noqa: E402

ORDERS = ["random", "row", "column", "time", "hilbert"]
BLOCK_K, SEED = 64, 0
# Chosen on the committed capture, which is of another sample.
ALIKE = {"theta": 0.3, "tau": 0.9, "topk": None, "lambda_": None}
OFF = {"theta": -1.0}
VARIANTS = [("tuned", "on", {}), ("tuned", "off", OFF), ("alike", "on", ALIKE),
            ("alike", "off", ALIKE | OFF)]


def self_similarity(x, rows):
    """Mean over blocks of |mean of unit rows|^2, of each head of [H, N, D]."""
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    unit = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    return np.mean(
        [np.square(unit[:, a:a + rows].mean(1)).sum(-1) for a in range(0, x.shape[1], rows)],
        axis=0)


def rows_of(name, entry, found, params, want):
    """Of one order: a row for each head and variant."""
    mixed, index = sets.reordered(entry, found, name, SEED)
    q, k, _ = sets.wide(mixed)
    raw = self_similarity(k[0].astype(np.float64), BLOCK_K)
    stages = sparge.intermediates(q, k, smooth_k=params.options["smooth_k"])
    q_sim, k_sim = (stages[f"{x}_sim"][0].mean(-1, dtype=np.float64) for x in "qk")
    group = len(q_sim) // len(k_sim)
    rows = []
    for kind, judge, chosen in VARIANTS:
        got, sparsity = sets.attention(entry, mixed, params.changed(**chosen))
        error = relative_l1(got[0], want[:, index],
                            f"{entry.path}, {name}, {kind}, judge {judge}: o")
        rows += [{
            "order": name, "head": head, "thresholds": kind, "judge": judge,
            "q_sim": f"{q_sim[h]:.5f}", "k_sim": f"{k_sim[h // group]:.5f}",
            "sim_k_raw": f"{raw[h // group]:.5f}", "l1": cell(error[h], 6),
            "sparsity": f"{sparsity[h]:.6f}"
        } for h, head in enumerate(entry.heads)]
    return rows


def with_grid(folder):
    """The jobs of a user's captures: an order is one of a grid."""
    for entry in sets.entries(folder):
        if not entry.grid:
            sys.exit(f"table9: the manifest of {entry.path} has no 'grid' [T, H, W] of its tokens")
    return of_user(folder)


def of_patches(clip):
    """A capture, and the thresholds for it, as those of the video model were found."""
    other, found = patches.capture(clip, 0)
    curve, _ = sets.reordered(other, found, "hilbert")
    params = sets.tune(other, curve, l1=0.05, l2=0.06).params()
    return *patches.capture(clip, patches.FIRST[clip]), params


def of_entry(entry, found, params):
    want = sets.dense(entry, found)[0].astype(np.float64)
    return [row for name in ORDERS for row in rows_of(name, entry, found, params, want)]


def measure(key, how):
    if key["source"] == "patches" and not how.captures:
        return of_entry(*of_patches(key["sample"]))
    params = sets.read_params(how.params or PARAMS)
    return [row for entry in entries_of(key, how)
            for row in of_entry(entry, sets.tensors(entry.path), params)]


if __name__ == "__main__":
    run(
        __file__,
        committed(8) + whole(samples=[1, 2], layers=range(6), steps=[6], seconds=30) +
        patches.jobs(60), measure, captures=with_grid, params=True)
