#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 under every method at equal density, with sparge-lm.

    model.py settings [--only METHODS]   the value of each method at each density: settings.csv
    model.py ppl [--only METHODS]        perplexity, KL and density of two texts: ppl.csv
    model.py settle                      where a run's density is not what was asked for, other
                                         values; then ppl and needle again
    model.py needle [--only METHODS]     ten needles: needle.csv
    model.py front                       what is on the front: five texts at 0.3 too, and 8192
                                         tokens
    model.py readme                      the tables of README.md here

Every step goes on where it was interrupted; what is unfinished lies in build/frontier. METHODS,
with semicolons between them, are a shard.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lm"), str(HERE.parent / "capture")]

from harness import ROOT, machine_line, run_main, write_csv, write_text  # noqa: E402
from program import TUNED_AT, captured, listed, lm, paths, run_steps  # noqa: E402
from tables import DENSE, METHODS, TEXTS, density, front, readme, rows_of  # noqa: E402

WORK = ROOT / "build/frontier"
SETTINGS = HERE / "settings.csv"
NEEDLES = "opticks"
DENSITIES = [0.5, 0.2]
LONG = 8192
AT_ONCE = 16  # attentions that sparge-lm takes
KEYS = "method", "text", "tokens", "asked"
COLUMNS = ["method", "asked", "text", "tokens", "attention", "text_sha256", "surprise",
           "perplexity", "kl", "depth", "needle", "number", "right", "density_tokens", "sparsity",
           "sparsity_qk", "seconds", "seconds_attention", "seconds_prepare", "isa", "threads"]


# ---- One value for the model ------------------------------------------------------------------

def settings():
    return {tuple(row[key] for key in KEYS): row for row in rows_of("settings")}


def search(calls, name, asked, tokens):
    """First over each third layer, then, where that is not near enough, over all of them."""
    from field import REACHED, Way, density_at, find  # and the package
    way, states = Way(name), {}  # what a layer's first call has calibrated stays
    value, _ = find(way, lambda x: density_at(calls[::3], way, x, states), asked, tokens)
    density = density_at(calls, way, value, states)
    if abs(density - asked) > REACHED / 4:
        value, density = find(way, lambda x: density_at(calls, way, x, states), asked, tokens)
    return {"value": f"{value:.9g}", "density": f"{density:.6f}",
            "reached": int(abs(density - asked) <= REACHED), "attention": way.word(value)}


def tune(args, methods, texts, tokens, densities):
    """On the text's own dense attention, which is more than a method can know before it runs."""
    for text in texts:
        keys = [(name, text, str(tokens), f"{asked:g}") for name in methods for asked in densities]
        missing = [key for key in keys if key not in settings()]
        if not missing:
            continue
        from field import calls_of
        calls = calls_of(captured(args, *paths(text), tokens))
        for key in missing:
            found = dict(zip(KEYS, key)) | search(calls, key[0], float(key[3]), tokens)
            print(*found.values(), flush=True)
            write_csv(SETTINGS, [*rows_of("settings"), found])


# ---- sparge-lm --------------------------------------------------------------------------------

def measure(args, command, methods, texts, tokens, densities, *options):
    """Rows of all methods at some densities, and of dense attention."""
    out = HERE / f"{command}.csv"
    for text in texts:
        words = {word: {"method": word, "asked": ""} for word in DENSE}
        for asked in densities:
            for name in methods:
                found = settings().get((name, text, str(tokens), f"{asked:g}"))
                if found and found["reached"] == "1":
                    words[found["attention"]] = {"method": name, "asked": found["asked"]}
        done = {row["attention"] for row in rows_of(command)
                if (Path(row["text"]).stem, row["tokens"]) == (text, str(tokens))}
        missing = [word for word in words if word not in done]
        for some in (missing[n:n + AT_ONCE] for n in range(0, len(missing), AT_ONCE)):
            found = lm(args, command, *paths(text), "--length", tokens, "--attention",
                       listed(some), *options, "-o",
                       WORK / f"{command}_{text}_{tokens}.json")["rows"]
            write_csv(out, [*rows_of(command), *(words[row["attention"]] | row for row in found
                                           if row["attention"] in some)], COLUMNS)
    write_text(HERE / "machine.txt", f"{machine_line(args.sparge)}\n")


def find_settings(args):
    tune(args, args.only, TEXTS, TUNED_AT, DENSITIES)


def ppl(args):
    measure(args, "ppl", args.only, TEXTS, TUNED_AT, DENSITIES, "--kl")


def off(row):
    """By how much a run's density is not what was asked for. That of BLASST is told in blocks, and
    was sought in pairs of tokens."""
    known = row["asked"] and not row["method"].startswith("blasst")
    return density(row) - float(row["asked"]) if known else 0.0


def settle(args):
    """Dense attention is not the attention of the run: where that moves the density by more than is
    allowed, the value is sought for a density as far on the other side."""
    from field import REACHED, calls_of
    again = [row for row in rows_of("ppl") if abs(off(row)) > REACHED]
    for row in again:
        text, asked = Path(row["text"]).stem, float(row["asked"])
        calls = calls_of(captured(args, *paths(text), int(row["tokens"])))
        found = search(calls, row["method"], asked - off(row), int(row["tokens"]))
        key = row["method"], text, row["tokens"], row["asked"]
        print(*key, off(row), *found.values(), flush=True)
        write_csv(SETTINGS, [old | found if tuple(old[k] for k in KEYS) == key else old
                             for old in rows_of("settings")])
        for name in "ppl", "needle":
            rows = rows_of(name)
            left = [x for x in rows if (x["attention"], Path(x["text"]).stem) !=
                    (row["attention"], text)]
            if len(left) < len(rows):
                write_csv(HERE / f"{name}.csv", left, COLUMNS)


def needle(args):
    """Two at each of five depths."""
    measure(args, "needle", args.only, [NEEDLES], TUNED_AT, DENSITIES, "--depths", 5, "--needles",
            2)


def of_front(args):
    every, densities = [path.stem for path in paths("judge")], [0.5, 0.3, 0.2]
    for texts, tokens in ((every, TUNED_AT), (TEXTS, LONG)):
        tune(args, front(), texts, tokens, densities)
        measure(args, "ppl", front(), texts, tokens, densities, "--kl")
    tune(args, front(), [NEEDLES], TUNED_AT, densities)
    measure(args, "needle", front(), [NEEDLES], TUNED_AT, densities, "--depths", 5, "--needles", 2)


def shard(parser):
    parser.add_argument("--only", type=lambda text: text.split(";"), default=METHODS,
                        help="these methods, with semicolons between them")


def main():
    steps = {"settings": find_settings, "ppl": ppl, "settle": settle, "needle": needle,
             "front": of_front, "readme": lambda _: readme()}
    run_steps(__doc__, steps, WORK, shard)


if __name__ == "__main__":
    run_main(main)
