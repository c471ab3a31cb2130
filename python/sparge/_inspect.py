# SPDX-License-Identifier: Apache-2.0
"""What stands inside: attention by the textbook in double precision, every intermediate result, and
why a block is kept."""
from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparge import _arrays
from sparge._given import c_mask, prepare_over
from sparge._mask import BlockMask
from sparge._native import call, ffi, lib, text
from sparge._options import Options, Problem, Settings, takes_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

Array = NDArray[Any]


class Reason(IntFlag):
    """Why the prediction keeps a block (sparge_reason): bits of intermediates()["why"]. A block may
    have several reasons; 0 is skipped."""

    MASS = lib.SPARGE_KEPT_MASS  # one of the most probable blocks, up to tau
    TOPK = lib.SPARGE_KEPT_TOPK  # one of the best blocks, up to topk
    DISSIMILAR_Q = lib.SPARGE_KEPT_DISSIMILAR_Q  # its queries are not self-similar, or not finite
    DISSIMILAR_K = lib.SPARGE_KEPT_DISSIMILAR_K  # its keys are not self-similar, or not finite
    OVERFLOW = lib.SPARGE_KEPT_OVERFLOW  # both are self-similar, but their score is not finite
    DIAGONAL = lib.SPARGE_KEPT_DIAGONAL  # it holds the last key that a row sees, if causal
    SINK = lib.SPARGE_KEPT_SINK  # key block 0 under sink
    MIN_MASS = lib.SPARGE_KEPT_MIN_MASS  # its mass is above min_mass


# What intermediates() gives, in the order of the algorithm: the axes, and what must happen for it.
# b batch, h head, g key head, q query, k key, i query block, j key block, d channel of q and k,
# v channel of v, 2 two numbers.
STAGES = {
    "blocks": ("2", "always"), "k_mean": ("bgd", "smooth"), "k_pool": ("bgjd", "pool"),
    "k_sim": ("bgj", "predict"), "q_pool": ("bhid", "pool"), "q_sim": ("bhi", "predict"),
    "S_all": ("bhij", "predict"), "S": ("bhij", "predict"), "why": ("bhij", "predict"),
    "mask": ("bhij", "always"), "q_scale": ("bhi", "qk_int"), "q_int": ("bhqd", "qk_int"),
    "k_scale": ("bgj", "qk_int"), "k_int": ("bgkd", "qk_int"), "v_scale": ("bgjv", "pv_int"),
    "v_int": ("bgkv", "pv_int"), "pv_done": ("bhij", "attend"), "m": ("bhq", "attend"),
    "l": ("bhq", "attend"), "o": ("bhqv", "attend")
}
FIELDS = {name: field.type for name, field in ffi.typeof("sparge_intermediates").fields}


@takes_options
def oracle(q: Any, k: Any, v: Any, *, mask: Any = None, codes: bool = False,
           return_lse: bool = False, return_block_mass: bool = False,
           **options: Unpack[Options]) -> Any:
    """Attention by the textbook formula in double precision, which shares no code with the kernels.

    q [H, Nq, D], k [G, Nk, D], v [G, Nk, Dv], or with a batch before: as of attention(), on the
    CPU. Time grows as Nq * Nk, some 10 s for a head of 8192 tokens.
    mask   None: dense; or what attend() takes
    codes  False: of q, k and v as they are, and the distance to it is quality. True: of their
           codes by qk_dtype, pv_dtype and smooth_k, and the distance to it is correctness
    The other arguments are those of attention(); thresholds do not matter.

    Returns o [H, Nq, Dv] in float64 of numpy, or a tuple of it and what is asked for:
    lse         [H, Nq] float64, natural log; -inf: the row sees no key
    block_mass  [H, i, j] float64: attention of a query block to a key block, the mean over its
                rows. A row that sees no key counts as 0
    Raises what attention() raises; ValueError for tensors on a GPU.
    """
    _on_cpu("oracle", q=q, k=k, v=v)
    problem, settings, given = prepare_over(q, k, v, mask, options)
    c = settings.c
    shapes = {"o": "bhqv"}
    shapes.update({"lse": "bhq"} if return_lse else {})
    shapes.update({"mass": "bhij"} if return_block_mass else {})
    found = {name: _zeros(axes, np.float64, problem, c) for name, axes in shapes.items()}
    ask(problem, settings, given, codes=codes, **found)
    return found["o"] if len(found) == 1 else tuple(found.values())


def ask(problem: Problem, settings: Settings, mask: BlockMask | None, *, codes: bool = False,
        o: Array | None = None, lse: Array | None = None, mass: Array | None = None) -> None:
    """The oracle, into packed float64 arrays of the caller; None: not wanted."""
    settings.watch.call(
        lib.sparge_oracle, problem.c, settings.c, c_mask(mask),
        lib.SPARGE_ORACLE_CODES if codes else lib.SPARGE_ORACLE_REAL,
        *(ffi.NULL if x is None else _arrays.pointer(x, "double *") for x in (o, lse, mass)))


@takes_options
def intermediates(q: Any, k: Any, v: Any = None, *, mask: Any = None,
                  **options: Unpack[Options]) -> dict[str, Array]:
    """Every intermediate result of attention(), by name: what `sparge run --intermediates` writes.

    q [H, Nq, D], k [G, Nk, D], v [G, Nk, Dv], or with a batch before: as of attention(), on the
    CPU. Without v there is the prediction alone. With a mask, as attend() takes it, there is none.

    In the order of the algorithm, with a batch before where q has one; i and j are blocks of
    queries and keys, and float32 is meant where nothing is said:
    blocks           [2] int64: queries and keys of a block
    k_mean           [G, D], the mean key, under smooth_k
    k_pool, q_pool   [G, j, D] and [H, i, D], the mean of a block's tokens; not with cells
    k_sim, q_sim     [G, j] and [H, i], mean cosine within a block
    S_all, S         [H, i, j], scores of the pooled tokens in natural units, invisible: -inf; and
                     with -inf too where the keys are not self-similar. With cells both are the
                     masses, which add up to 1
    why              [H, i, j] uint8, bits of Reason; 0: skipped
    mask             [H, i, j] uint8, the visible blocks that are computed
    q_scale, k_scale [H, i] and [G, j], what code 1 stands for, if Q.K^T is in integers
    q_int, k_int     [H, Nq, D] and [G, Nk, D] int16, the codes
    v_scale, v_int   [G, j, Dv] and [G, Nk, Dv] int16, if P.V is in integers
    pv_done          [H, i, j], share of the rows that computed P.V
    m, l             [H, Nq], row maxima in log2 units, and row sums
    o                [H, Nq, Dv], rounded to float16 if q is
    Raises what attention() raises; ValueError for tensors on a GPU.
    """
    if v is None and mask is not None:
        raise TypeError("v is None and a mask is given: there is nothing to compute")
    _on_cpu("intermediates", q=q, k=k, v=v)
    problem, settings, given = prepare_over(q, k, k if v is None else v, mask, options)
    p, c = problem.c, settings.c
    resolved = ffi.new("sparge_options *", c[0])
    call(lib.sparge_options_resolve, p, resolved)
    predict, attend = given is None, v is not None
    happens = {"always": True, "predict": predict, "attend": attend, "smooth": c.smooth_k,
               "pool": predict and not c.cell,
               "qk_int": attend and _is_integer(resolved.qk_dtype),
               "pv_int": attend and _is_integer(resolved.pv_dtype)}

    out = BlockMask(p, c, problem.q.batched) if given is None else given
    own = {"blocks": np.array(out.block, np.int64),
           "o": _zeros("bhqv", np.float16 if problem.q.dtype == "float16" else np.float32, problem,
                       c)}
    found = {name: own[name] if name in own else _zeros(axes, _dtype(name), problem, c)
             for name, (axes, when) in STAGES.items() if happens[when]}
    record = ffi.new("sparge_intermediates *")
    for name, x in found.items():
        if name.lower() in FIELDS:
            setattr(record, name.lower(), _arrays.pointer(x, FIELDS[name.lower()].cname))
    if not attend:
        settings.watch.call(lib.sparge_predict, p, c, out._mask, record)
    else:
        result = ffi.new("sparge_result *", {"o": _arrays.read("o", own["o"]).c("sparge_out"),
                                             "intermediates": record})
        if predict:
            result.mask = out._mask
            settings.watch.call(lib.sparge_attention, p, c, result)
        else:
            settings.watch.call(lib.sparge_attend, p, c, out._mask, result)
    found["mask"] = out.blocks.astype(np.uint8)
    if attend:
        found["o"] = own["o"].astype(np.float32)
    return found


def _on_cpu(what: str, **arrays: Any) -> None:
    for name, x in arrays.items():
        if _arrays.is_torch(x) and str(x.device) != "cpu":
            raise ValueError(f"{name} is on {x.device} and {what}() runs on the CPU: give "
                             f"{name}.cpu()")


def _is_integer(dtype: int) -> bool:
    return text(lib.sparge_dtype_string(dtype)).startswith("int")


def _dtype(name: str) -> str:
    """Of an array of intermediates, by numpy's name."""
    if name.lower() not in FIELDS:
        return "uint8"  # the mask
    kind = str(FIELDS[name.lower()].item.cname)
    return "float32" if kind == "float" else kind[:-2]  # int16_t


def _zeros(axes: str, dtype: Any, problem: Problem, options: Any) -> Array:
    """An array of axes such as "bhij", without that of batches if q has none."""
    p = problem.c
    sizes = {"b": p.batch, "h": p.heads, "g": p.kv_heads, "q": p.q_len, "k": p.k_len, "d": p.dim,
             "v": p.dim_v, "i": -(-p.q_len // options.block_q), "j": -(-p.k_len // options.block_k)}
    shape = [sizes[axis] for axis in (axes if problem.q.batched else axes.lstrip("b"))]
    return np.zeros(shape, dtype)
