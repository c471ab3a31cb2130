# SPDX-License-Identifier: Apache-2.0
"""For tests that are Python scripts: checks that are counted, and every test in a folder of its
own."""
import os
import shutil
import sys
import tempfile
import traceback

passed = failed = 0


def check(ok, what, *seen):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print("FAILED", what, *seen, flush=True)
    return ok


def run_tests(tests, wanted, prefix, remark=lambda: ""):
    """Runs each function of `tests` whose name begins with test_, or the wanted ones; says how it
    went, with a remark at the end, and exits."""
    for name, test in list(tests.items()):
        if name.startswith("test_") and (not wanted or name in wanted):
            here, folder = os.getcwd(), tempfile.mkdtemp(prefix=prefix)
            os.chdir(folder)
            try:
                test()
            except Exception:
                check(False, name, traceback.format_exc())
            finally:
                os.chdir(here)
                shutil.rmtree(folder)
    print(f"{passed} passed, {failed} failed{remark()}")
    sys.exit(failed > 0)
