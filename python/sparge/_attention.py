# SPDX-License-Identifier: Apache-2.0
"""The calls: predict, attend, and both."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from sparge._device import Mirror
from sparge._given import prepare_over
from sparge._mask import BlockMask
from sparge._methods import MethodOptions, chooses, takes_method
from sparge._native import ffi, lib
from sparge._options import Options, prepare, takes_options
from sparge._plan import make_plan
from sparge._result import Result

if TYPE_CHECKING:
    from typing_extensions import Unpack

Array = TypeVar("Array")  # of numpy or torch


@overload
def attention(q: Array, k: Any, v: Any, *, return_lse: Literal[False] = False,
              return_mask: Literal[False] = False, return_stats: Literal[False] = False,
              **options: Unpack[MethodOptions]) -> Array:
    ...


@overload
def attention(q: Any, k: Any, v: Any, *, return_lse: bool = False, return_mask: bool = False,
              return_stats: bool = False, **options: Unpack[MethodOptions]) -> Any:
    ...


@takes_method
def attention(q: Any, k: Any, v: Any, *, return_lse: bool = False, return_mask: bool = False,
              return_stats: bool = False, **options: Unpack[MethodOptions]) -> Any:
    """SpargeAttn: predicts which blocks of the attention map matter, and attends over them.

        o = sparge.attention(q, k, v, is_causal=True)
        o, lse, stats = sparge.attention(q, k, v, tau=0.9, return_lse=True, return_stats=True)
        o = sparge.attention(q, k, v, method="xattention", density=0.3)

    q    [H, Nq, D] or [B, H, Nq, D]: heads, tokens, channels (1 to 256)
    k    [G, Nk, D] or [B, G, Nk, D]: H is a multiple of G, and query head h reads head h // (H / G)
    v    [G, Nk, Dv] or [B, G, Nk, Dv]
         Arrays of numpy or tensors of torch, or what has __dlpack__, in float32, float16 or
         bfloat16 (numpy: ml_dtypes.bfloat16); each may be of another dtype, and of another kind on
         the same device. Any strides are read in place as long as the channels of a token lie side
         by side (stride 1). Lengths may be 0. The call is forward only: tensors that require
         gradients are refused where torch records them.

    Returns o [H, Nq, Dv] or [B, H, Nq, Dv], of the kind, dtype, device and layout of q (of what has
    only __dlpack__, a numpy array). A row that sees no key is 0. With return_lse, return_mask or
    return_stats it returns (o, lse, mask, stats), of these what was asked for:
    lse    [H, Nq] or [B, H, Nq] float32 in every layout, the natural log of the sum of exp(scores);
           -inf: no key
    mask   BlockMask: the blocks that were computed
    stats  Stats: counts, what ran, seconds

    What is visible, and the scores:
    is_causal      False; "end": query t sees keys up to t + Nk - Nq (FlashAttention >= 2.1);
                   "start": up to t (torch's is_causal); True: either, and Nq must be Nk
    softmax_scale  factor of q.k, finite, above 0; None: 1/sqrt(D)
    k_bias         float32 [G, Nk] or [B, G, Nk], added to the scores of a key, in natural log
                   units; -inf hides the key. The prediction ignores it

    Which blocks are kept (Sec 3.3 of the paper). A number, or [H] of them; None: the default
    theta    -1 to 1, default 0.6: blocks whose tokens have at most this mean cosine are kept always
    tau      0 to 1, or -1: off; default 0.98, off where topk or min_mass is given: mass of the
             blocks to keep
    topk     0 to 1, or -1: off; default off: share of the visible blocks to keep, beside tau's
    min_mass at least 0; default 0, off: blocks of more mass than so many even shares of all blocks
             are kept, beside tau's and topk's (not of the paper)
    lambda_  -inf to 0, natural log units; default -inf, never: P.V of a block is skipped where its
             scores are that far below the maximum so far (Sec 3.4)
    sink     keep key block 0 always
    params   thresholds of each head from a file of `sparge tune` (Thresholds), instead of the five
    rules    "default"; "paper" (as printed) and "upstream" (as released) run on ref alone
    block    (128, 64): queries and keys of a block, 1 to 1024
    cell     0: masses are of mean rows of blocks; else of cells of so many tokens, a divisor of
             both blocks. theta -1 goes with it

    Another way to choose (methods() lists all; methods work on the CPU):
    method         None: SpargeAttn; a name, the command line's "xattention:tau=0.9,stride=8", or a
                   Method. It has its own parameters instead of the thresholds above
    method_params  {"tau": 0.9}: parameters by name; those left out have their defaults
    density        0 to 1: share of the visible pairs of tokens to keep; the method's first
                   parameter is bisected (SpargeAttn: tau, one for all heads), in some 30 plans
    grid           (t, h, w) or (t, h, w, text_before, text_after) of the tokens, for methods that
                   need it; segment_ends, ascending to Nk, the same
    gate           of seer: {"k": ..., "q": ..., "rope_base": ...}, matrices [G or H, 3 D, hidden]
                   and [H, D, hidden] of one layer's gate (None: hidden is D, q is taken as it is),
                   and rope_theta of the rotation that q and k have had (left out: none)
    layer, step    of the model, from 0; state, a State, which such a method keeps from call to call

    How it is computed:
    qk_dtype   arithmetic of Q.K^T: "int8", "int12", "f32" or "bf16"
    pv_dtype   arithmetic of P.V: also "f16", "fp8" and "fastest". Dense attention in f32 is
               attend(q, k, v, None, qk_dtype="f32", pv_dtype="f32")
    smooth_k   subtract the mean key before quantization (SageAttention)
    skip_rows  rows that share a decision of lambda_; 0: 64, or as the rules say
    backend    "auto" (cpu, ref where cpu lacks something, cuda for tensors of torch on CUDA),
               "ref", "cpu" or "cuda"
    isa        of cpu: "auto", "scalar", "avx2", "avxvnni", "avx512vnni" or "amx"
    kernel     of cuda: 1 to 5 (gpu/README.md); 0: the best
    threads    0: as many as OpenMP takes, to 1024. No bit of the result depends on it
    layout     "HND", or "NHD" for q, k, v and o as [N, H, D] or [B, N, H, D]

    Raises TypeError for a wrong kind or dtype, ValueError for a wrong value or shape,
    NotImplementedError for what this library, machine or method lacks, MemoryError, RuntimeError
    for errors of CUDA. KeyboardInterrupt ends the call. The defaults are those of sparge_options.h.
    """
    if chooses(options):
        return make_plan(q, k, v, options).run(
            return_lse=return_lse, return_mask=return_mask, return_stats=return_stats)
    problem, settings = prepare(q, k, v, options)
    result = Result(problem, return_lse, return_stats)
    mask = None
    if return_mask:
        mask = BlockMask(problem.c, settings.c, problem.q.batched)
        result.c.mask = result.mirror.mask(mask._mask, settings.c, True)
    result.call(settings.watch, lib.sparge_attention, problem.c, settings.c)
    return result.returned(mask)


@takes_method
def predict(q: Any, k: Any, v: Any = None, **options: Unpack[MethodOptions]) -> BlockMask:
    """The blocks that attention() would compute, without attention.

    Arguments are those of attention(). SpargeAttn does not look at v; a method may, and then needs
    it. The mask of a method is in blocks of its own. ValueError where the plan of the method is
    more than one mask over q, k and v as they are (see plan()).
    """
    if options.get("method") is not None and v is None:
        raise TypeError(f"v is None and method is {options['method']!r}, which may look at it")
    if chooses(options):
        return make_plan(q, k, k if v is None else v, options).mask
    problem, settings = prepare(q, k, k, options)
    mask = BlockMask(problem.c, settings.c, problem.q.batched)
    mirror = Mirror(problem.q)
    place = mirror.mask(mask._mask, settings.c, True)
    mirror.call(settings.watch, lib.sparge_predict, problem.c, settings.c, place, ffi.NULL)
    return mask


@overload
def attend(q: Array, k: Any, v: Any, mask: Any, *, return_lse: Literal[False] = False,
           return_stats: Literal[False] = False, **options: Unpack[Options]) -> Array:
    ...


@overload
def attend(q: Any, k: Any, v: Any, mask: Any, *, return_lse: bool = False,
           return_stats: bool = False, **options: Unpack[Options]) -> Any:
    ...


@takes_options
def attend(q: Any, k: Any, v: Any, mask: Any, *, return_lse: bool = False,
           return_stats: bool = False, **options: Unpack[Options]) -> Any:
    """Attention over the blocks of a mask that is given (Algorithm 1 lines 3, 7-22).

    mask  None: dense, all visible pairs; a BlockMask, whose block and causality hold and must
          agree with what is given; or bool or uint8 [H, Qb, Kb] or [B, H, Qb, Kb] of numpy or
          torch, where Qb = ceil(Nq / block[0]) and Kb = ceil(Nk / block[1]): 0 is not computed
    The other arguments, what it returns and raises are as of attention(). Of the thresholds lambda_
    alone matters. Blocks of which no pair is visible are ignored.
    """
    problem, settings, given = prepare_over(q, k, v, mask, options)
    result = Result(problem, return_lse, return_stats)
    place = ffi.NULL
    if given is not None:
        place = result.mirror.mask(given._mask, settings.c, False)
    result.call(settings.watch, lib.sparge_attend, problem.c, settings.c, place)
    return result.returned()
