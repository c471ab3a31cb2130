# SPDX-License-Identifier: Apache-2.0
"""attention, attend and predict beside the textbook in float64, and beside the program."""
import subprocess
import sys
from pathlib import Path

import brute
import numpy as np
import pytest
import sparge
from safetensors.numpy import load_file

CAPTURE = (Path(__file__).resolve().parents[2] /
           "experiments/capture/smollm2-135m/layer12_group1.safetensors")
DENSE = {"qk_dtype": "f32", "pv_dtype": "f32"}
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def assert_near(got, want, q, k, v, scale=None):
    """got, in the dtype of q, is want but for what float32 and that dtype round."""
    assert got.dtype == q.dtype and got.shape == want.shape
    limit = brute.bound(q, k, v, scale) + ROUNDING[q.dtype.name] * np.abs(want)
    assert np.all(np.abs(got.astype(np.float64) - want) <= limit)


# ---- Beside the textbook ----


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dense_f32_is_the_textbook(seed, dtype):
    pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(seed)
    q, k, v = brute.draw(rng, np.dtype(dtype))
    is_causal = [False, "end", "start"][seed % 3]
    scale = None if seed % 2 else 0.3
    o, lse = sparge.attend(q, k, v, None, is_causal=is_causal, softmax_scale=scale, return_lse=True,
                           **DENSE)
    keep = brute.visible(is_causal, q.shape[2], k.shape[2])
    want, want_lse = brute.attention(q, k, v, keep, scale)
    assert_near(o, want, q, k, v, scale)
    assert lse.dtype == np.float32 and np.array_equal(np.isinf(lse), np.isinf(want_lse))
    some = ~np.isinf(want_lse)
    limit = brute.bound(q, k, np.ones(1), scale) + 2.0**-22 * np.abs(want_lse[some])
    assert np.all(np.abs(lse[some] - want_lse[some]) <= limit)


@pytest.mark.parametrize("seed", range(20))
def test_a_mask_is_obeyed(seed):
    rng = np.random.default_rng(seed)
    q, k, v = brute.draw(rng)
    block = int(rng.integers(1, 40)), int(rng.integers(1, 40))
    is_causal = [False, "end", "start"][seed % 3]
    grid = [-(-x.shape[2] // b) for x, b in zip((q, k), block)]
    blocks = rng.random((*q.shape[:2], *grid)) < 0.5
    tokens = np.repeat(np.repeat(blocks, block[0], 2), block[1], 3)[:, :, :q.shape[2], :k.shape[2]]
    want, _ = brute.attention(q, k, v, tokens & brute.visible(is_causal, q.shape[2], k.shape[2]))
    options = dict(block=block, is_causal=is_causal, **DENSE)
    o = sparge.attend(q, k, v, blocks, **options)
    assert_near(o, want, q, k, v)
    as_bytes = sparge.attend(q, k, v, blocks.astype(np.uint8), **options)
    assert np.array_equal(as_bytes, o)


@pytest.mark.parametrize("seed", range(10))
def test_a_predicted_mask_gives_the_bits_of_attention(seed):
    rng = np.random.default_rng(seed)
    q, k, v = brute.draw(rng)
    options = dict(block=(32, 16), is_causal=[False, "end", "start"][seed % 3], lambda_=-3.0)
    o, lse, mask, stats = sparge.attention(q, k, v, tau=0.5, theta=-1.0, return_lse=True,
                                           return_mask=True, return_stats=True, **options)
    predicted = sparge.predict(q, k, tau=0.5, theta=-1.0, **options)
    assert np.array_equal(predicted.blocks, mask.blocks)
    del options["block"], options["is_causal"]  # they are the mask's
    again, again_lse = sparge.attend(q, k, v, mask, return_lse=True, **options)
    assert np.array_equal(o, again) and np.array_equal(lse, again_lse)
    assert stats.counts.qk_tokens == mask.counts.qk_tokens
    assert stats.counts.pv_tokens <= stats.counts.qk_tokens


def test_int8_is_exact_but_for_the_weights():
    """q, k and v are whole numbers up to 127 in every block, so that their codes are themselves.
    A weight is rounded to 1/127 of the row's largest in its block: by at most half of that. The sum
    of weights and o add the same rounded ones. A score in float32 adds less than 1e-5."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.integers(-127, 128, (1, 2, 160, 32)).astype(np.float32) for _ in range(3))
    for x in (q, k, v):
        x[:, :, ::32] = 127
    options = dict(smooth_k=False, block=(32, 32), softmax_scale=1e-4)
    o, lse = sparge.attend(q, k, v, None, return_lse=True, **options)
    want, want_lse = brute.attention(q, k, v, True, 1e-4)
    most = np.einsum("bhqd,bhkd->bhqk", q, k).max(-1) * 1e-4
    total, rounded = np.exp(want_lse - most), np.exp(lse - most)  # the largest weight is 1
    half = 0.5 / 127
    assert np.all(np.abs(rounded - total) <= k.shape[2] * half + 1e-5 * total)
    apart = np.abs(v[:, :, None] - want[:, :, :, None]).sum(3)
    assert np.all(np.abs(o - want) <= half * apart / rounded[..., None] + 1e-5 * 127)
    assert not np.array_equal(o, sparge.attend(q, k, v, None, **options, **DENSE))


def test_thresholds_of_each_head():
    q, k, v = brute.draw(np.random.default_rng(5), lengths=(200, 200), dims=(32, ))
    heads = q.shape[1]
    tau = np.linspace(0.2, 0.9, heads)
    many = sparge.predict(q, k, tau=tau, theta=-1, block=(16, 16)).blocks
    for h in range(heads):
        one = sparge.predict(q, k, tau=float(tau[h]), theta=-1, block=(16, 16)).blocks
        assert np.array_equal(many[:, h], one[:, h])
    assert many[:, 0].sum() < many[:, -1].sum()


def test_topk_stands_by_itself():
    q, k, _ = brute.draw(np.random.default_rng(6), lengths=(200, 200), dims=(32, ))
    options = dict(theta=-1, block=(20, 20), topk=0.3)
    alone = sparge.predict(q, k, **options).blocks
    assert np.all(alone.sum(-1) == 3)
    assert sparge.predict(q, k, tau=1.0, **options).blocks.all()


def test_min_mass_stands_by_itself():
    q, k, _ = brute.draw(np.random.default_rng(6), lengths=(200, 200), dims=(32, ))
    options = dict(theta=-1, block=(20, 20))
    alone = sparge.predict(q, k, min_mass=1.0, **options).blocks
    assert 0.05 < alone.mean() < 0.9 and not alone.all(-1).any()  # not all are above the mean
    assert sparge.predict(q, k, min_mass=1.0, tau=1.0, **options).blocks.all()
    cells = sparge.predict(q, k, min_mass=1.0, cell=5, **options).blocks
    assert not np.array_equal(cells, alone) and not cells.all(-1).any()
    usual = sparge.predict(q, k, **options).blocks
    assert np.array_equal(sparge.predict(q, k, min_mass=0, **options).blocks, usual)
    each = np.linspace(0.5, 2.0, q.shape[1])
    many = sparge.predict(q, k, min_mass=each, cell=5, **options).blocks
    for h, x in enumerate(each):
        one = sparge.predict(q, k, min_mass=x, cell=5, **options).blocks
        assert np.array_equal(many[:, h], one[:, h])


@pytest.mark.parametrize("options, said", [
    ({"min_mass": -0.1}, "min_mass is -0.1"), ({"min_mass": np.nan}, "min_mass is nan"),
    ({"min_mass": np.inf}, "min_mass is inf"), ({"min_mass": "much"}, "min_mass is 'much'"),
    ({"min_mass": [0.5, 0]}, r"tau, topk and min_mass are all off in per_head\[1\]"),
    ({"cell": -1}, "cell is -1"), ({"cell": 8.5}, "cell is 8.5, it must be a whole number"),
    ({"cell": 5}, "cell is 5, it must divide block_q, 128, and block_k, 64"),
    ({"cell": 1, "block": (128, 128)}, "at least 1/64 of block_k"),
])
def test_masses_and_cells_that_are_none(options, said):
    q, k, v = np.random.default_rng(8).standard_normal((3, 2, 40, 16), np.float32)
    with pytest.raises(ValueError, match=said):
        sparge.attention(q, k, v, **options)


def test_a_bias_is_added_and_hides():
    rng = np.random.default_rng(7)
    q, k, v = brute.draw(rng, lengths=(50, 90))
    bias = rng.standard_normal(k.shape[:3]).astype(np.float32)
    bias[..., :3] = -np.inf
    want, _ = brute.attention(q, k, v, True, k_bias=bias)
    assert_near(sparge.attend(q, k, v, None, k_bias=bias, **DENSE), want, q, k, v)
    strided = np.repeat(bias, 2, -1)[..., ::2]
    assert_near(sparge.attend(q, k, v, None, k_bias=strided, **DENSE), want, q, k, v)
    one = sparge.attend(q[0], k[0], v[0], None, k_bias=bias[0], **DENSE)
    assert_near(one, want[0], q[0], k[0], v[0])


def test_is_causal_true_is_for_squares():
    q, k, v = (np.random.default_rng(8).standard_normal((3, 2, 40, 16)).astype(np.float32))
    same = [sparge.attention(q, k, v, is_causal=word) for word in (True, "end", "start", np.True_)]
    assert all(np.array_equal(same[0], x) for x in same)
    for true in (True, np.True_):
        with pytest.raises(ValueError, match="is_causal is True with 40 queries and 39 keys"):
            sparge.attention(q, k[:, :39], v[:, :39], is_causal=true)


# ---- Bits that must not differ ----


def test_threads_and_instruction_sets_give_the_same_bits():
    q, k, v = brute.draw(np.random.default_rng(9), lengths=(200, 200), dims=(64, ))
    want = sparge.attention(q, k, v, tau=0.5, threads=1)
    for threads in (2, 3, 0):
        assert np.array_equal(sparge.attention(q, k, v, tau=0.5, threads=threads), want)
    for isa, here in sparge.info()["isa"].items():
        if here:
            assert np.array_equal(sparge.attention(q, k, v, tau=0.5, isa=isa), want)
    assert np.array_equal(sparge.attention(q, k, v, tau=0.5, backend="ref"), want)


def test_the_bits_of_the_program(program, tmp_path):
    o, lse, mask = (tmp_path / name for name in ("o.npy", "lse.npy", "mask.npy"))
    subprocess.run([program, "run", CAPTURE, "-o", o, "--lse-out", lse, "--mask-out", mask, "--tau",
                    "0.9"], check=True, stdout=subprocess.DEVNULL)
    found = sparge.attention(*map(load_file(CAPTURE).get, "qkv"), is_causal=True, tau=0.9,
                             softmax_scale=0.125, return_lse=True, return_mask=True)
    for got, path in zip((found[0], found[1], found[2].blocks), (o, lse, mask)):
        want = np.load(path)
        assert got.astype(want.dtype).tobytes() == want.tobytes() and got.shape == want.shape
    assert found[0].dtype == np.float16


# ---- Memory ----

LARGE = """
import resource, numpy as np, sparge
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few = np.ones((1, 1, 64), np.float32)
sparge.attention(few, few, few)
q = np.zeros((1 << 18, 16, 64), np.float32).transpose(1, 0, 2)  # pages that nobody wrote
before = peak()
o, stats = sparge.attention(q, few, few[..., :1], return_stats=True)
assert q.nbytes == 1 << 30 and not (o != 1).any()
print(peak() - before - o.nbytes - stats.workspace_bytes)
"""


def test_a_gigabyte_is_not_copied():
    """Beside o, and what the backend says that it works in, there is room for small things."""
    run = subprocess.run([sys.executable, "-c", LARGE], check=True, capture_output=True, text=True)
    assert int(run.stdout) < 64 << 20


# ---- Errors ----

X = np.zeros((2, 40, 16), np.float32)
MASK = sparge.predict(X, X, is_causal=True)


@pytest.mark.parametrize("options, message", [
    ({"tau": 2}, "tau is 2, it must be in [0, 1]"),
    ({"tau": [0.5] * 3}, "tau has the shape [3], it must be a number or one for each of 2 heads"),
    ({"tua": 0.5}, "attention() has no argument 'tua': did you mean 'tau'?"),
    ({"is_causal": "left"}, "is_causal is 'left', it must be one of 'none', 'end', 'start'"),
    ({"qk_dtype": "int4"}, "qk_dtype is 'int4', it must be one of 'f32', "),
    ({"backend": "gpu"}, "backend is 'gpu', it must be one of 'auto', 'ref', 'cpu', 'cuda'"),
    ({"backend": "cuda"}, "q is on cpu and backend is 'cuda': cuda is for tensors on a GPU"),
    ({"block": 64}, "block is 64, it must be two numbers"),
    ({"block": (0, 64)}, "block_q is 0, it must be in [1, 1024]"),
    ({"block": (64.5, 64)}, "block is 64.5, it must be a whole number"),
    ({"threads": -1}, "threads is -1"),
    ({"threads": 2**40}, "threads is 1099511627776, it must be below 2^31"),
    ({"threads": None}, "threads is None, it must be a whole number"),
    ({"tau": "much"}, "tau is 'much', it must be a number or one for each of 2 heads"),
    ({"tau": np.nan}, "tau is nan, it must be in [0, 1]"),
    ({"smooth_k": "no"}, "smooth_k is 'no', it must be True or False"),
    ({"softmax_scale": "auto"}, "softmax_scale is 'auto', it must be a number"),
    ({"softmax_scale": np.inf}, "softmax_scale is inf"),
    ({"qk_dtype": np.float32}, "qk_dtype is <class 'numpy.float32'>, it must be one of 'f32', "),
    ({"softmax_scale": 1e-300}, "softmax_scale is 1e-300, it must be above 0"),
    ({"softmax_scale": "1"}, "softmax_scale is '1', it must be a number"),
    ({"softmax_scale": 10**400}, "softmax_scale is 1000"),
    ({"lambda_": "-5"}, "lambda_ is '-5', it must be a number or one for each of 2 heads"),
    ({"tau": [0.5, None]}, "tau is [0.5, None], it must be a number or one for each of 2 heads"),
    ({"tau": np.array([0.5j, 1])}, "tau is array([0.+0.5j, 1.+0.j ]), it must be a number or"),
    ({"layout": np.zeros(2)}, "layout is array([0., 0.]), it must be 'HND' or 'NHD'"),
    ({"softmax_scale": 0}, "softmax_scale is 0.0, it must be above 0, or None for 1/sqrt(D)"),
    ({"layout": "hnd"}, "layout is 'hnd', it must be 'HND' or 'NHD'"),
    ({"k_bias": np.zeros((2, 40))}, "k_bias is float64, it must be float32"),
    ({"k_bias": np.zeros(40, np.float32)}, "k_bias has the shape [40], it must be [2, 40]"),
    ({"k_bias": [0.0] * 40}, "k_bias is a list, it must be an array of numpy"),
])
def test_what_is_wrong_with_options_is_said(options, message):
    with pytest.raises((ValueError, TypeError)) as error:
        sparge.attention(X, X, X, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("call, message", [
    (lambda: sparge.attention(X[None], X, X), "k has 3 axes and q has 4, they must have as many"),
    (lambda: sparge.attention(X, X[:, :, :8], X), "k is [B, H, N, D] = [1, 2, 40, 8]: 8 must be "
     "16, the channels of q"),
    (lambda: sparge.predict(X, X[:, :, :8]), "k is [B, H, N, D] = [1, 2, 40, 8]: 8 must be 16, the "
     "channels of q"),
    (lambda: sparge.intermediates(X, X[:, :, :8]), "8 must be 16, the channels of q"),
    (lambda: sparge.attention(X, X, None), "v is a NoneType, it must be an array of numpy"),
    (lambda: sparge.attend(X, X, None, None), "v is a NoneType, it must be an array of numpy"),
    (lambda: sparge.attention(X, X, X[:, :8]), "v is [B, H, N, D] = [1, 2, 8, 16]: 8 must be 40, "
     "the tokens of k"),
    (lambda: sparge.attention(X, X, X[:1]), "v is [B, H, N, D] = [1, 1, 40, 16]: 1 must be 2, the "
     "heads of k"),
    (lambda: sparge.attention(X[:1], X, X), "heads is 1, it must be a multiple of kv_heads, 2"),
    (lambda: sparge.attention(*[np.zeros((1, 4, 300), np.float32)] * 3), "dim is 300, it must be "
     "at most 256"),
    (lambda: sparge.attend(X, X, X, np.ones((2, 2, 1), bool)), "mask is [B, H, i, j] = "
     "[1, 2, 2, 1], it must be [1, 2, 1, 1]: 40 queries and 40 keys in blocks of 128 and 64"),
    (lambda: sparge.attend(X, X, X, np.ones((2, 1, 1), int)), "mask is int64, it must be bool or "
     "uint8"),
    (lambda: sparge.attend(X, X, X, MASK, is_causal=False), "is_causal is False and that of mask "
     "is 'end'"),
    (lambda: sparge.attend(X, X, X, MASK, block=(64, 64)), "block is (64, 64) and that of mask is "
     "(128, 64)"),
    (lambda: sparge.attend(X[:, :39], X, X, MASK), "mask is of [B, H, Nq, Nk] = [1, 2, 40, 40], q "
     "and k are of [1, 2, 39, 40]"),
])
def test_what_does_not_fit_is_said(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert message in str(error.value)


def test_a_causal_mask_brings_its_causality():
    want = sparge.attend(X, X, X, MASK, is_causal=True)
    assert np.array_equal(sparge.attend(X, X, X, MASK), want)


def test_the_defaults_are_those_of_the_library():
    from sparge._native import ffi, lib
    from sparge._options import prepare
    want = ffi.new("sparge_options *")
    lib.sparge_options_init(want, ffi.sizeof("sparge_options"), lib.SPARGE_VERSION_NUMBER,
                            lib.SPARGE_RULES_DEFAULT)
    got = prepare(X, X, X, {})[1].c
    for name, field in ffi.typeof("sparge_options").fields:
        if name not in ("progress", "user") and field.type.kind in ("primitive", "enum", "pointer"):
            assert getattr(got, name) == getattr(want, name), name
    for struct in ("thresholds", "cuda"):
        ours, theirs = (bytes(ffi.buffer(ffi.addressof(c, struct))) for c in (got, want))
        assert ours == theirs


def test_options_are_shown_and_no_other_name_is_taken():
    """help() shows every option, and no other name is taken."""
    assert "is_causal" in str(sparge.attention.__signature__)
    assert "method" not in str(sparge.attend.__signature__)
    with pytest.raises(TypeError, match=r"attend\(\) has no argument 'density'"):
        sparge.attend(X, X, X, None, density=0.5)
