# SPDX-License-Identifier: Apache-2.0
"""field.py: which methods are compared here, on what, at which densities; and the value of a
method's first parameter that has a density over several calls."""
import struct
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "capture")]

import sets  # noqa: E402
import sparge  # noqa: E402

DENSITIES = [0.5, 0.3, 0.2, 0.1]
REACHED = 0.02  # a density that is farther off is none
SEGMENTS = 8  # of a text, for what wants documents: none has any
F32 = {"qk_dtype": "f32", "pv_dtype": "f32"}

# What a name leaves out has its default. min_budget of FlexPrefill is cut down to sequences of 4096
# tokens; SpargeAttn has theta -1 and its sink, unless theta is what is asked about.
YARDSTICKS = ["random", "window", "oracle_mass", "oracle_mass_t", "oracle_pairs"]
SPARGEATTN = "spargeattn:theta=-1,sink=1"
THETAS = [f"spargeattn:theta={theta},sink={sink}" for sink in (0, 1)
          for theta in (-1, 0, 0.2, 0.4, 0.6, 0.8)]
PREDICTED = [SPARGEATTN, "spargeattention2:sink=1", "submass", "submass:cell=0", "xattention",
             "xattention_t", "seer", "kinetics", "proxyattn", "proxyattn_t", "hess", "moba",
             "strata", "blasst"]
CAUSAL = ["minference", "flexprefill:min_budget=128", "pbs", "pbs_t", "s2", "blockrank"]
STATIC = ["powerattention", "moa", "moa_calibrated"]
GRID = ["pisa0", "draft:h=7,w=10", "biformer", "svg", "radial", "sparsevdit", "sparsed"]
TEXT = [*YARDSTICKS, *PREDICTED, *STATIC, *CAUSAL]
VIDEO = [*YARDSTICKS, *PREDICTED, "powerattention", *GRID]
# The same selector, a threshold on what is told to be the mass of a block, and whose scores.
SELECTED = ["oracle_mass_t", "submass", "submass:cell=0", "xattention_t", "proxyattn_t", "pbs_t"]


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
        tokens = self.q.shape[2]
        self.pairs = self.q.shape[1] * tokens * (tokens + (1 if entry.causal else tokens)) // 2

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


def each(calls, way, value, function, **how):
    """What a function of sparge gives for every call."""
    states = {}
    for call in calls:
        state = states.setdefault((call.entry.sample, call.entry.layer), sparge.State())
        yield call, function(call.q, call.k, call.v, **call.told(way), **way.asks(value),
                             state=state, **how)


def density_at(calls, way, value):
    """Over all heads."""
    if way.method.at_run:
        found = [stats.counts for _, (_, stats) in each(calls, way, value, sparge.attention, **F32,
                                                        return_stats=True)]
        kept = [counts.pv_tokens for counts in found]
    else:
        found = [plan.counts for _, plan in each(calls, way, value, sparge.plan)]
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
    """(value, its density): the value whose density is nearest, or near enough, by bisection; by
    turns in the middle and where a line between the ends has the density. density: of a value."""
    if not way.method.params:
        return None, density(None)
    first = way.method.params[0]
    whole, most = first.whole, 2.0 * tokens if first.whole else 1e6
    to, back = (int, float) if whole else (place, number)
    ends = [to(first.low), to(min(first.high, most))]
    if way.method.falls:
        ends.reverse()
    found, turn = [density(back(at)) for at in ends], 0
    while abs(ends[1] - ends[0]) > 1 and found[0] < wanted < found[1] and \
            min(abs(x - wanted) for x in found) > near:
        share = (wanted - found[0]) / (found[1] - found[0]) if turn % 2 else 0.5
        turn += 1
        at = ends[0] + int(share * (ends[1] - ends[0]))
        if at in ends:
            at = ends[0] + (1 if ends[1] > ends[0] else -1)
        x = density(back(at))
        side = 0 if x <= wanted else 1
        ends[side], found[side] = at, x
    side = min((0, 1), key=lambda n: abs(found[n] - wanted))
    return back(ends[side]), found[side]
