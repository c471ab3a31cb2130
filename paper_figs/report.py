#!/usr/bin/env python3
"""Writes report.html: for every table and figure the paper's values, ours, the bands that were set beforehand and
whether they hold, and what is missing. One file that needs no other; out of experiments/*/out.csv, paper.csv, bands.csv
and the figures here."""
import base64
import json
import math
import statistics
from collections import defaultdict
from html import escape

from rows import EXPERIMENTS, HERE, column, grouped, of_item, read_csv  # first: it finds experiments/
from errors import worst
from harness import run_main, write_text
from items import ITEMS, MISSING

MAIN = "SpargeAttn, (0.08, 0.09)"


# ---- Reading ----------------------------------------------------------------------------------

class NotThere(Exception):
    """There are no such rows yet."""


def is_there(item):
    return (EXPERIMENTS / item / "out.csv").exists()


def rows(item, **where):
    """Rows of an out.csv in which these columns have these values."""
    found = [r for r in of_item(item) if all(r[k] == str(v) for k, v in where.items())] if is_there(item) else []
    if not found:
        raise NotThere
    return found


def mean(found, key):
    return statistics.mean(column(found, key))


# ---- What the bands are about -----------------------------------------------------------------

def lm(attention, tokens, key):
    return float(rows("table1", attention=attention, tokens=tokens)[0][key])


def lost(attention):
    """Perplexity over dense f32, %."""
    return 100 * (lm(attention, 4096, "perplexity") / lm("dense, f32", 4096, "perplexity") - 1)


def needles(attention):
    """The share found less that of dense f32."""
    return statistics.mean(lm(attention, n, "needles") - lm("dense, f32", n, "needles") for n in (1024, 2048, 4096))


def overhead(tokens):
    return 100 * max(column(rows("table3", tokens=tokens), "overhead_f32"))


def efficiency(mask):
    return min(float(r["efficiency"]) for r in rows("fig10", mask=mask) if 0.05 < float(r["sparsity"]) < 0.65)


def part(name):
    return float(rows("table6", inputs="model", part=name)[0]["sparsity"])


def texts():
    return [column(found, "sparsity")
            for (text,), found in grouped(rows("table7"), "text").items() if text != "committed"]


MODEL, MOVING, STILL = {"source": "whole"}, *({"source": "patches", "sample": clip} for clip in ("cup", "vtest"))


def orders(key, of=MODEL):
    found = rows("table9", thresholds="tuned", judge="on", **of)
    return {order: mean(found, key) for (order,), found in grouped(found, "order").items()}


def hilbert_ahead(key, of=MODEL):
    found = orders(key, of)
    return found.pop("hilbert") - max(found.values())


def judged(thresholds, filtered=False):
    """Pairs of rows, with the judge and without; of the cases that differ, or all."""
    pairs = grouped(rows("table9", thresholds=thresholds, **MODEL), "sample", "layer", "step", "order", "head").values()
    apart = (abs(on - off) for on, off in (column(pair, "l1") for pair in pairs))
    return [pair for pair, x in zip(pairs, apart) if not filtered or not x <= 0.05]


def judge_gains(key, thresholds, filtered=False):
    """The mean with the judge less that without."""
    found = judged(thresholds, filtered)
    return statistics.mean(on - off for on, off in (column(pair, key) for pair in found)) if found else math.nan


def layers(key):
    found = grouped(rows("fig14", source="whole"), key)
    return [mean(found[name,], "sparsity") for name in sorted((name for name, in found), key=lambda x: (len(x), x))]


def spread_of_heads():
    heads = grouped(rows("fig14", source="whole"), "layer", "head")
    of_layer = defaultdict(list)
    for (layer, _), found in heads.items():
        of_layer[layer].append(mean(found, "sparsity"))
    return max(max(x) - min(x) for x in of_layer.values())


def tuned(l2, key):
    return column(rows("tune", l2=l2), key)


MEASURED = {  # by item and the place of the band in bands.csv
    "attention_map": [lambda: worst(column(rows("attention_map", attention="chosen"), "l1"))],
    "tune": [lambda: worst(tuned("0.09", "l1_out")),
             lambda: statistics.mean(tuned("0.09", "sparsity")) - statistics.mean(tuned("0.035", "sparsity"))],
    "table1": [lambda: lost(MAIN), lambda: lost("SpargeAttn, (0.03, 0.035)"), lambda: needles(MAIN),
               lambda: needles("SpargeAttn, (0.05, 0.06)"),
               lambda: lm(MAIN, 8192, "gops") / lm("dense, f32", 8192, "gops")],
    "table3": [lambda: overhead(8192), lambda: overhead(32768), lambda: overhead(131072)],
    "fig10": [lambda: efficiency("random"), lambda: efficiency("banded"), lambda: efficiency("predicted")],
    "table6": [lambda: part("both") - part("mask"), lambda: part("lambda")],
    "table7": [lambda: min(b - a for found in texts() for a, b in zip(found, found[1:])),
               lambda: statistics.mean(found[-1] for found in texts())],
    "table9": [lambda: hilbert_ahead("sparsity"), lambda: hilbert_ahead("sim_k"), lambda: orders("sim_k")["random"],
               lambda: orders("sparsity")["random"] / orders("sparsity")["row"], lambda: judge_gains("l1", "tuned"),
               lambda: judge_gains("l1", "tuned", filtered=True), lambda: -judge_gains("sparsity", "tuned"),
               lambda: judge_gains("l1", "alike", filtered=True),
               lambda: 100 * len(judged("alike", filtered=True)) / len(judged("alike")),
               lambda: hilbert_ahead("sparsity", MOVING)],
    "fig9": [lambda: lm("dense, f32", 4096, "needles")],
    "fig14": [lambda: max(layers("layer")) / min(layers("layer")), lambda: layers("step")[-1] - layers("step")[0],
              lambda: max(abs(x - statistics.mean(layers("sample"))) for x in layers("sample")), spread_of_heads],
}


def checks():
    """{item: [(band, what was measured or None, whether it holds or None)]}"""
    found = defaultdict(list)
    for band in read_csv(EXPERIMENTS / "bands.csv"):
        item = band["item"]
        try:
            value = float(MEASURED[item][len(found[item])]())
        except NotThere:
            value = math.nan
        known = not math.isnan(value)
        holds = known and float(band["low"] or -math.inf) <= value <= float(band["high"] or math.inf)
        found[item].append((band, value if known else None, holds if known else None))
    return found


# ---- Tables of ours ---------------------------------------------------------------------------

def number(text):
    """A cell: a figure in at most five digits, anything else as it is."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return escape(str(text))
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e7 else f"{value:.5g}"


def plain(item, keys, **where):
    return keys, [[r[k] for k in keys] for r in rows(item, **where)]


def table_of_orders():
    keys = ["sim_q", "sim_k", "sim_k_raw", "l1", "sparsity"]
    lines = []
    for name, of in ("model", MODEL), ("patches, moving", MOVING), ("patches, still", STILL):
        for thresholds, judge in (("tuned", "on"), ("tuned", "off"), ("alike", "on"), ("alike", "off")):
            found = grouped(rows("table9", thresholds=thresholds, judge=judge, **of), "order")
            lines += [[name, thresholds, judge, order, *(f"{mean(group, key):.4f}" for key in keys)]
                      for (order,), group in found.items()]
    for thresholds in "tuned", "alike":
        for name, filtered in (("all orders", False), ("those > 0.05 apart", True)):
            pairs = judged(thresholds, filtered)
            for n, judge in enumerate(("on", "off") if pairs else ()):
                lines.append(["model", thresholds, judge, f"{name} ({len(pairs)})", "", "", "",
                              *(f"{statistics.mean(column([p[n] for p in pairs], k)):.4f}" for k in ("l1", "sparsity"))])
    return ["of", "thresholds", "judge", "order", *keys], lines


def table_of_layers():
    return ["by", "mean sparsity"], [[key, ", ".join(f"{x:.3f}" for x in layers(key))]
                                     for key in ("layer", "step", "sample")]


def table_of_needles():
    found = grouped(rows("fig9"), "attention", "tokens")
    return ["attention", "tokens", "found", "sparsity"], [
        [*at, f"{sum(int(r['found']) for r in group)} of {sum(int(r['needles']) for r in group)}",
         f"{mean(group, 'sparsity'):.3f}"]
        for at, group in found.items()]


OURS = {
    "attention_map": lambda: plain("attention_map", ["layer", "head", "sparsity", "sparsity_qk", "l1", "worst_row_l1"],
                                   attention="chosen", arithmetic="int8"),
    "tune": lambda: plain("tune", ["layer", "head", "theta", "tau", "lambda", "sparsity", "l1_in", "sparsity_out",
                                   "l1_out"], l2="0.09"),
    "table1": lambda: plain("table1", ["tokens", "attention", "sparsity", "perplexity", "needles", "gops",
                                       "seconds_attention", "seconds_prefill"]),
    "table3": lambda: plain("table3", ["inputs", "tokens", "ms_predict", "ms_quantize", "ms_dense_f32",
                                       "ms_dense_int8", "overhead_f32", "overhead_int8"]),
    "fig10": lambda: plain("fig10", ["mask", "asked", "sparsity", "ms", "ms_dense_f32", "ms_dense_int8", "efficiency"]),
    "table9": table_of_orders, "fig14": table_of_layers, "fig9": table_of_needles,
    "table6": lambda: plain("table6", ["inputs", "part", "sparsity", "perplexity"]),
    "table7": lambda: plain("table7", ["text", "tokens", "heads", "sparsity", "worst_l1"]),
}


# ---- HTML -------------------------------------------------------------------------------------

STYLE = ("\n:root { --ink: #262130; --dim: #6c667a; --line: #e4e0ea; --accent: #33265c; --good: #1f7a4d; "
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
         ".good { background: #e3f3ea; color: var(--good); } .bad { background: #f9e6e5; color: var(--bad); }\n"
         ".scroll { overflow-x: auto; max-height: 420px; border: 1px solid var(--line); border-radius: 6px; }\n"
         ".whole { max-height: none; }\n"
         "table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }\n"
         "th, td { padding: 4px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }\n"
         "th { position: sticky; top: 0; background: var(--pale); font-weight: 600; } "
         "tr:last-child td { border-bottom: 0; }\n"
         "th:first-child, td:first-child, .word { text-align: left; } "
         "td.wrap { white-space: normal; min-width: 15em; text-align: left; }\n"
         ".side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); "
         "gap: 0 22px; }\n"
         ".bands { list-style: none; padding: 0; margin: 12px 0; } .bands li { padding: 3px 0; } "
         "summary { cursor: pointer; margin: 10px 0; color: var(--accent); }\n"
         "@media (max-width: 760px) { body { padding: 16px 14px 40px; font-size: 15px; } h1 { font-size: 1.6rem; } }\n"
         "img { max-width: 100%; height: auto; display: block; margin: 10px 0; }\n"
         'code { font: .85em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--pale); padding: 1px 5px; '
         "border-radius: 4px; }\n"
         ".dim { color: var(--dim); font-size: .86rem; } nav { columns: 2; font-size: .92rem; margin: 12px 0; }\n"
         "@media (max-width: 760px) { nav { columns: 1; } }\n")


def grid(titles, lines, show=number):
    """A table; a column that has a cell that is no figure is of words."""
    cells = [[show(text) for text in line] for line in lines]
    words = [' class="word"' if any(c and not c.lstrip("-")[:1].isdigit() for c in column) else ""
             for column in zip(*cells)]
    head = "".join(f"<th{word}>{escape(t)}</th>" for t, word in zip(titles, words))
    body = "".join("<tr>" + "".join(f"<td{word}>{c}</td>" for c, word in zip(line, words)) + "</tr>" for line in cells)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def of_paper(names):
    """The paper's numbers of an item, with its digits: a table for each of its settings, those after the second folded
    away."""
    parts = []
    for (_, setting), found in grouped([r for r in PAPER if r["item"] in names], "item", "setting").items():
        columns = list(dict.fromkeys((r["column"], r["unit"]) for r in found))
        lines = [[name, *(next((r["value"] for r in group if (r["column"], r["unit"]) == c), "") for c in columns)]
                 for (name,), group in grouped(found, "row").items()]
        titles = ["", *(f"{c}, {u}" if u else c for c, u in columns)]
        parts.append(f'<div><p class="dim">{escape(setting)}</p>{grid(titles, lines, escape)}</div>')
    if not parts:
        return ""
    shown, folded = ("".join(x) for x in (parts[:2], parts[2:]))
    return f'<div class="side">{shown}</div>' + (f'<details><summary>{len(parts) - 2} more</summary>'
                                                 f'<div class="side">{folded}</div></details>' if folded else "")


def of_ours(folder):
    """Our table of an item, if there is one."""
    try:
        return grid(*OURS[folder]()) if folder in OURS else ""
    except NotThere:
        return ""


def of_bands(found):
    """What was expected, what came out."""
    lines = []
    for band, value, holds in found:
        low, high = band["low"], band["high"]
        wanted = f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"
        unknown = "no such case" if is_there(band["item"]) else "not measured"
        state, color = {None: (unknown, ""), True: ("holds", "good"), False: ("does not hold", "bad")}[holds]
        lines.append(f'<li><span class="chip {color}">{state}</span> {escape(band["what"])}: '
                     f'<b>{"" if value is None else number(value)}</b> '
                     f'<span class="dim">{wanted}; {escape(band["source"])}</span></li>')
    return f'<ul class="bands">{"".join(lines)}</ul>' if lines else ""


def picture(name):
    path = HERE / f"{name}.svg"
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{name}" src="data:image/svg+xml;base64,{data}">'


def stands_on(item):
    path = EXPERIMENTS / item / "from.json"
    if not path.exists():
        return ""
    on = json.loads(path.read_text())
    seed = "" if on.get("seed") is None else f"; seed {on['seed']}"
    return (f"{on['machine']}, {on['cores']} cores, {on['isa']}; {on['compiler']} {on['flags']}; "
            f"commit {on['commit']}{seed}.")


def title(item):
    return escape(item.what or "Heads of a language model")


def section(item, found):
    states = [holds for _, _, holds in found]
    chips = ['<span class="chip">substitute</span>'] if item.substitute else []
    if any(state is not None for state in states):
        chips.append(f'<span class="chip {"good" if all(states) else "bad"}">{sum(map(bool, states))} of '
                     f'{len(states)} bands hold</span>')
    left, right = of_paper(item.covers), of_ours(item.folder)
    ours = f"<h3>Measured here</h3><p class='dim'>On {escape(item.ours)}.</p>{right}" if right else ""
    theirs = f"<h3>The paper</h3>{left}" if left else ""
    pictures = "".join(picture(name) for name in item.figures)
    return (f'<section id="{item.folder}"><div class="head"><h2>{title(item)}</h2>'
            f'{"".join(chips)}</div><p>{escape(item.says)}</p>{of_bands(found)}{pictures}{ours}{theirs}'
            f'<p class="dim"><code>./reproduce.sh --full --only {item.covers[0]}</code> &nbsp; '
            f'{stands_on(item.folder)}</p></section>')


def is_command(how):
    return how.startswith(("sparge", "experiments/", "gpu/"))


def waiting():
    """What needs the paper's models: its numbers, and the command that fills ours, or what it takes."""
    lines = "".join(f'<tr><td class="wrap">{escape(what)}</td><td class="wrap">{escape(number)}</td><td></td>'
                    f'<td class="wrap">{f"<code>{escape(how)}</code>" if is_command(how) else escape(how)}</td></tr>'
                    for what, number, how in MISSING)
    return ('<section id="missing"><h2>Not measured</h2><p>These need the paper\'s own models, and some of them a '
            'judge of pictures or answers that is not part of this project. Captures come from a running model by '
            '<code>experiments/capture/hook.py</code>; thresholds from <code>sparge tune</code>.</p>'
            '<div class="scroll whole" tabindex="0"><table><thead><tr><th class="word">what</th>'
            '<th class="word">the paper</th><th class="word">ours</th>'
            f'<th class="word">how to fill it</th></tr></thead><tbody>{lines}</tbody></table></div></section>')


def main():
    found = checks()
    states = [holds for item in found.values() for _, _, holds in item]
    nav = "".join(f'<li><a href="#{item.folder}">{title(item)}</a></li>'
                  for item in ITEMS)
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>sparge: the paper, regenerated</title><style>{STYLE}</style></head><body>'
            f'<h1>SpargeAttn, regenerated</h1><p>The tables and figures of '
            f'<a href="https://arxiv.org/abs/2502.18137">arXiv 2502.18137</a> beside what sparge measures. What is '
            f'measured on another model than the paper\'s says <span class="chip">substitute</span>: compare shapes '
            f'there, not values. A band is what was expected before anything was measured.</p>'
            f'<p><b>{sum(h is True for h in states)}</b> of {len(states)} bands hold, '
            f'{sum(h is False for h in states)} do not, {sum(h is None for h in states)} open.</p>'
            f'<nav><ul>{nav}<li><a href="#missing">Not measured</a></li></ul></nav>'
            + "".join(section(item, found[item.folder]) for item in ITEMS) + waiting() + "</body></html>\n")
    write_text(HERE / "report.html", page)
    print(f"wrote paper_figs/report.html: {sum(h is True for h in states)} of {len(states)} bands hold")


PAPER = read_csv(EXPERIMENTS / "paper.csv")

if __name__ == "__main__":
    run_main(main)
