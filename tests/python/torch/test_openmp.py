# SPDX-License-Identifier: Apache-2.0
"""One OpenMP for torch and sparge, whichever is imported first."""
import os
import re
import subprocess
import sys

import pytest

SECONDS = 120  # a process that takes longer hangs; torch alone takes some to import
START = """
import os
import IMPORTS
import numpy as np

q, k, v = np.random.default_rng(1).standard_normal((3, 2, 512, 64)).astype(np.float32)
square = torch.ones(1000, 1000)


def threads():
    return len(os.listdir("/proc/self/task"))
"""


@pytest.fixture(params=["torch, sparge", "sparge, torch"])
def python(request):
    """Runs code in a fresh Python that imports both in this order."""

    def run(code, **environment):
        ran = subprocess.run([sys.executable, "-c", START.replace("IMPORTS", request.param) + code],
                             capture_output=True, text=True, timeout=SECONDS,
                             env={**os.environ, **environment})
        assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
        return ran.stdout.split()

    return run


def test_threads_are_shared(python):
    """Two OpenMPs would have threads of their own, that wait for work on the same processors."""
    after_torch, after_sparge, after_both = map(int, python("""
torch.set_num_threads(4)
square @ square
print(threads())
sparge.attention(q, k, v, threads=4)
print(threads())
square @ square
sparge.attention(q, k, v, threads=4)
print(threads())
"""))
    assert after_torch >= 4  # they are there
    assert after_torch == after_sparge == after_both


def test_the_number_of_threads_is_torchs(python):
    code = """
def used():
    return sparge.attention(q, k, v, return_stats=True)[1].threads
print(used() == torch.get_num_threads())
for n in 1, 3, 2:
    torch.set_num_threads(n)
    print(used())
print(sparge.attention(q, k, v, return_stats=True, threads=5)[1].threads, torch.get_num_threads())
"""
    assert python(code) == ["True", "1", "3", "2", "5", "2"]
    code = "print(sparge.attention(q, k, v, return_stats=True)[1].threads, torch.get_num_threads())"
    assert python(code, OMP_NUM_THREADS="1") == ["1", "1"]


def test_names_are_of_one_library(python, tmp_path):
    """By the loader's own list of what it bound."""
    python("", LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(tmp_path / "bound"))
    lines = "".join(path.read_text() for path in tmp_path.iterdir())
    bound = re.findall(r"binding file \S+/_sparge\S* \[0\] to (\S+) \[0\]: .*`(G?OMP_\w+|omp_\w+)'",
                       lines)
    assert len({name for _, name in bound}) > 3
    libraries = {library for library, _ in bound}
    assert len(libraries) == 1 and "/torch/lib/" in libraries.pop()


def test_a_fork(python):
    """Torch may have used its threads, which the child has not."""
    assert python("""
pid = os.fork()
if pid == 0:
    for n in 0, 1:
        try:
            print(sparge.attention(q, k, v, threads=n).shape[1], flush=True)
        except RuntimeError:
            print("refused", flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print(sparge.attention(q, k, v, threads=2).shape[1])
""") == ["refused", "512", "512"]
