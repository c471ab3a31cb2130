# SPDX-License-Identifier: Apache-2.0
"""Runs the sparge program as a user would: python3 program.py PATH-OF-SPARGE

What it computes is compared with a float64 attention written here; of everything that can go wrong
the exit code, the one line and the folder are looked at. Ends with "N passed, M failed".
"""
import base64
import csv
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

sys.path.append(os.path.join(os.path.dirname(__file__), "../support"))
from counted import check, run_tests
from running import (DIFFERENT, FILE, FINE, HINT, MACHINE, UNFINISHED, UNSUPPORTED, USAGE,
                     commands_of, explained, full_device, ignored, listing, load_safetensors, read,
                     save, save_safetensors, sha256, stopped, watched, write)

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.path.abspath(sys.argv[1])
sparge, fine, wrong, keeps = commands_of(PROGRAM, "sparge")


# ---- An attention of our own -----------------------------------------------------------------

def visible(nq, nk, causal):
    t, s = np.arange(nq)[:, None], np.arange(nk)[None, :]
    return s <= t + {None: nk, "end": nk - nq, "start": 0}[causal]


def blocks_seen(nq, nk, causal, bq=128, bk=64):
    v = visible(nq, nk, causal)
    return np.array([[v[i:i + bq, j:j + bk].any() for j in range(0, nk, bk)]
                     for i in range(0, nq, bq)]).reshape(-(-nq // bq), -(-nk // bk))


def attention(q, k, v, causal=None, mask=None, bq=128, bk=64, scale=None, pairs=True):
    """o and lse in float64 of [B,H,N,D]; mask [B,H,blocks,blocks], pairs [B,H,N,N]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    nq, nk = q.shape[2], k.shape[2]
    s = np.einsum("bhqd,bhkd->bhqk", q, k) * (scale or 1 / np.sqrt(q.shape[3]))
    keep = np.broadcast_to(visible(nq, nk, causal), s.shape) & pairs
    if mask is not None:
        keep &= np.repeat(np.repeat(mask, bq, 2)[:, :, :nq], bk, 3)[:, :, :, :nk] != 0
    s[~keep] = -np.inf
    top = s.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(np.isfinite(top), top, 0))[..., 0]
    return np.einsum("bhqk,bhkd->bhqd", p / np.where(total > 0, total, 1), v), lse


def rows_l1(got, want):
    size = np.abs(want).sum(-1)
    apart = np.abs(got.astype(np.float64) - want).sum(-1)
    return np.where(apart == 0, 0, apart / np.where(size > 0, size, 1e-300))


def near(got, want, worst, what):
    ok = got.shape == want.shape and bool((rows_l1(got, want) <= worst).all())
    check(ok, what, got.shape, want.shape,
          rows_l1(got, want).max(initial=0) if got.shape == want.shape else "")


def random(seed, *shape):
    """Neighbours are alike, so that there is something to predict."""
    r = np.random.default_rng(seed)
    x = np.cumsum(r.standard_normal(shape), -2) * 0.2
    x = (x - x.mean(-2, keepdims=True)) + 0.3 * r.standard_normal(shape)
    return x.astype(np.float32)


EXACT = ["--dense", "--qk-dtype", "f32", "--pv-dtype", "f32"]
SIZES = "batch heads kv_heads q_len k_len dim dim_v".split()
KEYS = (
    "schema version inputs mask gate manifest params method backend isa qk_isa pv_isa threads "
    "kernel rules qk_dtype pv_dtype block_q block_k cell skip_rows "
    "causal smooth_k sink softmax_scale theta tau topk min_mass lambda density"
).split() + SIZES + (
    "pairs kept_blocks density_tokens density_blocks predict_multiply_adds sparsity "
    "sparsity_qk sparsity_pv density_tokens_per_head density_blocks_per_head sparsity_per_head "
    "kept_by kept_by_alone "
    "workspace_bytes seconds_predict seconds_quantize seconds_attend seconds_total tops "
    "tops_executed"
).split()
REASONS = "mass topk dissimilar_q dissimilar_k overflow diagonal sink min_mass".split()
COUNTS = "nan_got nan_want inf_got inf_want nonfinite_apart".split()
RECALL_KEYS = ("recall worst_row_recall rows_nonfinite recall_per_head "
               "worst_row_recall_per_head").split()
CHECK_KEYS = RECALL_KEYS + [
    "l1", "worst_row_l1", "cosine", "rmse", "mask_worst_row_l1",
    *COUNTS, "mask_nonfinite_apart"
]
B, HQ, HK, NQ, NK, D, DV = 2, 4, 2, 300, 333, 24, 20


def files():
    q, k, v = random(1, B, HQ, NQ, D), random(2, B, HK, NK, D), random(3, B, HK, NK, DV)
    return q, k, v, [save("q.npy", q), save("k.npy", k), save("v.npy", v)]


# ---- What works -----------------------------------------------------------------------------

def test_forms():
    q, k, v, qkv = files()
    want, lse = attention(q, k, v)
    x = fine("run", *qkv, "-o", "o.npy", "--lse-out", "l.npy", *EXACT)
    check(list(x) == KEYS, "keys in their order", list(x))
    check([x[n] for n in SIZES] == [B, HQ, HK, NQ, NK, D, DV], "sizes", x)
    check(x["workspace_bytes"] > 0, "memory", x)
    check(x["kernel"] is None and x["pv_dtype"] == "f32", "what ran", x)
    check(x["pairs"] == B * HQ * 3 * 6 and x["sparsity"] == 0, "dense counts", x)
    check(x["sparsity_per_head"] == [0] * (B * HQ), "flat, one a head", x)
    tokens = B * HQ * NQ * NK
    check(abs(x["tops"] * 1e12 * x["seconds_total"] / (2 * (D + DV) * tokens) - 1) < 1e-6, "tops")
    check(abs(x["tops_executed"] / x["tops"] - 1) < 1e-6, "tops_executed when dense")
    check(0 <= x["seconds_attend"] <= x["seconds_total"], "seconds")
    near(np.load("o.npy"), want, 1e-5, "[B,H,N,D] f4")
    check(np.load("o.npy").dtype == np.float32, "f4 out")
    check(np.load("l.npy").shape == (B, HQ, NQ) and np.abs(np.load("l.npy") - lse).max() < 1e-4,
          "lse")

    for x, name in zip((q, k, v), "qkv"):  # the same in other forms
        save(f"{name}f.npy", np.asfortranarray(x))
        save(f"{name}8.npy", x.astype(np.float64))
        save(f"{name}2.npy", x.astype(np.float16))
        save(f"{name}n.npy", x.transpose(0, 2, 1, 3))
        save(f"{name}3.npy", x[1])
        save(f"{name}3n.npy", x[1].transpose(1, 0, 2))
        save(f"{name}1.npy", x[1, 1])
    def run(kind, *more):
        fine("run", *(f"{n}{kind}.npy" for n in "qkv"), "-o", "o.npy", *EXACT, *more)
        return np.load("o.npy")
    near(run("f"), want, 1e-5, "Fortran order")
    got = run("8")
    near(got, want, 1e-5, "f8")
    check(got.dtype == np.float64, "f8 out")
    large = k.astype(np.float64)
    large[0, 0, 1, 2] = np.inf
    fine("run", "q8.npy", save("large.npy", large), "v8.npy", *EXACT, says=["NaN or infinite"])
    large[0, 0, 3, 4] = -3.5e38
    wrong(FILE, ["large.npy: k is", "finite elements that f4 cannot hold"], "run", "q8.npy",
          save("large.npy", large), "v8.npy")
    got = run("2")
    check(got.dtype == np.float16, "f2 out")
    near(got, attention(*(np.load(f"{n}2.npy") for n in "qkv"))[0], 4e-3, "f2")
    near(run("n", "--layout", "nhd"), want.transpose(0, 2, 1, 3), 1e-5, "[B,N,H,D]")
    near(run("3"), want[1], 1e-5, "[H,N,D]")
    near(run("3n", "--layout=nhd"), want[1].transpose(1, 0, 2), 1e-5, "[N,H,D]")
    near(run("1"), attention(q[1:, 1:2], k[1:, 1:2], v[1:, 1:2])[0][0, 0], 1e-5, "[N,D]")
    near(run("1", "--layout", "nhd"), attention(q[1:, 1:2], k[1:, 1:2], v[1:, 1:2])[0][0, 0], 1e-5,
         "[N,D] is the same in nhd")
    fine("run", "q8.npy", "k2.npy", "v.npy", "-o", "o.npy", *EXACT)
    near(np.load("o.npy"), attention(q, np.load("k2.npy"), v)[0], 1e-5, "types may be mixed")

    for dtype, worst in ("F32", 1e-5), ("F16", 4e-3), ("BF16", 1e-5):
        round_ = {"F32": lambda x: x, "F16": lambda x: x.astype(np.float16),
                  "BF16": lambda x: (x.view(np.uint32) >> 16 << 16).view(np.float32)}[dtype]
        save_safetensors("x.safetensors", v=(dtype, v), q=(dtype, q), k=(dtype, k),
                         other=(dtype, v))
        fine("run", "x.safetensors", "-o", "o.npy", *EXACT)
        near(np.load("o.npy"), attention(round_(q), round_(k), round_(v))[0], worst, dtype)
        check(np.load("o.npy").dtype == (np.float16 if dtype == "F16" else np.float32), "type",
              dtype)
    x = fine("run", *qkv)
    check(list(x) == KEYS and listing().count("./o.npy") == 1, "without -o")


def test_options():
    q, k, v, qkv = files()
    def run(*more):
        x = fine("run", *qkv, "-o", "o.npy", "--mask-out", "m.npy", "--lse-out", "l.npy", *more)
        return x, np.load("o.npy"), np.load("m.npy"), np.load("l.npy")
    float_ = ["--qk-dtype", "f32", "--pv-dtype", "f32"]

    for how, where in ("--causal", "end"), ("--causal=end", "end"), ("--causal=start", "start"):
        x, o, m, lse = run(*EXACT, how)
        near(o, attention(q, k, v, where)[0], 1e-5, how)
        check((m == blocks_seen(NQ, NK, where)).all(), how, "mask of dense is what is visible")
        check(x["pairs"] == B * HQ * blocks_seen(NQ, NK, where).sum(), how, "pairs")
        check(np.abs(lse - attention(q, k, v, where)[1]).max() < 1e-4, how, "lse")
    x, o, m, _ = run("--rules", "upstream", "--causal", *float_)
    check((m <= blocks_seen(NQ, NK, "start")).all(), "upstream: causal from the start")
    check(x["pairs"] == B * HQ * blocks_seen(NQ, NK, "start").sum(), "upstream: pairs")
    run("--causal", *float_, "--rules", "upstream")
    check((np.load("o.npy") == o).all(), "--rules counts wherever it stands")
    x = run("--causal", *float_, "--rules", "upstream", "--lambda", "-inf")[0]
    check(x["backend"] == "ref", "rules and lambda")

    x, o, m, _ = run("--theta", 1)  # nothing is similar: everything is kept
    check(m.all() and x["sparsity"] == 0, "theta 1")
    x, o, m, _ = run("--theta", -1, "--tau", 0)
    check((m.sum(-1) == 1).all(), "tau 0 keeps one block of a row", m.sum(-1))
    near(o, attention(q, k, v, mask=m)[0], 0.2, "int8 over its own mask")
    check(abs(x["sparsity"] - 5 / 6) < 1e-6 and x["sparsity_qk"] == x["sparsity_pv"], "sparsity", x)
    x, o, m, _ = run("--theta", -1, "--topk", 0.5)  # without tau: 3 of 6
    check((m.sum(-1) == 3).all(), "topk turns tau off", m.sum(-1))
    m1 = run("--theta", -1, "--topk", 0.5, "--tau", 1)[2]
    check(m1.all(), "topk and tau: the union")
    x, o, m, _ = run("--theta", -1, "--min-mass", 0.9)
    check(x["tau"] is None and x["kept_by"]["min_mass"] == m.sum() < m.size / 2 < run(
        "--theta", -1)[2].sum(), "min_mass turns tau off", x)
    check(run("--theta", -1, "--min-mass", 0.9, "--tau", 1)[2].all(), "min_mass and tau: the union")
    check(run("--theta", -1, "--min-mass", 0)[0]["tau"] == 0.98, "min_mass 0 is off")
    x, _, cells, _ = run("--theta", -1, "--min-mass", 0.9, "--cell", 8)
    check(x["cell"] == 8 and (cells != m).any() and cells.any(), "cells", x)
    m1 = run("--theta", -1, "--tau", 0, "--sink")[2]
    check(m1[..., 0].all() and (m1[..., 1:] <= run("--theta", -1, "--tau", 0)[2][..., 1:]).all(),
          "sink")
    check(run("--theta", -1, "--tau", 0.5)[2].sum() < run("--theta", -1, "--tau", 0.98)[2].sum(),
          "tau")

    o = run(*EXACT, "--softmax-scale", 0.03)[1]
    near(o, attention(q, k, v, scale=0.03)[0], 1e-5, "softmax_scale")
    x, o, m, _ = run("--block-q", 64, "--block-k", 32, *float_, "--tau", 0.5)
    check(m.shape == (B, HQ, 5, 11) and x["block_q"] == 64 and x["block_k"] == 32, "blocks",
          m.shape)
    near(o, attention(q, k, v, mask=m, bq=64, bk=32)[0], 1e-4, "blocks")
    per_head = (1 - m.mean((2, 3))).ravel()
    check(np.abs(x["sparsity_per_head"] - per_head).max() < 1e-6, "per head, from the mask")

    want = attention(q, k, v)[0]
    error = {how: rows_l1(run("--dense", "--qk-dtype", how, "--pv-dtype", how)[1], want).max()
             for how in ("int8", "int12", "f32")}
    check(error["f32"] < 1e-5 < 8 * error["int12"] < error["int8"] < 0.3, "precision", error)
    narrow = {}
    for how in "f16", "fp8":
        x, o = run("--dense", "--qk-dtype", "f32", "--pv-dtype", how)[:2]
        narrow[how] = rows_l1(o, attention(q, k, v)[0]).max()
        check(x["pv_dtype"] == how and x["backend"] == "ref", how, x)
    check(error["f32"] < narrow["f16"] < 1e-3 < narrow["fp8"] < 0.2, "f16 and fp8", narrow)
    both = ("--dense", "--qk-dtype", "bf16", "--pv-dtype", "bf16")
    x, o = run(*both, "--backend", "ref")[:2]
    bf16 = rows_l1(o, attention(q, k, v)[0]).max()
    check([x[n] for n in ("qk_dtype", "pv_dtype", "backend", "isa", "qk_isa", "pv_isa")] ==
          ["bf16", "bf16", "ref"] + 3 * ["avx512vnni"], "bf16", x)
    check(narrow["f16"] < bf16 < error["int8"] / 2, "bf16", (bf16, error))
    x, by_tiles = run(*both, "--backend", "ref", "--isa", "amx")[:2]
    check(x["isa"] == "amx" and (o != by_tiles).any(), "bf16 by tiles", x["isa"])
    near(by_tiles, o, 1e-3, "bf16 by tiles")
    clean = {name: value for name, value in os.environ.items() if name != "SPARGE_ISA"}
    x = fine("run", *qkv, *both, "-o", "o.npy", env=clean)
    best = (["ref", "avx512vnni"] + [y for isa in isas_with_bf16() for y in ("cpu", isa)])[-2:]
    check([x["backend"], x["isa"]] == best, "bf16 by auto", x, best)
    check((np.load("o.npy") == (by_tiles if best[1] == "amx" else o)).all(), "bf16 by auto")
    x, o = run("--pv-dtype", "fastest")[:2]
    check(x["pv_dtype"] == "int8" and x["backend"] == "cpu" and (o == run()[1]).all(),
          "fastest of cpu",
          x)
    check((run("--dense")[1] == run("--dense", "--qk-dtype=int8", "--pv-dtype=int8")[1]).all(),
          "int8 and int8")
    one = rows_l1(run("--dense", "--qk-dtype", "int8", "--pv-dtype", "f32")[1],
                  run("--dense", "--qk-dtype", "int8")[1]).max()
    other = rows_l1(run("--dense", "--qk-dtype", "int8", "--pv-dtype", "f32")[1],
                    run(*EXACT)[1]).max()
    check(one > 1e-5 and other > 1e-5, "qk and pv apart", one, other)
    shift = k + 300 * np.sign(random(9, 1, 1, 1, D))
    save("k.npy", shift)
    smooth = rows_l1(run("--dense")[1], attention(q, shift, v)[0]).max()
    rough = rows_l1(run("--dense", "--no-smooth-k")[1], attention(q, shift, v)[0]).max()
    check(smooth < 0.3 < rough, "--no-smooth-k", smooth, rough)
    save("k.npy", k)

    x = run("--theta", 1, "--lambda", 0)[0]
    check(x["sparsity_pv"] > 0 == x["sparsity_qk"], "lambda drops P.V", x)
    check(abs(x["sparsity"] - (x["sparsity_qk"] + x["sparsity_pv"]) / 2) < 1e-8, "the mean of both")
    check(x["tops_executed"] < x["tops"], "tops_executed below tops")
    check(run("--theta", 1, "--lambda", "-1e-3")[0]["sparsity_pv"] <= x["sparsity_pv"], "lambda")
    check(run("--theta", 1, "--lambda", 0, "--skip-rows", 1)[0]["sparsity_pv"] > x["sparsity_pv"],
          "skip-rows")
    check(run("--backend", "ref")[0]["backend"] == "ref", "backend")
    check(run("--threads", 1)[0]["threads"] == 1, "threads")
    check((run("--threads", 2)[1] == run("--threads", 1)[1]).all(), "threads agree")
    check(1 <= run("--threads", 0)[0]["threads"] <= 1024, "as many threads as there are cores")
    check(run("--threads", 1024)[0]["threads"] == 1024, "the most threads")


# What /proc/cpuinfo has to name for an instruction set; VNNI's 512-bit files use all of these.
FLAGS = {"scalar": "", "avx2": "avx avx2 fma f16c", "avxvnni": "avx avx2 fma f16c avx_vnni",
         "avx512vnni": "avx avx2 fma f16c avx512f avx512dq avx512bw avx512vl avx512_vnni"}
FLAGS["amx"] = FLAGS["avx512vnni"] + " amx_tile amx_int8"


def processor_flags():
    """None where nobody says."""
    if not os.path.exists("/proc/cpuinfo") or os.uname().machine != "x86_64":
        return None
    with open("/proc/cpuinfo") as f:
        return set(next(line for line in f if line.startswith("flags")).split())


def isas_with_bf16():
    """Those that have products of bf16 here, the best last."""
    info = fine("info", "--json")
    needs = {"avx512vnni": {"avx512_bf16"}, "amx": {"amx_bf16"}}
    if "SPARGE_SANITIZED" in info["flags"]:  # the tiles are memory
        needs["amx"] = set()
    return [isa for isa in needs if info["isa"][isa] and needs[isa] <= processor_flags()]


def test_instruction_sets():
    qkv = files()[3]
    info = fine("info", "--json")
    has = info["isa"]
    check(list(has) == list(FLAGS), "the instruction sets", has)
    needs = dict(FLAGS)
    if "SPARGE_SANITIZED" in info["flags"]:  # the tiles are memory
        needs["amx"] = FLAGS["avx512vnni"]
    flags = processor_flags()
    for isa, needed in needs.items() if flags else ():
        check(has[isa] == (set(needed.split()) <= flags), "as /proc/cpuinfo says", isa, has)
    check([isa for isa in FLAGS if info["bf16"][isa]] == isas_with_bf16(), "bf16", info)
    check(sparge("info")[1].count("bf16") == len(isas_with_bf16()), "bf16 in words", info)
    here = [isa for isa in FLAGS if has[isa]]
    here_in_words = "here are " + ", ".join(here)
    outputs = {}
    for isa in FLAGS:
        env = dict(os.environ, SPARGE_ISA=isa)
        if not has[isa]:
            wrong(UNSUPPORTED, [isa, here_in_words], "run", *qkv, "--isa", isa, "-o", "o.npy")
            wrong(UNSUPPORTED, ["SPARGE_ISA", isa, here_in_words], "run", *qkv, "-o", "o.npy",
                  env=env)
            continue
        x = fine("run", *qkv, "--isa", isa, "-o", "o.npy")
        check(x["isa"] == isa and x["backend"] == "cpu", "--isa", isa, x)
        x = fine("run", *qkv, "--isa", isa, "--qk-dtype", "f32", "--pv-dtype", "int12", "-o",
                 "o.npy")
        below = "avx512vnni" if isa == "amx" else isa
        check(x["qk_isa"] == x["pv_isa"] == below, "what the products ran on", isa, x)
        x = fine("run", *qkv, "--isa", isa, "-o", "o.npy")
        check(x["qk_isa"] == x["pv_isa"] == isa, "the products in int8", isa, x)
        outputs[isa] = np.load("o.npy")
        x = fine("run", *qkv, "-o", "o.npy", env=env)
        check(x["isa"] == isa and x["backend"] == "cpu", "SPARGE_ISA", isa, x)
        x = fine("run", *qkv, "--isa", "scalar", "-o", "o.npy", env=env)
        check(x["isa"] == "scalar", "--isa before SPARGE_ISA", isa, x)
    check(all((x == outputs["scalar"]).all() for x in outputs.values()), "the same on each")
    clean = {name: value for name, value in os.environ.items() if name != "SPARGE_ISA"}
    check(fine("run", *qkv, "-o", "o.npy", env=clean)["isa"] == here[-1], "the best is taken")
    os.remove("o.npy")
    wrong(USAGE, ["SPARGE_ISA", "sse9"], "run", *qkv, env=dict(os.environ, SPARGE_ISA="sse9"))
    wrong(UNSUPPORTED, "rules", "run", *qkv, "--backend", "cpu", "--rules", "paper")
    for of in "qk_dtype", "pv_dtype":
        option = "--" + of.replace("_", "-")
        wrong(USAGE, ["isa", "avx2", "ref"], "run", *qkv, "--backend", "ref", option, "bf16",
              "--isa", "avx2")
        in_bf16(qkv, of, option, here)
    wrong(UNSUPPORTED, ["pv_dtype", "fp8", "cpu"], "run", *qkv, "--backend", "cpu", "--pv-dtype",
          "fp8")
    check(
        fine("run", *qkv, "--rules", "paper")["backend"] == "ref", "rules of the paper run on ref")


def in_bf16(qkv, of, option, here):
    """Where an instruction set has it, what ref gives in its order; refused elsewhere, by name."""
    able = isas_with_bf16()
    tiny = "bench", "--q-len", 64, "--dim", 8
    for isa in able:
        for backend in "ref", "cpu":
            x = fine("run", *qkv, "--backend", backend, option, "bf16", "--isa", isa, "-o",
                     backend + ".npy")
            on = x["pv_isa" if of == "pv_dtype" else "qk_isa"]
            check(x["isa"] == on == isa and x["backend"] == backend, "bf16", isa, x)
        check((np.load("cpu.npy") == np.load("ref.npy")).all(), "bf16 on cpu as on ref", isa)
    for isa in here if able else ():
        if isa not in able:
            for command in ("run", *qkv), ("run", *qkv, "--backend", "cpu"), tiny:
                wrong(UNSUPPORTED, ["isa", isa, "bf16", able[-1]], *command, option, "bf16",
                      "--isa", isa)
    if not able:
        wrong(UNSUPPORTED, [of, "bf16", "cpu", "ref"], "run", *qkv, "--backend", "cpu", option,
              "bf16")
        wrong(UNSUPPORTED, [of, "bf16", "cpu"], *tiny, option, "bf16")


def test_cuda():
    """On a device, where there is one, what ref gives on the host."""
    if not fine("info", "--json")["backends"]["cuda"]["available"]:
        print("skipped: cuda is not on this machine, or not in this build")
        return
    q, k, v, qkv = files()
    mask = save("given.npy", np.random.default_rng(4).random((B, HQ, 3, 6)) < 0.6)
    def run(backend, *more):
        x = fine("run", *qkv, "--backend", backend, "-o", "o.npy", "--mask-out", "m.npy",
                 "--lse-out", "l.npy", "--intermediates", "d", *more)
        return x, *(np.load(n) for n in ("o.npy", "m.npy", "l.npy", "d/pv_done.npy"))
    for args in (["--causal", "--tau", 0.7, "--theta", 0.3], ["--mask", mask], ["--dense"]):
        x, o, m, lse, done = run("cuda", *args)
        check(x["backend"] == "cuda" and 1 <= x["kernel"] <= 5 and x["pv_dtype"] in ("f16", "fp8"),
              "what ran", x)
        check(list(x) == KEYS and x["workspace_bytes"] > 0, "keys", x)
        ref, want, m_ref, l_ref, done_ref = run("ref", *args, "--pv-dtype", x["pv_dtype"])
        check((m == m_ref).all() and (done == done_ref).all(), args, "the mask")
        near(o, want, {"fp8": 6e-2, "f16": 1e-3}[x["pv_dtype"]],
             f"o of {args}")  # P under another maximum
        check(np.abs(lse - l_ref).max() < 1e-3, args, "lse", np.abs(lse - l_ref).max())
        for key in "pairs", "sparsity", "sparsity_qk", "sparsity_per_head":
            check(x[key] == ref[key], args, key, x[key], ref[key])
    for name in "window:window=50,sink=3", "pisa0:block=32", "xattention:block=64", "submass:t=1":
        x, y = (fine("run", *qkv, "--backend", *how, "-o", f"{how[0]}.npy", "--method", name,
                     "--pairs-out", f"{how[0]}_p.npy", *EXACT[1:])
                for how in (["cuda", "--kernel", 1], ["ref"]))
        check(
            x["backend"] == "cuda" and
            x["density_tokens_per_head"] == y["density_tokens_per_head"] and
            (np.load("cuda_p.npy") == np.load("ref_p.npy")).all(), name, x, y)
        near(np.load("cuda.npy"), np.load("ref.npy"), 1e-5, name)
    x, o = run("cuda", "--kernel", 1, *EXACT)[:2]
    check(x["kernel"] == 1 and x["pv_dtype"] == "f32", "--kernel and --pv-dtype", x)
    near(o, attention(q, k, v)[0], 1e-5, "kernel 1")
    x = fine("run", *qkv, "--backend", "cuda", "--pv-dtype", "f16", "--dense", "--check")
    check(x["pv_dtype"] == "f16" and x["worst_row_l1"] < 0.2, "--check", x)
    for name, x in zip("qkv", (q, k, v)):
        save(f"{name}n.npy", x.transpose(0, 2, 1, 3).astype(np.float16))
    fine("run", "qn.npy", "kn.npy", "vn.npy", "--layout", "nhd", "--dense", "--backend", "cuda",
         "-o", "o.npy")
    near(np.load("o.npy"), attention(q, k, v)[0].transpose(0, 2, 1, 3), 0.2, "f2 in nhd")
    code, _, err = sparge("map", *qkv, "--backend", "cuda", "-o", "map.png", "--lambda", -2)
    check(code == FINE and os.path.exists("map.png"), "map", err)
    wrong(UNSUPPORTED, "rules", "run", *qkv, "--backend", "cuda", "--rules", "paper")
    bench_cuda()


def bench_cuda():
    """Every kernel and precision is checked, then timed; what a kernel lacks is left out."""
    size = ["--backend", "cuda", "--q-len", 200, "--dim", 32, "--heads", 3, "--repeat", 1]
    rows = bench(*size, "--kernel", "1,2,3,4,5", "--pv-dtype", "f32,int8,f16,fp8", "--mask-kind",
                 "random,banded,predicted", "--sparsity", "0,0.5", "--causal=none,end")
    parts = ["1 f32/f32", "2 f32/f32", "3 int8/int8", "4 int8/int8", "4 int8/f16", "5 int8/f16",
             "5 int8/fp8"]
    masks = ["dense", "random 0.5", "banded 0.5", "predicted"]
    check(list(rows) == [f"kernel {part} {mask}{causal}" for causal in ("", " causal")
                         for part in parts for mask in masks], "cases", list(rows))
    for name, x in rows.items():
        check(x["backend"] == "cuda" and x["kernel"] == int(name.split()[1]) and x["heads"] == 3,
              name, x)
        check(all(x[n] is None for n in ("pct_peak", "speedup_vs_f32", "baseline_pct_peak",
                                         "read_bytes_per_second")), name, "no baseline", x)
        check(x["seconds_attend"] > 0 and x["tops"] > 0 and
              (x["seconds_predict"] is None) == (x["mask"] != "predicted"), name, "times", x)
        check((x["efficiency"] is None) == (x["mask"] == "dense"), name, "efficiency", x)
        parts = sum(x[n] or 0 for n in ("seconds_predict", "seconds_quantize", "seconds_attend"))
        check(abs(x["seconds_total"] / parts - 1) < 1e-6, name, "all of its parts", x)
    check({x["sparsity"] for x in rows.values() if x["mask"] == "random" and x["causal"] == "none"}
          == {0.5}, "imposed", rows)
    name, x = bench(*size, "--sparsity", 0).popitem()
    check(x["kernel"] == 5 and name == "kernel 5 int8/fp8 dense", "the best kernel", name, x)
    tensors = {n: ("F16", random(s, 1, h, 200, 24))
               for s, n, h in ((1, "q", 4), (2, "k", 2), (3, "v", 2))}
    capture = ["--backend", "cuda", "--capture", save_safetensors("x.safetensors", **tensors),
               "--repeat", 1]
    name, x = bench(*capture, "--lambda", -3).popitem()
    check(name == "kernel 5 int8/fp8 predicted" and x["heads"] == 4, "a capture", x)
    tensors["q"][1][0, 0, 5, 0] = np.nan
    save_safetensors("x.safetensors", **tensors)
    name, x = bench(*capture, code=DIFFERENT).popitem()
    check(all(x[n] is None for n in TIMES), "what is wrong is not timed", x)
    code, out, err = sparge("bench", *size, "--sparsity", 0)
    check(code == FINE and err == "" and "the device's own times" in out, "in words", out, err)
    wrong(UNSUPPORTED, "kernel is 3", "bench", *size, "--kernel", 3, "--pv-dtype", "fp8")
    for args, words in ((["--threads", 1], "--threads"), (["--isa", "avx2"], "--isa"),
                        (["--kernel", 6], "--kernel"), (["--allow-busy"], "--allow-busy")):
        wrong(USAGE, words, "bench", *size, *args)


def test_mask():
    q, k, v, qkv = files()
    mask = (np.random.default_rng(4).random((B, HQ, 3, 6)) < 0.4).astype(np.uint8)
    mask[0, 1, 2] = 0  # rows that see nothing
    save("m.npy", mask * 255)
    save("b.npy", mask.astype(bool))
    for name in "m.npy", "b.npy":
        x = fine("run", *qkv, "--mask", name, "-o", "o.npy", "--mask-out", "out.npy", "--lse-out",
                 "l.npy", "--qk-dtype", "f32", "--pv-dtype", "f32", "--check")
        want, lse = attention(q, k, v, mask=mask)
        near(np.load("o.npy"), want, 1e-5, "a given mask")
        check((np.load("out.npy") == mask).all() and np.load("out.npy").dtype == np.uint8,
              "mask out")
        check(not np.load("o.npy")[0, 1, 256:].any(), "a row that sees nothing is 0")
        check((np.isneginf(np.load("l.npy")) == np.isneginf(lse)).all(), "its lse is -inf")
        check(abs(x["sparsity"] - (1 - mask.mean())) < 1e-6, "sparsity of a mask", x["sparsity"])
        dense = attention(q, k, v)[0]
        o = np.load("o.npy").astype(np.float64)
        l1 = np.abs(o - dense).sum() / np.abs(dense).sum()
        check(abs(x["l1"] / l1 - 1) < 1e-6, "l1 against dense attention", x["l1"], l1)
        check(abs(x["worst_row_l1"] / rows_l1(o, dense).max() - 1) < 1e-6, "worst_row_l1")
        check(abs(x["rmse"] / np.sqrt(np.mean((o - dense)**2)) - 1) < 1e-6, "rmse")
        cosine = (o * dense).sum() / np.linalg.norm(o) / np.linalg.norm(dense)
        check(abs(x["cosine"] - cosine) < 1e-8, "cosine")
        check(x["mask_worst_row_l1"] < 1e-5, "against the same mask", x["mask_worst_row_l1"])
    fine("run", *qkv, "--mask", "m.npy", "--causal", "--mask-out", "out.npy")
    check((np.load("out.npy") == mask * blocks_seen(NQ, NK, "end")).all(), "invisible blocks are 0")
    fine("run", *qkv, "--mask-out", "out.npy", "-o", "a.npy")
    fine("run", *qkv, "--mask", "out.npy", "-o", "b.npy")
    check((np.load("a.npy") == np.load("b.npy")).all(), "the predicted mask, given")


REF = ["--backend", "ref"]
F32 = ["--qk-dtype", "f32", "--pv-dtype", "f32"]


def partials_of(pairs, seen, bq=128, bk=64):
    """blocks, partial_index and partial_bits of the visible pairs that are attended, by hand."""
    b, h, nq, nk = pairs.shape
    blocks, index, bits = np.zeros((b, h, -(-nq // bq), -(-nk // bk)), np.uint8), [], []
    for at in np.ndindex(blocks.shape):
        part = np.s_[at[2] * bq:at[2] * bq + bq, at[3] * bk:at[3] * bk + bk]
        got = pairs[at[0], at[1]][part] & seen[part]
        blocks[at] = got.any()
        if blocks[at] and (got != seen[part]).any():
            index.append(at)
            bits.append(np.zeros((bq, -(-bk // 8) * 8), bool))
            bits[-1][:got.shape[0], :got.shape[1]] = got
    return (blocks, np.array(index, np.int64).reshape(-1, 4),
            np.packbits(np.array(bits), -1, "little"))


def test_mask_pairs():
    """A mask by pairs: as a .npy, as a .safetensors of blocks and bits, and back."""
    q, k, v, qkv = files()
    r = np.random.default_rng(5)
    for causal, block in (None, ()), ("end", (40, 37)):
        args = [*qkv, *(["--causal"] if causal else []),
                *(["--block-q", block[0], "--block-k", block[1]] if block else [])]
        bq, bk = block or (128, 64)
        pairs = r.random((B, HQ, NQ, NK)) < 0.3
        pairs[0, 0] = True  # all whole
        pairs[0, 1, bq:2 * bq] = False  # rows that see nothing
        pairs[1, 2, :, :2 * bk] = True
        seen = visible(NQ, NK, causal)
        x = fine("run", *args, *F32, "--mask-pairs", save("p.npy", pairs), "--mask-out",
                 "m.safetensors", "--pairs-out", "out.npy", "-o", "o.npy", "--lse-out", "l.npy",
                 "--check")
        check(x["mask"] == dict(file="p.npy", sha256=sha256("p.npy")), "its file", x["mask"])
        want, lse = attention(q, k, v, causal, pairs=pairs)
        near(np.load("o.npy"), want, 1e-5, "attention over pairs")
        out = np.load("out.npy")
        check(out.dtype == np.uint8 and (out == (pairs & seen)).all(), "pairs out")
        blocks, index, bits = partials_of(pairs, seen, bq, bk)
        m = load_safetensors("m.safetensors")
        check(list(m) == ["partial_index", "blocks", "partial_bits"] and
              m["blocks"].dtype == np.uint8 and (m["blocks"] == blocks).all() and
              m["partial_index"].dtype == np.int64 and
              m["partial_index"].tolist() == index.tolist() and
              m["partial_bits"].dtype == np.uint8 and m["partial_bits"].shape == bits.shape and
              (m["partial_bits"] == bits).all(), "blocks and bits", m, index)
        tokens = (pairs & seen).sum((2, 3)) / seen.sum()
        check(abs(x["density_tokens"] - tokens.mean()) < 1e-8 and
              np.allclose(x["density_tokens_per_head"], tokens.ravel(), atol=1e-8) and
              abs(x["density_blocks"] - 1 + x["sparsity_qk"]) < 1e-8 and
              x["kept_blocks"] == blocks.sum(), "density", x, tokens)
        check(x["density_tokens"] < x["density_blocks"], "tokens, not blocks", x)
        tiles = (np.repeat(np.repeat(blocks, bq, 2)[:, :, :NQ], bk, 3)[..., :NK] & seen).sum()
        check(abs(x["tops_executed"] * 1e12 * x["seconds_total"] / (2 * (D + DV) * tiles) - 1)
              < 1e-6, "operations of whole tiles", x)
        with np.errstate(over="ignore"):
            kept = np.exp(lse - attention(q, k, v, causal)[1])
        check(abs(x["recall"] - kept.mean()) < 1e-6 and x["worst_row_recall"] == kept.min() == 0 and
              np.allclose(x["recall_per_head"], kept.mean(2).ravel(), atol=1e-6) and
              np.allclose(x["worst_row_recall_per_head"], kept.min(2).ravel(), atol=1e-6),
              "attention that the pairs keep", x)
        check(x["mask_worst_row_l1"] < 1e-5 < x["worst_row_l1"], "beside the same pairs", x)
        y = fine("run", *args, *F32, "--mask", "m.safetensors", "-o", "o2.npy", "--mask-out",
                 "m2.safetensors", "--pairs-out", "out2.npy")
        check(read("m2.safetensors", "rb") == read("m.safetensors", "rb") and
              read("out2.npy", "rb") == read("out.npy", "rb") and
              read("o2.npy", "rb") == read("o.npy", "rb"), "as blocks and bits")
        check(all(x[n] == y[n] for n in ("kept_blocks", "density_tokens")), "the same counts", x, y)
        y = fine("run", *args[:2], *args[3:], *REF, "--mask-only", "--mask", "m.safetensors",
                 "--check")
        check(all(x[n] == y[n] for n in [
            "kept_blocks", "density_tokens_per_head", "density_blocks_per_head", *RECALL_KEYS
        ]), "without attention", x, y)
        for mask in ["--mask", "m.safetensors"], ["--mask-pairs", "p.npy"]:
            y = fine("check", *args, *mask, "--o", "o.npy", "--lse", "l.npy")
            check(y["ok"] and y["over"] == "mask" and
                  all(y["mask"][n] == x[n] for n in ("recall", "worst_row_recall",
                                                     "density_tokens", "kept_blocks")) and
                  [h["recall"] for h in y["per_head"]] == x["recall_per_head"], "judged", y)
        save("w.npy", attention(q, k, v, causal, blocks, bq, bk)[0].astype(np.float32))
        fine("check", *args, "--mask", "m.safetensors", "--o", "w.npy", code=DIFFERENT,
             says=["from attention over the mask"])
        # The same in other blocks.
        fine("run", *args, *F32, "--block-q", 64, "--block-k", 48, "--mask-pairs", "out.npy",
             "--pairs-out", "out3.npy")
        check((np.load("out3.npy") == out).all(), "other blocks, the same pairs")
        wrong(USAGE, ["m.npy", f"{len(index)} partly attended blocks", ".safetensors"], "run",
              *args, *F32, "--mask", "m.safetensors", "--mask-out", "m.npy", "-o", "o3.npy")


def test_mask_whole():
    """What has no partly attended block is written in either form; and the masks of map."""
    q, k, v, qkv = files()
    mask = np.random.default_rng(4).random((B, HQ, 3, 6)) < 0.4
    save("m.npy", mask)
    fine("run", *qkv, "--mask", "m.npy", "--mask-out", "m.safetensors", "-o", "a.npy")
    m = load_safetensors("m.safetensors")
    check((m["blocks"] == mask).all() and m["partial_index"].shape == (0, 4) and
          m["partial_bits"].shape == (0, 128, 8), "no bits", m)
    fine("run", *qkv, "--mask", "m.safetensors", "--mask-out", "n.npy", "-o", "b.npy",
         "--pairs-out", "p.npy")
    pairs = np.repeat(np.repeat(mask, 128, 2)[:, :, :NQ], 64, 3)[..., :NK]
    check((np.load("n.npy") == mask).all() and (np.load("p.npy") == pairs).all() and
          read("a.npy", "rb") == read("b.npy", "rb"), "there and back")
    fine("run", *qkv, "--mask-pairs", "p.npy", "--mask-out", "n.npy", "-o", "b.npy")
    check((np.load("n.npy") == mask).all() and read("a.npy", "rb") == read("b.npy", "rb"),
          "whole blocks, by pairs")
    for kind in "U8", "BOOL":
        save_safetensors("b.safetensors", blocks=(kind, mask))
        fine("run", *qkv, "--mask", "b.safetensors", "-o", "b.npy")
        check(read("a.npy", "rb") == read("b.npy", "rb"), kind, "blocks alone")
    seen = visible(NQ, NK, "end")
    fine("run", *qkv, "--dense", "--causal", "--pairs-out", "p.npy")
    check((np.load("p.npy") == seen).all(), "the pairs of dense")
    asked = [*qkv, "--causal", "--theta", 0.3, "--tau", 0.5]
    fine("run", *asked, "--pairs-out", "p.npy", "--mask-out", "n.npy")
    got = np.repeat(np.repeat(np.load("n.npy"), 128, 2)[:, :, :NQ], 64, 3)[..., :NK] & seen
    check(0 < got.sum() < seen.sum() * B * HQ and (np.load("p.npy") == got).all(), "predicted")
    check(sparge("map", *asked, "-o", "map.png", "--pairs-out", "pm.npy")[0] == FINE and
          read("pm.npy", "rb") == read("p.npy", "rb"), "those of map")
    save("wide.npy", np.zeros((32769, 1), np.float32))
    for command in ["run", "--mask-only"], ["map", "-o", "map.png", "--block-q", 1024]:
        wrong(USAGE, ["p.npy", "1073807361", "2^30"], command[0], "wide.npy", "wide.npy",
              *command[1:], "--pairs-out", "p.npy")


def test_mask_files():
    """Masks that are no masks, or those of something else."""
    q, k, v, qkv = files()
    pairs = np.random.default_rng(5).random((B, HQ, NQ, NK)) < 0.3
    blocks, index, bits = partials_of(pairs, visible(NQ, NK, None))
    blocks[1, 3, 2, 5] = 0
    index, bits = index[:-1], bits[:-1]
    def tensors(**other):
        types = {"u1": "U8", "b1": "BOOL", "i8": "I64", "i4": "I32", "f4": "F32"}
        all_of = {**dict(blocks=blocks, partial_index=index, partial_bits=bits), **other}
        return {
            n: (types[x.dtype.str[1:]], x.shape, x.tobytes())
            for n, x in all_of.items() if x is not None
        }
    def changed(at, to):
        other = index.copy()
        other[at] = to
        return dict(partial_index=other)
    fine("run", *qkv, *F32, "--mask", save_safetensors("m.safetensors", **tensors()))
    swapped = index[[0, 2, 1, *range(3, len(index))]]
    for other, words in [
        (dict(partial_index=swapped), ["partial_index[2], (0, 0, 0, 1), comes after a later"]),
        (changed(2, index[1]), ["partial_index[2], (0, 0, 0, 1), is there twice"]),
        (changed(-1, (1, 3, 2, 5)), [f"[{len(index) - 1}], (1, 3, 2, 5), is of a block that is not"
                                     " kept"]),
        (changed(0, (0, 0, 0, -1)), ["partial_index[0], (0, 0, 0, -1), is not in blocks"]),
        (changed(-1, (1, 3, 3, 0)), ["(1, 3, 3, 0), is not in blocks"]),
        (changed(-1, (2, 0, 0, 0)), ["(2, 0, 0, 0), is not in blocks"]),
        (dict(blocks=None), ["'blocks'", "no such tensor", "partial_index"]),
        (dict(partial_bits=None), ["'partial_bits'", "no such tensor"]),
        (dict(partial_index=None), ["'partial_index'", "no such tensor"]),
        (dict(blocks=blocks.astype("f")), ["blocks is f32 (2, 4, 3, 6)", "u8 or bool"]),
        (dict(blocks=blocks[0]), ["blocks is u8 (4, 3, 6)", "four axes"]),
        (dict(blocks=np.ones((B, HQ, 3, 7), np.uint8)), ["(2, 4, 3, 7)", "(2, 4, 3, 6)",
                                                         "128 queries", "64 keys"]),
        (dict(partial_index=index.astype("i4")), ["'partial_index'", "with .long()"]),
        (dict(partial_index=index.astype("f")), ["partial_index is f32", "i64 (n, 4)"]),
        (dict(partial_index=index[:, :3].copy()), ["partial_index is i64", "i64 (n, 4)"]),
        (dict(partial_bits=bits.astype(bool)), ["partial_bits is bool", "must be u8 (n, "]),
        (dict(partial_bits=bits[1:]), [f"partial_bits is u8 ({len(bits) - 1}, 128, 8)", "n as in"]),
        (dict(partial_bits=bits[..., 0]), [f"partial_bits is u8 ({len(bits)}, 128)", "n as in"]),
        (dict(partial_bits=bits[:, :64]), [f"({len(bits)}, 64, 8)", f"u8 ({len(bits)}, 128, 8) for "
                                           "blocks of 128 queries and 64 keys"]),
        (dict(partial_bits=bits[..., :4]), [f"({len(bits)}, 128, 4)", f"({len(bits)}, 128, 8)"]),
    ]:
        save_safetensors("w.safetensors", **tensors(**other))
        wrong(FILE, ["w.safetensors", *words], "run", *qkv, "--mask", "w.safetensors")
    save_safetensors("w.safetensors", **tensors(**changed(2, index[1])))
    save("o.npy", attention(q, k, v)[0])
    wrong(FILE, ["w.safetensors", "twice"], "check", *qkv, "--o", "o.npy", "--mask",
          "w.safetensors")
    wrong(FILE, ["w.safetensors", "twice"], "diff", "w.safetensors", "m.safetensors")
    whole = read("m.safetensors", "rb")
    for size in 0, 7, 20, 400, len(whole) - 1:
        write("cut.safetensors", whole[:size])
        wrong(FILE, "cut.safetensors: ", "run", *qkv, "--mask", "cut.safetensors")
    wrong(FILE, ["q.npy", "must be u8 or bool"], "run", *qkv, "--mask", "q.npy")


def test_check():
    q, k, v, qkv = files()
    x = fine("run", *qkv, "--check", *EXACT)
    check(list(x) == KEYS + CHECK_KEYS, "keys of --check", list(x))
    check(x["worst_row_l1"] == x["mask_worst_row_l1"] < 1e-5 and x["cosine"] > 0.999999, "dense", x)
    x = fine("run", *qkv, "--check", "--tau", 0.3, "--theta", -1)
    check(x["mask_worst_row_l1"] < x["worst_row_l1"] and x["l1"] < x["worst_row_l1"], "sparse", x)
    q[0, 0, 5, 0] = np.nan
    save("q.npy", q)
    x = fine("run", *qkv, "--check", "-o", "o.npy", *EXACT,
             says=[f"{DV} NaN", f"{DV} and 0", "alike"])
    check(
        np.isnan(np.load("o.npy")[0, 0, 5]).all() and 0 < x["worst_row_l1"] < 1e-5, "NaN of both",
        x)
    save("e.npy", np.zeros((2, 0, 8), np.float32))
    save("ev.npy", np.zeros((2, 0, 3), np.float32))
    save("eq.npy", np.ones((2, 5, 8), np.float32))
    x = fine("run", "eq.npy", "e.npy", "ev.npy", "-o", "o.npy", "--check", "--intermediates", "d")
    check(x["sparsity"] == 0 and x["l1"] == 0 and x["tops"] == 0, "no keys", x)
    check(np.load("o.npy").shape == (2, 5, 3) and not np.load("o.npy").any(), "no keys: 0")
    x = fine("run", *[save(f"{n}.npy", x.transpose(0, 2, 1, 3)) for n, x in zip("qkv", (q, k, v))],
             "--check", "--layout", "nhd", *EXACT, says=["alike"])
    check(x["worst_row_l1"] < 1e-5, "check of [B,N,H,D]", x)
    save("e0.npy", np.zeros((0, 2, 5, 8), np.float16))
    x = fine("run", "e0.npy", "e0.npy", "e0.npy", "-o", "o.npy", "--check", "--intermediates", "d",
             "--causal")
    check(np.load("o.npy").shape == (0, 2, 5, 8) and x["sparsity_per_head"] == [], "no batch", x)
    x = fine("run", "e.npy", "eq.npy", "eq.npy", "-o", "o.npy", "--check")
    check(np.load("o.npy").shape == (2, 0, 8), "no queries")


def test_check_nonfinite():
    """What is not finite is counted and said, and never taken for an error of 0."""
    q, k, v, qkv = files()
    rest = q.copy()
    q[:, :, 150:] = np.nan
    save("q.npy", q)
    fine("run", *qkv, *EXACT,
         says=[f"o has {B * HQ * 150 * DV} elements that are NaN or infinite", "--check"])
    fine("run", *qkv, "--mask-only")
    half = fine("run", *qkv, "--check", *EXACT, says=["alike"])
    some = B * HQ * 150 * DV
    check(half["nan_got"] == half["nan_want"] == some and half["nonfinite_apart"] == 0,
          "as many in both", half)
    save("rest.npy", rest[:, :, :150])
    without = fine("run", "rest.npy", *qkv[1:], "--check", *EXACT)
    check(all(half[n] == without[n] for n in ("l1", "worst_row_l1", "cosine")),
          "as without these rows", half, without)
    save("q.npy", np.full_like(q, np.nan))
    x = fine("run", *qkv, "--check", says=[f"{2 * some} NaN", "other 0"])
    check(x["nan_got"] == x["nan_want"] == 2 * some and
          all(x[n] is None for n in ("l1", "worst_row_l1", "cosine", "rmse", "mask_worst_row_l1")),
          "of nothing finite there is no error", x)
    save("q.npy", rest)
    v[0, 0, 70, 3] = np.inf
    save("v.npy", v)
    mask = np.ones((B, HQ, 3, 6), bool)
    mask[:, :, :, 1] = False  # where that key is
    x = fine("run", *qkv, "--mask", save("m.npy", mask), "--check", *EXACT[1:], says=["are apart"])
    check(
        x["nan_got"] == x["inf_got"] == 0 and
        x["nan_want"] + x["inf_want"] == x["nonfinite_apart"] == 2 * NQ and x["l1"] is None and
        x["worst_row_l1"] is None, "apart: no error", x)
    check(x["mask_nonfinite_apart"] == 0 and x["mask_worst_row_l1"] < 1e-5,
          "but not over the mask", x)


JUDGED = (
    "ok over type batch heads kv_heads q_len k_len dim dim_v block_q block_k causal manifest "
    "params method l1 "
    "worst_row_l1 worst_row cosine rmse").split() + COUNTS + (
        "first_nan_got first_nan_want first_nan_apart first_nonfinite_apart "
        "baseline_worst_row_l1 max_worst").split()


def test_judge():
    """Another kernel's o, log-sum-exp and mask: what is right passes without a bound, and what is
    not does not."""
    q, k, v, qkv = files()
    mask = np.random.default_rng(8).random((B, HQ, 3, 6)) < 0.6
    mask[1, 2, 1] = False  # rows without any key
    o, lse = (x.astype(np.float32) for x in attention(q, k, v, mask=mask))
    args = [
        *qkv, "--mask",
        save("m.npy", mask), "--o",
        save("o.npy", o), "--lse",
        save("l.npy", lse)
    ]
    before = listing()
    x = fine("check", *args)
    check(listing() == before, "nothing is written")
    check(
        list(x) == JUDGED + ["lse", "dense", "mask", "per_head"] and x["ok"] and
        x["over"] == "mask", "its keys", x)
    check(0 < x["worst_row_l1"] <= x["max_worst"] == 2 * x["baseline_worst_row_l1"] + 1e-5 < 1e-4,
          "within its bound", x)
    check(x["lse"]["worst"] < 1e-5 and x["lse"]["inf_got"] == x["lse"]["inf_want"] == 128,
          "rows without a key", x)
    dense, all_lse = attention(q, k, v)
    check(
        abs(x["dense"]["worst_row_l1"] / rows_l1(o, dense).max() - 1) < 1e-5, "beside dense",
        x["dense"])
    with np.errstate(over="ignore"):
        recall = np.exp(lse - all_lse)  # of each row
    check(abs(x["mask"]["recall"] - recall.mean()) < 1e-6, "recall", x["mask"], recall.mean())
    fine("run", *qkv, "--mask-out", "p.npy")
    kept = np.load("p.npy") != 0
    missing, extra = kept & ~mask, mask & ~kept
    m = x["mask"]
    check((m["missing"], m["extra"], m["kept_blocks"], m["predicted_kept_blocks"],
           m["pairs"]) == (missing.sum(), extra.sum(), mask.sum(), kept.sum(), mask.size),
          "what the predictor would have kept", m)
    check(
        m["first_missing"] == np.argwhere(missing)[0].tolist() and
        m["first_extra"] == np.argwhere(extra)[0].tolist(), "and where", m)
    check(
        abs(m["predicted_recall"] - np.exp(attention(q, k, v, mask=kept)[1] - all_lse).mean())
        < 1e-6, "its recall", m)
    rows = x["per_head"]
    check([(r["batch"], r["head"]) for r in rows] == list(np.ndindex(B, HQ)), "a row for each head")
    check(
        max(r["worst_row_l1"] for r in rows) == x["worst_row_l1"] and
        sum(r["missing"] for r in rows) == missing.sum() and
        np.allclose([r["recall"] for r in rows],
                    recall.mean(-1).ravel(), atol=1e-6) and
        np.allclose([r["worst_row_recall"] for r in rows],
                    recall.min(-1).ravel(), atol=1e-6), "heads", rows)
    check(max(r["baseline_worst_row_l1"] for r in rows) == x["baseline_worst_row_l1"] and
          max(r["lse_worst"] for r in rows) == x["lse"]["worst"], "their worst")
    m = fine("check", *args, "--tau", 0.5, "--theta", -1)["mask"]
    check(m["predicted_kept_blocks"] < kept.sum(), "under other thresholds", m)
    x = fine("check", *qkv, "--o", save("d.npy", dense))
    check(
        list(x) == JUDGED + ["per_head"] and x["over"] == "dense" and x["type"] == "f64",
        "without a mask", x)

    def fails(words):
        """One thing of the kernel is wrong."""
        y = fine("check", *args, code=DIFFERENT, says=[words])
        check(y["ok"] is False, "not ok", y)
        return y
    wrong_o = o.copy()
    wrong_o[1, 3, 77] *= 1.001
    save("o.npy", wrong_o)
    x = fails("o.npy: row [1, 3, 77] is 0.001 from attention over the mask")
    check(x["worst_row"] == [1, 3, 77] and x["per_head"][7]["worst_row"] == [1, 3, 77], "where", x)
    fine("check", *args, "--max-worst", 0.0011)
    fine("check", *args, "--max-worst", 0.0009, code=DIFFERENT, says=["allowed is 0.0009"])
    save("o.npy", attention(q, k, v, mask=np.roll(mask, 1, 3))[0])
    fails("o.npy: row ")
    wrong_o = o.copy()
    wrong_o[1, 2, 128:256] = np.nan  # 0/0
    save("o.npy", wrong_o)
    x = fails(f"{128 * DV} elements are NaN or infinite")
    check(
        x["nan_got"] == 128 * DV and x["nan_want"] == 0 and x["first_nan_got"] == [1, 2, 128, 0] and
        x["l1"] is None, "a row without keys is 0", x)
    wrong_o[1, 2, 128:256] = 0
    wrong_o[0, 0, 9, 4] = np.inf
    save("o.npy", wrong_o)
    fails("the first is [0, 0, 9, 4]")
    fine("check", *args, "--max-worst", 1e9, code=DIFFERENT, says=["the first is [0, 0, 9, 4]"])
    save("o.npy", o)
    save("l.npy", lse / np.float32(np.log(2)))
    x = fails("l.npy: element ")
    check(x["worst_row_l1"] < 1e-5 < x["lse"]["worst"], "log2: o is right, lse is not", x)
    for at, value in ((0, 0, 5), lse[0, 0, 5] + np.float32(1e-3)), ((1, 2, 130), np.float32(0)):
        off = lse.copy()
        off[at] = value
        save("l.npy", off)
        x = fails(f"{list(at)}")
        check(x["lse"]["worst_at"] == list(at) and x["lse"]["nonfinite_apart"] == (value == 0),
              "where the lse is off", x)


def test_judge_types():
    """The bound is that of the type which o is kept in."""
    q, k, v, qkv = files()
    mask = np.random.default_rng(8).random((B, HQ, 3, 6)) < 0.6
    save("m.npy", mask)
    o = attention(q, k, v, "end", mask)[0]
    args = [*qkv, "--causal", "--mask", "m.npy", "--o"]
    bf16 = save_safetensors("o.safetensors",
                            o=("BF16",
                               (o * (1 + 2.0**-9)).astype(np.float32)))  # cut, so about rounded
    bounds = [
        fine("check", *args,
             name)["max_worst"] for name in (save("o4.npy", o.astype(np.float32)),
                                             save("o2.npy", o.astype(np.float16)), bf16)
    ]
    check(4 * bounds[0] < bounds[1] < 4 * bounds[1] < bounds[2] < 0.02, "in order", bounds)
    coarse = np.frombuffer(read(bf16, "rb")[-o.size * 2:], "<u2").astype(np.uint32) << 16
    coarse = coarse.view(np.float32).reshape(o.shape)
    for kind in np.float32, np.float16:
        fine("check", *args, save("c.npy", coarse.astype(kind)), code=DIFFERENT,
             says=["c.npy: row"])
    fine("check", *args[:3], "--mask", "m.npy", "--o", "o4.npy", code=DIFFERENT,
         says=["o4.npy: row"])  # not causal
    fine("run", *qkv, "--causal", "--mask", "m.npy", *EXACT[1:], "-o", "r.npy", "--lse-out",
         "rl.npy")
    fine("check", *args, "r.npy", "--lse", "rl.npy")
    save("o.npy", o.transpose(0, 2, 1, 3))
    nhd = [save(f"{n}n.npy", x.transpose(0, 2, 1, 3)) for n, x in zip("qkv", (q, k, v))]
    fine("check", *nhd, "--layout", "nhd", "--causal", "--mask", "m.npy", "--o", "o.npy")
    one = [save(f"{n}1.npy", x[0, 0]) for n, x in zip("qkv", (q, k, v))]
    want, lse = attention(q[:1, :1], k[:1, :1], v[:1, :1])
    fine("check", *one, "--o", save("o1.npy", want[0, 0]), "--lse", save("l1.npy", lse[0, 0]))
    fine("check", *one, "--o", "o1.npy", "--lse", save("l1.npy", lse))
    q[0, 1, 290] = np.nan
    save("q.npy", q)
    x = fine("check", *args, "o4.npy", code=DIFFERENT, says=[f"{DV} elements", "[0, 1, 290, 0]"])
    check(x["nan_want"] == DV and x["nan_got"] == 0, "a number where it should be NaN", x)
    o[0, 1, 290] = np.nan
    x = fine("check", *args, save("on.npy", o), says=[f"{DV} NaN", "alike"])
    check(x["ok"] and x["nan_got"] == x["nan_want"] == DV and x["mask"]["rows_nonfinite"] == 1,
          "NaN of both", x)
    for empty in "q", "k":
        x = {n: np.ones((2, 0 if n == empty else 5, 8), np.float32) for n in "qkv"}
        x["v"] = x["k"]
        done = fine("check", *(save(f"{n}0.npy", t) for n, t in x.items()), "--o",
                    save("o0.npy", np.zeros_like(x["q"])))
        check(done["ok"] and done["l1"] == 0, f"no {empty}", done)


def test_judge_without_bound():
    """Where an honest kernel is itself far off, what is as far off does not pass."""
    one = lambda name, *x: save(f"{name}.npy", np.array(x, np.float32)[:, None])
    qkv = [one("q", 1), one("k", 0, 1), one("v", math.e, -1)]  # e * 1 - 1 * e, but for rounding
    args = [*qkv, "--no-smooth-k", "--o", save("o.npy", np.array([[1e-4]], np.float16))]
    x = fine("check", *args, code=DIFFERENT, says=["honest", "--max-worst"])
    check(x["baseline_worst_row_l1"] > 1000 and x["max_worst"] is None and not x["ok"], "no bound",
          x)
    fine("check", *args, "--max-worst", 1e6)


def test_judge_usage():
    q, k, v, qkv = files()
    o = save("o.npy", attention(q, k, v)[0])
    wrong(USAGE, "--o FILE", "check", *qkv)
    wrong(USAGE, "--o FILE", "check", *qkv, "-o", o)
    wrong(USAGE, ["-o", "--o"], "check", *qkv, "--o", o, "-o", "x.npy")
    wrong(USAGE, "give the files", "check", *qkv[:2], "--o", o)
    wrong(USAGE, "--max-worst", "check", *qkv, "--o", o, "--max-worst", "nan")
    wrong(FILE, "nowhere.npy", "check", *qkv, "--o", "nowhere.npy")
    wrong(FILE, ["short.npy", "(2, 4, 299, 20)", "(2, 4, 300, 20)"], "check", *qkv, "--o",
          save("short.npy", np.zeros((B, HQ, NQ - 1, DV), np.float32)))
    wrong(FILE, ["i.npy", "floats"], "check", *qkv, "--o",
          save("i.npy", np.zeros((B, HQ, NQ, DV), np.int32)))
    wrong(FILE, ["l.npy", "(2, 4, 300)"], "check", *qkv, "--o", o, "--lse",
          save("l.npy", np.zeros((HQ, NQ))))
    wrong(FILE, ["m.npy", "(2, 4, 3, 6)"], "check", *qkv, "--o", o, "--mask",
          save("m.npy", np.ones((B, HQ, 6, 3), bool)))
    wrong(USAGE, ["--mask", "leave out --mask-pairs"], "check", *qkv, "--o", o, "--mask", "m.npy",
          "--mask-pairs", "m.npy")
    wrong(FILE, ["x.safetensors", "'o'"], "check", *qkv, "--o",
          save_safetensors("x.safetensors", p=("F32", q)))


def test_what_was_run():
    """The JSON of run says every option as it was resolved, and every file."""
    q, k, v, qkv = files()
    x = fine("run", *qkv, "--theta", 0.3, "--tau", 0.9, "--lambda", -7.1, "--sink", "--causal",
             "--softmax-scale", 0.123, "--no-smooth-k", "--skip-rows", 32, "--threads", 1)
    want = dict(schema=2, version=fine("info", "--json")["version"], rules="default",
                qk_dtype="int8",
                pv_dtype="int8", block_q=128, block_k=64, cell=0, skip_rows=32, causal="end",
                smooth_k=False,
                sink=True, softmax_scale=0.123, theta=0.3, tau=0.9, topk=None, min_mass=None,
                density=None, mask=None,
                params=None, kernel=None, threads=1, backend="cpu")
    check({n: x[n] for n in want} == want and x["lambda"] == -7.1, "options as typed", x)
    check(x["inputs"] == [dict(file=n, sha256=sha256(n)) for n in qkv], "files", x["inputs"])
    x = fine("run", *qkv, "--pv-dtype", "fastest", "--topk", 0.7)
    check(
        x["softmax_scale"] == round(D**-0.5, 9) or
        np.float32(x["softmax_scale"]) == np.float32(1) / np.sqrt(np.float32(D)), "softmax_scale",
        x)
    check(
        x["skip_rows"] == 64 and x["pv_dtype"] == "int8" and x["lambda"] is None and
        x["tau"] is None and
        x["topk"] == 0.7 and x["isa"] != "auto",
        "what 0, auto and fastest stand for, and what is off", x)
    x = fine("run", *qkv, "--rules", "upstream")
    check(x["skip_rows"] == 128 and x["rules"] == "upstream" and x["backend"] == "ref",
          "by the rules", x)
    save("m.npy", np.ones((B, HQ, 3, 6), bool))
    for args, mask in (["--mask", "m.npy"], dict(file="m.npy",
                                                 sha256=sha256("m.npy"))), (["--dense"], None):
        x = fine("run", *qkv, *args)
        check(
            x["mask"] == mask and
            x["theta"] is x["tau"] is x["topk"] is x["min_mass"] is x["kept_by"] is
            x["kept_by_alone"] is None, args,
            "no thresholds", x)


def test_json_is_explained():
    """tools/json.md has every key that any command prints."""
    q, k, v, qkv = files()
    save("m.npy", np.ones((B, HQ, 3, 6), bool))
    save_safetensors("x.safetensors", q=("F32", q), k=("F32", k), v=("F32", v))
    explained("sparge run",
              fine("run", *qkv, "--check", "--mask", "m.npy", "-o", "o.npy", "--lse-out", "l.npy"))
    explained("sparge run", fine("run", *qkv, "--intermediates", "d", "--density", 0.9, "--theta",
                                 0.2))
    explained(
        "sparge check",
        fine("check", *qkv, "--o", "o.npy", "--lse", "l.npy", "--mask", "m.npy", "--max-worst", 1))
    explained("sparge diff", fine("diff", "m.npy", "m.npy"))
    fine("run", *qkv, "--intermediates", "e", "--tau", 0.3, "--theta", 0.2)
    os.remove("e/l.npy")
    explained("sparge diff", fine("diff", "d", "e", code=DIFFERENT))
    explained("sparge order", fine("order", 2, 3, 4))
    explained("sparge info", fine("info", "--json"))
    explained("sparge bench", json.loads(sparge("bench", "--json", *ONE, "--sparsity", 0)[1]))
    explained("sparge tune", fine("tune", "x.safetensors", "-o", "p.json", "--l1", 0.3, "--l2",
                                  0.4))
    explained("sparge tune", {key: None for key in json.load(open("p.json"))})
    x = fine("run", "x.safetensors", "--params", "p.json", "--layer", 0)
    explained("sparge run", x)
    check(x["params"]["sha256"] == sha256("p.json") and x["theta"] is None,
          "the file of thresholds", x)
    os.makedirs("captures")
    shutil.move("x.safetensors", "captures")
    write("captures/manifest.json", json.dumps({"model": "m", "causal": True, "files": [
        {"file": "x.safetensors", "sha256": sha256("captures/x.safetensors"), "layer": 0}]}))
    explained("sparge run", fine("run", "captures"))


def test_reasons():
    q, k, v, qkv = files()
    for args in ([], ["--theta", 0.5, "--causal",
                      "--sink"], ["--theta", -1, "--topk", 0.3, "--tau",
                                  0.2], ["--theta", 0.45, "--rules",
                                         "upstream"], ["--theta", -1, "--tau", 0],
                 ["--theta", -1, "--min-mass", 0.5, "--cell", 16, "--sink"]):
        x = fine("run", *qkv, *args, "--intermediates", "d")
        why = np.load("d/why.npy")
        check(x["kept_by"] == {r: int((why >> n & 1).sum()) for n, r in enumerate(REASONS)}, args,
              "counts", x["kept_by"])
        check(x["kept_by_alone"] == {r: int((why == 1 << n).sum()) for n, r in enumerate(REASONS)},
              args, "alone", x)
        check(x["kept_blocks"] == (why > 0).sum() == np.load("d/mask.npy").sum(), args,
              "kept blocks", x)
        code, out, err = sparge("map", *qkv, *args, "-o", "m.png")
        check((code, out) == (FINE, "") and err == sparge("run", *qkv, *args)[2], args,
              "map hints as run does", err)
    code, out, err = sparge("run", *qkv, "--tau", 0.9)
    check(code == FINE and "theta 0.6 finds their queries not self-similar; a lower theta" in err,
          "the hint", err)
    x = fine("run", *qkv, "--theta", -1, "--tau", 0.5)  # and fine() hears none
    check(x["kept_by"]["dissimilar_q"] == x["kept_by"]["dissimilar_k"] == 0 < x["kept_by"]["mass"],
          "no hint", x)
    big = save("big.npy", np.full((128, 4), 1e20, np.float32))
    x = fine("run", big, big, big, "--no-smooth-k", "--softmax-scale", 1e3, "--theta", -1,
             says=["o has 512 elements", "NaN"])
    check(x["kept_by"]["overflow"] == x["kept_blocks"] == 2, "scores that overflow", x)


def test_mask_only():
    q, k, v, qkv = files()
    args = ["--tau", 0.7, "--theta", 0.5, "--causal"]
    full = fine("run", *qkv, *args, "--intermediates", "d", "--check")
    x = fine("run", *qkv[:2], "--mask-only", *args, "--mask-out", "m.npy", "--intermediates", "e",
             "--check")
    check((np.load("m.npy") == np.load("d/mask.npy")).all(), "the mask of run")
    check(list(x) == KEYS + RECALL_KEYS, "the same keys", list(x))
    for key in (
            "pairs kept_blocks density_tokens sparsity_qk kept_by kept_by_alone theta tau causal "
            "softmax_scale backend isa "
            "threads density_blocks " + " ".join(RECALL_KEYS)).split():
        check(x[key] == full[key], "as run says", key, x[key], full[key])
    check(
        all(x[n] is None for n in
            "qk_dtype pv_dtype skip_rows lambda dim_v workspace_bytes seconds_quantize "
            "seconds_attend tops "
            "tops_executed".split()) and x["seconds_predict"] > 0, "no attention", x)
    check(
        x["sparsity"] == x["sparsity_pv"] == x["sparsity_qk"] and
        len(x["sparsity_per_head"]) == B * HQ, "sparsity", x)
    there = "blocks mask k_mean q_pool k_pool q_sim k_sim S_all S why".split()
    check(
        sorted(os.listdir("e")) == sorted(n + ".npy" for n in there), "stages of the prediction",
        os.listdir("e"))
    check(all((np.load(f"e/{n}.npy") == np.load(f"d/{n}.npy")).all() for n in there),
          "the same stages")
    seen = np.broadcast_to(visible(NQ, NK, "end"), (B, HQ, NQ, NK))
    kept = np.repeat(np.repeat(np.load("m.npy"), 128, 2)[:, :, :NQ], 64, 3)[..., :NK] & seen
    check(abs(x["density_tokens"] - kept.sum() / seen.sum()) < 1e-8, "tokens", x["density_tokens"])
    s = np.einsum("bhqd,bhkd->bhqk", q.astype(float),
                  np.repeat(k, HQ // HK, 1).astype(float)) / np.sqrt(D)
    p = np.where(seen, np.exp(s - s.max(-1, keepdims=True)), 0)
    p /= p.sum(-1, keepdims=True)
    check(abs(x["recall"] - (p * kept).sum() / p.sum()) < 1e-6, "recall", x["recall"])
    given = fine("run", *qkv[:2], "--mask-only", "--mask", "m.npy", "--causal", "--check")
    check(
        given["recall"] == x["recall"] and given["kept_blocks"] == x["kept_blocks"] and
        given["kept_by"] is None and given["theta"] is None, "of a given mask", given)
    save_safetensors("x.safetensors", q=("F32", q), k=("F32", k))
    check(
        fine("run", "x.safetensors", "--mask-only", *args)["kept_blocks"] == x["kept_blocks"],
        "without a v")
    check(fine("run", *qkv, "--dense", "--check")["recall"] == 1, "dense recalls all")
    save("e.npy", np.zeros((2, 0, 8), np.float32))
    x = fine("run", "e.npy", "e.npy", "--mask-only", "--check")
    check(x["density_tokens"] == 0 and x["pairs"] == 0 and x["recall"] == 1, "nothing to keep",
          x)
    wrong(FILE, "'v'", "run", "x.safetensors")
    wrong(USAGE, "q, k and v", "run", *qkv[:2])


def test_density():
    """The nearest that some tau reaches: beside it, on either side, nothing is nearer."""
    q, k, v, qkv = files()
    args = [*qkv[:2], "--mask-only", "--theta", 0.2]
    density = lambda tau, *more: fine("run", *args, "--tau", repr(float(tau)), *more)[
        "density_tokens"]
    for wanted in 0.3, 0.5, 0.77, 1:
        x = fine("run", *args, "--density", wanted, "--mask-out", "m.npy")
        tau, got = np.float32(x["tau"]), x["density_tokens"]
        check(x["density"] == wanted and density(tau, "--mask-out", "n.npy") == got and
              (np.load("m.npy") == np.load("n.npy")).all(), wanted, "the tau that it says", x)
        beside = [
            density(t) for t in (np.nextafter(tau, np.float32(0)), np.nextafter(tau, np.float32(1)))
        ]
        check(all(abs(got - wanted) <= abs(other - wanted) for other in beside), wanted, "nearest",
              got, beside)
    x = fine("run", *qkv, "--theta", 0.2, "--density", 0.5, "-o", "o.npy")
    check(x["tau"] == fine("run", *args, "--density", 0.5)["tau"], "with attention", x)
    check((fine("run", *qkv, "--theta", 0.2, "--density", 0.5, "--backend",
                "ref")["kept_by"]) == x["kept_by"], "on ref", x)
    least = density(0)
    wrong(USAGE, ["--density 0.01", "cannot be reached", f"{least:.6g}"], "run", *args, "--density",
          0.01)
    wrong(USAGE, "cannot be reached", "run", *qkv[:2], "--mask-only", "--theta", 1, "--density",
          0.5)
    nothing = save("nothing.npy", np.zeros((1, 1, 0, q.shape[-1]), np.float32))
    wrong(USAGE, "no query sees a key", "run", nothing, nothing, "--mask-only", "--density", 0.5)
    wrong(USAGE, "--density is 1.5", "run", *args, "--density", 1.5)


# ---- Methods ----------------------------------------------------------------------------------

def of_pairs(qkv, pairs, causal=None):
    """o over pairs, and the share of its attention that each row keeps."""
    o, lse = attention(*qkv, causal, pairs, 1, 1)
    return o, np.exp(lse - attention(*qkv, causal)[1])


def test_methods():
    all_ = json.loads(sparge("methods", "--json")[1])
    explained("sparge methods", all_)
    code, table, err = sparge("methods")
    check(code == FINE and err == "", "as a table", code, err)
    keys = "name title paper repository commit class params falls at_run needs evidence".split()
    for m in all_:
        check(
            list(m) == keys and f"{m['name']}: {m['title']}\n" in table and m["paper"] in table,
            "a method", m)
        for x in m["params"]:
            check(list(x) == "name low high default what".split() and f"{x['name']}=" in table,
                  "a parameter", x)
    check([m["name"] for m in all_] == sorted({m["name"] for m in all_}), "by name", all_)
    by_name = {m["name"]: m for m in all_}
    names = [p["name"] for p in by_name["spargeattn"]["params"]]
    check(names == "tau theta topk lambda sink".split() and
          by_name["spargeattn"]["params"][3]["low"] is None and
          by_name["window"]["params"][0]["default"] == 1024 and by_name["pisa0"]["needs"] ==
          ["not_causal"], "what they say", by_name)
    wrong(USAGE, "takes no file", "methods", "x")
    page = (ROOT / "methods/README.md").read_text()
    page = page.split("\n## The methods")[1].split("\n## ")[0]
    for m in all_:
        check(method_row(m) in page, "a row of methods/README.md", method_row(m))
    check(page.count("\n| `") == len(all_), "no row too many")


def method_row(m):
    """As methods/README.md has it."""
    code = f"{m['repository'].removeprefix('github.com/')} {m['commit']}".strip()
    params = ", ".join(f"`{p['name']}={p['default']:.6g}`" if p["default"] is not None else
                       f"`{p['name']}=-inf`" for p in m["params"])
    return (f"| `{m['name']}` | {m['title']} | {', '.join(x for x in (m['paper'], code) if x)} | "
            f"{params} | {', '.join(m['needs']).replace('_', ' ')} | {m['evidence']} |\n")


def test_authors():
    """The evidence of a method is the sum of its rows, and a difference has its reason."""
    sums = {}
    with open(ROOT / "methods/authors.csv", newline="") as file:
        for row in csv.DictReader(file):
            equal, all_ = int(row["equal"]), int(row["all"])
            check(0 < equal <= all_ and (equal == all_) == (row["difference"] == ""), row)
            if row["dtype"] == "f32":
                one = sums.setdefault(row["method"], {}).setdefault(row["unit"], [0, 0])
                one[0] += equal
                one[1] += all_
    for m in json.loads(sparge("methods", "--json")[1]):
        want = [f"{e} of {a} {unit}" for unit, (e, a) in sums.pop(m["name"], {}).items()]
        check(sorted(want) == sorted(m["evidence"].split(", ")) if want else
              " of " not in m["evidence"], m["name"], want, m["evidence"])
    check(not sums, "methods that are not there", sums)


def test_method():
    q, k, v, qkv = files()
    exact = EXACT[1:]
    def run(name, *more):
        return fine("run", *qkv, "--method", name, "-o", "o.npy", "--pairs-out", "p.npy", "--check",
                    *more)
    # What is asked for is what is attended to, and what is said of it is so.
    for causal in None, "end":
        x = run("window:window=40,sink=3", *exact, *(["--causal"] if causal else []))
        now, key = np.arange(NQ)[:, None] + NK - NQ, np.arange(NK)
        seen = visible(NQ, NK, causal)
        near_ = (np.abs(key - now) < 40) & seen | (key < 3) & seen
        want = np.broadcast_to(near_, (B, HQ, NQ, NK))
        o, kept = of_pairs((q, k, v), want, causal)
        check((np.load("p.npy") == want).all() and np.load("p.npy").dtype == np.uint8, "pairs")
        near(np.load("o.npy"), o, 1e-5, "o of a window")
        check(x["method"] == "window" and x["params"] == {"window": 40, "sink": 3}, "what ran", x)
        check(x["density_tokens"] == round(near_.sum() / seen.sum(), 9) and
              x["density_tokens_per_head"] == [x["density_tokens"]] * (B * HQ), "density", x)
        check(abs(x["recall"] - kept.mean()) < 1e-6 and
              abs(x["worst_row_recall"] - kept.min()) < 1e-6 and
              np.allclose(x["recall_per_head"], kept.mean(-1).ravel(), atol=1e-6), "recall", x)
        check(x["mask_worst_row_l1"] < 1e-5 < x["l1"] and x["predict_multiply_adds"] == 0 and
              x["kept_by"] is x["theta"] is x["density"] is None, "the rest", x)
    run("window:window=40,sink=3", "--mask-out", "m.safetensors", "--causal", *exact)
    o = np.load("o.npy")
    fine("run", *qkv, "--mask", "m.safetensors", "-o", "o.npy", "--causal", *exact)
    check((np.load("o.npy") == o).all(), "--mask-out, and --mask again")
    # SpargeAttn is what it is without --method.
    x = run("spargeattn:theta=0.2,tau=0.7,lambda=-3", "--intermediates", "d")
    explained("sparge run", x)
    o, made = np.load("o.npy"), (2 * NQ + 18) * HQ + 2 * NK * HK
    y = fine("run", *qkv, "--theta", 0.2, "--tau", 0.7, "--lambda", -3, "-o", "o.npy", "--check")
    check((np.load("o.npy") == o).all() and os.path.exists("d/S_all.npy") and
          x["params"] == dict(tau=0.7, theta=0.2, topk=-1, sink=0, **{"lambda": -3}), "SpargeAttn")
    check(abs(x["predict_multiply_adds"] / (B * made * D / (B * HQ * NQ * NK * (D + DV))) - 1) <
          1e-6, "what prediction takes", x)
    own = "seconds", "tops", "method", "params", "predict_multiply_adds"
    same = [n for n in KEYS if not n.startswith(own)]
    check([x[n] for n in same] == [y[n] for n in same], "and says the same", x, y)
    run("dense", *exact)
    o = np.load("o.npy")
    fine("run", *qkv, *EXACT, "-o", "o.npy")
    check((np.load("o.npy") == o).all(), "dense is --dense")
    check(run("xattention", "--causal")["block_k"] == 128, "blocks of its own")
    # A mask alone.
    x = fine("run", *qkv, "--method", "random:density=0.3", "--mask-only", "--mask-out", "m.npy")
    kept = np.load("m.npy")
    check(x["kept_blocks"] == kept.sum() and x["density_blocks"] == round(kept.mean(), 9), "random",
          x)
    wrong(USAGE, "q, k and v", "run", *qkv[:2], "--method", "window", "--mask-only")
    # A folder.
    folder_of("f", 1, [(1, 0)])
    x = fine("run", "f", "--method", "window", "--pairs-out", "pairs")
    check([y["method"] for y in x["files"]] == ["window"] and
          os.path.exists("pairs/layer01_0.npy"), "a folder", x)


def test_method_of_parts():
    """Keys that are pooled: what is exact is recall, and the whole is one attention."""
    q, k, v, qkv = files()
    name, exact = "pisa0:density=0.3,block=32", EXACT[1:]
    x = fine("run", *qkv, "--method", name, "-o", "o.npy", "--pairs-out", "p.npy", "--lse-out",
             "l.npy", "--check", *exact)
    pairs = np.load("p.npy")
    kept = of_pairs((q, k, v), pairs == 1)[1]
    check(set(np.unique(pairs)) == {1, 2} and abs(x["recall"] - kept.mean()) < 1e-6 and
          abs(x["worst_row_recall"] - kept.min()) < 1e-6, "recall is of what is exact", x)
    check(x["mask_worst_row_l1"] < 1e-5 < x["l1"], "the arithmetic", x)
    y = fine("check", *qkv, "--method", name, "--o", "o.npy", "--lse", "l.npy")
    explained("sparge check", {**y, "params": None})
    check(y["ok"] and y["over"] == "method" and y["method"] == "pisa0" and
          y["params"]["block"] == 32 and y["mask"]["recall"] == x["recall"] and
          y["mask"]["density_tokens"] == x["density_tokens"] and
          [h["recall"] for h in y["per_head"]] == x["recall_per_head"] and
          y["dense"]["l1"] == x["l1"], "says what run says", y)
    save("d.npy", attention(q, k, v)[0].astype(np.float32))
    fine("check", *qkv, "--method", name, "--o", "d.npy", code=DIFFERENT,
         says=["attention by the method"])
    for out in ["--mask-out", "m.npy"], ["--intermediates", "d"]:
        keeps("o.npy", USAGE, [out[0], "pisa0", "--pairs-out"], "run", *qkv, "--method", name, *out)
    x = fine("run", *qkv, "--method", name, "--mask-only", "--check")
    check(x["recall"] == y["mask"]["recall"] and x["tops"] is None, "a mask alone", x)
    for more in [["--method", name, "--pairs-out", "r.npy"], ["--method", "window:window=50"],
                 ["--method", "spargeattn:theta=0.2", "--density", 0.6]]:
        code, out, err = sparge("map", *qkv, "-o", "m.svg", *more)
        check(code == FINE and out == err == "", "map", more, code, err)
        with open("m.svg", "rb") as f:
            check(f.read().startswith(b"<?xml"), "a picture")
    check((np.load("r.npy") == pairs).all(), "--pairs-out of map")


def test_every_method():
    """What each attends to is what it says, on the whole and in its arithmetic."""
    q, k, v, qkv = files()
    for m in json.loads(sparge("methods", "--json")[1]):
        whole = ":a=0" if m["name"] == "blasst" else ""  # or the run skips, which no mask says
        args = [*qkv, "--method", m["name"] + whole,
                *(["--causal"] if "causal" in m["needs"] else [])]
        if set(m["needs"]) & {"grid", "segments", "state"}:
            wrong(UNSUPPORTED, [m["name"], "needs"], "run", *args)
            continue
        x = fine("run", *args, "-o", "o.npy", "--pairs-out", "p.npy", "--check", *EXACT[1:])
        pairs, causal = np.load("p.npy"), "end" if "--causal" in args else None
        o, kept = of_pairs((q, k, v), pairs == 1, causal)
        check(abs(x["recall"] - kept.mean()) < 1e-6 and x["mask_worst_row_l1"] < 2e-5, m["name"], x)
        if not (pairs == 2).any():
            near(np.load("o.npy"), o, 2e-5, m["name"])
            check(x["density_tokens"] == round((pairs == 1).sum() / (
                B * HQ * visible(NQ, NK, causal).sum()), 9), m["name"], "density", x)
        y = fine("check", *args, "--o", "o.npy")
        check(y["ok"] and y["mask"]["recall"] == x["recall"], m["name"], "check", y)


def test_method_density():
    q, k, v, qkv = files()
    args = [*qkv, "--mask-only"]
    for name, p in ("window:sink=2", "window"), ("random:seed=3", "density"), \
            ("xattention:block=32", "tau"):
        for wanted in 0.6, 0.8:
            x = fine("run", *args, "--causal", "--method", name, "--density", wanted)
            at, got = x["params"][p], x["density_tokens"]
            step = [at - 1, at + 1] if p == "window" else [
                float(np.nextafter(np.float32(at), np.float32(to))) for to in (0, 1)]
            beside = [fine("run", *args, "--causal", "--method",
                           f"{name}{',' if ':' in name else ':'}{p}={to!r}")["density_tokens"]
                      for to in step]
            check(x["density"] == wanted and all(abs(got - wanted) <= abs(to - wanted)
                                                 for to in beside), name, "nearest", x, beside)
    x = fine("run", *args, "--method", "spargeattn:theta=0.2", "--density", 0.5)
    y = fine("run", *args, "--theta", 0.2, "--density", 0.5)
    check(x["params"]["tau"] == y["tau"] == x["tau"] and x["kept_by"] == y["kept_by"], "of tau", x)
    wrong(USAGE, ["--density 0.001 cannot be reached", "window from 1 to 633", "to 1"], "run",
          *args, "--method", "window", "--density", 0.001)


def gate_mask(q, k, gate_q, gate_k, threshold, block=64):
    """The blocks that SeerAttention's gate keeps, of q and k that do not turn."""
    def pooled(x, how):
        return np.stack([how(x[:, :, t:t + block].astype(np.float64), 2)
                         for t in range(0, x.shape[2], block)], 2)
    q = np.einsum("bhnd,hdo->bhno", pooled(q, np.mean), gate_q)
    k = np.concatenate([pooled(k, how) for how in (np.max, np.min, np.mean)], -1)
    k = np.repeat(np.einsum("bhnd,hdo->bhno", k, gate_k), HQ // HK, 1)
    s = q @ k.swapaxes(2, 3) / gate_k.shape[2]**0.5
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return (p > threshold) | (p == p.max(-1, keepdims=True))


def test_gate():
    q, k, v, qkv = files()
    r = np.random.default_rng(5)
    gate_k = (r.standard_normal((HK, 3 * D, 8)) / 6).astype(np.float32)
    gate_q = (r.standard_normal((HQ, D, 8))).astype(np.float32)
    def gate(name="g.safetensors", **tensors):
        return save_safetensors(name, **{n: x if isinstance(x, tuple) else ("F32", x)
                                         for n, x in tensors.items()})
    def run(*more, name="seer:threshold=0.1,dense_rows=0"):
        x = fine("run", *qkv, "--method", name, "--mask-only", "--mask-out", "m.npy", *more)
        return x, np.load("m.npy") != 0
    both = ["--gate", gate(gate_k=gate_k, gate_q=gate_q)]
    x, m = run(*both)
    want = gate_mask(q, k, gate_q, gate_k, 0.1)
    check(0.2 < want.mean() < 0.8 and (m == want).all(), "by hand", want.mean(), m.mean())
    check(x["gate"] == {"file": "g.safetensors", "sha256": sha256("g.safetensors")}, "named", x)
    explained("sparge run", {**x, "params": None})
    check(fine("run", *qkv)["gate"] is None and (run()[1] != want).any(), "none")
    check((run(*both, "--rope-base", 100)[1] != want).any(), "--rope-base")
    # Other dtypes, and one layer of a file as the authors name its tensors.
    half = [x.astype(np.float16) for x in (gate_q, gate_k)]
    gate("h.safetensors", gate_k=("F16", half[1]), gate_q=("F16", half[0]))
    check((run("--gate", "h.safetensors")[1] == gate_mask(q, k, *half, 0.1)).all(), "f16")
    name = "model.layers.3.self_attn.attn_gate.mask_linear_"
    of = {name + "k.weight": gate_k, name + "q.weight": gate_q}
    gate("l.safetensors", **of, **{n.replace("3", "2"): -x for n, x in of.items()})
    check((run("--gate", "l.safetensors", "--layer", 3)[1] == want).all(), "of layer 3")
    code, out, err = sparge("map", *qkv, "-o", "m.svg", "--method", "seer", *both)
    check(code == FINE and out == err == "", "map", code, err)
    fine("run", *qkv, "--method", "seer:threshold=0.1", *both, "-o", "o.npy", *EXACT[1:])
    check(fine("check", *qkv, "--method", "seer:threshold=0.1", *both, "--o", "o.npy")["ok"],
          "check")
    # What is wrong.
    wide = np.zeros((HQ, 3 * D, D), np.float32)
    for words, tensors in [
        ("'gate_k': no such tensor", dict(gate_q=gate_q)),
        (["'gate_k'", f"({HK}, {D}, 8)", f"[{HK} or as many as of queries, {3 * D}, any]"],
         dict(gate_k=gate_k[:, :D])),
        (["'gate_k'", "(1, "], dict(gate_k=gate_k[:1])),
        (["'gate_k'", "(8,)"], dict(gate_k=gate_k[0, 0])),
        (["'gate_k'", "is i64"], dict(gate_k=("I64", gate_k))),
        ("'gate_k': 1 numbers are not finite",
         dict(gate_k=np.where(gate_k == gate_k.max(), np.nan, gate_k))),
        (["'gate_q': no such tensor", f"must be {D}"], dict(gate_k=gate_k)),
        (["'gate_q'", f"({HQ}, {D}, 7)", "that of the keys"],
         dict(gate_k=gate_k, gate_q=gate_q[..., :7])),
        (["'gate_q'", f"({HK}, "], dict(gate_k=gate_k, gate_q=gate_q[:HK]))]:
        gate("w.safetensors", **tensors)
        wrong(FILE, ["w.safetensors", *([words] if isinstance(words, str) else words)], "run", *qkv,
              "--method", "seer", "--gate", "w.safetensors")
    fine("run", *qkv, "--method", "seer", "--gate", gate("w.safetensors", gate_k=wide))
    wrong(FILE, "'gate_k'", "run", *qkv, "--method", "seer", "--gate", "l.safetensors")
    wrong(FILE, "layers.4", "run", *qkv, "--method", "seer", "--gate", "l.safetensors", "--layer",
          4)
    wrong(FILE, "none.safetensors", "run", *qkv, "--method", "seer", "--gate", "none.safetensors")
    keeps("g.safetensors", USAGE, "is an input", "run", *qkv, "--method", "seer", *both, "-o",
          "g.safetensors")
    for args in [], ["--method", "window"], ["--density", 0.5]:
        wrong(USAGE, ["--gate", "--method seer"], "run", *qkv, *args, *both)
    wrong(USAGE, ["--rope-base", "--gate"], "run", *qkv, "--method", "seer", "--rope-base", 1e4)
    for base in "0.5", "nan", "x", "inf":
        wrong(USAGE, "--rope-base", "run", *qkv, "--method", "seer", *both, "--rope-base", base)


def test_method_usage():
    q, k, v, qkv = files()
    capture("c.safetensors", 1)
    for name, words in [("xatention", "did you mean 'xattention'"), ("", "unknown method"),
                        ("window:windw=3", ["window has no parameter 'windw'", "mean 'window'"]),
                        ("window:", "no parameter ''"), ("dense:x=1", "has no parameters"),
                        ("window:window", "write window=1024"),
                        ("window:window=", "not a number"), ("window:window=1x", "not a number"),
                        ("window:window= 1", "not a number"), ("window:window=nan", "[1, "),
                        ("window:window=0", ["window of window is 0", "[1, "]),
                        ("window:window=1.5", "whole number"), ("random:density=1.01", "[0, 1]"),
                        ("window:sink=1,window=2,sink=1", "sink of window is there twice")]:
        for command in ["run", *qkv], ["map", *qkv, "-o", "m.png"], ["check", *qkv, "--o", "q.npy"]:
            wrong(USAGE, words, *command, "--method", name)
    # What does not go together.
    save("m.npy", np.ones((B, HQ, 3, 6), bool))
    for other in [["--params", "p.json"], ["--theta", 0.3], ["--tau", 0.5], ["--topk", 0.5],
                  ["--min-mass", 0.5], ["--cell", 8],
                  ["--lambda", -3], ["--sink"], ["--dense"], ["--mask", "m.npy"],
                  ["--mask-pairs", "m.npy"]]:
        for args in ["--method", "window", *other], [*other, "--method", "window"]:
            wrong(USAGE, ["--method", f"leave out {other[0]}"], "run", *qkv, *args)
    for other in ["--mask", "m.npy"], ["--mask-pairs", "m.npy"], ["--sink"]:
        wrong(USAGE, ["--method", f"leave out {other[0]}"], "check", *qkv, "--o", "q.npy", *other,
              "--method", "window")
    wrong(USAGE, "--density", "check", *qkv, "--o", "q.npy", "--density", 0.5)
    wrong(USAGE, ["--density", "dense has no parameter"], "run", *qkv, "--method", "dense",
          "--density", 0.5)
    wrong(USAGE, "--density finds window of window", "run", *qkv, "--method", "window:window=3",
          "--density", 0.5)
    # What a method needs.
    for grid, text, fits in ([4, 8, 8], 0, True), ([4, 8, 7], 32, True), ([4, 8, 8], 1, False):
        name = folder_of(f"g{text}", 1, [(1, 0)], grid=grid, n_text=text) + "/layer01_0.safetensors"
        if fits:
            fine("run", name, "--method", "window")
        else:
            wrong(FILE, ["layer01_0", "256 queries", "'grid'", "257 tokens"], "run", name,
                  "--method", "window")
            fine("run", name, "--dense")
    wrong(UNSUPPORTED, ["flexprefill needs causal", "'sparge methods'"], "run", *qkv, "--method",
          "flexprefill")
    wrong(UNSUPPORTED, "pisa0 needs attention without causality", "map", *qkv, "-o", "m.png",
          "--method", "pisa0", "--causal")


def test_method_segments():
    """--segments, of the method that needs them."""
    q, k, v, qkv = files()
    method = ["--method", "blockrank", "--causal"]
    ends = [50, 200, NK - 60, NK]
    text = ",".join(map(str, ends))
    fine("run", *qkv, *method, "--segments", text, "--pairs-out", "p.npy", "-o", "o.npy",
         *EXACT[1:])
    place = np.arange(NQ) + NK - NQ
    of_query, of_key = (np.searchsorted(ends, x, "right") for x in (place, np.arange(NK)))
    want = (np.arange(NK) <= place[:, None]) & (
        (of_query == 3)[:, None] | (of_key == 0) | (of_query[:, None] == of_key))
    check((np.load("p.npy") == want).all() and 0 < want.mean() < 1, "its pairs")
    check(sparge("map", *qkv, *method, f"--segments={NK}", "-o", "m.png")[0] == FINE, "map")
    fine("check", *qkv, *method, "--segments", text, "--o", "o.npy")
    wrong(UNSUPPORTED, "blockrank needs the segments", "run", *qkv, *method)
    for text, words in [("", "100,200,4096"), ("5,", "100,200,4096"), ("5, 6", "100,200,4096"),
                        ("5;6", "100,200,4096"), ("1e3", "100,200,4096"), ("0,5", "0 after 0"),
                        ("-3", "-3 after 0"), ("7,7", "7 after 7"), ("9,8", "8 after 9"),
                        (f"5,{NK + 1}", f"ends at {NK + 1}, and there are {NK} keys"),
                        (f"5,{NK - 1}", f"ends at {NK - 1}, and there are {NK} keys"),
                        (f"5,{10**30}", f"and there are {NK} keys")]:
        wrong(USAGE, ["--segments", words], "run", *qkv, *method, f"--segments={text}")
    wrong(USAGE, "--segments is for a method", "run", *qkv, "--segments", NK)
    wrong(USAGE, ["window looks at no segments", "--segments"], "run", *qkv, "--method", "window",
          "--segments", NK)
    wrong(USAGE, "--density: blockrank has no parameter", "run", *qkv, *method, "--segments", NK,
          "--density", 0.5)


def test_contradictions():
    """Options of which one makes another meaningless."""
    q, k, v, qkv = files()
    save("m.npy", np.ones((B, HQ, 3, 6), bool))
    save_safetensors("x.safetensors", q=("F32", q), k=("F32", k), v=("F32", v))
    predicts = [["--theta", 0.3], ["--tau", 0.5], ["--topk", 0.5], ["--min-mass", 0.5],
                ["--cell", 8]]
    attends = [["-o", "o.npy"], ["--lse-out", "l.npy"], ["--lambda", -3], ["--skip-rows", 8],
               ["--qk-dtype", "f32"], ["--pv-dtype", "f32"]]
    for one, others in [(["--dense"], [
            *predicts, ["--mask", "m.npy"], ["--mask-pairs", "m.npy"], ["--density", 0.5],
        ["--mask-only"], ["--params", "p.json"]
    ]), (["--mask", "m.npy"], [*predicts, ["--mask-pairs", "m.npy"], ["--sink"],
                               ["--density", 0.5]]),
                        (["--mask-pairs", "m.npy"], [*predicts, ["--sink"], ["--density", 0.5]]),
                        (["--mask-only"], attends),
                        (["--density", 0.5], [*predicts[1:], ["--params", "p.json"]]),
                        (["--params", "p.json"], [*predicts[:-1], ["--lambda", -3]])]:
        for other in others:
            name = "--output" if other[0] == "-o" else other[0]
            for args in one + other, other + one:
                wrong(USAGE, [one[0], f"leave out {name}"], "run", *qkv, *args)
    fine("run", *qkv, "--dense", "--lambda", -3, "--sink")
    wrong(USAGE, ["kernel", "cuda"], "run", *qkv, "--kernel", 3, "--backend", "cpu")
    for old, new in ("--qk=int8", "--qk-dtype"), ("--pv=f32", "--pv-dtype"), \
            ("--rung=1", "--kernel"), ("--scale=1", "--softmax-scale"), \
            ("--dump=d", "--intermediates"):
        wrong(USAGE, [f"{old.split('=')[0]} is now {new};"], "run", *qkv, old)
    wrong(USAGE, ["isa", "ref"], "run", *qkv, "--isa", "avx2", "--backend", "ref")
    for other in ["--l1", 0.1], ["--l2", 0.2], ["--bound", "mean"]:
        wrong(USAGE, ["--sparsity", f"leave out {other[0]}"], "tune", "x.safetensors", "-o",
              "p.json", "--sparsity", 0.5, *other)
    for other in *predicts, ["--sink"]:
        wrong(USAGE, [other[0], "predicted"], "bench", *ONE, "--mask-kind", "banded", *other)
    fine("run", *qkv, "--dense", "--intermediates", "d")
    for bound in "--max-l1", "--max-worst":
        wrong(USAGE, [bound, "two arrays", "--tolerance"], "diff", "d", "d", bound, 0.1)
    wrong(USAGE, ["--tolerance", "two folders"], "diff", "q.npy", "q.npy", "--tolerance", 0.1)


def test_dump_and_diff():
    q, k, v, qkv = files()
    fine("run", *qkv, "--intermediates", "d", "-o", "o.npy", "--mask-out", "m.npy", "--tau", 0.7)
    stages = dict(blocks=(2, ), k_mean=(B, HK, D), q_pool=(B, HQ, 3, D), k_pool=(B, HK, 6, D),
                  q_sim=(B, HQ, 3), k_sim=(B, HK, 6), S_all=(B, HQ, 3, 6), S=(B, HQ, 3, 6),
                  why=(B, HQ, 3, 6), mask=(B, HQ, 3, 6), q_int=(B, HQ, NQ, D),
                  k_int=(B, HK, NK, D), v_int=(B, HK, NK, DV), q_scale=(B, HQ, 3),
                  k_scale=(B, HK, 6), v_scale=(B, HK, 6, DV), pv_done=(B, HQ, 3, 6), m=(B, HQ, NQ),
                  l=(B, HQ, NQ), o=(B, HQ, NQ, DV))
    check(sorted(os.listdir("d")) == sorted(n + ".npy" for n in stages), "stages", os.listdir("d"))
    for name, shape in stages.items():
        check(np.load(f"d/{name}.npy").shape == shape, "shape of", name)
    load = lambda name: np.load(f"d/{name}.npy")
    check(np.abs(load("k_mean") - k.mean(2)).max() < 1e-5, "k_mean")
    smooth = k - load("k_mean")[:, :, None]
    check(np.abs(load("q_pool")[:, :, 2] - q[:, :, 256:].mean(2)).max() < 1e-5, "q_pool")
    check(np.abs(load("k_pool")[:, :, 1] - smooth[:, :, 64:128].mean(2)).max() < 1e-5, "k_pool")
    unit = smooth / np.linalg.norm(smooth, axis=-1, keepdims=True)
    sim = (unit[:, :, 64:128].sum(2)**2).sum(-1) / 64**2
    check(np.abs(load("k_sim")[:, :, 1] - sim).max() < 1e-5, "k_sim")
    back = load("k_int")[:, :, :64] * load("k_scale")[:, :, :1, None]
    check(np.abs(back - smooth[:, :, :64]).max() <= load("k_scale")[:, :, 0].max() * 0.51,
          "codes, steps")
    similar = np.repeat(load("k_sim"), HQ // HK, 1)[:, :, None] > np.float32(0.6)
    check(
        np.isfinite(load("S_all")).all() and not similar.all() and
        (load("S") == np.where(similar, load("S_all"), -np.inf)).all(),
        "S_all, of which theta hides columns of S")
    check(((load("why") != 0) == load("mask")).all() and ((load("why") & 8 > 0) == ~similar).all(),
          "why")
    check((load("blocks") == [128, 64]).all(), "blocks")
    check((load("mask") == np.load("m.npy")).all() and (load("o") == np.load("o.npy")).all(),
          "mask, o")
    check(((load("pv_done") > 0) == load("mask")).all(), "pv_done")
    check(load("q_int").dtype == np.int16, "codes are int16")
    fine("run", *qkv, "--intermediates", "f", *EXACT, "--no-smooth-k")
    there = "blocks mask pv_done m l o".split()
    check(sorted(os.listdir("f")) == sorted(n + ".npy" for n in there),
          "only what there is", os.listdir("f"))

    fine("run", *qkv, "--intermediates", "same")
    fine("run", *qkv, "--intermediates", "same", *EXACT)  # leaves nothing of what was there
    check(len(os.listdir("same")) == 7, "an old dump is replaced", os.listdir("same"))
    fine("run", *qkv, "--intermediates", "same", "--tau", 0.7)
    x = fine("diff", "d", "same")
    check(x["first_array"] is None and len(x["arrays"]) == 20, "equal dumps", x)
    check([s["array"] for s in x["arrays"]
           ][:10] == "blocks k_mean k_pool k_sim q_pool q_sim S_all S why mask".split(),
          "in the order of the algorithm")
    fine("run", *qkv, "--intermediates", "d", "--tau", 0.7)  # over what is there
    check(fine("diff", "d", "same")["first_array"] is None, "dumped again")
    changed = load("v_int")
    changed[1, 0, 70, 3] += 1
    save("same/v_int.npy", changed)
    changed = load("m")
    changed[0, 2, 290] *= 1 + 1e-5
    save("same/m.npy", changed)
    x = fine("diff", "d", "same", code=DIFFERENT)
    check(x["first_array"] == "v_int" and x["first"] ==
          dict(batch=1, kv_head=0, key=70, k_block=1, channel=3), "the first that differs",
          x["first"])
    rows = {s["array"]: s for s in x["arrays"]}
    check(rows["m"]["first"] == dict(batch=0, head=2, query=290, q_block=2) and
          rows["m"]["different"] == 1, "m", rows["m"])
    x = fine("diff", "d", "same", "--tolerance", 1, code=DIFFERENT)
    check(x["first_array"] == "v_int", "integers are compared exactly")
    save("same/v_int.npy", load("v_int"))
    fine("diff", "d", "same", "--tolerance", 1e-4)
    fine("diff", "d", "same", "--tolerance", 1e-6, code=DIFFERENT)
    save("same/m.npy", load("m"))
    changed = load("mask")
    changed[1, 3, 2, 4] ^= 1
    save("same/mask.npy", changed)
    x = fine("diff", "d", "same", code=DIFFERENT)
    check(x["first"] == dict(batch=1, head=3, q_block=2, k_block=4) and x["first_array"] == "mask",
          "mask", x["first"])
    os.remove("same/k_mean.npy")
    x = fine("diff", "d", "same", code=DIFFERENT)
    check(x["first_array"] == "k_mean", "a stage that is missing", x["first_array"])
    os.mkdir("empty")
    wrong(FILE, "holds no intermediates", "diff", "empty", "empty")
    wrong(FILE, ["d", "directory"], "diff", "d", "o.npy")
    wrong(FILE, ["nowhere"], "diff", "d", "nowhere")


def test_diff():
    r = np.random.default_rng(5)
    want = r.standard_normal((2, 3, 4, 5)).astype(np.float32)
    got = want + r.standard_normal(want.shape).astype(np.float32) * 0.01
    got[1, 2, 0] += 0.5
    save("want.npy", want)
    save("got.npy", got)
    x = fine("diff", "got.npy", "want.npy")
    l1 = np.abs(got - want).sum() / np.abs(want).sum()
    check(abs(x["l1"] / l1 - 1) < 1e-5 and x["worst_row"] == [1, 2, 0], "l1 and the worst row", x)
    check(abs(x["worst_row_l1"] / rows_l1(got, want).max() - 1) < 1e-5, "worst_row_l1")
    check(abs(x["rmse"] / np.sqrt(np.mean((got - want)**2)) - 1) < 1e-5, "rmse")
    check(x["nan_got"] == x["nan_want"] == 0 and x["first_nan_apart"] is None, "no NaN")
    for bound in "--max-l1", "--max-worst":
        at = x["l1" if bound == "--max-l1" else "worst_row_l1"]
        fine("diff", "got.npy", "want.npy", bound, at * 1.001)
        fine("diff", "got.npy", "want.npy", bound, at * 0.999, code=DIFFERENT)
    x = fine("diff", "want.npy", "want.npy", "--max-l1", 0, "--max-worst", 0)
    check(x["l1"] == x["worst_row_l1"] == x["rmse"] == 0 and abs(x["cosine"] - 1) < 1e-8,
          "the same", x)
    want[0, 1, 2, 3] = got[0, 1, 2, 3] = np.nan
    save("want.npy", want)
    save("got.npy", got)
    x = fine("diff", "got.npy", "want.npy")
    check(x["first_nan_got"] == x["first_nan_want"] == [0, 1, 2, 3] and x["l1"] < 1, "NaN of both",
          x)
    got[1, 0, 1, 4] = np.nan
    save("got.npy", got)
    x = fine("diff", "got.npy", "want.npy", code=DIFFERENT)
    check(x["nan_got"] == 2 and x["nan_want"] == 1 and x["first_nan_apart"] == [1, 0, 1, 4] and
          x["l1"] is None and x["worst_row"] == [1, 0, 1], "NaN of one", x)
    save("a.npy", np.array([[0, 0], [np.inf, 1]], np.float64))
    save("b.npy", np.array([[0, 0], [np.inf, 1]], np.float64))
    check(fine("diff", "a.npy", "b.npy", "--max-worst", 0)["l1"] == 0,
          "infinite in both, rows of 0")
    save("b.npy", np.array([[0, 0], [-np.inf, 1]], np.float64))
    fine("diff", "a.npy", "b.npy", "--max-l1", 9, code=DIFFERENT)
    save("b.npy", np.array([[0, 0], [7, 1]], np.float64))
    x = fine("diff", "a.npy", "b.npy", code=DIFFERENT)
    check(
        x["inf_got"] == x["nonfinite_apart"] == 1 and x["inf_want"] == 0 and x["l1"] is None and
        x["first_nonfinite_apart"] == [1, 0] and x["first_nan_apart"] is None, "inf and a number",
        x)
    fine("diff", "b.npy", "a.npy", code=DIFFERENT)
    fine("diff", "a.npy", "b.npy", "--max-l1", "inf", code=DIFFERENT)
    save("b.npy", np.array([[0, 0], [np.nan, 1]], np.float64))
    x = fine("diff", "a.npy", "b.npy", code=DIFFERENT)
    check(x["nonfinite_apart"] == 1 and x["first_nan_apart"] == [1, 0], "inf and NaN", x)
    save("a.npy", np.full((2, 2), np.nan))
    x = fine("diff", "a.npy", "a.npy", "--max-l1", 0)
    check(x["l1"] is None and x["worst_row"] is None and x["nan_got"] == 4,
          "nothing finite: no error", x)
    save("a.npy", np.array([[0, 1e-9], [1, 1]], np.float64))
    save("b.npy", np.array([[0, 0], [1, 1]], np.float16))
    x = fine("diff", "a.npy", "b.npy", "--max-worst", 1e9, code=DIFFERENT)
    check(x["worst_row_l1"] is None and x["worst_row"] == [0], "something where nothing is wanted",
          x)
    save("a.npy", np.arange(4))
    check(fine("diff", "a.npy", "a.npy")["worst_row"] == [], "integers, one axis")
    wrong(FILE, ["a.npy", "b.npy", "(4,)", "(2, 2)"], "diff", "a.npy", "b.npy")
    wrong(FILE, "nowhere.npy", "diff", "a.npy", "nowhere.npy")


def test_diff_masks():
    """Of masks the blocks that are missing and extra, and they must be equal unless a bound says
    otherwise."""
    want = np.random.default_rng(6).random((2, 3, 4, 5)) < 0.5
    got = want.copy()
    want[0, 1, 2, 3], want[1, 2, 3, 4] = True, True
    got[0, 1, 2, 3], got[1, 2, 3, 4] = False, False
    want[1, 0, 0, 2], got[1, 0, 0, 2] = False, True
    for kinds in (bool, bool), (np.uint8, np.uint8), (bool, np.uint8):
        a, b = (save(f"{n}.npy", x.astype(kind)) for n, x, kind in zip("ab", (got, want), kinds))
        x = fine("diff", a, b, code=DIFFERENT)
        check((x["missing"], x["extra"], x["ok"]) == (2, 1, False), "how many blocks", x)
        check(x["first_missing"] == [0, 1, 2, 3] and x["first_extra"] == [1, 0, 0, 2],
              "where the first ones are", x)
        both = save("both.npy", (got | want).astype(kinds[0]))
        x = fine("diff", both, a, code=DIFFERENT)
        check((x["missing"], x["extra"], x["ok"]) == (0, 2, False), "extra alone", x)
        x = fine("diff", a, both, code=DIFFERENT)
        check((x["missing"], x["extra"], x["ok"]) == (2, 0, False), "missing alone", x)
        x = fine("diff", a, a)
        check(
            x["missing"] == x["extra"] == 0 and x["first_missing"] is x["first_extra"] is None and
            x["ok"], "equal", x)
        fine("diff", a, b, "--max-l1", 1)
        fine("diff", a, b, "--max-l1", 0.001, code=DIFFERENT)
    x = fine("diff", save("a.npy", want.astype(np.uint8) * 255), "b.npy")
    check(x["missing"] == x["extra"] == 0 and x["ok"] and x["l1"] > 0,
          "what is not 0 is kept, as by run --mask", x)
    x = fine("diff", *(save(f"{n}.npy", x[0].astype(np.uint8)) for n, x in zip("ab", (got, want))))
    check("missing" not in x and x["ok"], "three axes of uint8: numbers, not a mask", x)
    index = np.array([[0, 0, 0, 0], [1, 2, 3, 3]])
    got[0, 0, 0, 0] = got[1, 2, 3, 3] = want[0, 0, 0, 0] = want[1, 2, 3, 3] = True
    bits = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    a, b, c = (save_safetensors(f"{name}.safetensors", blocks=("U8", x), partial_index=("I64", i),
                                partial_bits=("U8", y))
               for name, x, i, y in (("a", want, index, bits),
                                     ("b", want, index, bits ^ (bits == 9)),
                                     ("c", want, index[:1], bits[:1])))
    x = fine("diff", a, a)
    check(x["ok"] and x["partial_apart"] == 0 and x["first_partial_apart"] is None, "equal", x)
    for pair in (a, b), (b, a), (a, c), (c, a), (c, b):
        x = fine("diff", *pair, code=DIFFERENT)
        check(x["missing"] == x["extra"] == 0 and x["partial_apart"] == 1 and
              x["first_partial_apart"] == [1, 2, 3, 3] and not x["ok"], "other pairs", x)
    x = fine("diff", save("w.npy", want.astype(np.uint8)), a, code=DIFFERENT)
    check(x["partial_apart"] == 2 and x["first_partial_apart"] == [0, 0, 0, 0], "a whole block", x)
    want[1, 2, 3, 3] = False
    x = fine("diff", save("w.npy", want.astype(np.uint8)), a, code=DIFFERENT)
    check(x["partial_apart"] == x["missing"] == 1, "a block that one lacks is not counted", x)
    save_safetensors("s.safetensors", blocks=("U8", want), partial_index=("I64", index[:1]),
                     partial_bits=("U8", bits[:1, :2]))
    wrong(FILE, ["s.safetensors", "(1, 2, 2)", "(2, 3, 2)", "equal shapes"], "diff",
          "s.safetensors", a)
    save("a.npy", want)
    for kind in np.int8, np.int64, np.float32:
        for pair in ("a.npy", save("b.npy", got.astype(kind))), ("b.npy", "a.npy"):
            wrong(FILE, ["b.npy", "a.npy is a mask"], "diff", *pair)
            fine("diff", *pair, "--max-l1", 1)


def pixels(name):
    data = open(name, "rb").read()
    at, packed = 8, b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
        packed += body if kind == b"IDAT" else b""
        at += size + 12
    assert (depth, colour) == (8, 2)
    raw, before, rows = zlib.decompress(packed), np.zeros(width * 3, np.int64), []
    for y in range(height):
        how, *line = raw[y * (3 * width + 1):(y + 1) * (3 * width + 1)]
        line = np.array(line, np.int64)
        for x in range(len(line)):  # the filters of PNG
            a, b = (line[x - 3] if x > 2 else 0), before[x]
            c = before[x - 3] if x > 2 else 0
            p = a + b - c
            paeth = b if abs(p - b) <= abs(p - c) else c
            if abs(p - a) <= min(abs(p - b), abs(p - c)):
                paeth = a
            line[x] = (line[x] + (0, a, b, (a + b) // 2, paeth)[how]) % 256
        rows.append(line)
        before = line
    rgb = np.array(rows).reshape(height, width, 3)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def test_map():
    q, k, v = random(1, 1, 512, 16), random(2, 1, 512, 16), random(3, 1, 512, 16)
    qkv = [save("q.npy", q), save("k.npy", k), save("v.npy", v)]
    def draw(*args):
        code, out, err = sparge("map", *args)
        check((code, out) == (0, "") and all(HINT in line for line in err.splitlines()),
              f"map {args}", code, out, err)
        check(open("map.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n", f"map {args}: a PNG")
    cell, swatch = 32 * 64, 12 * 12  # pixels of a block, and of its colour's sample
    draw(*qkv[:2], "-o", "map.png", "--causal", "--tau", 0.5)
    x = pixels("map.png")
    fine("run", *qkv, "--causal", "--tau", 0.5, "--mask-out", "m.npy")
    mask, seen = np.load("m.npy"), blocks_seen(512, 512, "end")
    check((x == 0x33265C).sum() == swatch + mask.sum() * cell, "kept cells", (x == 0x33265C).sum())
    check((x == 0xF6EFE6).sum() == swatch + (seen - mask).sum() * cell, "skipped cells")
    line = x.shape[1] - 56  # under the head of the picture
    check((x == 0xD9DBE2).sum() == swatch + line + 2 * (1 - seen).sum() * cell, "cells not visible")
    check(not (x == 0xF0902E).any(), "no lambda, no third colour")
    draw(*qkv[:2], "-o", "map.png", "--causal", "--map-out", "mass.npy")
    s = np.where(visible(512, 512, "end"), q[0].astype(np.float64) @ k[0].T.astype(np.float64) / 4,
                 -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    mass = (p / p.sum(-1, keepdims=True)).reshape(4, 128, 8, 64).sum(3).mean(1)
    check(np.abs(np.load("mass.npy")[0, 0] - mass).max() < 1e-6, "the numbers of the map")
    top, left = 220, 74  # of the first panel
    centre = x[top + 32:top + 4 * 64:64, left + 16:]
    right = centre[:, 256 + 24::32][:, :8]
    check(((right == 0x33265C) == mask[0, 0]).all(), "where the cells of the mask are")
    light = sum(centre[:, :256:32] >> shift & 255 for shift in (0, 8, 16))
    order = np.argsort(mass[seen])
    check((np.diff(light[seen][order]) <= 0).all() and
          (light[~seen] == sum((0xD9, 0xDB, 0xE2))).all(),
          "more attention is darker", light, mass)
    odd = q.copy()
    odd[0, 200, 3] = np.nan
    got, out, err = sparge("map", save("odd.npy", odd), "k.npy", "-o", "map.png")
    check(got == FINE and out == "" and "1 of 512 rows" in err and err.count("\n") == 1,
          "map: how many are NaN", err)
    wrong(USAGE, "is an input", "map", *qkv[:2], "-o", "m.png", "--map-out", "q.npy")
    wrong(FILE, "nowhere", "map", *qkv[:2], "-o", "nowhere/m.png", "--map-out", "mass2.npy")
    wrong(FILE, "nowhere", "map", *qkv[:2], "-o", "m.png", "--map-out", "nowhere/mass.npy")
    draw(*qkv, "-o", "map.png", "--lambda", 0, "--theta", 1, "--skip-rows", 1024)
    x = pixels("map.png")
    fine("run", *qkv, "--lambda", 0, "--theta", 1, "--skip-rows", 1024, "--intermediates", "d")
    done = np.load("d/pv_done.npy")
    check(set(np.unique(done)) == {0, 1}, "lambda drops some", np.unique(done))
    check((x == 0xF0902E).sum() == swatch + (done == 0).sum() * cell, "cells that lambda drops")
    check((x == 0x33265C).sum() == swatch + (done == 1).sum() * cell, "cells that it leaves")
    check((x == 0x925B45).sum() == swatch, "what is dropped in part is in the legend")
    draw(*qkv, "-o", "map.png")
    save_safetensors("x.safetensors", q=("F32", q), k=("BF16", k))
    draw("x.safetensors", "-o", "map.png")
    wrong(FILE, ["x.safetensors", "v"], "map", "x.safetensors", "-o", "m.png", "--lambda", -3)
    save_safetensors("x.safetensors", q=("F32", q), k=("F32", k), v=("F16", v))
    draw("x.safetensors", "-o", "map.png", "--lambda", -3)
    big = random(1, 2, 3, 300, 16)
    draw(save("big.npy", big), "big.npy", "-o", "map.png", "--block-q", 16, "--block-k", 16)
    draw(save("e.npy", big[:, :, :0]), "big.npy", "-o", "map.png")
    draw("big.npy", "e.npy", "-o", "map.png")
    draw(save("e.npy", big[:0]), "e.npy", "-o", "map.png")
    sparge("map", *qkv, "-o", "map.png", preexec_fn=lambda: os.close(2),
           env={**os.environ, "FONTCONFIG_FILE": "/nowhere"})  # which complains on stderr
    check(open("map.png", "rb").read(4) == b"\x89PNG", "nothing but the picture in its file")
    os.remove("map.png")
    wrong(USAGE, "-o", "map", *qkv)
    wrong(USAGE, "q and k", "map", "-o", "map.png")
    wrong(USAGE, "--lambda needs", "map", *qkv[:2], "-o", "map.png", "--lambda", -3)
    wrong(USAGE, "is an input", "map", *qkv[:2], "-o", "k.npy")
    wrong(FILE, "nowhere", "map", *qkv[:2], "-o", "nowhere/map.png")
    if full := full_device():
        os.symlink(full, "full.png")
        wrong(FILE, "No space left", "map", *qkv[:2], "-o", "full.png")
    for name in "map.jpg", "map", "map.png.txt", ".svg/map":
        wrong(USAGE, [name, ".png, .svg or .pdf"], "map", *qkv[:2], "-o", name)
    wrong(USAGE, ["map.png", "--block-q"], "map",
          save("wide.npy", np.zeros((1, 20000, 1), np.float32)),
          "wide.npy", "-o", "map.png", "--block-q", 1, "--block-k", 1)
    wrong(USAGE, "--mask", "map", *qkv, "-o", "map.png", "--mask", "m.npy")


def test_map_formats():
    """By the end of the name. The panels of an SVG are pictures in it, pixel for pixel those of the
    PNG."""
    x = save("x.npy", random(1, 1, 512, 16))
    for name in "map.png", "map.svg", "MAP.PDF":
        check(sparge("map", x, x, "-o", name, "--causal", "--tau", 0.5) == (FINE, "", ""), name)
    check(read("MAP.PDF", "rb")[:5] == b"%PDF-" and b"%%EOF" in read("MAP.PDF", "rb")[-8:], "a PDF")
    ElementTree.parse("map.svg")
    panels = []
    for data in re.findall(r'"data:image/png;base64,([^"]*)"', read("map.svg")):
        write("panel.png", base64.b64decode(data))
        panels.append(pixels("panel.png"))
    whole = pixels("map.png")
    check(
        len(panels) == 2 and all((p == whole[220:220 + 256, left:left + 256]).all()
                                 for p, left in zip(panels, (74, 74 + 256 + 24))), "an SVG",
        len(panels))


def test_map_memory():
    """8192 x 8192 floats are 256 MiB; the map does with much less."""
    limit = 192 << 20
    little = lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if sparge("info", preexec_fn=little)[0] != FINE:
        print("skipped: map within 192 MiB (a sanitizer takes more)")
        return
    x = save("x.npy", random(1, 8192, 4))
    code, _, err = sparge("map", x, x, "-o", "map.png", preexec_fn=little)
    check(code == FINE, "map within 192 MiB", code, err)
    os.remove("map.png")
    # where the libraries of letters have just too little nothing is left behind
    least, most = 0, limit
    x = save("x.npy", random(1, 64, 4))
    while most - least > 1 << 17:
        limit = (least + most) // 2
        code, _, _ = sparge("map", x, x, "-o", "map.png", "--threads", 1, preexec_fn=little)
        check(listing() == ["./map.png", "./x.npy"] if code == FINE else listing() == ["./x.npy"],
              "no file left", limit, code, listing())
        least, most = (least, limit) if code == FINE else (limit, most)
        if code == FINE:
            os.remove("map.png")


def test_info_and_help():
    x = fine("info", "--json")
    check(x["backends"]["ref"] == {"built": True, "available": True} and x["isa"]["scalar"], "info",
          x)
    check(set(x["backends"]) == {"ref", "cpu", "cuda"} and "version" in x, "info", x)
    check(
        any(name in x["compiler"] for name in ("gcc", "Clang", "clang")) and "-" in x["flags"],
        "what built it", x)
    code, out, err = sparge("info")
    check(code == 0 and err == "" and x["version"] in out and "avx512vnni" in out, "info in words",
          out)
    check(sparge("--version") == (0, f"sparge {x['version']}\n", ""), "--version")
    code, out, err = sparge("--help")
    check(
        code == 0 and err == "" and
        all(c in out for c in "run diff map order bench methods info".split()), "--help")
    for command in "run", "diff", "map", "order", "bench", "methods", "info":
        code, out, err = sparge(command, "--help")
        check(code == 0 and err == "" and f"sparge {command}" in out, command, "--help", code, err)
    for option in ("--theta --tau --topk --lambda --sink --causal[= --softmax-scale --block-q "
                   "--block-k "
                   "--mask --no-smooth-k --skip-rows --rules --threads --backend --isa --dense "
                   "--mask-pairs --mask-out --pairs-out --qk-dtype --pv-dtype --lse-out "
                   "--intermediates --check --layout --method --density").split():
        check(option in sparge("run", "--help")[1], "run --help names", option)
    wrong(USAGE, "info", "info", "x")


def test_order():
    def order(*args):
        x = fine("order", *args, "-o", "i.npy")
        index = np.load("i.npy")
        check(index.dtype == np.int64 and sorted(index) == list(range(len(index))), "permutation",
              args)
        return x, index
    grid = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    check((order(2, 4, 6, "--order", "row")[1] == grid.ravel()).all(), "row")
    check((order(2, 4, 6, "--order", "column")[1] == grid.transpose(0, 2, 1).ravel()).all(),
          "column")
    check((order(2, 4, 6, "--order", "time")[1] == grid.transpose(1, 2, 0).ravel()).all(), "time")
    one, two = (order(2, 4, 6, "--order", "random", "--seed", s)[1] for s in (1, 2))
    check((one != two).any() and (one == order(2, 4, 6, "--order=random", "--seed=1")[1]).all(),
          "seed")
    for args, before, after in ((2, 4, 6), 0, 0), ((3, 5, 7), 0, 0), ((2, 4, 6), 7, 3), \
                               ((1, 3, 1), 2, 0):
        for name in "row", "column", "time", "random", "hilbert":
            x, index = order(*args, "--order", name, "--text-before", before, "--text-after", after)
            n = int(np.prod(args))
            check((index[:before] == range(before)).all() and
                  (index[before + n:] == range(before + n, before + n + after)).all(), "text stays")
            place = np.array(np.unravel_index(index[before:before + n] - before, args))
            steps = np.abs(np.diff(place)).sum(0)
            check(x == dict(order=name, tokens=n + before + after,
                            longer_steps=int((steps > 1).sum()),
                            longest_step=int(steps.max())), "steps", x, steps)
    check(fine("order", 4, 4, 4)["longer_steps"] == 0, "hilbert is what is meant, in unit steps")
    check(fine("order", 4, 4, 4)["order"] == "hilbert", "hilbert is what is meant")
    check(order(0, 4, 4)[0]["longest_step"] == 0, "no tokens")
    os.remove("i.npy")
    wrong(USAGE, "T, H and W", "order", 2, 3)
    wrong(USAGE, "one side too many", "order", 2, 3, 4, 5)
    wrong(USAGE, "T is '2x'", "order", "2x", 3, 4)
    wrong(USAGE, "--order", "order", 2, 3, 4, "--order", "peano")
    wrong(USAGE, "--seed", "order", 2, 3, 4, "--seed", -1)
    wrong(USAGE, "too many", "order", 1 << 40, 1 << 40, 4)
    wrong(USAGE, "H is", "order", 1, "99999999999999999999", 4)
    wrong(FILE, "nowhere", "order", 1, 2, 3, "-o", "nowhere/i.npy")
    if full := full_device():
        wrong(FILE, "No space left", "order", 1, 2, 3000, "-o", full)


BENCH_KEYS = (
    "case mask backend kernel isa qk_isa pv_isa threads q_len k_len dim heads block_q block_k "
    "causal softmax_scale sparsity seconds_total seconds_predict "
    "seconds_quantize seconds_attend tops tops_executed pct_peak speedup_vs_f32 efficiency "
    "baseline_pct_peak read_bytes_per_second").split()
TIMES = BENCH_KEYS[17:-1]
SMALL = ["--q-len", 256, "--dim", 16, "--repeat", 1]
ONE = [*SMALL, "--threads", 1]


def bench(*args, code=FINE, other=False):
    """The cases of a bench by name, and the baseline that is not ours where `other`."""
    got, out, err = sparge("bench", "--json", *args)
    check(got == code and (err == "") == (code == FINE), f"bench {args}: exit {code}", got, err)
    check(code == FINE or (err.startswith("sparge: ") and err.count("\n") == 1), "one line", err)
    rows = json.loads(out)
    check(all(list(x) == BENCH_KEYS for x in rows), "keys in their order", rows)
    return {x["case"]: x for x in rows if other or x["mask"] != "onednn"}


def test_bench():
    rows = bench(*ONE, "--mask-kind", "random,banded,predicted", "--sparsity", "0,0.5,0.75",
                 other=True)
    other = rows.pop("f32/f32 onednn", None)
    if other:  # where it is installed
        check(
            other["mask"] == "onednn" and other["seconds_total"] > 0 and other["pct_peak"] > 0 and
            other["efficiency"] is None and other["seconds_predict"] is None,
            "a baseline that is not ours", other)
    check(
        list(rows) == ["int8/int8 dense"] + [
            "int8/int8 " + x
            for x in ("random 0.5", "random 0.75", "banded 0.5", "banded 0.75", "predicted")
        ], "cases", list(rows))
    dense = rows["int8/int8 dense"]
    check(
        dense["mask"] == "dense" and dense["sparsity"] == 0 and dense["seconds_predict"] is None and
        dense["efficiency"] is None and dense["tops"] == dense["tops_executed"], "dense", dense)
    for name, x in rows.items():
        check([x[n] for n in ("q_len", "k_len", "dim", "heads", "threads")] == [256, 256, 16, 1, 1],
              name, x)
        check(name.split()[1] == x["mask"] and sparge("info")[1].count(x["isa"]) == 1, name, x)
        check(all(x[n] > 0 for n in (*TIMES, "read_bytes_per_second")
                  if n not in ("seconds_predict", "efficiency")), name, x)
        check(
            abs(x["tops"] * x["seconds_total"] / (2 * 32 * 256 * 256 * 1e-12) - 1) < 1e-6, name,
            "tops", x)
        check(
            abs(x["tops_executed"] / x["tops"] / (1 - x["sparsity"]) - 1) < 1e-6, name, "executed",
            x)
        check(all(x[n] == dense[n] for n in ("baseline_pct_peak", "read_bytes_per_second")), name,
              "one baseline", x)
        check(
            abs(x["speedup_vs_f32"] * x["seconds_total"] / dense["speedup_vs_f32"] /
                dense["seconds_total"] - 1) < 1e-6, name, "speed-up", x)
        if x is not dense:
            check(
                abs(x["efficiency"] /
                    ((1 - x["sparsity"]) * dense["seconds_attend"] / x["seconds_attend"]) - 1)
                < 1e-6, name, "efficiency", x)
            check(0 < x["seconds_predict"] < x["seconds_total"] > x["seconds_attend"], name,
                  "parts", x)
    check([round(x["sparsity"], 6) for x in rows.values()][:5] == [0, 0.5, 0.75, 0.5, 0.75],
          "imposed", rows)
    rows = bench(*ONE, "--qk-dtype", "int8,f32", "--pv-dtype", "int12,f32", "--sparsity", "0.5",
                 "--heads",
                 "1,2")
    check([(x["pct_peak"] is None) for x in rows.values()] == [True, False, True, False],
          "12 bits have no peak", rows)
    rows = bench(*ONE, "--qk-dtype", "f32", "--pv-dtype", "f32", "--sparsity", 0,
                 "--causal=none,end,start")
    check(
        list(rows) == ["f32/f32 dense", "f32/f32 dense causal", "f32/f32 dense causal=start"],
        "causal", list(rows))
    for x in rows.values():
        check(x["speedup_vs_f32"] == 1 and x["pct_peak"] == x["baseline_pct_peak"], "the baseline",
              x)
    x, y = (bench(*ONE, "--heads", 2, "--min-mass", 0.8, "--theta", -1, "--cell", cell)[
        "int8/int8 predicted"] for cell in (0, 8))
    check(0 < y["sparsity"] != x["sparsity"] > 0 < y["seconds_predict"], "without --mask-kind", x,
          y)
    name, x = bench(*ONE, "--sparsity", 0.5, "--block-q", 32, "--block-k", 16).popitem()
    check([x["block_q"], x["block_k"], x["sparsity"]] == [32, 16, 0.5], "blocks", x)
    name, x = bench(*ONE, "--causal", "--sparsity", 0.9).popitem()
    check(name == "int8/int8 random 0.9 causal" and 0.5 < x["sparsity"] < 0.8,
          "a block a row at least", x)

    code, out, err = sparge("bench", *ONE, "--sparsity", "0,0.5")
    check(code == FINE and err == "" and "peaks of" in out and "FMA peak" in out, "in words", out,
          err)
    check([line.split()[:3] for line in out.splitlines()[-2:]] ==
          [["int8/int8", "dense", "0.000"], ["int8/int8", "random", "0.5"]], "a line a case", out)


def test_bench_capture():
    tensors = {
        n: ("F16", random(s, 1, h, 200, 24)) for s, n, h in ((1, "q", 4), (2, "k", 2), (3, "v", 2))
    }
    file = save_safetensors("x.safetensors", **tensors)
    name, x = bench("--capture", file, "--threads", 1, "--repeat", 1, "--theta", -1, "--tau",
                    0).popitem()
    check(name == "int8/int8 predicted" and [x[n] for n in ("q_len", "k_len", "dim", "heads")] ==
          [200, 200, 24, 4] and x["sparsity"] == 0.75, "a capture", x)
    bench("--capture", file, "--threads", 1, "--repeat", 1, "--lambda", "-1", "--causal", "--sink",
          "--mask-kind", "predicted,random")
    heads = [dict(layer=3, head=h, dense=False, theta=-1, tau=None, topk=None, min_mass=h / 2 + 0.5,
                  **{"lambda": -1 if h else None}) for h in range(4)]
    write("p.json", json.dumps(dict(
        sparge_params=1, model=None, block_q=64, block_k=32, cell=8, skip_rows=64, causal="end",
        smooth_k=True, sink=True, softmax_scale=None, heads=heads)))
    x = bench("--capture", file, "--threads", 1, "--repeat", 1, "--params", "p.json")[
        "int8/int8 predicted causal"]
    want = fine("run", file, "--params", "p.json", "--mask-only")
    check(0.05 < want["sparsity"] <= x["sparsity"] < 1, "with tuned thresholds", x, want)
    bench("--capture", file, "--threads", 1, "--repeat", 1, "--params", "p.json", "--layer", 3,
          "--qk-dtype", "f32", "--pv-dtype", "f32", "--cell", 8)
    for args, words in ([["--cell", 16], "cell 8, not 16"],
                        [["--block-k", 64], "block_k 32, not 64"],
                        [["--causal=none"], 'causal "end", not "none"'],
                        [["--layer", 2], "no thresholds for layer 2"]):
        wrong(FILE, ["p.json", words], "bench", "--capture", file, "--threads", 1, "--params",
              "p.json", *args)
    wrong(USAGE, ["--params", "leave out --min-mass"], "bench", "--capture", file, "--params",
          "p.json", "--min-mass", 1)
    wrong(USAGE, "--params is of --capture", "bench", "--params", "p.json")
    tensors["q"][1][0, 0, 5, 0] = np.nan
    args = [
        "--capture",
        save_safetensors("nan.safetensors", **tensors), "--threads", 1, "--repeat", 1
    ]
    name, x = bench(*args, code=DIFFERENT).popitem()
    check(all(x[n] is None for n in TIMES), "what is wrong is not timed", x)
    code, out, err = sparge("bench", *args)
    check(code == DIFFERENT and "24 elements that are NaN" in err and "failed its check" in out,
          "and says so", code, out, err)
    wrong(
        FILE, "no tokens", "bench", "--capture",
        save_safetensors("none.safetensors",
                         **{n: (t, x[:, :, :0]) for n, (t, x) in tensors.items()}))
    wrong(FILE, "nowhere", "bench", "--capture", "nowhere.safetensors")
    wrong(FILE, ["x.safetensors", "'v'"], "bench", "--capture",
          save_safetensors("x.safetensors", q=tensors["q"], k=tensors["k"]))
    wrong(USAGE, "--capture has its own", "bench", "--capture", file, "--dim", 64)
    wrong(USAGE, "--ignore-manifest is of --capture", "bench", "--ignore-manifest")


def test_bench_busy():
    """Others at work: with one thread that is their matter, with several it is said."""
    busy = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"],
                            stdout=subprocess.PIPE)
    try:
        busy.stdout.readline()  # it is at work
        x = bench(*SMALL, "--threads", 2, "--sparsity", 0.5, code=DIFFERENT)["int8/int8 random 0.5"]
        check(all(x[n] is None for n in TIMES), "not timed beside others", x)
        code, out, err = sparge("bench", *SMALL, "--threads", 2, "--sparsity", 0.5)
        check(code == DIFFERENT and "busy machine" in out and "other processes used" in err, out,
              err)
        x = bench(*SMALL, "--threads", 2, "--sparsity", 0.5,
                  "--allow-busy")["int8/int8 random 0.5 (busy)"]
        check(x["seconds_total"] > 0, "--allow-busy", x)
        bench(*ONE, "--sparsity", 0.5)
    finally:
        busy.kill()
        busy.communicate()


def test_bench_usage():
    has = fine("info", "--json")["isa"]
    for isa in (name for name, there in has.items() if not there):
        wrong(UNSUPPORTED, [isa, *(n for n, there in has.items() if there)], "bench", *ONE, "--isa",
              isa)
    for args, words in [(["--mask-kind", "diagonal"], "random, banded, predicted"),
                        (["--qk-dtype", "int8,int9"], "int9"), (["--pv-dtype", "f16"],
                                                                "int8, int12, f32"),
                        (["--isa", "sse"], "avx512vnni"), (["--causal=middle"], "none, end, start"),
                        (["--q-len", "256,,512"], "empty item"),
                        (["--backend", "ref"], ["ref", "cpu and cuda alone"]),
                        (["--kernel", 4], "--backend cuda"),
                        (["--sparsity", ""], "empty item"), (["--threads", "1,"], "empty item"),
                        (["--sparsity", 1], "below 1"), (["--sparsity", "0.5,1.5"], "[0, 1]"),
                        (["--sparsity", -0.5], "[0, 1]"), (["--sparsity", "nan"], "[0, 1]"),
                        (["--q-len", 0], "--q-len"), (["--q-len", "4k"], "4k"),
                        (["--dim", 0], "[1, 256]"), (["--dim", 257], "[1, 256]"),
                        (["--heads", 0], "--heads"), (["--threads", 0], "[1, 1024]"),
                        (["--threads", 1025], "[1, 1024]"), (["--threads", "some"], "whole number"),
                        (["--repeat", 0], "--repeat"), (["--tau", 2], "--tau"),
                        (["--block-q", 0], "[1, 1024]"), (["--block-k", 1025], "[1, 1024]"),
                        (["--lambda", 1], "--lambda"), (["--bogus"], "--bogus"), (["x"], "x"),
                        (["--sparsity", ",".join(["0.5"] * 33)], "32"),
                        (["--mask-kind", "predicted", "--sparsity", 0.5], "imposed"),
                        (["--mask-kind", "random", "--cell", 8], "--cell is of predicted masks"),
                        (["--sparsity", 0.5, "--min-mass", 1], "--sparsity is for imposed masks")]:
        wrong(USAGE, words, "bench", *ONE, *args)


# ---- Tuning ----------------------------------------------------------------------------------

TUNE = ["--block-q", 32, "--block-k", 16]
TUNE_KEYS = (
    "params heads nonfinite dense backed_off sparsity worst_l1 judged held_out_sparsity "
    "held_out_worst_l1 "
    "held_out_within_l2_first held_out_within_l2 dense_passes seconds noise").split()
HEADER_KEYS = (
    "sparge_params version model weights_sha256 rules qk_dtype pv_dtype block_q block_k cell "
    "skip_rows causal smooth_k sink "
    "softmax_scale by bound l1 l2 sparsity inputs heads").split()
HEAD_KEYS = (
    "layer head dense theta tau topk min_mass lambda finite back_off in_sample held_out "
    "held_out_first dense_passes seconds").split()
ERROR_KEYS = "inputs l1 worst_l1 sparsity nan_got inf_got".split()


def qkv_of(seed, heads=2, kv_heads=1, n=256, nk=None, d=16, batch=1):
    nk = nk or n
    return (2 * random(seed, batch, heads, n, d), 2 * random(seed + 50, batch, kv_heads, nk, d),
            random(seed + 90, batch, kv_heads, nk, d))


def capture(name, *args, **how):
    x = qkv_of(*args, **how)
    return save_safetensors(name, **{n: ("F32", t) for n, t in zip("qkv", x)})


def of_one_layer(*names):
    """These files; a manifest says that they are of one layer."""
    write("manifest.json", json.dumps({"files": [{"file": name, "layer": 0} for name in names]}))
    return list(names)


def folder_of(name, seed, places, causal=False, **more):
    """A folder of captures, a file of two heads for each (layer, first head), and its manifest."""
    os.mkdir(name)
    files = []
    for n, (layer, head) in enumerate(places):
        file = f"layer{layer:02}_{head}.safetensors"
        capture(f"{name}/{file}", seed + n)
        files.append(dict(file=file, sha256=sha256(f"{name}/{file}"), layer=layer,
                          query_heads=[head, head + 1]))
    manifest = dict(model="small", sample=f"sample {name}", causal=causal, files=files, **more)
    write(f"{name}/manifest.json", json.dumps(manifest))
    return name


def tune(*args, out="p.json", code=FINE):
    """The line that it prints, and what is then in the file."""
    x = fine("tune", *args, "-o", out, *TUNE, code=code)
    return x, json.loads(read(out))


def lines_of(text):
    """A line for each head, as it stands but for a comma."""
    return [line.rstrip(",") for line in text.splitlines() if '"head":' in line]


def lines(name="p.json"):
    return lines_of(read(name))


def timeless(text):
    return re.sub(r'"seconds": [^}]*', "", text if isinstance(text, str) else "\n".join(text))


def cost(params, files, *more):
    """Of these thresholds over these captures, by head: relative L1 and sparsity,
    [captures][heads]."""
    l1, sparsity = [], []
    for file in files:
        x = fine("run", file, "--params", params, "-o", "o.npy", *TUNE, *more)
        fine("run", file, "-o", "dense.npy", *EXACT, *TUNE, *more)
        o, want = np.load("o.npy").astype(np.float64), np.load("dense.npy").astype(np.float64)
        axes = (1, 3) if "nhd" in more else (2, 3)
        l1.append((np.abs(o - want).sum(axes) / np.abs(want).sum(axes))[0])
        sparsity.append(x["sparsity_per_head"])
    return np.array(l1), np.array(sparsity)


def check_errors(errors, l1, sparsity, what):
    """What a file says of a head, and what runs of it cost."""
    check(list(errors) == ERROR_KEYS and errors["inputs"] == len(l1), what, "inputs", errors)
    check(abs(errors["l1"] - l1.mean()) <= 1e-5 * l1.mean() + 1e-9, what, "mean L1", errors, l1)
    check(
        abs(errors["worst_l1"] - l1.max()) <= 1e-5 * l1.max() + 1e-9, what, "worst L1", errors, l1)
    check(abs(errors["sparsity"] - sparsity.mean()) < 2e-6, what, "sparsity", errors, sparsity)


def check_threshold(text, what):
    """The shortest decimal that is this float."""
    if text == "null":
        return
    shortest = np.format_float_scientific(np.float32(text), unique=True, trim="-")
    digits = lambda x: len(x.lower().split("e")[0].replace("-", "").replace(".", "").strip("0")
                           ) or 1
    check(np.float32(text) == np.float32(shortest) and digits(text) == digits(shortest), what, text,
          shortest)
    check(float(text) == float(shortest), what, "the same decimal", text, shortest)


def test_tune():
    names = of_one_layer(*(capture(f"c{n}.safetensors", n) for n in range(3)))
    x, p = tune(*names)
    check(list(x) == TUNE_KEYS and list(p) == HEADER_KEYS, "keys in their order", list(x), list(p))
    header = dict(sparge_params=1, model=None, weights_sha256=None, rules="default",
                  qk_dtype="int8",
                  pv_dtype="int8", block_q=32, block_k=16, cell=0, skip_rows=32,
                  causal="none", smooth_k=True,
                  sink=False, softmax_scale=None, by="tau", bound="worst", l1=0.07, l2=0.08,
                  sparsity=None)
    check(all(p[key] == value and type(p[key]) is type(value) for key, value in header.items()),
          "header", p)
    check(p["version"] in sparge("--version")[1], "version", p["version"])
    check(p["inputs"] == [dict(layer=0, sample=None, file=n, sha256=sha256(n), held_out=False)
                          for n in names],
          "inputs", p["inputs"])
    check([(h["layer"], h["head"]) for h in p["heads"]] == [(0, 0), (0, 1)], "heads in order",
          p["heads"])
    l1, sparsity = cost("p.json", names)
    for n, h in enumerate(p["heads"]):
        check(list(h) == HEAD_KEYS, "keys of a head", list(h))
        check(h["dense"] is False and h["finite"] is True and h["topk"] is None, "a head", h)
        check(h["min_mass"] is None, "min_mass is not tuned", h)
        check(h["back_off"] in ("none", "lambda lowered", "tau raised"), "back_off", h)
        check(type(h["theta"]) is float and type(h["tau"]) is float and -1 <= h["theta"] <= 1 and
              0 <= h["tau"] <= 1 and (h["lambda"] is None or h["lambda"] <= 0), "thresholds", h)
        check(
            list(h["held_out_first"]) == ERROR_KEYS and h["held_out_first"]["inputs"] == 3,
            "held out", h)
        check(h["held_out"]["inputs"] == 3 and h["held_out"]["worst_l1"] <= 0.08,
              "held out: within l2", h)
        check(h["dense_passes"] > 1 and h["seconds"] > 0, "what it took", h)
        check_errors(h["in_sample"], l1[:, n], sparsity[:, n], f"head {n}")
    check(0.1 < sparsity.mean() and l1.max() <= 0.08, "sparse, and within l2", sparsity, l1)
    for knob in "theta", "tau", "topk", "lambda":
        for line in lines():
            check_threshold(re.search(f'"{knob}": ([^,]*),', line).group(1), knob)
    heads = p["heads"]
    mean = lambda key, what: np.mean([h[key][what] for h in heads])
    check(x["params"] == "p.json" and x["heads"] == x["judged"] == 2 and x["dense"] == 0, "counts",
          x)
    check(x["backed_off"] == sum(h["back_off"] != "none" for h in heads), "backed_off", x)
    check(abs(x["sparsity"] - mean("in_sample", "sparsity")) < 2e-6 and
          abs(x["held_out_sparsity"] - mean("held_out", "sparsity")) < 2e-6, "sparsity", x)
    check(x["worst_l1"] == max(h["in_sample"]["worst_l1"] for h in heads) and
          x["held_out_worst_l1"] == max(h["held_out"]["worst_l1"] for h in heads), "worst", x)
    check(x["held_out_within_l2"] == 2 and x["held_out_within_l2_first"] ==
          sum(h["held_out_first"]["worst_l1"] <= 0.08 for h in heads), "within l2", x)
    before = read("p.json", "rb")
    y, _ = tune(*names)
    check(
        read("p.json", "rb") == before and {**x, "seconds": 0} == {**y, "seconds": 0},
        "done: as it is", x, y)
    tune(*names, "--seconds", 1e-9)
    check(read("p.json", "rb") == before, "done: no time is needed")

    x, q = tune(names[0], "--threads", 1, out="one.json")
    check([h["held_out"] for h in q["heads"]] == [h["held_out_first"]
                                                  for h in q["heads"]] == [None] * 2 and
          x["judged"] == 0 and x["held_out_worst_l1"] is x["held_out_sparsity"] is None,
          "one capture", q, x)
    tune(names[0], "--threads", 3, out="three.json")
    check(
        timeless(read("one.json")) == timeless(read("three.json")),
        "the same by any number of threads")
    x = fine("run", names[0], "--params", "one.json", "--check", *TUNE)
    l1, _ = cost("one.json", names[:1])
    check(l1.min() <= x["l1"] <= l1.max(), "--check of tuned heads", x["l1"], l1)
    os.symlink("one.json", "link.json")
    write("one.json", read("one.json").split('"heads"')[0] + '"heads": []}')
    tune(names[0], out="link.json")
    check(
        os.path.islink("link.json") and timeless(read("one.json")) == timeless(read("three.json")),
        "a link stays")
    tune(names[0], out="a \"b\"\n.json")
    check(timeless(read("a \"b\"\n.json")) == timeless(read("one.json")), "an odd name")


def test_tune_options():
    names = [capture(f"c{n}.safetensors", n) for n in range(3)]
    of_one_layer(*names, *(f"n{n}.safetensors" for n in range(3)), "short.safetensors",
                 "long.safetensors")
    def run(out, *args, files=names, more=()):
        p = tune(*args, *more, out=out)[1]
        return p, *cost(out, files, *more)

    p, l1, sparsity = run("held.json", *names[:2], "--held-out", names[2])
    check([x["held_out"] for x in p["inputs"]] == [False, False, True], "--held-out", p["inputs"])
    for n, h in enumerate(p["heads"]):
        check_errors(h["in_sample"], l1[:2, n], sparsity[:2, n], "tuned on")
        check_errors(h["held_out"], l1[2:, n], sparsity[2:, n], "held out")
        check(h["held_out"]["worst_l1"] <= 0.08, "backed off", h)
    p, l1, sparsity = run("held2.json", names[1], "--held-out", names[0], "--held-out", names[2])
    check([x["file"] for x in p["inputs"]] == [names[1], names[0], names[2]], "two held out",
          p["inputs"])
    for n, h in enumerate(p["heads"]):
        check_errors(h["held_out"], l1[[0, 2], n], sparsity[[0, 2], n], "two held out")
        check_errors(h["in_sample"], l1[1:2, n], sparsity[1:2, n], "one tuned on")

    p, l1, sparsity = run("topk.json", *names, "--by", "topk")
    check(p["by"] == "topk" and all(h["tau"] is None and 0 <= h["topk"] <= 1 for h in p["heads"]),
          "--by topk", p)
    for n, h in enumerate(p["heads"]):
        check_errors(h["in_sample"], l1[:, n], sparsity[:, n], "--by topk")
        check_threshold(re.search('"topk": ([^,]*),', lines("topk.json")[n]).group(1), "topk")
    p, l1, sparsity = run("sparsity.json", *names[:2], "--sparsity", 0.7, files=names[:2])
    check(p["sparsity"] == 0.7 and p["l1"] is p["l2"] is p["bound"] is None, "--sparsity", p)
    for n, h in enumerate(p["heads"]):
        check_errors(h["in_sample"], l1[:, n], sparsity[:, n], "--sparsity")
        check(h["lambda"] is None and sparsity[:, n].mean() >= 0.7 - 1e-6, "sparse enough", h)
    worst, l1, sparsity = run("worst.json", *names, "--l1", 0.03, "--l2", 0.2)
    check(worst["l1"] == 0.03 and worst["l2"] == 0.2 and l1.max() <= 0.2, "--l1 and --l2", l1)
    p, l1, more = run("mean.json", *names, "--l1", 0.03, "--l2", 0.2, "--bound", "mean")
    check(p["bound"] == "mean" and l1.mean(0).max() <= 0.2 and more.mean() > sparsity.mean(),
          "--bound mean", l1)
    x = fine(
        "tune", names[0], "--model", "a name", "--l1", 1e-9, "--l2", 2e-9, "-o", "dense.json",
        *TUNE,
        says=["--l1 1e-09 is below the noise of dense attention in int8 and int8", "2 of 2 heads"])
    l1, _ = cost("dense.json", names[:1])
    check(
        x["noise"]["heads"] == x["dense"] == 2 and
        abs(x["noise"]["least"] / l1.min() - 1) < 1e-4 and
        abs(x["noise"]["most"] / l1.max() - 1) < 1e-4, "l1 below the noise", x, l1)
    p = json.loads(read("dense.json"))
    check(p["model"] == "a name" and all(h["dense"] and h["theta"] == -1 and h["tau"] == 1 and
                                         h["lambda"] is None and h["in_sample"]["sparsity"] == 0
                                         for h in p["heads"]), "left dense", p)
    p, l1, sparsity = run(
        "cut.json", *names, more=("--causal", "--sink", "--no-smooth-k", "--softmax-scale", 0.3,
                                  "--pv-dtype",
                                  "f32", "--skip-rows", 8, "--backend", "ref"))
    check([p[n] for n in "causal sink smooth_k softmax_scale pv_dtype skip_rows".split()] ==
          ["end", True, False, 0.3, "f32", 8], "options in the header", p)
    check_errors(p["heads"][1]["in_sample"], l1[:, 1], sparsity[:, 1], "under other options")
    for scale, says in ("1.2e-38", ()), ("3.4028234e38",
                                         ["NaN or infinite"
                                          ]):  # the least and the most that run takes
        check(sparge("tune", names[0], "--softmax-scale", scale, "-o", f"{scale}.json",
                     *TUNE)[0] == FINE,
              "--softmax-scale", scale)
        fine("run", names[0], "--softmax-scale", scale, "--params", f"{scale}.json", *TUNE,
             says=says)

    files = [
        save_safetensors(f"n{n}.safetensors",
                         **{x: ("F32", t.transpose(0, 2, 1, 3)) for x, t in zip("qkv", qkv_of(n))})
        for n in range(3)
    ]
    tune(*names, out="hnd.json")
    p, l1, sparsity = run("nhd.json", *files, files=files, more=("--layout", "nhd"))
    check(timeless(lines("nhd.json")) == timeless(lines("hnd.json")), "nhd as hnd")
    check_errors(p["heads"][1]["in_sample"], l1[:, 1], sparsity[:, 1], "nhd")
    save_safetensors(
        "batch.safetensors", **{
            x: ("F32", np.concatenate(t))
            for x, t in zip("qkv", zip(*(qkv_of(n) for n in range(3))))
        })
    tune("batch.safetensors", out="batch.json")
    check(
        timeless(lines("batch.json")) == timeless(lines("hnd.json")),
        "elements of a batch are captures")
    long = [capture("short.safetensors", 5, heads=4, kv_heads=2, n=100, nk=333),
            capture("long.safetensors", 6, heads=4, kv_heads=2, n=300)]
    p, l1, sparsity = run("gqa.json", *long, files=long)
    check(len(p["heads"]) == 4, "four heads", p)
    for n, h in enumerate(p["heads"]):
        check_errors(h["in_sample"], l1[:, n], sparsity[:, n], "captures of other lengths")


def test_tune_manifests():
    """Layers and heads by manifests; folders and files; what run makes of them."""
    places = [(6, 4), (2, 2), (6, 0)]
    for name, seed in ("a", 1), ("b", 11), ("c", 21):
        folder_of(name, seed, places)
    x, p = tune("a", "b", "--held-out", "c")
    check([(h["layer"], h["head"]) for h in p["heads"]] == [(2, 2), (2, 3), (6, 0), (6, 1), (6, 4),
                                                            (6, 5)],
          "in the order of layers and heads", p["heads"])
    check(p["model"] == "small" and x["heads"] == 6, "model", p["model"])
    check([(i["layer"], i["sample"], i["file"], i["held_out"]) for i in p["inputs"]] ==
          [(layer, f"sample {n}", f"layer{layer:02}_{head}.safetensors", n == "c")
           for layer, head in sorted(places) for n in "abc"], "inputs", p["inputs"])
    check(all(h["in_sample"]["inputs"] == 2 and h["held_out"]["inputs"] == 1 for h in p["heads"]),
          "counts", p)
    file = lambda name, place: f"{name}/layer{place[0]:02}_{place[1]}.safetensors"
    for place in places:
        l1, sparsity = cost("p.json", [file(n, place) for n in "abc"])
        for n in range(2):
            h = next(h for h in p["heads"] if (h["layer"], h["head"]) == (place[0], place[1] + n))
            check_errors(h["in_sample"], l1[:2, n], sparsity[:2, n], f"{place} {n}")
            check_errors(h["held_out"], l1[2:, n], sparsity[2:, n], f"{place} {n}")
    files = [file(n, place) for place in places for n in "ab"]
    _, q = tune(*files, "--held-out", "c/", out="files.json")
    check(timeless(lines("files.json")) == timeless(lines()) and q["inputs"] == p["inputs"],
          "files, and folders")
    _, q = tune("a/../a", os.path.abspath("b"), "--held-out", "./c", out="paths.json")
    check(timeless(read("paths.json")) == timeless(read("p.json")), "other paths to them")

    here = os.getcwd()
    os.chdir("a")  # the manifest of a file without a folder
    x = fine("run", "layer02_2.safetensors", "--params", "../p.json", *TUNE)
    os.chdir(here)
    check(x["sparsity_per_head"] == fine("run", file("a", places[1]), "--params", "p.json",
                                         *TUNE)["sparsity_per_head"], "in its folder")
    shutil.copy(file("a", (2, 2)), "alone.safetensors")
    wrong(FILE, ["alone.safetensors", "p.json has several", "--layer"], "run", "alone.safetensors",
          "--params", "p.json", *TUNE)
    wrong(FILE, ["layer 2 head 0"], "run", "alone.safetensors", "--params", "p.json", "--layer", 2,
          *TUNE)
    fine("run", "alone.safetensors", "--params", "p.json", "--layer", 6, *TUNE)
    wrong(FILE, ["is of layer 2, as its manifest says, not of 6", "--ignore-manifest"], "run",
          file("a", (2, 2)), "--params", "p.json", "--layer", 6, *TUNE)
    wrong(USAGE, "--layer needs", "run", "alone.safetensors", "--layer", 6, *TUNE)
    tensors = zip("qkv", qkv_of(2))
    qkv = [save(f"{n}.npy", x) for n, x in tensors]
    x = fine("run", *qkv, "--params", "p.json", "--layer", 6, *TUNE)
    check(
        x["sparsity_per_head"] == fine("run", "alone.safetensors", "--params", "p.json", "--layer",
                                       6, *TUNE)["sparsity_per_head"], "of three files")
    text = read("p.json")
    write("p.json", text.replace('"small"', '"large"'))
    wrong(FILE, ["'large'", "'small'"], "run", file("a", (2, 2)), "--params", "p.json", *TUNE)
    fine("run", "alone.safetensors", "--params", "p.json", "--layer", 6,
         *TUNE)  # of which nobody knows
    write("p.json", text.replace('"head": 3', '"head": 9'))
    wrong(FILE, ["p.json", "layer 2 head 3"], "run", file("a", (2, 2)), "--params", "p.json", *TUNE)


def stopped_on_the_way(*args, number, heads):
    """Sends the signal when so many of 12 heads are in p.json; should all of them be there before
    it comes, tries again. The code, and stderr."""
    before = read("p.json") if os.path.exists("p.json") else None
    for _ in range(100):
        code, out, err = stopped([PROGRAM, *args], number,
                                 lambda _: os.path.exists("p.json") and len(lines()) >= heads)
        if len(lines()) < 12:
            break
        os.remove("p.json")
        if before is not None:
            write("p.json", before)
    check(out == "", "nothing printed", out)
    return code, err


def test_tune_again():
    """Finished heads stay, byte for byte; in the end the file is as if nothing had happened."""
    names = []
    for n in range(3):
        capture(f"layer{n}.safetensors", n, heads=4, kv_heads=2, n=320)
        names.append(dict(file=f"layer{n}.safetensors", layer=n, query_heads=[0, 1, 2, 3]))
    write("manifest.json", json.dumps(dict(model=None, files=names)))
    args = ["tune", ".", "-o", "p.json", *TUNE, "--threads", 2]
    started = time.monotonic()
    fine(*args)
    took, whole = time.monotonic() - started, read("p.json")
    check(len(lines()) == 12, "all heads", len(lines()))

    # how many heads each of these allows is the machine's matter
    kept, seconds, stops = [], 1e-9, 0
    os.remove("p.json")
    while True:
        code, out, err = sparge(*args, "--seconds", seconds)
        there = lines() if os.path.exists("p.json") else []
        check(set(kept) <= set(there), "kept, byte for byte", kept, there)
        if code == FINE:
            break
        done = [sum(f'"layer": {n},' in line for line in there) for n in range(3)]
        check(all(done[n] == 4 or done[n + 1] == 0 for n in range(2)),
              "no time is left for another", done)
        check(code == UNFINISHED and out == "" and err ==
              f"sparge: p.json: the time is up: it has {len(there)} of "
              "12 heads; the same command goes on\n", "--seconds", code, err)
        stops, kept, seconds = stops + 1, there, max(took / 8, seconds * 1.3)
    check(stops > 0, "no time for any")
    check(timeless(read("p.json")) == timeless(whole), "--seconds: the same in the end")
    for number, code in (signal.SIGINT, UNFINISHED), (signal.SIGTERM, UNFINISHED), (signal.SIGKILL,
                                                                                    -9):
        os.remove("p.json")
        for heads in 1, 6:
            got, err = stopped_on_the_way(*args, number=number, heads=heads)
            kept = lines()
            check(got == code and heads <= len(kept) < 12, number, "stopped on the way", got, err,
                  len(kept))
            said = f"sparge: p.json: interrupted: it has {len(kept)} of 12 heads; " \
                   "the same command goes on\n"
            check(err == ("" if got < 0 else said), number, "one line", err)
            json.loads(read("p.json"))
        check(got < 0 or not [n for n in listing() if ".tmp" in n], number, "no temporary file",
              listing())
        fine(*args)
        check(set(kept) <= set(lines()), number, "kept, byte for byte")
        check(timeless(read("p.json")) == timeless(whole), number, "the same in the end")
        for name in listing():
            if ".tmp" in name:
                os.remove(name)
    os.remove("p.json")
    both = [
        subprocess.Popen([PROGRAM, *map(str, args)], stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE) for _ in range(2)
    ]
    check([x.communicate()[1] for x in both] == [b"", b""] and
          [x.returncode for x in both] == [0, 0], "two at once")
    check(timeless(read("p.json")) == timeless(whole), "two at once: the same")

    for n in range(0, 12, 3):  # a file with some of the heads, in another order
        rest = [line for k, line in enumerate(lines_of(whole)) if k % 4 != n % 4][::-1]
        write("p.json", whole.split('"heads": [')[0] + '"heads": [\n' + ",\n".join(rest) + "]}")
        fine(*args, "--threads", 1)
        check(timeless(read("p.json")) == timeless(whole), "some heads lacked", n)
    write("p.json", whole)
    keeps("p.json", FILE, ["p.json", "other captures or other options"], *args, "--l1", 0.01)
    keeps("p.json", FILE, "other captures", "tune", "layer0.safetensors", "-o", "p.json", *TUNE)
    keeps("p.json", FILE, "other captures", *args, "--causal")
    keeps("p.json", FILE, "other captures", *args, "--model", "another")
    write("p.json", whole.replace('"version": "', '"version": "9'))
    keeps("p.json", FILE, "other captures or other options", *args)


def test_tune_nonfinite():
    """A head with a NaN is left dense, and said; the others are as without it."""
    names, seeds = [], range(2)
    for n in seeds:
        x = dict(zip("qkv", qkv_of(n, heads=3, kv_heads=3)))
        save_safetensors(f"c{n}.safetensors", **{key: ("F32", t) for key, t in x.items()})
        x["v"][0, 1, 77:, :] = np.nan if n else x["v"][0, 1, 77:, :]
        x["q"][0, 2, 5, 3] = np.inf if n else 1
        names.append(
            save_safetensors(f"n{n}.safetensors", **{key: ("F32", t) for key, t in x.items()}))
    of_one_layer(*(f"{x}{n}.safetensors" for x in "cn" for n in seeds))
    tune(*(f"c{n}.safetensors" for n in seeds))
    want = lines()
    code, out, err = sparge("tune", *names, "-o", "n.json", *TUNE)
    check(code == FINE and json.loads(out)["dense"] == json.loads(out)["nonfinite"] == 2, "exit 0",
          code, out)
    dim = x["v"].shape[3]
    bad = {1: (x["v"].shape[2] - 77) * dim, 2: 1}
    check(
        sorted(err.splitlines()) == [
            f"sparge: layer 0 head {h}: {n} elements of its captures, or of attention over them, "
            f"are not finite; "
            "left dense" for h, n in bad.items()
        ], "two warnings", err)
    got = lines("n.json")
    check(timeless(got[0]) == timeless(want[0]), "the others as without it", got[0], want[0])
    for h in json.loads(read("n.json"))["heads"][1:]:
        check(h["dense"] is True and h["finite"] is False and h["theta"] == -1 and h["tau"] == 1 and
              h["lambda"] is None and h["held_out"] is None, "left dense", h)
    fine("run", names[0], "--params", "n.json", *TUNE)


def test_tune_overflow():
    """What is finite in f32 and not as P.V of f16 has no error, and is not taken for one of 0."""
    x = dict(zip("qkv", qkv_of(3, heads=2, kv_heads=2)))
    x["v"][0, 1] *= 1e6
    file = save_safetensors("x.safetensors", **{key: ("F32", t) for key, t in x.items()})
    sizes = x["v"].shape[2] * x["v"].shape[3]
    got = fine("tune", file, "-o", "p.json", *TUNE, "--backend", "ref", "--pv-dtype", "f16",
               says=["layer 0 head 1", f"{sizes} ", "not known"])
    check(got["worst_l1"] is None and got["nonfinite"] == 0 and got["heads"] == 2,
          "no worst error", got)
    fits, odd = json.loads(read("p.json"))["heads"]
    check(
        odd["dense"] is True and odd["in_sample"]["worst_l1"] is None and
        odd["in_sample"]["nan_got"] + odd["in_sample"]["inf_got"] == sizes,
        "counted, and left dense", odd)
    check(
        fits["in_sample"]["worst_l1"] < 0.08 and
        fits["in_sample"]["nan_got"] == fits["in_sample"]["inf_got"] == 0, "the other head", fits)


def wrong_bytes(code, words, *args):
    """As wrong, of arguments that are no text."""
    before = sorted(os.listdir(b"."))
    done = subprocess.run([PROGRAM.encode(), *(a if isinstance(a, bytes) else str(a).encode()
                                               for a in args)],
                          capture_output=True, timeout=600)
    err = done.stderr.decode(errors="replace")
    check(done.returncode == code and done.stdout == b"" and words in err and err.count("\n") == 1,
          args, done.returncode, err)
    check(sorted(os.listdir(b".")) == before, args, "no file left")


def test_tune_usage():
    c, d = capture("c.safetensors", 1), capture("d.safetensors", 2)
    for args, words in [([], "-o is missing"),
                        (["-o", "p.json", "--l1", 0.08], ["--l1", "--l2", "smaller"]),
                        (["-o", "p.json", "--l1", 0.2], "--l1 is 0.2 and --l2 is 0.08"),
                        (["-o", "p.json", "--l2", 0.07], "smaller"),
                        (["-o", "p.json", "--l1", 0], "--l1"),
                        (["-o", "p.json", "--l2", "nan"], "--l2"),
                        (["-o", "p.json", "--l1", "-0.1"], "--l1"),
                        (["-o", "p.json", "--bound", "best"], "worst, mean"),
                        (["-o", "p.json", "--by", "theta"], "tau, topk"),
                        (["-o", "p.json", "--sparsity", 0], "--sparsity"),
                        (["-o", "p.json", "--sparsity", 1], "--sparsity"),
                        (["-o", "p.json", "--seconds", 0], "--seconds"),
                        (["-o", "p.json", "--seconds", "soon"], "soon"),
                        (["-o", "p.json", "--theta", 0.5], "--theta"),
                        (["-o", "p.json", "--tau", 0.98], "--tau"),
                        (["-o", "p.json", "--topk", 0.5], "--topk"),
                        (["-o", "p.json", "--min-mass", 0.5], "--min-mass"),
                        (["-o", "p.json", "--lambda", "-inf"], "--lambda"),
                        (["-o", "p.json", "--params", "x.json"], "unknown option"),
                        (["-o", "p.json", "--held-out"], "needs a value"),
                        (["-o", "p.json", "--causal=start", "--block-q", 0], "[1, 1024]")]:
        wrong(USAGE, words, "tune", c, d, *args)
    wrong_bytes(USAGE, "UTF-8", "tune", c, "-o", b"\xff.json")
    wrong_bytes(USAGE, "UTF-8", "tune", c, "-o", "p.json", "--model", b"\xff")
    wrong(USAGE, "give a capture", "tune", "-o", "p.json")
    wrong(USAGE, "give a capture", "tune", "-o", "p.json", "--held-out", c)
    for rules in "paper", "upstream":
        wrong(UNSUPPORTED, "rules", "tune", c, d, "--layer", 0, "-o", "p.json", "--rules", rules,
              *TUNE)
    wrong(UNSUPPORTED, "cell is 8, but theta, tau and topk are tuned without cells", "tune", c, d,
          "--layer", 0, "-o", "p.json", "--cell", 8, *TUNE)
    wrong(FILE, "nowhere", "tune", "nowhere.safetensors", "-o", "p.json")
    wrong(FILE, "nowhere", "tune", c, "--held-out", "nowhere", "-o", "p.json")
    wrong(FILE, "cannot open", "tune", "", "-o", "p.json")
    wrong(FILE, ["has no manifest.json"], "tune", ".", "-o", "p.json")
    wrong(FILE, ["c.safetensors", "each capture once"], "tune", c, c, "--layer", 0, "-o", "p.json")
    wrong(FILE, ["each capture once"], "tune", c, d, "--held-out", "./c.safetensors", "--layer", 0,
          "-o", "p.json")
    shutil.copy(c, "copy.safetensors")
    wrong(FILE, ["copy.safetensors", "each capture once"], "tune", c, "copy.safetensors", "--layer",
          0, "-o", "p.json")
    os.rename("copy.safetensors", b"\xff.safetensors")
    wrong_bytes(FILE, "UTF-8", "tune", b"\xff.safetensors", "-o", "p.json")
    for words, other in {"3 heads": dict(heads=3), "2 key heads": dict(kv_heads=2),
                         "8 channels": dict(d=8)}.items():
        capture("o.safetensors", 3, **other)
        wrong(FILE, ["o.safetensors", words, "c.safetensors"], "tune", c, "o.safetensors",
              "--layer", 0, "-o", "p.json", *TUNE)
    for size in 0, 4, 100, os.path.getsize(c) - 1:
        write("cut.safetensors", read(c, "rb")[:size])
        wrong(FILE, "cut.safetensors", "tune", "cut.safetensors", "-o", "p.json", *TUNE)
        wrong(FILE, "cut.safetensors", "tune", c, "cut.safetensors", "--layer", 0, "-o", "p.json",
              *TUNE)
    wrong(FILE, "v", "tune", save_safetensors("qk.safetensors", **{n: ("F32", x) for n, x in
                                                                   zip("qk", qkv_of(1))}),
          "-o", "p.json", *TUNE)
    save_safetensors("empty.safetensors",
                     **{n: ("F32", x[:, :, :0]) for n, x in zip("qkv", qkv_of(1))})
    wrong(FILE, "empty", "tune", "empty.safetensors", "-o", "p.json", *TUNE)


def test_tune_writing():
    c, d = capture("c.safetensors", 1), folder_of("d", 2, [(0, 0)])
    keeps(c, USAGE, "is an input", "tune", c, "-o", c, *TUNE)
    capture("e.safetensors", 3)
    keeps(c, USAGE, "is an input", "tune", "e.safetensors", "--held-out", "./" + c, "--layer", 0,
          "-o", c, *TUNE)
    keeps(c, FILE, "./c.safetensors", "tune", d, "-o", "./c.safetensors", *TUNE)
    keeps("d/manifest.json", USAGE, "is an input", "tune", d, "-o", "d/manifest.json", *TUNE)
    keeps(write("empty.json", ""), FILE, "empty", "tune", c, "-o", "empty.json", *TUNE)
    keeps(write("foreign.json", '{"a": 1}'), FILE, "sparge_params", "tune", c, "-o", "foreign.json",
          *TUNE)
    for name, words in ("nowhere/p.json", "cannot create"), ("d", "directory"), ("new/",
                                                                                 "directory"), \
                       ("/proc/p.json", "cannot create"), ("/dev/stdout", "no regular file"), \
                       ("", "directory"), \
                       ("x" * 300, "too long"):
        wrong(FILE, words, "tune", c, "-o", name, *TUNE)
    if device := full_device():
        wrong(FILE, "no regular file", "tune", c, "-o", device, *TUNE)
    if os.geteuid() != 0:
        fine("tune", c, "-o", "p.json", *TUNE)
        os.chmod("p.json", 0o444)
        keeps("p.json", FILE, "write-protected", "tune", c, "-o", "p.json", *TUNE)
        os.remove("p.json")
        os.mkdir("locked", 0o555)
        wrong(FILE, "cannot create", "tune", c, "-o", "locked/p.json", *TUNE)
    folder_of("big", 5, [(0, 0), (1, 0)], text="x", note="y")
    manifest = json.loads(read("big/manifest.json"))
    write("big/manifest.json", json.dumps({**manifest, "sample": "a long name " * 200}))
    args = ["tune", "big", "-o", "p.json", *TUNE, "--threads", 1]
    def limit(size):  # bytes of a file: as a full disk would be
        return dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    wrong(FILE, ["p.json", "too large"], *args, **limit(3000))  # already when it begins
    fine(*args)
    whole, first = read("p.json"), lines()[0]
    os.remove("p.json")
    size = len(whole) - len(lines_of(whole)[-1]) // 2
    code, out, err = sparge(*args, **limit(size))
    check(code == FILE and out == "" and err.count("\n") == 1 and "too large" in err,
          "full on the way", code, err)
    check(timeless(lines()) == timeless(lines_of(whole)[:3]), "three heads stay", lines(), first)
    keeps("p.json", FILE, ["p.json", "too large"], *args, **limit(size))
    fine(*args)
    check(timeless(read("p.json")) == timeless(whole), "with space it goes on")
    if device:
        with open(device, "w") as full:
            wrong(FILE, ["standard output", "No space left"], *args, stdout=full)


def test_manifests():
    """Whatever is wrong with a manifest is one line of tune, and of run --params; a file alone
    too."""
    folder_of("d", 1, [(3, 0)])
    good = json.loads(read("d/manifest.json"))
    file, entry = "d/layer03_0.safetensors", good["files"][0]
    fine("tune", "d", "-o", "p.json", *TUNE)
    def both(words, manifest, folder_words=None):
        write("d/manifest.json", manifest if isinstance(manifest,
                                                        (str, bytes)) else json.dumps(manifest))
        wrong(FILE, folder_words or words, "tune", "d", "-o", "new.json", *TUNE)
        if words:
            wrong(FILE, words, "tune", file, "-o", "new.json", *TUNE)
            wrong(FILE, words, "run", file, "--params", "p.json", "-o", "o.npy", *TUNE)
    def with_(**changes):
        return {**good, "files": [{**entry, **changes}]}
    for text in "", "{", "not JSON", json.dumps(good)[:-1], '{"files": [], "files": []}', b"\xff", \
                b'{"a": "\x00"}':
        both(["manifest.json", "line"] if text else ["manifest.json", "empty"], text)
    for text in "[]", "{}", '{"files": 3}', '{"files": {}}':
        both(["manifest.json", "'files'"], text)
    both(None, {**good, "files": []}, ["d", "lists no files"])
    for files in [3], [None], [{}], [{"file": 3}], [{"file": ""}]:
        both(["d/manifest.json: lists ''"], {**good, "files": files})
    both(None, {**good, "files": [{"file": "nowhere"}]}, "d/nowhere")
    for key in "model", "sample", "text":
        for value in 3, [], True, {}:
            both([file, f"'{key}'"], {**good, key: value})
    for value in "yes", 1, []:
        both([file, "'causal'"], {**good, "causal": value})
    for value in "3", 3.0, -1, None, 1 << 31, True:
        both([file, "'layer'"], with_(layer=value))
    for value in 3, [], {}, None, "0", ["0", "1"], [0.0, 1.0], [-1, 0], [0, 1 << 31], [0,
                                                                                       0], [0, [1]]:
        both([file, "'query_heads'"], with_(query_heads=value))
    for value in 3, {}, [1, 2], [1, 2, 3, 4], [1, 2, -3], [1, 2, 3.0], "1x2x3":
        both([file, "'grid'"], {**good, "grid": value})
    both([file, "'n_text'"], {**good, "grid": [1, 2, 3], "n_text": "5"})
    both([file, "2 query heads", "lists 3"], with_(query_heads=[0, 1, 2]))
    both([file, "'sha256'"], with_(sha256=7))
    for value in "", "0" * 64, entry["sha256"][:-1]:
        both([file, "SHA-256", entry["sha256"][:12]], with_(sha256=value))
    for value in "0.5", 0, -1, []:
        both([file, "'softmax_scale'"], {**good, "softmax_scale": value})
        both([file, "'softmax_scale'"], with_(softmax_scale=value))
    for value in "middle", 1, True:
        both([file, "'causal_at'"], {**good, "causal_at": value})
    both(None, {**good, "files": [{"file": "n" * 5000}]}, "its path is too long")
    for key in "weights_sha256", "gguf_sha256":
        both([file, f"'{key}'"], {**good, key: 3})
    for name in "/etc/passwd", "..", "../d/layer03_0.safetensors", "a/../../b", "./" + entry[
            "file"], "a//b", "a/":
        both(["d/manifest.json: lists", name], {**good, "files": [{"file": name}]})
    both(["d/manifest.json: lists", entry["file"], "twice"],
         {**good, "files": [entry, {**entry, "layer": 5}]})
    for value in 1e-60, 1e60:
        both([file, "'softmax_scale'"], {**good, "softmax_scale": value})
    os.remove("d/manifest.json")
    os.symlink("nowhere", "d/manifest.json")
    wrong(FILE, "d/manifest.json", "run", file)
    os.remove("d/manifest.json")
    os.mkdir("d/manifest.json")
    wrong(FILE, ["manifest.json", "directory"], "tune", file, "-o", "new.json", *TUNE)
    os.rmdir("d/manifest.json")
    os.mkfifo("d/manifest.json")
    wrong(FILE, ["manifest.json", "regular"], "tune", file, "-o", "new.json", *TUNE)
    wrong(FILE, ["manifest.json", "regular"], "run", file, "--params", "p.json", *TUNE)
    os.remove("d/manifest.json")
    write("d/manifest.json", json.dumps({**good, "causal": True}))
    for how in "--causal", "--causal=start":
        fine("tune", "d", "-o", "causal.json", how, *TUNE)
        fine("run", file, "--params", "causal.json", how, *TUNE)
        os.remove("causal.json")
    write("d/manifest.json", json.dumps(good))
    write("d/manifest.json", json.dumps({"files": [{"file": entry["file"]}]}))  # that is enough
    code, out, err = sparge("tune", "d", "-o", "new.json", *TUNE)
    p = json.loads(read("new.json"))
    check(
        code == FINE and json.loads(out)["heads"] == 2 and p["model"] is None and
        p["inputs"][0]["sample"] is None and
        [(h["layer"], h["head"]) for h in p["heads"]] == [(3, 0), (3, 1)], "a short manifest", p)
    check(
        err ==
        "sparge: no manifest says the layer of 1 of 1 files, so their names do: "
        "layer03_0.safetensors is of "
        "layer 3\n", "and its layer by name", err)
    os.remove("new.json")
    write("d/manifest.json", json.dumps({"files": [], "text": "t"}))
    fine("tune", file, "-o", "new.json", "--layer", 3, *TUNE)  # of which the manifest says nothing
    os.remove("new.json")
    write("d/manifest.json", json.dumps({"text": "t.txt", "files": [{"file": entry["file"]}]}))
    fine("tune", file, "-o", "new.json", "--layer", 3, *TUNE)
    check(json.loads(read("new.json"))["inputs"][0]["sample"] == "t.txt", "the text is the sample")
    os.remove("new.json")

    folder_of("e", 11, [(3, 0)])
    write("d/manifest.json", json.dumps({"files": [{**entry, "query_heads": [0, 1]}]}))
    wrong(FILE, ["e/layer03_0", "'small'", "'unknown'"], "tune", "d", "e", "-o", "new.json", *TUNE)
    write("d/manifest.json", json.dumps({**good, "model": "other"}))
    wrong(FILE, ["e/layer03_0", "'small'", "'other'"], "tune", "d", "e", "-o", "new.json", *TUNE)
    for heads in [1, 2], [1, 0], None:
        change = with_(query_heads=heads)
        if heads is None:
            del change["files"][0]["query_heads"]
        write("d/manifest.json", json.dumps(change))
        wrong(FILE, ["e/layer03_0", "layer 3", "not the same ones"], "tune", "d", "e", "-o",
              "new.json", *TUNE)
    write("d/manifest.json", json.dumps(with_(layer=4)))
    wrong(FILE, ["e/layer03_0", "held out", "layer 3"], "tune", "d", "--held-out", "e", "-o",
          "new.json", *TUNE)


def unlisted(file, name="alone.safetensors"):
    """The same bytes where no manifest speaks of them."""
    return shutil.copy(file, name)


def output(*args):
    fine("run", *args, "-o", "o.npy")
    return np.load("o.npy")


def picture(*args):
    check(sparge("map", *args, "-o", "m.png") == (FINE, "", ""), "a picture", args)
    return read("m.png", "rb")


def test_manifest_obeyed():
    """Causality and scale are the manifest's in every command; an option that contradicts it is
    refused."""
    folder_of("d", 1, [(3, 0)], causal=True, softmax_scale=0.3)
    file = "d/layer03_0.safetensors"
    alone, bench_one = unlisted(file), ["--threads", 1, "--repeat", 1, "--allow-busy"]
    asked = ["--causal", "--softmax-scale", 0.3]
    want, plain = output(alone, *asked, *TUNE), output(alone, *TUNE)
    check((output(file, *TUNE) == want).all() and (want != plain).any(), "run")
    check((output(file, *asked, *TUNE) == want).all() and
          (output(file, "--causal=start", *TUNE) == want).all(), "asked for what it says")
    x = fine("run", file, "--check", *TUNE)
    check(x["manifest"] == dict(model="small", sample="sample d", layer=3, causal=True,
                                softmax_scale=0.3),
          "said", x)
    check(x["l1"] == fine("run", alone, "--check", *asked, *TUNE)["l1"], "--check")
    check((output(file, "--ignore-manifest", *TUNE) == plain).all(), "--ignore-manifest")
    check(
        fine("run", file, "--ignore-manifest", "--causal=none", *TUNE)["manifest"] is None,
        "of which nothing is said")
    check(picture(file, *TUNE) == picture(alone, *asked, *TUNE) != picture(alone, *TUNE), "map")
    check(
        picture(file, "--ignore-manifest", *TUNE) == picture(alone, *TUNE), "map --ignore-manifest")
    np.save("want.npy", want)
    rows = bench("--capture", file, *bench_one)
    check(all(x["causal"] == "end" and x["softmax_scale"] == 0.3 for x in rows.values()), "bench",
          rows)
    rows = bench("--capture", file, "--ignore-manifest", *bench_one)
    check(all(x["causal"] == "none" and x["softmax_scale"] is None for x in rows.values()),
          "bench --ignore-manifest", rows)
    for command in (["run", file,
                     "--check"], ["map", file, "-o",
                                  "x.png"], ["tune", file, "-o",
                                             "x.json"], ["check", file, "--o", "want.npy"]):
        wrong(FILE, [file, "causal", "--ignore-manifest"], *command, "--causal=none", *TUNE)
        wrong(FILE, [file, "--softmax-scale 0.3", "--ignore-manifest"], *command, "--softmax-scale",
              0.25, *TUNE)
    wrong(FILE, [file, "--ignore-manifest"], "bench", "--capture", file, "--causal=none,end",
          *bench_one)
    folder_of("e", 1, [(3, 0)], softmax_scale=0.3)  # which oneDNN could do but for the scale
    rows = bench("--capture", "e/layer03_0.safetensors", *bench_one)
    check(all(x["causal"] == "none" and x["softmax_scale"] == 0.3 for x in rows.values()),
          "bench, not causal", rows)
    p = tune("d", out="p.json")[1]
    check(p["causal"] == "end" and p["softmax_scale"] == 0.3, "tune", p)
    wrong(FILE, [file, "'small'", "'large'", "--ignore-manifest"], "tune", "d", "--model", "large",
          "-o", "x.json", *TUNE)
    wrong(USAGE, ["d", "its manifest", "--ignore-manifest"], "tune", "d", "--ignore-manifest", "-o",
          "x.json", *TUNE)
    wrong(USAGE, ["d", "--ignore-manifest"], "run", "d", "--ignore-manifest", *TUNE)

    manifest = json.loads(read("d/manifest.json"))
    capture(file, 1, n=100, nk=300)
    manifest["files"][0] |= dict(sha256=sha256(file), causal_at="start")
    write("d/manifest.json", json.dumps(manifest))
    alone = unlisted(file)
    check((output(file, *TUNE) == output(alone, "--causal=start", "--softmax-scale", 0.3,
                                         *TUNE)).all(),
          "causal_at")
    wrong(FILE, [file, "causal from the start", "--causal=start"], "run", file, "--causal", *TUNE)
    manifest["causal"] = False
    write("d/manifest.json", json.dumps(manifest))
    wrong(FILE, [file, "not causal", "--ignore-manifest"], "run", file, "--causal", *TUNE)
    write("d/manifest.json", json.dumps({"name": "a page", "icons": []}))  # somebody else's
    wrong(FILE, ["d/manifest.json", "'files'", "--ignore-manifest"], "run", file, *TUNE)
    fine("run", file, "--ignore-manifest", *TUNE)


def test_layers():
    """A layer that no manifest says is read from the name of the file; where that does not say it
    either, nobody guesses."""
    for n, name in enumerate(["a", "b", "layer06_step000", "x_layer12", "player7"]):
        capture(f"{name}.safetensors", n)
    code, out, err = sparge("tune", "layer06_step000.safetensors", "x_layer12.safetensors", "-o",
                            "p.json", *TUNE)
    heads = [(h["layer"], h["head"]) for h in json.loads(read("p.json"))["heads"]]
    check(code == FINE and heads == [(6, 0), (6, 1), (12, 0), (12, 1)], "layers by name", heads)
    check(
        err ==
        "sparge: no manifest says the layer of 2 of 2 files, so their names do: "
        "layer06_step000.safetensors is of "
        "layer 6\n", "and said", err)
    for name in "a", "player7":
        wrong(FILE, [name, "of which layer", "--layer"], "tune", "layer06_step000.safetensors",
              f"{name}.safetensors", "-o", "x.json", *TUNE)
        wrong(FILE, [name, "of which layer", "p.json", "--layer"], "run", f"{name}.safetensors",
              "--params", "p.json", *TUNE)
        wrong(FILE, [name, "of which layer", "p.json", "--layer"], "map", f"{name}.safetensors",
              "--params", "p.json", "-o", "x.png", *TUNE)
    p = tune("a.safetensors", "b.safetensors", "--layer", 3, out="q.json")[1]
    check([(h["layer"], h["held_out"]["inputs"]) for h in p["heads"]] == [(3, 2)] * 2, "--layer", p)
    p = tune("layer06_step000.safetensors", "b.safetensors", "--layer", 3, out="r.json")[1]
    check({h["layer"] for h in p["heads"]} == {3}, "--layer before the name", p)
    for args, layer, who in [(["x_layer12.safetensors", "--params", "p.json"], 12, "name"),
                             (["a.safetensors", "--params", "p.json", "--layer", 6], 6, "--layer"),
                             (["x_layer12.safetensors", "--params", "p.json", "--layer",
                               6], 6, "--layer"),
                             (["a.safetensors", "--params", "q.json"], 3, "params")]:
        x = fine("run", *args, *TUNE)["params"]
        check(x == dict(file=args[2], sha256=sha256(args[2]), layer=layer, layer_from=who),
              "whose thresholds", x)


def test_folders():
    """A folder of captures, with a manifest or with folders that have one: run, map, tune; and what
    one writes beside it the next reads."""
    os.mkdir("caps")
    for sample, seed in ("text0", 1), ("text1", 11):
        folder_of(f"caps/{sample}", seed, [(6, 0), (12, 2)], causal=True)
    names = [
        f"{sample}/layer{layer:02}_{head}" for sample in ("text0", "text1")
        for layer, head in [(6, 0), (12, 2)]
    ]
    _, p = tune("caps", out="p.json")
    tune("caps/text0", "caps/text1", out="q.json")
    check(timeless(read("p.json")) == timeless(read("q.json")) and
          [(h["layer"], h["head"], h["held_out"]["inputs"]) for h in p["heads"]] ==
          [(layer, head, 2) for layer, head in [(6, 0), (6, 1), (12, 2), (12, 3)]], "tune", p)
    x = fine("run", "caps", "--params", "p.json", "-o", "o", "--mask-out", "m", "--lse-out", "l",
             "--intermediates", "d", *TUNE)
    check(
        x["folder"] == "caps" and
        [row["file"] for row in x["files"]] == [f"{name}.safetensors" for name in names],
        "each file", x)
    for name, row in zip(names, x["files"]):
        one = fine("run", f"caps/{name}.safetensors", "--params", "p.json", "-o", "one.npy", *TUNE)
        check(
            list(row) == [*one, "file"] and
            all(row[key] == one[key] for key in ("sparsity_per_head", "manifest", "params")),
            "as alone", row, one)
        check((np.load(f"o/{name}.npy") == np.load("one.npy")).all() and
              os.path.exists(f"l/{name}.npy") and sorted(os.listdir(f"d/{name}"))[0] == "S.npy",
              "outputs", name)
    fine("run", "caps", "--method", "moba:chunk=32", "--mask-out", "of", *TUNE)
    check(os.path.exists(f"of/{names[0]}.safetensors"), "masks of a method, of some pairs")
    y = fine("run", "caps", "--mask", "m", *TUNE)
    check([row["sparsity_qk"] for row in x["files"]] == [row["sparsity_qk"] for row in y["files"]],
          "masks are read back")
    check(
        sparge("map", "caps", "--params", "p.json", "-o", "maps", "--map-out", "numbers",
               *TUNE) == (FINE, "", ""), "map")
    for name in names:
        check(
            read(f"maps/{name}.png", "rb") == picture(f"caps/{name}.safetensors", "--params",
                                                      "p.json", *TUNE) and
            os.path.exists(f"numbers/{name}.npy"), "pictures", name)
    check(len(fine("run", "caps/text1", *TUNE)["files"]) == 2, "a folder with a manifest")
    wrong(FILE, ["none", "has no manifest.json, nor has a folder in it"], "run",
          os.mkdir("none") or "none", *TUNE)
    wrong(FILE, ["caps", "is a directory"], "run", "caps", "k.npy", "v.npy", *TUNE)
    wrong(FILE, ["caps", "is a directory"], "check", "caps", "--o", "one.npy", *TUNE)
    wrong(FILE, ["caps", "is a directory"], "bench", "--capture", "caps", "--threads", 1)
    wrong(FILE, "block_k 16, not 32", "run", "caps", "--params", "p.json", "-o", "new",
          "--block-k", 32)
    wrong(FILE, "one.npy", "run", "caps", "-o", "one.npy", *TUNE)


def test_params_taken():
    """run and map take from a file of thresholds what it was tuned with, where the command line is
    silent."""
    c = capture("c.safetensors", 1, n=200)
    heads = [
        dict(layer=0, head=h, dense=False, theta=0.3, tau=0.9, topk=None, **{"lambda": -3.5})
        for h in range(2)
    ]
    good = dict(sparge_params=1, model=None, block_q=32, block_k=16, skip_rows=32, causal="none",
                smooth_k=True, sink=False, softmax_scale=None, heads=heads)
    thresholds = ["--theta", 0.3, "--tau", 0.9, "--lambda", -3.5]
    by_mass = ["--theta", 0.3, "--min-mass", 0.5, "--lambda", -3.5]
    for change, options in [({}, []), (dict(causal="end"), ["--causal"]),
                            (dict(causal="start"), ["--causal=start"]),
                            (dict(sink=True), ["--sink"]),
                            (dict(smooth_k=False), ["--no-smooth-k"]),
                            (dict(softmax_scale=0.3), ["--softmax-scale", 0.3]),
                            (dict(block_q=64, skip_rows=64), ["--block-q", 64]),
                            (dict(block_k=32), ["--block-k", 32]),
                            (dict(cell=8, heads=[dict(h, tau=None, min_mass=0.5) for h in heads]),
                             ["--cell", 8]),
                            (dict(skip_rows=8), ["--skip-rows", 8]), (dict(rules="default"), []),
                            (dict(rules="paper", skip_rows=8), ["--rules", "paper"]),
                            (dict(rules="upstream", sink=True), ["--rules", "upstream", "--sink"])]:
        write("p.json", json.dumps(good | change))
        asked = [
            *(by_mass if "cell" in change else thresholds),
            *([] if "block_q" in change else TUNE[:2]),
            *([] if "block_k" in change else TUNE[2:]), *options
        ]
        want = output(c, *asked)
        check((output(c, "--params", "p.json") == want).all(), "run", change)
        check((output(c, "--params", "p.json", *options) == want).all(), "asked for the same",
              change)
        # The numbers of the picture say nothing of thresholds.
        fine("run", c, "-o", "o.npy", "--mask-out", "m.npy", *asked)
        if "sink" not in options:
            check(sparge("map", c, "--params", "p.json", "-o", "m.png")[0] == FINE, "map", change)
    write("p.json", json.dumps(good | dict(rules="upstream")))
    wrong(FILE, ["p.json", 'rules "upstream"'], "run", c, "--params", "p.json", "--rules",
          "default")
    for value in "", "theirs", 1, None:
        write("p.json", json.dumps(good | dict(rules=value)))
        wrong(FILE, ["p.json", "'rules' must be default, paper or upstream"], "run", c, "--params",
              "p.json")
    write("p.json", json.dumps(good | dict(weights_sha256=3)))
    wrong(FILE, ["p.json", "'weights_sha256'"], "run", c, "--params", "p.json")


def test_params_of_the_authors():
    """A dense head of the authors' keeps every block and has a lambda: under their rules, whatever
    is given beside."""
    c = capture("c.safetensors", 1, n=500, heads=1)
    head = dict(layer=0, head=0, dense=True, theta=-1.0, tau=1.0, topk=None, **{"lambda": -2.0})
    write(
        "p.json",
        json.dumps(
            dict(sparge_params=1, model=None, rules="upstream", block_q=128, block_k=64,
                 skip_rows=128, causal="none", smooth_k=True, sink=True, softmax_scale=None,
                 heads=[head])))
    want = output(c, "--rules", "upstream", "--sink", "--theta", -1, "--tau", 1, "--lambda", -2)
    for more in [], ["--rules", "upstream"], ["--rules", "upstream", "--sink"]:
        x = fine("run", c, "--params", "p.json", "-o", "o.npy", *more)
        check((np.load("o.npy") == want).all() and x["backend"] == "ref" and
              x["sparsity_qk"] == 0 < x["sparsity_pv"], "by their rules", more, x)


def test_params():
    """run --params with thresholds that are for something else, or are none."""
    c = capture("c.safetensors", 1, n=64)
    head = dict(layer=0, head=0, dense=False, theta=0.5, tau=0.9, topk=None)
    head["lambda"] = -3.5
    heads = [head, {**head, "head": 1, "theta": -1}]
    good = dict(sparge_params=1, model=None, block_q=32, block_k=16, skip_rows=32, causal="none",
                smooth_k=True,
                sink=False, softmax_scale=None, heads=heads)
    def with_(**changes):
        return {**good, **changes}
    def run(p, *more):
        write("p.json", p if isinstance(p, (str, bytes)) else json.dumps(p))
        return ["run", c, "--params", "p.json", "-o", "o.npy", *TUNE, *more]
    def bad(words, p, *more):
        wrong(FILE, words, *run(p, *more))
    fine(*run(good))
    want = np.load("o.npy")
    fine("run", c, "-o", "o.npy", *TUNE, "--theta", 0.5, "--tau", 0.9, "--lambda", -3.5)
    check((np.load("o.npy")[:, 0] == want[:, 0]).all(), "thresholds of head 0")
    fine("run", c, "-o", "o.npy", *TUNE, "--theta", -1, "--tau", 0.9, "--lambda", -3.5)
    check((np.load("o.npy")[:, 1] == want[:, 1]).all(), "thresholds of head 1")
    fine(*run(with_(heads=heads[::-1], more="is fine", version=3)))
    check((np.load("o.npy") == want).all(), "in any order, with what is not known")
    fine(*run(with_(heads=[{**h, "tau": None, "topk": 0.25} for h in heads])))
    by_topk = np.load("o.npy")
    fine("run", c, "-o", "o.npy", *TUNE, "--theta", 0.5, "--topk", 0.25, "--lambda", -3.5)
    check((np.load("o.npy")[:, 0] == by_topk[:, 0]).all(), "topk")
    fine(*run(with_(cell=0, heads=[{**h, "min_mass": None} for h in heads])))
    check((np.load("o.npy") == want).all(), "what is off may be left out")
    fine(*run(with_(cell=8, heads=[{**h, "tau": None, "min_mass": 0.5} for h in heads])))
    by_mass = np.load("o.npy")
    fine("run", c, "-o", "o.npy", *TUNE, "--theta", 0.5, "--min-mass", 0.5, "--cell", 8,
         "--lambda", -3.5)
    check((np.load("o.npy")[:, 0] == by_mass[:, 0]).all(), "min_mass")
    wrong(USAGE, "cell is 5, it must divide block_q, 32,", *run(with_(cell=5)))
    os.remove("o.npy")

    text = json.dumps({**good, "heads": [head, {**head, "head": 1}]})
    for size in range(len(text)):
        with open("cut.json", "w") as f:
            f.write(text[:size])
        done = subprocess.run([PROGRAM, "run", c, "--params", "cut.json"], capture_output=True)
        check(done.returncode == FILE and done.stderr.startswith(b"sparge: cut.json: ") and
              done.stderr.count(b"\n") == 1 and not done.stdout, "cut short", size, done)
    os.remove("cut.json")

    fine("run", c, "--params", write("p.json", text), *TUNE)
    for args, words in [(["--block-q", 64], ["block_q 32, not 64"]),
                        (["--block-k", 32], "block_k 16, not 32"),
                        (["--cell", 8], "cell 0, not 8"),
                        (["--skip-rows", 8], "skip_rows 32, not 8"),
                        (["--causal"], 'causal "none", not "end"'),
                        (["--causal=start"], 'causal "none", not "start"'),
                        (["--sink"], "sink false, not true"),
                        (["--no-smooth-k"], "smooth_k true, not false"),
                        (["--softmax-scale", 0.3], "softmax_scale null, not 0.3"),
                        (["--rules", "paper"], 'rules "default", not "paper"'),
                        (["--rules", "upstream"], 'rules "default", not')]:
        bad(["p.json", words] if isinstance(words, str) else words, good, *args)
    fine(*run(with_(softmax_scale=0.3), "--softmax-scale", 0.3))
    fine(*run(with_(skip_rows=8), "--skip-rows", 8))
    fine(*run(good, "--skip-rows", 4000))  # as many as a block has
    for key, values in dict(
            sparge_params=[0, 2, 1.0, "1", None], model=[3, True, []],
            block_q=[0, 1025, 32.0, "32", None, 10**30],
            block_k=[0, 1025, 16.5], skip_rows=[0, 1025, None], causal=["middle", "", 1, None],
            smooth_k=[1, None],
            sink=["false", 0], softmax_scale=[0, -1, 1e-60, 1e39, "1"], heads=[None, {}, 3,
                                                                               "x"]).items():
        for value in values:
            bad(["p.json"] if value == 10**30 else ["p.json", f"'{key}'"], with_(**{key: value}))
        bad(["p.json", f"'{key}'"], {k: v for k, v in good.items() if k != key})
    for key, values in dict(
            layer=[-1, 1 << 31, 0.0, None], head=[-1, 1 << 31, "0"], dense=[0, None],
            theta=[-1.1, 1.1, "0", None],
            tau=[-0.1, 1.1, True, None], topk=[-0.1, 1.5, []],
            **{"lambda": [0.5, -1e31, "-inf", {}]}).items():
        for value in values:
            bad(["p.json", f"'heads[1].{key}'"], with_(heads=[heads[1], {**head, key: value}]))
        bad(["p.json", f"'heads[0].{key}'"],
            with_(heads=[{k: v for k, v in head.items() if k != key}]))
    for value in -1, 1025, 8.0, "8", None:
        bad(["p.json", "'cell'"], with_(cell=value))
    for value in -0.1, 3.5e38, True, "0.5":
        bad(["p.json", "'heads[0].min_mass'"], with_(heads=[{**head, "min_mass": value}]))
    bad(["p.json", "'heads[0].tau' must be a number where topk and min_mass are null"],
        with_(heads=[{**head, "tau": None, "min_mass": 0}]))
    for what in 3, None, [], "x":
        bad(["p.json", "heads[0]."], with_(heads=[what]))
    bad(["p.json", "layer 0 head 1", "twice"], with_(heads=[heads[1], head, heads[1]]))
    bad(["p.json", "no thresholds for layer 0 head 1"], with_(heads=[head]))
    bad(["p.json", "no thresholds for layer 0 head 0"], with_(heads=[]))
    bad(["p.json", "no thresholds for layer 3 head 0"], good, "--layer", 3)
    for text, words in [("", "empty"), ("[]", "no JSON object"), ("3", "line 1"),
                        ("{}", "'sparge_params'"), ("nul", "line 1"),
                        (json.dumps(good) + "x", "line 1"),
                        (json.dumps(good).replace('"sink"', '"sink": true, "sink"'), "line 1"),
                        ("[" * 100000, "line 1"),
                        (json.dumps(good).replace("0.9", "1e999"), "line 1"),
                        (b"\xff\xfe", "line 1"), (json.dumps(good).replace("0.9", "NaN"), "line 1"),
                        (b"\x00" * 50, "line 1"), (read(c, "rb"), "line 1"),
                        ('{"weight_map": {"a": "b.safetensors"}}', "'sparge_params'")]:
        bad(["p.json", words], text)
    with open("p.json", "wb") as f:
        f.truncate(65 << 20)
    wrong(FILE, ["p.json", "too many"], "run", c, "--params", "p.json", *TUNE)
    os.mkfifo("pipe")
    for name, words in ("nowhere.json", "cannot open"), (".", "directory"), ("pipe", "regular"), \
                       ("", "cannot open"):
        wrong(FILE, words, "run", c, "--params", name, *TUNE)
    write("p.json", json.dumps(good))
    for args, words in [(["--theta", 0.6], "--params"), (["--tau", 0.98], "--params"),
                        (["--topk", 1], "--params"), (["--min-mass", 1], "--params"),
                        (["--lambda", "-inf"], "--params"), (["--dense"], ["--dense", "--params"]),
                        (["--layer", -1], "--layer"),
                        (["--layer", "six"], "six"), (["--layer", 1 << 31], "--layer")]:
        wrong(USAGE, words, "run", c, "--params", "p.json", *TUNE, *args)
    three = capture("three.safetensors", 1, heads=3, n=64)
    wrong(FILE, ["layer 0 head 2"], "run", three, "--params", "p.json", *TUNE)


# ---- What goes wrong -------------------------------------------------------------------------

def test_usage():
    qkv = files()[3]
    wrong(USAGE, "command is missing")
    for name, meant in dict(rum="run", dif="diff", maps="map", inof="info", oder="order").items():
        wrong(USAGE, f"did you mean '{meant}'", name)
    wrong(USAGE, "unknown command", "x" * 5000)
    for args, words in [(["--bogus"], "--bogus"), (["--tua", 1], "did you mean --tau"),
                        (["-x"], "unknown option"), (["--t", 1], "several"),
                        (["--sink=1"], "no value"), (["--theta"], "needs a value"),
                        (["-o"], "needs a value"), (["--tau", 1.5], ["--tau", "[0, 1]"]),
                        (["--tau=-0.1"], "[0, 1]"), (["--tau", -1], "[0, 1]"),
                        (["--theta", "nan"], "--theta"), (["--tau", "nan"], "--tau"),
                        (["--topk", "nan"], "--topk"), (["--lambda", "nan"], "--lambda"),
                        (["--lambda", 0.5], "[-inf, 0]"), (["--lambda", "inf"], "--lambda"),
                        (["--theta", 1.01], "[-1, 1]"), (["--topk", 2], "--topk"),
                        (["--min-mass", -0.1], ["--min-mass", "[0, "]),
                        (["--min-mass", "nan"], "--min-mass"),
                        (["--min-mass", "inf"], "--min-mass"),
                        (["--cell", -1], ["--cell", "[0, 1024]"]),
                        (["--cell", 8.5], "whole number"), (["--cell", 1025], "[0, 1024]"),
                        (["--cell", 5], "cell is 5, it must divide block_q, 128, and block_k, 64"),
                        (["--cell", 1, "--block-k", 128], "at least 1/64 of block_k"),
                        (["--softmax-scale", 0], "--softmax-scale"), (["--softmax-scale", -1],
                                                                      "--softmax-scale"),
                        (["--softmax-scale", "inf"], "--softmax-scale"),
                        (["--softmax-scale", "nan"], "--softmax-scale"),
                        (["--softmax-scale", "1e-60"], "--softmax-scale"), (["--tau", "0.5x"],
                                                                            "0.5x"),
                        (["--tau", " 0.5"], "--tau"), (["--tau", ""], "--tau"),
                        (["--block-q", "64.0"], "64.0"), (["--block-q", 0], "[1, 1024]"),
                        (["--block-k", 1025], "[1, 1024]"), (["--block-q", "1e2"], "1e2"),
                        (["--block-k", "99999999999999999999"], "--block-k"),
                        (["--threads", -1], "--threads"),
                        (["--threads", 1025], ["--threads", "[0, 1024]"]),
                        (["--threads", "x"], "--threads"), (["--threads", 70000], "--threads"),
                        (["--skip-rows", -1], "--skip-rows"),
                        (["--causal=middle"], "none, end, start"),
                        (["--rules", "mine"], "default, paper, upstream"),
                        (["--backend", "gpu"], "auto, ref, cpu, cuda"),
                        (["--isa", "sse"], "avx512vnni"), (["--qk-dtype", "int9"],
                                                           "int8, int12, f32, bf16"),
                        (["--pv-dtype", ""], "--pv-dtype"), (["--qk-dtype", "f16"],
                                                             "int8, int12, f32, bf16"),
                        (["--qk-dtype", "fastest"], "int8, int12, f32, bf16"),
                        (["--pv-dtype", "f8"], "int8, int12, f32, bf16, f16, fp8, fastest"),
                        (["--kernel", 0], "[1, 5]"), (["--kernel", 6], "[1, 5]"),
                        (["--kernel", "mma"], "whole number"),
                        (["--kernel", 4], ["kernel is 4", "cuda", "auto"]),
                        (["--kernel", 1, "--backend", "ref"], ["kernel is 1", "cuda", "ref"]),
                        (["--layout", "bhnd"], "hnd, nhd"),
                        (["--dense", "--mask", "q.npy"], ["--dense", "--mask"]),
                        (["more.npy"], "too many"), (["--pv-dtype", "int12", "--block-k", 256],
                                                     "128"),
                        (["--isa", "avx2", "--backend", "ref"], "isa")]:
        wrong(USAGE, words, "run", *qkv, *args)
    wrong(USAGE, "q, k and v", "run")
    wrong(USAGE, "q, k and v", "run", *qkv[:2])
    for n, name in enumerate(qkv):
        wrong(USAGE, [name, "is an input"], "run", *qkv, "-o", name)
        os.symlink(name, f"link{n}")
        wrong(USAGE, "is an input", "run", *qkv, "--lse-out", f"link{n}")
    save("m.npy", np.ones((B, HQ, 3, 6), np.uint8))
    wrong(USAGE, "is an input", "run", *qkv, "--mask", "m.npy", "--mask-out", "./m.npy")
    wrong(USAGE, "is an input", "run", *qkv, "--mask", "m.npy", "--pairs-out", "./m.npy")
    save("p.npy", np.ones((B, HQ, NQ, NK), bool))
    wrong(USAGE, "is an input", "run", *qkv, "--mask-pairs", "p.npy", "--lse-out", "./p.npy")
    wrong(USAGE, "is an input", "map", *qkv, "-o", "new.png", "--pairs-out", "q.npy")
    folder_of("e", 1, [(3, 0)])
    fine("tune", "e", "-o", "p.json", *TUNE)
    given = "e/layer03_0.safetensors", "--params", "p.json"
    os.symlink("e/manifest.json", "m.png")
    for name in "p.json", "e/manifest.json":
        for output in "-o", "--mask-out", "--lse-out":
            keeps(name, USAGE, [name, "is an input"], "run", *given, output, name)
        keeps(name, USAGE, [name, "is an input"], "map", *given, "-o", "new.png", "--map-out", name)
    keeps("e/manifest.json", USAGE, "is an input", "map", given[0], "-o", "m.png")
    wrong(FILE, "already", "run", *qkv, "-o", "same.npy", "--mask-out", "same.npy")
    os.mkdir("d")
    shutil.copy("q.npy", "d/o.npy")
    wrong(USAGE, "is an input", "run", "d/o.npy", *qkv[1:], "--intermediates", "d")
    wrong(USAGE, "--max-l1", "diff", *qkv[:2], "--max-l1", -1)
    wrong(USAGE, "--tolerance", "diff", *qkv[:2], "--tolerance", "nan")
    wrong(USAGE, "two", "diff", "q.npy")
    code, out, err = sparge("run", "--sink", *qkv, "--", )
    check(code == FINE, "options before, and --", err)
    shutil.copy("q.npy", "-q.npy")
    check(sparge("run", "--", "-q.npy", *qkv[1:])[0] == FINE, "a name that begins with -")


def test_files():
    q, k, v, qkv = files()
    data = open("q.npy", "rb").read()
    def bad(name, content):
        with open(name, "wb") as f:
            f.write(content)
        return name
    rest = qkv[1:]
    wrong(FILE, "nowhere.npy", "run", "nowhere.npy", *rest, "-o", "o.npy")
    wrong(FILE, ["./o.npy", "already an output"], "run", *qkv, "-o", "o.npy", "--mask-out",
          "./o.npy")
    wrong(FILE, ["short.npy"], "run", bad("short.npy", data[:-1]), *rest, "-o", "o.npy")
    wrong(FILE, ["magic.npy"], "run", bad("magic.npy", b"XUMPY" + data[5:]), *rest, "-o", "o.npy")
    wrong(FILE, ["empty.npy"], "run", bad("empty.npy", b""), *rest, "-o", "o.npy")
    wrong(FILE, ["head.npy"], "run", bad("head.npy", data[:9]), *rest, "-o", "o.npy")
    os.mkdir("folder")
    wrong(FILE, ["folder", "directory"], "run", "folder", *rest, "-o", "o.npy")
    wrong(FILE, ["q.npy"], "run", "q.npy", "-o", "o.npy")  # one file that is no .safetensors
    wrong(FILE, "empty.npy", "run", "empty.npy", "-o", "o.npy")
    st = open(save_safetensors("x.safetensors", q=("F32", q), k=("F32", k)), "rb").read()
    wrong(FILE, ["x.safetensors", "v"], "run", "x.safetensors", "-o", "o.npy")
    wrong(FILE, "cut.safetensors", "run", bad("cut.safetensors", st[:-3]), "-o", "o.npy")
    wrong(FILE, "cut.safetensors", "run", bad("cut.safetensors", st[:20]), "-o", "o.npy")
    wrong(FILE, ["s.safetensors", "(2, 4, 300, 24)", "(2, 2, 333, 20)"], "run",
          save_safetensors("s.safetensors", q=("F32", q), k=("F32", v), v=("F32", v)))

    shapes = [  # q, k, v, and what has to be said
        ((2, 4, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8), "multiple"),
        ((2, 4, 9, 8), (3, 4, 9, 8), (3, 4, 9, 8), "batch"),
        ((2, 4, 9, 8), (2, 4, 9, 6), (2, 4, 9, 6), "channels"),
        ((2, 4, 9, 8), (4, 9, 8), (4, 9, 8), "axes")]
    for a, b, c, word in shapes:
        names = [save(f"{n}.npy", np.zeros(s, np.float32)) for n, s in zip("qkv", (a, b, c))]
        wrong(FILE, ["q.npy", "k.npy", str(a), str(b), word], "run", *names, "-o", "o.npy")
    for a, b in ((2, 4, 9, 8), (2, 4, 8, 8)), ((2, 4, 9, 8), (2, 2, 9, 8)):
        names = [save(f"{n}.npy", np.zeros(s, np.float32)) for n, s in zip("qkv", (a, a, b))]
        wrong(FILE, ["k.npy", "v.npy", str(a), str(b)], "run", *names, "-o", "o.npy")
    for shape, word in ((8,), "[N,D]"), ((1, 1, 1, 8, 8), "[N,D]"), ((8, 257), "256"), \
                       ((8, 0), "channel"), ((0, 8, 8), "head"), ((), "[N,D]"):
        x = save("x.npy", np.zeros(shape, np.float32))
        wrong(FILE, ["x.npy", word], "run", x, x, x, "-o", "o.npy")
    x = save("x.npy", np.zeros((8, 8), np.int32))
    wrong(FILE, ["x.npy", "i32"], "run", x, x, x, "-o", "o.npy")
    x = save("x.npy", np.zeros((8, 8), np.complex64))
    wrong(FILE, ["x.npy"], "run", x, x, x, "-o", "o.npy")

    files()
    for shape, type_ in ((B, HQ, 3, 5), np.uint8), ((HQ, 3, 6), bool), ((B, HK, 3, 6), bool), \
                        ((B, HQ, 3, 6), np.float32):
        save("m.npy", np.ones(shape, type_))
        wrong(FILE, ["m.npy", f"{(B, HQ, 3, 6)}"], "run", *qkv, "--mask", "m.npy", "-o", "o.npy")
        wrong(FILE, ["m.npy", f"{(B, HQ, NQ, NK)}"], "run", *qkv, "--mask-pairs", "m.npy", "-o",
              "o.npy")
    wrong(FILE, "nowhere.npy", "run", *qkv, "--mask", "nowhere.npy", "-o", "o.npy")
    built = fine("info", "--json")["backends"]
    for name, x in built.items():
        if not x["available"]:
            wrong(UNSUPPORTED, [name, "info"], "run", *qkv, "--backend", name, "-o", "o.npy",
                  "--intermediates", "d")
            wrong(UNSUPPORTED, [name, "info"], "map", *qkv, "--backend", name, "-o", "map.png",
                  "--lambda", -1)
    if not built["cuda"]["available"]:
        wrong(UNSUPPORTED, "cuda", "run", *qkv, "--backend", "cuda", "--kernel", 4, "--pv-dtype",
              "f16")


def test_writing():
    qkv = files()[3]
    outputs = ["-o", "o.npy", "--mask-out", "m.npy", "--lse-out", "l.npy", "--intermediates", "d"]
    wrong(FILE, "nowhere", "run", *qkv, "-o", "nowhere/o.npy", "--intermediates", "d")
    wrong(FILE, "folder", "run", *qkv, "-o", "o.npy", "--intermediates", "nowhere/folder")
    wrong(FILE, "q.npy", "run", *qkv, "-o", "o.npy", "--intermediates", "q.npy")
    os.mkdir("folder")
    wrong(FILE, ["folder", "directory"], "run", *qkv, "-o", "folder", "--mask-out", "m.npy")
    device = full_device()
    if device:
        wrong(FILE, "No space left", "run", *qkv, "-o", device, "--mask-out", "m.npy",
              "--intermediates", "d")
    for limit in 1000, 100000:  # bytes of a file: as a full disk would be
        small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        wrong(FILE, ["d/", ".npy: cannot write", "too large"], "run", *qkv, "--intermediates", "d",
              "--backend", "ref", preexec_fn=small)
        # (the ref backend: clang's OpenMP makes a file of its own when it starts, and ends the
        # program)
        wrong(FILE, "too large", "run", *qkv, *outputs, "--backend", "ref", preexec_fn=small)
    for args in (["run", *qkv, *outputs], ["info"], ["info", "--json"], ["--help"], ["--version"],
                 ["run", "--help"], ["diff", "q.npy", "q.npy"], ["order", 1, 2, 3, "-o", "i.npy"]):
        if device:
            with open(device, "w") as full:
                wrong(FILE, ["standard output", "No space left"], *args, stdout=full)
    wrong(FILE, "standard output", "run", *qkv, *outputs, preexec_fn=lambda: os.close(1))
    for args in ["run", *qkv, *outputs], ["info"]:
        read, write = os.pipe()
        os.close(read)
        wrong(FILE, "standard output", *args, stdout=write, preexec_fn=lambda: signal.signal(
            signal.SIGPIPE, signal.SIG_DFL))
        os.close(write)
    code, _, _ = sparge("run", *qkv, "-o", "o.npy", preexec_fn=lambda: os.close(2))
    check(code == FINE and os.path.exists("o.npy"), "stderr closed")
    code, _, _ = sparge("run", *qkv, "-o", "o2.npy", preexec_fn=lambda: (os.close(0), os.close(2)))
    check(code == FINE and np.load("o2.npy").shape == (B, HQ, NQ, DV), "stdin and stderr closed")
    check(not [n for n in listing() if "tmp" in n], "no temporary file", listing())
    before = open("o.npy", "rb").read()
    code, _, _ = sparge("run", *qkv, "-o", "o.npy", "--tau", 0, "--intermediates", "nowhere/d")
    check(code == FILE and open("o.npy", "rb").read() == before,
          "an old output stays when a run fails")
    fine("run", *qkv, *outputs)
    check(len(os.listdir("d")) == 20 and os.path.exists("l.npy"), "all of them")


def test_memory():
    limit = 150 << 20
    little = lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if sparge("info", preexec_fn=little)[0] != FINE:
        print("skipped: out of memory (a sanitizer takes more)")
        return
    big = save("big.npy", np.zeros((1, 3 << 17, 64), np.float32))
    for args in (["run", big, big, big, "-o", "o.npy"], ["diff", big, big],
                 ["order", 1, 1 << 15, 1 << 15, "-o", "i.npy"],
                 ["bench", "--q-len", 1 << 18, "--dim", 256, "--threads", 1]):
        wrong(MACHINE, "memory", *args, preexec_fn=little)


def test_starved():
    """Every allocation that a command makes fails in turn (starve.c); whole heads that tune has
    written stay."""
    def starve(n, *args):
        return sparge(*args, env={**os.environ, "STARVE": str(n)})
    if starve(0, "info", "--json")[0] == FINE:
        print("skipped: every allocation fails in turn (of sparge_starved)")
        return
    save_safetensors("layer3.safetensors", **{n: ("F32", random(1, 2, 40, 8)) for n in "qkvg"})
    write(
        "manifest.json",
        json.dumps(
            dict(model="m", files=[dict(file="layer3.safetensors", layer=3, query_heads=[0, 1])])))
    tiny = ["--backend", "cpu", "--threads", "1", "--block-q", "16", "--block-k", "16"]
    fine("tune", ".", "-o", "p.json", *tiny)
    x = save("x.npy", random(1, 2, 40, 8))
    fine("run", x, x, x, *tiny, "--mask-out", "m.npy", "-o", "o.npy")
    save("p.npy", np.tril(np.ones((1, 2, 40, 40), bool), 5))
    fine("run", x, x, x, *tiny, "--mask-pairs", "p.npy", "--mask-out", "m.safetensors")
    before = set(listing())
    for args in ([
            "run", "layer3.safetensors", "--params", "p.json", "-o", "out.npy", "--intermediates",
            "d",
            "--check", *tiny
    ], ["run", x, x, x, "--mask", "m.npy", "--lse-out", "out.npy",
            *tiny], ["run", x, x, x, "--mask", "m.safetensors", "--mask-out", "out.safetensors",
                     "--pairs-out", "out.npy", *tiny],
                 ["run", x, x, x, "--method", "window:sink=0", "--density", 0.3, "--pairs-out",
                  "out.npy", "--check", *tiny],
                 ["check", x, x, x, "--o", "o.npy", "--method", "pisa0:block=16", *tiny],
                 ["methods", "--json"],
                 ["diff", x, "o.npy"], ["diff", "m.npy", "m.npy"],
                 ["diff", "m.safetensors", "m.safetensors"],
                 ["check", x, x, x, "--o", "o.npy", "--mask", "m.npy", *tiny
                  ], ["map", "layer3.safetensors", "--params", "p.json", "-o", "out.png",
                      *tiny], ["tune", "layer3.safetensors", "-o", "out.json",
                               *tiny],
                 ["tune", "layer3.safetensors", "--by", "loss", "--method", "submass", "--density",
                  0.9, "-o", "out.json", *tiny], ["order", 1, 4, 4, "-o", "out.npy"],
                 ["info", "--json"],
                 ["bench", "--json", "--q-len", 16, "--repeat", 1, "--threads", 1]):
        code, n = MACHINE, 0
        while code == MACHINE:
            code, out, err = starve(n, *args)
            left = set(listing()) - before
            if code == MACHINE:
                check(
                    err.startswith("sparge: ") and err.count("\n") == 1 and
                    (out == "" or out.endswith(("}\n", "]\n"))), args, n,
                    "one line, and nothing by halves", out, err)
                check(left <= {"./out.json"}, args, n, "no file left", left)
            n += 1 if os.environ.get("SPARGE_EXHAUSTIVE") else 1 + n // 8
            for name in left:
                shutil.rmtree(name) if os.path.isdir(
                    name) else os.path.exists(name) and os.remove(name)
        check(
            code in (FINE, DIFFERENT) and n > 3 and
            starve(-1, *args)[1].count(",") == out.count(","), args, n,
            "when the last has failed it works", code, out, err)
        for name in set(listing()) - before:
            shutil.rmtree(name) if os.path.isdir(name) else os.path.exists(name) and os.remove(name)


def test_threads_that_cannot_start():
    """Of a user that may have two processes, whom root has to become: of root none are refused."""
    x = save("x.npy", random(1, 2, 300, 16))
    qkv = save_safetensors("qkv.safetensors",
                           **{name: ("F32", random(1, 2, 300, 16)) for name in "qkv"})
    os.chmod(".", 0o777)

    def limited():
        resource.setrlimit(resource.RLIMIT_NPROC, (2, 2))
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(54321)
            os.setuid(54321)

    for args in ["run", x, x, x], ["map", x, x, "-o", "/dev/null/x.png"], ["tune", qkv, "-o",
                                                                           "p.json"], \
            ["bench", "--q-len", 64]:
        wrong(MACHINE, ["threads is 7", "start"], *args, "--threads", 7, preexec_fn=limited)
    no_leaks = {**os.environ, "ASAN_OPTIONS":
                "detect_leaks=0"}  # looking for them takes a process more
    fine("run", x, x, x, "--threads", 2 if os.getuid() == 0 else 1, preexec_fn=limited,
         env=no_leaks)


def test_signals_and_progress():
    """A picture that takes minutes on any machine: watched on a terminal, and then interrupted."""
    x = save("x.npy", random(1, 8, 1 << 15, 32))
    code, seen, after, last = watched([PROGRAM, "map", x, x, "-o", "map.png"])
    check(" %, " in seen and "s left" in seen, "progress on a terminal", seen[:100])
    check(after > 1.9, "not in the first two seconds", after)
    check(code == UNFINISHED and last.endswith(INTERRUPTED.replace("\n", "\r\n")), "ends", code,
          last)
    check(listing() == ["./x.npy"], "interrupted: no file left", listing())


INTERRUPTED = "sparge: interrupted; give the same command again\n"


def opened(_):
    """For `stopped`: an output is being written."""
    return any(".tmp" in name for name in listing())


def test_interrupted():
    """What is long for any machine ends at once, with one line, and leaves nothing."""
    long, longer = save("long.npy", np.zeros((1 << 14, 64),
                                             np.float16)), save("longer.npy",
                                                                np.zeros((1 << 18, 64), "f2"))
    before = listing()
    for begun, args in ((opened, [
            "run", long, long, long, "-o", "o.npy", "--intermediates", "d", "--backend", "ref"
    ]), (opened,
         ["run", longer, longer, longer, "-o", "o.npy", "--dense", "--threads",
          1]), (lambda child: child.stdout.readline().startswith(b"case"),
                ["bench", "--q-len", "64,32768", "--heads", 2, "--threads", 1, "--repeat", 100])):
        for number in signal.SIGINT, signal.SIGTERM:
            code, out, err = stopped([PROGRAM, *args], number, begun)
            check(code == UNFINISHED and err == INTERRUPTED, args, number, "one line", code, err)
            check("32768" not in out, args, number, "on the way", out)
            check(listing() == before, args, number, "no file left", listing())


def test_ignored_signals():
    """nohup, and shells for background jobs, have them ignored: they stay so."""
    x = np.zeros((1, 1 << 16, 64), np.float16)
    long = save("long.npy", x)
    save_safetensors("qkv.safetensors", q=("F16", x), k=("F16", x), v=("F16", x))
    for args in ["run", long, long, long, "-o",
                 "o.npy"], ["tune", "qkv.safetensors", "-o", "p.json"]:
        for number in signal.SIGINT, signal.SIGTERM:
            seen = []
            stopped([PROGRAM, *args], signal.SIGKILL,
                    lambda child: opened(child) and not seen.append(ignored(child)),
                    preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
            check(seen == [[number]], args, number, "stays ignored", seen)


def test_locale():
    """A comma for a point must not come from the user's locale, which is made here."""
    qkv = files()[3]
    subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", "./de_DE.UTF-8"], check=True)
    german = {**os.environ, "LOCPATH": os.getcwd(), "LC_ALL": "de_DE.UTF-8"}
    comma = subprocess.run([
        sys.executable, "-c", "import locale; locale.setlocale(locale.LC_ALL, ''); "
        "print(locale.localeconv()['decimal_point'])"
    ], env=german, capture_output=True).stdout
    check(comma == b",\n", "there is such a locale", comma)
    x = fine("run", *qkv, "--tau", "0.5", env=german)
    check(isinstance(x.get("sparsity"), float), "numbers have a point", x)


# The cache of fontconfig is never freed, which a build with AddressSanitizer would complain of.
suppressions = tempfile.NamedTemporaryFile("w", suffix=".supp")
suppressions.write("leak:libfontconfig\n")
suppressions.flush()
os.environ["LSAN_OPTIONS"] = f"suppressions={suppressions.name}:print_suppressions=0"

run_tests(globals(), sys.argv[2:], "sparge-program-")
