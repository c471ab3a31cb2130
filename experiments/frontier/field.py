# SPDX-License-Identifier: Apache-2.0
"""field.py: calls of a model under a method, and the value of the method's first parameter that has
a density over all of them."""
import struct
import sys
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

import sets  # noqa: E402
import sparge  # noqa: E402

REACHED = 0.02  # a density that is farther off is none
SEGMENTS = 8  # of a text, for what wants documents: none has any
F32 = {"qk_dtype": "f32", "pv_dtype": "f32"}

@cache
def methods():
    return {method.name: method for method in sparge.methods()}


@dataclass(frozen=True)
class Way:
    """A method without the value of its first parameter."""
    name: str

    @property
    def method(self):
        return methods()[self.name.partition(":")[0]]

    @property
    def params(self):
        items = filter(None, self.name.partition(":")[2].split(","))
        return {key: float(value) for key, value in (item.split("=") for item in items)}

    def word(self, value):
        """For sparge and sparge-lm --method."""
        method, _, others = self.name.partition(":")
        first = f"{self.method.params[0].name}={value:.9g}"
        return f"{method}:" + ",".join(filter(None, [first, others]))

    def asks(self, value):
        """The arguments of sparge."""
        own = {} if value is None else {self.method.params[0].name: value}
        return {"method": self.method.name, "method_params": self.params | own}


# ---- Calls -------------------------------------------------------------------------------------

class Call:
    """One file: q, k and v in float32, and how its model attends."""

    def __init__(self, entry):
        self.entry, (self.q, self.k, self.v) = entry, sets.wide(sets.tensors(entry.path))

    @property
    def pairs(self):
        """That some query sees, in all heads."""
        tokens = self.q.shape[2]
        return self.q.shape[1] * tokens * (tokens + (1 if self.entry.causal else tokens)) // 2

    def first(self, tokens):
        """The same of its first tokens."""
        cut = copy(self)
        cut.q, cut.k, cut.v = (x[:, :, :tokens] for x in (self.q, self.k, self.v))
        return cut

    def told(self, way):
        """What a method is told beside q, k and v."""
        e, tokens = self.entry, self.q.shape[2]
        told = {"layer": e.layer, "step": e.step, **sets.attends(e)}
        if e.grid:
            told["grid"] = (*e.grid, *e.text)
        if "segments" in way.method.needs:
            told["segment_ends"] = [tokens * n // SEGMENTS for n in range(1, SEGMENTS + 1)]
        return told


def calls_of(folder):
    """In the order in which a model makes them: a state goes from step to step."""
    return [Call(entry) for entry in
            sorted(sets.entries(folder), key=lambda e: (e.sample, e.layer, e.step))]


def each(calls, way, value, function, states=None, **how):
    """What a function of sparge gives for every call. states: kept from one walk to the next, by
    sample and layer, or none."""
    states = {} if states is None else states
    for call in calls:
        state = states.setdefault((call.entry.sample, call.entry.layer), sparge.State())
        yield call, function(call.q, call.k, call.v, **call.told(way), **way.asks(value),
                             state=state, **how)


def density_at(calls, way, value, states=None):
    """Over all heads."""
    if way.method.at_run:
        found = [stats.counts for _, (_, stats) in each(calls, way, value, sparge.attention, states,
                                                        **F32, return_stats=True)]
        kept = [counts.pv_tokens for counts in found]
    else:
        found = [plan.counts for _, plan in each(calls, way, value, sparge.plan, states)]
        kept = [counts.qk_tokens for counts in found]
    return sum(kept) / sum(counts.tokens for counts in found)


# ---- The value of a density -------------------------------------------------------------------

def place(x):
    """Numbers of float32 as whole numbers in the same order."""
    bits, = struct.unpack("<i", struct.pack("<f", x))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def number(at):
    return struct.unpack("<f", struct.pack("<i", at if at >= 0 else -at | -0x80000000))[0]


def find(way, density, wanted, tokens, near=0.002):
    """(value, its density): the value whose density is nearest, or near enough. Steps from the
    default, twice as long each time, until the density lies between two values; then bisection, by
    turns in the middle and where a line between them has the density. density: of a value."""
    if not way.method.params:
        return None, density(None)
    first = way.method.params[0]
    to, back = (int, float) if first.whole else (place, number)
    least, most = to(first.low), to(min(first.high, 2.0 * tokens if first.whole else 1e6))
    start = to(wanted if first.name == "density" else first.default)
    seen = {}

    def at(x):
        if x not in seen:
            seen[x] = density(back(x))
        return seen[x]

    def below(x):
        return (at(x) <= wanted) != way.method.falls

    ends = [start, start]
    step = max(1, start // 4) if first.whole else 1 << 22  # half as much again
    side = 1 if below(start) else 0
    while below(ends[side]) == (side == 1) and ends[side] not in (least, most)[side:side + 1]:
        ends[1 - side] = ends[side]
        ends[side] = min(most, ends[side] + step) if side else max(least, ends[side] - step)
        step *= 2
    for turn in range(100):
        if ends[1] - ends[0] <= 1 or min(abs(at(x) - wanted) for x in ends) <= near:
            break
        gap = at(ends[1]) - at(ends[0])
        share = (wanted - at(ends[0])) / gap if turn % 2 and gap else 0.5
        middle = ends[0] + int(min(max(share, 0.02), 0.98) * (ends[1] - ends[0]))
        middle = min(max(middle, ends[0] + 1), ends[1] - 1)
        ends[0 if below(middle) else 1] = middle
    best = min(seen, key=lambda x: abs(seen[x] - wanted))
    return back(best), seen[best]
