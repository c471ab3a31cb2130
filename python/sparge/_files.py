# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole."""
from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """All of it or nothing appears at this path, whose folder is made where it is missing. A device
    or a pipe is written to."""
    path = Path(os.path.realpath(os.fsdecode(path)))  # a link stays a link
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
