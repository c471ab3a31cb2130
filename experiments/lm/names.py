# SPDX-License-Identifier: Apache-2.0
"""names.py: the model and the attentions that the tables of sparge-lm are about, what they are
called, and a figure of their rows."""
from math import exp
from pathlib import Path

from errors import number
from harness import read_csv

# Thresholds: of experiments/tune, with the bounds on every text or on their mean; and tighter ones.
TUNED = {pair: Path(__file__).resolve().parent.parent / path for pair, path in {
    "0.08, 0.09": "tune/model_worst.json", "0.08, 0.09 on the mean": "tune/model_mean.json",
    "0.05, 0.06": "lm/params_0.05_0.06.json", "0.03, 0.035": "lm/params_0.03_0.035.json"}.items()}
DENSE = {"f32": "dense, f32", "int8": "dense, int8"}
# MInference and FlexPrefill at the paper's sparsities: a value for each length, by run.py peers.
PEERS = {"MInference, 0.5": ("minference", 0.5), "MInference, 0.3": ("minference", 0.3),
         "FlexPrefill, 0.5": ("flexprefill:min_budget=128", 0.5),
         "FlexPrefill, 0.42": ("flexprefill:min_budget=128", 0.42)}
SETTINGS = Path(__file__).resolve().parent / "peers.csv"
PEER_TITLES = {row["attention"]: row["title"] for row in read_csv(SETTINGS)} \
    if SETTINGS.exists() else {}
TITLES = DENSE | {path.name: f"SpargeAttn, ({pair})" for pair, path in TUNED.items()}
LENGTHS = [1024, 2048, 4096, 8192]
MODEL = "SmolLM2-135M-Instruct"


def perplexity(rows):
    """Over all tokens of all texts, of rows of sparge-lm ppl; NaN where one of them is unknown."""
    return exp(sum(number(r["surprise"]) for r in rows) / sum(float(r["tokens"]) - 1 for r in rows))
