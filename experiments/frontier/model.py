#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 under every method at equal density, with sparge-lm.

    model.py settings [--only METHOD,...]   the value of each method at each density: settings.csv
    model.py ppl [--only ...]               perplexity, KL and density of two texts: ppl.csv
    model.py needle [--only ...]            ten needles: needle.csv
    model.py front                          the same of what is on the front, at 0.3 too, on five
                                            texts, and at 8192 tokens
    model.py readme                         the tables and sentences of README.md here

Every step goes on where it was interrupted; what is unfinished lies in build/frontier. --only
names shards: the files of methods are their own, and the tables have what is there.
"""
import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lm"), str(HERE.parent / "capture")]

from field import REACHED, TEXT, Way, calls_of, density_at, find  # noqa: E402
from harness import ROOT, read_csv, run_main, write_csv, write_text, machine_line  # noqa: E402
from program import TUNED_AT, captured, lm, paths  # noqa: E402

WORK = ROOT / "build/frontier"
SETTINGS = HERE / "settings.csv"
TEXTS = ["opticks", "hashbrown_raw"]
NEEDLES = "opticks"
DENSITIES = [0.5, 0.2]
THETAS = [f"spargeattn:theta={theta},sink=1" for theta in (0.2, 0.4, 0.6)]
METHODS = [name for name in [*TEXT, *THETAS] if name not in ("blockrank", )]  # has no documents
DENSE = ["f32", "int8"]


# ---- One value for the model ------------------------------------------------------------------

def settings():
    return read_csv(SETTINGS) if SETTINGS.exists() else []


def known(rows, name, text, asked):
    return next((row for row in rows if (row["method"], row["text"], row["asked"]) ==
                 (name, text, f"{asked:g}")), None)


def search(calls, name, asked):
    """First over each third layer, then over all of them, beginning where that ended."""
    way = Way(name)
    value, _ = find(way, lambda x: density_at(calls[::3], way, x), asked, TUNED_AT)
    density = density_at(calls, way, value)
    if abs(density - asked) > REACHED / 4:
        value, density = find(way, lambda x: density_at(calls, way, x), asked, TUNED_AT)
    return {"value": f"{value:.9g}", "density": f"{density:.6f}",
            "reached": int(abs(density - asked) <= REACHED)}


def tune(args, texts=TEXTS, densities=DENSITIES):
    """On the text's own dense attention, which is more than a method can know before it runs."""
    for text in texts:
        missing = [(name, asked) for name in args.only for asked in densities
                   if not known(settings(), name, text, asked)]
        if not missing:
            continue
        calls = calls_of(captured(args, *paths(text)))
        for name, asked in missing:
            found = search(calls, name, asked)
            print(text, name, asked, found, flush=True)
            rows = [*settings(), {"method": name, "text": text, "asked": f"{asked:g}"} | found]
            write_csv(SETTINGS, rows)


# ---- sparge-lm --------------------------------------------------------------------------------

COLUMNS = ["method", "asked", "text", "tokens", "attention", "text_sha256", "surprise",
           "perplexity", "kl", "depth", "needle", "number", "right", "density_tokens", "sparsity",
           "sparsity_qk", "seconds", "seconds_attention", "seconds_prepare", "isa", "threads"]


def measure(args, command, texts, tokens, asked, *options):
    """Rows of all methods at some densities. A method's density is that of each text."""
    out = HERE / f"{command}.csv"
    for text in texts:
        words = {word: {"method": word, "asked": ""} for word in DENSE}
        words |= {Way(name).word(float(row["value"])): {"method": name, "asked": row["asked"]}
                  for name in args.only for at in asked
                  if (row := known(settings(), name, text, at)) and row["reached"] == "1"}
        for word, told in words.items():
            before = read_csv(out) if out.exists() else []
            done = [row for row in before if (row["attention"], Path(row["text"]).stem,
                                              row["tokens"]) == (word, text, str(tokens))]
            if done:
                continue
            file = WORK / f"{command}_{text}_{tokens}.json"
            found = lm(args, command, *paths(text), "--length", tokens, "--attention", word,
                       *options, "-o", file)["rows"]
            new = [told | row for row in found
                   if row["attention"] == word and row["tokens"] == tokens]
            write_csv(out, [*before, *new], COLUMNS)
    write_text(HERE / "machine.txt", f"{machine_line(args.sparge)}\n")


def ppl(args):
    measure(args, "ppl", TEXTS, TUNED_AT, DENSITIES, "--kl")


def needle(args):
    """Two at each of five depths."""
    measure(args, "needle", [NEEDLES], TUNED_AT, DENSITIES, "--depths", 5, "--needles", 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparge", default=str(ROOT / "build/release/tools/sparge"),
                        help="the program")
    parser.add_argument("--sparge-lm", default=str(ROOT / "build/release/experiments/lm/sparge-lm"),
                        help="the program")
    parser.add_argument("--only", type=lambda text: text.split(";"), default=METHODS,
                        help="these methods, with semicolons between them")
    steps = {"settings": tune, "ppl": ppl, "needle": needle}
    parser.add_argument("step", choices=steps)
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    steps[args.step](args)


if __name__ == "__main__":
    run_main(main)
