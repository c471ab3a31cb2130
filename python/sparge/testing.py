# SPDX-License-Identifier: Apache-2.0
"""For the tests of other kernels."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparge._check import check
from sparge._options import Options, takes_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["assert_kernel"]


@takes_options
def assert_kernel(o: Any, q: Any, k: Any, v: Any, *, mask: Any = None, lse: Any = None,
                  max_worst: float | None = None, **options: Unpack[Options]) -> None:
    """Raises AssertionError with the table of check() unless o, and lse where it is given, are what
    attention over the mask gives, to within the bound.

        sparge.testing.assert_kernel(my_kernel(q, k, v, mask), q, k, v, mask=mask)

    Arguments, shapes, the rule and other errors are those of check(). The Report
    is the exception's .report.
    """
    report = check(o, q, k, v, mask=mask, lse=lse, max_worst=max_worst, **options)
    if not report.ok:
        error = AssertionError(f"\n{report}")
        error.report = report  # type: ignore[attr-defined]
        raise error
