# SPDX-License-Identifier: Apache-2.0
"""Masks: which blocks of the attention map are computed, and of some of them which pairs."""
from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparge._native import call, ffi, lib


@dataclass(frozen=True)
class Counts:
    """What attention over a mask computes. A pair is a query block and a key block that some row of
    it sees (sparge_counts)."""

    pairs: int
    qk_done: int
    pv_done: float
    tokens: int
    tile_tokens: int
    qk_tokens: int
    pv_tokens: int

    @classmethod
    def read(cls, c: Any) -> Counts:
        """From sparge_counts."""
        return cls(**{f.name: getattr(c, f.name) for f in fields(cls)})

    def _c(self) -> Any:
        return ffi.new("sparge_counts *", {f.name: getattr(self, f.name) for f in fields(self)})

    @property
    def density(self) -> float:
        """Share of the visible pairs of tokens that are attended."""
        return float(lib.sparge_density_tokens(self._c()))

    @property
    def density_blocks(self) -> float:
        """Share of the visible pairs of blocks with Q.K^T computed."""
        return float(lib.sparge_density_blocks(self._c()))

    @property
    def sparsity(self) -> float:
        """The paper's (Sec 4.1): the mean of what Q.K^T and P.V leave out."""
        return float(lib.sparge_sparsity(self._c()))


class BlockMask:
    """A mask of one problem: [H] or [B, H] heads, q_len x k_len tokens in blocks of block_q
    queries and block_k keys.

    Made by predict(), from_blocks(), from_tokens(), from_flex() and load(). It does not change.
    """

    def __init__(self, shape: Any, options: Any, batched: bool) -> None:
        """Of a sparge_problem's sizes and sparge_options' blocks and causality; no block is set."""
        self._problem = ffi.new("sparge_problem *", shape[0])
        self._byte = ffi.new("char *")  # stands for q, k and v, which are not read
        for x in (self._problem.q, self._problem.k, self._problem.v):
            x.data = self._byte
        self._problem.k_bias = ffi.NULL
        self._options = ffi.new("sparge_options *", options[0])
        self._options.per_head = self._options.progress = ffi.NULL
        self._mask = ffi.gc(ffi.new("sparge_mask *"), lib.sparge_mask_free)
        self._batched = batched
        call(lib.sparge_mask_alloc, self._mask, self._problem, self._options)

    def _axes(self, *rest: int) -> tuple[int, ...]:
        return (self._mask.batch, self._mask.heads)[0 if self._batched else 1:] + rest

    @property
    def shape(self) -> tuple[int, ...]:
        """[heads, q_blocks, k_blocks], with batch before it if q had that axis."""
        return self._axes(self._mask.q_blocks, self._mask.k_blocks)

    @property
    def block(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        return self._options.block_q, self._options.block_k

    def _words(self) -> NDArray[np.uint32]:
        """The mask's own memory, [batch, heads, q_blocks, words]."""
        m = self._mask
        size = m.batch * m.heads * m.q_blocks * m.words
        flat = np.frombuffer(ffi.buffer(m.bits, 4 * size), np.uint32) if size else np.empty(
            0, np.uint32)
        return flat.reshape(m.batch, m.heads, m.q_blocks, m.words)

    @property
    def blocks(self) -> NDArray[np.bool_]:
        """Which blocks are computed, whole or in part, as `shape` says. It cannot be written to."""
        bits = np.unpackbits(self._words().view(np.uint8), axis=-1, bitorder="little")
        found = bits[..., :self._mask.k_blocks].astype(bool).reshape(self.shape)
        found.flags.writeable = False
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.blocks, dtype)

    def head_counts(self) -> list[Counts]:
        """What attention over the mask counts in each head, batch after batch."""
        found = ffi.new("sparge_counts []", self._mask.batch * self._mask.heads)
        call(lib.sparge_mask_count, self._mask, self._problem, self._options, found)
        return [Counts.read(c) for c in found]

    @property
    def counts(self) -> Counts:
        """The sum over all heads."""
        heads = self.head_counts()
        return Counts(**{f.name: sum(getattr(c, f.name) for c in heads) for f in fields(Counts)})

    @property
    def density(self) -> float:
        """Share of the visible pairs of tokens that are attended."""
        return self.counts.density
