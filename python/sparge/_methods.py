# SPDX-License-Identifier: Apache-2.0
"""The methods of sparge_methods.h by name, their parameters, and what they are told beside q, k and
v."""
from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparge._arrays import host, pointer
from sparge._native import ffi, lib, text
from sparge._options import (
    DEFAULTS,
    THRESHOLDS,
    Function,
    Options,
    number,
    takes_options,
    whole,
)
from sparge._order import Grid, grid_struct

NEEDS = {getattr(lib, name): name[len("SPARGE_NEEDS_"):].lower()
         for name in dir(lib) if name.startswith("SPARGE_NEEDS_")}


@dataclass(frozen=True)
class Param:
    """A parameter of a method.

    name       the paper's symbol, if it has one
    low, high  its range, to which both ends belong
    default    what it is where it is not given
    whole      must it be a whole number?
    what       what it means, in words
    """

    name: str
    low: float
    high: float
    default: float
    whole: bool
    what: str


@dataclass(frozen=True)
class Method:
    """A method: a function from q, k and v to a plan (sparge_method).

    name        for method= of a call
    title       in words
    paper       "arXiv 2503.16428"; "" for our own
    repository  the authors' code that was read, at this commit; or ""
    kind        training-free, yardstick, ...
    evidence    how many of its blocks or pairs are those of the authors' code, or ""
    needs       causal, not_causal, grid, segments, state
    params      the first sets the density, which never falls with it
    falls       or which never rises with it, but falls
    at_run      does it keep all pairs, and its density is that of P.V, which a run tells?
    """

    name: str
    title: str
    paper: str
    repository: str
    commit: str
    kind: str
    evidence: str
    needs: tuple[str, ...]
    params: tuple[Param, ...]
    falls: bool
    at_run: bool


def _read(m: Any) -> Method:
    params = []
    for q in m.param:
        if not q.name:
            break
        kind = int if q.whole else float
        params.append(Param(text(q.name), kind(q.low), kind(q.high), kind(q.usual), q.whole,
                            text(q.what)))
    return Method(text(m.name), text(m.title), text(m.paper), text(m.repository), text(m.commit),
                  text(m.kind), text(m.evidence),
                  needs=tuple(word for bit, word in sorted(NEEDS.items()) if m.needs & bit),
                  params=tuple(params), falls=m.falls, at_run=m.at_run)


def methods() -> tuple[Method, ...]:
    """All methods of the library, by name: where each is from, what it needs, its parameters with
    their ranges and defaults. methods/README.md says more of each."""
    count = ffi.new("int *")
    found = lib.sparge_methods(count)
    return tuple(_read(found[n]) for n in range(count[0]))


class State:
    """What a method keeps from call to call of one layer (minference: which pattern each head
    has): make one for each layer, and give it to every call of that layer with the method. Calls
    in other threads wait for each other while they make their plans."""

    def __init__(self) -> None:
        self._method, self._lock = "", Lock()
        self._c = ffi.gc(ffi.new("void **"), lambda kept: lib.free(kept[0]))


class MethodOptions(Options, total=False):
    """The keyword arguments of calls that choose what is attended (see attention())."""

    method: str | Method | None
    method_params: Mapping[str, float] | None
    density: float | None
    grid: Sequence[int] | None
    segment_ends: Sequence[int] | None
    gate: Mapping[str, Any] | None
    layer: int
    step: int
    state: State | None


METHOD_DEFAULTS: MethodOptions = {
    "method": None, "method_params": None, "density": None, "grid": None, "segment_ends": None,
    "gate": None, "layer": 0, "step": 0, "state": None
}


def takes_method(function: Function) -> Function:
    """takes_options() of a function that takes MethodOptions."""
    return takes_options(function, MethodOptions, {**METHOD_DEFAULTS, **DEFAULTS})


def chooses(options: Mapping[str, Any]) -> bool:
    """Is a plan asked for, by a method or a density?"""
    if options.get("method") is None and options.get("method_params") is not None:
        raise ValueError("method_params is given and method is None: name the method")
    return options.get("method") is not None or options.get("density") is not None


class Choice:
    """A method, and the values of its parameters."""

    def __init__(self, name: str, params: Mapping[str, Any], named: bool) -> None:
        self.named = named  # was it asked for by name?
        self.c = lib.sparge_method_find(name.encode())
        if not self.c:
            raise ValueError(f"method is {name!r}, it must be one of " +
                             ", ".join(repr(m.name) for m in methods()))
        self.method = _read(self.c)
        self.param = ffi.new(f"double [{lib.SPARGE_MAX_PARAMS}]",
                             [p.default for p in self.method.params])
        names = [p.name for p in self.method.params]
        for key, value in params.items():
            if key not in names:
                near = difflib.get_close_matches(key, names, 1) or names
                raise ValueError(f"{name} has no parameter {key!r}: it has "
                                 f"{', '.join(map(repr, near))}" if names else
                                 f"{name} has no parameters: leave out {key!r}")
            self.param[names.index(key)] = number(f"{key} of {name}", value)

    @property
    def params(self) -> dict[str, float]:
        """All parameters by name, also those that were found for a density."""
        return {p.name: int(x) if p.whole else x for p, x in zip(self.method.params, self.param)}


def _written(spec: str) -> tuple[str, dict[str, float]]:
    """The command line's NAME:PARAM=VALUE,..."""
    name, _, rest = spec.partition(":")
    found: dict[str, float] = {}
    for item in rest.split(",") if rest else ():
        key, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"method is {spec!r}: {key!r} must be followed by = and a number"
                             ) from None
        if key in found:
            raise ValueError(f"method is {spec!r}: {key!r} is there twice")
        found[key] = number
    return name, found


def _refuse(options: Mapping[str, Any], names: Sequence[str], why: str) -> None:
    given = [name for name in names
             if options.get(name) is not None and options[name] is not False]
    if given:
        raise ValueError(f"{why}: leave out {' and '.join(given)}")


def choose(options: Mapping[str, Any], settings: Any) -> Choice:
    """The method of the options; without one SpargeAttn under their rules, with their
    thresholds."""
    method, density = options.get("method"), options.get("density")
    if method is None:
        rules = settings.c.rules  # params may have them
        name = "spargeattn" + (f"_{text(lib.sparge_rules_string(rules))}" if rules else "")
        if density is not None:
            _refuse(options, ("params", "tau", "topk", "min_mass", "cell"), "density finds tau")
            if settings.c.per_head:
                raise ValueError("density finds one tau for all heads: theta and lambda_ must be "
                                 "numbers, not arrays")
        t = settings.c.thresholds
        return Choice(name, {"tau": t.tau, "theta": t.theta, "topk": t.topk,
                             "lambda": getattr(t, "lambda"), "sink": settings.c.sink}, False)
    if not isinstance(method, (str, Method)):
        raise TypeError(f"method is a {type(method).__name__}, it must be a name or a Method")
    name, given = _written(method) if isinstance(method, str) else (method.name, {})
    _refuse(options, (*THRESHOLDS, "cell", "sink", "params"),
            f"method is {name!r}, which has parameters of its own (method_params)")
    more = options.get("method_params")
    if not isinstance(more, (Mapping, type(None))):
        raise TypeError(f"method_params is {more!r}, it must be a dict of numbers by name")
    for key, value in (more or {}).items():
        if key in given:
            raise ValueError(f"{key} stands in method and in method_params: leave out one")
        given[key] = value
    choice = Choice(name, given, True)
    first = choice.method.params[0].name if choice.method.params else None
    if density is not None and first in given:
        raise ValueError(f"density finds {first} of {name}: leave out one of them")
    return choice


def _matrices(gate: Mapping[str, Any], name: str, heads: set[int], rows: int,
              hidden: int | None = None) -> NDArray[np.float32]:
    try:
        x = np.ascontiguousarray(host(f"gate[{name!r}]", gate[name]), np.float32)
    except ValueError:
        raise TypeError(f"gate[{name!r}] is {gate[name]!r:.60}, it must be an array of numbers"
                        ) from None
    if x.ndim != 3 or x.shape[0] not in heads or x.shape[1] != rows or \
            hidden not in (None, x.shape[2]):
        raise ValueError(f"gate[{name!r}] has the shape {list(x.shape)}, it must be "
                         f"[{' or '.join(map(str, sorted(heads)))}, {rows}, {hidden or 'hidden'}]")
    return x


def _gate_struct(gate: Any, p: Any) -> tuple[Any, Any]:
    """sparge_gate, and what its pointers point to."""
    if not isinstance(gate, Mapping) or {*gate} - {"q", "k", "rope_base"} or gate.get("k") is None:
        raise TypeError(f"gate is {gate!r:.60}, it must be a dict of 'k', and 'q' and 'rope_base' "
                        "if there are any")
    k = _matrices(gate, "k", {p.kv_heads, p.heads}, 3 * p.dim)
    q = None if gate.get("q") is None else _matrices(gate, "q", {p.heads}, p.dim, k.shape[2])
    return ffi.new("sparge_gate *", {
        "hidden": k.shape[2], "k_heads": k.shape[0],
        "rope_base": number("rope_base of the gate", gate.get("rope_base", 0.0)),
        "q": ffi.NULL if q is None else pointer(q, "float *"), "k": pointer(k, "float *")
    }), (k, q)


class Context:
    """sparge_context, and what its pointers point to."""

    def __init__(self, options: Mapping[str, Any], problem: Any) -> None:
        options = {**METHOD_DEFAULTS, **options}
        q_len, k_len = problem.q_len, problem.k_len
        self.c = ffi.new("sparge_context *", {name: whole(name, options[name])
                                              for name in ("layer", "step")})
        grid, ends = options.get("grid"), options.get("segment_ends")
        if grid is not None:
            self.grid = grid_struct(grid)
            tokens = Grid(*grid).tokens
            if not tokens == q_len == k_len:
                raise ValueError(f"grid is {tuple(grid)}, of {tokens} tokens, and there are "
                                 f"{q_len} queries and {k_len} keys")
            self.c.grid = self.grid
        if ends is not None:
            try:
                ends = [whole("segment_ends", end) for end in ends]
            except TypeError:
                raise TypeError(f"segment_ends is {ends!r}, it must ascend to the {k_len} keys"
                                ) from None
            if sorted(set(ends)) != ends or ends[-1:] != [k_len] or ends[0] < 0:
                raise ValueError(f"segment_ends is {ends}, it must ascend to the {k_len} keys")
            self.ends = ffi.new("int64_t []", ends)
            self.c.segment_ends, self.c.segments = self.ends, len(ends)
        if options.get("gate") is not None:
            self.gate, self.matrices = _gate_struct(options["gate"], problem)
            self.c.gate = self.gate
        self.state: State | None = options.get("state")
        if self.state is not None:
            if not isinstance(self.state, State):
                raise TypeError(f"state is a {type(self.state).__name__}, it must be a State")
            self.c.state = self.state._c

    @contextmanager
    def turn(self, method: str) -> Iterator[None]:
        """In which a plan of a method is made. Another method would take its state for its own."""
        state = self.state or State()
        with state._lock:
            if state._method not in ("", method):
                raise ValueError(f"state is that of {state._method!r} and method is {method!r}: "
                                 "make one for each method and layer")
            state._method = method
            yield
