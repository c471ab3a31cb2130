#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fig 4: 128 tokens of q and k of one head, channel by channel: neighbours are alike, which is what
pooling a block relies on."""
import sys
from pathlib import Path

from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from item import Job, run  # noqa: E402
from sets import SMOLLM2  # noqa: E402

FIRST, TOKENS = 2048, 128


def measure(key, how):
    tensor = load_file(SMOLLM2 / f"{key['capture']}.safetensors")[key["tensor"]]
    return [{"token": FIRST + n} | {f"c{c:02}": f"{x:.4g}" for c, x in enumerate(row)}
            for n, row in enumerate(tensor[0, 0, FIRST:FIRST + TOKENS].astype(float))]


JOBS = [Job({"capture": path.stem, "tensor": tensor}, 0.1, smoke=True)
        for path in sorted(SMOLLM2.glob("*.safetensors")) for tensor in "qk"]

if __name__ == "__main__":
    run(__file__, JOBS, measure)
