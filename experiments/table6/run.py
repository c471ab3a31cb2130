#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Table 6: what the mask leaves out and what lambda leaves out, alone and together, at the
thresholds that the tuner found.

On the committed captures; and on all of SmolLM2-135M at 8192 tokens of five texts
by `sparge-lm ppl`, with the perplexity that each costs. Sparsity is the paper's: Q.K and P.V are a
half each, so that lambda alone reaches 0.5 at most.
"""
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture"), str(HERE.parent / "lm")]

import model  # noqa: E402
import texts  # noqa: E402
from harness import ROOT, run_json  # noqa: E402
from item import Job, run  # noqa: E402
from names import MODEL, perplexity  # noqa: E402
import sets  # noqa: E402

TUNED = HERE.parent / "tune"
COMMITTED, WORST = TUNED / "params_0.08_0.09.json", TUNED / "model_worst.json"
TEXTS = [ROOT / f"build/texts/{text.name}.txt" for text in texts.select(["judge"])]
WEIGHTS = model.CACHE / model.GGUF
PARTS = {"mask": {"lambda_": None}, "lambda": {"theta": -1.0, "tau": 1.0}, "both": {}}
LENGTH = 8192


def of_captures(folder, path, part):
    params = sets.read_params(path).changed(**PARTS[part])
    heads = [sparsity for entry in sets.entries(folder)
             for sparsity in sets.attention(entry, sets.tensors(entry.path), params)[1]]
    return {"sparsity": statistics.mean(heads), "perplexity": ""}


def of_model(part, how):
    """Over all heads; the perplexity over all texts."""
    params = how.folder / f"{part}.json"
    sets.read_params(WORST).changed(**PARTS[part]).save(params)
    found = run_json(how.lm, "ppl", WEIGHTS, *TEXTS, "--length", LENGTH, "--attention", params,
                     "--model", MODEL, "--sink")["rows"]
    return {
        "sparsity": statistics.mean(row["sparsity"] for row in found), "perplexity":
        f"{perplexity(found):.4f}"
    }


def measure(key, how):
    part = key["part"]
    found = (of_captures(how.captures, how.params, part) if how.captures else of_captures(
        sets.SMOLLM2, COMMITTED, part) if key["inputs"] == "captures" else of_model(part, how))
    return found | {"sparsity": f"{found['sparsity']:.6f}"}


def captures(folder):
    paths = [entry.path for entry in sets.entries(folder)]
    for path in paths:
        sets.tensors(path)  # or says what is wrong with them
    return [Job({"inputs": str(folder), "part": part}, needs=paths) for part in PARTS]


JOBS = [
    Job({"inputs": "captures", "part": part}, 1, smoke=True, needs=[COMMITTED]) for part in PARTS
]
JOBS += [
    Job({"inputs": "model", "part": part}, 150, needs=[WEIGHTS, WORST, *TEXTS]) for part in PARTS
]

if __name__ == "__main__":
    run(__file__, JOBS, measure, captures=captures, params=True)
