# SPDX-License-Identifier: Apache-2.0
"""tables.py: the tables of README.md here, out of out.csv and of what model.py measures."""
import statistics
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lm")]

from errors import number  # noqa: E402
from harness import fill_in, markdown, read_csv  # noqa: E402
from names import perplexity  # noqa: E402
from ways import DENSITIES, SELECTED, TEXT, THETAS, YARDSTICKS  # noqa: E402

TEXTS = ["opticks", "hashbrown_raw"]
DENSE = ["f32", "int8"]
WITHOUT = "blockrank"  # no text here has documents
METHODS = [name for name in dict.fromkeys([*TEXT, *(x for x in THETAS if x.endswith("sink=1"))])
           if name not in (WITHOUT, *YARDSTICKS)] + YARDSTICKS  # which take longest
MISSED = "not reachable"


def rows_of(name):
    path = HERE / f"{name}.csv"
    return read_csv(path) if path.exists() else []


def mean(rows, key):
    return statistics.mean(float(row[key]) for row in rows)


def figure(x, digits=3):
    return f"{x:.{digits}f}"


# ---- Heads ------------------------------------------------------------------------------------

def heads(inputs):
    """{method: {density: rows of these inputs}}, of which some may be missing."""
    found = defaultdict(dict)
    for row in rows_of("out"):
        if row["input"] in inputs:
            found[row["method"]].setdefault(row["asked"], []).append(row)
    return found


def cell(rows, key, digits=3, factor=1.0):
    if not rows:
        return "not run"
    if any(row["reached"] != "1" for row in rows):
        return MISSED
    return figure(factor * mean(rows, key), digits)


def table_heads(inputs):
    """By the error at 0.3; what cannot reach that comes last."""
    lines = []
    for method, by in heads(inputs).items():
        if method in THETAS and "theta=-1" not in method:
            continue
        at = by.get("0.3", [])
        l1 = [cell(by.get(f"{x:g}", []), "l1") for x in DENSITIES]
        own = by.get("")
        if own:
            l1 = [f"{cell(own, 'l1')} at {mean(own, 'density'):.2f}"] + [MISSED] * 3
        at = own or at
        more = ("l1_spread", 3), ("l1_worst", 3), ("worst_row", 2), ("recall", 3)
        seconds = [1e3 * mean(at, key) for key in
                   ("seconds_predict", "seconds_attend", "seconds_dense")] if all(
                       row["reached"] == "1" for row in at) and at else None
        lines.append([f"`{method}`", *l1, *(cell(at, key, n) for key, n in more),
                      f"{cell(at, 'predict', 2, 100)} %" if seconds else MISSED,
                      *([figure(x, 1) for x in seconds] if seconds else ["", "", ""])])
    lines.sort(key=lambda line: number(line[2]) if line[2][0].isdigit() else 9.0)
    return markdown(["method", *(f"L1 at {x:g}" for x in DENSITIES), "spread", "worst head",
                     "worst row", "recall", "predict", "predict, ms", "attend, ms",
                     "dense int8, ms"], lines)


# ---- The model --------------------------------------------------------------------------------

def of_text(rows, text, tokens):
    return [row for row in rows if Path(row["text"]).stem == text and row["tokens"] == str(tokens)]


def density(row):
    """Of pairs of tokens; of BLASST's, of P.V, by blocks."""
    if row["method"].startswith("blasst"):
        return 1.0 - 2.0 * float(row["sparsity"]) + float(row["sparsity_qk"])
    return float(row["density_tokens"])


def figures(method, asked, texts=TEXTS, tokens=4096):
    """KL, change of perplexity together and of each text, density, needles; None: not run."""
    ppl, needles = rows_of("ppl"), rows_of("needle")
    found = [row for text in texts for row in of_text(ppl, text, tokens)
             if (row["method"], row["asked"]) == (method, asked)]
    base = [row for text in texts for row in of_text(ppl, text, tokens) if row["method"] == "f32"]
    if len(found) < len(texts) or len(base) < len(texts):
        return None
    right = [number(row["right"]) for row in needles if row["tokens"] == str(tokens) and
             (row["method"], row["asked"]) == (method, asked)]
    each = [perplexity([row]) / perplexity([other]) - 1 for row, other in zip(found, base)]
    return {"kl": mean(found, "kl"), "change": perplexity(found) / perplexity(base) - 1,
            "each": each, "density": statistics.mean(map(density, found)),
            "needles": sum(right) if right else None, "of": len(right),
            "attention": mean(found, "seconds_attention")}


def reached(method, asked, texts=TEXTS):
    """Is it known that some text cannot be had at this density?"""
    known = [row for row in rows_of("settings") if (row["method"], row["asked"], row["tokens"]) ==
             (method, asked, "4096") and row["text"] in texts]
    return all(row["reached"] == "1" for row in known)


def model_cells(method, asked):
    found = figures(method, asked)
    if not found:
        return [MISSED if not reached(method, asked) else "not run", "", "", "", ""]
    needles = f"{found['needles']:.0f} of {found['of']}" if found["of"] else "not run"
    return [figure(100 * found["kl"], 2), f"{100 * found['change']:+.2f}",
            f"{100 * max(found['each']):+.2f}", figure(found["density"]), needles]


def table_model(methods=None, asked=("0.5", "0.2")):
    """By the divergence at the first density."""
    lines = [[f"`{name}`", *(x for at in asked for x in model_cells(name, at))]
             for name in methods or [x for x in METHODS if x not in THETAS or "=-1" in x]]
    lines.sort(key=lambda line: float(line[1]) if line[1][0].isdigit() else 1e9)
    dense = [[name, *model_cells(name, ""), *[""] * 5 * (len(asked) - 1)] for name in DENSE]
    titles = "KL", "perplexity, %", "worst text, %", "density", "needles"
    return markdown(["method", *(f"{at}: {title}" for at in asked for title in titles)],
                    [*dense, *lines])


def predicted():
    """What a method's choice takes, of dense attention, on the language captures."""
    return {name: mean(rows, "predict") for name, by in heads(("text", "code")).items()
            if (rows := [row for at in by.values() for row in at if row["reached"] == "1"])}


def front():
    """Methods that no other one beats in both the divergence at some density and in what their
    choice takes; yardsticks, and other theta, apart."""
    cost, found = predicted(), []
    for asked in ("0.5", "0.2"):
        kl = {name: figures(name, asked)["kl"] for name in METHODS
              if figures(name, asked) and name in cost and name not in YARDSTICKS and
              (name not in THETAS or "=-1" in name)}
        found += [name for name in kl if not any(
            kl[other] < kl[name] and cost[other] <= cost[name] for other in kl)]
    return list(dict.fromkeys(found))


def table_thetas():
    """At equal density: KL of the model, L1 of the heads."""
    lines, text, video = [], heads(("text", "code")), heads(("video", ))
    for name in THETAS:
        lines.append([f"`{name}`", *(model_cells(name, at)[0] if name in METHODS else "not run"
                                     for at in ("0.5", "0.2")),
                      *(cell(by[name].get(at, []), "l1") for by in (text, video)
                        for at in ("0.5", "0.3", "0.2"))])
    return markdown(["", "model, KL at 0.5", "at 0.2", *(f"{what}, L1 at {at}"
                     for what in ("text", "video") for at in ("0.5", "0.3", "0.2"))], lines)


def table_scores():
    text = heads(("text", "code"))
    return markdown(["", "KL at 0.5", "at 0.2", "L1 at 0.3", "predict"], [
        [f"`{name}`", *(model_cells(name, at)[0] for at in ("0.5", "0.2")),
         cell(text[name].get("0.3", []), "l1"),
         f"{cell(text[name].get('0.3', []), 'predict', 2, 100)} %"] for name in
        [*SELECTED, "oracle_mass", "spargeattn:theta=-1,sink=1", "xattention", "proxyattn", "pbs"]])


def table_front():
    """All five judging texts."""
    from program import paths
    every, lines = [path.stem for path in paths("judge")], []
    for name in [*DENSE, *front()]:
        for asked in ("0.5", "0.3", "0.2") if name not in DENSE else ("", ):
            for texts, tokens in ((every, 4096), (TEXTS, 8192)):
                found = figures(name, asked, texts, tokens)
                if found:
                    lines.append([f"`{name}`", asked, tokens, figure(found["density"]),
                                  figure(100 * found["kl"], 2), f"{100 * found['change']:+.2f}",
                                  f"{100 * max(found['each']):+.2f}",
                                  f"{found['needles']:.0f} of {found['of']}" if found["of"] else "",
                                  figure(found["attention"], 2)])
    return markdown(["method", "asked", "tokens", "density", "KL", "perplexity, %",
                     "worst text, %", "needles", "attention, s"], lines)


def readme():
    tables = {"text": table_heads(("text", "code")), "video": table_heads(("video", )),
              "steps": table_heads(("steps", )), "model": table_model(),
              "scores": table_scores(), "theta": table_thetas(), "front": table_front()}
    for name, lines in tables.items():
        fill_in(HERE / "README.md", name, lines)
