# SPDX-License-Identifier: Apache-2.0
"""Orders for the tokens of images and video, and moving rows by them (sparge_order.h)."""
from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparge import _arrays
from sparge._native import call, ffi, lib, words
from sparge._options import word

ORDERS = words(lib.sparge_order_string)


class Grid(NamedTuple):
    """A sequence as it arrives: text, t * h * w tokens in row-major order, text."""

    t: int
    h: int
    w: int
    text_before: int = 0  # tokens that keep their place
    text_after: int = 0

    @property
    def tokens(self) -> int:
        """How many there are, text too."""
        return self.text_before + self.t * self.h * self.w + self.text_after


def grid_struct(grid: Sequence[int]) -> Any:
    """sparge_grid of (t, h, w), (t, h, w, text_before, text_after) or a Grid."""
    try:
        return ffi.new("sparge_grid *", list(Grid(*grid)))
    except (TypeError, OverflowError):
        raise ValueError(f"grid is {grid!r}, it must be whole numbers (t, h, w), or these and how "
                         "many tokens of text stand before and after") from None


def token_order(order: str, grid: Sequence[int], seed: int = 0) -> NDArray[np.int64]:
    """A permutation of the tokens of a grid (Sec 3.7 of the paper): index[p] is the arriving number
    of the token at place p.

    order  "row" (w fastest, then h, then t: as they arrive), "column" (h, w, t), "time" (t, w, h),
           "random" or "hilbert"
    grid   (t, h, w) or (t, h, w, text_before, text_after): sides and tokens of text, at least 0;
           text keeps its place
    seed   of "random" alone, 0 to 2^64 - 1

    Attention does not depend on the order of keys, and that of queries is the order of its rows:

        index = sparge.token_order("hilbert", (4, 30, 45))
        o = sparge.attention(*(sparge.permute(x, index) for x in (q, k, v)))
        o = sparge.unpermute(o, index)
    """
    number = word("order", order, ORDERS)
    c = grid_struct(grid)
    room = Grid(*grid).tokens
    try:
        index = np.empty(room if min(grid) >= 0 else 0, np.int64)
    except ValueError:  # more than an array may have
        raise MemoryError(f"grid is {tuple(grid)}: no memory for the order of {room} tokens"
                          ) from None
    try:
        call(lib.sparge_token_order, number, c, operator.index(seed),
             _arrays.pointer(index, "int64_t *"))
    except (OverflowError, TypeError):
        raise ValueError(f"seed is {seed!r}, it must be in [0, 2^64 - 1]") from None
    return index


def permute(x: Any, index: Any, *, layout: str = "HND") -> Any:
    """The tokens of x in another order: to[..., p, :] = x[..., index[p], :].

    x       [H, N, D] or [B, H, N, D]; layout="NHD": [N, H, D] or [B, N, H, D]; float32, float16 or
            bfloat16; on the CPU
    index   [N] whole numbers, a permutation of 0 to N - 1
    Returns a new array of the kind, dtype and layout of x.
    """
    return _moved(lib.sparge_permute, x, index, layout)


def unpermute(x: Any, index: Any, *, layout: str = "HND") -> Any:
    """The inverse of permute(): to[..., index[p], :] = x[..., p, :]. Shapes as there."""
    return _moved(lib.sparge_unpermute, x, index, layout)


def _moved(function: Any, x: Any, index: Any, layout: str) -> Any:
    x = _arrays.read("x", x, layout)
    if x.device != "cpu":
        raise ValueError(f"x is on {x.device}, it must be on the CPU")
    places = _arrays.host("index", index)
    if places.dtype.kind not in "iu":
        raise TypeError(f"index is {places.dtype}, it must be whole numbers")
    batch, heads, tokens, dim = x.shape
    if places.shape != (tokens, ):
        raise ValueError(f"index has the shape {list(places.shape)}, it must be [{tokens}], the "
                         "tokens of x")
    places = np.ascontiguousarray(places, np.int64)
    to = _arrays.empty("o", x.shape, x, layout)
    call(function, [x.c()], [to.c("sparge_out")], batch, heads, tokens, dim,
         _arrays.pointer(places, "int64_t *"))
    return to.owner
