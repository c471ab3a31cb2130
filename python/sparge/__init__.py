# SPDX-License-Identifier: Apache-2.0
"""sparge: SpargeAttn, training-free block-sparse int8 attention (arXiv 2502.18137)."""
from sparge._attention import attend, attention, predict
from sparge._check import check
from sparge._counts import Counts
from sparge._info import info
from sparge._inspect import Reason, intermediates, oracle
from sparge._mask import BlockMask
from sparge._methods import Method, Param, State, methods
from sparge._order import Grid, permute, token_order, unpermute
from sparge._params import Params, Thresholds, load_params
from sparge._plan import Part, Plan, plan
from sparge._report import Report
from sparge._result import Stats
from sparge._tune import Tuned, TunedHead, TuneErrors, tune
from sparge.plotting import plot

__all__ = ["BlockMask", "Counts", "Grid", "Method", "Param", "Params", "Part", "Plan", "Reason",
           "Report", "State", "Stats", "Thresholds", "TuneErrors", "Tuned", "TunedHead", "attend",
           "attention", "check", "info", "intermediates", "load_params", "methods", "oracle",
           "permute", "plan", "plot", "predict", "token_order", "tune", "unpermute"]
