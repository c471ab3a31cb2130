# SPDX-License-Identifier: Apache-2.0
"""sparge: SpargeAttn, training-free block-sparse int8 attention (arXiv 2502.18137)."""
from sparge._attention import Stats, attention, predict
from sparge._mask import BlockMask, Counts

__all__ = ["BlockMask", "Counts", "Stats", "attention", "predict"]
