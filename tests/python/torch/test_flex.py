# SPDX-License-Identifier: Apache-2.0
"""Masks there and back between sparge and torch's flex_attention, and attention over both."""
import numpy as np
import pytest
import sparge
import torch
from sparge import BlockMask
from torch.nn.attention.flex_attention import (create_block_mask, create_mask, flex_attention,
                                               noop_mask)

# Without torch.compile flex_attention asks mask_mod alone, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
BLOCK = (16, 24)
SIZES = ((1, 1), (70, 90), (90, 70), (200, 13), (128, 128))
CAUSAL = (False, "end", "start")


def draw(q_len, k_len, heads=(4, 2)):
    torch.manual_seed(1000 * q_len + k_len)
    return [torch.randn(2, heads[n > 0], (q_len, k_len)[n > 0], 8) for n in range(3)]


def agree(qkv, mask, block_mask):
    """attend() over a mask beside flex_attention over torch's."""
    o = sparge.attend(*qkv, mask, qk_dtype="f32", pv_dtype="f32")
    want = flex_attention(*qkv, block_mask=block_mask, enable_gqa=True)
    assert isinstance(o, torch.Tensor)
    torch.testing.assert_close(o, want, rtol=0, atol=1e-5)  # two orders of sums of 200 floats


@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("q_len, k_len", SIZES)
def test_attention_over_what_to_flex_gives(q_len, k_len, is_causal):
    rng = np.random.default_rng(0)
    pairs = rng.random((2, 4, q_len, k_len)) < rng.choice([0, 0.3, 1], (2, 4, q_len, 1))
    grid = -(-q_len // BLOCK[0]), -(-k_len // BLOCK[1])
    for mask in (BlockMask.from_tokens(pairs, block=BLOCK, is_causal=is_causal),
                 BlockMask.from_blocks(rng.random((2, 4, *grid)) < 0.5, q_len, k_len, block=BLOCK,
                                       is_causal=is_causal)):
        flex = mask.to_flex()
        assert flex.shape == (2, 4, q_len, k_len) and flex.BLOCK_SIZE == BLOCK
        assert np.array_equal(create_mask(flex.mask_mod, 2, 4, q_len, k_len, "cpu").numpy(),
                              mask.to_tokens())
        assert BlockMask.from_flex(flex, is_causal=is_causal) == mask
        agree(draw(q_len, k_len), mask, flex)


def test_which_blocks_are_full():
    mask = BlockMask.from_blocks(np.ones((1, 6, 3), bool), 90, 70, block=BLOCK, is_causal="end")
    flex = mask.to_flex()
    full = flex.full_kv_num_blocks[0, 0].tolist()
    # Query t sees keys up to t - 20: of the last blocks, 80 to 89, all see keys 0 to 47, and some
    # those up to 69.
    assert full == [0, 0, 0, 1, 1, 2] and flex.kv_num_blocks[0, 0].tolist() == [0, 1, 2, 1, 2, 1]
    assert flex.to_dense()[0, 0].bool().tolist() == mask.blocks[0].tolist()
    dense = BlockMask.from_blocks(np.ones((1, 6, 3), bool), 90, 70, block=BLOCK).to_flex()
    assert not dense.kv_num_blocks.any() and (dense.full_kv_num_blocks == 3).all()


documents = torch.arange(200) // 37


def causal(b, h, q, kv):
    return q >= kv


def window(b, h, q, kv):
    return (q >= kv) & (q - kv < 40)


def same_document(b, h, q, kv):
    return documents[q] == documents[kv]


def prefix(b, h, q, kv):
    return (q >= kv) | (kv < 33)


def by_head(b, h, q, kv):
    return q >= kv + 10 * h + b


MODS = (noop_mask, causal, window, same_document, prefix)


@pytest.mark.parametrize("mask_mod, heads", [(mod, (None, None)) for mod in MODS] +
                         [(window, (1, 4)), (window, (2, None)), (by_head, (2, 4))])
def test_attention_over_what_from_flex_reads(mask_mod, heads):
    q_len, k_len = 130, 190
    flex = create_block_mask(mask_mod, *heads, q_len, k_len, "cpu", BLOCK_SIZE=(32, 48))
    mask = BlockMask.from_flex(flex)
    assert mask.shape[:2] == tuple(n or 1 for n in heads) and mask.block == (32, 48)
    want = create_mask(mask_mod, *heads, q_len, k_len, "cpu").numpy()
    assert np.array_equal(mask.to_tokens(), want)
    assert mask == BlockMask.from_tokens(want, block=(32, 48))
    agree(draw(q_len, k_len), mask.expand(4, 2), flex)


def test_causality_that_is_said():
    flex = create_block_mask(causal, None, None, 200, 200, "cpu", BLOCK_SIZE=(32, 48))
    mask = BlockMask.from_flex(flex, is_causal="start")
    assert (mask.density, mask.partial, mask.is_causal) == (1, 0, "start")
    assert BlockMask.from_flex(flex).density == pytest.approx(0.5025)


def test_torch_tensors_make_masks():
    pairs = torch.rand(2, 70, 90) < 0.5
    mask = BlockMask.from_tokens(pairs, block=BLOCK)
    assert mask == BlockMask.from_tokens(pairs.numpy(), block=BLOCK)
    blocks = torch.ones(2, 5, 4, dtype=torch.uint8)
    assert BlockMask.from_blocks(blocks, 70, 90, block=BLOCK).density == 1
    with pytest.raises(TypeError, match="pairs is float32, it must be bool or uint8"):
        BlockMask.from_tokens(torch.zeros(70, 90))


def test_oracle_and_intermediates_of_tensors():
    q, k, v = draw(70, 90)
    arrays = [x.numpy() for x in (q, k, v)]
    assert np.array_equal(sparge.oracle(q, k, v), sparge.oracle(*arrays))
    found, want = sparge.intermediates(q, k, v), sparge.intermediates(*arrays)
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[name], want[name]) for name in found)
    with pytest.raises(ValueError, match="q is on meta and oracle.. runs on the CPU: give q.cpu"):
        sparge.oracle(*(x.to("meta") for x in (q, k, v)))


def test_what_from_flex_refuses():
    with pytest.raises(TypeError, match="flex is a Tensor, it must be a BlockMask of torch"):
        BlockMask.from_flex(torch.ones(3, 3))
    flex = create_block_mask(noop_mask, None, None, 4096, 4096, "cpu", BLOCK_SIZE=(2048, 128))
    with pytest.raises(ValueError, match=r"block_q is 2048, it must be in \[1, 1024\]"):
        BlockMask.from_flex(flex)
