# SPDX-License-Identifier: Apache-2.0
"""program.py: sparge-lm, and what it is given: the weights, texts by name, captures of them."""
import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

import model as weights  # noqa: E402
import texts  # noqa: E402
from harness import ROOT, run_program  # noqa: E402
from names import MODEL  # noqa: E402

TUNED_AT = 4096  # tokens
SHARED = ["--model", MODEL, "--sink"]
PROGRAMS = {"sparge": "build/release/tools/sparge",
            "sparge-lm": "build/release/experiments/lm/sparge-lm"}


def run_steps(doc, steps, work, more=lambda parser: None):
    """main() of a script that measures by sparge-lm, a step at a time. more: adds arguments."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for program, path in PROGRAMS.items():
        parser.add_argument(f"--{program}", default=str(ROOT / path), help="the program")
    more(parser)
    parser.add_argument("step", choices=steps)
    args = parser.parse_args()
    work.mkdir(parents=True, exist_ok=True)
    steps[args.step](args)


def paths(*names):
    """Of texts of experiments/capture/texts.csv, or of all of a role."""
    return texts.fetch(texts.select(list(names)))


def listed(items):
    return ",".join(map(str, items))


def lm(args, command, *options):
    """A command of sparge-lm, whose progress is seen."""
    done = run_program(
        [args.sparge_lm, command, weights.fetch(), *options, *SHARED], stdout=subprocess.PIPE,
        text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def captured(args, path, tokens=TUNED_AT):
    """The folder with q, k and v of a text, every layer, under dense attention in f32."""
    folder = ROOT / "build/lm/tune" / (path.stem if tokens == TUNED_AT else f"{path.stem}_{tokens}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.json"
    if not manifest.exists() or len(json.loads(manifest.read_text())["files"]) < 30:
        lm(args, "capture", path, "--length", tokens, "--attention", "f32", "-o", folder)
    return folder
