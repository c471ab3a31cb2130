#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fig 3: the workflow on the paper's toy: three query blocks, four key blocks, of which Q3 and K3
are not self-similar.

q and k are made so that the pooled scores give the P of the paper's picture; what follows from it
is what the library does, every stage of it. Rows: the stage, query block, key block (-1: none),
value.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from item import Job, run  # noqa: E402  (finds sparge)

import sparge  # noqa: E402

P = np.array([[0.9, 0.1, 0.0, 0.0], [0.1, 0.0, 0.9, 0.0], [0.0, 0.5, 0.5, 0.0]])
LOW = 2  # of both: the third
DIM, BLOCK_Q, BLOCK_K, SEED = 64, 128, 64, 1
THRESHOLDS = {"theta": 0.5, "tau": 0.8, "lambda_": -3.0}


def block(mean, rows, noise, at, draw):
    """Rows around a mean; the noise is in channels of its own, and none in the mean."""
    x = np.zeros((rows, DIM))
    x[:, at] = noise * draw.standard_normal((rows, at.stop - at.start))
    return x - x.mean(0) + mean


def toy():
    """q, k and v. Key block j lies in direction j, and a query block asks for it by log P
    sqrt(DIM)."""
    draw = np.random.default_rng(SEED)
    length = 4.0
    q, k = [], []
    for i, row in enumerate(np.log(np.maximum(P, 1e-3)) * DIM ** 0.5 / length):
        mean = np.zeros(DIM)
        mean[:4] = row - row.mean()
        q.append(block(mean, BLOCK_Q, 10.0 if i == LOW else 0.3, slice(4, 34), draw))
    for j in range(4):
        k.append(
            block(length * np.eye(DIM)[j], BLOCK_K, 3.0 if j == LOW else 0.1, slice(34, 64), draw))
    return np.concatenate(q), np.concatenate(k), draw.standard_normal((4 * BLOCK_K, DIM))


def measure(key, how):
    stage = sparge.intermediates(*(x[None].astype(np.float32) for x in toy()), **THRESHOLDS)
    rows = [{"stage": "P of the paper", "q_block": i, "k_block": j, "value": P[i, j]}
            for i, j in np.ndindex(P.shape)]
    for i, value in enumerate(stage["q_sim"][0]):
        rows.append({
            "stage": "similarity of q", "q_block": i, "k_block": -1, "value": float(f"{value:.5g}")
        })
    for j, value in enumerate(stage["k_sim"][0]):
        rows.append({
            "stage": "similarity of k", "q_block": -1, "k_block": j, "value": float(f"{value:.5g}")
        })
    score = stage["S"][0].astype(float)
    weight = np.exp(score - score.max(1, keepdims=True))
    for name, map_ in [("P", weight / weight.sum(1, keepdims=True)), ("mask", stage["mask"][0]),
                       ("P.V computed", stage["pv_done"][0])]:
        rows += [{"stage": name, "q_block": i, "k_block": j, "value": float(f"{map_[i, j]:.5g}")}
                 for i, j in np.ndindex(map_.shape)]
    return rows


if __name__ == "__main__":
    run(__file__, [Job({"toy": "paper"}, 0.1, smoke=True)], measure)
