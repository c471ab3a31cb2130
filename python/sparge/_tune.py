# SPDX-License-Identifier: Apache-2.0
"""The tuner: thresholds for every head, chosen on sample inputs (Sec 3.6, sparge_tune.h)."""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sparge._native import ffi, lib, text
from sparge._options import (
    DEFAULTS,
    THRESHOLDS,
    Options,
    Problem,
    Settings,
    causal,
    number,
    takes_options,
    whole,
    word,
)
from sparge._params import FORMAT, Params, Thresholds, described, short

if TYPE_CHECKING:
    from typing_extensions import Unpack

BOUNDS, BY = {"worst": 0, "mean": 1}, {"tau": 0, "topk": 1}  # sparge_tune_options
SHARED = ("heads", "kv_heads", "dim", "dim_v")  # of all inputs


@dataclass(frozen=True)
class TuneErrors:
    """Errors of whole calls over some inputs, as relative L1 against dense attention in f32.

    mean, worst  over the inputs; NaN without inputs, infinite if o is not finite
    sparsity     mean over the inputs
    nan, inf     elements of o
    """

    inputs: int
    mean: float
    worst: float
    sparsity: float
    nan: int
    inf: int

    def _json(self) -> dict[str, Any] | None:
        if self.inputs == 0:
            return None
        return {"inputs": self.inputs, "l1": rounded(self.mean, 6),
                "worst_l1": rounded(self.worst, 6), "sparsity": rounded(self.sparsity, 6),
                "nan_got": self.nan, "inf_got": self.inf}


@dataclass(frozen=True)
class TunedHead:
    """What was found for a head (sparge_tuned).

    theta         as of attention(), as are tau and topk, -1: off, min_mass, 0: off, and lambda_,
                  -inf: off
    finite        False: an input or its dense output has NaN or infinity; left dense
    nonfinite     their elements that are NaN or infinite
    dense         theta -1, tau 1, lambda -inf
    back_off      what was done about an error above l2: "none", "lambda lowered" ...
    in_sample     errors of these thresholds on the inputs tuned on
    held_out      on inputs not tuned on; held_out_first: before backing off
    dense_passes  products of blocks, in dense passes over the inputs
    """

    theta: float
    tau: float
    topk: float
    min_mass: float
    lambda_: float
    finite: bool
    nonfinite: int
    dense: bool
    back_off: str
    in_sample: TuneErrors
    held_out: TuneErrors
    held_out_first: TuneErrors
    dense_passes: float
    seconds: float

    @classmethod
    def read(cls, c: Any) -> TunedHead:
        """From sparge_tuned."""
        found = {f.name: getattr(c, f.name) for f in fields(cls) if f.name not in THRESHOLDS}
        for name in ("in_sample", "held_out", "held_out_first"):
            errors = found[name]
            found[name] = TuneErrors(**{f.name: getattr(errors, f.name)
                                        for f in fields(TuneErrors)})
        found["back_off"] = text(lib.sparge_back_off_string(c.back_off))
        return cls(**{name: getattr(c.thresholds, of) for name, of in THRESHOLDS.items()}, **found)

    def _json(self) -> dict[str, Any]:
        """As the program has it."""
        off = float(lib.SPARGE_OFF)
        return {"dense": self.dense, "theta": short(self.theta),
                "tau": None if self.tau == off else short(self.tau),
                "topk": None if self.topk == off else short(self.topk),
                "min_mass": short(self.min_mass) or None, "lambda": short(self.lambda_),
                "finite": self.finite, "back_off": self.back_off,
                "in_sample": self.in_sample._json(), "held_out": self.held_out._json(),
                "held_out_first": self.held_out_first._json(),
                "dense_passes": rounded(self.dense_passes, 4), "seconds": rounded(self.seconds, 4)}


@dataclass(frozen=True)
class Tuned:
    """What tune() found for the heads of a layer."""

    heads: tuple[TunedHead | None, ...]  # None: there was no time for it
    tuned: dict[str, Any]  # for what, in the words of a file

    def params(self, layer: int = 0, *, heads: Sequence[int] | None = None,
               model: str | None = None, weights_sha256: str | None = None) -> Params:
        """What was found as the file of a model with this one layer. heads: their numbers in the
        model, where they do not begin at 0. Heads without thresholds are left out.

        The file lists no inputs: those of tune() are no files. So `sparge tune` does not go on with
        it.
        """
        numbers = range(len(self.heads)) if heads is None else heads
        if len(numbers) != len(self.heads):
            raise ValueError(f"heads has {len(numbers)} numbers, it must have {len(self.heads)}")
        lines = [{"layer": layer, "head": number, **head._json()}
                 for number, head in zip(numbers, self.heads) if head is not None]
        version = text(lib.SPARGE_VERSION)
        return Params({"sparge_params": FORMAT, "version": version, "model": model,
                       "weights_sha256": weights_sha256, **self.tuned, "inputs": [],
                       "heads": lines})

    @property
    def thresholds(self) -> Thresholds:
        """For params= of a call. ValueError: a head has none."""
        if missing := [n for n, head in enumerate(self.heads) if head is None]:
            raise ValueError(f"heads {', '.join(map(str, missing))} have no thresholds: there was "
                             "no time for them")
        return self.params().layer(0)

    def save(self, path: str | os.PathLike[str], layer: int = 0, **more: Any) -> None:
        """Writes params(layer, **more) as a file that `sparge run --params` and load_params() read.
        """
        self.params(layer, **more).save(path)


@takes_options
def tune(inputs: Sequence[tuple[Any, Any, Any]], *, l1: float | None = None,
         l2: float | None = None, bound: str = "worst", sparsity: float | None = None,
         by: str = "tau", held_out: int = 0, seconds: float = 0,
         progress: Callable[[float], Any] | None = None,
         finished: Callable[[int, TunedHead], Any] | None = None,
         **options: Unpack[Options]) -> Tuned:
    """Thresholds of every head: the (theta, tau) of most sparsity whose error is below l1 on every
    input, then the lambda of most sparsity whose error is below l2 (Sec 3.6).

    inputs: (q, k, v) of one layer, as attention() takes them, in host memory. Lengths and batches
        may differ; every element of a batch is an input.
    l1, l2: bounds of the relative L1 against dense attention in f32, 0 < l1 < l2. The paper has
        (0.08, 0.09) for Llama 3.1 and (0.05, 0.06) for video.
    bound: what l1 and l2 bound: "worst", every input, or "mean", the mean over them.
    sparsity: in (0, 1), in place of the bounds: the least error that has this sparsity.
    by: "tau", or "topk": choose topk, and leave tau off.
    held_out: so many last inputs are judged on, not tuned on; 0: each in turn.
    seconds: time after which unfinished heads are given up; 0: never.
    progress: called with a share from 0 to 1; what it raises ends the call.
    finished: called with the number of each head and what was found for it. It and progress are
        called by one thread at a time, which may be another than the caller's.

    Ctrl-C ends the call with KeyboardInterrupt; the heads that were done by then are those that
    `finished` has been given. ValueError: a number is out of its range, or the inputs have not the
    same heads and channels.
    """
    problems = _problems(inputs, options)
    mean, topk = word("bound", bound, BOUNDS), word("by", by, BY)
    if sparsity is not None and (l1 is not None or l2 is not None or mean):
        raise ValueError(f"sparsity is {sparsity}, and sought instead of a bound: leave out l1, l2 "
                         "and bound")
    settings = Settings(problems[0], options)
    how = ffi.new("sparge_tune_options *", {
        **{name: 0 if x is None else number(name, x)
           for name, x in (("l1", l1), ("l2", l2), ("sparsity", sparsity))},
        "mean": mean, "topk": topk, "held_out": whole("held_out", held_out),
        "seconds": number("seconds", seconds), "finished": lib.sparge_python_finished})
    settings.watch.progress = progress
    settings.watch.on(how)
    found = ffi.new("sparge_tuned []", problems[0].c.heads)
    if finished is not None:
        settings.watch.finished = lambda head: finished(head, TunedHead.read(found[head]))
    c = ffi.new("sparge_problem []", [p.c[0] for p in problems])
    settings.watch.call(lib.sparge_tune, c, len(problems), settings.c, how, found)
    tuned = {**described(settings.c), "by": by, "bound": None if sparsity else bound,
             **{name: None if x is None else rounded(x, 9)
                for name, x in (("l1", l1), ("l2", l2), ("sparsity", sparsity))}}
    return Tuned(tuple(TunedHead.read(x) if x.done else None for x in found), tuned)


def _problems(inputs: Sequence[tuple[Any, Any, Any]], options: Options) -> list[Problem]:
    """The inputs, and that they and the options can be tuned."""
    for name in (*THRESHOLDS, "params", "k_bias"):
        if options.get(name) is not None:
            why = "of one input" if name == "k_bias" else "what is tuned"
            raise ValueError(f"{name} is {why}: leave it out")
    layout = options.get("layout", DEFAULTS["layout"])
    problems = [Problem(*_three(n, some), layout) for n, some in enumerate(inputs)]
    like_the_first(problems)
    for problem in problems:
        causal(options.get("is_causal", False), problem.c.q_len, problem.c.k_len)
    return problems


def like_the_first(problems: Sequence[Problem]) -> None:
    """That inputs are in host memory, and have the same heads and channels."""
    if not problems:
        raise ValueError("inputs is empty, it must have (q, k, v) of at least one sample")
    first = problems[0].c
    for n, problem in enumerate(problems):
        if problem.q.device != "cpu":
            raise ValueError(f"q of inputs[{n}] is on {problem.q.device}, and tune() reads inputs "
                             "in host memory: give q.cpu()")
        for name in SHARED:
            if getattr(problem.c, name) != getattr(first, name):
                raise ValueError(f"inputs[{n}] has {name} {getattr(problem.c, name)}, it must be "
                                 f"{getattr(first, name)} as of inputs[0]")


def _three(n: int, some: Any) -> tuple[Any, Any, Any]:
    try:
        q, k, v = some
    except (TypeError, ValueError):
        raise TypeError(f"inputs[{n}] is a {type(some).__name__}, it must be (q, k, v)") from None
    return q, k, v


def rounded(x: float, digits: int) -> float | None:
    """In so many digits; None where JSON has no word for it."""
    return float(f"{x:.{digits}g}") if math.isfinite(x) else None
