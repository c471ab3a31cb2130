#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures what README.md here compares, with sparge-lm.

    measure.py tune       the one number of each rule at each density, on two texts: settings.csv
    measure.py ppl        perplexity, KL and density of the five judging texts: ppl.csv
    measure.py needle     ten needles at each length: needle.csv
    measure.py time       seconds, on an idle machine: time.csv
    measure.py readme     the tables of README.md here, from out.csv

Every step goes on where it was interrupted; what is unfinished lies in build/submass. Thresholds by
loss that come later (params_*.json) are measured by the same steps, alone.
"""
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lm"), str(HERE.parent / "capture")]

from attentions import (  # noqa: E402
    BLOCKS,
    CELLS,
    DENSITIES,
    FINER,
    ONE,
    SETTINGS,
    at_half,
    everything,
    settings,
)
from harness import (  # noqa: E402
    ROOT,
    fill_in,
    machine_line,
    markdown,
    read_csv,
    run_main,
    write_csv,
    write_text,
)
from names import LENGTHS  # noqa: E402
from program import TUNED_AT, captured, listed, lm, paths, run_steps  # noqa: E402

WORK = ROOT / "build/submass"
TUNED_ON = "persuasion", "click_core"
TEXT = "opticks"  # of needles and of seconds
GRID = np.geomspace(0.006, 4, 14)


# ---- One number for the model -----------------------------------------------------------------

def number(rule, x):
    """t is x, and tau what x leaves, so that either way x lowers the density."""
    return max(0.0, 1.0 - x) if ONE[rule][1] == "tau" else x


def curve(captures, rule, blocks):
    """The density of all heads of all captures, which see as many pairs each, at each of GRID."""
    import sets  # and the package, which the other steps do without

    import sparge
    method, name, others = ONE[rule]
    how = {"method": method, "is_causal": "end", "block": tuple(map(int, blocks.split("x")))}
    found = []
    for path in captures:
        x = sets.tensors(path)
        found.append([sparge.predict(*x.values(), **how, method_params={
            name: number(rule, at), **others}).counts.density for at in GRID])
    return np.mean(found, 0)


def found_at(captures, rule, blocks):
    """The number for each density, between those of the grid by their logarithms."""
    densities = curve(captures, rule, blocks)
    if not densities[-1] < min(map(float, DENSITIES)) < max(map(float, DENSITIES)) < densities[0]:
        sys.exit(f"{rule}: densities from {densities[-1]:.3f} to {densities[0]:.3f}: widen GRID")
    for wanted in DENSITIES:
        x = np.exp(np.interp(float(wanted), densities[::-1], np.log(GRID[::-1])))
        yield {"rule": rule, "blocks": blocks, "wanted": wanted, "value": f"{number(rule, x):.4g}"}


def tune(args):
    captures = [file for path in paths(*TUNED_ON)
                for file in sorted(captured(args, path).glob("*.safetensors"))]
    rows = settings()
    known = {(row["rule"], row["blocks"]) for row in rows}
    for rule, blocks in [*((rule, BLOCKS) for rule in ONE), *((CELLS, x) for x in FINER)]:
        if (rule, blocks) not in known:
            rows += found_at(captures, rule, blocks)
            write_csv(SETTINGS, rows)


# ---- sparge-lm --------------------------------------------------------------------------------

def rows_of(args, command, attentions, tokens, files, options):
    """Of a command at one length; other options take a call of their own, and a file."""
    rows = []
    for of in dict.fromkeys(a.options() for a in attentions):
        group = {a.name: a for a in attentions if a.options() == of}
        kept = "_".join([command, *of]).replace("-", "")
        found = lm(args, command, *files, "--length", tokens, "--attention",
                   listed(a.word for a in group.values()), *of, *options, "-o",
                   WORK / f"{kept}.json")["rows"]
        for row in found:  # the file may have rows of other lengths, and of what was wanted before
            name = row["attention"], row["attention_sha256"]
            if row["tokens"] == tokens and name in group:
                rows.append(group[name].columns() | row)
    return rows


def measure(args, command, files, columns, *options):
    """One setting of each rule at every length, and for perplexity everything at the length that
    was tuned at, into a table. Figures of single layers stay in build/submass."""
    rows = []
    for tokens in LENGTHS:
        if command == "needle" and tokens > TUNED_AT:
            break
        attentions = everything() if command == "ppl" and tokens == TUNED_AT else at_half()
        rows += rows_of(args, command, attentions, tokens, files, options)
        write_csv(HERE / f"{command}.csv", rows, [
            "rule", "wanted", "blocks", "lambda", "attention", "attention_sha256", "text",
            "text_sha256", "tokens", *columns, "sparsity", "sparsity_qk", "density_tokens",
            "seconds", "seconds_attention", "seconds_prepare", "isa", "threads"
        ])


def ppl(args):
    measure(args, "ppl", paths("judge"), ["surprise", "perplexity", "kl"], "--kl")


def needle(args):
    """Two at each of five depths."""
    measure(args, "needle", paths(TEXT), ["depth", "needle", "number", "right"], "--depths", 5,
            "--needles", 2)


def seconds(args):
    """Of three runs by turns."""
    measure(args, "time", paths(TEXT), ["turn"], "--repeat", 3)
    write_text(HERE / "machine.txt", f"{machine_line(args.sparge)}\n")


# ---- The tables of README.md ------------------------------------------------------------------

def percent(x):
    return f"{100 * float(x):+.2f}"


def figures(row):
    """What was measured, as a table has it."""
    each = [percent(row[f"change_{path.stem}"]) for path in paths("judge")]
    needles = f"{10 * float(row['needles']):.0f}" if row["needles"] else "not run"
    took = [f"{float(row['seconds_attention']):.2f}", f"{float(row['speed']):.2f}x"] \
        if row["speed"] else ["not run", ""]
    return [f"{float(row['density']):.3f}", percent(row["change"]), ", ".join(each),
            f"{100 * float(row['kl']):.2f}", needles, *took]


def table(keys, rows):
    return markdown([
        *keys, "density", "perplexity, %", "each text, %", "KL, 0.01 nat", "needles of 10",
        "attention, s", "beside dense f32"
    ], [[*(row[key] for key in keys.values()), *figures(row)] for row in rows], len(keys))


def readme(_args):
    rows = read_csv(HERE / "out.csv")
    keys = {"attention": "rule", "blocks": "blocks", "lambda": "lambda", "asked": "wanted"}
    fill_in(HERE / "README.md", "densities",
            table(keys, [row for row in rows if row["tokens"] == str(TUNED_AT)]))
    keys = {"tokens": "tokens", "attention": "rule"}
    fill_in(HERE / "README.md", "lengths",
            table(keys, [row for row in rows if row["wanted"] in ("", DENSITIES[0])
                         and row["blocks"] == BLOCKS and not row["lambda"]]))


def main():
    steps = {"tune": tune, "ppl": ppl, "needle": needle, "time": seconds, "readme": readme}
    run_steps(__doc__, steps, WORK)


if __name__ == "__main__":
    run_main(main)
