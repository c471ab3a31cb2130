#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A language model on SpargeAttn: perplexity, needles, sparsity and seconds by length.

    experiments/lm/get_model.sh                  the weights
    python3 experiments/capture/texts.py         the texts: five to tune on, five to judge on
    run.py tune                                  thresholds at other bounds: params_*.json
    run.py ppl                                   perplexity of the five judging texts: ppl.csv
    run.py needle                                needles in a haystack: needle.csv
    run.py time                                  seconds, on an idle machine: time.csv
    run.py peers                                 MInference and FlexPrefill at the paper's
                                                 sparsities: peers*.csv
    run.py readme                                the tables of README.md here, from those files

Every step goes on where it was interrupted; what is unfinished lies in build/lm.
"""
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from harness import (
    ROOT,
    fill_in,
    machine_line,
    markdown,
    read_csv,
    run_json,
    run_main,
    write_csv,
    write_text,
)
from names import DENSE, LENGTHS, MODEL, PEERS, SETTINGS, TITLES, TUNED, perplexity  # noqa: E402
from program import TUNED_AT, captured, listed, lm, paths, run_steps  # noqa: E402

WORK = ROOT / "build/lm"
TEXT = "opticks"  # of needles and of seconds
MAIN = "0.08, 0.09"


# ---- The steps --------------------------------------------------------------------------------

def tune(args):
    """Captures of the tuning texts, every layer; then thresholds at the tighter bounds."""
    folders = [captured(args, path) for path in paths("tune")]
    for pair, path in TUNED.items():
        if path.parent == HERE:
            bounds = [f"--{name}={x}" for name, x in zip(("l1", "l2"), pair.split(", "))]
            print(
                pair,
                run_json(args.sparge, "tune", *folders, "--causal", "--sink", *bounds, "-o", path))


def ppl(args):
    """Every attention at every length; and at one of them in f32 what the sparse ones compute in
    int8."""
    texts_of = paths("judge")
    lm(args, "ppl", *texts_of, "--length", listed(LENGTHS), "--attention",
       listed([*DENSE, *TUNED.values()]), "-o", WORK / "ppl.json", "--csv", HERE / "ppl.csv")
    lm(args, "ppl", *texts_of, "--length", TUNED_AT, "--attention", listed(TUNED.values()),
       "--qk-dtype", "f32", "--pv-dtype", "f32", "-o", WORK / "ppl_f32.json",
       "--csv", HERE / "ppl_f32.csv")


def needle(args):
    """Every attention up to 4096 tokens; at 8192 dense and one sparse."""
    common = [*paths(TEXT), "-o", WORK / "needle.json", "--csv", HERE / "needle.csv"]
    lm(args, "needle", *common, "--length", listed(LENGTHS[:3]), "--attention",
       listed([*DENSE, *TUNED.values()]))
    lm(args, "needle", *common, "--length", LENGTHS[3], "--attention", listed(["f32", TUNED[MAIN]]))


def seconds(args):
    found = lm(args, "time", *paths(TEXT), "--length", listed(LENGTHS), "--attention",
               listed([*DENSE, *TUNED.values()]), "--repeat", 5, "-o", WORK / "time.json", "--csv",
               HERE / "time.csv")
    write_text(HERE / "machine.txt",
               f"{machine_line(args.sparge)}; products by {found['matmul']}\n")


def settings_of(args, tokens):
    """The value of each method that leaves so many pairs of tokens out, of two tuning texts."""
    sys.path.insert(0, str(HERE.parent / "frontier"))
    from field import Way, calls_of, density_at, find  # and the package
    calls = [call.first(tokens) for path in paths("persuasion", "click_core")
             for call in calls_of(captured(args, path, max(tokens, TUNED_AT)))[::3]]
    for title, (name, sparsity) in PEERS.items():
        way = Way(name)
        value, _ = find(way, lambda x: density_at(calls, way, x), 1.0 - sparsity, tokens)
        yield {"title": title, "tokens": tokens, "value": f"{value:.6g}",
               "attention": way.word(float(f"{value:.6g}"))}


def peers(args):
    """At each length, as the authors say it of theirs; seconds are not told."""
    rows = read_csv(SETTINGS) if SETTINGS.exists() else []
    for tokens in LENGTHS:
        if not any(row["tokens"] == str(tokens) for row in rows):
            rows += [{k: str(v) for k, v in row.items()} for row in settings_of(args, tokens)]
            write_csv(SETTINGS, rows)
    columns = ["attention", "text", "text_sha256", "tokens", "depth", "needle", "number", "right",
               "surprise", "perplexity", "sparsity", "density_tokens", "isa", "threads"]
    for command, texts in (("ppl", paths("judge")), ("needle", paths(TEXT))):
        found = []
        for tokens in LENGTHS[:4 if command == "ppl" else 3]:
            words = listed(row["attention"] for row in rows if row["tokens"] == str(tokens))
            every = lm(args, command, *texts, "--length", tokens, "--attention", words, "-o",
                       WORK / f"peers_{command}_{tokens}.json")["rows"]
            found += [row for row in every if row["tokens"] == tokens]
            write_csv(HERE / f"peers_{command}.csv", found, columns)


# ---- The tables -------------------------------------------------------------------------------

def read(name):
    """The rows of a table by tokens and attention."""
    found = defaultdict(list)
    for row in read_csv(HERE / name):
        found[int(row["tokens"]), row["attention"]].append(row)
    return found


def column(rows, key):
    return [float(r[key]) for r in rows]


def mean(rows, key="sparsity"):
    return statistics.mean(column(rows, key))


def median(rows, key):
    return statistics.median(column(rows, key))


def found_of(rows):
    """Needles."""
    return f"{sum(int(r['right']) for r in rows)} of {len(rows)}" if rows else "not run"


def more(x, base):
    return f"{100 * (x / base - 1):+.2f} %"


def table_length():
    """Perplexity, needles, sparsity and seconds by length: the shape of Tables 1 and 7."""
    by_ppl, by_needle, by_time = read("ppl.csv"), read("needle.csv"), read("time.csv")
    rows = []
    for at in ((n, name) for n in LENGTHS for name in TITLES):
        dense, texts_of = (at[0], "f32"), by_ppl[at]
        took, value = median(by_time[at], "seconds_attention"), perplexity(texts_of)
        rows.append([
            TITLES[at[1]], at[0], f"{value:.3f}",
            more(value, perplexity(by_ppl[dense])), f"{mean(texts_of):.3f}",
            f"{mean(texts_of, 'sparsity_qk'):.3f}",
            found_of(by_needle[at]), f"{took:.2f}",
            f"{median(by_time[dense], 'seconds_attention') / took:.2f}x",
            f"{median(by_time[at], 'seconds'):.1f}"
        ])
    return markdown([
        "attention", "tokens", "perplexity", "over dense f32", "sparsity", "of Q.K",
        "needles found", "attention, s", "faster than dense f32", "prefill, s"
    ], rows)


def table_arithmetic():
    """What leaving out costs, and what int8 costs."""
    by_int8, by_f32 = read("ppl.csv"), read("ppl_f32.csv")
    base = perplexity(by_int8[TUNED_AT, "f32"])

    def cell(rows):
        return f"{perplexity(rows):.3f} ({more(perplexity(rows), base)})"

    rows = [["everything", cell(by_int8[TUNED_AT, "int8"]), f"{base:.3f}"]]
    rows += [[
        f"what ({pair}) keeps",
        cell(by_int8[TUNED_AT, path.name]),
        cell(by_f32[TUNED_AT, path.name])
    ] for pair, path in TUNED.items()]
    return markdown(["what is computed", "perplexity in int8", "in f32"], rows)


def table_parts():
    """What the mask leaves out, and what lambda does beside it: the shape of Table 6."""
    by, rows = read("ppl.csv"), []
    for n in LENGTHS:
        cells = []
        for path in TUNED.values():
            both, mask = mean(by[n, path.name]), mean(by[n, path.name], "sparsity_qk")
            cells.append(f"{mask:.3f}, {both - mask:.3f}, {both:.3f}")
        rows.append([n, *cells])
    return markdown(["tokens", *(f"({pair}): mask, lambda, both" for pair in TUNED)], rows, 0)


def table_verify():
    """Ours beside transformers, and beside tokenizers."""
    found = json.loads((HERE / "verify.json").read_text())
    tokens = found["tokens"]
    models = {f"{MODEL}, {key}": value for key, value in found[MODEL].items()}
    models |= {f"random, {key}": value for key, value in found["random weights"].items()}
    rows = [[
        name, x["tokens"], f"{x['largest_difference']:.1e}",
        f"{x['standard_deviation_of_logits']:.2f}", f"{100 * x['top_token_agreement']:.1f} %",
        f"{x['perplexity']:.4f}", f"{x['perplexity_theirs']:.4f}"
    ] for name, x in models.items()]
    table = markdown([
        "weights", "tokens", "largest difference of a logit", "standard deviation of logits",
        "same likeliest token", "perplexity, ours", "theirs"
    ], rows)
    return [
        f"Beside {found['reference']}:", "", *table, "",
        f"Beside {tokens['reference']}: {tokens['strings']} strings of many scripts and of the "
        "texts, "
        f"{tokens['tokens']} tokens, {tokens['strings_apart']} strings apart. "
        f"{len(tokens['bytes_without_token'])} "
        "bytes have no token in SmolLM2's vocabulary; texts with them are refused."
    ]


def readme(_args):
    machine = (HERE / "machine.txt").read_text().strip()
    tables = {"verify": table_verify(), "length": [*table_length(), "", f"Seconds: {machine}."],
              "arithmetic": table_arithmetic(), "parts": table_parts()}
    for name, lines in tables.items():
        fill_in(HERE / "README.md", name, lines)


def main():
    steps = {"tune": tune, "ppl": ppl, "needle": needle, "time": seconds, "peers": peers,
             "readme": readme}
    run_steps(__doc__, steps, WORK)


if __name__ == "__main__":
    run_main(main)
