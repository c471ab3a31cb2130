# SPDX-License-Identifier: Apache-2.0
"""The library as cffi sees it, and what surrounds each of its calls: errors as exceptions, Ctrl-C,
and forks."""
from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, Callable

# ---- OpenMP -----------------------------------------------------------------------------------


def _load_torch_openmp() -> bool:
    """Loads the OpenMP of torch, if torch is installed; it is a small file of its own.

    A process has one OpenMP then, whichever of torch and sparge is imported first: threads are
    shared and take no processors from each other, and torch.set_num_threads() holds here. The
    module's names are bound all at once (-z now) to the first OpenMP in the process, so two are
    never mixed. Without torch it is that of the wheel, or of the system where the wheel has none.
    """
    try:
        torch = importlib.util.find_spec("torch")
    except (ImportError, ValueError):  # something else has the name
        return False
    for folder in (torch.submodule_search_locations or []) if torch else []:
        for path in Path(folder, "lib").glob("libgomp*.so*"):
            try:
                ctypes.CDLL(str(path), os.RTLD_GLOBAL)
                return True
            except OSError:
                pass
    return False


# Where OpenMP is ours, threads that wait sleep at once: those that spin would take processors from
# whatever comes between two calls, ten times what a small call needs. To wake them costs a call
# 0.1 ms or so. OpenMP reads the variable when it is loaded.
_policy = os.environ.get("OMP_WAIT_POLICY")
if not _load_torch_openmp():
    os.environ["OMP_WAIT_POLICY"] = _policy or "passive"
try:
    from sparge._sparge import ffi as ffi
    from sparge._sparge import lib as lib
finally:
    if _policy is None:
        os.environ.pop("OMP_WAIT_POLICY", None)

# ---- Errors -----------------------------------------------------------------------------------

# What the library says is wrong, as Python says it.
ERRORS = {
    lib.SPARGE_ERR_ARGUMENT: ValueError,
    lib.SPARGE_ERR_SHAPE: ValueError,
    lib.SPARGE_ERR_MEMORY: MemoryError,
    lib.SPARGE_ERR_UNSUPPORTED: NotImplementedError,
    lib.SPARGE_ERR_DEVICE: RuntimeError,
    lib.SPARGE_ERR_CANCELLED: KeyboardInterrupt,
}


def call(function: Any, *arguments: Any) -> None:
    """Calls a function of the library whose last argument is a sparge_error, and raises it."""
    error = ffi.new("sparge_error *")
    status = function(*arguments, error)
    if status:
        raise ERRORS[status](text(error.text))


def text(chars: Any) -> str:
    """A string of C."""
    return ffi.string(chars).decode() if chars else ""


def words(function: Any) -> dict[str, int]:
    """The words of an enum, by the function that names its values."""
    found: dict[str, int] = {}
    while not (word := text(function(len(found)))).startswith("unknown"):
        found[word] = len(found)
    return found


# ---- Ctrl-C -----------------------------------------------------------------------------------


class Watch:
    """What the library calls while it works. Python runs its signal handlers then, and what they or
    `progress` raise ends the library's call; `call` raises it again."""

    def __init__(self, progress: Callable[[float], Any] | None = None,
                 finished: Callable[[int], Any] | None = None) -> None:
        self.progress, self.finished = progress, finished
        self.error: BaseException | None = None
        self.handle = ffi.new_handle(self)

    def on(self, options: Any) -> None:
        """Makes a call with these options, of sparge_options or sparge_tune_options, report
        here."""
        watched = self.progress is not None
        options.progress = ffi.addressof(
            lib, "sparge_python_progress" if watched else "sparge_python_signals")
        options.user = self.handle

    def call(self, function: Any, *arguments: Any) -> None:
        """call(), but what was raised meanwhile is raised."""
        try:
            call(function, *arguments)
        except BaseException:
            if self.error is not None:
                raise self.error from None
            raise
        if self.error is not None:
            raise self.error


def _outside(kind: Any, error: BaseException, trace: Any) -> None:
    """Takes what a signal handler raised in a callback, but before or after its try."""
    watch: Watch = ffi.from_handle(trace.tb_frame.f_locals["user"])
    watch.error = error


@ffi.def_extern(error=False, onerror=_outside)  # type: ignore[untyped-decorator]
def sparge_python_progress(user: Any, done: float) -> bool:
    watch: Watch = ffi.from_handle(user)
    try:
        if watch.error is None and watch.progress is not None:
            watch.progress(done)
    except BaseException as error:
        watch.error = error
    return watch.error is None


@ffi.def_extern(onerror=_outside)  # type: ignore[untyped-decorator]
def sparge_python_finished(user: Any, head: int) -> None:
    watch: Watch = ffi.from_handle(user)
    try:
        if watch.error is None and watch.finished is not None:
            watch.finished(head)
    except BaseException as error:
        watch.error = error


# ---- Forks ------------------------------------------------------------------------------------

_used = _forked = False


def threads(count: int) -> int:
    """`count`, for options.threads; or an error where threads cannot be had."""
    global _used
    if _forked and count != 1:
        raise RuntimeError(
            "this process was forked from one whose threads it has not got, and a call would wait "
            "for them: give threads=1, or start processes by multiprocessing's 'spawn'")
    _used = _used or count != 1
    return count


def _after_fork() -> None:
    global _forked
    _forked = _forked or _used or "torch" in sys.modules


os.register_at_fork(after_in_child=_after_fork)
