#!/usr/bin/env python3
"""A language model on SpargeAttn: perplexity, needles, sparsity and seconds by length.

    experiments/lm/get_model.sh                  the weights
    python3 experiments/capture/texts.py         the texts: five to tune on, five to judge on
    run.py tune                                  thresholds at other bounds than experiments/tune has: params_*.json
    run.py ppl                                   perplexity of the five judging texts: ppl.csv
    run.py needle                                needles in a haystack: needle.csv
    run.py time                                  seconds, on a machine that is otherwise idle: time.csv
    run.py readme                                the tables of README.md here, from those files

Every step goes on where it was interrupted; what is unfinished lies in build/lm.
"""
import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

import model as weights  # noqa: E402
import texts  # noqa: E402
from harness import ROOT, fill_in, machine_line, read_csv, run_json, write_csv  # noqa: E402

WORK = ROOT / "build/lm"
NAME = "SmolLM2-135M-Instruct"
LENGTHS = [1024, 2048, 4096, 8192]
HAYSTACK, TIMED = "opticks", "opticks"
# Thresholds: of experiments/tune, with the bounds on every text or on their mean; and tighter ones.
MAIN = "0.08, 0.09"
TUNED = {MAIN: HERE.parent / "tune/model_worst.json", "0.08, 0.09 on the mean": HERE.parent / "tune/model_mean.json",
         "0.05, 0.06": HERE / "params_0.05_0.06.json"}
DENSE = ["f32", "int8"]
SHARED = ["--model", NAME, "--sink"]


def titles():
    """What a row's attention is called in the tables."""
    return {"f32": "dense, f32", "int8": "dense, int8"} | {
        path.name: f"SpargeAttn, ({pair})" for pair, path in TUNED.items()}


def paths(role):
    return texts.fetch(texts.select([role]))


def lm(args, command, *options):
    """A command of sparge-lm, whose progress is seen."""
    done = subprocess.run([args.sparge_lm, command, weights.fetch(), *map(str, options), *SHARED], stdout=subprocess.PIPE,
                          text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


# ---- The steps --------------------------------------------------------------------------------

def tune(args):
    """Captures of the tuning texts, every layer; then thresholds at the tighter bounds."""
    folders = []
    for path in paths("tune"):
        folders.append(WORK / "tune" / path.stem)
        folders[-1].parent.mkdir(parents=True, exist_ok=True)
        manifest = folders[-1] / "manifest.json"
        if not manifest.exists() or len(json.loads(manifest.read_text())["files"]) < 30:
            lm(args, "capture", path, "--length", 4096, "--attention", "f32", "-o", folders[-1])
    for pair, path in TUNED.items():
        if path.parent == HERE:
            l1, l2 = pair.split(", ")
            print(pair, run_json(args.sparge, "tune", *folders, "--causal", "--sink", "--l1", l1, "--l2", l2, "-o", path))


def attentions(pairs):
    return ",".join([*DENSE, *(str(TUNED[pair]) for pair in pairs)])


def ppl(args):
    lm(args, "ppl", *paths("judge"), "--length", ",".join(map(str, LENGTHS)), "--attention", attentions(TUNED),
       "-o", WORK / "ppl.json", "--csv", HERE / "ppl.csv")


def needle(args):
    """Every attention up to 4096 tokens; at 8192 dense and one sparse."""
    hay = texts.fetch(texts.select([HAYSTACK]))[0]
    common = [hay, "-o", WORK / "needle.json", "--csv", HERE / "needle.csv"]
    lm(args, "needle", *common, "--length", "1024,2048,4096", "--attention", attentions(TUNED))
    lm(args, "needle", *common, "--length", 8192, "--attention", f"f32,{TUNED[MAIN]}")


def seconds(args):
    text = texts.fetch(texts.select([TIMED]))[0]
    found = lm(args, "time", text, "--length", ",".join(map(str, LENGTHS)), "--attention", attentions(TUNED), "--repeat", 5,
               "-o", WORK / "time.json", "--csv", HERE / "time.csv")
    row = found["rows"][-1]
    (HERE / "machine.txt").write_text(f"{machine_line(row['threads'], row['isa'])}; products by {found['matmul']}\n")


# ---- The tables -------------------------------------------------------------------------------

def groups(rows):
    found = defaultdict(list)
    for row in rows:
        found[int(row["tokens"]), row["attention"]].append(row)
    return found


def mean(rows, key):
    return statistics.mean(float(r[key]) for r in rows)


def perplexity(rows):
    """Over all tokens of all texts."""
    tokens = sum(int(r["tokens"]) - 1 for r in rows)
    return 2.718281828459045 ** (sum(float(r["surprise"]) for r in rows) / tokens)


def table_length():
    """Perplexity, needles, sparsity and seconds by length: the shape of Tables 1 and 7."""
    by_ppl, by_needle, by_time = (groups(read_csv(HERE / f"{name}.csv")) for name in ("ppl", "needle", "time"))
    lines = ["| tokens | attention | perplexity | over dense f32 | sparsity | of Q.K | needles found | attention, s | over "
             "dense f32 | prefill, s |", "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for (tokens, name), rows in by_ppl.items():
        base, times = perplexity(by_ppl[tokens, "f32"]), by_time[tokens, name]
        found = by_needle.get((tokens, name))
        took, dense = (statistics.median(float(r["seconds_attention"]) for r in x) for x in (times, by_time[tokens, "f32"]))
        lines.append("| " + " | ".join([
            str(tokens), titles()[name], f"{perplexity(rows):.3f}", f"{100 * (perplexity(rows) / base - 1):+.2f} %",
            f"{mean(rows, 'sparsity'):.3f}", f"{mean(rows, 'sparsity_qk'):.3f}",
            f"{sum(int(r['right']) for r in found)} of {len(found)}" if found else "not run",
            f"{took:.2f}", f"{dense / took:.2f}x", f"{statistics.median(float(r['seconds']) for r in times):.1f}"]) + " |")
    return lines


def table_parts():
    """What the mask leaves out, and what lambda does beside it: the shape of Table 6."""
    lines = ["| tokens | " + " | ".join(f"({pair}): mask, lambda, both" for pair in TUNED) + " |", "|--:|" + "--:|" * len(TUNED)]
    by = groups(read_csv(HERE / "ppl.csv"))
    for tokens in LENGTHS:
        cells = []
        for path in TUNED.values():
            rows = by[tokens, path.name]
            both, mask = mean(rows, "sparsity"), mean(rows, "sparsity_qk")
            cells.append(f"{mask:.3f}, {both - mask:.3f}, {both:.3f}")
        lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    return lines


def table_layers():
    """Sparsity of each layer at (0.08, 0.09), and that of Q.K."""
    by = groups(read_csv(HERE / "ppl.csv"))
    name = TUNED[MAIN].name
    lines = ["| layer | " + " | ".join(f"{n} tokens: sparsity, of Q.K" for n in LENGTHS) + " |", "|--:|" + "--:|" * len(LENGTHS)]
    lists = {(n, key): list(zip(*(json.loads(r[key]) for r in by[n, name])))
             for n in LENGTHS for key in ("layers_sparsity", "layers_sparsity_qk")}
    for layer in range(len(lists[LENGTHS[0], "layers_sparsity"])):
        cells = [", ".join(f"{statistics.mean(lists[n, key][layer]):.3f}" for key in ("layers_sparsity", "layers_sparsity_qk"))
                 for n in LENGTHS]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return lines


def table_needles():
    """Needles found of those hidden, by depth."""
    rows = read_csv(HERE / "needle.csv")
    depths = sorted({float(r["depth"]) for r in rows})
    lines = ["| tokens | attention | " + " | ".join(f"depth {d:g}" for d in depths) + " | sparsity |",
             "|--:|---|" + "--:|" * (len(depths) + 1)]
    for (tokens, name), found in sorted(groups(rows).items(), key=lambda x: (x[0][0], list(titles()).index(x[0][1]))):
        cells = []
        for depth in depths:
            here = [int(r["right"]) for r in found if float(r["depth"]) == depth]
            cells.append(f"{sum(here)} of {len(here)}")
        lines.append(f"| {tokens} | {titles()[name]} | " + " | ".join(cells) + f" | {mean(found, 'sparsity'):.3f} |")
    return lines


def table_verify():
    """Ours beside transformers, and beside tokenizers."""
    found = json.loads((HERE / "verify.json").read_text())
    tokens = found["tokens"]
    lines = [f"Beside {found['reference']}:", "",
             "| weights | tokens | largest difference of a logit | standard deviation of logits | same likeliest token | "
             "perplexity, ours | theirs |", "|---|--:|--:|--:|--:|--:|--:|"]
    models = {f"{NAME}, {key}": value for key, value in found[NAME].items()}
    models |= {f"random, {key}": value for key, value in found["random weights"].items()}
    for name, x in models.items():
        lines.append(f"| {name} | {x['tokens']} | {x['largest_difference']:.1e} | {x['standard_deviation_of_logits']:.2f} | "
                     f"{100 * x['top_token_agreement']:.1f} % | {x['perplexity']:.4f} | {x['perplexity_theirs']:.4f} |")
    return lines + ["", f"Beside {tokens['reference']}: {tokens['strings']} strings of many scripts and of the texts, "
                    f"{tokens['tokens']} tokens, {tokens['strings_apart']} strings apart. {len(tokens['bytes_without_token'])} "
                    "bytes have no token in SmolLM2's vocabulary; texts with them are refused."]


def table_short():
    """For the README at the root."""
    by_ppl, by_needle, by_time = (groups(read_csv(HERE / f"{name}.csv")) for name in ("ppl", "needle", "time"))
    lines = ["| tokens | perplexity: dense f32, dense int8, SpargeAttn | sparsity | needles found: dense, SpargeAttn | attention "
             "over dense f32 |", "|--:|--:|--:|--:|--:|"]
    for tokens in LENGTHS:
        name = TUNED[MAIN].name
        values = ", ".join(f"{perplexity(by_ppl[tokens, x]):.3f}" for x in (*DENSE, name))
        found = ", ".join(f"{sum(int(r['right']) for r in by_needle[tokens, x])} of {len(by_needle[tokens, x])}"
                          for x in ("f32", name))
        dense, took = (statistics.median(float(r["seconds_attention"]) for r in by_time[tokens, x]) for x in ("f32", name))
        lines.append(f"| {tokens} | {values} | {mean(by_ppl[tokens, name], 'sparsity'):.3f} | {found} | {dense / took:.2f}x |")
    return lines


def readme(_args):
    machine = (HERE / "machine.txt").read_text().strip()
    for name, lines in [("verify", table_verify()), ("length", table_length() + ["", f"Seconds: {machine}."]), ("parts", table_parts()),
                        ("layers", table_layers()), ("needles", table_needles())]:
        fill_in(HERE / "README.md", name, lines)
    fill_in(ROOT / "README.md", "lm", table_short())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparge", default=str(ROOT / "build/release/tools/sparge"), help="the program")
    parser.add_argument("--sparge-lm", default=str(ROOT / "build/release/experiments/lm/sparge-lm"), help="the program")
    steps = {"tune": tune, "ppl": ppl, "needle": needle, "time": seconds, "readme": readme}
    parser.add_argument("step", choices=steps)
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    steps[args.step](args)


if __name__ == "__main__":
    main()
