# SPDX-License-Identifier: Apache-2.0
"""ways.py: which methods are compared here, on what, at which densities."""

DENSITIES = [0.5, 0.3, 0.2, 0.1]

# What a name leaves out has its default. min_budget of FlexPrefill is cut down to sequences of 4096
# tokens; SpargeAttn has theta -1 and its sink, unless theta is what is asked about.
YARDSTICKS = ["random", "window", "oracle_mass", "oracle_mass_t", "oracle_pairs"]
SPARGEATTN = "spargeattn:theta=-1,sink=1"
THETAS = [f"spargeattn:theta={theta},sink={sink}" for sink in (0, 1)
          for theta in (-1, 0, 0.2, 0.4, 0.6, 0.8)]
PREDICTED = [SPARGEATTN, "spargeattention2:sink=1", "submass", "submass:cell=0", "xattention",
             "xattention_t", "seer", "kinetics", "proxyattn", "proxyattn_t", "hess:sink=1", "moba",
             "strata", "blasst"]
CAUSAL = ["minference", "flexprefill:min_budget=128", "pbs", "pbs_t", "s2", "blockrank"]
STATIC = ["powerattention:block=64", "moa", "moa_calibrated"]
GRID = ["pisa0", "draft:h=7,w=10", "draft:h=2,w=4", "biformer", "svg", "radial", "sparsevdit",
        "sparsed"]
TEXT = [*YARDSTICKS, *PREDICTED, *STATIC, *CAUSAL]
VIDEO = [*YARDSTICKS, *PREDICTED, "powerattention:block=64", *GRID]
# The same selector, a threshold on what is told to be the mass of a block, and whose scores.
SELECTED = ["oracle_mass_t", "submass", "submass:cell=0", "xattention_t", "proxyattn_t", "pbs_t"]
