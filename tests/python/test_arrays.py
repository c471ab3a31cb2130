# SPDX-License-Identifier: Apache-2.0
"""Which arrays are read, as they lie, and which are refused; what comes back."""
import subprocess
import sys

import brute
import numpy as np
import pytest
import sparge


def shuffled(x):
    """The same values in other places: [axes in another order], with gaps, backwards."""
    batch, heads, tokens, dim = x.shape
    room = np.full((tokens * 2 + 3, batch + 1, heads, dim + 5), np.nan, x.dtype)
    view = room[2:2 + 2 * tokens:2, 1:, :, 4:4 + dim].transpose(1, 2, 0, 3)[:, ::-1, ::-1]
    view[:] = x
    assert np.array_equal(view, x) and not view.flags.c_contiguous
    return view


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("seed", range(4))
def test_strides_give_the_same_bits(seed, dtype):
    drawn = brute.draw(np.random.default_rng(seed), dtype)
    single = [x[..., :1].copy() for x in drawn]  # of one channel, whose stride says nothing
    for packed, moved in ((drawn, [shuffled(x) for x in drawn]),
                          (single, [np.asfortranarray(x) for x in single])):
        want, want_lse = sparge.attention(*packed, tau=0.7, return_lse=True)
        o, lse = sparge.attention(*moved, tau=0.7, return_lse=True)
        assert np.array_equal(o, want) and np.array_equal(lse, want_lse)
        assert np.array_equal(sparge.predict(*moved[:2]).blocks, sparge.predict(*packed[:2]).blocks)


def test_a_stride_of_0_is_a_repetition():
    q, k, v = brute.draw(np.random.default_rng(1), lengths=(60, 90), dims=(16, ))
    wide = [np.broadcast_to(x[:, :1], (x.shape[0], 4, *x.shape[2:])) for x in (q, k, v)]
    assert wide[1].strides[1] == 0
    assert np.array_equal(sparge.attention(*wide), sparge.attention(*(x.copy() for x in wide)))
    one = [np.broadcast_to(x[:, :, :1], x.shape) for x in (q, k, v)]
    assert np.array_equal(sparge.attention(*one), sparge.attention(*(x.copy() for x in one)))


def test_layouts():
    q, k, v = brute.draw(np.random.default_rng(2), lengths=(60, 90))
    want, lse = sparge.attention(q, k, v, return_lse=True)
    nhd = [x.transpose(0, 2, 1, 3) for x in (q, k, v)]
    for moved in (nhd, [x.copy() for x in nhd]):
        o, same_lse = sparge.attention(*moved, layout="NHD", return_lse=True)
        assert np.array_equal(o.transpose(0, 2, 1, 3), want) and o.flags.c_contiguous
        assert np.array_equal(lse, same_lse)
    for b in range(q.shape[0]):
        o, one = sparge.attention(q[b], k[b], v[b], return_lse=True)
        assert np.array_equal(o, want[b]) and np.array_equal(one, lse[b])
        mask = sparge.predict(q[b], k[b])
        assert mask.shape == sparge.predict(q, k).shape[1:]
        o = sparge.attention(*(x[b] for x in nhd), layout="NHD")
        assert np.array_equal(o.swapaxes(0, 1), want[b])


def test_bfloat16_is_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in brute.draw(np.random.default_rng(3)))
    o = sparge.attention(q, k, v)
    assert o.dtype == ml_dtypes.bfloat16
    wide = sparge.attention(*(x.astype(np.float32) for x in (q, k, v)))
    assert np.array_equal(o, wide.astype(ml_dtypes.bfloat16))


def test_each_has_a_dtype_of_its_own():
    q, k, v = brute.draw(np.random.default_rng(4))
    o = sparge.attention(q.astype(np.float16), k, v.astype(np.float16))
    assert o.dtype == np.float16
    wide = sparge.attention(q.astype(np.float16).astype(np.float32), k,
                            v.astype(np.float16).astype(np.float32))
    assert np.array_equal(o, wide.astype(np.float16))


@pytest.mark.parametrize("q_len, k_len", [(0, 5), (5, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("batch", [0, 1])
def test_nothing_is_attended(batch, q_len, k_len):
    q, k = np.ones((batch, 2, q_len, 8), np.float32), np.ones((batch, 1, k_len, 8), np.float32)
    o, lse, mask, stats = sparge.attention(q, k, k, return_lse=True, return_mask=True,
                                           return_stats=True)
    assert o.shape == q.shape and lse.shape == q.shape[:3]
    assert np.all(o == (k_len > 0)) and np.all(np.isinf(lse) == (k_len == 0))
    assert mask.shape == (batch, 2, min(1, q_len), min(1, k_len))
    assert stats.counts.qk_tokens == 2 * batch * q_len * k_len


class Exported:
    """What has __dlpack__ and nothing else."""

    def __init__(self, x, device=1):
        self.x, self.device = x, device

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device, 0


def test_dlpack():
    q, k, v = brute.draw(np.random.default_rng(5))
    o = sparge.attention(Exported(q), Exported(k), v)
    assert isinstance(o, np.ndarray) and np.array_equal(o, sparge.attention(q, k, v))
    with pytest.raises(ValueError, match=r"k is a Exported on another device \(DLPack's number 2"):
        sparge.attention(q, Exported(k, 2), v)


def test_arrays_that_are_read_only_or_mapped(tmp_path):
    q, k, v = brute.draw(np.random.default_rng(6))
    want = sparge.attention(q, k, v)
    np.save(tmp_path / "q.npy", q)
    mapped = np.load(tmp_path / "q.npy", mmap_mode="r")
    k.flags.writeable = False
    o = sparge.attention(mapped, k, v)
    assert np.array_equal(o, want) and type(o) is np.ndarray and o.flags.writeable


X = np.zeros((1, 2, 8, 4), np.float32)


@pytest.mark.parametrize("x, message", [
    (X.astype(np.float64), "k is float64, it must be float32, float16 or bfloat16"),
    (X.astype(np.int8), "k is int8, it must be float32, float16 or bfloat16"),
    (X.astype(object), "k is object, it must be float32, float16 or bfloat16"),
    (X.astype(np.complex64), "k is complex64, it must be float32, float16 or bfloat16"),
    (X.astype(">f4"), "k is >f4, of another byte order, it must be of this machine's: give "
     "k.astype('float32')"),
    (X.tolist(), "k is a list, it must be an array of numpy, a tensor of torch, or have "
     "__dlpack__"),
    (None, "k is a NoneType, it must be"),
    (X[0, 0, 0, 0], "k is a float32, it must be an array of numpy"),
    (np.array(1, np.float32), "k has the shape [], it must be [B, H, N, D] or [H, N, D]"),
    (X[0, 0], "k has the shape [8, 4], it must be [B, H, N, D] or [H, N, D]"),
    (X.swapaxes(2, 3).copy().swapaxes(2, 3), "k has the stride 8 in its last axis, it must be 1"),
    (X[..., ::-1], "k has the stride -1 in its last axis, it must be 1"),
    (np.ma.masked_array(X), "k is a masked array, whose mask would be ignored"),
    (np.zeros(X.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(X.shape), "k has elements that "
     "are not aligned"),
    (np.zeros(X.shape[:3], "f2, (4,)f4")["f1"], "k has elements that are not aligned"),
])
def test_what_is_no_such_array_is_said(x, message):
    with pytest.raises((TypeError, ValueError)) as error:
        sparge.attention(X, x, X)
    assert message in str(error.value)


WITHOUT = """
import sys
for name in ("ml_dtypes", "torch", "safetensors", "matplotlib"):
    sys.modules[name] = None
import numpy as np, sparge
x = np.ones((1, 3, 4), np.float16)
assert (sparge.attention(x, x, x) == x).all()
"""


def test_numpy_is_enough():
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], check=True)
