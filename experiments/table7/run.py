#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Table 7: sparsity by length at a constant bound on the error: thresholds are tuned anew for every
length.

On the committed captures (nine heads, up to 4096 tokens); and on all heads of SmolLM2-135M over the
beginnings of texts up to 8192 tokens. (l1, l2) = (0.08, 0.09), as in the paper; each text is tuned
on by itself and not judged on others.
"""
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

import model  # noqa: E402
from errors import cell, worst  # noqa: E402
from harness import ROOT, run_json  # noqa: E402
from item import Job, run  # noqa: E402
from sets import SMOLLM2, beginning, entries, tensors, tokens_of, tune  # noqa: E402

WEIGHTS = model.CACHE / model.GGUF
TEXTS = ["opticks", "python_datamodel", "go_parser"]
LENGTHS = [1024 << n for n in range(8)]
BOUNDS = {"l1": 0.08, "l2": 0.09}


def captured(text, tokens, how):
    """A folder with the captures of the whole model."""
    run_json(how.lm, "capture", WEIGHTS, ROOT / f"build/texts/{text}.txt", "--length", tokens,
             "--attention", "f32", "-o", how.folder / "capture")
    return how.folder / "capture"


def measure(key, how):
    """Each file is tuned alone. Attention that is causal has a sink."""
    text, tokens = key["text"], key["tokens"]
    folder = how.captures or (SMOLLM2 if text == "committed" else captured(text, tokens, how))
    heads = []
    for entry in entries(folder):
        found = beginning(tensors(entry.path), tokens)
        heads += [h.in_sample for h in tune(entry, found, sink=entry.causal, **BOUNDS).heads]
    return {"heads": len(heads), "sparsity": f"{statistics.mean(x.sparsity for x in heads):.6f}",
            "worst_l1": cell(worst(x.worst for x in heads), 6)}


def captures(folder):
    """Every length that all of its files reach, and the whole of the shortest."""
    found = entries(folder)
    tokens = min(tokens_of(entry.path, tensors(entry.path)) for entry in found)
    return [Job({"text": str(folder), "tokens": n}, needs=[entry.path for entry in found])
            for n in [*(n for n in LENGTHS if n < tokens), tokens]]


JOBS = [
    Job({"text": "committed", "tokens": tokens}, tokens / 2048, smoke=tokens < 4096)
    for tokens in LENGTHS[:3]
]
JOBS += [Job({"text": text, "tokens": tokens}, 5 + 140 * (tokens / 8192) ** 2,
             needs=[WEIGHTS, ROOT / f"build/texts/{text}.txt"])
         for text in TEXTS for tokens in LENGTHS[:4]]

if __name__ == "__main__":
    run(__file__, JOBS, measure, captures=captures)
