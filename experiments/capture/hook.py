# SPDX-License-Identifier: Apache-2.0
"""Record q, k and v from a running PyTorch model: whatever it gives to
scaled_dot_product_attention.

    from hook import Recorder

    with Recorder(pipeline.transformer, "build/captures/flux", name="FLUX.1-dev", layers=[0, 10,
    20],
                  steps=range(0, 28, 7)) as record:
        for n, prompt in enumerate(prompts):
            record.begin(f"prompt{n}", prompt=prompt)
            pipeline(prompt, num_inference_steps=28)

A call of the model is a step, counted from 0 in each sample; a pipeline that calls it twice for a
timestep makes two steps of that. The calls of attention in it are layers, cross attention too, in
the order in which they are first made; what is called outside of the model, as by a text encoder,
does not count. record.sample = "name" begins a sample of which there is no more to say. What every
sample's manifest shall say too is given to Recorder: revision="...", grid=[T, H, W], n_text=226.

FOLDER/SAMPLE/layerLL_stepSSS.safetensors has q [B, H, N, D] and k, v [B, G, N, D] as attention is
given them: after norms and position embeddings, text and image together, before the softmax scale;
key heads that were repeated for the query heads stand there once. They are float16 or bfloat16,
whichever loses less, by the worst error of a token relative to its own largest value; or float32,
where both lose more than bfloat16's last bit. FOLDER/SAMPLE/manifest.json describes the files:
layer, module, step, timestep (what the model is given under that name), heads, mask, scale; what
they have in common is at its top, and null where they differ. Both appear whole, and the manifest
is written after every file. The same command again adds what is missing; a folder of another model
or other rules is refused. At the end a line on stderr says what was written and what was left out.

What is recorded:
    layers, steps, heads, batch
            numbers, or a function of the number; None: all. heads are query heads, as many of each
            key head that has any. With guidance two samples are a batch: batch=[1] is the second
    budget  bytes of all files in FOLDER; what does not fit is left out
    masked  attention may be causal, or have a mask that hides nothing. Other masks (padding,
            windows, biases) are not in the files, so they are refused: record without padding.
            masked="skip" leaves such calls out
    cross   whether to take calls whose queries and keys have never been as many in that place.
            (Where they once were, as in a prompt, fewer queries are the next tokens, and are
            recorded.)

The manifest counts what is left out, and lists it by layer and module: by budget, mask, cross, and
shape (not [B, H, N, D] and [B, G, N, D]); and attention that does not come by
torch.nn.functional.scaled_dot_product_attention:
    bypass  by another operation (of torch.nn.MultiheadAttention's fast path, flex_attention, the
            function as it was kept before), or as a softmax between two products of tensors that
            are no weights
    unseen  in a module whose class is called attention, and in which none was seen, as by a kernel
            of its own
Such attention has a number too, so that those of the others do not depend on it. What a model
compiles runs uncompiled while it is recorded.

The model must use torch's attention: attn_implementation="sdpa" in transformers, a native backend
in diffusers. A step in which all of it goes another way is refused, and so are modules that were
compiled as a whole.
"""
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# elements whose rounding is looked at together: there may be little room beside a model
PART = 1 << 24
HEADER = 512  # bytes, more than the header of three tensors takes
HIDDEN = -1e4  # added to a score, this or less hides the key
# in each file's entry, and at the top
SHARED = "n_heads", "n_kv_heads", "head_dim", "causal", "softmax_scale", "dtype"
FOUND = "left_out", "left_out_at", "files"
OURS = ("model", "model_class", "sample", "layout", "hook_point", "recorded", "framework", *SHARED,
        *FOUND)


# ---- Tensors ----------------------------------------------------------------------------------

def copies(x):
    """How many heads in a row of x [B, H, N, D] are the same, if that is so all along: a divisor of
    H."""
    last = [*(x[:, 1:] != x[:, :-1]).flatten(2).any(2).any(0).tolist(), True]
    count = last.index(True) + 1
    return count if last == ([False] * (count - 1) + [True]) * (len(last) // count) else 1


def ungroup(q, k, v, per_key):
    """q as [B, H, N, D], and k and v without the copies that were made of their heads.

    One token's query heads may come as if they were tokens of their key head, [B, G, H / G, D];
    per_key is that H / G.
    """
    count = math.gcd(copies(k), copies(v))
    if count == 1 < per_key == q.shape[2] and q.shape[1] == k.shape[1]:
        return q.flatten(1, 2).unsqueeze(2), k, v
    return q, k[:, ::count], v[:, ::count]


def fit(q, k, v):
    """Are they [B, H, N, D] and [B, G, N, D]?"""
    return q.ndim == k.ndim == v.ndim == 4 and q.shape[1] % k.shape[1] == 0 and k.shape[
        1] == v.shape[1]


def sight(mask, is_causal, queries, keys):
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


def loss(tensors, dtype):
    """The worst error of a token by rounding to this type, relative to its largest value; NaN if
    one is not finite."""
    worst = []
    for x in tensors.values():
        for some in x.flatten(0, 1).split(max(1, PART // x[0, 0].numel())):
            some = some.to(torch.promote_types(x.dtype, torch.float32))
            error = (some - some.to(dtype)).abs().amax(2)
            worst.append(torch.where(error == 0, 0, error / some.abs().amax(2)).amax().item())
    return torch.tensor(worst).amax().item()


def narrowest(tensors):
    """The one of float16 and bfloat16 that loses less; float32 where that is more than bfloat16's
    last bit; or None."""
    lost = {dtype: loss(tensors, dtype) for dtype in (torch.float16, torch.bfloat16)}
    best = min(lost, key=lost.get)
    if lost[best] <= torch.finfo(torch.bfloat16).eps / 2:
        return best
    return torch.float32 if loss(tensors,
                                 torch.float32) <= torch.finfo(torch.float32).eps / 2 else None


# ---- Attention of other kinds -----------------------------------------------------------------

ATTENTION = re.compile("(attention|attn|sdpa|flash|transformer_encoder_layer)(?!.*backward)",
                       re.IGNORECASE)
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv",
            "dot"}  # of their last two tensors
EXPONENTIALS = {"_softmax", "_safe_softmax", "_masked_softmax", "exp", "exp_", "exp2", "exp2_"}
WEIGHT, OTHER, SCORE, PROBABILITY = -1, 0, 1, 2
PRODUCT_SOFTMAX = "a softmax between products"


def tensors_of(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def storages(tree):
    """Where the tensors' elements are, which views share. While one of these is kept, no other
    storage equals it."""
    return [
        StorageWeakRef(x.untyped_storage()) for x in tensors_of(tree) if x.layout is torch.strided
    ]


class Watch(TorchDispatchMode):
    """Calls found(operation) for all attention that torch computes: for an operation of such a
    name, and for a softmax between two products.

    Tensors are marked: the model's weights, products (scores) and exponentials of these
    (probabilities). An operation gives its result the highest mark that it was given. A product
    with weights is a layer, and gives none.
    """
    supports_higher_order_operators = True

    def __init__(self, found):
        super().__init__()
        self.found, self.paused, self.marks = found, False, {}

    def begin(self, model):
        """Copies of weights that were made in an earlier step, as autocast does, are still
        weights."""
        self.marks = {x: mark for x, mark in self.marks.items() if not x.expired()}
        self.marks.update(dict.fromkeys(storages([*model.parameters(), *model.buffers()]), WEIGHT))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
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

    def mark(self, name, args, kwargs, out):
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

    def marks_of(self, tensors):
        return [self.marks.get(x, OTHER) for x in storages(tensors)]


# ---- Files ------------------------------------------------------------------------------------

def write_whole(path, data):
    """All of it or nothing appears at this path."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Place(NamedTuple):
    """A layer that was left out, and why; by: the operation that was called in place of ours, or
    the module's class."""
    layer: int
    module: str
    why: str
    by: str = ""


def by_reason(left_out):
    counts = Counter()
    for place, n in left_out.items():
        counts[place.why] += n
    return dict(counts)


class Sample:
    """A folder, and its manifest: a head, the files' entries by name, how often a layer was left
    out, and why."""

    def __init__(self, folder, head):
        self.folder, self.head, self.entries = folder, head, {}
        self.left_out, self.written = Counter(), []
        if self.path.exists():
            before = json.loads(self.path.read_text())
            for key in (before.keys() | head.keys()) - {*SHARED, *FOUND}:
                if before.get(key) != head.get(key):
                    raise ValueError(
                        f"{self.path} is of another recording, its '{key}' is {before.get(key)!r}, "
                        f"not {head.get(key)!r}; choose another folder or sample")
            self.entries = {entry["file"]: entry for entry in before["files"]}

    @property
    def path(self):
        return self.folder / "manifest.json"

    def has(self, name, module):
        if name not in self.entries or not (self.folder / name).exists():
            return False
        if (before := self.entries[name]["module"]) != module:
            raise ValueError(
                f"{self.folder / name} is of the module {before}, and its layer is now {module}; "
                "choose another folder or sample")
        return True

    def add(self, name, tensors, entry):
        data = save(tensors)
        write_whole(self.folder / name, data)
        self.written.append(len(data))
        self.entries[name] = {
            "file": name, "sha256": hashlib.sha256(data).hexdigest(), **entry,
            "dtype": str(tensors["q"].dtype).removeprefix("torch."),
            "shapes": {key: list(x.shape) for key, x in tensors.items()}}
        self.save()

    def shared(self, key):
        values = {entry[key] for entry in self.entries.values()} - {None}
        return values.pop() if len(values) == 1 else None

    def save(self):
        manifest = {
            **self.head, **{key: self.shared(key) for key in SHARED}, "left_out":
            by_reason(self.left_out), "left_out_at":
            [{**place._asdict(), "calls": n} for place, n in sorted(self.left_out.items())],
            "files": [self.entries[name] for name in sorted(self.entries)]
        }
        write_whole(self.path, (json.dumps(manifest, indent=2) + "\n").encode())


# ---- The model --------------------------------------------------------------------------------

def rule(which):
    """Numbers as a function of a number; and what the manifest says of them."""
    if which is None:
        return (lambda n: True), "all"
    if callable(which):
        return which, getattr(which, "__name__", "a function")
    numbers = {int(n) for n in which}
    return numbers.__contains__, sorted(numbers)


def is_compiled(module):
    return module._compiled_call_impl is not None or hasattr(module.forward,
                                                             "_torchdynamo_orig_callable")


def holders(function):
    """Modules that have it, and under which name: users import it from torch's, where it stays what
    it is but in F."""
    return [(module, name) for place, module in list(sys.modules.items())
            if isinstance(module, ModuleType) and (module is F or place.split(".")[0] != "torch")
            for name, value in list(vars(module).items()) if value is function]


class Recorder:
    """As the head of this file says."""
    active = False

    def __init__(self, model, folder, name, layers=None, steps=None, heads=None, batch=None,
                 budget=4e9, masked="refuse", cross=False, **more):
        if masked not in ("refuse", "skip"):
            raise ValueError(f'masked is "refuse" or "skip", not {masked!r}')
        self.model, self.folder, self.name, self.more = model, Path(folder), name, more
        self.budget, self.masked, self.cross = budget, masked, cross
        self.recorded = {"masked": masked, "cross": cross}
        for key, which in dict(layers=layers, steps=steps, heads=heads, batch=batch).items():
            chosen, self.recorded[key] = rule(which)
            setattr(self, key, chosen)
        self.places, self.equal, self.seen = {}, set(), 0
        self.inside = [
        # the modules that run, the outermost first: name, attention in it by module and operation
        ]
        self.watching, self.watch, self.open = ExitStack(), Watch(partial(self.miss,
                                                                          "bypass")), None
        self.written, self.left_out = [], Counter()
        self.begin("sample")

    # ---- Samples ----

    def begin(self, sample, **more):
        """What follows is of this sample, from step 0 on; more: what its manifest shall say of
        it."""
        more, sample = {**self.more, **more}, str(sample)
        if self.inside:
            raise RuntimeError("a sample cannot begin while the model runs")
        if sample in ("", "..") or Path(sample).name != sample:
            raise ValueError(f"sample {sample!r} is no name of a folder")
        if wrong := sorted(more.keys() & OURS):
            raise ValueError(f"the manifest has a '{wrong[0]}' of its own; give another name")
        self.end_sample()
        packages = {kind.__module__.split(".")[0] for kind in type(self.model).__mro__}
        versions = {name: str(sys.modules[name].__version__) for name in sorted(packages)
                    if hasattr(sys.modules.get(name), "__version__")}
        self.head = json.loads(
            json.dumps({
                "model": self.name, "model_class": type(self.model).__name__, "sample": sample,
                **more, "layout": "BHND", "hook_point":
                "arguments of scaled_dot_product_attention, before the softmax scale", "recorded":
                self.recorded, "framework": versions
            }))
        self.step, self.timestep = -1, None

    def end_sample(self):
        if self.open:
            self.open.save()
            self.written += self.open.written
            self.left_out += self.open.left_out
        self.open = None

    sample = property(lambda self: self.head["sample"], begin)

    # ---- Where a call comes from ----

    def __enter__(self):
        if Recorder.active:
            raise RuntimeError("a Recorder is at work already; leave it first")
        if any(is_compiled(module) for module in self.model.modules()):
            raise ValueError(
                "the model is compiled: its attention cannot be seen; record it before "
                "torch.compile"
            )
        self.inside, self.written, self.left_out = [], [], Counter()
        self.original = F.scaled_dot_product_attention
        self.replaced = holders(self.original)
        self.hooks = [self.model.register_forward_pre_hook(self.begin_step, with_kwargs=True),
                      self.model.register_forward_hook(self.end_step)]
        for name, module in self.model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(partial(self.enter_module, name)))
            if ATTENTION.search(type(module).__name__):
                self.hooks.append(module.register_forward_hook(self.look_back))
            self.hooks.append(module.register_forward_hook(self.leave_module, always_call=True))
        self.hooks.append(self.model.register_forward_hook(self.leave_step, always_call=True))
        for module, name in self.replaced:
            setattr(module, name, self.attend)
        Recorder.active = True
        return self

    def __exit__(self, kind, *_):
        for module, name in self.replaced:
            setattr(module, name, self.original)
        for hook in self.hooks:
            hook.remove()
        Recorder.active, self.inside = False, []
        self.leave_step()
        self.end_sample()
        if self.seen or self.written:
            print(self.summary(), file=sys.stderr)
        if kind is None and not self.seen:
            raise RuntimeError(
                "the model was not called, so nothing is recorded; give the module that is called")

    def begin_step(self, module, args, kwargs):
        self.open = self.open or Sample(self.folder / self.sample, self.head)
        self.step += 1
        self.inside, self.calls, self.taken = [], Counter(), False
        self.leave_step()  # torch calls no hook after an interrupt
        self.watch.begin(self.model)
        self.watching.enter_context(
            torch.compiler.set_stance("force_eager"))  # what is compiled could not be watched
        self.watching.enter_context(self.watch)
        time = kwargs.get("timestep")
        self.timestep = None if time is None else float(torch.as_tensor(time).flatten()[0])

    def end_step(self, *_):
        self.seen += 1
        if not self.taken:
            other = f", but {self.by} in '{self.module}'" if self.calls else ""
            raise RuntimeError(
                f"the model did not call scaled_dot_product_attention{other}; give "
                'attn_implementation="sdpa" to transformers, a native backend to diffusers, and '
                "let a model of your own call "
                "torch.nn.functional.scaled_dot_product_attention by this name"
            )

    def leave_step(self, *_):
        self.watching.close()

    def enter_module(self, name, *_):
        self.inside.append((name, set()))

    def look_back(self, module, *_):
        if not self.inside[-1][1]:
            self.miss("unseen", type(module).__name__)

    def leave_module(self, *_):
        del self.inside[-1:]

    def arrive(self, by=""):
        """At the layer of this call: of the innermost module, and which of its calls in this step
        it is. Chosen?"""
        self.module, self.by = self.inside[-1][0], by
        self.calls[self.module] += 1
        for _, seen in self.inside:
            seen.add((self.module, by))
        self.layer = self.places.setdefault((self.module, self.calls[self.module]),
                                            len(self.places))
        self.where = f"layer {self.layer} ({self.module}), step {self.step}"
        return self.layers(self.layer) and self.steps(self.step)

    # ---- What is recorded ----

    def attend(self, *args, **more):
        if not self.inside or self.inside[0][0] != "":
            return self.original(*args, **more)
        self.watch.paused = True
        try:
            out = self.original(*args, **more)
            self.take(*args, **more)
        finally:
            self.watch.paused = False
        return out

    def take(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
             enable_gqa=False):
        chosen, self.taken = self.arrive(), True
        file = f"layer{self.layer:02d}_step{self.step:03d}.safetensors"
        if query.shape[-2] == key.shape[-2]:
            self.equal.add(self.layer)
        if not chosen or self.open.has(file, self.module):
            return
        if dropout_p > 0:
            raise ValueError(
                f"{self.where}: attention drops weights at random; call model.eval() first")
        if not fit(query, key, value):
            return self.leave_out("shape")
        q, k, v = self.whole(query, key, value, enable_gqa)
        seen = sight(attn_mask, is_causal, q.shape[2], k.shape[2])
        if not self.cross and self.layer not in self.equal and seen != "end":
            return self.leave_out("cross")
        if seen == "other" and self.masked == "refuse":
            raise ValueError(
                f"{self.where}: attention has a mask that the files cannot hold; record without "
                "padding, "
                'or give masked="skip"')
        if seen == "other":
            return self.leave_out("mask")
        self.add(
            file,
            q,
            k,
            v,
            {
                "layer":
                self.layer,
                "step":
                self.step,
                "timestep":
                self.timestep,
                "module":
                self.module,
                "tokens":
                q.shape[2],
                "keys":
                k.shape[2],
                "n_heads":
                q.shape[1],
                "n_kv_heads":
                k.shape[1],
                "head_dim":
                q.shape[3],
                "causal":
                None if seen == "all" and q.shape[2] == 1 else seen
                != "all",  # the last token sees all keys
                **({"causal_at": seen} if seen != "all" and q.shape[2] != k.shape[2] else {}),
                "softmax_scale":
                q.shape[3]**-0.5 if scale is None else float(scale)
            })

    def whole(self, query, key, value, grouped):
        """q [B, H, N, D] and k, v [B, G, N, D]."""
        batch = max(x.shape[0] for x in (query, key, value))
        q, k, v = (x.detach().expand(batch, -1, -1, -1) for x in (query, key, value))
        per_key = getattr(self.model.get_submodule(self.module), "num_key_value_groups", 1)
        return (q, k, v) if grouped else ungroup(q, k, v, per_key)

    def add(self, file, q, k, v, entry):
        """The file of what is chosen, if there is room for it."""
        rows, heads, groups = self.choose(q.shape[0], q.shape[1], k.shape[1])
        tensors = {"q": q[rows][:, heads], "k": k[rows][:, groups], "v": v[rows][:, groups]}
        dtype = narrowest(tensors)
        if not dtype:
            raise ValueError(f"{self.where}: q, k or v is not finite, or beyond float32")
        size = dtype.itemsize * sum(x.numel() for x in tensors.values())
        used = sum(x.stat().st_size for x in self.folder.glob("*/*.safetensors")
                   if x != self.open.folder / file)
        if used + size + HEADER > self.budget:
            return self.leave_out("budget")
        tensors = {name: x.to(dtype).cpu().contiguous() for name, x in tensors.items()}
        self.open.add(file, tensors,
                      {**entry, "batch": rows, "query_heads": heads, "kv_heads": groups})

    def choose(self, batch, query_heads, key_heads):
        """The numbers of the chosen parts of the batch, query heads and key heads."""
        rows = [b for b in range(batch) if self.batch(b)]
        heads = [h for h in range(query_heads) if self.heads(h)]
        if not rows or not heads:
            raise ValueError(
                f"{self.where}: nothing is chosen of a batch of {batch} with {query_heads} heads")
        of = Counter(h * key_heads // query_heads for h in heads)
        if len(set(of.values())) > 1:
            raise ValueError(
                f"{self.where}: {min(of.values())} query heads of one key head are chosen and "
                f"{max(of.values())} of another; choose as many of each")
        return rows, heads, sorted(of)

    def miss(self, why, by):
        """Attention that cannot be recorded has its number too; heads or slices in a loop have one
        together."""
        name, seen = self.inside[-1]
        looped = by == PRODUCT_SOFTMAX and (name, by) in seen
        if not looped and self.arrive(by):
            self.leave_out(why)

    def leave_out(self, why):
        self.open.left_out[Place(self.layer, self.module, why, self.by)] += 1

    def summary(self):
        """What was written and left out since the Recorder was entered, in a line."""
        text = (f"hook: {self.folder}: {len(self.written)} files written, {sum(self.written):,} "
                "bytes")
        for n, (why, calls) in enumerate(by_reason(self.left_out).items()):
            first = min(place for place in self.left_out if place.why == why)
            by = f", {first.by}" if first.by else ""
            text += (f"{',' if n else '; left out:'} {calls} by {why} (first layer {first.layer}, "
                     f"{first.module}{by})")
        return text
