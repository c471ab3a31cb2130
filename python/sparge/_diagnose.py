# SPDX-License-Identifier: Apache-2.0
"""What is wrong with one row of a kernel's output: attention by other rules, in double, until one
of them gives that row to within its bound."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
from numpy.typing import NDArray

from sparge._arrays import Tensor, is_torch
from sparge._compare import Floats, Place, relative
from sparge._native import ffi, lib

Found = tuple[float, str]  # the relative L1 that is left, and what it says
LOG2E = math.log2(math.e)
NO_KEY = "it sees no key: o must be 0 there, and lse -inf"


def float64(x: Any) -> Floats:
    """An array or tensor on the CPU, in double."""
    return (x.detach().double().numpy() if is_torch(x) else
            np.asarray(x).astype(np.float64, copy=False))


@dataclass
class Row:
    """Query `row` of head `head`: what it attends to, and what came out."""

    batch: int
    head: int
    row: int
    got: Floats  # [Dv]
    want: Floats  # [B, H, Nq, Dv]
    q: Floats  # [D]
    k: Floats  # [Nk, D] of its key head
    v: Floats  # [Nk, Dv]
    bias: Floats  # [Nk]
    softmax_scale: float
    block: int  # keys of a block
    attended: NDArray[np.bool_]  # [Nk]
    kept: NDArray[np.bool_]  # [Nk] by the mask, whatever causality hides
    visible: NDArray[np.bool_]  # [Nk] by causality, whatever the mask hides
    causal: bool
    masked: bool  # is there a mask?
    other_keys: Callable[[int], tuple[Floats, Floats]]  # k and v of a key head
    kv_head: int
    kv_heads: int

    def error(self, hypothesis: Floats) -> Floats:
        """Relative L1 beside other rows [..., Dv], infinite where it is not a number."""
        apart = relative(np.abs(self.got - hypothesis).sum(-1), np.abs(hypothesis).sum(-1))
        return np.asarray(np.where(np.isnan(apart), np.inf, apart))

    def weights(self, keys: NDArray[Any], scale: float | None = None) -> Floats:
        """Of keys, but for a common factor."""
        s = (self.k[keys] @ self.q) * (scale or self.softmax_scale) + self.bias[keys]
        return np.asarray(np.exp(s - s.max()) if s.size else s)

    def mean(self, keys: NDArray[Any], scale: float | None = None) -> Floats:
        """Attention to some keys."""
        w = self.weights(keys, scale)
        return np.asarray(w @ self.v[keys] / w.sum())


def row_of(problem: Any, settings: Any, mask: Any, got: Floats, want: Floats, at: Place) -> Row:
    """Row `at` (batch, head, query) of a problem, settings and mask (sparge_mask or NULL)."""
    batch, head, t = at[:3]
    p, options = problem.c, ffi.new("sparge_options *", settings.c[0])
    kv_head = head // (p.heads // p.kv_heads)
    blocks = {causal: _pairs(p, options, mask, at, causal)
              for causal in (options.causal, lib.SPARGE_CAUSAL_NONE)}
    visible = _pairs(p, options, ffi.NULL, at, options.causal)
    bias = np.zeros(p.k_len)
    if p.k_bias:
        bias = np.frombuffer(ffi.buffer(p.k_bias, 4 * p.batch * p.kv_heads * p.k_len), np.float32)
        bias = bias.reshape(p.batch, p.kv_heads, p.k_len)[batch, kv_head].astype(np.float64)
    hidden = bias == -np.inf

    def other(g: int) -> tuple[Floats, Floats]:
        return (head_of(problem.k, problem.layout, batch, g),
                head_of(problem.v, problem.layout, batch, g))

    k, v = other(kv_head)
    return Row(
        batch=batch, head=head, row=t, got=got[batch, head, t], want=want,
        q=head_of(problem.q, problem.layout, batch, head, t), k=k, v=v, bias=bias,
        softmax_scale=options.softmax_scale or 1 / math.sqrt(p.dim), block=options.block_k,
        attended=blocks[options.causal] & ~hidden,
        kept=blocks[lib.SPARGE_CAUSAL_NONE] & ~hidden, visible=visible & ~hidden,
        causal=options.causal != lib.SPARGE_CAUSAL_NONE, masked=bool(mask), other_keys=other,
        kv_head=kv_head, kv_heads=p.kv_heads)


def head_of(x: Tensor, layout: str, batch: int, head: int, row: Any = slice(None)) -> Floats:
    """One head of q, k or v, or one row of it."""
    owner = x.owner[batch] if x.batched else x.owner
    return float64(owner[row, head] if layout == "NHD" else owner[head, row])


def _pairs(p: Any, options: Any, mask: Any, at: Place, causal: int) -> NDArray[np.bool_]:
    """[Nk]: the keys that a row attends to under a mask and causality."""
    options.causal, before = causal, options.causal
    block, words = options.block_q, -(-p.k_len // 32)
    pairs = np.zeros((block, words), np.uint32)
    lib.sparge_mask_get_row(mask, p, options, at[0], at[1], at[2] // block,
                            ffi.cast("uint32_t *", pairs.ctypes.data))
    options.causal = before
    bits = np.unpackbits(pairs[at[2] % block].view(np.uint8), bitorder="little")
    return bits[:p.k_len].astype(bool)


# ---- The rules that it may have followed ------------------------------------------------------


def last_key(r: Row) -> Iterator[Found]:
    """Causality: another last key of those that the mask keeps."""
    keys = np.flatnonzero(r.kept)
    w = r.weights(keys)
    with np.errstate(all="ignore"):
        means = np.cumsum(w[:, None] * r.v[keys], 0) / np.cumsum(w)[:, None]
    errors = r.error(means)
    best = int(errors.argmin())
    last = int(np.flatnonzero(r.attended)[-1])
    if not r.causal and best < keys.size - 1:
        yield errors[best], (f"it fits attention to the keys up to {keys[best]}, as under "
                             f"causality, where it attends to all up to {last}")
    elif r.causal and keys[best] > last:
        every = " (all of them: without causality)" if best == keys.size - 1 else ""
        yield errors[best], ("it fits attention that also sees later keys, up to "
                             f"{keys[best]}{every}, where {last} is the last: a causal leak")
    elif r.causal and keys[best] < last:
        yield errors[best], (f"it fits attention to the keys up to {keys[best]}, where {last} is "
                             "the last: its causality starts too early")


def blocks(r: Row) -> Iterator[Found]:
    """One key block less or more."""
    here = np.flatnonzero(r.visible)
    w = r.weights(here)
    index, start = np.unique(here // r.block, return_index=True)
    attended = r.attended[here]
    with np.errstate(all="ignore"):
        def sums(w: Floats) -> tuple[Floats, Floats]:
            return np.add.reduceat(w[:, None] * r.v[here], start), np.add.reduceat(w, start)

        have_o, have_l = sums(np.where(attended, w, 0.0))
        more_o, more_l = sums(np.where(attended, 0.0, w))
        less = (have_o.sum(0) - have_o) / (have_l.sum() - have_l)[:, None]
        more = (have_o.sum(0) + more_o) / (have_l.sum() + more_l)[:, None]
    for means, weight, words in ((less, have_l, "without key block {}, to which it must attend"),
                                 (more, more_l, "that also sees key block {} whole, of which the "
                                                "mask keeps nothing or a part")):
        errors = np.where(weight > 0, r.error(means), np.inf)
        best = int(errors.argmin())
        yield errors[best], "it fits attention " + words.format(index[best])
    if r.masked and not attended.all():
        yield float(r.error(r.mean(here))), ("it fits attention to all visible keys: without the "
                                             "mask")


def scales(r: Row) -> Iterator[Found]:
    """Another softmax_scale: a usual one, or whichever fits best."""
    keys = np.flatnonzero(r.attended)
    own, dim = r.softmax_scale, r.q.size

    def error(scale: float) -> float:
        return float(r.error(r.mean(keys, scale)))

    usual = [(1.0, "no scale at all"), (1 / dim, "1/D"), (1 / math.sqrt(dim), "1/sqrt(D)"),
             (own**2, "applied twice"), (own * LOG2E, "times log2(e), as for exp2, but by exp"),
             (own / LOG2E, "exp2 without the factor log2(e)")]
    for scale, words in usual:
        if not math.isclose(scale, own, rel_tol=1e-6):
            yield error(scale), f"it fits a softmax_scale of {scale:.4g} ({words}), not {own:.4g}"
    grid = own * np.exp2(np.linspace(-4, 4, 65))
    at = min(max(int(np.argmin([error(s) for s in grid])), 1), grid.size - 2)
    low, high = math.log(grid[at - 1]), math.log(grid[at + 1])
    for _ in range(60):  # by thirds, to the last digit but a few
        a, b = (2 * low + high) / 3, (low + 2 * high) / 3
        low, high = (low, b) if error(math.exp(a)) < error(math.exp(b)) else (a, high)
    scale = math.exp(low)
    if not any(math.isclose(scale, known, rel_tol=1e-3) for known, _ in usual):
        yield error(scale), f"it fits a softmax_scale of {scale:.4g}, not {own:.4g}"


def heads(r: Row) -> Iterator[Found]:
    """The keys of another head, or a row that stands in the wrong place."""
    keys = np.flatnonzero(r.attended)
    k, v = r.k, r.v
    for g in range(r.kv_heads):
        if g == r.kv_head:
            continue
        r.k, r.v = r.other_keys(g)
        rule = (f", as of h % {r.kv_heads}: query head h reads key head h // (H / G)"
                if g == r.head % r.kv_heads else "")
        yield float(r.error(r.mean(keys))), (f"it fits key head {g}, where query head {r.head} "
                                             f"reads {r.kv_head}{rule}")
    r.k, r.v = k, v
    for h in range(r.want.shape[1]):
        errors = r.error(r.want[r.batch, h])
        t = int(errors.argmin())
        if (h, t) != (r.head, r.row):
            yield float(errors[t]), (f"it is what row {(r.batch, h, t)} should be: rows are in "
                                     "another place, as in another layout")


def factors(r: Row) -> Iterator[Found]:
    """The right row times a number."""
    want = r.want[r.batch, r.head, r.row]
    if not r.got.any():
        yield 0.0, "it is 0, as if it had never been written"
        return
    factor = float(r.got @ want / (want @ want))
    yield float(r.error(factor * want)), (f"it is {factor:.6g} times what it should be: the "
                                          "division by the sum of weights is missing or another's")


def nonfinite(r: Row) -> str | None:
    """Of a row that is not finite although it should be, or the other way round."""
    if not r.attended.any():
        return NO_KEY
    sound = np.isfinite(r.k).all(-1) & np.isfinite(r.v).all(-1) & ~np.isnan(r.bias)
    if sound[r.attended].all() and not sound.all() and np.isfinite(r.q).all():
        return (f"key {int(np.flatnonzero(~sound)[0])}, which it must not see, is not finite: the "
                "kernel reads it (0 times NaN is NaN)")
    return None


def diagnose(r: Row, bound: float) -> str | None:
    """The rule that gives this row to within the bound, in a sentence, or None."""
    if not (np.isfinite(r.got).all() and np.isfinite(r.want[r.batch, r.head, r.row]).all()):
        return nonfinite(r)
    if not r.attended.any():
        return NO_KEY
    with np.errstate(all="ignore"):
        found = [x for rule in (factors, last_key, blocks, scales, heads) for x in rule(r)]
    error, words = min(found, key=lambda x: x[0])
    return words if error <= bound else None


def diagnose_lse(got: float, want: float, row: Row, bound: float) -> str | None:
    """The same for an lse."""
    if not row.attended.any():
        return NO_KEY
    lost = row.softmax_scale * float(row.q @ row.k.mean(0))
    found = {want * LOG2E: "it is in log2 units: multiply by ln 2",
             want / LOG2E: "it is in natural units times ln 2: do not convert it twice",
             want - lost: "it is that of smoothed keys: add softmax_scale * q.mean(k)",
             -want: "its sign is wrong"}
    best = min(found, key=lambda x: abs(x - got))
    return found[best] if abs(best - got) <= bound else None
