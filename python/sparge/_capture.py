# SPDX-License-Identifier: Apache-2.0
"""What sparge.capture looks at: the tensors of a call of attention, as files hold them, the model,
and attention that comes by other operations than scaled_dot_product_attention."""
from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# elements whose rounding is looked at together: there may be little room beside a model
PART = 1 << 24
HIDDEN = -1e4  # added to a score, this or less hides the key


# ---- Tensors ----------------------------------------------------------------------------------

def copies(x: Any) -> int:
    """How many heads in a row of x [B, H, N, D] are the same, if that is so all along: a divisor of
    H."""
    last = [*(x[:, 1:] != x[:, :-1]).flatten(2).any(2).any(0).tolist(), True]
    count = last.index(True) + 1
    return count if last == ([False] * (count - 1) + [True]) * (len(last) // count) else 1


def ungroup(q: Any, k: Any, v: Any, per_key: int) -> tuple[Any, Any, Any]:
    """q as [B, H, N, D], and k and v without the copies that were made of their heads.

    One token's query heads may come as if they were tokens of their key head, [B, G, H / G, D];
    per_key is that H / G.
    """
    count = math.gcd(copies(k), copies(v))
    if count == 1 < per_key == q.shape[2] and q.shape[1] == k.shape[1]:
        return q.flatten(1, 2).unsqueeze(2), k, v
    return q, k[:, ::count], v[:, ::count]


def fit(q: Any, k: Any, v: Any) -> bool:
    """Are they [B, H, N, D] and [B, G, N, D]?"""
    return bool(q.ndim == k.ndim == v.ndim == 4 and q.shape[1] % k.shape[1] == 0
                and k.shape[1] == v.shape[1])


def sight(mask: Any, is_causal: bool, queries: int, keys: int) -> str:
    """What queries see: "all", "end" or "start" (causal, the last or the first tokens aligned), or
    "other"."""
    if is_causal:
        return "end" if queries == keys else "start"
    if mask is None:
        return "all"
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    if mask.dtype != torch.bool and mask[seen].any():
        return "other"
    if seen.all():
        return "all"
    for where, diagonal in ("end", keys - queries), ("start", 0):
        causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(diagonal)
        if seen.shape[-2:] == causal.shape and (seen == causal).all():
            return where
    return "other"


def loss(tensors: Mapping[str, Any], dtype: Any) -> float:
    """The worst error of a token by rounding to this type, relative to its largest value; NaN if
    one is not finite."""
    worst = []
    for x in tensors.values():
        for some in x.flatten(0, 1).split(max(1, PART // x[0, 0].numel())):
            some = some.to(torch.promote_types(x.dtype, torch.float32))
            error = (some - some.to(dtype)).abs().amax(2)
            worst.append(torch.where(error == 0, 0, error / some.abs().amax(2)).amax().item())
    return float(torch.tensor(worst).amax())


def narrowest(tensors: Mapping[str, Any]) -> Any:
    """The one of float16 and bfloat16 that loses less; float32 where that is more than bfloat16's
    last bit; or None."""
    lost = {dtype: loss(tensors, dtype) for dtype in (torch.float16, torch.bfloat16)}
    best = min(lost, key=lambda dtype: lost[dtype])
    if lost[best] <= torch.finfo(torch.bfloat16).eps / 2:
        return best
    return torch.float32 if loss(tensors,
                                 torch.float32) <= torch.finfo(torch.float32).eps / 2 else None


# ---- The model --------------------------------------------------------------------------------

def is_compiled(module: Any) -> bool:
    return module._compiled_call_impl is not None or hasattr(module.forward,
                                                             "_torchdynamo_orig_callable")


def holders(function: Any) -> list[tuple[ModuleType, str]]:
    """Modules that have it, and under which name: users import it from torch's, where it stays what
    it is but in F."""
    return [(module, name) for place, module in list(sys.modules.items())
            if isinstance(module, ModuleType) and (module is F or place.split(".")[0] != "torch")
            for name, value in list(vars(module).items()) if value is function]


# ---- Attention of other kinds -----------------------------------------------------------------

ATTENTION = re.compile("(attention|attn|sdpa|flash|transformer_encoder_layer)(?!.*backward)",
                       re.IGNORECASE)
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv",
            "dot"}  # of their last two tensors
EXPONENTIALS = {"_softmax", "_safe_softmax", "_masked_softmax", "exp", "exp_", "exp2", "exp2_"}
WEIGHT, OTHER, SCORE, PROBABILITY = -1, 0, 1, 2
PRODUCT_SOFTMAX = "a softmax between products"


def tensors_of(tree: Any) -> list[Any]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def storages(tree: Any) -> list[Any]:
    """Where the tensors' elements are, which views share. While one of these is kept, no other
    storage equals it."""
    return [
        StorageWeakRef(x.untyped_storage()) for x in tensors_of(tree) if x.layout is torch.strided
    ]


class Watch(TorchDispatchMode):  # type: ignore[misc]
    """Calls found(operation) for all attention that torch computes: for an operation of such a
    name, and for a softmax between two products.

    Tensors are marked: the model's weights, products (scores) and exponentials of these
    (probabilities). An operation gives its result the highest mark that it was given. A product
    with weights is a layer, and gives none.
    """
    supports_higher_order_operators = True

    def __init__(self, found: Callable[[str], None]) -> None:
        super().__init__()
        self.found, self.paused = found, False
        self.marks: dict[Any, int] = {}

    def begin(self, model: Any) -> None:
        """Copies of weights that were made in an earlier step, as autocast does, are still
        weights."""
        self.marks = {x: mark for x, mark in self.marks.items() if not x.expired()}
        self.marks.update(dict.fromkeys(storages([*model.parameters(), *model.buffers()]), WEIGHT))

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = operation.name().rpartition("::")[2].partition(".")[0]
        attention = not self.paused and ATTENTION.search(name)
        if attention:
            self.found(str(operation))
        if attention or self.paused or isinstance(operation, torch._ops.HigherOrderOperator):
            return operation(*args, **kwargs)
        out = NotImplemented
        if not any(x.is_nested
                   for x in tensors_of((args, kwargs))):  # those have operations of their own
            with self:  # where it consists of others, as matmul does
                out = operation.decompose(*args, **kwargs)
        if out is NotImplemented:
            out = operation(*args, **kwargs)
            self.mark(name, args, kwargs, out)
        return out

    def mark(self, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        mark = max(self.marks_of((args, kwargs)), default=OTHER)
        if name in EXPONENTIALS and mark == SCORE:
            mark = PROBABILITY
        elif name in PRODUCTS:
            factors = self.marks_of(args)[-2:]
            if PROBABILITY in factors and WEIGHT not in factors:
                self.found(PRODUCT_SOFTMAX)
            mark = OTHER if PROBABILITY in factors or WEIGHT in factors else SCORE
        for x in storages(out):
            if mark == OTHER:
                self.marks.pop(x, None)
            else:
                self.marks[x] = mark

    def marks_of(self, tensors: Any) -> list[int]:
        return [self.marks.get(x, OTHER) for x in storages(tensors)]
