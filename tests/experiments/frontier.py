# SPDX-License-Identifier: Apache-2.0
"""Looks at what experiments/frontier stands on: python3 frontier.py

The value of a density, names of methods with their parameters, densities over several calls, which
rows the tables have and what is on the front. Ends with "N passed, M failed".
"""
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.append(os.path.join(os.path.dirname(__file__), "../support"))
from counted import check, run_tests
from running import save_safetensors, write

ROOT = Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path[:0] = [str(ROOT / "experiments/frontier")]

import field  # noqa: E402
import sparge  # noqa: E402
import tables  # noqa: E402
import ways  # noqa: E402
from field import Way, calls_of, density_at, find  # noqa: E402


def test_ways():
    """Every name is a method's, with parameters that it has; the command line's word has them."""
    for name in dict.fromkeys([*ways.TEXT, *ways.VIDEO, *ways.THETAS, *ways.SELECTED]):
        way = Way(name)
        known = {param.name for param in way.method.params[1:]}
        check(set(way.params) <= known, "parameters beside the first", name, known)
    way = Way("spargeattn:theta=-1,sink=1")
    check(way.word(0.25) == "spargeattn:tau=0.25,theta=-1,sink=1", "a word", way.word(0.25))
    check(way.asks(0.5)["method_params"] == {"theta": -1, "sink": 1, "tau": 0.5}, "asks",
          way.asks(0.5))
    check(Way("blockrank").asks(None)["method_params"] == {}, "a method without a parameter")
    have = {method.name for method in sparge.methods()}
    left = have - {name.partition(":")[0] for name in [*ways.TEXT, *ways.VIDEO]}
    check(left == {"dense", "spargeattn_paper", "spargeattn_upstream"}, "methods left out", left)


def test_find():
    """Rising, falling, whole, and what is not to be had."""
    cases = [("submass", lambda x: 1 / (1 + 4 * x)), ("xattention", lambda x: x**3),
             ("window", lambda x: min(1.0, x / 4096)), ("oracle_mass", lambda x: x),
             ("submass", lambda x: 1 / (1 + 1e-3 * x)), ("blasst", lambda x: 1 / (1 + x / 5000))]
    for name, density in cases:
        for wanted in 0.5, 0.3, 0.1:
            count = []
            value, found = find(Way(name), lambda x: count.append(x) or density(x), wanted, 4096)
            check(abs(found - wanted) <= 0.002 and found == density(value), f"{name}, {wanted}",
                  value, found)
            check(len(count) < 40 and len(set(count)) == len(count), "few, each once", count)
    value, found = find(Way("powerattention"), lambda x: max(0.53, x / 4096), 0.1, 4096)
    check(found == 0.53, "the nearest that there is", value, found)
    value, found = find(Way("window"), lambda x: 0.2 if x < 700 else 0.6, 0.3, 4096)
    check(found == 0.2, "the nearer side of a step", value, found)
    value, found = find(Way("window"), lambda x: 0.2 if x < 700 else 0.6, 0.5, 4096)
    check(found == 0.6 and value >= 700, "the other side", value, found)
    for x in (0.0, 1.0, 1e-30, 0.98, 1e6, -3.5):
        check(field.number(field.place(x)) == np.float32(x), "floats in order", x)
    check(field.place(-1.0) < field.place(0.0) < field.place(0.5) < field.place(2.0), "the order")


def capture():
    """Two layers of two heads and one, 512 tokens."""
    rng, files = np.random.default_rng(3), []
    for layer in 1, 0:
        save_safetensors(f"l{layer}.safetensors", **{
            name: ("F32", 3 * rng.normal(size=(1, heads, 512, 16)).astype(np.float32))
            for name, heads in (("q", 2), ("k", 1), ("v", 1))})
        files.append({"file": f"l{layer}.safetensors", "layer": layer, "query_heads": [0, 1]})
    write("manifest.json", json.dumps({"model": "m", "causal": True, "files": files}))


def test_density():
    """Of several calls together, whatever they are made of."""
    capture()
    calls = calls_of(Path("."))
    check([call.entry.layer for call in calls] == [0, 1], "in the order of a model")
    check(calls[0].pairs == 2 * 512 * 513 // 2, "visible pairs", calls[0].pairs)
    cut = calls[0].first(100)
    check(cut.q.shape[2] == 100 and calls[0].q.shape[2] == 512 and cut.pairs == 2 * 5050,
          "the first tokens", cut.pairs)
    way = Way("submass")
    plans = [sparge.plan(c.q, c.k, c.v, is_causal="end", method="submass",
                         method_params={"t": 3.0}) for c in calls]
    want = sum(p.counts.qk_tokens for p in plans) / sum(p.counts.tokens for p in plans)
    check(density_at(calls, way, 3.0) == want and want < 1, "of plans", want)
    way = Way("blasst:block=16")
    check(density_at(calls, way, 0.0) == 1.0 > density_at(calls, way, 400.0), "of a run")
    check(0 < density_at(calls, Way("blockrank"), None) < 1, "segments, where they are needed")
    states = {}
    first = density_at(calls, Way("hess"), 0.5, states)
    check(len(states) == 2, "a state a layer", states)
    check(density_at(calls, Way("hess"), 0.5, states) == first, "kept")


def row(method, asked, text, kl, **more):
    return {"method": method, "asked": asked, "text": f"{text}.txt", "tokens": "4096", "kl": kl,
            "surprise": "100", "density_tokens": asked or "1", "seconds_attention": "1"} | more


def test_front():
    """What no other method beats in both; of yardsticks none."""
    heads = [{"input": "text", "method": name, "asked": "0.5", "reached": "1", "predict": cost}
             for name, cost in (("submass", 0.01), ("xattention", 0.1), ("seer", 0.0),
                                ("oracle_mass", 0.5), ("minference", 0.1))]
    losses = {"submass": 1.0, "xattention": 2.0, "seer": 3.0, "oracle_mass": 0.1,
              "minference": 0.5, "random": 9.0}
    ppl = [row(name, "0.5", text, kl) for text in tables.TEXTS for name, kl in losses.items()]
    ppl += [row("f32", "", text, 0.0) for text in tables.TEXTS]
    known = {"out": heads, "ppl": ppl, "needle": [row("submass", "0.5", "opticks", 0, right=x)
                                                  for x in "110"], "settings": []}
    real, tables.rows_of = tables.rows_of, known.get
    try:
        check(sorted(tables.front()) == ["minference", "seer", "submass"], "front", tables.front())
        found = tables.figures("submass", "0.5")
        check(found["kl"] == 1.0 and (found["needles"], found["of"]) == (2, 3), "figures", found)
        check(tables.figures("submass", "0.2") is None, "not run")
        check(tables.model_cells("submass", "0.2")[0] == "not run", "said so")
        known["settings"] = [{"method": "submass", "asked": "0.2", "tokens": "4096",
                              "text": "opticks", "reached": "0"}]
        check(tables.model_cells("submass", "0.2")[0] == tables.MISSED, "not reachable")
        at = tables.density(row("blasst", "0.5", "opticks", 1, sparsity="0.2", sparsity_qk="0"))
        check(abs(at - 0.6) < 1e-12, "of P.V", at)
    finally:
        tables.rows_of = real
    check(tables.cell([], "l1") == "not run" and tables.cell([{"reached": "0", "l1": ""}], "l1") ==
          tables.MISSED and tables.cell([{"reached": "1", "l1": "0.25"}], "l1") == "0.250", "cells")


run_tests(globals(), sys.argv[1:], "sparge-frontier-")
