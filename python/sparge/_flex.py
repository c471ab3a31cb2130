# SPDX-License-Identifier: Apache-2.0
"""Masks as torch's flex_attention has them."""
from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparge._mask import BlockMask, Bools
from sparge._optional import optional
from sparge._options import Causal

MODULE = "torch.nn.attention.flex_attention"
NOTHING, WHOLE, IN_PART = 0, 1, 2  # tables of to_flex(); from IN_PART on one for each such block


def to_flex(mask: BlockMask, device: Any) -> Any:
    """See BlockMask.to_flex()."""
    flex, torch = optional(MODULE, "to_flex()"), optional("torch", "to_flex()")
    blocks = mask._blocks
    index, bits = mask._partials()
    block_q, block_k = mask.block
    offset, (batch, heads, _, _) = mask._offset, blocks.shape

    table = np.where(blocks, WHOLE, NOTHING)
    table[tuple(index.T)] = np.arange(len(index)) + IN_PART
    pairs = np.zeros((IN_PART + len(index), block_q, block_k), bool)
    pairs[WHOLE] = True
    pairs[IN_PART:] = np.unpackbits(bits, axis=2, count=block_k, bitorder="little")
    last = np.minimum(mask._first(1) + block_k, mask.k_len) - 1
    full = (table == WHOLE) & (last <= mask._first(0)[:, None] + offset)
    table, pairs = (torch.as_tensor(x, device=device) for x in (table, pairs))

    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
        of_block = table[b % batch, h % heads, q // block_q, kv // block_k]
        return pairs[of_block, q % block_q, kv % block_k] & (kv <= q + offset)

    def listed(x: Bools) -> list[Any]:
        """How many are set in each row, and which: first those that are."""
        order = np.argsort(~x, axis=-1, kind="stable")
        return [torch.as_tensor(n.astype(np.int32), device=device) for n in (x.sum(axis=-1), order)]

    return flex.BlockMask.from_kv_blocks(*listed(blocks & ~full), *listed(full),
                                         BLOCK_SIZE=mask.block, mask_mod=mask_mod,
                                         seq_lengths=(mask.q_len, mask.k_len))


def from_flex(mask: Any, is_causal: Causal) -> BlockMask:
    """See BlockMask.from_flex()."""
    flex = optional(MODULE, "from_flex()")
    if not isinstance(mask, flex.BlockMask):
        raise TypeError(f"flex is a {type(mask).__name__}, it must be a BlockMask of {MODULE}; "
                        "create_block_mask() makes one of a mask_mod")
    sizes, (q_len, k_len) = mask.kv_num_blocks.shape[:2], mask.seq_lengths
    to = BlockMask._empty(sizes, q_len, k_len, mask.BLOCK_SIZE, is_causal, True)
    some = _dense(mask.kv_num_blocks, mask.kv_indices, to.shape)
    full = _dense(mask.full_kv_num_blocks, mask.full_kv_indices, to.shape)
    block_q, block_k = to.block
    pairs = np.zeros((block_q, 32 * -(-k_len // 32)), bool)
    for b, h, i in np.ndindex(to.shape[:3]):
        first = i * block_q
        rows = min(block_q, q_len - first)
        pairs[:, :k_len] = np.repeat(full[b, h, i], block_k)[:k_len]
        if some[b, h, i].any():
            asked = flex.create_mask(_moved(mask.mask_mod, b, h, first), 1, 1, rows, k_len,
                                     mask.kv_indices.device)[0, 0].cpu().numpy()
            pairs[:rows, :k_len] |= asked & np.repeat(some[b, h, i], block_k)[:k_len]
        to._set_row((b, h, i), np.packbits(pairs, axis=1, bitorder="little").view(np.uint32))
    return to


def _moved(mask_mod: Any, batch: int, head: int, query: int) -> Any:
    """mask_mod as it is from a batch, a head and a query on."""
    return lambda b, h, q, kv: mask_mod(b + batch, h + head, q + query, kv)


def _dense(count: Any, listed: Any, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """What is in the lists of blocks of a mask of flex."""
    found = np.zeros(shape, bool)
    if count is not None:
        number, index = count.cpu().numpy(), listed.cpu().numpy()
        b, h, i, n = np.nonzero(np.arange(index.shape[-1]) < number[..., None])
        found[b, h, i, index[b, h, i, n]] = True
    return found
