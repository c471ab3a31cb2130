# SPDX-License-Identifier: Apache-2.0
"""Packages that only some functions need."""
from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, what: str) -> Any:
    """A module, which `what` needs; ImportError says how its package is installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{what} needs {package}, which cannot be imported ({error}): "
                          f"pip install {package}") from error
