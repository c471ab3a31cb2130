# SPDX-License-Identifier: Apache-2.0
"""The judge for somebody else's kernel, by the rule of `sparge check`."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sparge._arrays import DTYPES, is_torch, pointer
from sparge._compare import Floats, Place, compare, distance, first, recall
from sparge._diagnose import Row, diagnose, diagnose_lse, float64, row_of
from sparge._given import c_mask, prepare_over
from sparge._inspect import ask
from sparge._mask import BlockMask
from sparge._native import ffi, lib, text
from sparge._options import Options, Problem, Settings, number, takes_options
from sparge._report import HeadErrors, LseErrors, MaskErrors, Report

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options
def check(o: Any, q: Any, k: Any, v: Any, *, mask: Any = None, lse: Any = None,
          max_worst: float | None = None, **options: Unpack[Options]) -> Report:
    """Judges what another kernel made of q, k and v: its output o, its mask, its log-sum-exp.

        print(sparge.check(my_kernel(q, k, v, mask), q, k, v, mask=mask))

    o    [H, Nq, Dv] or [B, H, Nq, Dv], laid out as q, in float32, float16, bfloat16 or float64
    q    [H, Nq, D] or [B, H, Nq, D], as attention() takes them; so k and v. Tensors on a GPU are
         copied to the host, where everything here is computed
    mask the blocks that the kernel attended to: a BlockMask, or bool or uint8 [H, Qb, Kb] or
         [B, H, Qb, Kb]; None: all, it was dense
    lse  [H, Nq] or [B, H, Nq], natural log units; None: not judged
    max_worst  the bound, instead of the baseline's
    options    is_causal, softmax_scale, k_bias, block and layout are those of the kernel; theta,
               tau and the others are those of the mask that is predicted beside its own

    The rule: o passes if it is finite where attention over the mask is, and the relative L1 of no
    row, sum|o - o'| / sum|o'|, is above twice that of an honest kernel's worst row, plus 1e-5; o'
    is the textbook formula in double (sparge_oracle), the honest kernel the same in f32, with P and
    o rounded to the dtype of o (sparge_baseline). Rows that see no key are 0, with lse = -inf. For
    lse it is the distance of any element. A kernel in int8 or fp8 is not honest by that: give
    max_worst.

    Returns a Report: print it, or read .ok, .reasons, .hint, .to_dict(). Time grows as Nq * Nk, on
    one processor. ValueError and TypeError for what does not fit; KeyboardInterrupt ends it.
    """
    q, k, v = map(on_host, (q, k, v))
    if "k_bias" in options:
        options = {**options, "k_bias": on_host(options["k_bias"])}
    problem, settings, kept = prepare_over(q, k, v, mask, options)
    return Judge(problem, settings, kept, max_worst).judge(o, lse)


class Judge:
    """One question: what everything is measured by."""

    def __init__(self, problem: Problem, settings: Settings, mask: BlockMask | None,
                 max_worst: float | None) -> None:
        if max_worst is not None and not number("max_worst", max_worst) >= 0:
            raise ValueError(f"max_worst is {max_worst}, it must be at least 0, or None")
        self.problem, self.settings, self.mask, self.max_worst = problem, settings, mask, max_worst
        p = problem.c
        self.rows = (p.batch, p.heads, p.q_len)

    def judge(self, o: Any, lse: Any) -> Report:
        p, c = self.problem.c, self.settings.c
        got, dtype = self._output(o)
        got_lse = None if lse is None else self._lse(lse)
        mass = np.empty((p.batch, p.heads, -(-p.q_len // c.block_q), -(-p.k_len // c.block_k)))
        dense_o, dense_lse = self.oracle(None, mass=mass)
        want, want_lse = (dense_o, dense_lse) if self.mask is None else self.oracle(self.mask)
        honest, honest_lse = self.baseline(dtype)
        errors, baseline = compare(got, want), compare(honest, want)
        report = Report(
            over="dense" if self.mask is None else "mask", type=dtype, batch=p.batch, heads=p.heads,
            kv_heads=p.kv_heads, q_len=p.q_len, k_len=p.k_len, dim=p.dim, dim_v=p.dim_v,
            block_q=c.block_q, block_k=c.block_k,
            causal=text(lib.sparge_causal_string(c.causal)), o=errors,
            baseline_worst_row_l1=baseline.worst,
            max_worst=self._bound(lib.sparge_bound_o, baseline.worst),
            dense=None if self.mask is None else compare(got, dense_o), given=self.mask,
            block_mass=mass)
        if got_lse is not None:
            worst, at = distance(got_lse, want_lse)
            baseline_worst = distance(honest_lse, want_lse)[0]
            counts = compare(got_lse[..., None], want_lse[..., None])
            report.lse = LseErrors(worst, at, baseline_worst,
                                   self._bound(lib.sparge_bound_lse, baseline_worst), counts)
        report.predicted, masks = self._masks(dense_lse, want_lse)
        report.mask = masks[0]
        for n in range(p.batch * p.heads):
            b, h = divmod(n, p.heads)
            report.per_head.append(HeadErrors(
                b, h, compare(got[b, h], want[b, h]),
                compare(honest[b, h], want[b, h]).worst_row_l1,
                None if got_lse is None else distance(got_lse[b, h], want_lse[b, h])[0],
                None if self.mask is None else compare(got[b, h], dense_o[b, h]), masks[1 + n]))
        self._explain(report, got, want, got_lse, want_lse)
        return report

    # ---- What was given ----

    def _output(self, o: Any) -> tuple[Floats, str]:
        """o as [B, H, Nq, Dv], and the word of its dtype."""
        p, problem = self.problem.c, self.problem
        dtype = str(getattr(o, "dtype", type(o).__name__)).split(".")[-1]
        if dtype not in (*DTYPES, "float64"):
            raise TypeError(f"o is {dtype}, it must be float32, float16, bfloat16 or float64")
        word = "f64" if dtype == "float64" else text(lib.sparge_dtype_string(DTYPES[dtype]))
        shape = (p.heads, p.q_len, p.dim_v)
        if problem.layout == "NHD":
            shape = (p.q_len, p.heads, p.dim_v)
        whole = self._shaped("o", o, (p.batch, *shape))
        return (whole.swapaxes(1, 2) if problem.layout == "NHD" else whole), word

    def _lse(self, lse: Any) -> Floats:
        return self._shaped("lse", lse, self.rows)

    def _shaped(self, name: str, x: Any, shape: tuple[int, ...]) -> Floats:
        want = shape[0 if self.problem.q.batched else 1:]
        if not hasattr(x, "shape"):
            raise TypeError(f"{name} is a {type(x).__name__}, it must be an array")
        if tuple(x.shape) != want:
            raise ValueError(f"{name} has the shape {list(x.shape)}, it must be {list(want)}")
        return float64(on_host(x)).reshape(shape)

    # ---- What it is measured by ----

    def oracle(self, mask: BlockMask | None, with_o: bool = True,
               mass: Floats | None = None) -> tuple[Floats, Floats]:
        """Attention in double: o [B, H, Nq, Dv] and lse [B, H, Nq]."""
        o = np.empty((*self.rows, self.problem.c.dim_v if with_o else 0))
        lse = np.empty(self.rows)
        ask(self.problem, self.settings, mask, o=o if with_o else None, lse=lse, mass=mass)
        return o, lse

    def baseline(self, dtype: str) -> tuple[Floats, Floats]:
        """The honest kernel over the mask."""
        o = np.empty((*self.rows, self.problem.c.dim_v), np.float32)
        lse = np.empty(self.rows, np.float32)
        kind = {"f16": lib.SPARGE_F16, "bf16": lib.SPARGE_BF16}.get(dtype, lib.SPARGE_F32)
        self.settings.watch.call(lib.sparge_baseline, self.problem.c, self.settings.c,
                                 c_mask(self.mask), kind, pointer(o, "float *"),
                                 pointer(lse, "float *"))
        return o.astype(np.float64), lse.astype(np.float64)

    def _bound(self, rule: Any, baseline: float) -> float:
        return float(rule(baseline)) if self.max_worst is None else self.max_worst

    def _masks(self, dense: Floats,
               kept: Floats) -> tuple[BlockMask | None, list[MaskErrors | None]]:
        """The predicted mask, and the given one beside it: of all heads together, and of each."""
        p, batched = self.problem.c, self.problem.q.batched
        heads = p.batch * p.heads
        if self.mask is None:
            return None, [None] * (1 + heads)
        predicted = BlockMask(p, self.settings.c, batched)
        self.settings.watch.call(lib.sparge_predict, p, self.settings.c, predicted._mask, ffi.NULL)
        foreseen = self.oracle(predicted, with_o=False)[1]
        shape = (p.batch, p.heads, *predicted.shape[-2:])
        got, want = self.mask.blocks.reshape(shape), predicted.blocks.reshape(shape)
        counts, wanted = self.mask.head_counts, predicted.head_counts

        def of(n: int | None) -> MaskErrors:
            at: Any = ... if n is None else divmod(n, p.heads)
            all_of = slice(None) if n is None else slice(n, n + 1)
            return MaskErrors.of(recall(kept[at], dense[at]), counts[all_of],
                                 recall(foreseen[at], dense[at]), wanted[all_of],
                                 want[at] & ~got[at], got[at] & ~want[at])

        return predicted, [of(None), *map(of, range(heads))]

    # ---- Why ----

    def _explain(self, report: Report, got: Floats, want: Floats, got_lse: Floats | None,
                 want_lse: Floats) -> None:
        """Fills in the hint."""
        o, lse = report.o, report.lse

        def row(at: Place) -> Row:
            return row_of(self.problem, self.settings, c_mask(self.mask), got, want, at)

        if report.o_reason() and not math.isnan(report.max_worst):
            at = o.first_nonfinite_apart or o.worst_row
            if at is not None:
                found = diagnose(row(at), report.max_worst)
                report.hint = found and f"row {tuple(at[:3])} of o: {found}"
        elif report.lse_reason() and lse is not None and got_lse is not None:
            at = first(np.isfinite(got_lse) != np.isfinite(want_lse)) or lse.worst_at
            if at is not None:
                found = diagnose_lse(float(got_lse[at]), float(want_lse[at]), row(at),
                                     lse.max_worst)
                report.hint = found and f"element {at} of lse: {found}"


def on_host(x: Any) -> Any:
    """A tensor of torch in host memory, without its graph; others as they are."""
    return x.detach().cpu() if is_torch(x) else x
