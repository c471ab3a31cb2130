# SPDX-License-Identifier: Apache-2.0
"""rows.py: the CSV files that figures.py and report.py stand on."""
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
EXPERIMENTS = HERE.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

from errors import number  # noqa: E402
from harness import read_csv  # noqa: E402


def of_item(item):
    return read_csv(EXPERIMENTS / item / "out.csv")


def grouped(rows, *keys):
    """Rows by the values of some columns, in the order of the file."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[k] for k in keys)].append(row)
    return found


def column(rows, key):
    return np.array([number(r[key]) for r in rows])
