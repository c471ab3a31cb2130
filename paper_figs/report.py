#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes report.html: for every table and figure the paper's values beside ours, the bands that
were set beforehand and whether they hold, and what is missing. One file that needs no other; out of
experiments/*/out.csv, paper.csv, bands.csv and the figures here. Shares are in %, differences of
shares in points, anything that is measured in three digits."""
import base64
import json
import math
import statistics
from collections import defaultdict
from functools import partial
from html import escape

# first: it finds experiments/
from rows import EXPERIMENTS, HERE, column, grouped, of_item, read_csv
from errors import number, worst
from harness import run_main, write_text
from items import CAPTIONS, ITEMS, MISSING

WIDE = {"attention_map", "fig2", "fig3", "fig4", "fig9", "frontier", "submass"}  # of several panels
MAIN, DENSE = "SpargeAttn, (0.08, 0.09)", "dense, f32"
ONE_T, BY_LOSS = "submass, one t", "submass, t by loss"


# ---- Reading ----------------------------------------------------------------------------------

class NotThere(Exception):
    """There are no such rows yet."""


def is_there(item):
    return (EXPERIMENTS / item / "out.csv").exists()


def rows(item, **where):
    """Rows of an out.csv in which these columns have these values."""
    found = [r for r in of_item(item)
             if all(r[k] == str(v) for k, v in where.items())] if is_there(item) else []
    if not found:
        raise NotThere
    return found


def mean(found, key):
    return statistics.mean(column(found, key))


PAPER = read_csv(EXPERIMENTS / "paper.csv")
SHARES = {"sparsity", "NIAH"}  # of the columns of paper.csv, where no unit is given


def scale(row):
    """Of a number of the paper."""
    return 100 if row["column"] in SHARES and not row["unit"] else 1


def paper(item, row, key, setting=""):
    """A number of the paper; NaN where it has none."""
    return next(
        (scale(r) * float(r["value"])
         for r in PAPER if (r["item"], r["row"], r["column"]) == (item, str(row),
                                                                  key) and setting in r["setting"]),
        math.nan)


def digits(x):
    """A figure in three digits; nothing where it is not known."""
    x = float(f"{x:.3g}") + 0.0  # no -0
    return "" if math.isnan(x) else f"{x:.0f}" if abs(x) >= 100 else f"{x:g}"


# ---- What the bands are about: shares are fractions here ---------------------------------------

def lm(attention, tokens, key):
    return float(rows("table1", attention=attention, tokens=tokens)[0][key])


def lost(attention, tokens=4096):
    """Change of perplexity against dense f32."""
    return lm(attention, tokens, "perplexity") / lm(DENSE, tokens, "perplexity") - 1


def needles(attention):
    """The share found less that of dense f32."""
    return statistics.mean(
        lm(attention, n, "needles") - lm(DENSE, n, "needles") for n in (1024, 2048, 4096))


def faster(tokens, key="seconds_attention"):
    return lm(DENSE, tokens, key) / lm(MAIN, tokens, key)


def overhead(tokens):
    return max(column(rows("table3", tokens=tokens), "overhead_f32"))


def efficiency(mask):
    return min(
        float(r["efficiency"]) for r in rows("fig10", mask=mask)
        if 0.05 < float(r["sparsity"]) < 0.65)


def part(name):
    return float(rows("table6", inputs="model", part=name)[0]["sparsity"])


def texts():
    return [column(found, "sparsity")
            for (text,), found in grouped(rows("table7"), "text").items() if text != "committed"]


MODEL, MOVING, STILL = {"source": "whole"}, *({"source": "patches", "sample": clip}
                                              for clip in ("cup", "vtest"))


def orders(key, of=MODEL):
    found = rows("table9", thresholds="tuned", judge="on", **of)
    return {order: mean(found, key) for (order,), found in grouped(found, "order").items()}


def hilbert_ahead(key, of=MODEL):
    found = orders(key, of)
    return found.pop("hilbert") - max(found.values())


def judged(thresholds, filtered=False):
    """Pairs of rows, with the judge and without; of the cases that differ, or all."""
    pairs = grouped(rows("table9", thresholds=thresholds, **MODEL), "sample", "layer", "step",
                    "order", "head").values()
    apart = (abs(on - off) for on, off in (column(pair, "l1") for pair in pairs))
    return [pair for pair, x in zip(pairs, apart) if not filtered or not x <= 0.05]


def judge_gains(key, thresholds, filtered=False):
    """The mean with the judge less that without."""
    found = judged(thresholds, filtered)
    return statistics.mean(on - off for on, off in (column(pair, key)
                                                    for pair in found)) if found else math.nan


def layers(key):
    found = grouped(rows("fig14", source="whole"), key)
    return [
        mean(found[name, ], "sparsity")
        for name in sorted((name for name, in found), key=lambda x: (len(x), x))
    ]


def spread_of_heads():
    heads = grouped(rows("fig14", source="whole"), "layer", "head")
    of_layer = defaultdict(list)
    for (layer, _), found in heads.items():
        of_layer[layer].append(mean(found, "sparsity"))
    return max(max(x) - min(x) for x in of_layer.values())


def tuned(l2, key):
    return column(rows("tune", l2=l2), key)


def submass(rule, wanted, tokens=4096, blocks="128x64"):
    """Without lambda."""
    return rows("submass", **{"rule": rule, "wanted": wanted, "blocks": blocks, "lambda": "",
                              "tokens": tokens})[0]


def lost_by(rule, blocks, wanted):
    return float(submass(rule, wanted, blocks=blocks)["change"])


def lost_at_worst(rule, blocks, wanted):
    return max(number(x) for key, x in submass(rule, wanted, blocks=blocks).items()
               if key.startswith("change_"))


def needles_kept():
    """Of one threshold at half density, less those of dense f32, as share."""
    return statistics.mean(
        number(submass(ONE_T, "0.5", n)["needles"]) - number(submass(DENSE, "", n)["needles"])
        for n in (1024, 2048, 4096))


def density_missed():
    return max(abs(number(x) - number(row["wanted"]))
               for row in rows("submass", rule=BY_LOSS, tokens=4096)
               for key, x in row.items() if key.startswith("density_"))


MEASURED = {  # by item and the place of the band in bands.csv
    "attention_map": [lambda: worst(column(rows("attention_map", attention="chosen"), "l1"))],
    "tune": [lambda: worst(tuned("0.09", "l1_out")),
             lambda: statistics.mean(tuned("0.09", "sparsity")) -
             statistics.mean(tuned("0.035", "sparsity"))],
    "table1": [lambda: lost(MAIN), lambda: lost("SpargeAttn, (0.03, 0.035)"), lambda: needles(MAIN),
               lambda: needles("SpargeAttn, (0.05, 0.06)"),
               lambda: faster(8192)],
    "table3": [lambda: overhead(8192), lambda: overhead(32768), lambda: overhead(131072)],
    "fig10": [lambda: efficiency("random"), lambda: efficiency("banded"),
              lambda: efficiency("predicted")],
    "table6": [lambda: part("both") - part("mask"), lambda: part("lambda")],
    "table7": [lambda: min(b - a for found in texts() for a, b in zip(found, found[1:])),
               lambda: statistics.mean(found[-1] for found in texts())],
    "table9": [lambda: hilbert_ahead("sparsity"), lambda: hilbert_ahead("k_sim"),
               lambda: orders("k_sim")["random"],
               lambda: orders("sparsity")["random"] / orders("sparsity")["row"],
               lambda: judge_gains("l1", "tuned"),
               lambda: judge_gains("l1", "tuned", filtered=True),
               lambda: -judge_gains("sparsity", "tuned"),
               lambda: judge_gains("l1", "alike", filtered=True),
               lambda: len(judged("alike", filtered=True)) / len(judged("alike")),
               lambda: hilbert_ahead("sparsity", MOVING)],
    "fig9": [lambda: lm(DENSE, 4096, "needles")],
    "fig14": [lambda: max(layers("layer")) / min(layers("layer")),
              lambda: layers("step")[-1] - layers("step")[0],
              lambda: max(abs(x - statistics.mean(layers("sample"))) for x in layers("sample")),
              spread_of_heads],
    "submass": [*(partial(what, rule, blocks, wanted) for rule, blocks in (
        (ONE_T, "128x64"), (BY_LOSS, "128x64"), (BY_LOSS, "64x16"))
                  for what in (lost_by, lost_at_worst) for wanted in ("0.5", "0.3")),
                needles_kept, lambda: number(submass(ONE_T, "0.5", 8192)["speed"]), density_missed],
}


def ends(band):
    """What a band lets through. An end that was not set beforehand, of what the paper has a value
    of, is half or twice that: the farther of the two on its side, of the paper's least and
    largest."""
    near = [factor * float(x) for x in band["paper"].split() for factor in (0.5, 2)]
    return (float(band["low"] or
                  min(near, default=-math.inf)), float(band["high"] or max(near, default=math.inf)))


def checks():
    """{item: [(band, what was measured or None, whether it holds or None)]}"""
    found = defaultdict(list)
    for band in read_csv(EXPERIMENTS / "bands.csv"):
        item = band["item"]
        try:
            value = float(MEASURED[item][len(
                found[item])]()) * (100 if band["unit"] in ("%", "points") else 1)
        except NotThere:
            value = math.nan
        known = not math.isnan(value)
        low, high = ends(band)
        holds = known and low <= value <= high
        found[item].append((band, value if known else None, holds if known else None))
    return found


# ---- The paper beside ours --------------------------------------------------------------------

def beside_table1():
    lengths = 8192, 4096

    def line(what, theirs, ours):
        return [what, theirs, *map(ours, lengths)]

    def theirs(row, key):
        return paper("table1", row, key, "Llama3.1")

    def by(row, attention, key, our_key, factor=1):
        return theirs(row, key), lambda n: factor * lm(attention, n, our_key)

    prefill = [paper("table2", "Llama3.1 (128K), L40", name) for name in ("Original", "SpargeAttn")]
    both = [("dense", "Full", DENSE), ("SpargeAttn", "SpargeAttn", MAIN)]
    lines = [
        line("sparsity, %", *by("SpargeAttn", MAIN, "sparsity", "sparsity", 100)),
        line("speed of attention divided by dense, times",
             theirs("SpargeAttn", "speed") / theirs("Full", "speed"), faster),
        line("time of a prefill, dense divided by SpargeAttn, times", prefill[0] / prefill[1],
             lambda n: faster(n, "seconds_prefill")),
        line(
            "perplexity, change against dense, %", 100 *
            (theirs("SpargeAttn", "WikiText perplexity") / theirs("Full", "WikiText perplexity") -
             1), lambda n: 100 * lost(MAIN, n))
    ]
    for what, key, our_key, factor in (("perplexity", "WikiText perplexity", "perplexity", 1),
                                       ("needles found, %", "NIAH", "needles", 100),
                                       ("speed, TOPS", "speed", "gops", 1e-3)):
        lines += [
            line(f"{what}: {name}", *by(row, attention, key, our_key, factor))
            for name, row, attention in both
        ]
    return ["the paper: Llama3.1-8B, 128K", *(f"ours: {n} tokens" for n in lengths)], lines


def beside_table3():
    found = grouped(rows("table3"), "tokens", "inputs")
    tokens = list(dict.fromkeys(n for n, _ in found))
    return [
        "the paper: of FlashAttention-2, RTX 4090",
        *(f"ours: of dense f32, {x}" for x in ("normal", "topics"))
    ], [[
        f"overhead at {n} tokens, %",
        paper("table3", n, "overhead"), *(100 * mean(found[n, x], "overhead_f32")
                                          for x in ("normal", "topics"))
    ] for n in tokens]


def beside_fig10():
    kernels = {"SpargeAttn+Sage": "SageAttn (dense)", "SpargeAttn+FA2": "FlashAttn (dense FA2)"}
    found = grouped(rows("fig10"), "mask", "asked")
    masks = "random", "banded", "predicted"

    def ours(mask, share):
        return mean([{"x": float(r["ms_dense_int8"]) / float(r["ms"])}
                     for r in found[mask, share]], "x") if (mask, share) in found else math.nan

    shares = sorted({share for mask, share in found if mask in masks})
    return ["the paper: Sage", "the paper: FA2", *(f"ours: {mask}" for mask in masks)], [[
        f"times dense, {100 * float(share):.0f} % sparse",
        *(paper("fig10", name, share, "RTX4090") / paper("fig10", dense, "0")
          for name, dense in kernels.items()), *(ours(mask, share) for mask in masks)
    ] for share in shares]


def beside_table6():
    parts = {"mask": "mask alone", "lambda": "lambda alone", "both": "both"}
    return ["the paper: Llama3.1, 128K", "ours: whole model, 8192", "ours: nine heads, 4096"], [[
        f"sparsity, %: {name}",
        paper("table6", name, "sparsity"),
        *(100 * mean(rows("table6", inputs=inputs, part=part_), "sparsity")
          for inputs in ("model", "captures"))
    ] for part_, name in parts.items()]


def beside_table7():
    found = grouped(rows("table7"), "tokens")
    lengths = sorted({int(n)
                      for n, in found} | {int(r["row"]) for r in PAPER if r["item"] == "table7"})

    def ours(n, committed):
        group = [r for r in found.get((str(n),), []) if (r["text"] == "committed") == committed]
        return 100 * mean(group, "sparsity") if group else math.nan

    lengths.sort(key=lambda n: (n != 8192, n))  # what both have comes first
    return ["the paper: Llama3.1", "ours: all heads, mean of the texts", "ours: nine heads"], [[
        f"sparsity at {n} tokens, %",
        paper("table7", n, "sparsity"),
        ours(n, False),
        ours(n, True)
    ] for n in lengths]


def beside_table9():
    of = {"model": MODEL, "patches, moving": MOVING, "patches, still": STILL}
    names = {"hilbert": "hilbert"} | {x: f"{x}_major"
                                      for x in ("time", "row", "column")} | {"random": "random"}
    columns = [("sparsity, %", "sparsity", "sparsity", 100),
               ("self-similarity of k", "Sim-k", "k_sim", 1),
               ("self-similarity of q", "Sim-q", "q_sim", 1), ("L1", "L1", "l1", 1)]
    models = "CogvideoX", "Mochi"
    lines = []
    for what, key, our_key, factor in columns:
        found = [orders(our_key, where) for where in of.values()]
        lines += [[f"{what}: {order}", *(paper("table9", row, key, model) for model in models),
                   *(factor * ours[order] for ours in found)] for order, row in names.items()]
    for what, key, our_key, factor in (columns[-1], columns[0]):
        for cases, filtered in (("", False), (", cases that differ", True)):
            for n, judge in enumerate(("with", "without")):
                row = f"filtered cases, {judge}" if filtered else f"{judge} the judge"
                ours = [float(pair[n][our_key]) for pair in judged("tuned", filtered)]
                lines.append([
                    f"{what}: {judge} the judge{cases}",
                    *(paper("table10", row, key, m) for m in models),
                    factor * statistics.mean(ours) if ours else math.nan, math.nan, math.nan
                ])
    return [*(f"the paper: {m}" for m in models), *(f"ours: {name}" for name in of)], lines


def beside_fig9():
    found = grouped(rows("fig9"), "attention", "tokens")
    lengths = 8192, 4096, 2048, 1024

    def share(attention, n):
        group = found.get((attention, str(n)))
        return 100 * sum(column(group, "found")) / sum(column(group,
                                                              "needles")) if group else math.nan

    settings = [("fig9", "74K to 112K"), ("table11", "16K to 28K")]
    return [*(f"the paper: {name}" for _, name in settings), *(f"ours: {n}" for n in lengths)], [[
        f"needles found, %: {name}", *(paper(item, row, "NIAH")
                                       for item, _ in settings), *(share(attention, n)
                                                                   for n in lengths)
    ] for name, row, attention in (
        ("dense", "Full", DENSE), ("SpargeAttn", "SpargeAttn", MAIN))] + [[
            "sparsity, %: SpargeAttn", *(paper(item, "SpargeAttn", "sparsity")
                                         for item, _ in settings),
            *(100 * mean(found[MAIN, str(n)], "sparsity") for n in lengths)
        ]]


def beside_fig14():
    by_layer, by_step, by_sample = (layers(key) for key in ("layer", "step", "sample"))
    theirs = {item: [float(r["value"]) for r in PAPER if r["item"] == item and r["row"].isdigit()]
              for item in ("fig14", "fig16", "fig17")}
    heads = grouped(rows("fig14", source="whole"), "layer", "head").values()
    lines = [["mean of all",
              paper("fig14", "mean", "sparsity") / 100,
              statistics.mean(by_layer)],
             ["densest layer (Fig 14)",
              min(theirs["fig14"]), min(by_layer)],
             ["sparsest layer (Fig 14)",
              max(theirs["fig14"]), max(by_layer)],
             [
                 "first step; the paper: lowest (Fig 15)",
                 paper("fig15", "lowest", "sparsity") / 100, by_step[0]
             ],
             [
                 "last step; the paper: highest (Fig 15)",
                 paper("fig15", "highest", "sparsity") / 100, by_step[-1]
             ], ["densest sample (Fig 16)",
                 min(theirs["fig16"]),
                 min(by_sample)],
             ["sparsest sample (Fig 16)",
              max(theirs["fig16"]),
              max(by_sample)],
             [
                 "sparsest head (Fig 17)",
                 max(theirs["fig17"]),
                 max(mean(group, "sparsity") for group in heads)
             ]]
    return ["the paper: CogvideoX", "ours"], [
        [f"sparsity, %: {what}", *(100 * x for x in both)] for what, *both in lines]


BESIDE = {
    "table1": beside_table1, "table3": beside_table3, "fig10": beside_fig10, "table6":
    beside_table6, "table7": beside_table7, "table9": beside_table9, "fig9": beside_fig9, "fig14":
    beside_fig14
}


# ---- Tables of ours ---------------------------------------------------------------------------

COLUMNS = {  # what the columns of out.csv are called here, and what turns them into that unit
    "sparsity": ("sparsity, %", 100), "sparsity_qk": ("sparsity of Q·K, %", 100), "l1": ("L1", 1),
    "sparsity_out": ("sparsity on the unseen text, %",
                     100), "l1_in": ("L1", 1), "l1_out": ("L1 on the unseen text", 1),
    "worst_row_l1": ("L1 of the worst row", 1), "worst_l1": ("largest L1 of a head", 1), "theta":
    ("theta", 1), "tau": ("tau", 1), "lambda": ("lambda", 1), "perplexity": ("perplexity", 1),
    "needles": ("needles found, %", 100), "gops": ("speed, TOPS", 1e-3), "seconds_attention":
    ("attention, s", 1), "seconds_prefill": ("prefill, s", 1), "ms": ("time, ms", 1), "ms_predict":
    ("prediction, ms", 1), "ms_quantize": ("quantization, ms", 1), "ms_dense_f32":
    ("dense f32, ms", 1), "ms_dense_int8": ("dense int8, ms", 1), "overhead_f32":
    ("overhead, % of dense f32", 100), "overhead_int8": ("overhead, % of dense int8", 100), "asked":
    ("sparsity asked, %", 100), "efficiency": ("share of the ideal speed, %", 100), "q_sim":
    ("self-similarity of q", 1), "k_sim": ("self-similarity of k",
                                           1), "sim_k_raw": ("self-similarity of k, mean kept", 1),
    "wanted": ("density asked, %", 100), "density": ("density, %", 100),
    "change": ("perplexity, change against dense f32, %", 100),
    "kl": ("KL from dense f32, 0.01 nat", 100), "speed": ("faster than dense f32, times", 1)
}


def cell(key, text):
    """Of a table of ours."""
    return digits(COLUMNS[key][1] * number(text)) if key in COLUMNS else str(text)


def titles(keys):
    return [COLUMNS[key][0] if key in COLUMNS else key for key in keys]


def plain(item, keys, **where):
    return titles(keys), [[cell(key, r[key]) for key in keys] for r in rows(item, **where)]


def table_of_orders():
    keys = ["q_sim", "k_sim", "sim_k_raw", "l1", "sparsity"]
    lines = []
    for name, of in ("model", MODEL), ("patches, moving", MOVING), ("patches, still", STILL):
        for thresholds, judge in (("tuned", "on"), ("tuned", "off"), ("alike", "on"), ("alike",
                                                                                       "off")):
            found = grouped(rows("table9", thresholds=thresholds, judge=judge, **of), "order")
            lines += [[
                name, thresholds, judge, order, *(cell(key, mean(group, key)) for key in keys)
            ] for (order, ), group in found.items()]
    for thresholds in "tuned", "alike":
        for name, filtered in (("all orders", False), ("those > 0.05 apart", True)):
            pairs = judged(thresholds, filtered)
            for n, judge in enumerate(("on", "off") if pairs else ()):
                lines.append([
                    "model", thresholds, judge, f"{name} ({len(pairs)})", "", "", "",
                    *(cell(k, statistics.mean(float(p[n][k]) for p in pairs))
                      for k in ("l1", "sparsity"))
                ])
    return ["inputs", "thresholds", "judge", "order", *titles(keys)], lines


def table_of_layers():
    return ["by", "mean sparsity, %"], [[key, ", ".join(digits(100 * x) for x in layers(key))]
                                        for key in ("layer", "step", "sample")]


def table_of_needles():
    found = grouped(rows("fig9"), "attention", "tokens")
    return ["attention", "tokens", "needles found, %", "of", "sparsity, %"], [
        [*at, cell("needles", sum(column(group, "found")) / sum(column(group, "needles"))),
         str(sum(int(r["needles"]) for r in group)), cell("sparsity", mean(group, "sparsity"))]
        for at, group in found.items()]


OURS = {
    "attention_map":
    lambda: plain("attention_map", [
        "layer", "head", "sparsity", "sparsity_qk", "l1", "worst_row_l1"
    ], attention="chosen", arithmetic="int8"), "tune":
    lambda: plain("tune", [
        "layer", "head", "sparsity", "l1_in", "sparsity_out", "l1_out", "theta", "tau", "lambda"
    ], l2="0.09"), "table1":
    lambda: plain("table1", [
        "tokens", "attention", "sparsity", "perplexity", "needles", "gops", "seconds_attention",
        "seconds_prefill"
    ]), "table3":
    lambda: plain("table3", [
        "inputs", "tokens", "ms_predict", "ms_quantize", "ms_dense_f32", "ms_dense_int8",
        "overhead_f32", "overhead_int8"
    ]), "fig10":
    lambda: plain("fig10", [
        "mask", "asked", "sparsity", "ms", "ms_dense_f32", "ms_dense_int8", "efficiency"
    ]), "table9":
    table_of_orders, "fig14":
    table_of_layers, "fig9":
    table_of_needles, "table6":
    lambda: plain("table6", ["inputs", "part", "sparsity", "perplexity"]), "table7":
    lambda: plain("table7", ["text", "tokens", "heads", "sparsity", "worst_l1"]), "submass":
    lambda: plain("submass", [
        "tokens", "rule", "wanted", "blocks", "lambda", "density", "sparsity", "perplexity",
        "change", "kl", "needles", "seconds_attention", "speed"
    ]), "frontier":
    lambda: plain("frontier", [
        "input", "method", "density", "l1", "l1_worst", "worst_row", "recall", "predict",
        "seconds_predict", "seconds_attend", "seconds_dense"
    ], asked="0.3", reached="1"),
}


# ---- HTML -------------------------------------------------------------------------------------

STYLE = (
    "\n:root { --ink: #262130; --dim: #6c667a; --line: #e4e0ea; --accent: #33265c; --good: "
    "#1f7a4d; "
    "--bad: #b0413e; --pale: #f7f5fa; }\n"
    "* { box-sizing: border-box; }\n"
    "body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 60px; "
    'font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; color: var(--ink);\n'
    "       overflow-wrap: break-word; }\n"
    "h1 { font-size: 1.9rem; margin: 0 0 4px; } h2 { font-size: 1.25rem; margin: 0; } "
    "h3 { font-size: .95rem; margin: 18px 0 6px; color: var(--dim); }\n"
    "p { margin: 8px 0; } a { color: var(--accent); }\n"
    "section { border-top: 1px solid var(--line); margin-top: 34px; padding-top: 22px; }\n"
    ".head { display: flex; flex-wrap: wrap; gap: 8px; align-items: baseline; }\n"
    ".chip { border-radius: 99px; padding: 1px 10px; font-size: .78rem; white-space: nowrap; "
    "background: var(--pale); color: var(--dim); }\n"
    ".good { background: #e3f3ea; color: var(--good); } .bad { background: #f9e6e5; color: "
    "var(--bad); }\n"
    ".scroll { overflow-x: auto; max-height: 420px; border: 1px solid var(--line); border-radius: "
    "6px; }\n"
    ".whole { max-height: none; } td { white-space: nowrap; }\n"
    ".whole td:first-child { white-space: normal; min-width: 8em; }\n"
    "table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: "
    "tabular-nums; }\n"
    "th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line); }\n"
    "th { position: sticky; top: 0; background: var(--pale); font-weight: 600; } "
    "tr:last-child td { border-bottom: 0; }\n"
    "th:first-child, td:first-child, .word { text-align: left; }\n"
    ".side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), "
    "1fr)); "
    "gap: 0 22px; }\n"
    ".bands { list-style: none; padding: 0; margin: 12px 0; } .bands li { padding: 3px 0; } "
    "summary { cursor: pointer; margin: 10px 0; color: var(--accent); }\n"
    "@media (max-width: 760px) { th, td { padding: 4px 6px; } body { padding: 16px 14px 40px; "
    "font-size: 15px; } "
    "h1 { font-size: 1.6rem; } }\n"
    "figure { margin: 14px 0; overflow-x: auto; } figcaption { color: var(--dim); font-size: "
    ".9rem; }\n"
    "img { max-width: 100%; height: auto; display: block; margin: 6px 0; }\n"
    "@media (max-width: 760px) { img.wide { min-width: 900px; max-width: none; } }\n"
    'code { font: .85em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--pale); '
    'padding: 1px 5px; '
    "border-radius: 4px; }\n"
    ".dim { color: var(--dim); font-size: .86rem; } nav { columns: 2; font-size: .92rem; margin: "
    "12px 0; }\n"
    "@media (max-width: 760px) { nav { columns: 1; } }\n")


def grid(titles, lines, kind=""):
    """A table; a column that has a cell that is no figure is of words."""
    cells = [[escape(text) for text in line] for line in lines]
    words = [' class="word"' if any(c and not c.lstrip("-")[:1].isdigit() for c in column) else ""
             for column in zip(*cells)]
    head = "".join(f"<th{word}>{escape(t)}</th>" for t, word in zip(titles, words))
    body = "".join("<tr>" + "".join(f"<td{word}>{c}</td>" for c, word in zip(line, words)) + "</tr>"
                   for line in cells)
    return (
        f'<div class="scroll{kind}" '
        f'tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        '</div>')


def folded(summary, inside):
    return f"<details><summary>{summary}</summary>{inside}</details>" if inside else ""


def of_paper(names):
    """The paper's numbers of an item, with its digits: a table for each of its settings."""
    parts = []
    for (_, setting), found in grouped([r for r in PAPER if r["item"] in names], "item",
                                       "setting").items():
        columns = {r["column"]: "%" if scale(r) == 100 else r["unit"] for r in found}
        lines = [[
            name, *(next((r["value"] if scale(r) == 1 else digits(scale(r) * float(r["value"]))
                          for r in group if r["column"] == c), "") for c in columns)
        ] for (name, ), group in grouped(found, "row").items()]
        titles = ["", *(f"{c}, {u}" if u else c for c, u in columns.items())]
        parts.append(f'<div><p class="dim">{escape(setting)}</p>{grid(titles, lines)}</div>')
    return folded(f"The paper's numbers in full: {len(parts)} table{'s' * (len(parts) > 1)}",
                  f'<div class="side">{"".join(parts)}</div>' if parts else "")


def of_both(folder):
    """The paper's numbers beside ours."""
    try:
        columns, lines = BESIDE[folder]() if folder in BESIDE else ([], [])
    except NotThere:
        return ""
    return grid(["", *columns], [[what, *map(digits, values)]
                                 for what, *values in lines], " whole") if lines else ""


def of_ours(folder):
    """Our table of an item, if there is one; folded away where there is one of both."""
    try:
        titles, lines = OURS[folder]() if folder in OURS else ([], [])
    except NotThere:
        return ""
    if not lines:
        return ""
    return folded(f"Measured here in full: {len(lines)} rows", grid(
        titles, lines)) if folder in BESIDE else (grid(titles, lines))


def in_unit(value, band):
    return f"{digits(value)} {band['unit']}".strip()


def wanted(band):
    """In words: each end, and whether it was set beforehand."""
    low, high = ends(band)
    said = [
        f"{name} {digits(end)}{'' if band[side] else ' (by the rule)'}"
        for name, side, end in (("at least", "low", low), ("at most", "high", high))
        if math.isfinite(end)
    ]
    return ", ".join(said)


def of_bands(found):
    """What was expected, what came out, and why where that is something else."""
    lines = []
    for band, value, holds in found:
        unknown = "no such case" if is_there(band["item"]) else "not measured"
        state, color = {
            None: (unknown, ""), True: ("holds", "good"), False: ("does not hold", "bad")
        }[holds]
        why = f" <i>Why: {escape(band['reason'])}.</i>" if holds is False else ""
        lines.append(
            f'<li><span class="chip {color}">{state}</span> {escape(band["what"])}: '
            f'<b>{"" if value is None else in_unit(value, band)}</b> '
            f'<span class="dim">{wanted(band)}; {escape(band["source"])}.{why}</span></li>')
    return f'<ul class="bands">{"".join(lines)}</ul>' if lines else ""


def picture(name):
    path = HERE / f"{name}.svg"
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    wide = ' class="wide"' if name in WIDE else ""
    return (
        f'<figure><img{wide} alt="{escape(CAPTIONS[name])}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>")


def stands_on(item):
    path = EXPERIMENTS / item / "from.json"
    if not path.exists():
        return ""
    on = json.loads(path.read_text())
    seed = "" if on.get("seed") is None else f"; seed {on['seed']}"
    return (f"{on['machine']}, {on['cores']} cores, {on['isa']}; {on['compiler']} {on['flags']}; "
            f"commit {on['commit']} of {on['date']}{seed}.")


def title(item):
    return escape(item.what or "Heads of a language model")


def section(item, found):
    states = [holds for _, _, holds in found]
    chips = ['<span class="chip">substitute</span>'] if item.substitute else []
    if any(state is not None for state in states):
        chips.append(
            f'<span class="chip {"good" if all(states) else "bad"}">{sum(map(bool, states))} of '
            f'{len(states)} bands hold</span>')
    both, ours, theirs = of_both(item.folder), of_ours(item.folder), of_paper(item.covers)
    tables = (f"<h3>{'The paper beside ours' if both else 'Measured here'}</h3>"
              f"<p class='dim'>Ours is on {escape(item.ours)}.</p>{both}{ours}{theirs}"
              if both or ours else theirs)
    pictures = "".join(picture(name) for name in item.figures)
    return (f'<section id="{item.folder}"><div class="head"><h2>{title(item)}</h2>'
            f'{"".join(chips)}</div><p>{escape(item.says)}</p>{of_bands(found)}{tables}{pictures}'
            f'<p class="dim"><code>./reproduce.sh --full --only {item.covers[0]}</code> &nbsp; '
            f'{stands_on(item.folder)}</p></section>')


def is_command(how):
    return how.startswith(("build/", "tests/"))


def waiting():
    """What needs the paper's models: its numbers, and the command that fills ours, or what it
    takes."""
    lines = "".join(
        f'<li><b>{escape(what)}</b>: {escape(number)}.<br>'
        f'{f"<code>{escape(how)}</code>" if is_command(how) else "Takes " + escape(how) + "."}</li>'
        for what, number, how in MISSING)
    return (
        '<section id="missing"><h2>Not measured</h2><p>These need the paper\'s own models, and '
        'some of them a '
        'judge of pictures or answers that is not part of this project. What stands here is the '
        'paper\'s. Captures '
        'come from a running model by <code>sparge.capture</code>, thresholds from '
        '<code>build/release/tools/sparge tune FOLDER -o P.json</code>; the commands are for the '
        'root of the '
        f'project, after <code>./reproduce.sh</code>.</p><ul class="missing">{lines}</ul></section>'
    )


def missed(found):
    """The bands that do not hold, with a link to each."""
    lines = "".join(
        f'<li><a href="#{item}">{title(next(x for x in ITEMS if x.folder == item))}</a>: '
        f'{escape(band["what"])}: <b>{in_unit(value, band)}</b>, {wanted(band)}</li>'
        for item, bands in found.items() for band, value, holds in bands if holds is False)
    return f"<h3>Bands that do not hold</h3><ul>{lines}</ul>" if lines else ""


def main():
    found = checks()
    states = [holds for item in found.values() for _, _, holds in item]
    nav = "".join(f'<li><a href="#{item.folder}">{title(item)}</a></li>'
                  for item in ITEMS)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>sparge: the paper, regenerated</title><style>{STYLE}</style></head><body>'
        f'<h1>SpargeAttn, regenerated</h1><p>The tables and figures of '
        '<a href="https://arxiv.org/abs/2502.18137">arXiv 2502.18137</a> beside what sparge '
        'measures. What is '
        'measured on another model than the paper\'s says <span class="chip">substitute</span>: '
        'compare shapes '
        'there, not values. A band is what was expected before anything was measured. Where it '
        'had one end, and '
        'the paper has a value, another was added afterwards by a rule: half or twice the '
        'paper\'s value. '
        'Differences of shares are in points, of quotients it is said that one thing is divided '
        'by another, and a '
        f'change against something is in % of that.</p>'
        f'<p><b>{sum(h is True for h in states)}</b> of {len(states)} bands hold, '
        f'{sum(h is False for h in states)} do not, {sum(h is None for h in states)} had no case '
        'to judge.</p>'
        f'{missed(found)}'
        f'<nav><ul>{nav}<li><a href="#missing">Not measured</a></li></ul></nav>' +
        "".join(section(item, found[item.folder])
                for item in ITEMS) + waiting() + "</body></html>\n")
    write_text(HERE / "report.html", page)
    print(
        f"wrote paper_figs/report.html: {sum(h is True for h in states)} of {len(states)} bands "
        "hold"
    )


if __name__ == "__main__":
    run_main(main)
