#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Record q, k and v of every attention while the model of weights.safetensors makes a clip.

    capture.py                     three samples of the whole grid, all layers and heads: 2 GB in
                                   build/video/captures
    capture.py --small             the capture that is committed, in capture/

A sample is made in ten Euler steps, from the noise of its seed or, with --start below 1, from a
clip of the held-out frames that is noised to this level. SAMPLE/layerLL_stepSSS.safetensors and
SAMPLE/manifest.json are written by sparge.capture; SAMPLE/frames.png shows what came out. A sample
that is whole is not made again.
"""
import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import clips  # noqa: E402
import harness  # noqa: E402, F401  (finds sparge)
from model import GRID, PATCH, Config, VideoModel, to_video  # noqa: E402
from sparge.capture import Recorder  # noqa: E402
from train import cut  # noqa: E402

WEIGHTS = HERE / "weights.safetensors"
EULER_STEPS = 10
SMALL = {
    "grid": [13, 14, 20], "layers": [1, 4], "steps": [5], "samples": [0], "heads": [0], "out":
    HERE / "capture"
}


def load():
    """The model, and what is written of it in weights.json."""
    about = json.loads(WEIGHTS.with_suffix(".json").read_text())
    if hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() != about["sha256"]:
        sys.exit(f"capture: {WEIGHTS.name} is not the file that {WEIGHTS.stem}.json describes")
    model = VideoModel(Config(**about["config"])).eval()
    model.load_state_dict({name: x.float() for name, x in load_file(WEIGHTS).items()})
    return model, about


def begin(sample, grid, origin, start, about):
    """The tokens that a sample begins with: noise, and below level 1 a part of the held-out
    frames."""
    noise = torch.randn(1, grid[0] * grid[1] * grid[2], PATCH * PATCH * 3,
                        generator=torch.Generator().manual_seed(sample))
    if start == 1:
        return noise
    frames = clips.load("vtest")[about["frames"]:]
    first = 4 * grid[0] * sample % (len(frames) - grid[0])
    clip = cut(frames, grid, origin, first, about["mean"], about["std"])
    return clip * (1 - start) + noise * start


@torch.inference_mode()
def make(model, tokens, grid, origin, start):
    """Euler steps from level start to 0; prints how long they take."""
    levels = torch.linspace(start, 0, EULER_STEPS + 1)
    for step, (level, after) in enumerate(zip(levels, levels[1:])):
        seconds = time.perf_counter()
        seen = model(tokens, timestep=level.reshape(1), grid=grid, origin=origin)
        tokens = seen + (tokens - seen) * (after / level)
        print(f"  step {step}, level {level:.2f}: {time.perf_counter() - seconds:.1f} s",
              flush=True)
    return tokens


def picture(path, tokens, grid, about):
    """The first, middle and last frame, side by side."""
    video = to_video(tokens, grid)[0] * about["std"] + about["mean"]
    frames = [video[n] for n in sorted({0, grid[0] // 2, grid[0] - 1})]
    Image.fromarray(torch.cat(frames, dim=1).clamp(0, 255).byte().numpy()).save(path)


def whole(folder, args):
    """Whether the sample's files are all there."""
    path = folder / "manifest.json"
    listed = {entry["file"]
              for entry in json.loads(path.read_text())["files"]} if path.exists() else set()
    wanted = {
        f"layer{layer:02d}_step{step:03d}.safetensors" for layer in args.layers
        for step in args.steps
    }
    return wanted <= listed and all((folder / file).exists() for file in wanted)


def numbers(text):
    """'0,2,4-6' as [0, 2, 4, 5, 6]."""
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return [n for end in ends for n in range(end[0], end[-1] + 1)]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=list(GRID), metavar=("T", "H", "W"),
                        help="tokens of a clip, from the middle of the frame (default: 13 30 45)")
    parser.add_argument("--layers", type=numbers, default="0-5", metavar="LIST",
                        help="(default: %(default)s)")
    parser.add_argument("--steps", type=numbers, default="0,2,4,6,8,9", metavar="LIST",
                        help="(default: %(default)s)")
    parser.add_argument("--samples", type=numbers, default="0-2", metavar="LIST",
                        help="seeds (default: %(default)s)")
    parser.add_argument("--heads", type=numbers, default="0-2", metavar="LIST",
                        help="(default: %(default)s)")
    parser.add_argument(
        "--start", type=float, default=1.0, metavar="LEVEL",
        help="below 1: begin with a held-out clip at this level of noise (default: 1)")
    parser.add_argument("--out", type=Path, default=clips.CACHE / "captures")
    parser.add_argument("--small", action="store_true",
                        help="the committed capture, whatever else is said")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if any(not 0 < part <= all_ for part, all_ in zip(args.grid, GRID)):
        parser.error(f"the grid is at most {' x '.join(map(str, GRID))}")
    if args.small:
        vars(args).update(SMALL)
    return args


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    model, about = load()
    grid = tuple(args.grid)
    origin = (0, *((all_ - part) // 2 for all_, part in zip(GRID[1:], grid[1:])))
    recorder = Recorder(
        model, args.out, name=about["name"], layers=args.layers, steps=args.steps, heads=args.heads,
        budget=1e11, weights_sha256=about["sha256"], licence=about["licence"], grid=grid,
        origin=origin, euler_steps=EULER_STEPS, start_level=args.start, channel_order=
        "channels 2i and 2i + 1 are rotated together: 0-15 by frame, 16-39 by row, 40-63 by column")
    for sample in args.samples:
        folder = args.out / f"sample{sample}"
        if whole(folder, args):
            continue
        print(folder, flush=True)
        with recorder:
            recorder.begin(folder.name, seed=sample)
            tokens = make(model, begin(sample, grid, origin, args.start, about), grid, origin,
                          args.start)
        picture(folder / "frames.png", tokens, grid, about)


if __name__ == "__main__":
    main()
