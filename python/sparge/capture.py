# SPDX-License-Identifier: Apache-2.0
"""Record q, k and v from a running PyTorch model: whatever it gives to
scaled_dot_product_attention; and gradients of a language model.

    from sparge.capture import Recorder

    with Recorder(pipeline.transformer, "build/captures/flux", name="FLUX.1-dev",
                  layers=[0, 10, 20], steps=range(0, 28, 7)) as record:
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

gradient=True is for language models of transformers. The files have g [B, H, N, D] too, in float32:
the gradient at each head's output of the sum over positions of -log p of a label that is drawn from
the model's own softmax, so that the mean of g g^T is the Fisher information. label_seed says which
labels; the manifest has it. Each call of the model has its backward pass, so it gets a whole text,
without padding, cache, torch.no_grad() and logits_to_keep. Weights get no gradient, and layers run
again in the backward pass: memory is near that of the forward pass with its logits twice. A model
in bfloat16 rounds g as it rounds the rest.

The model must use torch's attention: attn_implementation="sdpa" in transformers, a native backend
in diffusers. A step in which all of it goes another way is refused, and so are modules that were
compiled as a whole.
"""
from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparge._files import write_whole
from sparge._optional import optional

optional("torch", "sparge.capture")
optional("safetensors", "sparge.capture")
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save  # noqa: E402

from sparge._capture import (  # noqa: E402
    ATTENTION,
    PRODUCT_SOFTMAX,
    Watch,
    fit,
    holders,
    is_compiled,
    narrowest,
    sight,
    ungroup,
)
from sparge._gradient import SAID, Gradient  # noqa: E402

if TYPE_CHECKING:
    Which = Iterable[int] | Callable[[int], bool] | None

HEADER = 512  # bytes, more than the header of four tensors takes
# in each file's entry, and at the top
SHARED = "n_heads", "n_kv_heads", "head_dim", "causal", "softmax_scale", "dtype"
FOUND = "left_out", "left_out_at", "files"
OURS = ("model", "model_class", "sample", "layout", "hook_point", "gradient", "recorded",
        "framework", *SHARED, *FOUND)


# ---- Files ------------------------------------------------------------------------------------

class Place(NamedTuple):
    """A layer that was left out, and why; by: the operation that was called in place of ours, or
    the module's class."""
    layer: int
    module: str
    why: str
    by: str = ""


def by_reason(left_out: Counter[Place]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for place, n in left_out.items():
        counts[place.why] += n
    return dict(counts)


class Sample:
    """A folder, and its manifest: a head, the files' entries by name, how often a layer was left
    out, and why."""

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self.folder, self.head = folder, head
        self.entries: dict[str, dict[str, Any]] = {}
        self.left_out: Counter[Place] = Counter()
        self.written: list[int] = []
        if self.path.exists():
            before = json.loads(self.path.read_text())
            for key in (before.keys() | head.keys()) - {*SHARED, *FOUND}:
                if before.get(key) != head.get(key):
                    raise ValueError(
                        f"{self.path} is of another recording, its '{key}' is {before.get(key)!r}, "
                        f"not {head.get(key)!r}; choose another folder or sample")
            self.entries = {entry["file"]: entry for entry in before["files"]}

    @property
    def path(self) -> Path:
        return self.folder / "manifest.json"

    def has(self, name: str, module: str) -> bool:
        if name not in self.entries or not (self.folder / name).exists():
            return False
        if (before := self.entries[name]["module"]) != module:
            raise ValueError(
                f"{self.folder / name} is of the module {before}, and its layer is now {module}; "
                "choose another folder or sample")
        return True

    def add(self, name: str, tensors: dict[str, Any], entry: dict[str, Any]) -> None:
        data = save(tensors)
        write_whole(self.folder / name, data)
        self.written.append(len(data))
        self.entries[name] = {
            "file": name, "sha256": hashlib.sha256(data).hexdigest(), **entry,
            "dtype": str(tensors["q"].dtype).split(".")[-1],
            "shapes": {key: list(x.shape) for key, x in tensors.items()}}
        self.save()

    def shared(self, key: str) -> Any:
        values = {entry[key] for entry in self.entries.values()} - {None}
        return values.pop() if len(values) == 1 else None

    def save(self) -> None:
        manifest = {
            **self.head, **{key: self.shared(key) for key in SHARED}, "left_out":
            by_reason(self.left_out), "left_out_at":
            [{**place._asdict(), "calls": n} for place, n in sorted(self.left_out.items())],
            "files": [self.entries[name] for name in sorted(self.entries)]
        }
        write_whole(self.path, (json.dumps(manifest, indent=2) + "\n").encode())


# ---- The model --------------------------------------------------------------------------------

def rule(which: Which) -> tuple[Callable[[int], bool], Any]:
    """Numbers as a function of a number; and what the manifest says of them."""
    if which is None:
        return (lambda n: True), "all"
    if callable(which):
        return which, getattr(which, "__name__", "a function")
    numbers = {int(n) for n in which}
    return numbers.__contains__, sorted(numbers)


class Recorder:
    """As the head of this file says."""
    active = False

    # Numbers as functions of a number.
    layers: Callable[[int], bool]
    steps: Callable[[int], bool]
    heads: Callable[[int], bool]
    batch: Callable[[int], bool]

    def __init__(self, model: Any, folder: str | Path, name: str, layers: Which = None,
                 steps: Which = None, heads: Which = None, batch: Which = None, budget: float = 4e9,
                 masked: str = "refuse", cross: bool = False, gradient: bool = False,
                 label_seed: int = 0, **more: Any) -> None:
        if masked not in ("refuse", "skip"):
            raise ValueError(f'masked is "refuse" or "skip", not {masked!r}')
        self.model, self.folder, self.name, self.more = model, Path(folder), name, more
        self.budget, self.masked, self.cross = budget, masked, cross
        self.recorded: dict[str, Any] = {"masked": masked, "cross": cross}
        for key, which in dict(layers=layers, steps=steps, heads=heads, batch=batch).items():
            chosen, self.recorded[key] = rule(which)
            setattr(self, key, chosen)
        self.gradient = Gradient(model, label_seed) if gradient else None
        self.places: dict[tuple[str, int], int] = {}
        self.equal: set[int] = set()
        self.seen = 0
        # the modules that run, the outermost first: name, attention in it by module and operation
        self.inside: list[tuple[str, set[tuple[str, str]]]] = []
        self.entered, self.watching = ExitStack(), ExitStack()
        self.watch = Watch(partial(self.miss, "bypass"))
        self.open: Any = None  # a Sample, while the model runs
        self.written: list[int] = []
        self.left_out: Counter[Place] = Counter()
        self.begin("sample")

    # ---- Samples ----

    def begin(self, sample: Any, **more: Any) -> None:
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
                "arguments of scaled_dot_product_attention, before the softmax scale",
                **({"gradient": {**SAID, "seed": self.gradient.seed}} if self.gradient else {}),
                "recorded": self.recorded, "framework": versions
            }))
        self.step = -1
        self.timestep: float | None = None

    def end_sample(self) -> None:
        if self.open:
            self.open.save()
            self.written += self.open.written
            self.left_out += self.open.left_out
        self.open = None

    sample = property(lambda self: self.head["sample"], begin)

    # ---- Where a call comes from ----

    def __enter__(self) -> Recorder:
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
        if self.gradient:
            self.entered.enter_context(self.gradient)
        for module, name in self.replaced:
            setattr(module, name, self.attend)
        Recorder.active = True
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for module, name in self.replaced:
            setattr(module, name, self.original)
        for hook in self.hooks:
            hook.remove()
        self.entered.close()
        Recorder.active, self.inside = False, []
        self.leave_step()
        self.end_sample()
        if self.seen or self.written:
            print(self.summary(), file=sys.stderr)
        if kind is None and not self.seen:
            raise RuntimeError(
                "the model was not called, so nothing is recorded; give the module that is called")

    def begin_step(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.gradient:
            kwargs = self.gradient.begin(kwargs)
        self.open = self.open or Sample(self.folder / self.sample, self.head)
        self.step += 1
        self.inside, self.taken = [], False
        self.calls: Counter[str] = Counter()
        self.leave_step()  # torch calls no hook after an interrupt
        self.watch.begin(self.model)
        self.watching.enter_context(
            torch.compiler.set_stance("force_eager"))  # what is compiled could not be watched
        self.watching.enter_context(self.watch)
        time = kwargs.get("timestep")
        self.timestep = None if time is None else float(torch.as_tensor(time).flatten()[0])
        return args, kwargs

    def end_step(self, module: Any, args: Any, out: Any) -> None:
        self.seen += 1
        if not self.taken:
            other = f", but {self.by} in '{self.module}'" if self.calls else ""
            raise RuntimeError(
                f"the model did not call scaled_dot_product_attention{other}; give "
                'attn_implementation="sdpa" to transformers, a native backend to diffusers, and '
                "let a model of your own call "
                "torch.nn.functional.scaled_dot_product_attention by this name"
            )
        if self.gradient:
            self.leave_step()
            self.inside = []  # layers that run again are of no step
            self.gradient.run(out)

    def leave_step(self, *_: Any) -> None:
        self.watching.close()

    def enter_module(self, name: str, *_: Any) -> None:
        self.inside.append((name, set()))

    def in_step(self) -> bool:
        return bool(self.inside) and self.inside[0][0] == ""

    def look_back(self, module: Any, *_: Any) -> None:
        if self.in_step() and not self.inside[-1][1]:
            self.miss("unseen", type(module).__name__)

    def leave_module(self, *_: Any) -> None:
        del self.inside[-1:]

    def arrive(self, by: str = "") -> bool:
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

    def attend(self, *args: Any, **more: Any) -> Any:
        if not self.in_step():
            return self.original(*args, **more)
        self.watch.paused = True
        try:
            out = self.original(*args, **more)
            self.take(out, *args, **more)
        finally:
            self.watch.paused = False
        return out

    def take(self, out: Any, query: Any, key: Any, value: Any, attn_mask: Any = None,
             dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
             enable_gqa: bool = False) -> None:
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
            file, out, q, k, v, {
                "layer": self.layer, "step": self.step, "timestep": self.timestep,
                "module": self.module, "tokens": q.shape[2], "keys": k.shape[2],
                "n_heads": q.shape[1], "n_kv_heads": k.shape[1], "head_dim": q.shape[3],
                # the last token sees all keys
                "causal": None if seen == "all" and q.shape[2] == 1 else seen != "all",
                **({"causal_at": seen} if seen != "all" and q.shape[2] != k.shape[2] else {}),
                "softmax_scale": q.shape[3]**-0.5 if scale is None else float(scale)
            })

    def whole(self, query: Any, key: Any, value: Any, grouped: bool) -> tuple[Any, Any, Any]:
        """q [B, H, N, D] and k, v [B, G, N, D]."""
        batch = max(x.shape[0] for x in (query, key, value))
        q, k, v = (x.detach().expand(batch, -1, -1, -1) for x in (query, key, value))
        per_key = getattr(self.model.get_submodule(self.module), "num_key_value_groups", 1)
        return (q, k, v) if grouped else ungroup(q, k, v, per_key)

    def add(self, file: str, out: Any, q: Any, k: Any, v: Any, entry: dict[str, Any]) -> None:
        """The file of what is chosen, if there is room for it."""
        rows, heads, groups = self.choose(q.shape[0], q.shape[1], k.shape[1])
        tensors = {"q": q[rows][:, heads], "k": k[rows][:, groups], "v": v[rows][:, groups]}
        dtype = narrowest(tensors)
        if not dtype:
            raise ValueError(f"{self.where}: q, k or v is not finite, or beyond float32")
        size = HEADER + dtype.itemsize * sum(x.numel() for x in tensors.values())
        used = sum(x.stat().st_size for x in self.folder.glob("*/*.safetensors")
                   if x != self.open.folder / file)
        if self.gradient:
            size += torch.float32.itemsize * len(rows) * len(heads) * q.shape[2] * v.shape[3]
            used += sum(self.gradient.waiting.values())
        if used + size > self.budget:
            return self.leave_out("budget")
        tensors = {name: x.to(dtype).cpu().contiguous() for name, x in tensors.items()}
        entry = {**entry, "batch": rows, "query_heads": heads, "kv_heads": groups}
        shape = *q.shape[:3], v.shape[3]

        def write(g: Any) -> None:
            g = g.reshape(shape)[rows][:, heads].float().cpu().contiguous()
            self.open.add(file, {**tensors, "g": g}, entry)

        if self.gradient:
            self.gradient.wait(out, file, size, write)
        else:
            self.open.add(file, tensors, entry)

    def choose(self, batch: int, query_heads: int,
               key_heads: int) -> tuple[list[int], list[int], list[int]]:
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

    def miss(self, why: str, by: str) -> None:
        """Attention that cannot be recorded has its number too; heads or slices in a loop have one
        together."""
        name, seen = self.inside[-1]
        looped = by == PRODUCT_SOFTMAX and (name, by) in seen
        if not looped and self.arrive(by):
            self.leave_out(why)

    def leave_out(self, why: str) -> None:
        self.open.left_out[Place(self.layer, self.module, why, self.by)] += 1

    def summary(self) -> str:
        """What was written and left out since the Recorder was entered, in a line."""
        text = (f"sparge: {self.folder}: {len(self.written)} files written, {sum(self.written):,} "
                "bytes")
        for n, (why, calls) in enumerate(by_reason(self.left_out).items()):
            first = min(place for place in self.left_out if place.why == why)
            by = f", {first.by}" if first.by else ""
            text += (f"{',' if n else '; left out:'} {calls} by {why} (first layer {first.layer}, "
                     f"{first.module}{by})")
        return text
