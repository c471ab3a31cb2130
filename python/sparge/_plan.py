# SPDX-License-Identifier: Apache-2.0
"""Plans: what a method makes of q, k and v, before anything is attended (sparge_methods.h)."""
from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparge import _arrays
from sparge._counts import Counted, Counts
from sparge._mask import BlockMask
from sparge._methods import Choice, Context, Method, MethodOptions, choose, takes_method
from sparge._native import Watch, call, ffi, lib, threads
from sparge._options import Problem, Settings, number, prepare
from sparge._result import Result

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Part:
    """One call of attention of a plan (sparge_part).

    kv_heads, k_len, block  of the call
    predicted               is its mask predicted by SpargeAttn?
    pooled                  does each of its keys stand for several?
    reordered               are its keys not the caller's, or in another order?
    """

    kv_heads: int
    k_len: int
    block: tuple[int, int]
    predicted: bool
    pooled: bool
    reordered: bool


class Plan(Counted):
    """What is attended, and how: one or more parts, each an ordinary call of attention. plan()
    makes it. It keeps q, k and v, and may be run and read in any thread."""

    def __init__(self, problem: Problem, settings: Settings, choice: Choice, context: Context,
                 density: float | None) -> None:
        self._problem, self._settings, self._choice = problem, settings, choice
        self._lock = Lock()
        if problem.q.device != "cpu":
            raise ValueError(f"method is {choice.method.name!r} and q is on {problem.q.device}: "
                             "methods work on the CPU")
        self._c = ffi.gc(ffi.new("sparge_plan *"), lib.sparge_plan_free)
        self._context = context  # until the plan is freed
        with context.turn(choice.method.name):
            self._make(density)

    def _make(self, density: float | None) -> None:
        choice, watch, options = self._choice, self._settings.watch, self._settings.c
        before = choice.c, self._problem.c, options, self._context.c
        if density is not None:
            try:
                watch.call(lib.sparge_method_plan_at, *before, choice.param, density, ffi.NULL,
                           self._c)
            except ValueError as error:
                if choice.named or not str(error).startswith("density "):
                    raise
                raise ValueError(f"{error}; a lower theta or smaller blocks reach further down"
                                 ) from None
        elif choice.named:
            watch.call(lib.sparge_method_plan, *before, choice.param, self._c)
        else:  # SpargeAttn, by the options as they are
            watch.call(lib.sparge_method_plan, *before, ffi.NULL, self._c)
            self._c.part[0].options = options[0]

    @property
    def method(self) -> Method:
        """Which method made it."""
        return self._choice.method

    @property
    def params(self) -> dict[str, float]:
        """The values of the method's parameters, also what density found. Empty if each head has
        thresholds of its own."""
        return {} if self._settings.c.per_head else self._choice.params

    @property
    def seconds(self) -> float:
        """Seconds that making the plan took."""
        return float(self._c.seconds)

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds that making the plan took, attention apart."""
        return float(self._c.multiply_adds)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The calls of attention that it is made of. They share no pair."""
        return tuple(
            Part(p.problem.kv_heads, p.problem.k_len, (p.options.block_q, p.options.block_k),
                 p.predicted, p.pooled, bool(p.place or self._c.q_order))
            for p in self._c.part[0:self._c.parts])

    @property
    def plain(self) -> bool:
        """Is it one call over q, k and v as they are? Then it has a mask."""
        return bool(lib.sparge_plan_is_plain(self._c))

    def _running(self, watch: Watch) -> Any:
        """A copy whose parts report to `watch`. It shares the plan's arrays."""
        copy = ffi.new("sparge_plan *", self._c[0])
        for n in range(copy.parts):
            watch.on(copy.part[n].options)
        return copy

    def predict(self) -> Plan:
        """Predicts the masks that the method leaves to SpargeAttn, unless they are there. What
        reads the plan does so by itself; run() then attends without predicting again."""
        threads(self._settings.c.threads)
        with self._lock:
            watch = Watch()
            copy = self._running(watch)
            try:
                watch.call(lib.sparge_plan_predict, copy, ffi.NULL)
            except BaseException:
                for n in range(copy.parts):
                    if not self._c.part[n].mask.bits:
                        lib.sparge_mask_free(ffi.addressof(copy.part[n], "mask"))
                raise
            for n in range(copy.parts):
                self._c.part[n].mask = copy.part[n].mask
        return self

    def run(self, *, return_lse: bool = False, return_mask: bool = False,
            return_stats: bool = False) -> Any:
        """Attends by the plan. What it returns is what attention() returns."""
        threads(self._settings.c.threads)
        mask = self.mask if return_mask else None
        result = Result(self._problem, return_lse, return_stats)
        watch = Watch()
        with self._lock:
            copy = self._running(watch)
        result.call(watch, lib.sparge_plan_run, copy, ffi.NULL)
        return result.returned(mask)

    @property
    def mask(self) -> BlockMask:
        """Which blocks of the attention map it computes, in blocks of the method's. ValueError of
        a plan that is not plain."""
        if not self.plain:
            raise ValueError(f"the plan of {self.method.name} has several parts, or tokens in "
                             "another order, and so no mask: pairs() says which pairs it attends "
                             "to")
        part = self.predict()._c.part[0]
        options = ffi.new("sparge_options *", part.options)
        options.causal = self._settings.c.causal  # of a part it may be in the mask
        mask = BlockMask(self._problem.c, options, self._problem.q.batched)
        lib.sparge_mask_free(mask._mask)
        given = ffi.addressof(part, "mask") if part.mask.bits else ffi.NULL
        call(lib.sparge_mask_convert, given, self._problem.c, options, options, mask._mask)
        return mask

    @property
    def head_counts(self) -> list[Counts]:
        """What running it counts in each head, batch after batch, if lambda skips nothing."""
        p = self._problem.c
        found = ffi.new("sparge_counts []", p.batch * p.heads)
        call(lib.sparge_plan_count, self.predict()._c, found)
        return [Counts.read(c) for c in found]

    def pairs(self) -> NDArray[np.uint8]:
        """[H, Nq, Nk] or [B, H, Nq, Nk]: how each visible pair is attended: 1 itself, 2 by a key
        that it is pooled in, 0 not at all. Pairs that k_bias hides count as if there were none."""
        p = self._problem.c
        found = np.zeros((*self._problem.heads_shape, p.q_len, p.k_len), np.uint8)
        call(lib.sparge_plan_pairs, self.predict()._c, _arrays.pointer(found, "uint8_t *"))
        return found

    def __repr__(self) -> str:
        params = ",".join(f"{name}={x:.6g}" for name, x in self.params.items())
        return f"<Plan {self.method.name}{':' if params else ''}{params}, parts: {self._c.parts}>"


def make_plan(q: Any, k: Any, v: Any, options: MethodOptions) -> Plan:
    """plan() without the check of names."""
    problem, settings = prepare(q, k, v, options)
    choice = choose(options, settings)
    density = options.get("density")
    context = Context(options, problem.c)
    return Plan(problem, settings, choice, context,
                None if density is None else number("density", density))


@takes_method
def plan(q: Any, k: Any, v: Any, **options: Unpack[MethodOptions]) -> Plan:
    """What a method makes of q, k and v: which pairs it attends to, and how.

        plan = sparge.plan(q, k, v, method="xattention", density=0.3, is_causal=True)
        plan.params["tau"], plan.density, plan.pairs()
        o = plan.run()

    Arguments are those of attention(), shapes and errors too; without a method it is SpargeAttn.
    The plan does not copy q, k and v: they must not change as long as it is used.
    """
    return make_plan(q, k, v, options)
