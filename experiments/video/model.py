# SPDX-License-Identifier: Apache-2.0
"""A small diffusion transformer over video, in pixel space.

A token is a patch of 8 x 8 pixels of one frame. The model is given the tokens of noise * level +
clip * (1 - level) and says what the clip is; flow matching follows from that, as (noisy - clip) /
level is the velocity. It works on principal components of patches. The best guess at one that looks
at no other token is known (Wiener's filter): the transformer is given the guesses, and adds what it
learns from the other tokens. Attention goes both ways over all T x H x W tokens. A token's place
rotates its queries and keys: the first 16 channels of a head turn with the frame, the next 24 with
the row, the last 24 with the column, channels 2i and 2i + 1 together. Row and column are added to
the input too, as the camera stands still.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

PATCH = 8
CHANNELS = PATCH * PATCH * 3
ROPE = (16, 24, 24)  # channels of a head for frame, row and column
GRID = (13, 30, 45)  # of a clip of 13 frames of 360 x 240


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    width: int = 192
    heads: int = 3
    layers: int = 6
    mlp: int = 768
    level_features: int = 64
    rope_theta: float = 100.0


def to_tokens(video):
    """Video [B, T, 8H, 8W, 3] as tokens [B, THW, 192], frame by frame and row by row."""
    b, t, height, width, _ = video.shape
    x = video.reshape(b, t, height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(b, -1, CHANNELS)


def to_video(tokens, grid):
    """What to_tokens made, undone."""
    t, h, w = grid
    x = tokens.reshape(-1, t, h, w, PATCH, PATCH, 3).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(-1, t, h * PATCH, w * PATCH, 3)


def guess(noisy, level, spread):
    """The components as they are likeliest, given themselves, and the standard deviation of what is
    left to find.

    noisy [B, N, 192], level [B], spread [192]: the standard deviation of each component of the
    clip.
    """
    level = level[:, None, None]
    signal, total = (1 - level) * spread, ((1 - level) * spread).square() + level.square()
    return noisy * signal * spread / total, level * spread * total.rsqrt()


def turns(grid, origin, theta):
    """The turn of every pair of channels, as complex numbers [THW, 32]."""
    places = torch.cartesian_prod(*(torch.arange(n) + o for n, o in zip(grid, origin)))
    speeds = [theta ** (-torch.arange(0, channels, 2) / channels) for channels in ROPE]
    angle = torch.cat([place * speed for place, speed in zip(places.T[:, :, None], speeds)], dim=1)
    return torch.polar(torch.ones_like(angle), angle)


def waves(count, width):
    """Sines and cosines of 0 to count - 1, from half a wave over all of them to one over four:
    [count, width]."""
    angle = torch.arange(count)[:, None] * torch.linspace(0.5, count / 4,
                                                          width // 2) * (2 * math.pi / count)
    return torch.cat([angle.cos(), angle.sin()], dim=1) * 0.5


def rotate(x, turn):
    """x [B, heads, N, 64] with its pairs of channels turned."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class Block(nn.Module):
    """Attention and an MLP, each with shift, scale and gate from the level: one table a layer, on
    top of the shared."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.table = nn.Parameter(torch.zeros(6, config.width))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        nn.init.normal_(self.qkv.bias[:2 * config.width], std=0.5)
        self.q_norm, self.k_norm = (nn.RMSNorm(config.width // config.heads) for _ in range(2))
        self.out = nn.Linear(config.width, config.width)
        self.up = nn.Linear(config.width, config.mlp)
        self.down = nn.Linear(config.mlp, config.width)

    def attend(self, x, turn):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), turn), rotate(self.k_norm(k), turn)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x, level, turn):
        shift, scale, gate, shift2, scale2, gate2 = (level + self.table).unsqueeze(2).unbind(1)
        x = x + (1 + gate) * self.attend(self.norm(x) * (1 + scale) + shift, turn)
        return x + (1 + gate2) * self.down(
            F.gelu(self.up(self.norm(x) * (1 + scale2) + shift2), approximate="tanh"))


class VideoModel(nn.Module):
    """Tokens of a noisy clip in, tokens of the clip as the model sees it out."""

    def __init__(self, config=Config()):
        super().__init__()
        self.config = config
        self.register_buffer("basis", torch.eye(CHANNELS))
        self.register_buffer("spread", torch.ones(CHANNELS))
        features = config.level_features
        self.level = nn.Sequential(nn.Linear(features, features), nn.SiLU(),
                                   nn.Linear(features, 6 * config.width))
        self.enter = nn.Linear(CHANNELS, config.width)
        self.row, self.column = (nn.Parameter(waves(n, config.width // 2)) for n in GRID[1:])
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.leave = nn.Linear(config.width, CHANNELS)
        for parameter in (*self.level[-1].parameters(), *self.leave.parameters()):
            nn.init.zeros_(parameter)
        for block in self.blocks:
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight,
                                std=1 / math.sqrt(2 * config.layers * layer.in_features))

    def set_components(self, patches):
        """The principal components of patches [M, 192], and how far they spread."""
        variances, basis = torch.linalg.eigh(patches.T @ patches / len(patches))
        self.basis.copy_(basis)
        self.spread.copy_(variances.clamp(min=1e-6).sqrt())

    def embed(self, level):
        """Six vectors [B, 6, width] for levels [B] between 0 and 1."""
        angle = level[:, None] * torch.exp(
            torch.linspace(0, math.log(200), self.config.level_features // 2))
        return self.level(torch.cat([angle.cos(), angle.sin()], dim=1)).unflatten(1, (6, -1))

    def place(self, grid, origin):
        """Where in the frame each token is: [THW, width]."""
        (t, h, w), (_, y, x) = grid, origin
        rows, columns = self.row[y:y + h, None].expand(-1, w,
                                                       -1), self.column[None,
                                                                        x:x + w].expand(h, -1, -1)
        return torch.cat([rows, columns], dim=2).flatten(0, 1).repeat(t, 1)

    def forward(self, tokens, timestep, grid, origin=(0, 0, 0)):
        """tokens [B, THW, 192] at the levels timestep [B]; origin: where the grid begins in that of
        the whole clip."""
        likely, left = guess(tokens @ self.basis, timestep, self.spread)
        levels, turn = self.embed(timestep), turns(grid, origin, self.config.rope_theta)
        x = self.enter(likely / self.spread) + self.place(grid, origin)
        for block in self.blocks:
            x = block(x, levels, turn)
        return (likely + left * self.leave(self.norm(x))) @ self.basis.T
