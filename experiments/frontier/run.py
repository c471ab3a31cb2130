#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Heads under every method at equal density: error, recall, and what prediction takes.

One value of the method's first parameter for all heads of an input, with which they keep this share
of the pairs of tokens that causality leaves. Errors are of attention in f32 beside dense attention
in f32; seconds of int8, of three runs by turns with dense attention. predict: multiply-adds of the
choice by those of dense attention.
"""
import statistics
import sys
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

import numpy as np  # noqa: E402
import sets  # noqa: E402
import sparge  # noqa: E402
from errors import relative_l1  # noqa: E402
from field import F32, REACHED, Way, calls_of, density_at, each, find  # noqa: E402
from harness import ROOT  # noqa: E402
from item import Job, run  # noqa: E402
from ways import DENSITIES, TEXT, THETAS, VIDEO  # noqa: E402

CAPTURES = ROOT / "experiments/capture"
INPUTS = {
    "text": CAPTURES / "smollm2-135m",
    "code": CAPTURES / "smollm2-135m-stb_image",
    "video": ROOT / "experiments/video/capture",
    "steps": ROOT / "build/video/small",
}
REPEAT = 3
SMOKE = {("text", "submass"), ("code", "xattention"), ("video", "pisa0"), ("video", "random")}


@cache
def calls(name):
    return calls_of(INPUTS[name])


@cache
def dense(call):
    """o and lse of each query."""
    o, lse = sparge.attend(call.q, call.k, call.v, None, **sets.attends(call.entry), **F32,
                           return_lse=True)
    return np.float64(o[0]), np.float64(lse[0])


def recalled(call, plan, lse):
    """The share of each query's attention that goes to keys themselves, the mean of each head."""
    if not any(part.pooled for part in plan.parts):
        return np.exp(np.minimum(0.0, np.float64(lse[0]) - dense(call)[1])).mean(-1)
    gqa = call.q.shape[1] // call.k.shape[1]
    scale, own = call.entry.scale or call.q.shape[-1] ** -0.5, (plan.pairs()[0] == 1)
    return np.array([
        (np.exp(scale * (q @ call.k[0, h // gqa].T) - dense(call)[1][h][:, None]) * own[h]).sum(
            -1).mean() for h, q in enumerate(call.q[0])])


def errors(name, way, value):
    """Of each head: L1, the worst row's, recall."""
    l1, worst, recall, work = [], [], [], 0.0
    for call, plan in each(calls(name), way, value, sparge.plan, **F32):
        o, lse = plan.run(return_lse=True)
        want = dense(call)[0]
        l1 += list(relative_l1(o[0], want, call.entry.path.name))
        worst += list((np.abs(o[0] - want).sum(-1) / np.abs(want).sum(-1)).max(-1))
        recall += list(recalled(call, plan, lse))
        work += plan.multiply_adds / (call.pairs * (call.q.shape[-1] + call.v.shape[-1]))
    return l1, worst, recall, work / len(calls(name))


def seconds(name, way, value):
    """(predict, attend, dense): the sums over the calls, medians of turns."""
    turns = []
    for _ in range(REPEAT):
        took = [stats for _, (_, stats) in each(calls(name), way, value, sparge.attention,
                                                return_stats=True)]
        dense = [sparge.attend(c.q, c.k, c.v, None, **sets.attends(c.entry), return_stats=True)[1]
                 for c in calls(name)]
        turns.append((sum(s.seconds_predict for s in took),
                      sum(s.seconds_quantize + s.seconds_attend for s in took),
                      sum(s.seconds_quantize + s.seconds_attend for s in dense)))
    return [statistics.median(column) for column in zip(*turns)]


def measure(key, _how):
    name, way, asked = key["input"], Way(key["method"]), key["asked"]
    tokens = calls(name)[0].q.shape[2]
    value, density = find(way, lambda x: density_at(calls(name), way, x), asked or 1.0, tokens)
    row = {"value": "" if value is None else f"{value:.9g}", "density": f"{density:.6f}",
           "reached": int(asked is None or abs(density - asked) <= REACHED)}
    columns = ("l1", "l1_spread", "l1_worst", "worst_row", "recall", "recall_worst", "predict",
               "seconds_predict", "seconds_attend", "seconds_dense")
    if not row["reached"]:
        return row | dict.fromkeys(columns, "")
    l1, worst, recall, work = errors(name, way, value)
    found = [np.mean(l1), np.std(l1), max(l1), max(worst), np.mean(recall), min(recall), work]
    return row | dict(zip(columns, [f"{x:.6g}" for x in [*found, *seconds(name, way, value)]]))


def jobs():
    """All methods; and SpargeAttn by theta, where it is a question of the prediction alone."""
    for name, folder in INPUTS.items():
        methods = [*(VIDEO if name in ("video", "steps") else TEXT), *(THETAS if name != "steps"
                                                                        else [])]
        for method in dict.fromkeys(methods):
            for asked in DENSITIES if Way(method).method.params else [None]:
                yield Job({"input": name, "method": method, "asked": asked}, 4.0,
                          smoke=(name, method) in SMOKE and asked == 0.3,
                          needs=[folder / "sample0/manifest.json"] if name == "steps" else [])


TIMES = "seconds_predict", "seconds_attend", "seconds_dense"

if __name__ == "__main__":
    run(__file__, list(jobs()), measure, times=TIMES)
