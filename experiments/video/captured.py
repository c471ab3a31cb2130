"""captured.py: jobs over the captures of the video model: the small ones that are committed, the whole ones in build/,
and, in their place, those of a user."""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from harness import ROOT  # noqa: E402
from item import Job  # noqa: E402
from sets import entries  # noqa: E402

PARAMS = HERE / "params.json"
FOLDERS = {"committed": HERE / "capture/sample0", "whole": ROOT / "build/video/captures"}


def entry_of(key):
    """The file that a job is about."""
    folder = FOLDERS.get(key["source"], Path(key["source"]))
    folder = folder / key["sample"] if key["source"] == "whole" else folder
    return next(entry for entry in entries(folder) if entry.at.items() <= key.items())


def of_folder(source, folder, **how):
    return [Job({"source": source} | entry.at, **how) for entry in entries(folder)]


def committed(seconds):
    return of_folder("committed", FOLDERS["committed"], seconds=seconds, smoke=True)


def whole(samples, layers, steps, seconds):
    """These parts of the whole captures, whether they are there or not."""
    return [Job({"source": "whole", "sample": f"sample{n}", "layer": layer, "step": step}, seconds,
                needs=[FOLDERS["whole"] / f"sample{n}/layer{layer:02}_step{step:03}.safetensors"])
            for n in samples for layer in layers for step in steps]


def of_user(folder):
    return of_folder(str(folder), folder)
