#!/usr/bin/env python3
"""Figs 14 to 17: sparsity by layer, denoising step, sample and head, over the captures of the video model.

Thresholds as in ../table9; where a set has a grid its tokens are put into Hilbert's order first, as the paper has them.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from harness import ROOT  # noqa: E402
from item import Job, run  # noqa: E402
from sets import entries, hilbert, options_of, reordered  # noqa: E402

VIDEO = HERE.parent / "video"
WHOLE = ROOT / "build/video/captures"
SAMPLES, LAYERS, STEPS = range(3), range(6), [0, 2, 4, 6, 8, 9]


def folder_of(key):
    return (VIDEO / "capture/sample0" if key["source"] == "committed" else WHOLE / key["sample"] if key["source"] == "whole"
            else Path(key["source"]))


def measure(key, how):
    """A row for each query head."""
    entry = next(e for e in entries(folder_of(key)) if e.at.items() <= key.items())
    index = hilbert(how.sparge, entry, how.folder)
    file = entry.path if index is None else reordered(entry, index, how.folder / "mixed.safetensors")
    found = how.sparge("run", file, *options_of(how.params or VIDEO / "params.json"))
    return [{"head": head, "sparsity": f"{s:.6f}"} for head, s in zip(entry.heads, found["sparsity_per_head"])]


def jobs(source, folder, **how):
    return [Job({"source": source} | entry.at, **how) for entry in entries(folder)]


JOBS = jobs("committed", VIDEO / "capture/sample0", smoke=True)
JOBS += [Job({"source": "whole", "sample": f"sample{n}", "layer": layer, "step": step}, 6,
             needs=[WHOLE / f"sample{n}/layer{layer:02}_step{step:03}.safetensors"])
         for n in SAMPLES for layer in LAYERS for step in STEPS]

if __name__ == "__main__":
    run(__file__, JOBS, measure, captures=lambda folder: jobs(str(folder), folder))
