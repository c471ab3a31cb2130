# SPDX-License-Identifier: Apache-2.0
"""SpargeAttn, training-free block-sparse int8 attention (arXiv 2502.18137), the field's other
methods beside it, and a judge for kernels; on arrays of numpy and tensors of torch.

    o = sparge.attention(q, k, v, is_causal=True)  # [H, N, D] or [B, H, N, D]

What to try first, as it needs no tuning and loses least:

    o = sparge.attention(q, k, v, is_causal=True, method="submass", density=0.5)

attend      attention(), predict(), attend() over a given mask; plan() and methods() for others
masks       BlockMask
judge       check(), which makes a Report; oracle(), the truth in double; sparge.testing
look        plot(); intermediates() and Reason: every step, and why a block is kept
thresholds  tune(), load_params(); measure_loss() and choose_by_loss(), for all layers together
order       token_order(), permute(), unpermute(), of images and video
here        info(): the version, and what this machine can run

help(sparge.attention) has all arguments, which the other calls share, and all errors. Calls run on
all processors without the GIL, and Ctrl-C ends them. A process that was forked after a call has no
threads: it must give threads=1.

These are imported by their names:
sparge.torch         in the place of torch's scaled_dot_product_attention
sparge.transformers  attn_implementation="sparge"
sparge.diffusers     the models of diffusers' pipelines
sparge.capture       records q, k and v of a model that runs
sparge.testing       assert_kernel(), for the tests of other kernels
"""
from sparge import testing as testing
from sparge._attention import attend, attention, predict
from sparge._check import check
from sparge._counts import Counts
from sparge._info import info
from sparge._inspect import Reason, intermediates, oracle
from sparge._loss import LossPoints, choose_by_loss, measure_loss
from sparge._mask import BlockMask
from sparge._methods import Method, Param, State, methods
from sparge._order import Grid, permute, token_order, unpermute
from sparge._params import Params, Thresholds, load_params
from sparge._plan import Part, Plan, plan
from sparge._report import Report
from sparge._result import Stats
from sparge._tune import Tuned, TunedHead, TuneErrors, tune
from sparge.plotting import plot

__all__ = ["BlockMask", "Counts", "Grid", "LossPoints", "Method", "Param", "Params", "Part", "Plan",
           "Reason", "Report", "State", "Stats", "Thresholds", "TuneErrors", "Tuned", "TunedHead",
           "attend", "attention", "check", "choose_by_loss", "info", "intermediates", "load_params",
           "measure_loss", "methods", "oracle", "permute", "plan", "plot", "predict", "token_order",
           "tune", "unpermute"]
