# SPDX-License-Identifier: Apache-2.0
"""Tests of the Python package as it is installed: of a wheel, or PYTHONPATH=build/dev/python.

What takes torch stands in torch/ and is skipped by name where there is none."""
import importlib.util
import os

import pytest


class Skipped(pytest.Module):
    """A file that cannot be imported here."""

    def collect(self):
        pytest.skip("torch is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if module_path.parent.name == "torch" and importlib.util.find_spec("torch") is None:
        return Skipped.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def program():
    """The path of the sparge program."""
    if "SPARGE_PROGRAM" not in os.environ:
        pytest.skip("SPARGE_PROGRAM does not say where the sparge program is")
    return os.path.abspath(os.environ["SPARGE_PROGRAM"])
