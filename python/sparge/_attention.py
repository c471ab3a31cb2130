# SPDX-License-Identifier: Apache-2.0
"""The calls: predict, attend, and both."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparge import _arrays
from sparge._mask import BlockMask, Counts
from sparge._native import ffi, lib, text
from sparge._options import Options, Problem, Settings, prepare, takes_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Stats:
    """What a call did (sparge_result)."""

    counts: Counts
    head_counts: list[Counts]  # batch after batch
    backend: str
    isa: str
    threads: int
    kernel: int
    workspace_bytes: int
    seconds_predict: float
    seconds_quantize: float
    seconds_attend: float

    @property
    def sparsity(self) -> float:
        """The paper's (Sec 4.1)."""
        return self.counts.sparsity


class Result:
    """What a call writes: o as q, lse in float32, counts."""

    def __init__(self, problem: Problem, settings: Settings, lse: bool, stats: bool) -> None:
        p, q = problem.c, problem.q
        self.o = _arrays.empty("o", (p.batch, p.heads, p.q_len, p.dim_v), q, problem.layout)
        self.c = ffi.new("sparge_result *", {"o": self.o.c("sparge_out")})
        self.lse = self.heads = None
        if lse:
            self.lse = _arrays.new((*problem.heads_shape, p.q_len), q, "float32")
            self.c.lse = _arrays.pointer(self.lse, "float *")
        if stats:
            self.heads = ffi.new("sparge_counts []", p.batch * p.heads)
            self.c.head_counts = self.heads

    def stats(self) -> Stats:
        c = self.c
        return Stats(Counts.read(c.counts), [Counts.read(x) for x in self.heads],
                     text(lib.sparge_backend_string(c.backend)), text(lib.sparge_isa_string(c.isa)),
                     c.threads, c.kernel, c.workspace_bytes, c.seconds_predict, c.seconds_quantize,
                     c.seconds_attend)


@takes_options
def attention(q: Any, k: Any, v: Any, *, return_lse: bool = False, return_mask: bool = False,
              return_stats: bool = False, **options: Unpack[Options]) -> Any:
    """SpargeAttn: predicts which blocks matter, and attends over them."""
    problem, settings = prepare(q, k, v, options)
    result = Result(problem, settings, return_lse, return_stats)
    mask = None
    if return_mask:
        mask = BlockMask(problem.c, settings.c, problem.q.batched)
        result.c.mask = mask._mask
    settings.watch.call(lib.sparge_attention, problem.c, settings.c, result.c)
    return _returned(result, return_lse, mask, return_stats)


def _returned(result: Result, lse: bool, mask: BlockMask | None, stats: bool) -> Any:
    """o, or a tuple of it and what was asked for beside it."""
    found = [result.o.owner]
    if lse:
        found.append(result.lse)
    if mask is not None:
        found.append(mask)
    if stats:
        found.append(result.stats())
    return found[0] if len(found) == 1 else tuple(found)


@takes_options
def predict(q: Any, k: Any, **options: Unpack[Options]) -> BlockMask:
    """The blocks that SpargeAttn keeps of q [H, Nq, D] and k [G, Nk, D]."""
    problem, settings = prepare(q, k, None, options)
    mask = BlockMask(problem.c, settings.c, problem.q.batched)
    settings.watch.call(lib.sparge_predict, problem.c, settings.c, mask._mask, ffi.NULL)
    return mask
