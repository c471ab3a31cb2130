"""patches.py: attention of the patches of a clip to each other, as in non-local means: a capture that needs no model,
so that nothing stands between a video and its blocks."""
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from harness import ROOT  # noqa: E402
from item import Job  # noqa: E402
from sets import entries  # noqa: E402

FRAMES, PATCH = 13, 8  # and pixels: the grid of the video model
# Of clips.py: a camera that stands still, and one that moves; the frames to tune on begin at 0, those to measure here.
FIRST = {"vtest": 400, "cup": 100}


def file_of(clip):
    return ROOT / f"build/video/{clip}.npy"


def jobs(seconds):
    return [Job({"source": "patches", "sample": clip, "layer": 0, "step": 0}, seconds, needs=[file_of(clip)])
            for clip in FIRST]


def capture(clip, first, folder):
    """Of one head: q, k and v are the patches of 13 frames, in their pixels less the mean, over the deviation."""
    frames = np.load(file_of(clip), mmap_mode="r")[first:first + FRAMES].astype(np.float32)
    _, height, width, colours = frames.shape
    grid = FRAMES, height // PATCH, width // PATCH
    pixels = ((frames - frames.mean()) / frames.std()).reshape(grid[0], grid[1], PATCH, grid[2], PATCH, colours)
    tokens = np.ascontiguousarray(pixels.transpose(0, 1, 3, 2, 4, 5)).reshape(1, 1, -1, PATCH * PATCH * colours)
    folder.mkdir()
    save_file({name: tokens for name in "qkv"}, folder / "patches.safetensors")
    (folder / "manifest.json").write_text(json.dumps({
        "model": "patches", "sample": f"{clip}, from frame {first}", "causal": False, "grid": grid,
        "files": [{"file": "patches.safetensors", "layer": 0, "query_heads": [0]}]}))
    return entries(folder)[0]
