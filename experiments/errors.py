# SPDX-License-Identifier: Apache-2.0
"""errors.py: figures that may be unknown, and how far one attention is from another where not all
of it is finite."""
import math
import sys

import numpy as np


def number(x):
    """A figure of a JSON object or of a table; NaN where it is null or empty."""
    return math.nan if x in ("", None) else float(x)


def worst(values):
    """The largest of some figures; NaN where one of them is unknown."""
    return float(np.max([number(x) for x in values]))


def cell(x, digits=3):
    """The same for a table: empty where it is unknown."""
    return "" if math.isnan(number(x)) else f"{number(x):.{digits}f}"


def l1(got, want):
    """sum|got - want| / sum|want| of all of it; want is in double."""
    return float(np.abs(got - want).sum() / np.abs(want).sum())


def row_l1(got, want):
    """The same of each row."""
    return np.abs(got - want).sum(-1) / np.abs(want).sum(-1)


def relative_l1(got, want, what):
    """sum|got - want| / sum|want| of each head of [H, N, D], over the elements that are finite.
    Those that are not are counted on stderr; a head has no error, but NaN, where they are not alike
    in both or none is left."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    finite = np.isfinite(got) & np.isfinite(want)
    apart = ~finite & (got != want) & ~(np.isnan(got) & np.isnan(want))
    if not finite.all():
        (nan_got, inf_got), (nan_want, inf_want) = ((np.isnan(x).sum(), np.isinf(x).sum())
                                                    for x in (got, want))
        print(
            f"{what} has {nan_got} NaN and {inf_got} infinite elements, what it is compared with "
            f"{nan_want} and "
            f"{inf_want}: {apart.sum()} are apart", file=sys.stderr)
    distance = np.abs(np.subtract(got, want, out=np.zeros_like(got), where=finite)).sum((1, 2))
    size = np.abs(np.where(finite, want, 0.0)).sum((1, 2))
    known = finite.any((1, 2)) & ~apart.any((1, 2))
    return np.where(known, distance / np.where(known, size, 1.0), math.nan)
