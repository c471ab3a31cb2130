# SPDX-License-Identifier: Apache-2.0
"""In place of torch.nn.functional.scaled_dot_product_attention: the same arguments, sparse.

    import sparge.torch

    o = sparge.torch.scaled_dot_product_attention(q, k, v, is_causal=True, tau=0.95)

    with sparge.torch.replace_sdpa(model, params=sparge.load_params("tuned.json")) as record:
        model(**inputs)
    print(record)

Forward only: where a gradient is needed, it is refused. torch.compile leaves these calls out of its
graphs.

A mask of attn_mask hides what it hides in torch; a query that sees no key gets 0. Which blocks are
computed is predicted first, with what the mask has of causality and without padding at either end
of a sample. The rest of the mask then takes pairs away. A row of blocks that so loses a predicted
block as a whole, or in which a query loses all of them, attends to all that the mask shows. A bias
of keys, a float mask that is the same for all queries, is added to the scores and takes no part in
the prediction, but for the keys that it hides.
"""
from __future__ import annotations

import functools
import math
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable

from sparge._optional import optional

optional("torch", "sparge.torch")
import torch
import torch.nn.functional as F
from torch import Tensor

from sparge import _sdpa_mask
from sparge._attention import attend, attention, predict
from sparge._capture import HIDDEN
from sparge._counts import Counts
from sparge._methods import METHOD_DEFAULTS, MethodOptions
from sparge._native import lib
from sparge._options import DEFAULTS, Function, flag, takes_options, whole
from sparge._params import Params

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What a call or a model says by itself; all other options are those of attention().
OWN = {"is_causal", "softmax_scale", "k_bias", "layout", "gate", "layer", "state"}
SHARED = {name: x for name, x in {**METHOD_DEFAULTS, **DEFAULTS}.items() if name not in OWN}

__all__ = ["Call", "Record", "Unsupported", "replace_sdpa", "scaled_dot_product_attention"]


def takes_shared(function: Function) -> Function:
    """Shows the shared options in the signature of a function that takes them as **options."""
    return takes_options(function, MethodOptions, SHARED)


def uncompiled(function: Function) -> Function:
    """A function that torch.compile leaves out of its graphs."""
    found: Function = torch.compiler.disable(function)
    return found


class Unsupported(ValueError):
    """A call that torch's own function takes and this one does not."""


# ---- What was done ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call of attention."""

    layer: int | None  # its number in the model, from 0
    query: tuple[int, ...]  # shape
    key: tuple[int, ...]
    density: float  # share of the pairs visible by causality that are attended
    sparsity: float  # the paper's (Sec 4.1)
    seconds: float  # all of it, masks too


@dataclass
class Record:
    """The calls of attention that were made, and why others went to torch's own."""

    calls: list[Call] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)  # reason: calls

    def clear(self) -> None:
        """Forgets all calls."""
        self.calls.clear()
        self.passed.clear()

    def by_layer(self) -> dict[int | None, list[Call]]:
        """The calls of each layer."""
        found: dict[int | None, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.layer, []).append(call)
        return found

    def __str__(self) -> str:
        rows = ["layer   calls  density  sparsity  seconds"]
        for layer, calls in self.by_layer().items():
            density, sparsity = (sum(getattr(c, name) for c in calls) / len(calls)
                                 for name in ("density", "sparsity"))
            rows.append(f"{'-' if layer is None else layer:>5} {len(calls):7} {density:8.3f} "
                        f"{sparsity:9.3f} {sum(c.seconds for c in calls):8.3f}")
        rows += [f"{n} calls to torch's own attention: {why}" for why, n in self.passed.items()]
        return "\n".join(rows)


# ---- The function -----------------------------------------------------------------------------


@uncompiled
@takes_shared
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor,
                                 attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                                 is_causal: bool = False, *, scale: float | None = None,
                                 enable_gqa: bool = False, layer: int | None = None,
                                 record: Record | None = None,
                                 **options: Any) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention by SpargeAttn.

    query [..., H, Nq, D], key [..., G, Nk, D], value [..., G, Nk, Dv]; the result is
    [..., H, Nq, Dv] in query's dtype. Axes before them may be missing or 1, as in torch. attn_mask
    is broadcast to [..., H, Nq, Nk]: bool, True takes part; float, 0 or -inf (or -1e4 or
    less); other numbers where they are the same for all queries. is_causal is aligned at
    the first query and the first key, as torch's. scale None is 1/sqrt(D).

    layer picks the thresholds of params and is what the record says. The options are those of
    attention(). Raises Unsupported, a ValueError, where torch's own function must be used: for
    gradients, dropout, other masks, dtypes and devices."""
    start = time.perf_counter()
    _check(query, key, value, attn_mask, dropout_p, is_causal)
    q, k, v, lead = _four_axes(_cast(query, key, value), enable_gqa)
    shown, k_bias = _read_mask(attn_mask, lead, q, k)
    settings = {**options, **_of_layer(options, layer), "k_bias": k_bias}
    if scale is not None:
        settings["softmax_scale"] = scale
    if shown is None:
        causal = "end" if q.shape[2] == k.shape[2] else "start"  # of squares it is the same
        o, counts = _run(q, k, v, None, {**settings, "is_causal": is_causal and causal})
        total = [counts]
    else:
        o, total = _run_masked(q, k, v, shown, settings)
    if record is not None:
        counts = Counts.sum(total)
        record.calls.append(Call(layer, tuple(query.shape), tuple(key.shape), counts.density,
                                 counts.sparsity, time.perf_counter() - start))
    axes = max(query.ndim, key.ndim, value.ndim)
    return o.reshape((*lead, *o.shape[1:])[-axes:] if axes > 2 else o.shape[2:])


def _of_layer(options: Any, layer: int | None) -> dict[str, Any]:
    """What a layer has of its own: thresholds, and its number for methods."""
    found: dict[str, Any] = {} if layer is None else {"layer": layer}
    if isinstance(options.get("params"), Params) and layer is not None:
        found["params"] = options["params"].layer(layer)
    return found


def _check(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
           is_causal: bool) -> None:
    """What is wrong, and what torch can do alone."""
    tensors = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    given = {name: x for name, x in tensors.items() if x is not None}
    refuse_gradients(given)
    if dropout_p != 0:
        raise Unsupported(f"dropout_p is {dropout_p}, it must be 0: call model.eval()")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal is True and attn_mask is given, only one of them may be")
    for name, x in given.items():
        if x.is_nested or x.layout is not torch.strided:
            raise Unsupported(f"{name} is nested or sparse, it must be strided")
        if x.ndim < 2 and name != "attn_mask":
            raise ValueError(f"{name} has the shape {list(x.shape)}, it must be [..., N, D]")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device} and query is on {query.device}, they must "
                             "be on one device")
    if query.device.type not in ("cpu", "cuda"):
        raise Unsupported(f"query is on {query.device}, it must be on cpu or cuda")
    if query.device.type == "cuda" and attn_mask is not None:
        raise Unsupported("attn_mask is given and query is on cuda, where there are no masks yet")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype not in DTYPES:
            raise Unsupported(f"{name} is {x.dtype}, it must be float32, float16 or bfloat16")
    if query.shape[-1] > lib.SPARGE_MAX_DIM:
        raise Unsupported(f"query has {query.shape[-1]} channels, it must have at most "
                          f"{lib.SPARGE_MAX_DIM}")


def refuse_gradients(tensors: Mapping[str, Any]) -> None:
    """Raises Unsupported where one of them takes part in a gradient."""
    for name, x in tensors.items():
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise Unsupported(f"{name}.requires_grad is True, it must be False: there is no "
                              "backward pass; run the model under torch.no_grad()")


def _cast(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """In one dtype: that of autocast where it is on."""
    tensors = [query, key, value]
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        return [x.to(torch.get_autocast_dtype(kind)) for x in tensors]
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype} and query is {query.dtype}, they must be the "
                             "same")
    return tensors


def _four_axes(tensors: list[Tensor], enable_gqa: bool
               ) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """[B, H, Nq, D], [B, G, Nk, D], [B, G, Nk, Dv], and the axes of which B is the product."""
    q, k, v = (x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x for x in tensors)
    lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    heads = (q.shape[-3], k.shape[-3], v.shape[-3])
    if not enable_gqa:
        most = torch.broadcast_shapes(*((n,) for n in heads))[0]
        groups = 1 if heads[1] == heads[2] == 1 else most
        heads = (most, groups, groups)
    q, k, v = (x.expand(*lead, n, *x.shape[-2:]).reshape(math.prod(lead), n, *x.shape[-2:])
               for x, n in zip((q, k, v), heads))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v, tuple(lead)


def _read_mask(mask: Tensor | None, lead: tuple[int, ...], q: Tensor, k: Tensor
               ) -> tuple[Any, Tensor | None]:
    """A mask as the pairs that it shows, [B or 1, H or 1, Nq, Nk] of numpy, and as a bias of keys,
    [B, G, Nk]; None for what it has not."""
    if mask is None:
        return None, None
    shape = (*lead, q.shape[1], q.shape[2], k.shape[2])
    try:
        m = mask[(None,) * (len(shape) - mask.ndim)]
        torch.broadcast_shapes(m.shape, shape)
        own = torch.broadcast_to(m, (*(lead if m.shape[:-3].numel() != 1 else (1,) * len(lead)),
                                     *m.shape[-3:-1], shape[-1]))
        m = own.reshape(math.prod(own.shape[:-3]), *own.shape[-3:])
        if m.shape[1] not in (1, shape[-3]) or m.shape[2] not in (1, shape[-2]):
            raise RuntimeError
    except (RuntimeError, IndexError):
        raise ValueError(f"attn_mask has the shape {list(mask.shape)}, it must be one that can be "
                         f"broadcast to {list(shape)}") from None
    if m.dtype == torch.bool:
        return _pairs(m, q, k), None
    if not m.is_floating_point():
        raise ValueError(f"attn_mask is {mask.dtype}, it must be bool or float")
    hidden = m <= HIDDEN
    if bool((hidden | (m == 0)).all()):
        return _pairs(~hidden, q, k), None
    if m.stride(2) == 0:  # expanded
        m = m[:, :, :1]
    if m.shape[2] != 1 or m.shape[1] not in (1, k.shape[1]):
        raise Unsupported("attn_mask has numbers other than 0 and -inf that differ between queries "
                          "or heads, they must be the same for all: a bias is of keys alone")
    bias = m[:, :, 0].float().expand(k.shape[0], k.shape[1], -1).contiguous()
    return _pairs(~hidden[:, :, :1], q, k) if bool(hidden.any()) else None, bias


def _pairs(m: Tensor, q: Tensor, k: Tensor) -> Any:
    return m.expand(-1, -1, q.shape[2], k.shape[2]).numpy()


def _run(q: Tensor, k: Tensor, v: Tensor, shown: Any, settings: Any) -> tuple[Tensor, Counts]:
    """Attention, and what it counted."""
    if shown is None:
        o, stats = attention(q, k, v, return_stats=True, **settings)
    else:
        mask = _sdpa_mask.restrict(predict(q, k, v, **settings), shown)
        given = {name: x for name, x in settings.items() if name in DEFAULTS and name != "block"}
        o, stats = attend(q, k, v, mask, return_stats=True, **given)
    return o, stats.counts


def _run_masked(q: Tensor, k: Tensor, v: Tensor, shown: Any, settings: Any
                ) -> tuple[Tensor, list[Counts]]:
    """Attention over the parts of a mask, one after the other."""
    o = q.new_zeros((*q.shape[:3], v.shape[3]))
    total = []
    for part in _sdpa_mask.parts(shown, len(q)):
        b, rows, keys = part.samples, part.queries, part.keys
        bias = settings["k_bias"]
        o[b, :, rows], counts = _run(q[b, :, rows], k[b, :, keys], v[b, :, keys], part.shown,
                                     {**settings, "is_causal": part.is_causal,
                                      "k_bias": bias if bias is None else bias[b, :, keys]})
        total.append(counts)
    return o, total


# ---- In its place -----------------------------------------------------------------------------


class Taker:
    """Who takes the calls that a model makes of attention: by the options of
    scaled_dot_product_attention(), and torch's own where that cannot."""

    def __init__(self, options: Any, strict: bool = False, min_queries: int = 2) -> None:
        self.options, self.strict = options, flag("strict", strict)
        self.min_queries = whole("min_queries", min_queries)
        self.record = Record()
        self._said: set[str] = set()

    def take(self, torchs: Callable[..., Any], args: Any, kwargs: Any, layer: int | None) -> Tensor:
        """A call; torchs is who gets what is not taken."""
        query = args[0] if args else kwargs["query"]
        if query.ndim > 1 and query.shape[-2] < self.min_queries:
            return self.leave(torchs, args, kwargs, f"fewer than {self.min_queries} queries")
        refuse_gradients({**dict(zip(("query", "key", "value", "attn_mask"), args)), **kwargs})
        try:
            return scaled_dot_product_attention(
                *args, **{**self.options, **kwargs, "layer": layer, "record": self.record})
        except Unsupported as error:
            if self.strict:
                raise
            return self.leave(torchs, args, kwargs, str(error))

    def leave(self, torchs: Callable[..., Any], args: Any, kwargs: Any, why: str) -> Any:
        """A call to torch's own; the first for a reason is said."""
        self.record.passed[why] += 1
        if why not in self._said:
            self._said.add(why)
            warnings.warn(f"sparge leaves attention to torch where it cannot take it: {why}",
                          stacklevel=4)
        return torchs(*args, **kwargs)


class _Replacement:
    """A Taker, and the model whose calls it takes."""

    def __init__(self, taker: Taker, model: torch.nn.Module | None) -> None:
        self.taker, self.model = taker, model
        self.here = threading.local()  # where in the model this thread is
        self.hooks = [] if model is None else [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True)]

    def _enter(self, module: Any, args: Any) -> None:
        self.here.layer = 0

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        self.here.layer = None

    def __call__(self, torchs: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.model is None:
            return self.taker.take(torchs, args, kwargs, None)
        layer = getattr(self.here, "layer", None)
        if layer is None:
            return NotImplemented
        self.here.layer = layer + 1
        return self.taker.take(torchs, args, kwargs, layer)


_takers: list[Callable[..., Any]] = []  # the last one is asked first
_lock = threading.Lock()
_installed: tuple[Any, Any] | None = None  # what stands in torch's place, and torch's own


def _dispatcher(torchs: Callable[..., Any]) -> Callable[..., Any]:
    @uncompiled
    @functools.wraps(torchs)
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        for taker in reversed(tuple(_takers)):
            o = taker(torchs, args, kwargs)
            if o is not NotImplemented:
                return o
        return torchs(*args, **kwargs)

    return scaled_dot_product_attention


@contextmanager
def in_place(taker: Callable[[Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
    """Gives taker the calls of torch's function: torch's own, its arguments, and those by name.
    Where it returns NotImplemented, since its model does not run, the one around it is asked."""
    global _installed
    with _lock:
        if not _takers:
            torchs = F.scaled_dot_product_attention
            _installed = _dispatcher(torchs), torchs
            F.scaled_dot_product_attention = _installed[0]
        _takers.append(taker)
    try:
        yield
    finally:
        with _lock:
            _takers.remove(taker)
            if not _takers and _installed and F.scaled_dot_product_attention is _installed[0]:
                F.scaled_dot_product_attention = _installed[1]


@contextmanager
@takes_shared
def replace_sdpa(model: torch.nn.Module | None = None, *, strict: bool = False,
                 min_queries: int = 2, **options: Any) -> Iterator[Record]:
    """Puts scaled_dot_product_attention() in the place of torch.nn.functional's.

        with sparge.torch.replace_sdpa(model, params=sparge.load_params("tuned.json")) as record:
            model(**inputs)
        print(record)

    With a model, the calls made while it runs are taken, and numbered as its layers from 0 in each
    run; params may then be those of all layers. Without one, all calls are taken, in all threads.
    What sparge cannot take (see Unsupported), and calls of fewer than min_queries queries, go to
    torch's own function, which is said once for each reason; strict=True raises instead of the
    former. Gradients are always refused: some layers would learn, and others not. The options are
    those of attention(). Replacements may be nested: the innermost takes the calls, or that of
    their model.

    Code that took the function from torch.nn.functional before keeps torch's own."""
    mine = _Replacement(Taker(options, strict, min_queries), model)
    try:
        with in_place(mine):
            yield mine.taker.record
    finally:
        for hook in mine.hooks:
            hook.remove()
