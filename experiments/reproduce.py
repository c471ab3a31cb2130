#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Regenerates the paper's tables and figures: runs experiments/*/run.py, draws paper_figs/, writes
paper_figs/report.html.

A smoke run measures some rows of every item again and compares them with those that are committed.
A full run measures all and replaces them. Both can be interrupted: the same command goes on.
"""
import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from harness import ROOT, run_main, run_program  # noqa: E402
from items import ITEMS, MISSING  # noqa: E402

SOURCES = {  # what --full needs first: about how many seconds it takes, and how it comes
    "weights": (60, [["experiments/lm/get_model.sh"], ["experiments/capture/texts.py"]]),
    "lm": (7000, [["experiments/lm/run.py", "--sparge", "{sparge}", "--sparge-lm", "{lm}", step]
                  for step in ("ppl", "needle", "time")]),
    "losses": (10400, [["experiments/submass/measure.py", "--sparge", "{sparge}", "--sparge-lm",
                        "{lm}", step] for step in ("tune", "ppl", "needle", "time")]),
    "clips": (20, [["experiments/video/clips.py", "vtest", "cup"]]),
    "steps": (60, [["experiments/video/capture.py", "--grid", "13", "14", "20", "--layers", "0-5",
                    "--steps", "1,5,9", "--samples", "0", "--out", "build/video/small"]]),
    "field": (10000, [["experiments/frontier/model.py", "--sparge", "{sparge}", "--sparge-lm",
                       "{lm}", step]
                      for step in ("settings", "ppl", "settle", "ppl", "needle", "front")]),
    "video": (3500, [["experiments/video/capture.py"],
                     ["experiments/video/tune.py", "--sparge", "{sparge}"]]),
}


def chosen(lists):
    """The items of the names in these lists, with commas between them; or all where there is no
    list."""
    known = {name for item in ITEMS for name in (item.folder, *item.covers)}
    names = {name.strip() for text in lists for name in text.split(",")}
    for name in names - known:
        raise ValueError(f"nothing is called '{name}'; --list says what is")
    return [item for item in ITEMS if not lists or {item.folder, *item.covers} & names]


def table(items, sources):
    """What there is, about how many minutes it takes, and what a full run makes first."""
    line = "{:14} {:32} {:>6} {:>6}  {:13} {}".format
    print(line("item", "covers", "smoke,", "full,", "full needs", "what"))
    print(line("", "", "min", "min", "", ""))
    for item in items:
        print(
            line(item.folder, ", ".join(item.covers), f"{item.smoke / 60:.1f}",
                 f"{item.full / 60:.1f}", ", ".join(item.needs), item.what or item.ours))
    for name in sources:
        print(line(name, "(needed by a full run alone)", "", f"{SOURCES[name][0] / 60:.1f}", "",
                   ", ".join(dict.fromkeys(words[0] for words in SOURCES[name][1]))))


def run(*command):
    """Runs one of our scripts; its exit status."""
    script = [] if str(command[0]).endswith(".sh") else [sys.executable]
    return run_program([*script, *command], cwd=ROOT).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--smoke", action="store_true",
                        help="some rows, compared with the committed ones (the default)")
    parser.add_argument("--full", action="store_true",
                        help="all rows, which replace the committed ones")
    parser.add_argument("--only", action="append", default=[], metavar="NAME,...",
                        help="items, by table, figure or folder")
    parser.add_argument("--list", action="store_true",
                        help="what there is, about how long it takes, and what it needs")
    parser.add_argument("--sparge", default=str(ROOT / "build/release/tools/sparge"),
                        help="the program")
    parser.add_argument("--sparge-lm", default=str(ROOT / "build/release/experiments/lm/sparge-lm"),
                        help="the program")
    args = parser.parse_args()
    if args.smoke and args.full:
        parser.error("--smoke and --full exclude each other")
    try:
        items = chosen(args.only)
    except ValueError as error:
        parser.error(error)
    sources = [name for name in SOURCES if any(name in item.needs for item in items)]
    if args.list:
        table(items, sources)
        if not args.only:
            print("\nNot measured, for want of the paper's models:",
                  *(what for what, *_ in MISSING), sep="\n  ")
        return 0
    failed = []
    start = time.monotonic()
    programs = ["--sparge", args.sparge, "--sparge-lm", args.sparge_lm]
    left = sum(item.full for item in items) + sum(SOURCES[name][0] for name in sources)
    if args.full:
        for name in sources:
            print(f"{name}: about {left / 60:.0f} minutes left", flush=True)
            left -= SOURCES[name][0]
            for command in SOURCES[name][1]:
                if run(*(word.format(sparge=args.sparge, lm=args.sparge_lm)
                         for word in command)) != 0:
                    sys.exit(f"reproduce.py: {command[0]} failed")
    for n, item in enumerate(items):
        rest = f", about {left / 60:.0f} minutes left" if args.full else ""
        print(f"[{n + 1}/{len(items)}] {item.folder}: {item.what or item.ours}{rest}", flush=True)
        if run(HERE / item.folder / "run.py", *programs, *["--full"] * args.full) != 0:
            failed.append(item.folder)
        left -= item.full
    for script in ("figures.py", "report.py"):
        if run(ROOT / "paper_figs" / script) != 0:
            failed.append(script)
    print(f"{len(items)} items in {time.monotonic() - start:.0f} s"
          + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
