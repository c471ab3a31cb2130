# SPDX-License-Identifier: Apache-2.0
"""What check() found: numbers, and a short table of them."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparge._compare import Errors, Floats, Place, Recall, first, number, place
from sparge._counts import Counts
from sparge._mask import BlockMask

SHOWN = 6  # of what is bad


@dataclass(frozen=True)
class LseErrors:
    """A log-sum-exp beside the oracle's.

    worst, worst_at  the largest distance of any element, and its (batch, head, query)
    baseline_worst   that of an honest kernel
    max_worst        the bound; NaN: not known
    errors           counts what is not finite
    """

    worst: float
    worst_at: Place | None
    baseline_worst: float
    max_worst: float
    errors: Errors = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON of `sparge check`."""
        return {"worst": number(self.worst), "worst_at": place(self.worst_at),
                "baseline_worst": number(self.baseline_worst), "max_worst": number(self.max_worst),
                **self.errors.counts()}


@dataclass(frozen=True)
class MaskErrors:
    """A mask beside the one that is predicted. Recall is the share of its attention that a row
    keeps: the mean over the rows, and the least.

    rows_nonfinite  rows whose attention is not a number, which are left out
    pairs           visible blocks
    missing         blocks that the prediction keeps and the mask does not; the first is at
                    first_missing, (batch, head, query block, key block)
    extra           the other way round
    """

    recall: float
    worst_row_recall: float
    rows_nonfinite: int
    density_tokens: float
    pairs: int
    kept_blocks: int
    predicted_recall: float
    predicted_worst_row_recall: float
    predicted_density_tokens: float
    predicted_kept_blocks: int
    missing: int
    extra: int
    first_missing: Place | None
    first_extra: Place | None

    @classmethod
    def of(cls, kept: Recall, counts: Sequence[Counts], foreseen: Recall,
           predicted: Sequence[Counts], missing: NDArray[np.bool_],
           extra: NDArray[np.bool_]) -> MaskErrors:
        """From the counts of heads, and from which blocks differ."""
        own, other = Counts.sum(counts), Counts.sum(predicted)
        return cls(kept.share, kept.worst_row, kept.nonfinite, own.density, own.pairs, own.qk_done,
                   foreseen.share, foreseen.worst_row, other.density, other.qk_done,
                   int(missing.sum()), int(extra.sum()), first(missing), first(extra))

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON of `sparge check`."""
        return {name: list(x) if isinstance(x, tuple) else number(x) if isinstance(x, float) else x
                for name, x in asdict(self).items()}


@dataclass(frozen=True)
class HeadErrors:
    """One head of a report."""

    batch: int
    head: int
    o: Errors = field(repr=False)
    baseline_worst_row_l1: float
    lse_worst: float | None
    dense: Errors | None = field(repr=False)
    mask: MaskErrors | None = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON of `sparge check`."""
        at = (self.batch, self.head)
        found = {"batch": self.batch, "head": self.head, "l1": number(self.o.l1),
                 "worst_row_l1": number(self.o.worst_row_l1),
                 "worst_row": None if self.o.worst_row is None else [*at, *self.o.worst_row],
                 "baseline_worst_row_l1": number(self.baseline_worst_row_l1), **self.o.counts()}
        if self.lse_worst is not None:
            found["lse_worst"] = number(self.lse_worst)
        if self.dense is not None:
            found["dense_l1"] = number(self.dense.l1)
            found["dense_worst_row_l1"] = number(self.dense.worst_row_l1)
        return {**found, **(self.mask.to_dict() if self.mask else {})}


@dataclass(repr=False)
class Report:
    """What check() found. Places are (batch, head, query[, channel]) whatever the layout; batch is
    0 where q has no such axis.

    over                   "mask" or "dense": what o and lse are measured by
    type                   of o: "f32", "f16", "bf16", "f64"
    o                      its errors, beside attention in double over the same mask
    baseline_worst_row_l1  the worst row of an honest kernel
    max_worst              the bound of o's worst row; NaN: not known
    dense                  errors of o beside attention to all keys
    lse, mask              what was found of them, where they were given
    per_head               the same of each head, batch after batch
    hint                   what explains the worst row to within the bound, if something does
    given, predicted       the mask that was judged, and the one that it was compared with
    block_mass             [B, H, Qb, Kb]: attention of a query block to a key block, over all keys,
                           the mean of its rows
    """

    over: str
    type: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    dim_v: int
    block_q: int
    block_k: int
    causal: str
    o: Errors
    baseline_worst_row_l1: float
    max_worst: float
    dense: Errors | None = None
    lse: LseErrors | None = None
    mask: MaskErrors | None = None
    per_head: list[HeadErrors] = field(default_factory=list)
    hint: str | None = None
    given: BlockMask | None = None
    predicted: BlockMask | None = None
    block_mass: Floats = field(default_factory=lambda: np.empty(0))

    @property
    def ok(self) -> bool:
        """Is all within the bounds?"""
        return not self.reasons

    @property
    def reasons(self) -> list[str]:
        """Why not, in sentences; empty if it is ok."""
        return [reason for reason in (self.o_reason(), self.lse_reason()) if reason]

    def o_reason(self) -> str | None:
        """What is wrong with o."""
        return self._reason("o", self.o, self.o.worst, self.o.worst_row, "row",
                            self.baseline_worst_row_l1, self.max_worst)

    def lse_reason(self) -> str | None:
        """What is wrong with lse."""
        x = self.lse
        return None if x is None else self._reason("lse", x.errors, x.worst, x.worst_at, "element",
                                                   x.baseline_worst, x.max_worst)

    def _reason(self, name: str, errors: Errors, worst: float, at: Place | None, what: str,
                honest: float, bound: float) -> str | None:
        want = "dense attention" if self.over == "dense" else "attention over the mask"
        apart = errors.first_nonfinite_apart
        if apart is not None:
            at = apart if name == "o" else apart[:3]
            return (f"{name}: {errors.nonfinite_apart} elements are NaN or infinite where {want} "
                    f"is not, or the other way round; the first is {at}")
        if math.isnan(bound):
            return (f"{name}: an honest kernel is itself {honest:.3g} from {want}, so no bound "
                    "follows; give max_worst")
        if not worst <= bound:
            return f"{name}: {what} {at} is {worst:.3g} from {want}, allowed is {bound:.3g}"
        return None

    @property
    def bad_rows(self) -> NDArray[np.int64]:
        """[n, 3]: (batch, head, query) of the rows of o that are above the bound or not finite, the
        worst first."""
        bad = np.argwhere(~(self.o.rows <= self.max_worst))
        errors = np.nan_to_num(self.o.rows[tuple(bad.T)], nan=np.inf)
        return bad[np.argsort(-errors, kind="stable")]

    @property
    def bad_blocks(self) -> NDArray[np.int64]:
        """[n, 3]: (batch, head, query block) in which such rows are, in their order."""
        return np.unique(self.bad_rows // (1, 1, self.block_q), axis=0)

    def to_dict(self) -> dict[str, Any]:
        """The keys of `sparge check`'s JSON (tools/json.md), None for what is not finite; and
        "reasons" and "hint"."""
        names = ("over", "type", "batch", "heads", "kv_heads", "q_len", "k_len", "dim", "dim_v",
                 "block_q", "block_k", "causal")
        found = {"ok": self.ok, **{name: getattr(self, name) for name in names},
                 **self.o.to_dict(), "baseline_worst_row_l1": number(self.baseline_worst_row_l1),
                 "max_worst": number(self.max_worst)}
        for name in ("lse", "dense", "mask"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name).to_dict()
        return {**found, "per_head": [head.to_dict() for head in self.per_head],
                "reasons": self.reasons, "hint": self.hint}

    # ---- The table ----

    def __str__(self) -> str:
        shape = f"[{self.batch}, {self.heads}, {self.q_len}, {self.dim_v}]"
        over = "all keys (dense)" if self.over == "dense" else "its mask"
        lines = [f"{'ok' if self.ok else 'WRONG'}: o {self.type} {shape} by attention over {over}, "
                 f"causal: {self.causal}", "",
                 f"{'':24}{'rel. L1':>10}{'worst row':>11}{'allowed':>10}  at (batch, head, query)",
                 self._line("o", self.o, self.max_worst),
                 f"{'  an honest kernel':24}{'':10}{self.baseline_worst_row_l1:11.3g}"]
        if self.dense is not None:
            lines.append(self._line("o beside dense", self.dense, None))
        if self.lse is not None:
            lines += [f"{'lse, distance':24}{'':10}{self.lse.worst:11.3g}{self.lse.max_worst:10.3g}"
                      f"  {self.lse.worst_at or ''}",
                      f"{'  an honest kernel':24}{'':10}{self.lse.baseline_worst:11.3g}"]
        lines += self._mask_lines() + self._bad_lines()
        lines += ["", *self.reasons] if self.reasons else []
        return "\n".join(lines + ([f"hint: {self.hint}"] if self.hint else []))

    __repr__ = __str__  # what a prompt and a notebook show

    @staticmethod
    def _line(name: str, x: Errors, bound: float | None) -> str:
        allowed = "" if bound is None else f"{bound:.3g}"
        line = f"{name:24}{x.l1:10.3g}{x.worst_row_l1:11.3g}{allowed:>10}  {x.worst_row or ''}"
        if x.nonfinite_apart:
            line += f"  {x.nonfinite_apart} NaN or infinite, first {x.first_nonfinite_apart}"
        return line.rstrip()

    def _mask_lines(self) -> list[str]:
        m = self.mask
        if m is None:
            return []
        row = "{:24}{:>10}{:>11.3f}{:>10.3f}{:>11.3f}".format
        lines = ["", f"{'':24}{'blocks':>10}{'density':>11}{'recall':>10}{'worst row':>11}",
                 row("mask", m.kept_blocks, m.density_tokens, m.recall, m.worst_row_recall),
                 row("predicted", m.predicted_kept_blocks, m.predicted_density_tokens,
                     m.predicted_recall, m.predicted_worst_row_recall)]
        for name, count, at in (("missing", m.missing, m.first_missing),
                                ("extra", m.extra, m.first_extra)):
            lines.append(f"{'  ' + name:24}{count:>10}" + (f"  first {at}" if at else ""))
        return lines

    def _bad_lines(self) -> list[str]:
        rows = self.bad_rows
        if math.isnan(self.max_worst) or not rows.size:
            return []
        blocks, heads = self.bad_blocks, np.unique(rows[:, :2], axis=0)
        of = self.batch * self.heads
        all_blocks = of * -(-self.q_len // self.block_q)
        return ["", f"bad: {len(rows)} of {self.o.rows.size} rows, in {len(blocks)} of "
                    f"{all_blocks} query blocks, {len(heads)} of {of} heads",
                f"  rows    {_some(rows)}  (the worst first)", f"  blocks  {_some(blocks)}",
                f"  heads   {_some(heads)}"]


def _some(places: NDArray[np.int64]) -> str:
    """The first of some places."""
    words = " ".join("(" + ", ".join(map(str, at)) + ")" for at in places[:SHOWN].tolist())
    return words + (f" ... {len(places)}" if len(places) > SHOWN else "")
