# SPDX-License-Identifier: Apache-2.0
"""What a call writes and returns: o, and what was asked for beside it."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparge import _arrays
from sparge._counts import Counts
from sparge._device import Mirror
from sparge._native import ffi, lib, text

if TYPE_CHECKING:
    from sparge._mask import BlockMask
    from sparge._native import Watch
    from sparge._options import Problem


@dataclass(frozen=True)
class Stats:
    """What a call did (sparge_result). On CUDA seconds are 0: the call is queued on a stream.

    counts           the sum over all heads
    head_counts      of each head, batch after batch
    backend, isa     what ran
    qk_isa, pv_isa   what Q.K^T and P.V ran on: isa, or what that builds on
    pv_dtype         what "fastest" stood for
    threads          how many worked
    kernel           of cuda, else 0
    workspace_bytes  memory that cpu or cuda worked in; 0 of ref
    seconds_*        of the stages; seconds_quantize has all else that reads q, k and v once
    """

    counts: Counts
    head_counts: list[Counts]
    backend: str
    isa: str
    qk_isa: str
    pv_isa: str
    pv_dtype: str
    threads: int
    kernel: int
    workspace_bytes: int
    seconds_predict: float
    seconds_quantize: float
    seconds_attend: float

    @property
    def density(self) -> float:
        """Share of the visible pairs of tokens that were attended."""
        return self.counts.density

    @property
    def sparsity(self) -> float:
        """The paper's (Sec 4.1)."""
        return self.counts.sparsity


class Result:
    """What a call writes: o as q, lse in float32, counts."""

    def __init__(self, problem: Problem, lse: bool, stats: bool) -> None:
        p, q = problem.c, problem.q
        self.o = _arrays.empty("o", (p.batch, p.heads, p.q_len, p.dim_v), q, problem.layout)
        self.c = ffi.new("sparge_result *", {"o": self.o.c("sparge_out")})
        self.mirror = Mirror(q)
        self.lse: Any = None
        self.heads: Any = None
        if lse:
            self.lse = _arrays.new((*problem.heads_shape, p.q_len), q, "float32")
            self.c.lse = _arrays.pointer(self.lse, "float *")
        if stats:
            self.heads = ffi.new("sparge_counts []", p.batch * p.heads)
            self.c.head_counts = self.mirror.place(self.heads, ffi.sizeof(self.heads), True)

    def call(self, watch: Watch, function: Any, *arguments: Any) -> None:
        """Calls a function of the library whose last argument is this result, but for the error."""
        self.mirror.call(watch, function, *arguments, self.c)

    def stats(self) -> Stats:
        """Of a call whose head_counts were asked for."""
        c = self.c
        heads = [Counts.read(x) for x in self.heads]
        isa = lib.sparge_isa_string
        return Stats(
            counts=Counts.sum(heads), head_counts=heads,  # those of a stream's result are 0
            backend=text(lib.sparge_backend_string(c.backend)), isa=text(isa(c.isa)),
            qk_isa=text(isa(c.qk_isa)), pv_isa=text(isa(c.pv_isa)),
            pv_dtype=text(lib.sparge_dtype_string(c.pv_dtype)), threads=c.threads, kernel=c.kernel,
            workspace_bytes=c.workspace_bytes, seconds_predict=c.seconds_predict,
            seconds_quantize=c.seconds_quantize, seconds_attend=c.seconds_attend)

    def returned(self, mask: BlockMask | None = None) -> Any:
        """o, or a tuple of it, lse, the mask and Stats: what was asked for, in this order."""
        found = [self.o.owner]
        if self.lse is not None:
            found.append(self.lse)
        if mask is not None:
            found.append(mask)
        if self.heads is not None:
            found.append(self.stats())
        return found[0] if len(found) == 1 else tuple(found)
