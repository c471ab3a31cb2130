# SPDX-License-Identifier: Apache-2.0
"""attentions.py: what is compared here: dense attention, SpargeAttn, and a threshold on mass, each
at densities that were found on two texts."""
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "lm")]

from harness import read_csv  # noqa: E402
from names import DENSE, TUNED  # noqa: E402

SETTINGS = HERE / "settings.csv"
DENSITIES = ["0.5", "0.3", "0.2"]
BLOCKS = "128x64"
FINER = ["64x64", "64x32", "64x16"]
# What one number for the model sets: the method, its other parameters, and its own.
TAU, WHOLE, CELLS = ("SpargeAttn, one tau", "SpargeAttn's scores, one t", "submass, one t")
ONE = {
    TAU: ("spargeattn", "tau", {"theta": -1, "sink": 1}),
    WHOLE: ("submass", "t", {"cell": 0}),
    CELLS: ("submass", "t", {"cell": 8}),
}
BY_LOSS = "submass, t by loss"
F32 = DENSE["f32"]
LAMBDAS = ["-8", "-5"]


@dataclass(frozen=True)
class Attention:
    """rule: in words. word: for sparge-lm --attention. wanted: the density, or "". more: options of
    sparge-lm beside those of the blocks."""
    rule: str
    word: str
    wanted: str = ""
    blocks: str = BLOCKS
    lambda_: str = ""
    more: tuple = ()

    @property
    def name(self):
        """What sparge-lm calls it, and the hash of its file or None."""
        path = Path(self.word)
        return path.name, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    def columns(self):
        return {"rule": self.rule, "wanted": self.wanted, "blocks": self.blocks,
                "lambda": self.lambda_}

    def options(self):
        """Of sparge-lm: those that share them go together."""
        block_q, block_k = self.blocks.split("x")
        return ("--block-q", block_q, "--block-k", block_k, *self.more)


def word_of(rule, value):
    """A rule with its one number."""
    method, name, others = ONE[rule]
    return f"{method}:" + ",".join(f"{key}={x}" for key, x in {name: value, **others}.items())


def settings():
    """The numbers that were found."""
    return read_csv(SETTINGS) if SETTINGS.exists() else []


def of_settings():
    return [Attention(row["rule"], word_of(row["rule"], row["value"]), row["wanted"], row["blocks"])
            for row in settings()]


def with_lambda():
    """One t at half density, and lambda on top, which methods do not take."""
    at = next((row["value"] for row in settings() if row["rule"] == CELLS), None)
    return [Attention(CELLS, "sparse", DENSITIES[0], lambda_=x, more=(
        "--theta=-1", "--min-mass", at, "--cell", "8", f"--lambda={x}")) for x in LAMBDAS if at]


def of_heads():
    """Those whose thresholds, by sparge tune --by loss, are there: params_0.5.json in blocks of
    128x64, params_64x16_0.5.json in others."""
    places = [(HERE / f"params{'' if blocks == BLOCKS else '_' + blocks}_{x}.json", x, blocks)
              for blocks in (BLOCKS, *FINER) for x in DENSITIES]
    return [Attention(BY_LOSS, str(path), wanted, blocks)
            for path, wanted, blocks in places if path.exists()]


def everything():
    return [*(Attention(title, word) for word, title in DENSE.items()),
            *(Attention(f"SpargeAttn, ({pair})", str(TUNED[pair]))
              for pair in ("0.08, 0.09", "0.05, 0.06")), *of_settings(), *with_lambda(),
            *of_heads()]


def at_half():
    """One setting of each rule, for all lengths, in the usual blocks."""
    return [a for a in everything()
            if a.wanted in ("", DENSITIES[0]) and a.blocks == BLOCKS and not a.lambda_]
