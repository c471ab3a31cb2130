# SPDX-License-Identifier: Apache-2.0
"""The judge, given tensors of torch: the report is that of the same numbers in numpy."""
import ml_dtypes
import numpy as np
import pytest
import sparge
import torch
from sparge.testing import assert_kernel

DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_arrays(dtype):
    torch.manual_seed(5)
    q, k, v = (torch.randn(shape) for shape in ((2, 4, 90, 16), (2, 2, 90, 16), (2, 2, 90, 8)))
    mask = torch.rand(2, 4, 3, 6) < 0.7
    how = {"is_causal": True, "block": (32, 16)}
    pairs = sparge.BlockMask.from_blocks(mask, 90, 90, **how).to_tokens()
    o = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.from_numpy(pairs), enable_gqa=True)
    o = torch.where(torch.from_numpy(pairs.any(-1))[..., None], o, 0).to(dtype)
    o.requires_grad_()  # as what comes from a model
    report = sparge.check(o, q, k, v, mask=mask, **how)
    assert report.ok and report.hint is None, report
    same = o.detach().float().numpy().astype(DTYPES[dtype])
    assert report.to_dict() == sparge.check(same, q.numpy(), k.numpy(), v.numpy(),
                                            mask=mask.numpy(), **how).to_dict()
    leak = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).to(dtype)
    with pytest.raises(AssertionError, match="a causal leak"):
        assert_kernel(leak, q, k, v, is_causal=True)
