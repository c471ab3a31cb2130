#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Is L1 the currency in which heads should trade? The curves of `sparge tune --by loss` beside the
relative L1 of the same heads, on captures with g.

    loss.py measure PARAMS.json CAPTURES...   mean L1 of every head at each value that the file
                                              has: loss.csv
    loss.py choose PARAMS.json DENSITY FOLDER thresholds of this density by each way, as files
    loss.py judge PPL.json...                 what sparge-lm ppl --kl says of them: loss_judged.csv
    loss.py readme PARAMS.json                the table of README.md here

PARAMS.json is what `sparge tune CAPTURES... --by loss --method submass -o` writes; CAPTURES are
folders; PPL.json is what -o of sparge-lm writes.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from errors import relative_l1  # noqa: E402
from harness import fill_in, markdown, read_csv, run_main, write_csv, write_text  # noqa: E402

DENSITIES = "0.5", "0.3", "0.2"
STEPS = 400  # between two values


# ---- Measuring --------------------------------------------------------------------------------

def measure(args):
    import sets  # and the package, which the other steps do without

    import sparge
    p = json.loads(Path(args.params).read_text())
    l1 = {}  # of all texts
    for entry in (entry for folder in args.captures for entry in sets.entries(folder)):
        found = sets.tensors(entry.path)
        want = sets.dense(entry, found)[0]
        for value in p["values"]:
            got = sparge.attention(*sets.wide(found), **sets.attends(entry), method=p["method"],
                                   method_params={"t": value, **p["params"]})
            for head, x in zip(entry.heads, relative_l1(got[0], want, entry.path)):
                l1.setdefault((entry.layer, head, value), []).append(x)
        print(entry.path, flush=True)
    write_csv(HERE / "loss.csv", [dict(layer=layer, head=head, t=t, l1=f"{np.mean(x):.4g}")
                                  for (layer, head, t), x in sorted(l1.items())])


# ---- Ways to choose ---------------------------------------------------------------------------

class Heads:
    """The curves of all heads, [heads][places], between the values that were measured: logarithms
    of t, losses and L1 are linear there, and densities."""

    def __init__(self, path):
        p = json.loads(Path(path).read_text())
        found = {(int(row["layer"]), int(row["head"]), float(row["t"])): float(row["l1"])
                 for row in read_csv(HERE / "loss.csv")}
        l1 = [[found[c["layer"], c["head"], t] for t in p["values"]] for c in p["curves"]]
        at = np.arange(len(p["values"]))
        places = np.linspace(0, at[-1], STEPS * at[-1] + 1)

        def between(x):
            return np.array([np.interp(places, at, row) for row in np.asarray(x)])

        self.document = p
        self.t = np.exp(np.interp(places, at, np.log(p["values"])))
        self.density = np.maximum.accumulate(between([c["density"] for c in p["curves"]]), 1)
        loss = np.array([c["loss"] for c in p["curves"]])
        self.loss = falling(np.exp(between(np.log(loss))))
        self.l1 = falling(np.exp(between(np.log(l1))))
        self.drawn = np.sqrt(self.loss * self.loss.mean(0))

    def at(self, x, places):
        return np.take_along_axis(x, places[:, None], 1)[:, 0]

    def reach(self, density, places_of, low, high):
        """By bisection of a number on which places depend, and with which the density falls."""
        for _ in range(200):
            middle = np.sqrt(low * high)
            places = places_of(middle)
            dense = self.at(self.density, places).mean() > density
            low, high = (middle, high) if dense else (low, middle)
        return places

    def ways(self, density):
        """Places of this mean density: {way: [heads]}."""
        count = len(self.density)
        return {
            "one t": np.full(count, np.abs(self.density.mean(0) - density).argmin()),
            "one density": np.abs(self.density - density).argmin(1),
            "one L1": self.reach(density, lambda x: (self.l1 > x).sum(1).clip(
                max=len(self.t) - 1), 1e-6, 1e3),
            "own loss": self.reach(density, lambda x: (self.loss + x * self.density).argmin(1),
                                   1e-30, 1e30),
            "by loss": self.reach(density, lambda x: (self.drawn + x * self.density).argmin(1),
                                  1e-30, 1e30),
        }


def falling(x):
    """What never rises from the sparsest to the densest."""
    return np.maximum.accumulate(x[:, ::-1], 1)[:, ::-1]


def ranks(x):
    """Of equals in their order: none are."""
    return x.argsort().argsort()


def correlation(x, y):
    """Spearman's."""
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def choose(args):
    heads = Heads(args.params)
    for way, places in heads.ways(float(args.density)).items():
        document = {**heads.document, "curves": [], "heads": [
            {**head, "min_mass": float(np.float32(t))}
            for head, t in zip(heads.document["heads"], heads.t[places])]}
        write_text(Path(args.folder) / f"{way.replace(' ', '_')}_{args.density}.json",
                   json.dumps(document) + "\n")


def judge(args):
    rows = []
    for row in (row for path in args.ppl for row in json.loads(Path(path).read_text())["rows"]):
        way, _, density = Path(row["attention"]).stem.rpartition("_")
        if density in DENSITIES:
            rows.append({"text": Path(row["text"]).stem, "density": density,
                         "way": way.replace("_", " "), **{
                             key: row[key] for key in ("tokens", "density_tokens", "perplexity",
                                                       "kl")}})
    write_csv(HERE / "loss_judged.csv", rows)


# ---- README.md --------------------------------------------------------------------------------

def divergence(judged, density, way):
    """In 0.01 nat, of each text."""
    return ", ".join(f"{100 * float(row['kl']):.2f}" for row in judged
                     if (row["density"], row["way"]) == (density, way))


def readme(args):
    heads, rows, judged = Heads(args.params), [], read_csv(HERE / "loss_judged.csv")
    for density in DENSITIES:
        for way, places in heads.ways(float(density)).items():
            loss, l1 = heads.at(heads.loss, places), heads.at(heads.l1, places)
            rows.append([f"{heads.at(heads.density, places).mean():.3f}", way,
                         f"{l1.mean():.3f}", f"{correlation(l1, loss):.2f}",
                         f"{100 * loss.sum():.2f}", divergence(judged, density, way)])
    fill_in(HERE / "README.md", "loss", markdown(
        ["density", "thresholds", "mean L1", "rank correlation of L1 and loss",
         "foretold loss, 0.01 nat", "KL on other texts, 0.01 nat"], rows, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    for step, names in ((measure, ["params", "captures"]), (readme, ["params"]), (judge, ["ppl"]),
                        (choose, ["params", "density", "folder"])):
        one = steps.add_parser(step.__name__)
        for name in names:
            one.add_argument(name, nargs="+" if name in ("captures", "ppl") else None)
        one.set_defaults(step=step)
    args = parser.parse_args()
    args.step(args)


run_main(main)
