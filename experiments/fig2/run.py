#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fig 2 (and Fig 3's last step): maps of attention by blocks: the mass of P, what the predictor
keeps, and the share of P.V that lambda leaves, for heads of a language model and of the video
model.

Rows: query block, key block, mass (the mean attention of the query block's rows to the key block),
kept, share of P.V computed.
"""
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from item import Job, run  # noqa: E402  (finds sparge)
from sets import CHOSEN, SMOLLM2, head_of, heads  # noqa: E402

import sparge  # noqa: E402

CAPTURES = {"smollm2": SMOLLM2, "video": HERE.parent / "video/capture/sample0"}
MODES = {"smollm2": CHOSEN | {"is_causal": "end"},
         "video": {"theta": 0.3, "tau": 0.9, "lambda_": -5.0}}
SHOWN = {"smollm2": [(6, 7), (12, 5), (21, 0)]}  # layer, head; of video all


def measure(key, how):
    """Blocks that no row may see have no mass, and no row here."""
    head = heads(CAPTURES[key["source"]])[key["layer"], key["head"]]
    qkv, mode = head_of(*head), MODES[key["source"]]
    stages = sparge.intermediates(*qkv, **mode)
    _, mass = sparge.oracle(*qkv, **mode, return_block_mass=True)
    maps = [x[0] for x in (mass, stages["mask"], stages["pv_done"])]
    return [{
        "q_block": i, "k_block": j, "mass": f"{maps[0][i, j]:.6g}", "kept": int(maps[1][i, j]),
        "pv_done": f"{maps[2][i, j]:.6g}"
    } for i, j in np.ndindex(maps[0].shape) if maps[0][i, j] > 0]


JOBS = [Job({"source": source, "layer": layer, "head": head}, 2, smoke=True)
        for source, capture in CAPTURES.items() for layer, head in heads(capture)
        if (layer, head) in SHOWN.get(source, [(layer, head)])]

if __name__ == "__main__":
    run(__file__, JOBS, measure)
