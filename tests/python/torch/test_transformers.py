# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="sparge" in tiny models of random weights, beside transformers' sdpa."""
import warnings

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

import sparge  # noqa: E402
from sparge.torch import Unsupported  # noqa: E402
from sparge.transformers import register  # noqa: E402

DENSE = {"method": "dense", "qk_dtype": "f32", "pv_dtype": "f32"}
CLOSE = 1e-4  # of logits that spread by about 2, in float32
TOKENS = 150  # more than a block


def model_of(attention, **config):
    """A Llama whose heads are wide awake, or another model."""
    kind = config.pop("kind", transformers.LlamaConfig)
    torch.manual_seed(1)
    small = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, head_dim=16,
                 max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return transformers.AutoModelForCausalLM.from_config(
        kind(**{**small, **config}), attn_implementation=attention).eval()


def tokens_of(samples=2, length=TOKENS):
    return torch.from_numpy(np.random.default_rng(1).integers(2, 300, (samples, length)))


@torch.no_grad()
def logits(attention, *args, keep=None, config=None, **inputs):
    model = model_of(attention, **(config or {}))
    found = model(*args, **inputs).logits
    return found if keep is None else found[keep]


def check(*args, keep=None, config=None, **inputs):
    """Dense attention in f32 gives sdpa's logits; keep: of which tokens."""
    record = register("sparge", **DENSE)
    ours, theirs = (logits(name, *args, keep=keep, config=config, **inputs)
                    for name in ("sparge", "sdpa"))
    assert theirs.std() > 0.5  # a model that says something
    assert (ours - theirs).abs().max() <= CLOSE
    return record


def test_dense_is_sdpa():
    record = check(tokens_of())
    assert [c.layer for c in record.calls] == [0, 1, 2]
    assert {(c.query, c.key) for c in record.calls} == {((2, 4, TOKENS, 16), (2, 2, TOKENS, 16))}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, slice(0, 40) if side == "left" else slice(TOKENS - 40, None)] = 0
    check(tokens_of(), attention_mask=mask, keep=mask.bool())


def test_padding_changes_no_bit_of_sparse_attention():
    record = register("sparge", theta=-1.0, tau=0.6, block=(32, 16))
    tokens = tokens_of()
    mask = torch.ones_like(tokens)
    mask[1, :40] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    both = logits("sparge", tokens, attention_mask=mask, position_ids=positions)
    alone = logits("sparge", tokens[1:, 40:])
    assert max(c.density for c in record.calls) < 0.9
    assert (both[1, 40:] - alone[0]).abs().max() <= CLOSE  # products of other sizes round otherwise


def test_sliding_window():
    config = dict(kind=transformers.MistralConfig, sliding_window=40)
    record = check(tokens_of(), config=config)
    assert all(c.density < 0.5 for c in record.calls)


def test_documents_in_one_row():
    positions = torch.cat([torch.arange(60), torch.arange(TOKENS - 60)])[None]
    check(tokens_of(1), position_ids=positions)


def test_tokens_after_a_cache():
    """A prompt in two pieces is the prompt."""
    record = register("sparge", **DENSE)
    tokens = tokens_of()
    with torch.no_grad():
        model = model_of("sparge")
        cache = model(tokens[:, :90], use_cache=True).past_key_values
        ours = model(tokens[:, 90:], past_key_values=cache).logits
    assert record.calls[-1].query[2] == TOKENS - 90 and record.calls[-1].key[2] == TOKENS
    assert (ours - logits("sdpa", tokens)[:, 90:]).abs().max() <= CLOSE


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_leaves_single_tokens_to_sdpa_and_says_so_once(cache):
    record = register("sparge", **DENSE)
    inputs = dict(max_new_tokens=5, do_sample=False, cache_implementation=cache,
                  disable_compile=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = model_of("sparge").generate(tokens_of(), **inputs)
    assert len([w for w in said if "sparge" in str(w.message)]) == 1
    assert torch.equal(ours, model_of("sdpa").generate(tokens_of(), **inputs))
    assert len(record.calls) == 3 and list(record.passed.values()) == [4 * 3]


def test_each_layer_has_its_thresholds():
    def head(layer, number):
        return {"layer": layer, "head": number, "dense": False, "theta": -1.0,
                "tau": (0.3, 0.6, 1.0)[layer], "topk": None, "lambda": None}

    document = {"sparge_params": 1, "model": None, "rules": "default", "qk_dtype": "int8",
                "pv_dtype": "int8", "block_q": 32, "block_k": 16, "skip_rows": 32, "causal": "end",
                "smooth_k": True, "sink": False, "softmax_scale": None,
                "heads": [head(layer, n) for layer in range(3) for n in range(4)]}
    params = sparge.Params(document)
    record = register("sparge", params=params)
    logits("sparge", tokens_of())
    density = [c.density for c in record.calls]
    assert density[0] < density[1] < density[2] == 1
    register("short", params=sparge.Params({**document, "heads": [head(0, n) for n in range(4)]}))
    with pytest.raises(LookupError, match="no thresholds for layer 1 head 0"):
        logits("short", tokens_of())


def test_training_and_gradients_are_refused():
    register("sparge", **DENSE)
    model = model_of("sparge")
    with pytest.raises(Unsupported, match=r"requires_grad is True.*torch.no_grad\(\)"):
        model(tokens_of())
    model.train()
    with torch.no_grad(), pytest.raises(Unsupported, match=r"training mode.*call model.eval\(\)"):
        model(tokens_of())


def test_what_a_model_adds_is_refused():
    register("sparge", **DENSE)
    config = dict(kind=transformers.Gemma2Config, attn_logit_softcapping=30.0)
    with pytest.raises(Unsupported, match="softcap, a bound of the scores"):
        logits("sparge", tokens_of(), config=config)


def test_names_stand_side_by_side():
    sparse = register("sparse", theta=-1.0, tau=0.5, block=(32, 16))
    dense = register("dense", **DENSE)
    assert not torch.equal(logits("sparse", tokens_of()), logits("dense", tokens_of()))
    assert sparse.calls[0].density < dense.calls[0].density == 1
    with pytest.raises(TypeError, match="no argument 'tua'"):
        register(tua=0.5)
