"""rows.py: the CSV files that figures.py and report.py stand on."""
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
EXPERIMENTS = HERE.parent / "experiments"


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def of_item(item):
    return read(EXPERIMENTS / item / "out.csv")


def grouped(rows, *keys):
    """Rows by the values of some columns, in the order of the file."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[k] for k in keys)].append(row)
    return found


def column(rows, key):
    return np.array([float(r[key]) for r in rows])
