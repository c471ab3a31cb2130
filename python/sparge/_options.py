# SPDX-License-Identifier: Apache-2.0
"""How attention is computed: the keyword arguments that all calls share, and the structs of the
library that they become."""
from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Union

import numpy as np

from sparge import _arrays
from sparge._device import stream
from sparge._native import Watch, ffi, lib, text, threads, words

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from sparge._params import Params, Thresholds

    Threshold = Union[float, ArrayLike, None]

Causal = Union[bool, Literal["end", "start", "none"]]

BACKENDS, DTYPES, ISAS, RULES, CAUSAL = (
    words(f) for f in (lib.sparge_backend_string, lib.sparge_dtype_string, lib.sparge_isa_string,
                       lib.sparge_rules_string, lib.sparge_causal_string))
THRESHOLDS = {"theta": "theta", "tau": "tau", "topk": "topk", "min_mass": "min_mass",
              "lambda_": "lambda"}


class Options(TypedDict, total=False):
    """The keyword arguments of all calls (see attention())."""

    is_causal: Causal
    softmax_scale: float | None
    theta: Threshold
    tau: Threshold
    topk: Threshold
    min_mass: Threshold
    lambda_: Threshold
    sink: bool
    params: Thresholds | Params | None
    qk_dtype: str
    pv_dtype: str
    smooth_k: bool
    block: tuple[int, int]
    cell: int
    skip_rows: int
    rules: str
    k_bias: Any
    backend: str
    isa: str
    kernel: int
    threads: int
    layout: str


# What stands in signatures; the numbers of None are the library's defaults.
DEFAULTS: Options = {
    "is_causal": False, "softmax_scale": None, "theta": None, "tau": None, "topk": None,
    "min_mass": None, "lambda_": None, "sink": False, "params": None, "qk_dtype": "int8",
    "pv_dtype": "int8", "smooth_k": True, "block": (128, 64), "cell": 0, "skip_rows": 0,
    "rules": "default", "k_bias": None, "backend": "auto", "isa": "auto", "kernel": 0,
    "threads": 0, "layout": "HND"
}

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_options(function: Function, kind: Any = Options,
                  defaults: Mapping[str, Any] = DEFAULTS) -> Function:
    """Shows the options in the signature of a function that takes them as **options, and refuses
    other names."""
    own = inspect.signature(function)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value,
                                annotation=kind.__annotations__[name].__forward_arg__)
              for name, value in defaults.items() if name not in own.parameters]
    known = [p.name for p in named + shared]

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise TypeError(f"{function.__name__}() has no argument {name!r}" +
                                (f": did you mean {near[0]!r}?" if near else ""))
        return function(*args, **options)

    checked.__signature__ = own.replace(parameters=named + shared)  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]


def word(name: str, value: Any, known: Mapping[str, int]) -> int:
    """The number of a word of an enum."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {value!r}, it must be one of {', '.join(map(repr, known))}")
    return known[value]


def causal(value: Causal, q_len: int, k_len: int) -> int:
    """The number of is_causal. True is for squares, where "end" and "start" are the same."""
    given = isinstance(value, (bool, np.bool_))
    if given and value and q_len != k_len:
        raise ValueError(f"is_causal is True with {q_len} queries and {k_len} keys, it must be "
                         "'end' (the last query sees all keys) or 'start' (the first sees one)")
    if given:
        value = "end" if value else "none"
    return word("is_causal", value, CAUSAL)


class Problem:
    """q, k and v as sparge_problem. It keeps the arrays alive. Where v is not read it is k."""

    def __init__(self, q: Any, k: Any, v: Any, layout: str = "HND", k_bias: Any = None) -> None:
        self.layout = layout
        self.q = _arrays.read("q", q, layout)
        self.k = _arrays.read("k", k, layout)
        self.v = _arrays.read("v", v, layout)
        for x in (self.k, self.v):
            if x.batched != self.q.batched:
                raise ValueError(f"{x.name} has {3 + x.batched} axes and q has {3 + self.q.batched}"
                                 ", they must have as many")
            if x.device != self.q.device:
                raise ValueError(f"{x.name} is on {x.device} and q is on {self.q.device}, they "
                                 "must be on one device")
        batch, heads, q_len, dim = self.q.shape
        _, kv_heads, k_len, _ = self.k.shape
        agree = [(self.k, 0, batch, "batch of q"), (self.v, 0, batch, "batch of q"),
                 (self.v, 1, kv_heads, "heads of k"), (self.v, 2, k_len, "tokens of k"),
                 (self.k, 3, dim, "channels of q")]
        for x, axis, want, what in agree:
            if x.shape[axis] != want:
                raise ValueError(f"{x.name} is [B, H, N, D] = {list(x.shape)}: {x.shape[axis]} "
                                 f"must be {want}, the {what}")
        self.c = ffi.new("sparge_problem *", {
            "batch": batch, "heads": heads, "kv_heads": kv_heads, "q_len": q_len, "k_len": k_len,
            "dim": dim, "dim_v": self.v.shape[3], "q": self.q.c(), "k": self.k.c(),
            "v": self.v.c()})
        if k_bias is not None:
            shape = (batch, kv_heads, k_len)[0 if self.q.batched else 1:]
            self.k_bias = _arrays.packed("k_bias", k_bias, self.q, shape)
            self.c.k_bias = _arrays.pointer(self.k_bias, "float *")

    @property
    def heads_shape(self) -> tuple[int, ...]:
        """[batch, heads], without batch if q has none."""
        return (self.c.batch, self.c.heads)[0 if self.q.batched else 1:]


class Settings:
    """sparge_options, and what its pointers point to."""

    def __init__(self, problem: Problem, options: Options) -> None:
        params = options.get("params")
        if params is not None and not hasattr(params, "of"):
            raise TypeError(f"params is a {type(params).__name__}, it must be Thresholds or "
                            "Params: give load_params(path).layer(number)")
        tuned = {} if params is None else params.options
        o: dict[str, Any] = {**DEFAULTS, **tuned, **options}
        p = problem.c
        self.c = ffi.new("sparge_options *")
        lib.sparge_options_init(self.c, ffi.sizeof("sparge_options"), lib.SPARGE_VERSION_NUMBER,
                                word("rules", o["rules"], RULES))
        self.watch = Watch()
        self.watch.on(self.c)
        c = self.c
        c.backend = word("backend", o["backend"], BACKENDS)
        c.isa = word("isa", o["isa"], ISAS)
        c.qk_dtype = word("qk_dtype", o["qk_dtype"], DTYPES)
        c.pv_dtype = word("pv_dtype", o["pv_dtype"], DTYPES)
        c.causal = causal(o["is_causal"], p.q_len, p.k_len)
        c.block_q, c.block_k = (whole("block", n) for n in pair("block", o["block"]))
        c.cell, c.skip_rows = (whole(name, o[name]) for name in ("cell", "skip_rows"))
        c.cuda.kernel = whole("kernel", o["kernel"])
        c.smooth_k, c.sink = (flag(name, o[name]) for name in ("smooth_k", "sink"))
        c.threads = threads(whole("threads", o["threads"]))
        if o["softmax_scale"] is not None:
            c.softmax_scale = scale = number("softmax_scale", o["softmax_scale"])
            if not c.softmax_scale > 0:  # 0 would be the default
                raise ValueError(f"softmax_scale is {scale}, it must be above 0, or None for "
                                 "1/sqrt(D)")
        self._thresholds(p, o)
        self._device(problem)

    def _thresholds(self, problem: Any, o: Mapping[str, Any]) -> None:
        heads = problem.heads
        given = {name: o[name] for name in THRESHOLDS if o[name] is not None}
        params = o["params"]
        if params is not None:
            if given:
                raise ValueError(f"params has the thresholds: leave out {', '.join(given)}")
            of = params.of(problem, self.c)
            given = {name: of[c] for name, c in THRESHOLDS.items()}
        arrays = {THRESHOLDS[name]: _of_heads(name, value, heads) for name, value in given.items()}
        if "tau" not in given and ("topk" in given or np.any(arrays.get("min_mass", 0))):
            arrays["tau"] = np.array(-1.0)  # as on the command line: topk or min_mass by itself
        for name, x in arrays.items():
            if x.size:
                setattr(self.c.thresholds, name, float(x.flat[0]))
        if heads and any(x.shape for x in arrays.values()):
            self.per_head = ffi.new("sparge_thresholds []", [self.c.thresholds] * heads)
            for name, x in arrays.items():
                for head, value in enumerate(np.broadcast_to(x, heads)):
                    setattr(self.per_head[head], name, float(value))
            self.c.per_head = self.per_head

    def _device(self, problem: Problem) -> None:
        on_cuda = problem.q.device != "cpu"
        if on_cuda and self.c.backend == lib.SPARGE_AUTO:
            self.c.backend = lib.SPARGE_CUDA
        if on_cuda != (self.c.backend == lib.SPARGE_CUDA):
            name = text(lib.sparge_backend_string(self.c.backend))
            raise ValueError(f"q is on {problem.q.device} and backend is {name!r}: cuda is for "
                             "tensors on a GPU, the others for those on the CPU")
        if on_cuda:
            self.c.cuda.stream = stream(problem.q)


def _of_heads(name: str, value: Any, heads: int) -> NDArray[np.float64]:
    """A threshold: a number, or one for each head."""
    try:
        x = _arrays.host(name, value)
        if x.dtype.kind in "cOSU":  # numpy would drop imaginary parts, and read texts
            raise TypeError
        x = x.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}, it must be a number or one for each of {heads} "
                         "heads") from None
    if x.shape not in ((), (heads, )):
        raise ValueError(f"{name} has the shape {list(x.shape)}, it must be a number or one for "
                         f"each of {heads} heads")
    return x


def number(name: str, value: Any) -> float:
    """A number."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}, it must be a number") from None


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {value!r}, it must be True or False")
    return bool(value)


def whole(name: str, value: Any) -> int:
    """A whole number."""
    try:
        found = int(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        found = None
    if found is None or isinstance(value, bool) or found != value:
        raise ValueError(f"{name} is {value!r}, it must be a whole number")
    if not -2**31 <= found < 2**31:
        raise ValueError(f"{name} is {found}, it must be below 2^31")
    return found


def pair(name: str, value: Any) -> tuple[int, int]:
    """Two of something."""
    try:
        first, second = value
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}, it must be two numbers: of queries and of keys"
                         ) from None
    return first, second


def prepare(q: Any, k: Any, v: Any, options: Options) -> tuple[Problem, Settings]:
    """What every call begins with."""
    problem = Problem(q, k, v, options.get("layout", DEFAULTS["layout"]),
                      options.get("k_bias"))
    return problem, Settings(problem, options)
