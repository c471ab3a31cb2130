# SPDX-License-Identifier: Apache-2.0
"""What attention counts."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sparge._native import ffi, lib


@dataclass(frozen=True)
class Counts:
    """What attention over a mask computes. A pair is a query block and a key block that some row of
    it sees (sparge_counts).

    pairs        visible
    qk_done      pairs with Q.K^T computed, whole or in part
    pv_done      pairs with P.V computed; a pair counts as its share of the rows
    tokens       visible (query, key) pairs of tokens
    tile_tokens  tokens of the pairs with Q.K^T computed, attended or not
    qk_tokens    tokens attended
    pv_tokens    tokens attended with P.V computed
    """

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

    @classmethod
    def sum(cls, heads: Iterable[Counts]) -> Counts:
        """Of all heads together."""
        heads = list(heads)
        return cls(**{f.name: sum(getattr(c, f.name) for c in heads) for f in fields(cls)})

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


class Counted:
    """What has counts of its heads."""

    @property
    def head_counts(self) -> Sequence[Counts]:
        """What attention counts in each head, batch after batch."""
        raise NotImplementedError

    @property
    def counts(self) -> Counts:
        """The sum over all heads."""
        return Counts.sum(self.head_counts)

    @property
    def density(self) -> float:
        """Share of the visible pairs of tokens that are attended."""
        return self.counts.density
