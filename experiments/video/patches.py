# SPDX-License-Identifier: Apache-2.0
"""patches.py: attention of the patches of a clip to each other, as in non-local means: a capture
that needs no model, so that nothing stands between a video and its blocks."""
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

from harness import ROOT  # noqa: E402
from item import Job  # noqa: E402
from sets import Entry  # noqa: E402

FRAMES, PATCH = 13, 8  # and pixels: the grid of the video model
# Of clips.py: a camera that stands still, and one that moves; the frames to tune on begin at 0,
# those to measure here.
FIRST = {"vtest": 400, "cup": 100}


def file_of(clip):
    return ROOT / f"build/video/{clip}.npy"


def jobs(seconds):
    return [
        Job({"source": "patches", "sample": clip, "layer": 0, "step": 0}, seconds,
            needs=[file_of(clip)]) for clip in FIRST
    ]


def capture(clip, first):
    """An entry and its tensors, of one head: q, k and v are the patches of 13 frames, in their
    pixels less the mean, over the deviation."""
    frames = np.load(file_of(clip), mmap_mode="r")[first:first + FRAMES].astype(np.float32)
    _, height, width, colours = frames.shape
    grid = FRAMES, height // PATCH, width // PATCH
    pixels = ((frames - frames.mean()) / frames.std()).reshape(grid[0], grid[1], PATCH, grid[2],
                                                               PATCH, colours)
    tokens = pixels.transpose(0, 1, 3, 2, 4, 5).reshape(1, 1, -1, PATCH * PATCH * colours)
    entry = Entry(file_of(clip), "patches", f"{clip}, from frame {first}", layer=0,
                  step=0, heads=(0, ), grid=grid, text=(0, 0), causal=False, scale=None)
    return entry, {name: tokens for name in "qkv"}
