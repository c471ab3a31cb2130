# SPDX-License-Identifier: Apache-2.0
"""BlockMask beside numpy: blocks, pairs of tokens, causality, counts, and the program's files."""
import copy
import json
import os
import pickle
import subprocess

import numpy as np
import pytest
import sparge
from safetensors.numpy import load_file, save_file
from sparge import BlockMask

BLOCK = (16, 24)  # of keys not a multiple of 32, so that no block but the first begins a word
CAUSAL = (False, "end", "start")


def visible(q_len, k_len, is_causal):
    """Which pairs causality does not hide, by the words of sparge_options.h."""
    q, k = np.ogrid[:q_len, :k_len]
    return k <= q + {False: k_len, "end": k_len - q_len, "start": 0}[is_causal]


def blocks_of(pairs, block):
    """[.., i, j, block_q, block_k], filled up with False."""
    *heads, q_len, k_len = pairs.shape
    grid = [-(-n // size) for n, size in zip((q_len, k_len), block)]
    full = np.zeros((*heads, grid[0] * block[0], grid[1] * block[1]), bool)
    full[..., :q_len, :k_len] = pairs
    return full.reshape(*heads, grid[0], block[0], grid[1], block[1]).swapaxes(-3, -2)


def draw(seed, q_len, k_len, heads=(2, )):
    """Pairs of which some blocks are empty, some whole and some neither."""
    rng = np.random.default_rng(seed)
    grid = blocks_of(np.zeros((*heads, q_len, k_len), bool), BLOCK)
    share = rng.choice([0, 0.3, 1], grid.shape[:-2])
    full = (rng.random(grid.shape) < share[..., None, None]).swapaxes(-3, -2)
    full = full.reshape(*heads, grid.shape[-4] * BLOCK[0], grid.shape[-3] * BLOCK[1])
    return full[..., :q_len, :k_len]


# ---- Blocks and tokens ------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_pairs_of_every_length_to_200(is_causal):
    for q_len in range(201):
        k_len = (7 * q_len + 3) % 201
        pairs = draw(q_len, q_len, k_len)
        seen = visible(q_len, k_len, is_causal)
        mask = BlockMask.from_tokens(pairs, block=BLOCK, is_causal=is_causal)
        want = blocks_of(pairs & seen, BLOCK)
        left = blocks_of(seen & ~pairs, BLOCK).any((-1, -2))
        assert mask.shape == want.shape[:3] and (mask.q_len, mask.k_len) == (q_len, k_len)
        assert np.array_equal(mask.to_tokens(), pairs & seen), q_len
        assert np.array_equal(mask.blocks, want.any((-1, -2))), q_len
        assert np.array_equal(mask.visible, blocks_of(seen, BLOCK).any((-1, -2))), q_len
        assert mask.partial == (left & mask.blocks).sum(), q_len


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_whole_blocks_of_every_length_to_200(is_causal):
    for k_len in range(201):
        q_len = (5 * k_len + 1) % 201
        seen = visible(q_len, k_len, is_causal)
        grid = blocks_of(seen, BLOCK)
        blocks = np.random.default_rng(k_len).random((3, *grid.shape[:2])) < 0.5
        mask = BlockMask.from_blocks(blocks, q_len, k_len, block=BLOCK, is_causal=is_causal)
        spread = np.repeat(np.repeat(blocks, BLOCK[0], 1), BLOCK[1], 2)[:, :q_len, :k_len]
        assert np.array_equal(mask.to_tokens(), spread & seen), k_len
        assert np.array_equal(mask.blocks, blocks & grid.any((-1, -2))), k_len
        assert mask.partial == 0


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_counts(is_causal):
    pairs = draw(1, 150, 190, (2, 3))
    mask = BlockMask.from_tokens(pairs, block=BLOCK, is_causal=is_causal)
    seen = visible(150, 190, is_causal)
    attended, tile = blocks_of(pairs & seen, BLOCK), blocks_of(seen, BLOCK)
    for n, head in enumerate(mask.head_counts):
        kept = attended.any((-1, -2))[n // 3, n % 3]
        assert (head.pairs, head.qk_done, head.pv_done) == (
            tile.any((-1, -2)).sum(), kept.sum(), kept.sum())
        assert (head.tokens, head.tile_tokens) == (seen.sum(), tile[kept].sum())
        assert head.qk_tokens == head.pv_tokens == (pairs & seen)[n // 3, n % 3].sum()
    assert mask.counts.qk_tokens == (pairs & seen).sum() and len(mask.head_counts) == 6
    assert mask.density == pytest.approx((pairs & seen).sum() / (6 * seen.sum()), rel=1e-15)
    assert mask.density_blocks == pytest.approx(mask.blocks.sum() / (6 * mask.visible.sum()),
                                                rel=1e-15)


def test_convert_keeps_the_pairs():
    for n in range(0, 201, 9):
        pairs = draw(n, n, 200 - n)
        mask = BlockMask.from_tokens(pairs, block=BLOCK, is_causal="end")
        other = mask.convert((40, 7))
        assert (other.block, other.is_causal) == ((40, 7), "end")
        assert other == BlockMask.from_tokens(pairs, block=(40, 7), is_causal="end")
        assert other.convert(BLOCK) == mask


def test_expand():
    one = BlockMask.from_tokens(draw(1, 70, 90, (1, 1)), block=BLOCK)
    many = one.expand(3, 2)
    assert one.partial and many.shape == (2, 3, *one.shape[2:])
    assert (many.to_tokens() == one.to_tokens()).all() and many.partial == 6 * one.partial
    heads = BlockMask.from_tokens(draw(2, 70, 90, (2, )), block=BLOCK)
    assert heads.expand(2) == heads and heads.expand(2).shape == heads.shape
    both = heads.expand(2, 3).to_tokens()
    assert both.shape == (3, 2, 70, 90) and (both == heads.to_tokens()).all()
    with pytest.raises(ValueError, match="heads is 4 and the mask has 2: only 1 can be expanded"):
        heads.expand(4)


def test_axes_and_kinds():
    blocks = np.random.default_rng(0).random((5, 4)) < 0.5
    masks = [BlockMask.from_blocks(x, 70, 90, block=BLOCK)
             for x in (blocks, blocks[None], blocks[None, None], blocks.astype(np.uint8) * 3,
                       np.asfortranarray(blocks))]
    assert [m.shape for m in masks] == [(1, 5, 4), (1, 5, 4), (1, 1, 5, 4), (1, 5, 4), (1, 5, 4)]
    assert all(m == masks[0] for m in masks)
    pairs = draw(0, 70, 90)
    turned = np.ascontiguousarray(pairs.swapaxes(1, 2)).swapaxes(1, 2)
    assert BlockMask.from_tokens(turned, block=BLOCK) == BlockMask.from_tokens(pairs, block=BLOCK)


def test_it_is_an_array():
    mask = BlockMask.from_blocks(np.eye(5, 4, dtype=bool), 70, 90, block=BLOCK)
    assert np.asarray(mask).dtype == bool and np.asarray(mask, np.uint8).sum() == 4
    np.asarray(mask)[:] = True  # a copy
    assert mask.blocks.sum() == 4
    with pytest.raises(ValueError, match="read-only"):
        mask.blocks[0, 0, 0] = False


def test_repr():
    mask = BlockMask.from_tokens(draw(1, 70, 90), block=BLOCK, is_causal="end")
    assert repr(mask) == ("BlockMask([2, 5, 4] of 70 x 90 tokens in blocks of 16 x 24, is_causal="
                          f"'end', density {mask.density:.4f}, {mask.partial} in part)")
    assert "not causal" in repr(BlockMask.from_blocks(np.ones((1, 1)) > 0, 3, 3))


# ---- Two masks --------------------------------------------------------------------------------


def test_equality():
    pairs = draw(3, 64, 64)
    mask = BlockMask.from_tokens(pairs, block=BLOCK, is_causal=True)
    assert mask == BlockMask.from_tokens(pairs[None], block=BLOCK, is_causal="start")
    assert mask.is_causal == "end"
    one = pairs.copy()
    q, k = np.argwhere(pairs[1] & visible(64, 64, "end"))[20]
    one[1, q, k] = False
    for other in (BlockMask.from_tokens(one, block=BLOCK, is_causal=True),
                  BlockMask.from_tokens(pairs & visible(64, 64, "end"), block=BLOCK),
                  BlockMask.from_tokens(pairs, block=(16, 32), is_causal=True), "mask"):
        assert mask != other


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_and_or(is_causal):
    a, b = draw(4, 70, 90), draw(5, 70, 90)
    one, two = (BlockMask.from_tokens(x, block=BLOCK, is_causal=is_causal) for x in (a, b))
    assert one & two == BlockMask.from_tokens(a & b, block=BLOCK, is_causal=is_causal)
    assert one | two == BlockMask.from_tokens(a | b, block=BLOCK, is_causal=is_causal)
    with pytest.raises(ValueError, match="must have the same sizes"):
        one & two.convert((8, 8))
    with pytest.raises(TypeError, match="unsupported operand"):
        one & 1


@pytest.mark.parametrize("is_causal", [False, "end"])
def test_copies_and_pickles(is_causal):
    mask = BlockMask.from_tokens(draw(6, 70, 90)[None], block=BLOCK, is_causal=is_causal)
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert other == mask and other.partial == mask.partial > 0
        assert other.shape == mask.shape and other.is_causal == is_causal
    del mask
    assert other.to_tokens().any()


# ---- Masks in calls ---------------------------------------------------------------------------


def test_attention_over_a_mask():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 8), np.float32) for n in (70, 90, 90))
    pairs = draw(6, 70, 90) & visible(70, 90, "end")
    mask = BlockMask.from_tokens(pairs, block=BLOCK, is_causal="end")
    scores = np.where(pairs, q.astype(float) @ k.swapaxes(1, 2) / 8**0.5, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), -1e9)
    p = np.exp(scores - top)
    want = p @ v / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    o = sparge.attend(q, k, v, mask, qk_dtype="f32", pv_dtype="f32")
    assert abs(o - want).max() < 1e-5  # sums of 90 terms in float32


def test_what_a_call_refuses():
    q = np.zeros((2, 70, 8), np.float32)
    mask = BlockMask.from_blocks(np.ones((2, 5, 3)) > 0, 70, 70, block=BLOCK, is_causal=True)
    for options, words in (({"block": (16, 32)}, "block is .16, 32. and that of mask is .16, 24."),
                           ({"is_causal": False}, "is_causal is False and that of mask is 'end'")):
        with pytest.raises(ValueError, match=words):
            sparge.attend(q, q, q, mask, **options)
    sparge.attend(q, q, q, mask, is_causal="start", block=BLOCK)  # the same, of a square
    with pytest.raises(ValueError, match=r"\[1, 2, 70, 70\], q and k are of \[1, 2, 69, 69\]"):
        sparge.attend(q[:, :69], q[:, :69], q[:, :69], mask)
    with pytest.raises(ValueError, match="expand.. gives one head to many"):
        sparge.attend(q, q, q, BlockMask.from_tokens(np.ones((70, 70)) > 0))


@pytest.mark.parametrize("make, error, words", [
    (lambda: BlockMask.from_blocks(np.ones((5, 4)), 70, 90), TypeError,
     "blocks is float64, it must be bool or uint8"),
    (lambda: BlockMask.from_blocks(np.ones(4, bool), 70, 90), ValueError,
     r"blocks has the shape \[4\], it must be \[B, H, i, j\]"),
    (lambda: BlockMask.from_blocks(np.ones((1, 2), bool), 70, 90, block=BLOCK), ValueError,
     r"\[1, 1, 1, 2\], it must be \[1, 1, 5, 4\]: 70 queries and 90 keys in blocks of 16 and 24"),
    (lambda: BlockMask.from_blocks(np.ones((1, 2), bool), 70.5, 90), ValueError,
     "q_len is 70.5, it must be a whole number"),
    (lambda: BlockMask.from_blocks(np.ones((1, 2), bool), 70, 90, block=(2048, 64)), ValueError,
     r"block_q is 2048, it must be in \[1, 1024\]"),
    (lambda: BlockMask.from_blocks(np.ones((1, 2), bool), 70, 90, is_causal=True), ValueError,
     "is_causal is True with 70 queries and 90 keys"),
    (lambda: BlockMask.from_tokens(np.ones((3, 3), bool)).expand(2.5), ValueError,
     "heads is 2.5, it must be a whole number"),
    (lambda: BlockMask.from_tokens(np.ones((3, 3), bool)).expand(2, "1"), ValueError,
     "batch is '1', it must be a whole number"),
    (lambda: BlockMask.from_tokens(np.ones((0, 3, 3), bool)), ValueError, "heads is 0"),
    (lambda: BlockMask.from_tokens(np.ones((3, 3), bool)).convert((0, 4)), ValueError,
     "block_q is 0"),
    (lambda: BlockMask.from_tokens(np.ones((3, 3), bool)).convert(4), ValueError,
     "block is 4, it must be two numbers"),
])
def test_what_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


# ---- Files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_files(tmp_path, is_causal):
    for n, q_len in enumerate(range(0, 201, 25)):
        mask = BlockMask.from_tokens(draw(n, q_len, 200 - q_len, (2, 3)), block=BLOCK,
                                     is_causal=is_causal)
        mask.save(tmp_path / "m.safetensors")
        assert BlockMask.load(tmp_path / "m.safetensors") == mask
        whole = BlockMask.from_blocks(mask.blocks, q_len, 200 - q_len, block=BLOCK,
                                      is_causal=is_causal)
        whole.save(tmp_path / "m.npy")
        assert BlockMask.load(tmp_path / "m.npy", q_len=q_len, k_len=200 - q_len, block=BLOCK,
                              is_causal=is_causal) == whole


def test_the_program_reads_and_writes_the_same(tmp_path, program):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 8), np.float32) for n in (70, 90, 90))
    options = {"is_causal": "end", "block": BLOCK}
    for name, x in zip("qkv", (q, k, v)):
        np.save(tmp_path / f"{name}.npy", x)
    for mask, name in ((sparge.predict(q, k, tau=0.5, **options), "m.npy"),
                       (BlockMask.from_tokens(draw(8, 70, 90, (1, 2)), **options),
                        "m.safetensors")):
        mask.save(tmp_path / name)
        subprocess.run([program, "run", "q.npy", "k.npy", "v.npy", "--causal", "--mask", name,
                        "--block-q", "16", "--block-k", "24", "-o", "o.npy", "--mask-out",
                        "again_" + name], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        o = sparge.attend(q, k, v, mask)
        assert np.load(tmp_path / "o.npy").tobytes() == o.tobytes()
        again = tmp_path / ("again_" + name)
        assert BlockMask.load(again, q_len=70, k_len=90, **options) == mask
        if name.endswith(".npy"):
            assert again.read_bytes() == (tmp_path / name).read_bytes()
        else:  # all but the sizes, which the program does not write
            ours, theirs = load_file(tmp_path / name), load_file(again)
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[n], theirs[n]) for n in ours)


def test_what_save_and_load_refuse(tmp_path):
    mask = BlockMask.from_tokens(draw(1, 70, 90, (1, 2)), block=BLOCK, is_causal="end")
    with pytest.raises(ValueError, match=r"m.npy: the mask has \d+ partly attended blocks"):
        mask.save(tmp_path / "m.npy")
    mask.save(tmp_path / "m.safetensors")
    for given, words in (({"q_len": 71}, "q_len is 71 and the file says 70"),
                         ({"block": (16, 32)}, r"block is \(16, 32\) and the file says \(16, 24\)"),
                         ({"is_causal": False}, "is_causal is False and the file says 'end'")):
        with pytest.raises(ValueError, match=words):
            BlockMask.load(tmp_path / "m.safetensors", **given)
    assert BlockMask.load(tmp_path / "m.safetensors", q_len=70, block=[16, 24],
                          is_causal="end") == mask
    np.save(tmp_path / "b.npy", np.ones((1, 2, 5, 4), bool))
    with pytest.raises(TypeError, match="b.npy: the file does not say q_len, which must be given"):
        BlockMask.load(tmp_path / "b.npy")
    with pytest.raises(ValueError, match=r"b.npy: blocks is .* it must be \[1, 2, 1, 2\]"):
        BlockMask.load(tmp_path / "b.npy", q_len=70, k_len=90)
    mask = BlockMask.from_blocks(np.ones((2, 3), bool), 20, 30, block=(10, 10))
    mask.save(os.fsencode(tmp_path / "c.safetensors"))
    assert BlockMask.load(os.fsencode(tmp_path / "c.safetensors"), block=(10, 10)) == mask
    with pytest.raises(ValueError, match="block is 10, it must be two numbers"):
        BlockMask.load(tmp_path / "c.safetensors", block=10)
    with pytest.raises(FileNotFoundError):
        BlockMask.load(tmp_path / "none.safetensors")


GOOD = {"blocks": np.ones((1, 1, 2, 2), np.uint8),
        "partial_index": np.array([[0, 0, 0, 1], [0, 0, 1, 0]]),
        "partial_bits": np.ones((2, 16, 3), np.uint8)}
SIZES = {"q_len": 32, "k_len": 48, "block": [16, 24], "is_causal": False}


@pytest.mark.parametrize("changed, words", [
    ({"blocks": np.ones((2, 2), np.uint8)}, r"blocks has the shape \[2, 2\]"),
    ({"blocks": np.ones((1, 1, 2, 2), np.float32)}, "blocks is float32, it must be bool or uint8"),
    ({"blocks": np.ones((1, 1, 3, 2), np.uint8)}, r"it must be \[1, 1, 2, 2\]"),
    ({"blocks": None}, "blocks"),
    ({"partial_bits": None}, "partial_bits"),
    ({"partial_index": np.zeros((2, 4), np.int32)}, r"partial_index is int32 \[2, 4\]"),
    ({"partial_index": np.array(3)}, r"partial_index is int64 \[\]"),
    ({"partial_bits": np.ones((1, 16, 3), np.uint8)}, r"it must be uint8 \[2, 16, 3\]"),
    ({"partial_bits": np.ones((2, 16, 4), np.uint8)}, r"it must be uint8 \[2, 16, 3\]"),
    ({"partial_index": np.array([[0, 0, 0, 1], [0, 0, 1, 2]])}, r"_index\[1\] is .* is not in"),
    ({"partial_index": np.array([[0, 0, -1, 1], [0, 0, 1, 1]])}, r"_index\[0\] is .* is not in"),
    ({"partial_index": np.array([[0, 0, 1, 1], [0, 0, 0, 1]])}, "sort the entries"),
    ({"partial_index": np.array([[0, 0, 0, 1], [0, 0, 0, 0]])}, "after a later one"),
    ({"partial_index": np.array([[0, 0, 0, 1], [0, 0, 0, 1]])}, "is attended in part twice"),
    ({"blocks": np.eye(2, dtype=np.uint8)[None, None]}, "is attended in part and not kept"),
    ({"metadata": "[]"}, r"its metadata is \[\]"),
    ({"metadata": '{"heads": 3}'}, "its metadata is"),
    ({"metadata": "{"}, "not a mask"),
    ({"metadata": json.dumps({**SIZES, "q_len": "many"})}, "q_len is 'many', it must be a whole"),
    ({"metadata": json.dumps({**SIZES, "k_len": 1e300})}, "below 2.31"),
    ({"metadata": json.dumps({**SIZES, "q_len": -1})}, "q_len is -1"),
    ({"metadata": json.dumps({**SIZES, "block": [16, 0]})}, "block_k is 0"),
    ({"metadata": json.dumps({**SIZES, "is_causal": [1]})}, r"is_causal is \[1\]"),
])
def test_hostile_tensors(tmp_path, changed, words):
    content = {**GOOD, **changed}
    metadata = content.pop("metadata", json.dumps(SIZES))
    path = tmp_path / "m.safetensors"
    save_file({n: x for n, x in content.items() if x is not None}, path, {"sparge": metadata})
    with pytest.raises((ValueError, TypeError, OverflowError), match=f"m.safetensors: .*({words})"):
        BlockMask.load(path)


def test_a_good_file_and_cut_ones(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(GOOD, path, {"sparge": json.dumps(SIZES)})
    mask = BlockMask.load(path)
    assert mask.partial == 2 and mask.to_tokens()[0, 0, :16, 24:].sum() == 16 * 3
    data = path.read_bytes()
    for size in (0, 4, 9, 200, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="m.safetensors: not a mask: "):
            BlockMask.load(path)
    path = tmp_path / "m.npy"
    mask = BlockMask.from_blocks(GOOD["blocks"], 32, 48, block=BLOCK)
    mask.save(path)
    data = path.read_bytes()
    huge = data.replace(b"(1, 1, 2, 2), }" + b" " * 12, b"(9999999, 99999999, 2, 2), }"[:27])
    for broken in (b"", data[:50], data[:-1], b"PK" + data, huge, data.replace(b"u1", b"O ")):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="m.npy: "):
            BlockMask.load(path, q_len=32, k_len=48, block=BLOCK)
