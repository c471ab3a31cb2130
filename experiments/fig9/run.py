#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Figs 9 and 11: needles in a haystack by depth and length, on SmolLM2-135M, out of experiments/lm:
how many are found."""
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lm")]

import again  # noqa: E402
from harness import read_csv  # noqa: E402
from item import Job, run  # noqa: E402
from names import LENGTHS, TITLES  # noqa: E402

NEEDLES, ROWS = HERE.parent / "lm/needle.csv", {}
for row in read_csv(NEEDLES):
    ROWS.setdefault((row["attention"], int(row["tokens"]), row["depth"]), []).append(row)
NAMES = {title: name for name, title in TITLES.items()}


def measure(key, _how):
    found = ROWS[NAMES[key["attention"]], key["tokens"], key["depth"]]
    return {"needles": len(found), "found": sum(int(row["right"]) for row in found),
            "sparsity": f"{statistics.mean(float(row['sparsity']) for row in found):.6f}"}


JOBS = [
    Job({"attention": title, "tokens": tokens, "depth": depth}, 0.01, smoke=True, needs=[NEEDLES])
    for title, name in NAMES.items() for tokens in LENGTHS
    for depth in sorted({at[2] for at in ROWS}) if (name, tokens, depth) in ROWS
]

if __name__ == "__main__":
    run(__file__, JOBS, measure, again=again.needle)
