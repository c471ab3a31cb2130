# SPDX-License-Identifier: Apache-2.0
"""The oracle beside numpy, and intermediates beside `sparge run --intermediates`."""
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sparge
from safetensors.numpy import load_file
from sparge import BlockMask, Reason
from sparge._inspect import STAGES
from sparge._sparge import ffi

CAPTURE = (Path(__file__).resolve().parents[2] /
           "experiments/capture/smollm2-135m/layer12_group1.safetensors")
BLOCK = (16, 24)


def draw(q_len, k_len, heads=(4, 2), dim=16, dim_v=5):
    """q, k and v, of channels by which 1/sqrt(dim) is exact in float32."""
    rng = np.random.default_rng(1000 * q_len + k_len)
    return [rng.standard_normal(shape, np.float32) for shape in
            ((heads[0], q_len, dim), (heads[1], k_len, dim), (heads[1], k_len, dim_v))]


def textbook(q, k, v, pairs, scale=None):
    """o, lse and the probabilities, in double precision."""
    group = len(q) // len(k)
    q, k, v = (x.astype(np.float64) for x in (q, k.repeat(group, 0), v.repeat(group, 0)))
    scores = np.where(pairs, q @ k.swapaxes(1, 2) * (scale or q.shape[-1]**-0.5), -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(scores).sum(-1))
    p = np.exp(scores - np.where(np.isinf(lse), 0, lse)[..., None])
    return p @ v, lse, p


def close(x, want):
    """Equal up to what a sum of 200 doubles rounds."""
    return x.dtype == np.float64 and np.allclose(x, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("is_causal, offset", [(False, 201), ("end", None), ("start", 0)])
def test_the_oracle_is_the_textbook(is_causal, offset):
    for q_len, k_len in ((0, 0), (0, 9), (9, 0), (1, 1), (70, 90), (90, 70), (13, 200), (200, 13)):
        qkv = draw(q_len, k_len)
        row, column = np.ogrid[:q_len, :k_len]
        seen = column <= row + (k_len - q_len if offset is None else offset)
        pairs = np.random.default_rng(0).random((4, q_len, k_len)) < 0.5
        mask = BlockMask.from_tokens(pairs, block=BLOCK, is_causal=is_causal)
        for given, shown in ((None, np.broadcast_to(seen, pairs.shape)), (mask, seen & pairs)):
            o, lse, mass = sparge.oracle(*qkv, mask=given, is_causal=is_causal, block=BLOCK,
                                         return_lse=True, return_block_mass=True)
            want, want_lse, p = textbook(*qkv, shown)
            assert close(o, want) and close(lse, want_lse), (q_len, k_len)
            rows = [x.mean(1) for x in np.split(p, range(16, q_len, 16), 1)] if q_len else []
            for i, x in enumerate(rows):
                part = np.add.reduceat(x, np.arange(0, k_len, 24), 1) if k_len else x
                assert close(mass[:, i], part)


def test_what_the_oracle_returns():
    q, k, v = draw(20, 30)
    o = sparge.oracle(q, k, v)
    assert isinstance(o, np.ndarray) and o.shape == (4, 20, 5)
    assert close(sparge.oracle(q, k, v, softmax_scale=0.5), textbook(q, k, v, True, 0.5)[0])
    batched = sparge.oracle(q[None], k[None], v[None], return_lse=True)
    assert [x.shape for x in batched] == [(1, 4, 20, 5), (1, 4, 20)]
    turned = (x.swapaxes(0, 1) for x in (q, k, v))
    assert np.array_equal(sparge.oracle(*turned, layout="NHD"), o)
    o, mass = sparge.oracle(q, k, v, return_block_mass=True)
    assert mass.shape == (4, 1, 1) and np.allclose(mass, 1)


def test_the_codes_are_those_of_intermediates():
    q, k, v = draw(100, 200)
    found = sparge.intermediates(q, k, v, smooth_k=False)
    q_scale, k_scale, v_scale = (found[f"{n}_scale"].astype(np.float64) for n in "qkv")
    q, k, v = (found[f"{n}_int"] * scale.repeat(size, 1)[:, :found[f"{n}_int"].shape[1]]
               for n, scale, size in (("q", q_scale[..., None], 128), ("k", k_scale[..., None], 64),
                                      ("v", v_scale, 64)))
    want, want_lse, _ = textbook(q, k, v, True)
    o, lse = sparge.oracle(*draw(100, 200), codes=True, smooth_k=False, return_lse=True)
    assert close(o, want) and close(lse, want_lse)
    real = sparge.oracle(*draw(100, 200))
    assert abs(real - o).max() > 1e-4
    floats = {"qk_dtype": "f32", "pv_dtype": "f32", "smooth_k": False}
    assert np.array_equal(sparge.oracle(*draw(100, 200), codes=True, **floats), real)


# ---- Intermediates ----------------------------------------------------------------------------


def test_the_stages_are_those_of_the_library():
    fields = {name for name, _ in ffi.typeof("sparge_intermediates").fields}
    assert {name.lower() for name in STAGES} == fields | {"blocks", "mask", "o"}
    reasons = {name: n for n, name in ffi.typeof("sparge_reason").elements.items()}
    assert {"SPARGE_KEPT_" + r.name: r.value for r in Reason} == reasons


@pytest.mark.parametrize("options, words", [
    ({"is_causal": "end"}, ["--causal"]),
    ({"is_causal": "start", "tau": 0.9, "theta": -1.0, "block": (64, 32), "sink": True},
     ["--causal=start", "--tau", "0.9", "--theta", "-1", "--block-q", "64", "--block-k", "32",
      "--sink"]),
    ({"smooth_k": False, "qk_dtype": "f32", "pv_dtype": "int12"},
     ["--no-smooth-k", "--qk-dtype", "f32", "--pv-dtype", "int12"]),
    ({"qk_dtype": "int12", "pv_dtype": "fastest", "backend": "ref"},
     ["--qk-dtype", "int12", "--pv-dtype", "fastest", "--backend", "ref"]),
    ({"topk": 0.3, "v": None}, ["--topk", "0.3", "--mask-only"]),
    ({"min_mass": 0.5, "cell": 8, "theta": -1.0, "is_causal": "end", "sink": True},
     ["--min-mass", "0.5", "--cell", "8", "--theta", "-1", "--causal", "--sink"]),
])
def test_intermediates_are_the_programs(tmp_path, program, options, words):
    content = load_file(CAPTURE)
    q, k, v = (np.ascontiguousarray(content[n][:, :, 800:1500]) for n in "qkv")
    for name, x in zip("qkv", (q, k, v)):
        np.save(tmp_path / f"{name}.npy", x)
    subprocess.run([program, "run", "q.npy", "k.npy", "v.npy", *words, "--intermediates", "i"],
                   cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    found = sparge.intermediates(q, k, **{"v": v, **options})
    assert set(found) == {path.stem for path in (tmp_path / "i").iterdir()}
    for name, x in found.items():
        want = np.load(tmp_path / f"i/{name}.npy")
        assert (x.dtype, x.shape) == (want.dtype, want.shape), name
        assert x.tobytes() == want.tobytes(), name


def test_intermediates_over_a_mask(tmp_path, program):
    q, k, v = draw(70, 90)
    mask = BlockMask.from_tokens(np.random.default_rng(0).random((4, 70, 90)) < 0.5, block=BLOCK)
    mask.save(tmp_path / "m.safetensors")
    for name, x in zip("qkv", (q, k, v)):
        np.save(tmp_path / f"{name}.npy", x[None])
    subprocess.run([program, "run", "q.npy", "k.npy", "v.npy", "--mask", "m.safetensors",
                    "--block-q", "16", "--block-k", "24", "--intermediates", "i"],
                   cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    found = sparge.intermediates(q, k, v, mask=mask)
    assert set(found) == {path.stem for path in (tmp_path / "i").iterdir()}
    assert "why" not in found and "k_mean" in found
    for name, x in found.items():
        assert x.tobytes() == np.load(tmp_path / f"i/{name}.npy").tobytes(), name


def test_what_intermediates_hold():
    q, k, v = draw(70, 90)
    options = {"tau": 0.5, "theta": -1, "block": BLOCK, "smooth_k": False}
    o, lse, mask = sparge.attention(q, k, v, return_lse=True, return_mask=True, **options)
    found = sparge.intermediates(q, k, v, **options)
    assert np.array_equal(found["o"], o) and np.array_equal(found["mask"], mask.blocks)
    assert np.array_equal(found["why"] > 0, mask.blocks)
    assert set(np.unique(found["why"])) <= {0, Reason.MASS}
    log2 = found["m"] + np.log2(found["l"])
    assert np.allclose(log2 * np.log(2), lse, rtol=1e-6, atol=1e-6)  # a few roundings of float32
    assert "k_mean" not in found and abs(found["q_int"]).max() == 127
    sink = sparge.intermediates(q, k, v, tau=0.1, theta=-1, block=BLOCK, sink=True)["why"]
    assert (sink[..., 0] & Reason.SINK).all() and not (sink[..., 1:] & Reason.SINK).any()
    assert Reason(3) == Reason.MASS | Reason.TOPK


def test_masses_of_cells():
    q, k, _ = draw(70, 90)
    found = sparge.intermediates(q, k, min_mass=1.0, cell=8, theta=-1, block=(16, 24))
    assert not {"q_pool", "k_pool"} & set(found) and {"q_sim", "k_sim"} <= set(found)
    s, why = found["S"], found["why"]
    assert np.array_equal(found["S_all"], s) and np.allclose(s.sum(-1), 1, atol=1e-6)
    assert np.array_equal(why, np.where(s > 1 / s.shape[-1], Reason.MIN_MASS, 0))


def test_intermediates_of_half_floats_and_the_fastest():
    q, k, v = (x.astype(np.float16) for x in draw(70, 90))
    found = sparge.intermediates(q, k, v, pv_dtype="fastest")
    o = sparge.attention(q, k, v, pv_dtype="fastest")
    assert o.dtype == np.float16 and found["o"].dtype == np.float32
    assert np.array_equal(found["o"], o) and "v_int" in found


def test_lengths_of_nothing():
    for q_len, k_len in ((0, 0), (0, 9), (9, 0)):
        found = sparge.intermediates(*draw(q_len, k_len))
        assert found["o"].shape == (4, q_len, 5) and not found["o"].any()
        assert found["k_int"].shape == (2, k_len, 16)


# ---- What is refused --------------------------------------------------------------------------


class OnGpu:
    """What a tensor of torch on a GPU shows."""

    device, dtype, requires_grad, shape = "cuda:0", "torch.float32", False, (2, 9, 8)
    data_ptr = new_empty = None


def test_refusals():
    q, k, v = draw(9, 9)
    with pytest.raises(ValueError, match="k is on cuda:0 and oracle.. runs on the CPU: give k.cpu"):
        sparge.oracle(q, OnGpu(), v)
    with pytest.raises(ValueError, match="q is on cuda:0 and intermediates.. runs on the CPU"):
        sparge.intermediates(OnGpu(), k)
    with pytest.raises(TypeError, match="v is None and a mask is given"):
        sparge.intermediates(q, k, mask=BlockMask.from_tokens(np.ones((4, 9, 9)) > 0))
    with pytest.raises(TypeError, match="mask is float64, it must be bool or uint8"):
        sparge.oracle(q, k, v, mask=np.ones((4, 1, 1)))
    with pytest.raises(TypeError, match="oracle.. has no argument 'code': did you mean 'codes'"):
        sparge.oracle(q, k, v, code=True)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        sparge.intermediates(q, k, v, backend="cuda")
