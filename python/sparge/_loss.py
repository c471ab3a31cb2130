# SPDX-License-Identifier: Apache-2.0
"""By loss: what the error of each head costs the model, and one price of density for the heads of
all layers (sparge_tune.h)."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparge import _arrays
from sparge._methods import Choice, Context, MethodOptions, choose, takes_method
from sparge._native import call, ffi, lib
from sparge._options import DEFAULTS, Problem, Settings, number
from sparge._tune import like_the_first

if TYPE_CHECKING:
    from typing_extensions import Unpack

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LossPoints:
    """Heads of a layer under values of a method's first parameter: [heads, points] by rising
    density, or [heads] of choose_by_loss().

    first         the values
    density       of tokens, the mean over the inputs
    loss          in nats per token; NaN: it is not finite
    method        whose parameter it is
    dense_passes  what measuring took, in dense passes over the inputs; 0: nothing was measured
    """

    first: Values
    density: Values
    loss: Values
    method: str
    dense_passes: float = 0.0


@takes_method
def measure_loss(inputs: Sequence[tuple[Any, Any, Any, Any]], *, first: Any = None,
                 **options: Unpack[MethodOptions]) -> LossPoints:
    """What the heads of a layer cost the loss of their model, and their densities, at values of the
    first parameter of a method.

    inputs: (q, k, v, g) of one layer, as attention() takes them, in host memory. g has the shape of
        o: the gradient at o of the model's loss, summed over the tokens, with labels drawn from
        the model (sparge.capture.Recorder records it with gradient=True). The loss of a head is
        the mean over its queries of (g . (o' - o))^2 / 2, with o of dense attention in f32.
    first: None, which are 11 values around the default; or [points], the same for all heads; or
        [heads, points].
    options: of attention(), with those that name a method; without one it is SpargeAttn.

    It costs a dense pass over the inputs in f32, and one of its density for each value.
    """
    if options.get("density") is not None or options.get("state") is not None:
        raise ValueError("measure_loss() takes neither density nor state: leave them out")
    layout = options.get("layout", DEFAULTS["layout"])
    problems = [Problem(*some[:3], layout) for some in inputs]
    gradients = [_gradient(n, some, problem) for n, (some, problem) in
                 enumerate(zip(inputs, problems))]
    like_the_first(problems)
    settings = Settings(problems[0], options)
    choice = choose(options, settings)
    contexts = [Context(options, p.c) for p in problems]
    c = ffi.new("sparge_loss_input []", [
        {"problem": p.c[0], "g": g.c(), "context": context.c}
        for p, g, context in zip(problems, gradients, contexts)])
    heads = problems[0].c.heads
    values = _values(choice, first, heads)
    points = ffi.new("sparge_loss_point []", [{"first": x} for x in values.flat])
    passes = ffi.new("double *")
    settings.watch.call(lib.sparge_loss_measure, c, len(problems), settings.c, choice.c,
                        choice.param, ffi.NULL, points, values.shape[1], passes)
    return _read(points, values.shape, choice.method.name, passes[0])


def choose_by_loss(layers: Sequence[LossPoints], *, density: float | None = None,
                   loss: float | None = None) -> list[LossPoints]:
    """The value of each head of least loss, for one price of density in all layers.

        curves = [sparge.measure_loss(x, method="submass", is_causal=True) for x in layers]
        chosen = sparge.choose_by_loss(curves, density=0.5)
        o = sparge.attention(q, k, v, min_mass=chosen[0].first, cell=8, theta=-1, sink=True)

    layers: what measure_loss() found, at the same number of values.
    density: the mean over the heads of all layers; or
    loss: the sum over them, in nats per token.

    ValueError: the goal cannot be reached over the values that were measured.
    """
    if (density is None) == (loss is None):
        raise ValueError("give density or loss, one of both")
    if len({(x.method, x.first.shape[1:]) for x in layers}) != 1:
        raise ValueError("layers must be of one method and of as many values each, and one at "
                         "least")
    flat = [np.concatenate([getattr(x, name) for x in layers])
            for name in ("first", "density", "loss")]
    heads, points = flat[0].shape
    curve = ffi.new("sparge_loss_point []", list(zip(*(map(float, x.flat) for x in flat))))
    goal = ffi.new("sparge_loss_goal *", {
        name: 0 if x is None else number(name, x)
        for name, x in (("density", density), ("loss", loss))})
    chosen = ffi.new("sparge_loss_point []", heads)
    call(lib.sparge_loss_choose, lib.sparge_method_find(layers[0].method.encode()), curve, heads,
         points, goal, chosen)
    ends = np.cumsum([0, *(len(x.first) for x in layers)])
    return [_read(chosen[at:end], (end - at, ), layers[0].method) for at, end in
            zip(ends[:-1].tolist(), ends[1:].tolist())]


def _gradient(n: int, some: tuple[Any, ...], problem: Problem) -> _arrays.Tensor:
    if len(some) != 4:
        raise TypeError(f"inputs[{n}] has {len(some)} arrays, it must be (q, k, v, g)")
    p = problem.c
    g = _arrays.read("g", some[3], problem.layout)
    if g.shape != (want := (p.batch, p.heads, p.q_len, p.dim_v)):
        raise ValueError(f"g is [B, H, N, D] = {list(g.shape)}, it must be {list(want)} as o")
    return g


def _values(choice: Choice, first: Any, heads: int) -> Values:
    """[heads, points]"""
    if first is None:
        grid = ffi.new("double []", lib.SPARGE_LOSS_POINTS)
        first = list(grid[0:lib.sparge_loss_grid(choice.c, grid)])
    values = np.asarray(first, np.float64)
    if values.ndim not in (1, 2) or (values.ndim == 2 and len(values) != heads):
        raise ValueError(f"first has the shape {list(values.shape)}, it must be [points] or "
                         f"[{heads}, points]")
    return np.ascontiguousarray(np.broadcast_to(values, (heads, values.shape[-1])))


def _read(points: Any, shape: tuple[int, ...], method: str, passes: float = 0.0) -> LossPoints:
    first, density, loss = np.array([(p.first, p.density, p.loss) for p in points]
                                    ).T.reshape(3, *shape)
    return LossPoints(first, density, loss, method, passes)
