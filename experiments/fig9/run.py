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
from names import LENGTHS, PEER_TITLES, TITLES  # noqa: E402

NEEDLES, PEERS, ROWS = HERE.parent / "lm/needle.csv", HERE.parent / "lm/peers_needle.csv", {}
NAMES = TITLES | PEER_TITLES
for row in [*read_csv(NEEDLES), *(read_csv(PEERS) if PEERS.exists() else [])]:
    ROWS.setdefault((NAMES[row["attention"]], int(row["tokens"]), row["depth"]), []).append(row)


def left_out(row):
    """Of peers, whose blocks are partial, in pairs of tokens."""
    return 1.0 - float(row["density_tokens"]) if "density_tokens" in row else \
        float(row["sparsity"])


def measure(key, _how):
    found = ROWS[key["attention"], key["tokens"], key["depth"]]
    return {"needles": len(found), "found": sum(int(row["right"]) for row in found),
            "sparsity": f"{statistics.mean(map(left_out, found)):.6f}"}


JOBS = [
    Job({"attention": title, "tokens": tokens, "depth": depth}, 0.01, smoke=True, needs=[NEEDLES])
    for title in dict.fromkeys(NAMES.values()) for tokens in LENGTHS
    for depth in sorted({at[2] for at in ROWS}) if (title, tokens, depth) in ROWS
]

if __name__ == "__main__":
    run(__file__, JOBS, measure, again=again.needle)
