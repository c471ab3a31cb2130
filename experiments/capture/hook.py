"""Record q, k and v from a running PyTorch model: whatever it gives to scaled_dot_product_attention.

    from hook import Recorder

    with Recorder(pipeline.transformer, "build/captures/flux", name="FLUX.1-dev", layers=[0, 10, 20],
                  steps=range(0, 28, 7)) as record:
        for n, prompt in enumerate(prompts):
            record.begin(f"prompt{n}", prompt=prompt)
            pipeline(prompt, num_inference_steps=28)

A call of the model is a step, counted from 0 in each sample; a pipeline that calls it twice for a timestep makes two
steps of that. The calls of attention in it are layers, cross attention too, in the order in which they are first made;
what is called outside of the model, as by a text encoder, does not count. record.sample = "name" begins a sample of
which there is no more to say. What every sample's manifest shall say too is given to Recorder: revision="...",
grid=[T, H, W], n_text=226.

FOLDER/SAMPLE/layerLL_stepSSS.safetensors has q [B, H, N, D] and k, v [B, G, N, D] as attention is given them: after
norms and position embeddings, text and image together, before the softmax scale; key heads that were repeated for the
query heads stand there once. They are float16, or bfloat16 where a value is too large for that. FOLDER/SAMPLE/
manifest.json describes the files: layer, module, step, timestep (what the model is given under that name), heads, mask,
scale; what they have in common is at its top, and null where they differ. Both appear whole, and the manifest is
written after every file. The same command again adds what is missing; a folder of another model or other rules is
refused.

What is recorded:
    layers, steps, heads, batch  numbers, or a function of the number; None: all. heads are query heads, as many of each
                                 key head that has any. With guidance two samples are a batch: batch=[1] is the second
    budget  bytes of all files in FOLDER; what does not fit is left out
    masked  attention may be causal, or have a mask that hides nothing. Other masks (padding, windows, biases) are not
            in the files, so they are refused: record without padding. masked="skip" leaves such calls out
    cross   whether to take calls whose queries and keys have never been as many in that place. (Where they once were,
            as in a prompt, fewer queries are the next tokens, and are recorded.)
What is left out is counted in the manifest: by budget, mask, cross, and shape (not [B, H, N, D] and [B, G, N, D]).

The model must use torch's attention: attn_implementation="sdpa" in transformers, a native backend in diffusers.
Compiled models are refused, since their attention does not pass here.
"""
import hashlib
import json
import math
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from safetensors.torch import save

HEADER = 512  # bytes, more than the header of three tensors takes
HIDDEN = -1e4  # added to a score, this or less hides the key
SHARED = "n_heads", "n_kv_heads", "head_dim", "causal", "scale", "dtype"  # in each file's entry, and at the top
OURS = "model", "model_class", "sample", "layout", "hook_point", "recorded", "framework", *SHARED, "left_out", "files"


# ---- Tensors ----------------------------------------------------------------------------------

def copies(x):
    """How many heads in a row of x [B, H, N, D] are the same, if that is so all along: a divisor of H."""
    last = [*(x[:, 1:] != x[:, :-1]).flatten(2).any(2).any(0).tolist(), True]
    count = last.index(True) + 1
    return count if last == ([False] * (count - 1) + [True]) * (len(last) // count) else 1


def ungroup(q, k, v, per_key):
    """q as [B, H, N, D], and k and v without the copies that were made of their heads.

    One token's query heads may come as if they were tokens of their key head, [B, G, H / G, D]; per_key is that H / G.
    """
    count = math.gcd(copies(k), copies(v))
    if count == 1 < per_key == q.shape[2] and q.shape[1] == k.shape[1]:
        return q.flatten(1, 2).unsqueeze(2), k, v
    return q, k[:, ::count], v[:, ::count]


def fit(q, k, v):
    """Are they [B, H, N, D] and [B, G, N, D]?"""
    return q.ndim == k.ndim == v.ndim == 4 and q.shape[1] % k.shape[1] == 0 and k.shape[1] == v.shape[1]


def sight(mask, is_causal, queries, keys):
    """What queries see: "all", "end" or "start" (causal, the last or the first tokens aligned), or "other"."""
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


def narrow(tensors):
    """On the CPU, in float16, or all in bfloat16 where one has a value that float16 has not; None if not finite."""
    largest = torch.stack([x.abs().amax().double() for x in tensors.values()]).amax().item()
    if not math.isfinite(largest):
        return None
    dtype = torch.float16 if largest <= torch.finfo(torch.float16).max else torch.bfloat16
    return {name: x.to(dtype).cpu().contiguous() for name, x in tensors.items()}


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


class Sample:
    """A folder, and its manifest: a head, the files' entries by name, counts of what was left out."""

    def __init__(self, folder, head):
        self.folder, self.head, self.entries, self.left_out = folder, head, {}, Counter()
        if self.path.exists():
            before = json.loads(self.path.read_text())
            for key in (before.keys() | head.keys()) - {*SHARED, "left_out", "files"}:
                if before.get(key) != head.get(key):
                    raise ValueError(f"{self.path} is of another recording, its '{key}' is {before.get(key)!r}, not "
                                     f"{head.get(key)!r}; choose another folder or sample")
            self.entries = {entry["file"]: entry for entry in before["files"]}

    @property
    def path(self):
        return self.folder / "manifest.json"

    def has(self, name, module):
        if name not in self.entries or not (self.folder / name).exists():
            return False
        if (before := self.entries[name]["module"]) != module:
            raise ValueError(f"{self.folder / name} is of the module {before}, and its layer is now {module}; choose "
                             "another folder or sample")
        return True

    def add(self, name, tensors, entry):
        data = save(tensors)
        write_whole(self.folder / name, data)
        self.entries[name] = {
            "file": name, "sha256": hashlib.sha256(data).hexdigest(), **entry,
            "dtype": str(tensors["q"].dtype).removeprefix("torch."),
            "shapes": {key: list(x.shape) for key, x in tensors.items()}}
        self.save()

    def shared(self, key):
        values = {entry[key] for entry in self.entries.values()} - {None}
        return values.pop() if len(values) == 1 else None

    def save(self):
        manifest = {**self.head, **{key: self.shared(key) for key in SHARED}, "left_out": dict(self.left_out),
                    "files": [self.entries[name] for name in sorted(self.entries)]}
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
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")


def holders(function):
    """Modules that have it, and under which name: users import it from torch's, where it stays what it is but in F."""
    return [(module, name) for place, module in list(sys.modules.items()) if isinstance(module, ModuleType)
            and (module is F or place.split(".")[0] != "torch")
            for name, value in list(vars(module).items()) if value is function]


class Recorder:
    """As the head of this file says."""
    active = False

    def __init__(self, model, folder, name, layers=None, steps=None, heads=None, batch=None, budget=4e9,
                 masked="refuse", cross=False, **more):
        if masked not in ("refuse", "skip"):
            raise ValueError(f'masked is "refuse" or "skip", not {masked!r}')
        self.model, self.folder, self.name, self.more = model, Path(folder), name, more
        self.budget, self.masked, self.cross = budget, masked, cross
        self.recorded = {"masked": masked, "cross": cross}
        for key, which in dict(layers=layers, steps=steps, heads=heads, batch=batch).items():
            chosen, self.recorded[key] = rule(which)
            setattr(self, key, chosen)
        self.places, self.equal, self.inside, self.calls, self.seen = {}, set(), [], Counter(), 0
        self.open = None
        self.begin("sample")

    # ---- Samples ----

    def begin(self, sample, **more):
        """What follows is of this sample, from step 0 on; more: what its manifest shall say of it."""
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
        self.head = json.loads(json.dumps({
            "model": self.name, "model_class": type(self.model).__name__, "sample": sample, **more, "layout": "BHND",
            "hook_point": "arguments of scaled_dot_product_attention, before the softmax scale",
            "recorded": self.recorded, "framework": versions}))
        self.step, self.timestep = -1, None

    def end_sample(self):
        if self.open:
            self.open.save()
        self.open = None

    sample = property(lambda self: self.head["sample"], begin)

    # ---- Where a call comes from ----

    def __enter__(self):
        if Recorder.active:
            raise RuntimeError("a Recorder is at work already; leave it first")
        if any(is_compiled(module) for module in self.model.modules()):
            raise ValueError("the model is compiled: its attention cannot be seen; record it before torch.compile")
        self.inside = []
        self.original = F.scaled_dot_product_attention
        self.replaced = holders(self.original)
        self.hooks = [self.model.register_forward_pre_hook(self.begin_step, with_kwargs=True),
                      self.model.register_forward_hook(self.end_step)]
        for name, module in self.model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(partial(self.enter_module, name)))
            self.hooks.append(module.register_forward_hook(self.leave_module, always_call=True))
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
        self.end_sample()
        if kind is None and not self.seen:
            raise RuntimeError("the model was not called, so nothing is recorded; give the module that is called")

    def begin_step(self, module, args, kwargs):
        self.open = self.open or Sample(self.folder / self.sample, self.head)
        self.step += 1
        self.inside, self.calls = [], Counter()
        time = kwargs.get("timestep")
        self.timestep = None if time is None else float(torch.as_tensor(time).flatten()[0])

    def end_step(self, *_):
        self.seen += 1
        if not self.calls:
            raise RuntimeError("the model did not call scaled_dot_product_attention; give "
                               'attn_implementation="sdpa" to transformers, or a native backend to diffusers')

    def enter_module(self, name, *_):
        self.inside.append(name)

    def leave_module(self, *_):
        del self.inside[-1:]

    def place(self):
        """The number of this call's layer: of the innermost module, and which of its calls in this step it is."""
        module = self.inside[-1]
        self.calls[module] += 1
        return self.places.setdefault((module, self.calls[module]), len(self.places))

    # ---- What is recorded ----

    def attend(self, *args, **more):
        out = self.original(*args, **more)
        if self.inside and self.inside[0] == "":
            self.take(*args, **more)
        return out

    def take(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        layer, module = self.place(), self.inside[-1]
        file = f"layer{layer:02d}_step{self.step:03d}.safetensors"
        if query.shape[-2] == key.shape[-2]:
            self.equal.add(layer)
        if not self.layers(layer) or not self.steps(self.step) or self.open.has(file, module):
            return
        self.where = f"layer {layer} ({module}), step {self.step}"
        if dropout_p > 0:
            raise ValueError(f"{self.where}: attention drops weights at random; call model.eval() first")
        if not fit(query, key, value):
            return self.leave_out("shape")
        q, k, v = self.whole(query, key, value, enable_gqa)
        seen = sight(attn_mask, is_causal, q.shape[2], k.shape[2])
        if not self.cross and layer not in self.equal and seen != "end":
            return self.leave_out("cross")
        if seen == "other" and self.masked == "refuse":
            raise ValueError(f"{self.where}: attention has a mask that the files cannot hold; record without padding, "
                             'or give masked="skip"')
        if seen == "other":
            return self.leave_out("mask")
        self.add(file, q, k, v, {
            "layer": layer, "step": self.step, "timestep": self.timestep, "module": module, "tokens": q.shape[2],
            "keys": k.shape[2], "n_heads": q.shape[1], "n_kv_heads": k.shape[1], "head_dim": q.shape[3],
            "causal": None if seen == "all" and q.shape[2] == 1 else seen != "all",  # the last token sees all keys
            **({"causal_at": seen} if seen != "all" and q.shape[2] != k.shape[2] else {}),
            "scale": q.shape[3] ** -0.5 if scale is None else float(scale)})

    def whole(self, query, key, value, grouped):
        """q [B, H, N, D] and k, v [B, G, N, D]."""
        batch = max(x.shape[0] for x in (query, key, value))
        q, k, v = (x.detach().expand(batch, -1, -1, -1) for x in (query, key, value))
        per_key = getattr(self.model.get_submodule(self.inside[-1]), "num_key_value_groups", 1)
        return (q, k, v) if grouped else ungroup(q, k, v, per_key)

    def add(self, file, q, k, v, entry):
        """The file of what is chosen, if there is room for it."""
        rows, heads, groups = self.choose(q.shape[0], q.shape[1], k.shape[1])
        size = 2 * len(rows) * (len(heads) * q[0, 0].numel() + len(groups) * (k[0, 0].numel() + v[0, 0].numel()))
        used = sum(x.stat().st_size for x in self.folder.glob("*/*.safetensors") if x != self.open.folder / file)
        if used + size + HEADER > self.budget:
            return self.leave_out("budget")
        tensors = narrow({"q": q[rows][:, heads], "k": k[rows][:, groups], "v": v[rows][:, groups]})
        if not tensors:
            raise ValueError(f"{self.where}: q, k or v is not finite")
        self.open.add(file, tensors, {**entry, "batch": rows, "query_heads": heads, "kv_heads": groups})

    def choose(self, batch, query_heads, key_heads):
        """The numbers of the chosen parts of the batch, query heads and key heads."""
        rows = [b for b in range(batch) if self.batch(b)]
        heads = [h for h in range(query_heads) if self.heads(h)]
        if not rows or not heads:
            raise ValueError(f"{self.where}: nothing is chosen of a batch of {batch} with {query_heads} heads")
        of = Counter(h * key_heads // query_heads for h in heads)
        if len(set(of.values())) > 1:
            raise ValueError(f"{self.where}: {min(of.values())} query heads of one key head are chosen and "
                             f"{max(of.values())} of another; choose as many of each")
        return rows, heads, sorted(of)

    def leave_out(self, why):
        self.open.left_out[why] += 1
