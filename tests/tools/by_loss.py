# SPDX-License-Identifier: Apache-2.0
"""sparge tune --by loss as a user runs it: python3 by_loss.py PATH-OF-SPARGE

What its file says of heads is compared with whole calls of the program, and what it chose with the
curves in the file, weighed here.
"""
import json
import os
import re
import shutil
import signal
import sys

import numpy as np

sys.path.append(os.path.join(os.path.dirname(__file__), "../support"))
from counted import check, run_tests
from running import (FILE, FINE, UNFINISHED, UNSUPPORTED, USAGE, commands_of, explained, read,
                     save_safetensors, stopped, write)

PROGRAM = os.path.abspath(sys.argv[1])
sparge, fine, wrong, keeps = commands_of(PROGRAM, "sparge")

BLOCKS = ["--block-q", 32, "--block-k", 16]
EXACT = ["--dense", "--qk-dtype", "f32", "--pv-dtype", "f32"]
LAYERS, HEADS, TOKENS = 2, 3, 256
REPORT = ("params method heads nonfinite density loss judged held_out_density held_out_loss "
          "dense_passes seconds").split()
HEADER = ("sparge_params version model weights_sha256 rules qk_dtype pv_dtype block_q block_k cell "
          "skip_rows causal smooth_k sink softmax_scale by method params density loss inputs "
          "values curves heads").split()
HEAD = ("layer head dense theta tau topk min_mass lambda finite in_sample held_out "
        "dense_passes").split()
SUBMASS, SPARGEATTN = ["--method", "submass"], ["--method", "spargeattn:theta=-1,sink=1"]


def tensors_of(seed, tokens=TOKENS):
    """Keys that matter stand in runs; heads whose error matters much, and little."""
    draw = np.random.default_rng(seed)
    q, k, v, g = (draw.normal(size=(1, heads, tokens, 16)).astype(np.float32)
                  for heads in (HEADS, 1, 1, HEADS))
    centre = np.repeat(draw.normal(size=(1, 1, tokens // 32, 16)), 32, axis=2)
    q[:, 1:] += 2 * centre
    k += (1.5 * centre).astype(np.float32)
    g *= np.array([0.1, 1, 10], np.float32)[:, None, None] * 0.01
    return dict(q=q, k=k, v=v, g=g.astype(np.float16).astype(np.float32))


def texts(*names):
    """A folder of captures for each: a file and a line of the manifest for each layer."""
    for name in names:
        os.mkdir(name)
        for layer in range(LAYERS):
            write_capture(f"{name}/layer{layer}.safetensors",
                          tensors_of([ord(name), layer], TOKENS + 32 * (name == "c")))
        manifest = [dict(file=f"layer{layer}.safetensors", layer=layer,
                         query_heads=list(range(HEADS))) for layer in range(LAYERS)]
        write(f"{name}/manifest.json", json.dumps(dict(model="small", sample=name, causal=True,
                                                       files=manifest)))


def write_capture(name, x):
    return save_safetensors(name, **{key: ("F32", t) for key, t in x.items()})


def tune(*args, out="p.json", **how):
    x = fine("tune", *args, "--by", "loss", "-o", out, *BLOCKS, **how)
    return x, json.loads(read(out))


def timeless(text):
    return re.sub(r', "seconds": [^}]*', "", text)


def curve_lines(name="p.json"):
    return [line for line in read(name).splitlines() if '"density": [' in line]


def worth_of(params, name, layer):
    """Of each head, by the definition: mean over queries of (g . (o' - o))^2 / 2, and its
    density."""
    file = f"{name}/layer{layer}.safetensors"
    x = fine("run", file, "--params", params, "-o", "o.npy")
    fine("run", file, *EXACT, "-o", "dense.npy", *BLOCKS)
    g = tensors_of([ord(name), layer], TOKENS + 32 * (name == "c"))["g"]
    change = np.load("o.npy").astype(np.float64) - np.load("dense.npy").astype(np.float64)
    return (((g * change).sum(-1)**2).mean(-1) / 2)[0], np.array(x["density_tokens_per_head"])


def chosen_well(p, density):
    """What one price buys on both sides of this density, by the curves in the file, monotone and
    drawn halfway to their mean."""
    curve = np.array([c["loss"] for c in p["curves"]])
    drawn = np.sqrt(np.maximum.accumulate(curve[:, ::-1], 1)[:, ::-1])
    drawn *= np.sqrt((drawn**2).mean(0))
    dense = np.maximum.accumulate(np.array([c["density"] for c in p["curves"]]), 1)
    fine_grid = np.linspace(0, len(p["values"]) - 1, 2001)
    at = np.arange(len(p["values"]))
    cost = np.array([np.exp(np.interp(fine_grid, at, np.log(f))) for f in drawn])
    dense = np.array([np.interp(fine_grid, at, d) for d in dense])
    def picked(price):
        return (cost + price * dense).argmin(1)
    low, high = 1e-30, 1e30
    for _ in range(300):
        price = np.sqrt(low * high)
        mean = np.take_along_axis(dense, picked(price)[:, None], 1).mean()
        low, high = (price, high) if mean > density else (low, price)
    values = np.exp(np.interp(fine_grid, at, np.log(p["values"])))
    return values[picked(low)], values[picked(high)]


def test_by_loss():
    texts("a", "b", "c")
    x, p = tune("a", "b", "--held-out", "c", *SUBMASS, "--density", 0.5)
    check(list(x) == REPORT and list(p) == HEADER, "keys in their order", list(x), list(p))
    check(p["by"] == "loss" and p["method"] == "submass" and p["params"] == {"cell": 8} and
          p["density"] == 0.5 and p["loss"] is None and p["cell"] == 8 and p["sink"] is True and
          p["causal"] == "end" and p["block_q"] == 32 and p["model"] == "small", "header", p)
    check([(i["layer"], i["sample"], i["held_out"]) for i in p["inputs"]] ==
          [(layer, name, name == "c") for layer in range(LAYERS) for name in "abc"], "inputs", p)
    places = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    for lines in p["curves"], p["heads"]:
        check([(h["layer"], h["head"]) for h in lines] == places, "heads in order", lines)
    check(len(p["values"]) == 11 and sorted(p["values"])[::-1] == p["values"], "values", p)
    loss, density = np.zeros((2, 6)), np.zeros((2, 6))
    for name in "abc":
        for layer in range(LAYERS):
            f, d = worth_of("p.json", name, layer)
            held, at = name == "c", slice(layer * HEADS, (layer + 1) * HEADS)
            loss[int(held), at] += f if held else f / 2
            density[int(held), at] += d if held else d / 2
    for n, h in enumerate(p["heads"]):
        check(list(h) == HEAD and h["theta"] == -1 and h["tau"] is h["topk"] is h["lambda"] is None
              and h["dense"] is False and h["finite"] is True, "a head", h)
        for held, key in enumerate(("in_sample", "held_out")):
            check(h[key]["inputs"] == 2 - held and
                  abs(h[key]["loss"] / loss[held, n] - 1) < 1e-5 and
                  abs(h[key]["density"] - density[held, n]) < 2e-6, key, h, loss, density)
    check(abs(x["loss"] / loss[0].sum() - 1) < 1e-5 and
          abs(x["held_out_loss"] / loss[1].sum() - 1) < 1e-5 and
          abs(x["density"] - density[0].mean()) < 2e-6 and
          abs(x["held_out_density"] - density[1].mean()) < 2e-6, "sums", x)
    check(x["heads"] == x["judged"] == 6 and x["nonfinite"] == 0, "counts", x)
    check(abs(x["density"] - 0.5) < 0.06, "the density that was asked for", x)
    passes = p["curves"][0]["dense_passes"]
    check(1 < passes <= 9 and abs(x["dense_passes"] - np.mean(
        [c["dense_passes"] + h["dense_passes"] for c, h in zip(p["curves"], p["heads"])])) < 1e-3,
          "dense passes", x, passes)
    low, high = chosen_well(p, 0.5)
    got = np.array([h["min_mass"] for h in p["heads"]])
    apart = (got < np.minimum(low, high) * 0.99) | (got > np.maximum(low, high) * 1.01)
    check(apart.sum() == 0, "one price for all", got, low, high)
    check(got.max() > 2 * got.min(), "heads are apart", got)


def test_another_goal():
    """What was measured serves any goal; the file is then as if nothing had been there."""
    texts("a", "b")
    tune("a", "--held-out", "b", *SUBMASS, "--density", 0.5)
    before = curve_lines()
    shutil.copy("p.json", "half.json")
    x, p = tune("a", "--held-out", "b", *SUBMASS, "--density", 0.35)
    check(curve_lines() == before and p["density"] == 0.35, "curves stay", p)
    tune("a", "--held-out", "b", *SUBMASS, "--density", 0.35, out="new.json")
    check(timeless(read("p.json")) == timeless(read("new.json")), "as a new file")
    tune("a", "--held-out", "b", *SUBMASS, "--density", 0.5, "--threads", 1)
    check(read("p.json") == read("half.json"), "and back, by one thread")
    tune("a", *SUBMASS, "--density", 0.5, out="alone.json")
    check(list(map(timeless, curve_lines("alone.json"))) == list(map(timeless, before)),
          "what is held out is not tuned on")
    loss = x["loss"] * 1.1
    y, p = tune("a", "--held-out", "b", *SUBMASS, "--loss", loss)
    check(p["loss"] and p["density"] is None and y["density"] < x["density"] and
          0.8 < y["loss"] / loss < 1.25, "--loss", y, loss)
    keeps("p.json", FILE, "other captures or other options", "tune", "a", "--by", "loss", *SUBMASS,
          "--loss", loss, "-o", "p.json", *BLOCKS)
    keeps("p.json", FILE, "other captures or other options", "tune", "a", "--held-out", "b", "--by",
          "loss", "--method", "submass:cell=16", "--loss", loss, "-o", "p.json", *BLOCKS)


def test_types():
    """g in float16, and tokens before heads."""
    texts("a")
    tune("a", *SUBMASS, "--density", 0.5)
    before, nhd = list(map(timeless, curve_lines())), ["--layout", "nhd"]
    for layer in range(LAYERS):
        x = tensors_of([ord("a"), layer])
        save_safetensors(f"a/layer{layer}.safetensors", **{
            key: ("F16" if key == "g" else "F32", t.transpose(0, 2, 1, 3))
            for key, t in x.items()})
    tune("a", *SUBMASS, "--density", 0.5, *nhd, out="q.json")
    check(list(map(timeless, curve_lines("q.json"))) == before, "the same curves")


def test_spargeattn():
    texts("a")
    x, p = tune("a", *SPARGEATTN, "--density", 0.42)
    check(p["method"] == "spargeattn" and p["sink"] is True and p["cell"] == 0 and
          list(p["params"]) == ["theta", "topk", "lambda", "sink"], "header", p)
    check(all(h["theta"] == -1 and 0 < h["tau"] < 1 and h["min_mass"] is None and
              h["held_out"] is None for h in p["heads"]), "thresholds", p["heads"])
    check(x["judged"] == 0 and x["held_out_loss"] is x["held_out_density"] is None, "not judged", x)
    for layer in range(LAYERS):
        f, d = worth_of("p.json", "a", layer)
        for n in range(HEADS):
            h = p["heads"][layer * HEADS + n]["in_sample"]
            check(abs(h["loss"] / f[n] - 1) < 1e-5 and abs(h["density"] - d[n]) < 2e-6, "a head", h)
    fine("tune", "a", "--by", "loss", "--sink", "--density", 0.525, "-o", "q.json", *BLOCKS)
    q = json.loads(read("q.json"))
    check(q["method"] == "spargeattn" and q["sink"] is True and q["params"]["theta"] == 0.6,
          "without --method", q)


def test_again():
    """An interrupted command goes on, and ends as if nothing had happened."""
    texts("a", "b")
    args = ["tune", "a", "--held-out", "b", "--by", "loss", *SUBMASS, "--density", 0.5, "-o",
            "p.json", *BLOCKS]
    fine(*args)
    whole = read("p.json")
    os.remove("p.json")
    code, out, err = sparge(*args, "--seconds", 1e-9)
    check(code == UNFINISHED and out == "" and err == "sparge: p.json: the time is up: it has "
          "curves of 0 of 6 heads; the same command goes on\n", "--seconds", code, err)
    cut = json.loads(whole)
    cut["curves"], cut["heads"] = cut["curves"][3:], []
    write("p.json", json.dumps(cut))
    fine(*args)
    check(timeless(read("p.json")) == timeless(whole), "curves of a layer lacked")
    cut = json.loads(whole)
    cut["heads"] = cut["heads"][:3]
    write("p.json", json.dumps(cut))
    code, out, err = sparge(*args, "--seconds", 1e-9)
    check(code == UNFINISHED and "it has 3 of 6 heads" in err, "heads lacked", code, err)
    fine(*args)
    check(timeless(read("p.json")) == timeless(whole), "heads of a layer lacked")
    os.remove("p.json")
    code, out, err = stopped([PROGRAM, *args], signal.SIGINT, lambda _: os.path.exists("p.json"))
    check(code in (FINE, UNFINISHED) and json.loads(read("p.json"))["curves"], "stopped", code, err)
    fine(*args)
    check(timeless(read("p.json")) == timeless(whole), "the same in the end")


def test_nonfinite():
    """A head that is not finite stays at its densest, and is said."""
    texts("a")
    x = tensors_of([ord("a"), 1])
    x["q"][0, 1, 5, 3] = np.inf
    write_capture("a/layer1.safetensors", x)
    got, p = tune("a", *SUBMASS, "--density", 0.5, says=["layer 1 head 1", "not finite", "t 0.02"])
    odd = p["heads"][4]
    check(got["nonfinite"] == 1 and odd["finite"] is False and odd["in_sample"]["loss"] is None and
          abs(odd["min_mass"] / p["values"][-1] - 1) < 1e-6 and got["loss"] > 0, "at its densest",
          odd, got)
    x["g"][0, 0, 7, 1] = np.nan
    write_capture("a/layer1.safetensors", x)
    wrong(FILE, ["g has 1 element"], "tune", "a/layer1.safetensors", "--by", "loss", *SUBMASS,
          "--density", 0.5, "-o", "q.json", *BLOCKS)


def test_refused():
    texts("a")
    bare = tensors_of(7)
    del bare["g"]
    os.mkdir("bare")
    write_capture("bare/layer0.safetensors", bare)
    loss = ["tune", "a", "-o", "p.json", "--by", "loss"]
    for args, words in [([], "needs what to reach: --density or --loss"),
                        (["--density", 0.5, "--loss", 1], ["--density", "leave out --loss"]),
                        (["--density", 0.5, "--l1", 0.05], ["--by", "leave out --l1"]),
                        (["--density", 0.5, "--sparsity", 0.5], "leave out --sparsity"),
                        (["--density", 0.5, "--bound", "mean"], "leave out --bound"),
                        (["--density", 0.5, "--cell", 8], "--method submass"),
                        (["--density", 0.5, "--tau", 0.9], "what is tuned"),
                        (["--density", 0.5, *SUBMASS, "--sink"], "parameters of its own"),
                        (["--density", 0], "--density"), (["--density", 1.1], "--density"),
                        (["--loss", 0], "--loss"), (["--loss", "nan"], "--loss"),
                        (["--density", 0.5, "--method", "submass:t=1"], "finds t of submass"),
                        (["--density", 0.5, "--method", "dense"], "no parameter"),
                        (["--density", 0.5, "--method", "submas"], "submass"),
                        (["--density", 0.01, *SUBMASS, *BLOCKS], "density 0.01 cannot be reached")]:
        if words != "density 0.01 cannot be reached":
            wrong(USAGE, words, *loss, *args)
            continue
        code, out, err = sparge(*loss, *args)  # the curves are kept
        check(code == USAGE and out == "" and words in err and
              len(json.loads(read("p.json"))["curves"]) == 6, args, code, err)
        os.remove("p.json")
    for args in ["--density", 0.5], ["--loss", 0.5], SUBMASS:
        wrong(USAGE, "are for --by loss", "tune", "a", "-o", "p.json", *args)
    wrong(FILE, ["bare/layer0.safetensors", "'g'"], "tune", "bare/layer0.safetensors", "--layer", 0,
          "--by", "loss", *SUBMASS, "--density", 0.5, "-o", "p.json", *BLOCKS)
    wrong(UNSUPPORTED, ["xattention", "no thresholds that a file"], *loss, "--method",
          "xattention", "--density", 0.5)


def test_explained():
    texts("a")
    x, p = tune("a", *SUBMASS, "--density", 0.5)
    explained("sparge tune", x)
    explained("sparge tune", {key: None for key in [*p, *p["curves"][0], *p["heads"][0]]})


run_tests(globals(), sys.argv[2:], "sparge-by-loss-")
