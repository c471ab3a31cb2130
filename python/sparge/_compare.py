# SPDX-License-Identifier: Apache-2.0
"""How far one array is from another, in double: what `sparge check` calls l1, worst row and
nonfinite (tools/compare.h)."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, ...]
Floats = NDArray[np.float64]

COUNTS = ("nan_got", "nan_want", "inf_got", "inf_want", "nonfinite_apart")
PLACES = ("first_nan_got", "first_nan_want", "first_nan_apart", "first_nonfinite_apart")


@dataclass(frozen=True)
class Errors:
    """An array beside the one it should be.

    Elements that are not finite in one alone, or in both but not alike (NaN and NaN, or the same
    infinity), are apart: then l1 and its like are not finite either. Those that are alike are left
    out of the sums. A row is the last axis; one without an element in the sums is not judged.
    """

    l1: float  # sum|got - want| / sum|want|; of nothing by nothing 0; NaN: nothing in the sums
    worst_row_l1: float  # the largest of any row; NaN is larger than all
    worst_row: Place | None  # None: no row is judged
    cosine: float
    rmse: float
    nan_got: int
    nan_want: int
    inf_got: int
    inf_want: int
    nonfinite_apart: int
    first_nan_got: Place | None
    first_nan_want: Place | None
    first_nan_apart: Place | None
    first_nonfinite_apart: Place | None
    rows: Floats = field(repr=False)  # relative L1 of each row; -1: not judged

    @property
    def worst(self) -> float:
        """The worst row; 0 where none is judged."""
        return self.worst_row_l1 if self.worst_row is not None else 0.0

    def counts(self) -> dict[str, int]:
        """What is not finite."""
        return {name: getattr(self, name) for name in COUNTS}

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON of `sparge check` (tools/json.md)."""
        return {"l1": number(self.l1), "worst_row_l1": number(self.worst_row_l1),
                "worst_row": place(self.worst_row), "cosine": number(self.cosine),
                "rmse": number(self.rmse), **self.counts(),
                **{name: place(getattr(self, name)) for name in PLACES}}


def number(x: float) -> float | None:
    """A number of JSON, which knows none that is not finite."""
    return float(x) if math.isfinite(x) else None


def place(at: Place | None) -> list[int] | None:
    """Coordinates in JSON."""
    return None if at is None else list(at)


def first(found: NDArray[np.bool_]) -> Place | None:
    """The coordinates of the first true element."""
    at = int(found.argmax()) if found.size else 0
    return tuple(map(int, np.unravel_index(at, found.shape))) if found.any() else None


def _same(got: Floats, want: Floats) -> NDArray[np.bool_]:
    return np.asarray((np.isnan(got) & np.isnan(want)) | (got == want))


def relative(distance: Any, size: Any) -> Any:
    """A distance over a size; 0 of nothing by nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(distance == 0.0, 0.0, np.divide(distance, size))


def compare(got: Floats, want: Floats) -> Errors:
    """Of two arrays of one shape, rows in the last axis."""
    finite, same = np.isfinite(got) & np.isfinite(want), _same(got, want)
    apart, summed = ~(finite | same), finite | ~same
    nan_got, nan_want = np.isnan(got), np.isnan(want)
    with np.errstate(all="ignore"):
        g, w = np.where(summed, got, 0.0), np.where(summed, want, 0.0)
        distance, size = np.abs(g - w).sum(-1), np.abs(w).sum(-1)
        rows = np.where(summed.any(-1), relative(distance, size), -1.0)
        l1 = float(relative(distance.sum(), size.sum()))
        cosine = float((g * w).sum() / np.sqrt((g * g).sum() * (w * w).sum()))
        rmse = float(np.sqrt(((g - w)**2).sum() / summed.sum())) if got.size else 0.0
    worst = int(rows.argmax()) if rows.size else -1  # the first NaN, or the first of the largest
    judged = worst >= 0 and rows.flat[worst] != -1.0
    nothing = got.size > 0 and not judged
    return Errors(
        l1=math.nan if nothing else l1,
        worst_row_l1=float(rows.flat[worst]) if judged else math.nan if nothing else 0.0,
        worst_row=tuple(map(int, np.unravel_index(worst, rows.shape))) if judged else None,
        cosine=cosine, rmse=rmse, nan_got=int(nan_got.sum()), nan_want=int(nan_want.sum()),
        inf_got=int(np.isinf(got).sum()), inf_want=int(np.isinf(want).sum()),
        nonfinite_apart=int(apart.sum()), first_nan_got=first(nan_got),
        first_nan_want=first(nan_want), first_nan_apart=first(nan_got != nan_want),
        first_nonfinite_apart=first(apart), rows=rows)


def distance(got: Floats, want: Floats) -> tuple[float, Place | None]:
    """The largest |got - want| of any element, NaN being larger than all, and where."""
    with np.errstate(invalid="ignore"):
        apart = np.where(_same(got, want), 0.0, np.abs(got - want))
    at = int(apart.argmax()) if apart.size else 0
    if not apart.size or apart.flat[at] == 0.0:
        return 0.0, None
    return float(apart.flat[at]), tuple(map(int, np.unravel_index(at, apart.shape)))


@dataclass(frozen=True)
class Recall:
    """The attention that a mask keeps, over rows that see a key and whose attention is a number
    (tools/judge.h)."""

    share: float  # in [0, 1]: the mean; 1 where no row sees a key, NaN where there is no such row
    worst_row: float  # the least
    nonfinite: int  # rows whose attention is not a number: left out


def recall(masked: Floats, dense: Floats) -> Recall:
    """From the oracle's lse over a mask and over all keys."""
    sees = dense != -np.inf
    sound = sees & np.isfinite(dense) & ~np.isnan(masked)
    kept = np.minimum(1.0, np.exp(masked[sound] - dense[sound]))
    lost = int((sees & ~sound).sum())
    share = float(kept.mean()) if kept.size else math.nan if lost else 1.0
    return Recall(share, float(kept.min()) if kept.size else share, lost)
