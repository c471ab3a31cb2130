#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The tuner on the committed captures (Sec 3.6): thresholds for nine heads at the paper's four
pairs of bounds, found on one text and judged on another. A full run writes the thresholds too:
params_*.json.
"""
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from harness import run_json, write_text  # noqa: E402
from item import Job, run  # noqa: E402
from sets import SMOLLM2  # noqa: E402

OTHER = SMOLLM2.with_name("smollm2-135m-stb_image")
# (l1, l2) of Sec 4.1: Llama3.1; SD3.5 and Flux; CogvideoX and Mochi; Open-Sora-Plan.
PAIRS = [("0.08", "0.09"), ("0.07", "0.08"), ("0.05", "0.06"), ("0.03", "0.035")]
MODE = ["--causal", "--sink"]
TABLE = [
    "layer", "head", "theta", "tau", "lambda", "dense", "back_off", "sparsity", "l1_in",
    "first_sparsity_out", "first_l1_out", "sparsity_out", "l1_out", "dense_passes", "seconds"
]


def tune(program, captures, output, l1, l2, *options):
    """Tunes from the beginning; the heads of the file, and the program's summary. An older file
    stays until then."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "params.json"
        summary = run_json(program, "tune", *captures, "-o", found, "--l1", l1, "--l2", l2, *MODE,
                           *options)
        write_text(output, found.read_text())
    return json.loads(Path(output).read_text())["heads"], summary


def row_of(head):
    """Of a head. The errors are of the worst input, as the bounds are; unknown where the head is
    not finite."""
    inside, first, out = (head[name] or {} for name in ("in_sample", "held_out_first", "held_out"))
    row = head | {
        "sparsity": inside.get("sparsity", 0.0), "l1_in": inside.get("worst_l1"),
        "first_sparsity_out": first.get("sparsity"), "first_l1_out": first.get("worst_l1"),
        "sparsity_out": out.get("sparsity"), "l1_out": out.get("worst_l1")
    }
    return {key: "" if row[key] is None else row[key] for key in TABLE}


def measure(key, how):
    name = f"params_{key['l1']}_{key['l2']}.json"
    heads, _ = tune(how.program, [SMOLLM2], (HERE if how.full else how.folder) / name, key["l1"],
                    key["l2"], "--held-out", OTHER)
    return [row_of(head) for head in heads]


if __name__ == "__main__":
    run(__file__, [Job({"l1": l1, "l2": l2}, 8, smoke=True) for l1, l2 in PAIRS], measure,
        ["seconds"])
