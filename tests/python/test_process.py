# SPDX-License-Identifier: Apache-2.0
"""What happens around calls: Python's threads, Ctrl-C, forks, OpenMP, imports, memory."""
import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import sparge
from sparge import _native

SECONDS = 60  # a process that takes longer hangs
WITHOUT_OMP = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}


def tensors(heads=2, tokens=256, dim=64, seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((3, heads, tokens, dim), dtype=np.float32)


START = """
import numpy as np
q, k, v = np.random.default_rng(1).standard_normal((3, 2, 256, 64)).astype(np.float32)
"""


def run(*arguments, **environment):
    """What a fresh Python prints."""
    ran = subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                         timeout=SECONDS, env={**WITHOUT_OMP, **environment})
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
    return ran.stdout


def python(code, *flags, **environment):
    """The same of code in which q, k and v are arrays."""
    return run(*flags, "-c", START + code, **environment)


# ---- Threads of Python ------------------------------------------------------------------------


def test_other_threads_work_meanwhile(monkeypatch):
    q, k, v = tensors(tokens=2048)
    done = threading.Event()
    counted, since = 0, []
    calls = _native.Watch.call

    def call(self, *arguments):
        since.append(counted)
        calls(self, *arguments)
        done.set()

    monkeypatch.setattr(_native.Watch, "call", call)
    monkeypatch.setattr(_native.Watch, "on", lambda self, options: None)  # nobody is asked
    thread = threading.Thread(target=sparge.attention, args=(q, k, v),
                              kwargs={"backend": "ref", "threads": 1})
    thread.start()
    while not done.is_set():
        counted += 1
        os.sched_yield()  # lets go of the GIL
    thread.join()
    # A call that kept the GIL would leave this loop a turn or two. On a busy machine a turn lasts
    # until the other processes have had theirs, some ms, and the call lasts longer too.
    assert counted - since[0] > 30


def test_eight_threads_at_once():
    inputs = [tensors(seed=n) for n in range(8)]
    want = [sparge.attention(*x, return_mask=True) for x in inputs]
    got = [None] * 8
    at_once = threading.Barrier(8)

    def attend(n):
        at_once.wait(SECONDS)
        for _ in range(3):
            got[n] = sparge.attention(*inputs[n], return_mask=True, threads=1 + n % 3)

    threads = [threading.Thread(target=attend, args=(n, )) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(SECONDS)
    for (o, mask), (want_o, want_mask) in zip(got, want):
        assert o.tobytes() == want_o.tobytes()
        assert np.array_equal(mask.blocks, want_mask.blocks)


# ---- Ctrl-C -----------------------------------------------------------------------------------

# Sends SIGINT once the main thread is inside a call of the library, and says how often Python was
# asked from then on.
INTERRUPT = """
import os, signal, sys, threading
import sparge
from sparge import _native
asked = 0
looked_at = _native.Watch.__init__
def init(self, *a):
    looked_at(self, *a)
    def count(done):
        global asked
        asked += 1
    self.progress = count if COUNTED else None
_native.Watch.__init__ = init
main = threading.get_ident()
def interrupt():
    global asked
    inside = 0
    while inside < 3:  # seen in the call and nowhere else: it waits for C
        frame = sys._current_frames()[main]
        inside = inside + 1 if frame.f_code is _native.call.__code__ else 0
        threading.Event().wait(0.001)
    asked = 0
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    CALL
    print("it came to its end")
except KeyboardInterrupt:
    print("interrupted", asked)
print(sparge.attention(q, k, v).shape)
"""
# Minutes and more; one head stands for all, and what is not written to has no memory.
LONG = "*[np.broadcast_to(np.ones((4096, 128), np.float32), (HEADS, 4096, 128))] * 3"
CALLS = {
    "ref": f"sparge.attention({LONG}, backend='ref', tau=1)".replace("HEADS", "64"),
    "cpu": f"sparge.attention({LONG}, backend='cpu', tau=1)".replace("HEADS", "1024"),
    "oracle": f"sparge.oracle({LONG})".replace("HEADS", "8"),
    "making a plan": f"sparge.plan({LONG}, method='xattention')".replace("HEADS", "1024"),
    "a plan": f"sparge.plan({LONG}, backend='ref', tau=1).run()".replace("HEADS", "64"),
}


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_ends_a_call(call, counted):
    if not hasattr(sparge, CALLS[call].split("(")[0].split(".")[1]):
        pytest.skip("it is not there yet")
    said, after = python(INTERRUPT.replace("CALL", CALLS[call]).replace("COUNTED", str(counted))
                         ).splitlines()
    word, asked = said.split()
    # One question may have been on its way; handlers of signals run in the next.
    assert word == "interrupted" and int(asked) <= 2
    assert after == "(2, 256, 64)"


def test_what_a_handler_raises_ends_a_call():
    assert python("""
import signal, threading
import sparge
class Enough(Exception): pass
def enough(*_): raise Enough("that is enough")
signal.signal(signal.SIGALRM, enough)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    CALL
except Enough as e:
    print(e)
""".replace("CALL", CALLS["ref"])) == "that is enough\n"


# ---- Forks ------------------------------------------------------------------------------------

FORK = """
import os
import sparge
BEFORE
def child():
    try:
        print(sparge.attention(q, k, v, threads=THREADS).shape, flush=True)
    except RuntimeError as e:
        print(e, flush=True)
pid = os.fork()
if pid == 0:
    child()
    os._exit(0)
os.waitpid(pid, 0)
print(sparge.attention(q, k, v, threads=2).shape)
"""
USED = "sparge.attention(q, k, v, threads=2)"
REFUSED = ("this process was forked from one whose threads it has not got, and a call would wait "
           "for them: give threads=1, or start processes by multiprocessing's 'spawn'")
SHAPE = "(2, 256, 64)"


@pytest.mark.parametrize("before, threads, child", [
    (USED, 2, REFUSED), (USED, 0, REFUSED), (USED, 1, SHAPE), ("", 2, SHAPE),
    ("sparge.attention(q, k, v, threads=1)", 2, SHAPE)
])
def test_fork(before, threads, child):
    code = FORK.replace("BEFORE", before).replace("THREADS", str(threads))
    assert python(code).splitlines() == [child, SHAPE]


def test_fork_of_a_fork():
    code = FORK.replace("BEFORE", USED + "\nif os.fork():\n    os.wait()\n    os._exit(0)")
    code = code.replace("THREADS", "2").replace("print(sparge.attention(q, k, v, threads=2).shape)",
                                                "")
    assert python(code).splitlines() == [REFUSED]


def test_spawn(tmp_path):
    """multiprocessing's spawn after use."""
    (tmp_path / "work.py").write_text("""
import multiprocessing, numpy as np, sparge
def work(n):
    return sparge.attention(*np.full((3, 1, 200, 32), n, np.float32), threads=2).sum().item()
if __name__ == "__main__":
    want = [work(n) for n in range(3)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(work, range(3)) == want
    print("fine")
""")
    assert run(str(tmp_path / "work.py")) == "fine\n"


# ---- OpenMP -----------------------------------------------------------------------------------

STATS = "import sparge; print(sparge.attention(q, k, v, return_stats=True)[1].threads)"


def test_omp_num_threads():
    assert python(STATS, OMP_NUM_THREADS="3") == "3\n"
    assert python(STATS, OMP_NUM_THREADS="1") == "1\n"


def test_the_environment_stays():
    code = "import os; before = dict(os.environ); import sparge; print(before == dict(os.environ))"
    assert python(code) == "True\n"
    assert python(code, OMP_WAIT_POLICY="active") == "True\n"


# ---- Imports and memory -----------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["-W error", "-X dev", "-X dev -W error -bb"])
def test_strict_pythons(flags):
    found = python("import sparge; print(sparge.attention(q, k, v).shape)", *flags.split())
    assert found == f"{SHAPE}\n"


def test_import_takes_numpy_and_cffi_alone():
    found = python("""
import sys
import cffi, ctypes, difflib, inspect, threading, typing, dataclasses, functools, importlib.util
before = set(sys.modules)
import sparge
after = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(after - set(sys.stdlib_module_names) - {"numpy", "cffi", "_cffi_backend", "sparge"}))
""")
    assert found == "[]\n"


def test_import_is_quick():
    """In processor time: 0.1 s more than numpy takes."""
    took = [float(python(f"""
import time
start = time.process_time()
import {name}
print(time.process_time() - start)
""")) for name in ("re", "sparge")]
    # numpy is there already.
    assert took[1] - took[0] < 0.1, took


def test_many_calls_leak_nothing():
    q, k, v = tensors(tokens=64)

    def calls(count):
        for _ in range(count):
            sparge.attention(q, k, v, theta=[0.5, 0.6], return_lse=True, return_mask=True,
                             return_stats=True)
            sparge.attend(q, k, v, None)
            with pytest.raises(ValueError):
                sparge.attention(q, k, v, tau=2)
        gc.collect()

    calls(100)
    grown = []
    for _ in range(3):
        before = sys.getallocatedblocks()
        calls(200)
        grown.append(sys.getallocatedblocks() - before)
    # An object that stays each time makes each of them 200. Python itself keeps some now and then.
    assert min(grown) < 100, grown


def test_the_library_leaks_nothing():
    """Pages of the process, where C allocates too."""
    q, k, v = tensors(heads=1, tokens=1024, dim=8)

    def pages():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1])

    def calls(count):
        for _ in range(count):
            sparge.attention(q, k, v, block=(1, 16), tau=0.1, theta=-1, return_mask=True)
        gc.collect()

    calls(20)
    before = pages()
    calls(500)
    size = 500 * 1024 * 8 // os.sysconf("SC_PAGE_SIZE")
    assert pages() - before < size // 4, (before, pages(), size)
