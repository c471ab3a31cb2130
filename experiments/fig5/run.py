#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fig 5: token orders in a grid of 1 x 6 x 6: which place each order visits when, and which block
of four it falls into."""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from item import Job, run  # noqa: E402  (finds sparge)

import sparge  # noqa: E402

GRID, BLOCK, SEED = (1, 6, 6), 4, 0


def measure(key, how):
    places = np.unravel_index(sparge.token_order(key["order"], GRID, SEED), GRID)
    return [{"place": n, "t": t, "h": h, "w": w, "block": n // BLOCK}
            for n, (t, h, w) in enumerate(zip(*(axis.tolist() for axis in places)))]


JOBS = [
    Job({"order": name}, 0.1, smoke=True) for name in ("row", "column", "time", "random", "hilbert")
]

if __name__ == "__main__":
    run(__file__, JOBS, measure)
