# SPDX-License-Identifier: Apache-2.0
"""sparge.torch beside torch's own attention: shapes, masks, what is refused, and standing in its
place."""
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sparge
import sparge.torch
from sparge.torch import Unsupported, replace_sdpa, scaled_dot_product_attention

DENSE = {"method": "dense", "qk_dtype": "f32", "pv_dtype": "f32"}
CLOSE = 2e-6  # of values near 1 in float32, summed in another order
torchs = F.scaled_dot_product_attention


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def three(shape, keys=None, kv_heads=None, dim_v=None, dtype=torch.float32):
    """query, key and value of these axes."""
    *lead, heads, queries, dim = shape
    kv = (*lead, kv_heads or heads, keys or queries)
    return (draw(*shape, dtype=dtype), draw(*kv, dim, seed=1, dtype=dtype),
            draw(*kv, dim_v or dim, seed=2, dtype=dtype))


def check(query, key, value, *args, want=None, close=CLOSE, **kwargs):
    """Dense attention in f32 is torch's."""
    o = scaled_dot_product_attention(query, key, value, *args, **kwargs, **DENSE)
    want = torchs(query, key, value, *args, **kwargs) if want is None else want
    assert o.shape == want.shape and o.dtype == query.dtype
    assert (o - want).abs().max() <= close if o.numel() else True


# ---- As torch does ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(70, 16), (3, 70, 16), (2, 3, 70, 16), (2, 2, 3, 70, 16),
                                   (2, 1, 2, 3, 20, 8), (0, 3, 70, 16), (2, 3, 0, 16)])
def test_any_leading_axes(shape):
    check(*(draw(*shape, seed=n) for n in range(3)))


@pytest.mark.parametrize("queries, keys", [(200, 200), (70, 200), (200, 70), (1, 200), (130, 1)])
def test_causal_is_aligned_at_the_start(queries, keys):
    check(*three((2, 3, queries, 16), keys), is_causal=True)


def test_channels_of_v_and_scale():
    check(*three((1, 2, 150, 16), dim_v=24), scale=0.4)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_heads(kv_heads):
    check(*three((2, 6, 100, 16), kv_heads=kv_heads), is_causal=True, enable_gqa=True)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="heads"):
        scaled_dot_product_attention(*three((1, 6, 10, 16), kv_heads=4), enable_gqa=True)
    with pytest.raises(RuntimeError):  # torch's own words for axes that cannot be broadcast
        scaled_dot_product_attention(*three((1, 6, 10, 16), kv_heads=2))


@pytest.mark.parametrize("of_q, of_k, of_v", [((2, 3), (1, 3), (2, 3)), ((1, 1), (4, 3), (4, 3)),
                                              ((2, 3), (2, 1), (2, 1)), ((3, ), (2, 1), (2, 3))])
def test_axes_of_1_are_broadcast(of_q, of_k, of_v):
    q, k, v = (draw(*lead, 50, 8, seed=n) for n, lead in enumerate((of_q, of_k, of_v)))
    lead = torch.broadcast_shapes(of_q, of_k, of_v)
    check(q, k, v, want=torchs(*(x.expand(*lead, 50, 8) for x in (q, k, v))))


def test_strides():
    x = draw(2, 90, 3, 5, 16)  # as models split one projection
    q, k, v = (x[:, :, n].transpose(1, 2) for n in range(3))
    check(q, k, v)
    check(*(draw(2, 3, 16, 60, seed=n).transpose(2, 3) for n in range(3)))


@pytest.mark.parametrize("dtype, close", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_dtypes(dtype, close):
    """One unit in the last place of values below 2."""
    q, k, v = three((2, 3, 100, 16), dtype=dtype)
    check(q, k, v, is_causal=True, close=close,
          want=torchs(q.float(), k.float(), v.float(), is_causal=True).to(dtype))


def test_autocast_casts():
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_dot_product_attention(*three((1, 2, 64, 16))).dtype == torch.bfloat16


def test_options_are_those_of_attention():
    q, k, v = three((2, 4, 300, 32), kv_heads=2)
    options = {"theta": 0.1, "tau": 0.5, "lambda_": -4.0, "block": (64, 32)}
    o = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, **options)
    assert torch.equal(o, sparge.attention(q, k, v, is_causal="end", **options))
    with pytest.raises(TypeError, match="no argument 'thetta': did you mean 'theta'"):
        scaled_dot_product_attention(q, k, v, thetta=0.1)
    with pytest.raises(TypeError, match="softmax_scale"):
        scaled_dot_product_attention(q, k, v, softmax_scale=0.1)


# ---- Masks ------------------------------------------------------------------------------------

MASKS = {
    "random": lambda q, k: draw(q, k, seed=3) > 0,
    "by head": lambda q, k: draw(3, q, k, seed=3) > 0,
    "by sample": lambda q, k: draw(2, 1, q, k, seed=3) > 0,
    "of all": lambda q, k: draw(2, 3, q, k, seed=3) > -0.5,
    "all shown": lambda q, k: torch.ones(q, k, dtype=torch.bool),
    "all hidden": lambda q, k: torch.zeros(q, k, dtype=torch.bool),
    "keys": lambda q, k: draw(2, 1, 1, k, seed=3) > 0,
    "queries": lambda q, k: (draw(2, 1, q, 1, seed=3) > 0).expand(2, 1, q, k),
    "causal": lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(),
    "causal at the end": lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q),
    "window": lambda q, k: torch.ones(q, k, dtype=torch.bool).tril().triu(-40),
    "padding": lambda q, k: (torch.ones(q, k, dtype=torch.bool).tril()
                             & (torch.arange(k) >= torch.tensor([0, 33])[:, None])[:, None, None]),
}


@pytest.mark.parametrize("lengths", [(150, 150), (70, 150), (150, 70)])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_pairs(name, lengths):
    q, k, v = three((2, 3, lengths[0], 16), lengths[1])
    shown = MASKS[name](*lengths)
    check(q, k, v, shown)
    number = torch.zeros(shown.shape).masked_fill(~shown, -torch.inf)
    check(q, k, v, number, want=torchs(q, k, v, shown))
    for least in torch.finfo(torch.float32).min, -1e4:
        check(q, k, v, number.clamp(min=least), want=torchs(q, k, v, shown))


@pytest.mark.parametrize("shape", [(1, 100), (2, 1, 1, 100), (2, 2, 1, 100)])
def test_a_bias_of_keys(shape):
    q, k, v = three((2, 2, 80, 16), 100)
    bias = draw(*shape, seed=3)
    check(q, k, v, bias)
    bias[..., 3] = -torch.inf
    check(q, k, v, bias.expand(*shape[:-2], 80, 100), want=torchs(q, k, v, bias))


def test_other_masks_are_refused():
    q, k, v = three((1, 2, 80, 16))
    with pytest.raises(Unsupported, match="attn_mask has numbers other than 0 and -inf"):
        scaled_dot_product_attention(q, k, v, draw(80, 80))
    with pytest.raises(ValueError, match=r"attn_mask has the shape \[80, 79\].*\[1, 2, 80, 80\]"):
        scaled_dot_product_attention(q, k, v, torch.ones(80, 79, dtype=torch.bool))
    with pytest.raises(ValueError, match="attn_mask is torch.int64, it must be bool or float"):
        scaled_dot_product_attention(q, k, v, torch.ones(80, 80, dtype=torch.int64))
    with pytest.raises(ValueError, match="is_causal is True and attn_mask is given"):
        scaled_dot_product_attention(q, k, v, torch.ones(80, 80, dtype=torch.bool), is_causal=True)


SPARSE = {"theta": -1.0, "tau": 0.5, "block": (32, 16)}


def test_a_causal_mask_is_causality():
    """The same bits: the prediction knows of it."""
    q, k, v = three((2, 3, 200, 16))
    shown = torch.ones(200, 200, dtype=torch.bool).tril()
    assert torch.equal(scaled_dot_product_attention(q, k, v, shown, **SPARSE),
                       scaled_dot_product_attention(q, k, v, is_causal=True, **SPARSE))


def test_padding_changes_nothing():
    """The same bits as of the samples by themselves."""
    q, k, v = three((2, 3, 200, 16))
    o = scaled_dot_product_attention(q, k, v, MASKS["padding"](200, 200), **SPARSE)
    for n, first in enumerate((0, 33)):
        alone = (x[n, :, first:] for x in (q, k, v))
        want = scaled_dot_product_attention(*alone, is_causal=True, **SPARSE)
        assert torch.equal(o[n, :, first:], want)
    assert not o[1, :, :33].any()


def test_padding_by_numbers_is_padding():
    """-1e4, which many models add to hide a key: it takes part in no prediction."""
    q, k, v = three((2, 2, 100, 16))
    shown = (torch.arange(100) < torch.tensor([40, 70])[:, None])[:, None, None]
    number = torch.zeros(shown.shape).masked_fill(~shown, -1e4)
    assert torch.equal(scaled_dot_product_attention(q, k, v, number, **SPARSE),
                       scaled_dot_product_attention(q, k, v, shown, **SPARSE))


def test_a_mask_takes_pairs_of_predicted_blocks_away():
    q, k, v = three((1, 2, 128, 16))
    shown = draw(128, 128, seed=3) > -1  # no block is hidden as a whole
    sparse = {**SPARSE, "qk_dtype": "f32", "pv_dtype": "f32"}
    o = scaled_dot_product_attention(q, k, v, shown, **sparse)
    blocks = torch.tensor(sparge.predict(q, k, **sparse).blocks)
    assert 0.2 < blocks.float().mean() < 0.9
    kept = blocks.repeat_interleave(32, 2).repeat_interleave(16, 3)
    assert (o - torchs(q, k, v, shown & kept)).abs().max() <= CLOSE


def test_rows_that_lose_a_predicted_block_keep_all_that_is_shown():
    q, k, v = three((1, 2, 128, 16))
    shown = torch.ones(128, 128, dtype=torch.bool)
    blocks = sparge.predict(q, k, **SPARSE).blocks
    block = np.flatnonzero(blocks[0, 0, 1])[0]  # a predicted one of the second row of blocks
    shown[32:64, 16 * block:16 * (block + 1)] = False
    o = scaled_dot_product_attention(q, k, v, shown, qk_dtype="f32", pv_dtype="f32", **SPARSE)
    want = torchs(q, k, v, shown)
    assert (o - want)[0, 0, 32:64].abs().max() <= CLOSE
    assert (o - want)[0, 0, 64:].abs().max() > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_every_query_keeps_keys_that_it_is_shown(seed):
    """Its weights, by values that name the keys: none of a hidden key, and 1 in all."""
    q, k, _ = three((2, 2, 100, 16), 64)
    shown = draw(2, 1, 100, 64, seed=seed) > (0.5, 1, 1.5, 2)[seed]
    weights = scaled_dot_product_attention(
        q, k, torch.eye(64).expand(2, 2, 64, 64), shown, qk_dtype="f32", pv_dtype="f32",
        **{**SPARSE, "block": (8, 32)})
    assert not weights[~shown.expand(weights.shape)].any()
    assert (weights.sum(3) - shown.any(3).float()).abs().max() <= CLOSE


def test_a_bias_that_hides_keys_hides_them_from_the_prediction():
    q, k, v = three((2, 2, 80, 16), 200)
    bias = draw(2, 1, 1, 200, seed=3).masked_fill(torch.arange(200) < 150, -torch.inf)
    o = scaled_dot_product_attention(q, k, v, bias, **SPARSE)
    want = scaled_dot_product_attention(q, k[:, :, 150:], v[:, :, 150:], bias[..., 150:], **SPARSE)
    assert torch.equal(o, want)


def test_an_empty_batch_with_a_mask():
    q, k, v = three((0, 2, 10, 16))
    for shape in (0, 1, 10, 10), (0, 2, 1, 10), (1, 1, 10, 10):
        shown = torch.ones(shape, dtype=torch.bool)
        assert scaled_dot_product_attention(q, k, v, shown).shape == q.shape


# ---- What is refused --------------------------------------------------------------------------


def test_gradients_are_refused():
    q, k, v = three((1, 2, 10, 16))
    k.requires_grad_()
    with pytest.raises(Unsupported, match="key.requires_grad is True, it must be False"):
        scaled_dot_product_attention(q, k, v)
    with replace_sdpa(), pytest.raises(Unsupported, match="key.requires_grad"):
        F.scaled_dot_product_attention(q, k, v)
    with torch.no_grad():
        assert not scaled_dot_product_attention(q, k, v).requires_grad


@pytest.mark.parametrize("change, error, words", [
    (dict(dropout_p=0.1), Unsupported, "dropout_p is 0.1, it must be 0"),
    (dict(query=draw(1, 2, 10, 16).double()), Unsupported, "query is torch.float64, it must be f"),
    (dict(key=draw(1, 2, 10, 16).half()), ValueError, "key is torch.float16 and query is torch.f"),
    (dict(value=draw(16)), ValueError, r"value has the shape \[16\]"),
    (dict(query=draw(1, 2, 10, 300), key=draw(1, 2, 10, 300)), Unsupported, "300 channels.*256"),
    (dict(query=draw(1, 2, 10, 16).to("meta")), ValueError, "key is on cpu and query is on meta"),
    (dict(query=draw(1, 2, 10, 8)), ValueError, "channels of q"),
    (dict(scale=-1.0), ValueError, "softmax_scale is -1.0"),
])
def test_refused_in_a_sentence(change, error, words):
    with pytest.raises(error, match=words):
        given = dict(zip(("query", "key", "value"), three((1, 2, 10, 16))))
        scaled_dot_product_attention(**{**given, **change})


# ---- In torch's place -------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Two layers of attention, after one of another size."""

    def forward(self, q, k, v):
        for n in range(2):
            q = F.scaled_dot_product_attention(q, k, v, is_causal=n == 1)
        return q


def test_in_place_and_back():
    q, k, v = three((1, 2, 100, 16))
    with replace_sdpa(**DENSE) as record:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(o, scaled_dot_product_attention(q, k, v, is_causal=True, **DENSE))
    assert F.scaled_dot_product_attention is torchs
    call, = record.calls
    assert call.query == call.key == (1, 2, 100, 16) and call.density == 1 and call.seconds > 0


def test_what_is_compiled_follows():
    q, k, v = three((1, 2, 100, 16))

    @torch.compile(backend="eager")
    def run(q):
        return F.scaled_dot_product_attention(2 * q, k, v) + 1

    with replace_sdpa(**DENSE) as record:
        o = run(q)
        assert torch.equal(o, scaled_dot_product_attention(2 * q, k, v, **DENSE) + 1)
    run(q)
    assert len(record.calls) == 1


def test_back_after_an_exception():
    with pytest.raises(ZeroDivisionError), replace_sdpa():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is torchs


def test_nested_and_interleaved():
    inputs = three((1, 2, 100, 16))
    outer, inner = replace_sdpa(), replace_sdpa()
    with outer as a:
        with replace_sdpa() as b:
            F.scaled_dot_product_attention(*inputs)
        F.scaled_dot_product_attention(*inputs)
    assert (len(a.calls), len(b.calls)) == (1, 1)
    outer = replace_sdpa()
    outer.__enter__(), inner.__enter__()
    outer.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is not torchs
    kept = F.scaled_dot_product_attention
    inner.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is torchs
    assert torch.equal(kept(*inputs), torchs(*inputs))


def test_two_models_at_once():
    one, other, inputs = Model(), Model(), three((1, 2, 100, 16))
    with replace_sdpa() as around, replace_sdpa(one) as a, replace_sdpa(other) as b:
        one(*inputs)
        other(*inputs)
        F.scaled_dot_product_attention(*inputs)
    assert [[c.layer for c in x.calls] for x in (around, a, b)] == [[None], [0, 1], [0, 1]]


def test_what_it_cannot_take_goes_to_torch_and_is_said_once():
    q, k, v = three((1, 2, 100, 16))
    bias = draw(100, 100)
    with replace_sdpa() as record, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(F.scaled_dot_product_attention(q, k, v, bias), torchs(q, k, v, bias))
            F.scaled_dot_product_attention(q[:, :, :1], k, v)
    assert [str(w.message).split(": ")[1][:20] for w in said] == ["attn_mask has number",
                                                                  "fewer than 2 queries"]
    assert not record.calls and list(record.passed.values()) == [3, 3]
    assert "3 calls to torch's own attention: fewer than 2 queries" in str(record)
    with replace_sdpa(strict=True), pytest.raises(Unsupported, match="attn_mask"):
        F.scaled_dot_product_attention(q, k, v, bias)


def test_wrong_options_are_no_reason_to_leave_it_to_torch():
    with replace_sdpa(theta=5), pytest.raises(ValueError, match="theta"):
        F.scaled_dot_product_attention(*three((1, 2, 100, 16)))
    with pytest.raises(TypeError, match="no argument 'tua'"):
        replace_sdpa(tua=0.9)
    with pytest.raises(ValueError, match="min_queries is 'x', it must be a whole number"):
        replace_sdpa(min_queries="x").__enter__()


def test_layers_of_a_model():
    model, inputs = Model(), three((1, 2, 100, 16))
    with replace_sdpa(model, tau=0.5) as record:
        model(*inputs)
        F.scaled_dot_product_attention(*inputs)  # is none of the model's
        model(*inputs)
    assert [c.layer for c in record.calls] == [0, 1, 0, 1]
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert [line.split()[:2] for line in str(record).splitlines()[1:]] == [["0", "2"], ["1", "2"]]


def test_an_exception_in_the_model_ends_its_run():
    model, inputs = Model(), three((1, 2, 100, 16))
    with replace_sdpa(model) as record:
        with pytest.raises(ValueError, match="tokens of k"):
            model(inputs[0], inputs[1], inputs[2][..., :-1, :])
        F.scaled_dot_product_attention(*inputs)
    assert not record.calls


def test_threads():
    model, inputs = Model(), three((1, 2, 200, 16))
    with replace_sdpa(model) as record:
        workers = [threading.Thread(target=model, args=inputs) for _ in range(4)]
        [w.start() for w in workers]
        [w.join() for w in workers]
    assert sorted(c.layer for c in record.calls) == [0] * 4 + [1] * 4
