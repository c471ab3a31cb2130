# SPDX-License-Identifier: Apache-2.0
"""flex.py: torch's attention on the CPU, to be timed beside ours: dense, and FlexAttention over a
random mask of our blocks."""
import time

import numpy as np

BLOCK_Q, BLOCK_K, SEED = 128, 64, 1


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def flex_mask(torch, tokens, share):
    """share of the key blocks of every query block left out, at random; and what that comes to."""
    from torch.nn.attention.flex_attention import BlockMask

    draw = np.random.default_rng(SEED)
    rows, columns = tokens // BLOCK_Q, tokens // BLOCK_K
    kept = max(1, round((1 - share) * columns))
    index = np.stack([np.concatenate([np.sort(order[:kept]), order[kept:]]) for order in
                      (draw.permutation(columns) for _ in range(rows))])
    return BlockMask.from_kv_blocks(torch.zeros(1, 1, rows, dtype=torch.int32),
                                    torch.zeros(1, 1, rows, columns, dtype=torch.int32),
                                    torch.full((1, 1, rows), kept, dtype=torch.int32),
                                    torch.tensor(index[None, None],
                                                 dtype=torch.int32), BLOCK_SIZE=(BLOCK_Q, BLOCK_K),
                                    seq_lengths=(tokens, tokens)), 1 - kept / columns


def attention(torch, inputs, blocks=None):
    """A call of attention of q, k, v: dense, or over a mask of flex_mask(), compiled when it is
    first made."""
    if blocks is None:
        return lambda: torch.nn.functional.scaled_dot_product_attention(*inputs)
    from torch.nn.attention.flex_attention import flex_attention
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(*inputs, block_mask=blocks)
