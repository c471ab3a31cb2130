#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Table 3: what predicting the mask costs beside dense attention, by length.

One head of 128 channels, all cores, not causal. Inputs: normal numbers, where nothing is to be
found; and those of `sparge bench`, whose blocks are alike.
"""
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from item import Job, run  # noqa: E402

DIM, SEED = 128, 1
TOKENS = {8192: 20, 16384: 50, 32768: 130, 65536: 210, 131072: 550}  # and seconds
TIMES = [
    "ms_predict", "ms_quantize", "ms_dense_f32", "ms_dense_int8", "overhead_f32", "overhead_int8"
]


def normal(folder, tokens):
    draw = np.random.default_rng(SEED)
    file = folder / "normal.safetensors"
    save_file({name: draw.standard_normal((1, 1, tokens, DIM), dtype=np.float32) for name in "qkv"},
              file)
    return file


def measure(key, how):
    tokens = key["tokens"]
    inputs = (["--capture", normal(how.folder, tokens)] if key["inputs"] == "normal"
              else ["--q-len", tokens, "--dim", DIM])
    found = how.bench(*inputs, "--mask-kind", "random,predicted", "--sparsity", 0, *how.threads(),
                      "--repeat", 5 if tokens < 65536 else 1)
    case = {row["case"]: row for row in found}
    dense, sparse = case["int8/int8 dense"], case["int8/int8 predicted"]
    f32 = dense["ms"] * dense["speedup_vs_f32"]
    spent = sparse["ms_predict"] + sparse["ms_quantize"]
    return {"sparsity": round(sparse["sparsity"], 6), "ms_predict": round(sparse["ms_predict"], 4),
            "ms_quantize": round(sparse["ms_quantize"], 4), "ms_dense_f32": round(f32, 3),
            "ms_dense_int8": round(dense["ms"], 3), "overhead_f32": round(spent / f32, 6),
            "overhead_int8": round(spent / dense["ms"], 6)}


JOBS = [Job({"inputs": inputs, "tokens": tokens}, seconds, smoke=tokens == 8192)
        for inputs in ("normal", "topics") for tokens, seconds in TOKENS.items()]

if __name__ == "__main__":
    run(__file__, JOBS, measure, TIMES)
