# SPDX-License-Identifier: Apache-2.0
"""Token orders, and rows moved by them."""
import json
import subprocess

import brute
import numpy as np
import pytest
import sparge


@pytest.mark.parametrize("order", ["row", "column", "time", "random", "hilbert"])
@pytest.mark.parametrize("grid", [(3, 4, 5), sparge.Grid(2, 3, 2, text_before=4, text_after=1),
                                  (0, 4, 4), (1, 1, 1, 0, 7)])
def test_an_order_is_a_permutation_that_keeps_text(order, grid):
    index = sparge.token_order(order, grid, seed=3)
    grid = sparge.Grid(*grid)
    assert index.dtype == np.int64 and np.array_equal(np.sort(index), np.arange(grid.tokens))
    text = np.r_[:grid.text_before, grid.tokens - grid.text_after:grid.tokens]
    assert np.array_equal(index[text], text)


def test_orders_by_the_textbook():
    number = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    assert np.array_equal(sparge.token_order("row", (3, 4, 5)), number.ravel())
    assert np.array_equal(sparge.token_order("column", (3, 4, 5)), number.swapaxes(1, 2).ravel())
    assert np.array_equal(sparge.token_order("time", (3, 4, 5)), number.transpose(1, 2, 0).ravel())
    t, h, w = np.unravel_index(sparge.token_order("hilbert", (4, 4, 4)), (4, 4, 4))
    assert np.all(sum(np.abs(np.diff(x)) for x in (t, h, w)) == 1)


def test_the_seed_is_of_random_alone():
    orders = {(order, seed): sparge.token_order(order, (2, 8, 8), seed).tolist()
              for order in ("random", "hilbert") for seed in (0, 1, 2**64 - 1)}
    assert len({str(orders["random", seed]) for seed in (0, 1, 2**64 - 1)}) == 3
    assert len({str(orders["hilbert", seed]) for seed in (0, 1, 2**64 - 1)}) == 1


def test_the_order_of_the_program(program, tmp_path):
    subprocess.run([program, "order", "3", "5", "7", "--text-before", "2", "--order", "random",
                    "--seed", "9", "-o", tmp_path / "index.npy"], check=True,
                   stdout=subprocess.DEVNULL)
    index = sparge.token_order("random", (3, 5, 7, 2, 0), seed=9)
    assert np.array_equal(index, np.load(tmp_path / "index.npy"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_moved_and_back(dtype):
    pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 40, 5)).astype(np.dtype(dtype))
    index = rng.permutation(40)
    moved = sparge.permute(x, index)
    assert moved.dtype == x.dtype and np.array_equal(moved, x[:, :, index])
    assert np.array_equal(sparge.unpermute(moved, index), x)
    assert np.array_equal(sparge.permute(x[0], index), moved[0])
    nhd = sparge.permute(x.transpose(0, 2, 1, 3), index.astype(np.uint8), layout="NHD")
    assert np.array_equal(nhd, moved.transpose(0, 2, 1, 3))


def test_attention_in_another_order_is_the_same():
    """Dense in float32: the sums over keys come in another order, and nothing else differs."""
    q, k, v = (np.random.default_rng(n).standard_normal((2, 60, 16)).astype(np.float32)
               for n in range(3))
    options = dict(qk_dtype="f32", pv_dtype="f32")
    want = sparge.attend(q, k, v, None, **options)
    index = sparge.token_order("hilbert", (3, 4, 5))
    o = sparge.attend(*(sparge.permute(x, index) for x in (q, k, v)), None, **options)
    apart = np.abs(sparge.unpermute(o, index) - want).max()
    assert apart <= 2 * brute.bound(q[None], k[None], v[None])  # each of the two is so near


X = np.zeros((1, 4, 2), np.float32)


@pytest.mark.parametrize("call, message", [
    (lambda: sparge.token_order("zigzag", (1, 2, 3)), "order is 'zigzag', it must be one of 'row'"),
    (lambda: sparge.token_order("row", (1, 2)), "grid is (1, 2), it must be whole numbers (t, "),
    (lambda: sparge.token_order("row", (1, 2, 2.5)), "grid is (1, 2, 2.5), it must be whole"),
    (lambda: sparge.token_order("row", 7), "grid is 7, it must be whole numbers"),
    (lambda: sparge.token_order("row", (1, -2, 3)), "grid->h is -2, which is too small"),
    (lambda: sparge.token_order("row", (1, 2, 3), seed=-1), "seed is -1, it must be in [0, 2^64 -"),
    (lambda: sparge.token_order("row", (1, 2, 3), seed=0.5), "seed is 0.5, it must be in [0, 2^64"),
    (lambda: sparge.token_order(["row"], (1, 2, 3)), "order is ['row'], it must be one of 'row'"),
    (lambda: sparge.permute(X, [[0], 1, 2, 3]), "index is a list that numpy cannot read"),
    (lambda: sparge.permute(X, [0, 1, 2]), "index has the shape [3], it must be [4], the "
     "tokens of x"),
    (lambda: sparge.permute(X, [0, 1, 2, 2]), "index[3] is 2, as an earlier entry is"),
    (lambda: sparge.unpermute(X, [0, 1, 2, 4]), "index[3] is 4, outside 0 .. len-1"),
    (lambda: sparge.permute(X, [0., 1., 2., 3.]), "index is float64, it must be whole numbers"),
    (lambda: sparge.permute(X.astype(int), [0]), "x is int64, it must be float32, "),
])
def test_what_is_wrong_is_said(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert message in str(error.value)


def test_grids_beyond_all_arrays():
    for grid in ((2**40, 2**40, 1), (2**62, 1, 1)):
        with pytest.raises(MemoryError, match=f"grid is .{grid[0]}, .* no memory for the order of"):
            sparge.token_order("row", grid)


def test_info_is_that_of_the_program(program):
    told = json.loads(subprocess.run([program, "info", "--json"], check=True, capture_output=True,
                                     text=True).stdout)
    info = sparge.info()
    told["backends"]["cuda"]["built"] = info["backends"]["cuda"]["built"]  # the wheel has none
    for key in ("version", "cores", "isa", "bf16", "backends"):
        assert info[key] == told[key]
    assert 1 <= info["threads"] and all("omp" in path for path in info["openmp"])
