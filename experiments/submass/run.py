#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Loss at equal density: dense attention, SpargeAttn, and a threshold on mass, on SmolLM2-135M, out
of the tables of measure.py here.

change is of perplexity against dense f32: over all texts, and of each. kl is the divergence from
dense f32 for each token, in nats. speed is the seconds of attention in dense f32 by those of this
one, in which prediction and quantization are.
"""
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lm")]

import again  # noqa: E402
from attentions import F32  # noqa: E402
from harness import read_csv  # noqa: E402
from item import Job, run  # noqa: E402
from names import perplexity  # noqa: E402

FILES = {name: HERE / f"{name}.csv" for name in ("ppl", "needle", "time")}
TABLES = {name: read_csv(file) if file.exists() else [] for name, file in FILES.items()}
KEYS = "tokens", "rule", "wanted", "blocks", "lambda"


def of(table, **key):
    return [row for row in TABLES[table] if all(row[k] == v for k, v in key.items())]


def numbers(rows, column):
    return [float(row[column]) for row in rows]


def dense(table, key):
    return of(table, tokens=key["tokens"], rule=F32)


def change(rows, base):
    return f"{perplexity(rows) / perplexity(base) - 1:.6f}"


def seconds(rows, column):
    return statistics.median(numbers(rows, column))


def measure(key, _how):
    ppl, needle, time = (of(table, **key) for table in TABLES)
    base = dense("ppl", key)
    found = {"density": f"{statistics.mean(numbers(ppl, 'density_tokens')):.6f}",
             "sparsity": f"{statistics.mean(numbers(ppl, 'sparsity')):.6f}",
             "perplexity": f"{perplexity(ppl):.5f}", "change": change(ppl, base),
             "kl": f"{statistics.mean(numbers(ppl, 'kl')):.6g}"}
    for row, other in zip(ppl, base):
        name = Path(row["text"]).stem
        found[f"change_{name}"] = change([row], [other])
        found[f"density_{name}"] = row["density_tokens"]
    took = time and seconds(time, "seconds_attention")
    return found | {
        "needles": f"{statistics.mean(numbers(needle, 'right')):.4f}" if needle else "",
        "seconds_attention": f"{took:.4f}" if time else "",
        "speed": f"{seconds(dense('time', key), 'seconds_attention') / took:.3f}" if time else "",
        "seconds_prefill": f"{seconds(time, 'seconds'):.4f}" if time else ""
    }


def jobs():
    found = dict.fromkeys(tuple(row[k] for k in KEYS) for row in TABLES["ppl"])
    return [Job(dict(zip(KEYS, key)), 0.1, smoke=True,
                needs=[file for file in FILES.values() if file.exists()]) for key in found]


if __name__ == "__main__":
    run(__file__, jobs(), measure, again=again.submass)
