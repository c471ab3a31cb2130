# SPDX-License-Identifier: Apache-2.0
"""captured.py: jobs over the captures of the video model: the small ones that are committed, the
whole ones in build/, and, in their place, those of a user."""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from harness import ROOT  # noqa: E402
from item import Job  # noqa: E402
from sets import entries  # noqa: E402

PARAMS = HERE / "params.json"
FOLDERS = {"committed": HERE / "capture/sample0", "whole": ROOT / "build/video/captures"}


def entries_of(key, how):
    """The files that a job is about: one, or several that have other heads of the same."""
    folder = how.captures or FOLDERS[key["source"]] / (key["sample"]
                                                       if key["source"] == "whole" else "")
    return [entry for entry in entries(folder) if entry.at.items() <= key.items()]


def of_folder(source, folder, **how):
    found = {}
    for entry in entries(folder):
        found.setdefault(tuple(entry.at.items()), []).append(entry.path)
    return [
        Job({"source": source} | dict(at), needs=[*paths, PARAMS], **how)
        for at, paths in found.items()
    ]


def committed(seconds):
    return of_folder("committed", FOLDERS["committed"], seconds=seconds, smoke=True)


def whole(samples, layers, steps, seconds):
    """These parts of the whole captures, whether they are there or not."""
    return [
        Job({"source": "whole", "sample": f"sample{n}", "layer": layer, "step": step}, seconds,
            needs=[
                FOLDERS["whole"] / f"sample{n}/layer{layer:02}_step{step:03}.safetensors", PARAMS
            ]) for n in samples for layer in layers for step in steps
    ]


def of_user(folder):
    return of_folder(str(folder), folder)
