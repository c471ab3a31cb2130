# SPDX-License-Identifier: Apache-2.0
"""again.py: a little of what stands in ppl.csv and needle.csv, here and in submass/, measured again
in a smoke run, where the weights and the text are here or can be fetched."""
import sys
from math import isclose
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

import model as weights  # noqa: E402
import texts  # noqa: E402
from harness import read_csv, run_json  # noqa: E402
from item import TOLERANCE  # noqa: E402
from names import MODEL, TUNED  # noqa: E402

LENGTH, ATTENTION = 1024, ["f32", TUNED["0.08, 0.09"]]
# Products of matrices are rounded as the processor's kernels do it. Where a score is rounded to
# int8 or decides on a block, the last bit of a product can change it: perplexity by 0.2 % between
# AVX2 and AVX-512. Dense instead of sparse would be 4 %.
ROUNDED = 0.01


def again(how, command, text, columns, *options, attention=ATTENTION, folder=HERE):
    """Rows of a command over a text, beside those committed in a folder: in words what was
    measured, and how they differ."""
    try:
        files = [weights.fetch(), *texts.fetch(texts.select([text]))]
    except SystemExit as why:
        return f"not measured: {why}", []
    found = run_json(how.lm, command, *files, "--length", LENGTH, "--attention",
                     ",".join(map(str, attention)), "--model", MODEL, "--sink", *options)["rows"]
    keys = [key for key in ("attention", "text", "tokens", "depth", "needle") if key in found[0]]
    committed = {tuple(row[key] for key in keys): row
                 for row in read_csv(folder / f"{command}.csv")}
    pairs = [(row, committed[tuple(str(row[key]) for key in keys)]) for row in found]
    differences = [
        f"{row['attention']}, {text}: {column} is {row[column]}, committed is {old[column]}"
        for row, old in pairs for column in columns
        if not isclose(float(old[column]), row[column], abs_tol=1e-9,
                       rel_tol=TOLERANCE if row["attention"] == "f32" else ROUNDED)
    ]
    names = ", ".join(row["attention"] for row in found)
    return f"measured again: {names} over {LENGTH} tokens of {text}", differences


def ppl(how):
    return again(how, "ppl", "stb_image", ["perplexity", "sparsity"])


def needle(how):
    """The one in the middle."""
    return again(how, "needle", "opticks", ["right", "sparsity"], "--depths", 1, "--needles", 1)


def submass(how):
    """The threshold on mass at half density, beside dense attention."""
    folder = HERE.parent / "submass"
    row = next(row for row in read_csv(folder / "ppl.csv") if row["rule"] == "submass, one t")
    return again(how, "ppl", "stb_image", ["perplexity", "density_tokens"],
                 attention=["f32", row["attention"]], folder=folder)
