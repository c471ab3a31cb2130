# SPDX-License-Identifier: Apache-2.0
"""SpargeAttn in the models of diffusers.

    with sparge.diffusers.attention(pipe.transformer, topk=0.3) as calls:
        pipe(prompt)
    print(calls[0].sparsity)

reaches every model, whether its processors call dispatch_attention_fn (Flux) or torch's
scaled_dot_product_attention (CogVideoX). An option may be a function of layer and step:

    attention(pipe.transformer, topk=lambda layer, step: 0.5 if step < 5 else 0.2)

register() gives diffusers a backend by name instead, for all layers and steps alike.
"""
from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Union

from sparge._optional import optional

optional("torch", "sparge.diffusers")
from torch import Tensor

from sparge.torch import (
    Record,
    Unsupported,
    in_place,
    refuse_gradients,
    scaled_dot_product_attention,
    takes_shared,
)

Chosen = Union[Iterable[int], Callable[[int], bool], None]
NOT_CHOSEN = "not chosen"  # by layers and steps


@dataclass(frozen=True)
class Call:
    """A call of attention in the model. Steps, layers and modules are those of sparge.capture."""

    step: int  # which call of the model, from 0
    layer: int  # which call of attention, in the order in which they are first made
    module: str
    queries: int
    keys: int
    density: float  # share of the visible pairs of tokens that were attended
    sparsity: float  # the paper's (Sec 4.1)
    seconds: float  # on a GPU those of queueing it
    fallback: str = ""  # why diffusers' own attention computed it, or ""


class _Said:
    """Says a reason once."""

    def __init__(self) -> None:
        self.reasons: set[str] = set()

    def __call__(self, why: str, where: str = "") -> None:
        if why not in self.reasons:
            self.reasons.add(why)
            warnings.warn("sparge leaves attention to diffusers where it cannot compute it"
                          f"{where}: {why}", stacklevel=5)


# ---- A model ----------------------------------------------------------------------------------


def _rule(name: str, which: Chosen) -> Callable[[int], bool]:
    """Numbers as a function of a number."""
    if which is None:
        return lambda n: True
    if callable(which):
        return which
    try:
        return frozenset(which).__contains__
    except TypeError:
        raise TypeError(f"{name} is {which!r}, it must be numbers, or a function of a number"
                        ) from None


class _Model:
    """Where a model is while it runs, and its attention."""

    def __init__(self, model: Any, layers: Chosen, steps: Chosen, options: dict[str, Any]) -> None:
        self.model, self.options, self.say = model, options, _Said()
        self.layers, self.steps = _rule("layers", layers), _rule("steps", steps)
        self.calls: list[Call] = []
        self.step, self.thread = -1, 0
        self.inside: list[str] = []  # the modules that run, the outermost first
        self.met: Counter[str] = Counter()  # calls by module in this step
        self.places: dict[tuple[str, int], int] = {}  # layers

    # ---- Where a call comes from ----

    def hooks(self) -> Iterator[Any]:
        """Those that follow the model; to be removed."""
        yield self.model.register_forward_pre_hook(self.begin_step)
        for name, module in self.model.named_modules():
            yield module.register_forward_pre_hook(partial(self.enter, name))
            yield module.register_forward_hook(self.leave, always_call=True)
        yield self.model.register_forward_hook(self.end_step)

    def begin_step(self, *_: Any) -> None:
        self.step, self.thread = self.step + 1, threading.get_ident()
        self.inside.clear()  # torch calls no hook after an interrupt
        self.met.clear()

    def end_step(self, *_: Any) -> None:
        if not self.places:
            raise RuntimeError(f"{type(self.model).__name__} did not call torch's "
                               "scaled_dot_product_attention, whose place sparge takes")

    def enter(self, name: str, *_: Any) -> None:
        self.inside.append(name)

    def leave(self, *_: Any) -> None:
        del self.inside[-1:]

    # ---- Its attention ----

    def __call__(self, torchs: Any, args: Any, kwargs: Any) -> Any:
        """In the place of torch's scaled_dot_product_attention."""
        if self.inside[:1] != [""] or threading.get_ident() != self.thread:
            return NotImplemented  # outside of the model, as by a text encoder
        self.met[self.inside[-1]] += 1
        place = self.inside[-1], self.met[self.inside[-1]]
        layer = self.places.setdefault(place, len(self.places))
        return self.attend(torchs, layer, *args, **kwargs)

    def attend(self, torchs: Any, layer: int, query: Tensor, key: Tensor, value: Tensor,
               *args: Any, **kwargs: Any) -> Any:
        step, module = self.step, self.inside[-1]
        where = f"step {step}, layer {layer} ({module})"
        try:
            refuse_gradients({"query": query, "key": key, "value": value})
        except Unsupported as error:
            raise Unsupported(f"{where}: {error}") from None
        start, record, why = time.perf_counter(), Record(), NOT_CHOSEN
        if self.layers(layer) and self.steps(step):
            options = {name: x(layer, step) if callable(x) else x
                       for name, x in self.options.items()}
            try:
                o = scaled_dot_product_attention(
                    query, key, value, *args, **{**options, **kwargs}, layer=layer, record=record)
            except Unsupported as error:
                why = str(error)
                self.say(why, f", first in {where}")
            except (LookupError, NotImplementedError, TypeError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from error
        if record.calls:
            density, sparsity, why = record.calls[0].density, record.calls[0].sparsity, ""
        else:
            o, density, sparsity = torchs(query, key, value, *args, **kwargs), 1.0, 0.0
        self.calls.append(Call(step, layer, module, query.shape[-2], key.shape[-2], density,
                               sparsity, time.perf_counter() - start, why))
        return o


@contextmanager
@takes_shared
def attention(model: Any, *, layers: Chosen = None, steps: Chosen = None,
              **options: Any) -> Iterator[list[Call]]:
    """Within it, the attention of a model is SpargeAttn; the list has a Call for each.

        with sparge.diffusers.attention(pipe.transformer, topk=0.3) as calls:
            pipe(prompt)

    model: what the pipeline calls in each step, as pipe.transformer. It must not be compiled.
    layers, steps: numbers, or a function of the number: which calls are SpargeAttn's; None: all. A
    call of the model is a step, counted from 0 here; a pipeline that calls it twice for a timestep
    makes two steps of that. The calls of attention in it are layers, cross attention too, in the
    order in which they are first made: as sparge.capture counts them.
    options: those of sparge.attention(), but for what each call says itself. Each may be a function
    of layer and step: params=lambda layer, step: early if step < 10 else late. params may be those
    of all layers (sparge.load_params()).

    What SpargeAttn cannot compute (sparge.torch says what) is left to diffusers: Call.fallback says
    why, and a warning does so once. Backends that were chosen in diffusers are put aside, and come
    back at the end. There is no backward pass: a call whose tensors require gradients is refused.
    """
    if not hasattr(model, "named_modules"):
        raise TypeError(f"model is a {type(model).__name__}, it must be a module of torch, as "
                        "pipe.transformer")
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module.forward,
                                                             "_torchdynamo_orig_callable"):
            raise ValueError(f"{name or 'model'} is compiled, so its attention cannot be replaced: "
                             "give the model as it was before torch.compile")
    state = _Model(model, layers, steps, options)
    with ExitStack() as stack:
        _native(model, stack)
        for hook in state.hooks():
            stack.callback(hook.remove)
        stack.enter_context(in_place(state))
        yield state.calls
    if state.step < 0:
        raise RuntimeError(f"{type(model).__name__} was not called: give the module that the "
                           "pipeline calls")


def _native(model: Any, stack: ExitStack) -> None:
    """Sends what goes through dispatch_attention_fn to torch's function, until the stack
    unwinds."""
    module, names, _ = _dispatch()
    stack.enter_context(module.attention_backend(names.NATIVE))
    for processor in _processors(model):
        if getattr(processor, "_parallel_config", None) is not None:
            raise ValueError("the model is under context parallelism, which sparge cannot compute: "
                             "call it on one device")
        stack.callback(setattr, processor, "_attention_backend", processor._attention_backend)
        processor._attention_backend = names.NATIVE


def _processors(model: Any) -> Iterator[Any]:
    """Those that choose a backend."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            yield processor


# ---- A backend by name ------------------------------------------------------------------------


@takes_shared
def register(**options: Any) -> None:
    """Gives diffusers the backend "sparge": dispatch_attention_fn's attention is SpargeAttn's.

        sparge.diffusers.register(topk=0.3)
        pipe.transformer.set_attention_backend("sparge")

    options: those of sparge.attention(), but for what each call says itself; the same for all
    layers and steps. Again: other options. What SpargeAttn cannot compute is left to diffusers'
    native backend, and a warning says so once.

    Processors that call torch's function themselves (CogVideoX's) know no backends, and
    set_attention_backend() passes them over without a word: attention() reaches those too.
    """
    for name, x in options.items():
        if callable(x):
            raise TypeError(f"{name} is a function of layer and step, which a backend does not "
                            "know: give it to sparge.diffusers.attention()")
    _, names, registry = _dispatch()
    name = "sparge"
    if name not in names._value2member_map_:
        _add(names, name)
    elif getattr(registry._backends.get(names(name)), "__module__", "") != __name__:
        raise NotImplementedError(f"diffusers has a backend {name!r} of its own: use "
                                  "sparge.diffusers.attention()")
    registry.register(names(name))(_backend(registry._backends[names.NATIVE], options))


def _backend(native: Any, options: dict[str, Any]) -> Any:
    """A function as diffusers' registry takes it: what it can be given is in its signature."""
    say = _Said()

    def sparge_backend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                       dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                       enable_gqa: bool = False, _parallel_config: Any = None) -> Tensor:
        if _parallel_config is not None:
            raise NotImplementedError("the backend 'sparge' knows no context parallelism")
        refuse_gradients({"query": query, "key": key, "value": value})
        mask = attn_mask
        if mask is not None and mask.shape == (len(query), key.shape[1]):
            mask = mask[:, None, None]  # of keys: diffusers' own
        try:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return scaled_dot_product_attention(
                q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa,
                **options).transpose(1, 2)
        except Unsupported as error:
            say(str(error))
            o: Tensor = native(query, key, value, attn_mask, dropout_p, is_causal, scale,
                               enable_gqa)
            return o

    return sparge_backend


def _add(names: Any, value: str) -> None:
    """Another member of an Enum of strings, which Python has no public way for."""
    member = str.__new__(names, value)
    member._name_, member._value_ = value.upper(), value
    type.__setattr__(names, member._name_, member)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = names._value2member_map_[value] = member


def _dispatch() -> tuple[Any, Any, Any]:
    """diffusers' module of attention backends, their names, and their registry."""
    diffusers = optional("diffusers", "sparge.diffusers")
    try:
        from diffusers.models import attention_dispatch as module
        names, registry = module.AttentionBackendName, module._AttentionBackendRegistry
        known = names.NATIVE in registry._backends and callable(module.attention_backend)
    except (ImportError, AttributeError):
        known = False
    if not known:
        raise NotImplementedError(f"diffusers is {diffusers.__version__}, whose choice of "
                                  "attention sparge does not know: 0.42 is tested")
    return module, names, registry
