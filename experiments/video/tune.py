#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Thresholds for every head of the video model, from sample 0 of its captures, in Hilbert's order,
at the paper's (0.05, 0.06) for video: params.json. An interrupted run goes on.
"""
import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from harness import ROOT, run_json, run_main  # noqa: E402
from sets import copied, entries, reordered, tensors  # noqa: E402

CAPTURES = ROOT / "build/video/captures/sample0"
WORK = ROOT / "build/video/hilbert"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparge", default=str(ROOT / "build/release/tools/sparge"),
                        help="the program")
    program, folders = parser.parse_args().sparge, []
    for entry in entries(CAPTURES):  # a manifest is of one file here
        folders.append(WORK / entry.path.stem)
        file = folders[-1] / entry.path.name
        done = folders[-1] / "manifest.json"  # it is written last
        if not done.exists() or done.stat().st_mtime < entry.path.stat().st_mtime:
            found, _ = reordered(entry, tensors(entry.path), "hilbert")
            copied(entry, found, file, dtype=None)
    bounds = "--l1", 0.05, "--l2", 0.06
    print(run_json(program, "tune", *folders, *bounds, "-o", HERE / "params.json"))


if __name__ == "__main__":
    run_main(main)
