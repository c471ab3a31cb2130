# SPDX-License-Identifier: Apache-2.0
"""Calls over a mask that is given."""
from __future__ import annotations

from typing import Any

from sparge._mask import BlockMask, read_bools
from sparge._native import ffi
from sparge._options import Options, Problem, Settings, pair, prepare


def prepare_over(q: Any, k: Any, v: Any, mask: Any,
                 options: Options) -> tuple[Problem, Settings, BlockMask | None]:
    """prepare(), and the mask: None is dense. Of a BlockMask the block and the causality hold, and
    must agree with what is given; other masks are blocks, as BlockMask.from_blocks() has them."""
    if isinstance(mask, BlockMask):
        options = _agreed(mask, options)
    problem, settings = prepare(q, k, v, options)
    if mask is None:
        return problem, settings, None
    c = problem.c
    if not isinstance(mask, BlockMask):
        blocks, _ = read_bools("mask", mask, "i, j")
        mask = BlockMask(c, settings.c, problem.q.batched)
        mask._set_blocks("mask", blocks)
    m = mask._problem
    of_mask, of_call = ([x.batch, x.heads, x.q_len, x.k_len] for x in (m, c))
    if of_mask != of_call:
        raise ValueError(f"mask is of [B, H, Nq, Nk] = {of_mask}, q and k are of {of_call}" + (
            "; mask.expand() gives one head to many" if m.heads == 1 < c.heads else ""))
    return problem, settings, mask


def c_mask(mask: BlockMask | None) -> Any:
    """As sparge_mask; None: dense."""
    return ffi.NULL if mask is None else mask._mask


def _agreed(mask: BlockMask, options: Options) -> Options:
    """Options with the blocks and the causality of a mask."""
    block = tuple(pair("block", options.get("block", mask.block)))
    if block != mask.block:
        raise ValueError(f"block is {block} and that of mask is {mask.block}: leave it out, or "
                         f"give mask.convert({block})")
    asked = options.get("is_causal", mask.is_causal)
    if not mask._has_causality(asked):
        raise ValueError(f"is_causal is {asked!r} and that of mask is {mask.is_causal!r}: leave it "
                         "out, or make the mask with it")
    return {**options, "block": mask.block, "is_causal": mask.is_causal}
