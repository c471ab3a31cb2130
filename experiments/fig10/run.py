#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fig 10: speed by sparsity at 22272 tokens and 128 channels: one head, all cores, not causal.

Masks are imposed, at random and as a band, or predicted, by the share of blocks that are kept, on
the inputs of `sparge bench`. Every row is measured beside our dense f32 and dense int8 by turns;
those of torch beside its own dense attention: FlexAttention over the random masks.
"""
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flex import SEED, attention, flex_mask, seconds  # noqa: E402
from item import Job, run  # noqa: E402

TOKENS, DIM, REPEAT = 22272, 128, 3
SHARES = {"random": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8], "banded": [0.1, 0.3, 0.5, 0.6, 0.8],
          "predicted": [0.1, 0.3, 0.5, 0.6, 0.8], "torch": [0, 0.3, 0.5, 0.8]}  # to be left out
TIMES = ["ms", "ms_predict", "ms_quantize", "ms_dense_f32", "ms_dense_int8", "efficiency"]


def ours(mask, asked, how):
    """efficiency: of the ideal, time in proportion to what is left; prediction and quantization are
    in ms."""
    which = (["--mask-kind", "random,predicted", "--sparsity", 0, "--topk",
              round(1 - asked, 9)]
             if mask == "predicted" else ["--mask-kind", mask, "--sparsity", f"0,{asked}"])
    found = how.bench("--q-len", TOKENS, "--dim", DIM, *how.threads(),
                      "--repeat", REPEAT if how.full else 1, *which)
    case = {row["case"]: row for row in found}
    dense = case["int8/int8 dense"]
    row = case["int8/int8 predicted" if mask == "predicted" else f"int8/int8 {mask} {asked}"]
    return {
        "sparsity": round(row["sparsity"], 6), "ms": round(row["ms"], 3), "ms_predict":
        round(row["ms_predict"], 3), "ms_quantize": round(row["ms_quantize"], 3), "ms_dense_f32":
        round(dense["ms"] * dense["speedup_vs_f32"],
              2), "ms_dense_int8": round(dense["ms"], 2), "efficiency": round(
                  (1 - row["sparsity"]) * dense["ms"] / row["ms"], 4)
    }


def torch_rows(share):
    """Dense by scaled_dot_product_attention where share is 0, else FlexAttention, in f32."""
    import torch

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(SEED)
    inputs = [torch.randn(1, 1, TOKENS, DIM) for _ in range(3)]
    blocks, left_out = flex_mask(torch, TOKENS, share) if share else (None, 0.0)
    call, dense = attention(torch, inputs, blocks), attention(torch, inputs)
    with torch.inference_mode():
        call(), dense()
        times = [(seconds(call), seconds(dense)) for _ in range(REPEAT)]
    ms, ms_dense = (1e3 * statistics.median(column) for column in zip(*times))
    return {"sparsity": round(left_out, 6), "ms": round(ms, 3), "ms_predict": "", "ms_quantize": "",
            "ms_dense_f32": round(ms_dense, 2), "ms_dense_int8": "",
            "efficiency": round((1 - left_out) * ms_dense / ms, 4)}


def measure(key, how):
    return torch_rows(key["asked"]) if key["mask"] == "torch" else ours(
        key["mask"], key["asked"], how)


JOBS = [
    Job({"mask": mask, "asked": share}, 30, smoke=(mask, share) == ("random", 0.5),
        needs=["torch"] * (mask == "torch")) for mask, shares in SHARES.items() for share in shares
]

if __name__ == "__main__":
    run(__file__, JOBS, measure, TIMES)
