# SPDX-License-Identifier: Apache-2.0
"""The judge of other kernels: sound ones pass, each fault is found with its sentence, and all
numbers are those of `sparge check` on the same files."""
import json
import math
import subprocess

import ml_dtypes
import numpy as np
import pytest
import sparge
from sparge.testing import assert_kernel

H, G, N, D, DV = 4, 2, 200, 16, 8
BLOCK = (32, 16)
HOW = {"is_causal": "end", "block": BLOCK}
TYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64}


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(7)
    k = rng.standard_normal((G, N, D)) + rng.standard_normal(D)
    return [x.astype(np.float32) for x in (rng.standard_normal((H, N, D)), k,
                                           rng.standard_normal((G, N, DV)))]


@pytest.fixture(scope="module")
def mask():
    """Half of the blocks; of each row the first and those of the diagonal."""
    rng = np.random.default_rng(8)
    keep = rng.random((H, 7, 13)) < 0.5
    for i in range(7):
        keep[:, i, 2 * i:2 * i + 2] = True
    keep[..., 0] = True
    return keep


def tokens(mask, causal=True):
    """[H, N, N]: the pairs of tokens of a mask of blocks."""
    pairs = mask.repeat(BLOCK[0], -2).repeat(BLOCK[1], -1)[..., :N, :N]
    return pairs & np.tri(N, dtype=bool) if causal else pairs


def kernel(qkv, pairs, dtype="f32", scale=D**-0.5, kv_head=lambda h: h // (H // G)):
    """o and lse in f32, as people write them."""
    q, k, v = qkv
    o, lse = np.empty((H, N, DV), TYPES[dtype]), np.empty((H, N), np.float32)
    for h in range(H):
        s = np.where(pairs[h], q[h] @ k[kv_head(h)].T * np.float32(scale), -np.float32(np.inf))
        top = np.maximum(s.max(-1, keepdims=True), np.float32(-1e30))
        p = np.exp(s - top)
        total = p.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse[h] = (top + np.log(total))[:, 0]
        total[total == 0] = 1
        o[h] = p.astype(TYPES[dtype]).astype(np.float32) @ v[kv_head(h)] / total
    return o, lse


# ---- What is sound ----


@pytest.mark.parametrize("dtype", TYPES)
def test_sound_kernels_pass(qkv, mask, dtype):
    o, lse = kernel(qkv, tokens(mask), dtype)
    report = sparge.check(o, *qkv, mask=mask, lse=lse, **HOW)
    assert report.ok and not report.reasons and report.hint is None and report.type == dtype
    assert 0 < report.o.worst_row_l1 <= report.max_worst == 2 * report.baseline_worst_row_l1 + 1e-5
    assert str(report).startswith(f"ok: o {dtype} [1, 4, 200, 8] by attention over its mask")
    assert not report.bad_rows.size and "bad" not in str(report)
    assert_kernel(o, *qkv, mask=mask, lse=lse, **HOW)
    dense = kernel(qkv, tokens(np.ones_like(mask)), dtype)[0]
    assert sparge.check(dense, *qkv, is_causal=True).over == "dense"
    assert_kernel(dense, *qkv, is_causal=True)


def test_rounding_is_all_that_passes(qkv, mask):
    """What is right to f16 is wrong for f32."""
    o = kernel(qkv, tokens(mask), "f16")[0]
    report = sparge.check(o.astype(np.float32), *qkv, mask=mask, **HOW)
    assert not report.ok and report.hint is None and report.reasons[0].startswith("o: row (0, ")
    assert sparge.check(o.astype(np.float32), *qkv, mask=mask, max_worst=0.01, **HOW).ok


def test_the_bound(qkv, mask):
    """Of the right row times a number a little nearer to 1 than the bound, and a little further."""
    o, lse = sparge.oracle(*qkv, mask=mask, return_lse=True, **HOW)
    bounds = sparge.check(o, *qkv, mask=mask, lse=lse, **HOW)
    assert bounds.ok and bounds.o.worst_row_l1 == 0 == bounds.lse.worst
    for share, passes in ((0.99, True), (1.01, False)):
        for at_o, at_lse in ((bounds.max_worst, 0), (0, bounds.lse.max_worst)):
            off, off_lse = o.copy(), lse.copy()
            off[2, 50] *= 1 + share * at_o
            off_lse[1, 60] += share * at_lse
            report = sparge.check(off, *qkv, mask=mask, lse=off_lse, **HOW)
            assert report.ok == passes and len(report.bad_rows) == (not passes and at_o > 0)


def test_rows_without_a_key(qkv, mask):
    none = mask.copy()
    none[1, 3] = False
    o, lse = kernel(qkv, tokens(none))
    assert not o[1, 96:128].any() and (lse[1, 96:128] == -np.inf).all()
    assert_kernel(o, *qkv, mask=none, lse=lse, **HOW)
    o[1, 100] = np.nan
    report = sparge.check(o, *qkv, mask=none, lse=lse, **HOW)
    assert report.hint == "row (0, 1, 100) of o: it sees no key: o must be 0 there, and lse -inf"
    assert report.o.nonfinite_apart == DV and report.o.first_nan_apart == (0, 1, 100, 0)


def test_layouts_batches_and_masks(qkv, mask):
    """What is given in other ways is the same question."""
    o, lse = kernel(qkv, tokens(mask), "f16")
    want = sparge.check(o, *qkv, mask=mask, lse=lse, **HOW).to_dict()
    nhd = [np.ascontiguousarray(x.swapaxes(0, 1)) for x in (o, *qkv)]
    assert sparge.check(*nhd, mask=mask, lse=lse, layout="NHD", **HOW).to_dict() == want
    given = sparge.BlockMask.from_blocks(mask, N, N, block=BLOCK, is_causal="end")
    assert sparge.check(o, *qkv, mask=given, lse=lse).to_dict() == want
    two = [np.stack([x, x]) for x in (o, *qkv)]
    report = sparge.check(*two, mask=np.stack([mask, mask]), lse=np.stack([lse, lse]), **HOW)
    assert report.batch == 2 and [x.batch for x in report.per_head] == [0] * H + [1] * H
    assert report.to_dict()["worst_row_l1"] == want["worst_row_l1"]


def test_empty():
    nothing = np.zeros((H, 0, D), np.float32)
    assert_kernel(nothing, nothing, nothing, nothing)
    some = np.ones((H, 5, D), np.float32)
    assert_kernel(np.zeros_like(some), some, nothing, nothing)
    assert not sparge.check(some, some, nothing, nothing).ok


# ---- What is not ----


def causal_leak(qkv, mask):
    return kernel(qkv, tokens(mask, causal=False))[0]


def leak_of_one(qkv, mask):
    return kernel(qkv, tokens(mask, causal=False) & np.tri(N, k=1, dtype=bool))[0]


def sees_one_less(qkv, mask):
    return kernel(qkv, tokens(mask) & np.tri(N, k=-1, dtype=bool))[0]


def wrong_scale(qkv, mask):
    return kernel(qkv, tokens(mask), scale=1 / D)[0]


def other_scale(qkv, mask):
    return kernel(qkv, tokens(mask), scale=0.3123)[0]


def exp_for_exp2(qkv, mask):
    return kernel(qkv, tokens(mask), scale=D**-0.5 * math.log2(math.e))[0]


def missing_block(qkv, mask):
    less = mask.copy()
    less[2, 5, 0] = False
    return kernel(qkv, tokens(less))[0]


def extra_block(qkv, mask):
    more = mask.copy()
    more[2, 5, np.flatnonzero(~mask[2, 5])[0]] = True
    return kernel(qkv, tokens(more))[0]


def without_mask(qkv, mask):
    return kernel(qkv, tokens(np.ones_like(mask)))[0]


def modulo(qkv, mask):
    return kernel(qkv, tokens(mask), kv_head=lambda h: h % G)[0]


def transposed(qkv, mask):
    return kernel(qkv, tokens(mask))[0].swapaxes(0, 1).reshape(H, N, DV)


def not_divided(qkv, mask):
    o, lse = kernel(qkv, tokens(mask))
    return (o * np.exp(lse)[..., None]).astype(np.float32)


def not_written(qkv, mask):
    o = kernel(qkv, tokens(mask))[0]
    o[3, 192:] = 0
    return o


FAULTS = {
    causal_leak: "it fits attention that also sees later keys, up to",
    leak_of_one: "is the last: a causal leak",
    sees_one_less: "its causality starts too early",
    wrong_scale: "it fits a softmax_scale of 0.0625 (1/D), not 0.25",
    other_scale: "it fits a softmax_scale of 0.3123, not 0.25",
    exp_for_exp2: "times log2(e), as for exp2, but by exp",
    missing_block: "it fits attention without key block 0, to which it must attend",
    extra_block: "it fits attention that also sees key block",
    without_mask: "it fits attention to all visible keys: without the mask",
    modulo: "as of h % 2: query head h reads key head h // (H / G)",
    transposed: "should be: rows are in another place, as in another layout",
    not_divided: "the division by the sum of weights is missing",
    not_written: "it is 0, as if it had never been written",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_faults_are_found(qkv, mask, fault, dtype):
    o = fault(qkv, mask).astype(TYPES[dtype])
    report = sparge.check(o, *qkv, mask=mask, **HOW)
    assert not report.ok and len(report.reasons) == 1
    assert report.hint is not None and FAULTS[fault] in report.hint, report
    with pytest.raises(AssertionError, match="WRONG") as error:
        assert_kernel(o, *qkv, mask=mask, **HOW)
    assert report.hint in str(error.value) and error.value.report.to_dict() == report.to_dict()


def test_places(qkv, mask):
    """A block is wrong, and one element is worse."""
    o = missing_block(qkv, mask)
    o[1, 7, 3] += 100
    report = sparge.check(o, *qkv, mask=mask, **HOW)
    assert report.o.worst_row == (0, 1, 7) == tuple(report.bad_rows[0])
    assert {tuple(x) for x in report.bad_rows} <= {(0, 1, 7), *((0, 2, t) for t in range(160, 192))}
    assert report.bad_blocks.tolist() == [[0, 1, 0], [0, 2, 5]]
    assert [x.head for x in report.per_head if x.o.worst > report.max_worst] == [1, 2]
    assert "in 2 of 28 query blocks, 2 of 4 heads" in str(report)


def test_nan(qkv, mask):
    o = kernel(qkv, tokens(mask))[0]
    o[2, 9, 4] = np.nan
    report = sparge.check(o, *qkv, mask=mask, max_worst=1e9, **HOW)
    assert not report.ok and "the first is (0, 2, 9, 4)" in report.reasons[0]
    assert math.isnan(report.o.l1) and report.to_dict()["l1"] is None
    assert report.bad_rows.tolist() == [[0, 2, 9]]


def test_nan_of_a_hidden_key(qkv, mask):
    """0 times NaN: the padding of v is read."""
    q, k, v = qkv
    v = v.copy()
    v[:, 190:] = np.nan
    pairs = tokens(mask)
    right = kernel((q, k, np.nan_to_num(v)), pairs)[0]
    right[:, 190:] = np.nan
    sees = pairs[:, :, 190:].any(-1)
    right[~sees & (np.arange(N) >= 190)] = 0
    report = sparge.check(right, q, k, v, mask=mask, **HOW)
    assert report.ok and report.o.nan_got == report.o.nan_want == 10 * H * DV
    with np.errstate(invalid="ignore"):
        wrong = kernel((q, k, v), pairs)[0]
    report = sparge.check(wrong, q, k, v, mask=mask, **HOW)
    assert "key 190, which it must not see, is not finite: the kernel reads it" in report.hint


def test_lse(qkv, mask):
    o, lse = kernel(qkv, tokens(mask))
    q, k, _ = qkv
    smoothed = lse - D**-0.5 * np.einsum("hnd,hd->hn", q, k.mean(1).repeat(H // G, 0))
    for wrong, words in ((lse * math.log2(math.e), "it is in log2 units"),
                         (smoothed.astype(np.float32), "it is that of smoothed keys"),
                         (-lse, "its sign is wrong")):
        report = sparge.check(o, *qkv, mask=mask, lse=wrong, **HOW)
        assert not report.ok and report.reasons[0].startswith("lse: element (0, ")
        assert words in report.hint
    one = lse.copy()
    one[3, 17] += 1
    report = sparge.check(o, *qkv, mask=mask, lse=one, **HOW)
    assert report.lse.worst_at == (0, 3, 17) and abs(report.lse.worst - 1) < 1e-5
    one[3, 16] = np.inf
    report = sparge.check(o, *qkv, mask=mask, lse=one, **HOW)
    assert not report.ok and "the first is (0, 3, 16)" in report.reasons[0]


def test_lse_of_no_keys(qkv):
    q, k, v = (x[:, :n] for x, n in zip(qkv, (3, 0, 0)))
    report = sparge.check(np.zeros((H, 3, DV), np.float32), q, k, v, lse=np.zeros((H, 3)))
    assert report.hint.endswith("it sees no key: o must be 0 there, and lse -inf")


def test_mask_beside_the_predictors(qkv, mask):
    predicted = sparge.predict(*qkv[:2], theta=-1, tau=0.7, **HOW)
    other = predicted.blocks.copy()
    kept, open_ = np.argwhere(other), np.argwhere(~other & predicted.visible)
    other[tuple(kept[5])] = False
    for at in open_[2:4]:
        other[tuple(at)] = True
    report = sparge.check(qkv[0][..., :DV], *qkv, mask=other, theta=-1, tau=0.7, **HOW)
    m = report.mask
    assert (m.missing, m.first_missing) == (1, (0, *kept[5]))
    assert (m.extra, m.first_extra) == (2, (0, *open_[2]))
    assert m.predicted_kept_blocks == predicted.counts.qk_done == m.kept_blocks - 1
    assert [x.mask.missing for x in report.per_head] == [int(h == kept[5][0]) for h in range(H)]
    dense = sparge.check(qkv[0][..., :DV], *qkv, **HOW)
    assert dense.mask is None and dense.dense is None and "recall" not in str(dense)


def test_recall_of_a_mask(qkv):
    """By the formula: the weight of the kept keys, over all."""
    q, k = (x.astype(np.float64) for x in qkv[:2])
    keep = np.zeros((H, 7, 13), bool)
    keep[..., :2] = True
    report = sparge.check(qkv[0][..., :DV], *qkv, mask=keep, block=BLOCK)
    p = np.exp(np.einsum("hnd,hmd->hnm", q, k.repeat(H // G, 0)) * D**-0.5)
    share = p[..., :32].sum(-1) / p.sum(-1)
    assert report.mask.recall == pytest.approx(share.mean(), rel=1e-9)
    assert report.mask.worst_row_recall == pytest.approx(share.min(), rel=1e-9)
    assert report.per_head[2].mask.recall == pytest.approx(share[2].mean(), rel=1e-9)


def test_no_bound_follows(qkv, mask):
    """Values that cancel: an honest kernel in bf16 is itself wrong."""
    q, k, _ = qkv
    v = np.where(np.arange(N) % 2, 1, -1).astype(np.float32)[None, :, None].repeat(G, 0)
    report = sparge.check(np.zeros((H, N, 1), ml_dtypes.bfloat16), q, k, v)
    assert math.isnan(report.max_worst) and not report.ok
    assert report.reasons[0].startswith("o: an honest kernel is itself ")
    assert report.reasons[0].endswith("so no bound follows; give max_worst")


def test_refused(qkv, mask):
    o = kernel(qkv, tokens(mask))[0]
    for wrong, words in (
        ({"o": o[:, 1:]}, r"o has the shape \[4, 199, 8\], it must be \[4, 200, 8\]"),
        ({"o": o.astype(int)}, "o is int64, it must be float32, float16, bfloat16 or float64"),
        ({"o": "o.npy"}, "o is str, it must be float32"),
        ({"lse": o[0, :, 0]}, r"lse has the shape \[200\], it must be \[4, 200\]"),
        ({"mask": mask[:, 1:]}, "mask"),
        ({"lse": [0.0] * 200}, "lse is a list, it must be an array"),
        ({"max_worst": "1"}, "max_worst is '1', it must be a number"),
        ({"max_worst": -1}, "max_worst is -1, it must be at least 0"),
        ({"max_worst": math.nan}, "max_worst is nan, it must be at least 0"),
        ({"causal": True}, "has no argument 'causal': did you mean 'is_causal'"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            sparge.check(**{"o": o, **dict(zip("qkv", qkv)), "mask": mask, **HOW, **wrong})


# ---- The program ----


def alike(got, want, where=""):
    """JSON has nine digits."""
    if isinstance(want, dict):
        assert set(want) <= set(got), (where, set(want) - set(got))
        for name in want:
            alike(got[name], want[name], f"{where}.{name}")
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for n, (g, w) in enumerate(zip(got, want)):
            alike(g, w, f"{where}[{n}]")
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=6e-9), where
    else:
        assert got == want, where


@pytest.mark.parametrize("case", ["mask", "dense", "f16", "nan", "loose"])
def test_numbers_of_the_program(qkv, mask, case, program, tmp_path):
    q, k, v = (x.copy() for x in qkv)
    o, lse = kernel(qkv, tokens(mask), "f16" if case == "f16" else "f32")
    if case == "nan":
        v[0, 7, 3] = np.inf
        o[1, 100] = np.nan
    how, more = {"theta": 0.1, "tau": 0.8, "sink": True, **HOW}, {}
    args = ["--theta=0.1", "--tau=0.8", "--sink", "--causal=end", "--block-q=32", "--block-k=16"]
    if case != "dense":
        more["mask"] = mask
        np.save(tmp_path / "m.npy", mask[None])
        args += ["--mask", "m.npy"]
    if case == "loose":
        more["max_worst"], args = 0.25, [*args, "--max-worst", "0.25"]
    for name, x in {"q": q, "k": k, "v": v, "o": o, "l": lse}.items():
        np.save(tmp_path / f"{name}.npy", x[None])
    done = subprocess.run([program, "check", "q.npy", "k.npy", "v.npy", "--o", "o.npy", "--lse",
                           "l.npy", *args], cwd=tmp_path, capture_output=True, text=True)
    want = json.loads(done.stdout)
    for name in ("manifest", "params", "method"):  # of files
        assert want.pop(name) is None
    report = sparge.check(o, q, k, v, lse=lse, **more, **how)
    alike(report.to_dict(), want)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert done.returncode == (0 if report.ok else 1), done.stderr
