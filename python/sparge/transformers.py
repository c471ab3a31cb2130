# SPDX-License-Identifier: Apache-2.0
"""SpargeAttn in the models of Hugging Face's transformers, by the name of an attention.

    import sparge.transformers

    record = sparge.transformers.register(tau=0.95)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparge")
    model.generate(**inputs)
    print(record)

The prompt is attended by SpargeAttn, and so is whatever has at least min_queries new tokens. The
tokens that are generated one by one go to "sdpa", which is said once. Masks (padding, windows,
documents) are those of "sdpa"; sparge.torch says what becomes of them. Forward only: training and
gradients are refused.
"""
from __future__ import annotations

from typing import Any

from sparge._optional import optional

optional("transformers", "sparge.transformers")
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparge.torch import (Record, Taker, Unsupported, scaled_dot_product_attention, takes_shared,
                          uncompiled)

# What some models add to the softmax.
FOREIGN = {"position_bias": "a bias of positions", "softcap": "a bound of the scores",
           "s_aux": "weights without a key", "cache": "a paged cache"}


@takes_shared
def register(name: str = "sparge", *, min_queries: int = 2, **options: Any) -> Record:
    """Makes attn_implementation=name mean SpargeAttn, in all models, and returns the record of its
    calls.

    The options are those of sparge.attention(); is_causal and softmax_scale come from the model.
    params may be those of all layers (sparge.load_params()): each takes its own, by the layer_idx
    of its module. A name may be registered again; models that have it then follow. Two names with
    options of their own can stand side by side.

    A call raises sparge.torch.Unsupported, a ValueError, in training mode, where a gradient is
    needed, and in models whose attention has what this one has not: a bias of positions, bounded
    scores, attention sinks as weights, returned attention weights."""
    taker = Taker(options, True, min_queries)

    @uncompiled
    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor,
                attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None,
                is_causal: bool | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        if query.shape[2] < min_queries:
            found: tuple[Tensor, None] = taker.leave(
                sdpa_attention_forward, (module, query, key, value, attention_mask),
                {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs},
                f"fewer than {min_queries} queries, as where tokens are generated one by one")
            return found
        _check(name, module, kwargs)
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        is_causal = bool(is_causal) and attention_mask is None
        if is_causal:  # an empty static cache has keys beyond the queries
            key, value = key[:, :, :query.shape[2]], value[:, :, :query.shape[2]]
        o = scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, is_causal, scale=scaling, enable_gqa=True,
            layer=getattr(module, "layer_idx", None), record=taker.record, **options)
        return o.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return taker.record


def _check(name: str, module: Any, kwargs: Any) -> None:
    """What a model asks for and SpargeAttn has not."""
    kind = type(module).__name__
    if module.training:
        raise Unsupported(f"{kind} is in training mode, and {name!r} has no backward pass: call "
                          "model.eval()")
    for key, what in FOREIGN.items():
        if kwargs.get(key) is not None:
            raise Unsupported(f"{kind} gives {key}, {what}, which {name!r} has not: use 'sdpa' or "
                              "'eager'")
    if kwargs.get("output_attentions"):
        raise Unsupported(f"output_attentions is True, and {name!r} keeps no weights: use 'eager'")
