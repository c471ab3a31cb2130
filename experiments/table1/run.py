#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Table 1's language rows, on SmolLM2-135M: perplexity, needles, sparsity and speed by length, out
of experiments/lm.

speed is the paper's O(attn) / t: operations of dense attention by the time that this attention
takes; of the causal half, all layers and heads, two threads.
"""
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lm")]

import again  # noqa: E402
from harness import read_csv  # noqa: E402
from item import Job, run  # noqa: E402
from names import LENGTHS, PEER_TITLES, TITLES, perplexity  # noqa: E402

LM = HERE.parent / "lm"
LAYERS, HEADS, DIM = 30, 9, 64
PEERS = {name: LM / f"peers_{name}.csv" for name in ("ppl", "needle")}
TABLES = {name: read_csv(LM / f"{name}.csv") for name in ("ppl", "needle", "time")}
for name, path in PEERS.items():
    TABLES[name] += read_csv(path) if path.exists() else []
NAMES = TITLES | PEER_TITLES


def of(table, key):
    return [row for row in TABLES[table]
            if row["tokens"] == str(key["tokens"]) and NAMES[row["attention"]] == key["attention"]]


def numbers(rows, column):
    return [float(row[column]) for row in rows]


def left_out(ppl):
    """By the mask and lambda, and by the mask; of peers, whose blocks are partial, in pairs of
    tokens."""
    if "sparsity_qk" in ppl[0]:
        return [statistics.mean(numbers(ppl, name)) for name in ("sparsity", "sparsity_qk")]
    return [1.0 - statistics.mean(numbers(ppl, "density_tokens"))] * 2


def speed(tokens, seconds):
    """Empty where no seconds were measured."""
    if not seconds:
        return dict.fromkeys(("gops", "seconds_attention", "seconds_prefill"), "")
    took = statistics.median(numbers(seconds, "seconds_attention"))
    operations = LAYERS * HEADS * 4 * DIM * tokens * (tokens + 1) / 2
    return {"gops": f"{operations / took / 1e9:.2f}", "seconds_attention": f"{took:.4f}",
            "seconds_prefill": f"{statistics.median(numbers(seconds, 'seconds')):.4f}"}


def measure(key, _how):
    ppl, needle, seconds = (of(table, key) for table in TABLES)
    both, mask = left_out(ppl)
    return {"sparsity": f"{both:.6f}", "sparsity_qk": f"{mask:.6f}",
            "perplexity": f"{perplexity(ppl):.5f}",
            "needles": f"{statistics.mean(numbers(needle, 'right')):.4f}" if needle else "",
            **speed(key["tokens"], seconds)}


if __name__ == "__main__":
    run(__file__, [Job({"tokens": tokens, "attention": name}, 0.1, smoke=True,
                       needs=[LM / f"{table}.csv" for table in TABLES])
                   for tokens in LENGTHS for name in dict.fromkeys(NAMES.values())
                   if of("ppl", {"tokens": tokens, "attention": name})], measure, again=again.ppl)
