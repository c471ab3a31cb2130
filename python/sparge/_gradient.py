# SPDX-License-Identifier: Apache-2.0
"""What sparge.capture does for gradients: one backward pass of a language model, for labels that
are drawn from it."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

ROWS = 256  # positions whose probabilities are held at a time
SAID = {
    "loss": "the sum over positions of -log p of a label drawn from the model's own softmax",
    "at": "each query head's output, before the output projection"
}


@torch.no_grad()  # type: ignore[untyped-decorator]
def drawn(logits: Any, seed: int) -> tuple[Any, Any]:
    """Labels [...] drawn from the softmax of logits [..., V], and the gradient by the logits of the
    sum of their -log p."""
    draw = torch.Generator(logits.device).manual_seed(seed)
    slope, labels = torch.empty_like(logits), []
    for scores, to in zip(*(x.flatten(0, -2).split(ROWS) for x in (logits, slope))):
        p = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32))
        labels.append(p.multinomial(1, generator=draw))
        to.copy_(p.scatter_add(-1, labels[-1], -torch.ones_like(p[:, :1])))
    return torch.cat(labels).view(logits.shape[:-1]), slope


def stacked(module: Any) -> Iterator[Any]:
    """A model's layers: what its outermost lists of modules hold."""
    for child in module.children():
        yield from child if isinstance(child, torch.nn.ModuleList) else stacked(child)


class Gradient:
    """While it is entered, gradients reach the model's layers and none of its weights. A layer's
    activations are computed again in the backward pass, so that those of one layer are held at a
    time."""

    def __init__(self, model: Any, seed: int) -> None:
        if not hasattr(model, "get_input_embeddings"):
            raise ValueError("gradient=True takes a language model of transformers")
        self.model, self.seed = model, seed
        self.waiting: dict[str, int] = {}  # bytes of each file that waits for its gradient

    def __enter__(self) -> Gradient:
        self.weights = [x for x in self.model.parameters() if x.requires_grad]
        self.layers = [(layer, vars(layer).get("forward")) for layer in stacked(self.model)]
        self.hook = self.model.get_input_embeddings().register_forward_hook(self.embedded)
        for x in self.weights:
            x.requires_grad_(False)
        for layer, _ in self.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        return self

    def __exit__(self, *_: Any) -> None:
        self.hook.remove()
        for x in self.weights:
            x.requires_grad_()
        for layer, own in self.layers:
            if own:
                layer.forward = own
            else:
                del layer.forward

    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the model that can be differentiated."""
        self.waiting.clear()
        self.positions: Any = None
        if not torch.is_grad_enabled():
            raise ValueError("gradient=True needs a backward pass: call the model outside of "
                             "torch.no_grad() and torch.inference_mode()")
        if self.model.training:
            raise ValueError("gradient=True takes a model that drops nothing at random; call "
                             "model.eval() first")
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            raise ValueError("gradient=True takes a whole text in one call, without a cache")
        return {**kwargs, "use_cache": False}

    def embedded(self, module: Any, args: Any, out: Any) -> None:
        self.positions = out.requires_grad_().shape[:-1]

    def wait(self, out: Any, file: str, size: int, write: Callable[[Any], None]) -> None:
        """write(g), which makes this file, when the backward pass has come to out."""
        def come(g: Any) -> None:
            del self.waiting[file]
            if not g.isfinite().all():
                raise ValueError(f"{file}: the gradient is not finite")
            write(g)

        self.waiting[file] = size
        if out.requires_grad:
            out.register_hook(come)

    def run(self, out: Any) -> None:
        """The backward pass, from what the model gave, if a file waits for it."""
        if not self.waiting:
            return
        logits = getattr(out, "logits", None)
        if logits is None:
            raise ValueError("gradient=True takes an output with logits: of a model with a head, "
                             "and without return_dict=False")
        if self.positions is None:
            raise ValueError("gradient=True takes input_ids, not inputs_embeds")
        if logits.shape[:-1] != self.positions:
            raise ValueError(
                f"gradient=True takes logits of all {list(self.positions)} positions, not of "
                f"{list(logits.shape[:-1])}; call the model without logits_to_keep")
        logits.backward(drawn(logits, self.seed)[1])
        if self.waiting:
            raise ValueError(f"the logits do not depend on the attention in {min(self.waiting)}")
