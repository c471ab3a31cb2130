# SPDX-License-Identifier: Apache-2.0
"""Tensors of torch: read as they lie, given back, or refused in a sentence."""
import numpy as np
import pytest
import sparge
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(dtype=torch.float32, batch=2):
    torch.manual_seed(0)
    return [torch.randn(batch, heads, 70, 16).to(dtype) for heads in (4, 2, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_numpy(dtype):
    q, k, v = draw(dtype)
    o, lse = sparge.attention(q, k, v, tau=0.7, return_lse=True)
    assert o.dtype == dtype and o.shape == q.shape and lse.dtype == torch.float32
    arrays = [x.float().numpy() for x in (q, k, v)]  # the values, exactly
    want, want_lse = sparge.attention(*arrays, tau=0.7, return_lse=True)
    assert torch.equal(o, torch.from_numpy(want).to(dtype))
    assert torch.equal(lse, torch.from_numpy(want_lse))


def test_sdpa_is_near():
    """Dense in float32. Both round in float32 alone: 70 weights and 16 products of values below 5
    are worth some 100 units in the last place."""
    q, k, v = draw()
    for is_causal in (False, True):
        o = sparge.attend(q, k, v, None, is_causal=is_causal, qk_dtype="f32", pv_dtype="f32")
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal,
                                                                enable_gqa=True)
        assert (o - want).abs().max() <= 100 * 5 * 2.0**-24


def test_strides_give_the_same_bits():
    packed = draw()
    want = sparge.attention(*packed)
    for moved in ([x.transpose(1, 2).contiguous().transpose(1, 2) for x in packed],
                  [torch.cat([x, x], -1)[..., :16] for x in packed],
                  [torch.stack([x, -x], 3).flatten(2, 3)[:, :, ::2] for x in packed]):
        assert not any(x.is_contiguous() for x in moved)
        assert torch.equal(sparge.attention(*moved), want)
    nhd = sparge.attention(*(x.transpose(1, 2) for x in packed), layout="NHD")
    assert torch.equal(nhd.transpose(1, 2), want)
    one = [x[:1, :1].expand(3, 4, -1, -1) for x in packed]
    assert torch.equal(sparge.attention(*one), sparge.attention(*(x.contiguous() for x in one)))


def test_nothing_is_attended():
    q, k = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 0, 8)
    o, lse = sparge.attention(q, k, k, return_lse=True)
    assert not o.any() and torch.all(lse == -torch.inf)
    assert sparge.attention(q[:, :, :0], q, q).shape == (1, 2, 0, 8)


def test_gradients_are_refused_where_they_are_recorded():
    q, k, v = draw()
    want = sparge.attention(q, k, v)
    v.requires_grad_()
    message = r"v.requires_grad is True, it must be False: .* torch.no_grad\(\), or give v.detach"
    with pytest.raises(ValueError, match=message):
        sparge.attention(q, k, v)
    with torch.no_grad():
        assert torch.equal(sparge.attention(q, k, v), want)
    with torch.inference_mode():
        o = sparge.attention(q, k, v)
    assert torch.equal(o, want) and not o.requires_grad
    assert torch.equal(sparge.attention(q, k, v.detach()), want)
    frozen = torch.nn.Parameter(v.detach(), requires_grad=False)
    assert torch.equal(sparge.attention(q, k, frozen), want)


def test_kinds_may_differ():
    q, k, v = draw()
    want = sparge.attention(q, k, v)
    assert torch.equal(sparge.attention(q, k.numpy(), v), want)
    o = sparge.attention(q.numpy(), k, v.numpy())
    assert isinstance(o, np.ndarray) and np.array_equal(o, want.numpy())
    bias = torch.randn(k.shape[:3])
    assert torch.equal(sparge.attention(q, k, v, k_bias=bias),
                       sparge.attention(q, k, v, k_bias=bias.numpy()))
    blocks = torch.rand(2, 4, 5, 3) < 0.5
    assert torch.equal(sparge.attend(q, k, v, blocks, block=(16, 32)),
                       sparge.attend(q, k, v, blocks.numpy(), block=(16, 32)))


def test_thresholds_and_blocks_may_require_gradients():
    q, k, v = draw()
    tau, blocks = torch.rand(4, requires_grad=True), torch.ones(2, 4, 5, 3, dtype=torch.bfloat16)
    assert torch.equal(sparge.attention(q, k, v, tau=tau),
                       sparge.attention(q, k, v, tau=tau.detach().numpy()))
    for x, what in ((blocks, "Tensor"), (blocks.bool().to("meta"), "Tensor")):
        with pytest.raises(TypeError, match=f"mask is a {what} that numpy cannot read"):
            sparge.attend(q, k, v, x, block=(16, 32))


def test_orders():
    x, index = draw(torch.bfloat16)[0], torch.randperm(70)
    moved = sparge.permute(x, index)
    assert moved.dtype == x.dtype and torch.equal(moved, x[:, :, index])
    assert torch.equal(sparge.unpermute(moved, index), x)


def test_a_plan():
    q, k, v = draw()
    plan = sparge.plan(q, k, v, method="window:window=20", is_causal=True)
    o, lse = plan.run(return_lse=True)
    assert isinstance(o, torch.Tensor) and isinstance(lse, torch.Tensor)
    want = sparge.attention(*(x.numpy() for x in (q, k, v)), method="window:window=20",
                            is_causal=True)
    assert np.array_equal(o.numpy(), want)


class Named(torch.Tensor):
    """A subclass."""


def test_a_subclass_is_a_tensor():
    q, k, v = draw()
    assert torch.equal(sparge.attention(q.as_subclass(Named), k, v), sparge.attention(q, k, v))


X = torch.zeros(1, 2, 8, 4)


@pytest.mark.parametrize("x, message", [
    (X.double(), "k is float64, it must be float32, float16 or bfloat16"),
    (X.int(), "k is int32, it must be float32, float16 or bfloat16"),
    (torch.conj(X.cfloat()), "k is complex64, it must be float32, float16 or bfloat16"),
    (torch.conj(X.cfloat()).imag, "k.is_neg() is True: its memory has the other sign; give "
     "k.resolve_neg()"),
    (X.to_sparse(), "k is sparse_coo, it must be a strided tensor"),
    (torch.nested.nested_tensor([X[0], X[0]], layout=torch.jagged), "k is nested, it must be"),
    (X.to("meta"), "k is on meta, it must be on cpu or cuda"),
    (X.to(torch.float8_e4m3fn), "k is float8_e4m3fn, it must be float32, float16 or bfloat16"),
    (X[0, 0], "k has the shape [8, 4], it must be [B, H, N, D] or [H, N, D]"),
    (X.transpose(2, 3), "k has the stride 4 in its last axis, it must be 1"),
])
def test_what_is_no_such_tensor_is_said(x, message):
    with pytest.raises((TypeError, ValueError)) as error:
        sparge.attention(X, x, X)
    assert message in str(error.value)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_of_a_trace_are_refused():
    with FakeTensorMode(), pytest.raises(TypeError, match="k is a FakeTensor, which has no memory"):
        sparge.attention(X, torch.zeros(1, 2, 8, 4), X)


@pytest.mark.filterwarnings("ignore")  # that torch gives quantized tensors up
def test_quantized_tensors_are_refused():
    with pytest.raises(TypeError, match="k is qint8, it must be float32, float16 or bfloat16"):
        sparge.attention(X, torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), X)
