#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train the model of model.py on the first four fifths of vtest; the last fifth is held out.

A step is one crop of the clip at one level of noise. The state is kept in build/video/train.pt
every three minutes, and the same command goes on with it. In the end: weights.safetensors (float16,
the running mean of the weights), weights.json, which says what they are, and loss.csv.
OMP_WAIT_POLICY=passive saves much time where cores are not idle.
"""
import argparse
import hashlib
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import clips  # noqa: E402
from harness import write_csv, write_json, writing  # noqa: E402
from model import GRID, PATCH, Config, VideoModel, guess, to_tokens  # noqa: E402

STATE = clips.CACHE / "train.pt"
CLIP = "vtest"
# Frames, rows and columns of the crops, and until which share of the steps they are used: small
# ones first, as many steps of these take little time. Each axis is seen at its full length.
CROPS = [(0.6, [(13, 4, 8), (7, 8, 8), (13, 6, 5), (4, 10, 10), (2, 15, 15), (2, 5, 45),
                (1, 20, 20), (1, 30, 14)]),
         (0.9, [(13, 8, 8), (6, 12, 12), (13, 4, 16), (4, 15, 15), (2, 20, 22), (2, 10, 45),
                (1, 30, 30), (2, 30, 15)]),
         (1.0, [(13, 12, 12), (13, 6, 24), (13, 18, 8), (8, 15, 15), (5, 16, 23), (4, 30, 15),
                (3, 13, 45), (2, 30, 30)]), ]
LEVELS = [0.1, 0.3, 0.5, 0.7, 0.9]  # of the held-out loss


def split(frames):
    """The frames to train on, and those that are held out."""
    return frames[:len(frames) * 4 // 5], frames[len(frames) * 4 // 5:]


def normal(pixels, mean, std):
    return (torch.from_numpy(np.array(pixels)).float() - mean) / std


def cut(frames, grid, origin, start, mean, std):
    """Tokens [1, THW, 192] of a crop."""
    (t, h, w), (_, y, x) = grid, (o * PATCH for o in origin)
    return to_tokens(
        normal(frames[start:start + t, y:y + h * PATCH, x:x + w * PATCH], mean, std)[None])


def crop(frames, grid, random, mean, std):
    """A crop at random: its tokens, its grid, and where it lies in the grid of the whole clip."""
    origin = tuple(int(random.integers(whole - part + 1)) for whole, part in zip(GRID, grid))
    start = int(random.integers(len(frames) - grid[0] + 1))
    return cut(frames, grid, origin, start, mean, std), grid, origin


def level_of(step):
    """A level of noise: logit-normal around 0.6, and spread evenly over the steps. As a tensor
    [1]."""
    u = torch.tensor((0.5 + step * 0.6180339887498949) % 1.0).clamp(1e-4, 1 - 1e-4)
    return torch.sigmoid(0.4 + 1.0 * math.sqrt(2) * torch.erfinv(2 * u - 1)).reshape(1)


def mix(tokens, level, generator):
    """Noise, level of it, and of the tokens the rest."""
    noise = torch.randn(tokens.shape, generator=generator)
    return tokens * (1 - level[:, None, None]) + noise * level[:, None, None]


@torch.no_grad()
def held_out(model, frames, mean, std, count=4):
    """Mean squared error of the clip that the model sees, at each of LEVELS, over the same crops
    every time.

    The clip has variance 1. A model that is not trained is Wiener's filter of each patch.
    """
    random, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    errors = np.zeros(len(LEVELS))
    for n in range(count):
        tokens, grid, origin = crop(frames, CROPS[-1][1][2 * n], random, mean, std)
        for at, level in enumerate(torch.tensor(LEVELS)):
            seen = model(mix(tokens, level.reshape(1), generator), level.reshape(1), grid, origin)
            errors[at] += (seen - tokens).square().mean().item() / count
    return errors


def trivial(train, frames, mean, std, count=4):
    """The same errors of two that look at nothing: one colour, and the mean frame of what is
    trained on."""
    random = np.random.default_rng(1)
    background = np.broadcast_to(train[::5].mean(axis=0), (GRID[0], *train.shape[1:]))
    errors = np.zeros(2)
    for n in range(count):
        tokens, grid, origin = crop(frames, CROPS[-1][1][2 * n], random, mean, std)
        errors += [
            x / count
            for x in (tokens.square().mean().item(),
                      (cut(background, grid, origin, 0, mean, std) - tokens).square().mean().item())
        ]
    return errors


class Training:
    """A model, its running mean, its optimiser, and how far they are."""

    def __init__(self, config, rate, patches):
        torch.manual_seed(0)
        self.model, self.mean = VideoModel(config), VideoModel(config)
        self.model.set_components(patches)
        self.mean.load_state_dict(self.model.state_dict())
        self.rate, self.step, self.seconds, self.rows = rate, 0, 0.0, []
        groups = [{
            "params": [p for p in self.model.parameters()
                       if (p.dim() > 1) == decays], "weight_decay": decay
        } for decays, decay in ((True, 0.01), (False, 0.0))]
        self.optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))

    def parts(self):
        return {"model": self.model, "mean": self.mean, "optimiser": self.optimiser}

    def save(self):
        with writing(STATE, "wb") as file:
            torch.save({name: x.state_dict() for name, x in self.parts().items()} |
                       {"step": self.step, "seconds": self.seconds, "rows": self.rows}, file)

    def load(self):
        state = torch.load(STATE)
        for name, x in self.parts().items():
            x.load_state_dict(state[name])
        self.step, self.seconds, self.rows = state["step"], state["seconds"], state["rows"]

    def learn(self, tokens, grid, origin, steps):
        """One step on one crop; its loss: the error, where that of Wiener's filter is about 1."""
        done = self.step / steps
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * min(
                1, (self.step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        level = level_of(self.step)
        noisy = mix(tokens, level, torch.Generator().manual_seed(1000 + self.step))
        error = (self.model(noisy, level, grid, origin) - tokens).square().mean()
        loss = error / guess(noisy, level, self.model.spread)[1].square().mean()
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        keep = min(0.995, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, new in zip(self.mean.parameters(), self.model.parameters()):
                mean.lerp_(new, 1 - keep)
        self.step += 1
        return loss.item()


def log(training, test, mean, std, losses):
    """A row of loss.csv."""
    errors = held_out(training.mean, test, mean, std)
    training.rows.append({
        "step": training.step, "seconds": round(training.seconds), "loss":
        round(float(np.mean(losses)), 4) if losses else None
    } | {f"held_out_{level}": round(float(e), 5) for level, e in zip(LEVELS, errors)})
    print(training.rows[-1], flush=True)


def run(training, train, test, mean, std, steps):
    """Trains up to that many steps."""
    begin, saved, losses = time.perf_counter() - training.seconds, training.seconds, []
    while training.step < steps:
        random = np.random.default_rng([0, training.step])
        crops = next(crops for share, crops in CROPS if training.step < share * steps)
        grid = crops[training.step % len(crops)]
        losses.append(training.learn(*crop(train, grid, random, mean, std), steps))
        training.seconds = time.perf_counter() - begin
        if training.step % 200 == 0 or training.step == steps:
            log(training, test, mean, std, losses)
            losses = []
        if training.seconds - saved > 180 or training.step == steps:
            training.save()
            saved = training.seconds


def write(training, train, test, mean, std, out):
    """The weights, what they are, and how the loss went."""
    weights = {name: x.half().contiguous() for name, x in training.mean.state_dict().items()}
    with writing(out / "weights.safetensors", "wb") as file:
        file.write(save(weights))
    write_csv(out / "loss.csv", training.rows)
    one_colour, mean_frame = trivial(train, test, mean, std)
    about = {
        "name": "tiny video diffusion transformer, trained on vtest", "sha256": hashlib.sha256(
            (out / "weights.safetensors").read_bytes()).hexdigest(), "config":
        asdict(training.model.config), "weights": sum(x.numel()
                                                      for x in training.model.parameters()), "clip":
        CLIP, "clip_sha256": clips.CLIPS[CLIP].sha256, "package":
        f"{clips.PACKAGE} {clips.VERSION}", "licence": clips.LICENCE, "frames": len(train), "mean":
        mean, "std": std, "steps": training.step, "seconds": round(training.seconds), "held_out":
        {str(level): training.rows[-1][f"held_out_{level}"] for level in LEVELS
         }, "held_out_one_colour": round(float(one_colour),
                                         5), "held_out_mean_frame": round(float(mean_frame), 5),
    }
    write_json(out / "weights.json", about, indent=2)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--rate", type=float, default=3e-3,
                        help="of learning, at its highest (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE,
                        help="folder of the three files (default: this one)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, test = split(clips.load(CLIP))
    some = train[::20]
    mean, std = float(some.mean()), float(some.std())
    training = Training(Config(), args.rate,
                        cut(some, (len(some), *GRID[1:]), (0, 0, 0), 0, mean, std)[0])
    if STATE.exists():
        training.load()
    else:
        log(training, test, mean, std, [])
    run(training, train, test, mean, std, args.steps)
    write(training, train, test, mean, std, args.out)


if __name__ == "__main__":
    main()
