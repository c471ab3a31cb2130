# SPDX-License-Identifier: Apache-2.0
"""docs/tour.ipynb runs, and prints what stands in it.

    python tests/python/test_tour.py --write     runs it and puts what it prints into it; in an
                                                 environment with torch

What it prints must be the same on every processor, so there are no times in it. Of pictures it must
only be true that they are drawn.
"""
import copy
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import nbformat

import sparge

PATH = Path(__file__).resolve().parents[2] / "docs/tour.ipynb"
SECONDS = 300  # a cell that takes longer hangs
LARGEST = 400_000  # bytes of the file
LONGEST = 12  # lines of a cell


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def run(book):
    """The notebook with new outputs, by the Python that runs this; an error is raised."""
    import matplotlib.font_manager  # noqa: F401 (the first time it looks for fonts, and says so)
    from nbclient import NotebookClient
    from traitlets.config import Config

    book = copy.deepcopy(book)
    for cell in code(book):
        cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory() as folder:
        config = Config({"KernelManager": {"transport": "ipc",
                                           "connection_file": f"{folder}/kernel.json"}})
        client = NotebookClient(book, timeout=SECONDS, kernel_name="python3", record_timing=False,
                                coalesce_streams=True, config=config,
                                resources={"metadata": {"path": str(PATH.parent)}})
        here = str(Path(sparge.__file__).parents[1])  # PYTHONPATH may be relative
        client.execute(env={**os.environ, "IPYTHONDIR": folder, "PYTHONPATH": here})
    return book


def said(cell):
    """What a cell printed, and a line for each picture."""
    found = []
    for out in cell.outputs:
        if out.output_type == "stream":
            found.append(f"{out.name}: {out.text}" if out.name != "stdout" else out.text)
        elif "image/png" in out.get("data", {}):
            found.append("a picture\n")
        else:
            found.append(f"{out.output_type}: {out.get('data', {}).get('text/plain')}\n")
    return "".join(found)


def test_it_prints_what_stands_in_it():
    committed = nbformat.read(PATH, as_version=4)
    with_torch = importlib.util.find_spec("torch") is not None
    for want, got in zip(code(committed), code(run(committed))):
        if with_torch or "torch" not in want.metadata.get("tags", []):
            assert said(got) == said(want), want.source


def test_it_is_short():
    assert PATH.stat().st_size < LARGEST
    book = nbformat.read(PATH, as_version=4)
    assert all(len(cell.source.splitlines()) <= LONGEST for cell in code(book))
    # nothing of the run that wrote it
    assert [cell.execution_count for cell in code(book)] == list(range(1, 1 + len(code(book))))
    assert all(set(cell.metadata) <= {"tags"} for cell in book.cells)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    if importlib.util.find_spec("torch") is None:
        sys.exit("torch is not installed, and one of the cells shows it")
    written = run(nbformat.read(PATH, as_version=4))
    written.metadata.pop("language_info", None)  # the version of this Python
    nbformat.write(written, PATH)
