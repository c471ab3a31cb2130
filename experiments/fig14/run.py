#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Figs 14 to 17: sparsity by layer, denoising step, sample and head, over the captures of the video
model.

Thresholds as in ../table9; where a set has a grid its tokens are put into Hilbert's order first, as
the paper has them.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture"), str(HERE.parent / "video")]

from captured import PARAMS, committed, entries_of, of_user, whole  # noqa: E402
from item import run  # noqa: E402
from sets import attention, read_params, reordered, tensors  # noqa: E402


def measure(key, how):
    """A row for each query head."""
    rows, params = [], read_params(how.params or PARAMS)
    for entry in entries_of(key, how):
        found = tensors(entry.path)
        if entry.grid and not entry.causal:
            found, _ = reordered(entry, found, "hilbert")
        rows += [{"head": head, "sparsity": f"{s:.6f}"}
                 for head, s in zip(entry.heads, attention(entry, found, params)[1])]
    return rows


if __name__ == "__main__":
    run(
        __file__,
        committed(1) +
        whole(samples=range(3), layers=range(6), steps=[0, 2, 4, 6, 8, 9], seconds=6), measure,
        captures=of_user, params=True)
