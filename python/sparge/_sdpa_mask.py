# SPDX-License-Identifier: Apache-2.0
"""What an attn_mask of torch says: which tokens take part at all, whether it is causal, and which
pairs it hides beyond that."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparge._mask import BlockMask

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """Some samples of a batch, and of them the queries and keys that take part. What is left of the
    mask is causal or not, and hides more pairs than causality does, or not."""

    samples: slice
    queries: slice
    keys: slice
    is_causal: Any  # of attention()
    shown: Bools | None  # [samples or 1, heads or 1, queries, keys]; None: all that is visible


def parts(shown: Bools, samples: int) -> list[Part]:
    """The parts of a mask [samples or 1, heads or 1, queries, keys]. Padding is cut off: it takes
    part in no prediction. Queries in no part see no key."""
    pairs: Bools = np.any(shown, axis=1)
    boxes = [(_span(np.any(m, axis=1)), _span(np.any(m, axis=0))) for m in pairs]
    if boxes and all(box == boxes[0] for box in boxes):
        groups = [(slice(0, samples), slice(None), boxes[0])]
    else:
        groups = [(slice(n, n + 1), slice(n, n + 1), box) for n, box in enumerate(boxes)]
    return [_part(at, *box, shown[of, :, box[0], box[1]]) for at, of, box in groups
            if box[0].stop > box[0].start]


def _span(used: Bools) -> slice:
    """From the first to the last that is used."""
    found = np.flatnonzero(used)
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def _part(samples: slice, queries: slice, keys: slice, shown: Bools) -> Part:
    q_len, k_len = shown.shape[2:]
    some: Bools = np.any(shown, axis=(0, 1))
    last = k_len - 1 - some[:, ::-1].argmax(axis=1)
    row = np.arange(q_len)
    is_causal: Any = False
    visible = np.full(q_len, k_len)
    for offset, name in sorted([(0, "start"), (k_len - q_len, "end")]):
        if (last <= row + offset)[np.any(some, axis=1)].all():
            is_causal, visible = name, np.clip(row + offset + 1, 0, k_len)
            break
    whole = np.count_nonzero(shown) == shown.shape[0] * shown.shape[1] * visible.sum()
    return Part(samples, queries, keys, is_causal, None if whole else shown)


def restrict(predicted: BlockMask, shown: Bools) -> BlockMask:
    """The blocks of a prediction [B, H, i, j] without the pairs that are not shown. A row of blocks
    keeps all that is shown where it loses a predicted block as a whole, or where one of its queries
    loses all of them: the prediction gave mass to what they may not see."""
    block, is_causal = predicted.block, predicted.is_causal
    batch, heads = predicted.shape[:2]
    mask = BlockMask.from_tokens(shown, block=block, is_causal=is_causal).expand(heads, batch)
    lost = (predicted.blocks & ~mask.blocks).any(axis=3) | _blind(predicted, shown)
    kept = BlockMask.from_blocks(predicted.blocks | lost[..., None], *shown.shape[2:], block=block,
                                 is_causal=is_causal)
    return kept & mask


def _blind(predicted: BlockMask, shown: Bools) -> Bools:
    """Which rows of blocks [B, H, i] have a query that is shown keys, but none of those
    predicted."""
    (block_q, block_k), (q_len, k_len) = predicted.block, shown.shape[2:]
    seen: Bools = np.logical_or.reduceat(shown, np.arange(0, k_len, block_k), axis=3)
    found = (seen & predicted.blocks.repeat(block_q, axis=2)[:, :, :q_len]).any(axis=3)
    blind: Bools = np.logical_or.reduceat(seen.any(axis=3) & ~found,
                                          np.arange(0, q_len, block_q), axis=2)
    return blind
