# SPDX-License-Identifier: Apache-2.0
"""What the library is, and what can run on this machine."""
from __future__ import annotations

import os
from typing import TypedDict

from sparge import _options
from sparge._native import call, ffi, lib, text


class Backend(TypedDict):
    """Of one backend."""

    built: bool  # is it in this library?
    available: bool  # can it run on this machine?


class Info(TypedDict):
    """What info() says. The keys of `sparge info --json` have what they have there."""

    version: str
    cores: int
    isa: dict[str, bool]  # can it run in this process?
    bf16: dict[str, bool]  # has it products in BF16?
    backends: dict[str, Backend]
    threads: int  # what threads=0 stands for
    openmp: list[str]  # the files of OpenMP's runtimes in this process


def info() -> Info:
    """The version, the backends that are built and can run here, and what the processor has."""
    isas = {word: n for word, n in _options.ISAS.items() if n != lib.SPARGE_ISA_AUTO}
    backends = {word: n for word, n in _options.BACKENDS.items() if n != lib.SPARGE_AUTO}
    return {
        "version": text(lib.SPARGE_VERSION),
        "cores": os.cpu_count() or 1,
        "isa": {word: bool(lib.sparge_isa_available(n)) for word, n in isas.items()},
        "bf16": {word: bool(lib.sparge_isa_has_bf16(n)) for word, n in isas.items()},
        "backends": {word: {"built": bool(lib.sparge_backend_built(n)),
                            "available": bool(lib.sparge_backend_available(n))}
                     for word, n in backends.items()},
        "threads": _threads(),
        "openmp": _runtimes(),
    }


def _threads() -> int:
    byte = ffi.new("char *")  # stands for q and k, which are not read
    problem = ffi.new("sparge_problem *", {"batch": 1, "heads": 1, "kv_heads": 1, "q_len": 1,
                                           "k_len": 1, "dim": 1, "dim_v": 1})
    problem.q.data = problem.k.data = byte
    options = ffi.new("sparge_options *")
    lib.sparge_options_init(options, ffi.sizeof("sparge_options"), lib.SPARGE_VERSION_NUMBER,
                            lib.SPARGE_RULES_DEFAULT)
    options.backend = lib.SPARGE_CPU
    call(lib.sparge_options_resolve, problem, options)
    return int(options.threads)


def _runtimes() -> list[str]:
    """The OpenMP libraries that are mapped; none if it stands in the module itself."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line}
    except OSError:
        return []
    names = ("libgomp", "libomp", "libiomp")
    return sorted(path for path in paths if os.path.basename(path).startswith(names))
