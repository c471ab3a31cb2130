#!/usr/bin/env python3
"""Fig 4: 128 tokens of q and k of one head, channel by channel: neighbours are alike, which is what pooling a block
relies on."""
import sys
from pathlib import Path

from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from item import Job, run  # noqa: E402

CAPTURE = HERE.parent / "capture/smollm2-135m"
FIRST, TOKENS = 2048, 128


def measure(key, how):
    tensor = load_file(CAPTURE / f"{key['capture']}.safetensors")[key["tensor"]]
    return [{"token": FIRST + n} | {f"c{c:02}": f"{x:.4g}" for c, x in enumerate(row)}
            for n, row in enumerate(tensor[0, 0, FIRST:FIRST + TOKENS].astype(float))]


JOBS = [Job({"capture": path.stem, "tensor": tensor}, 0.1, smoke=True)
        for path in sorted(CAPTURE.glob("*.safetensors")) for tensor in "qk"]

if __name__ == "__main__":
    run(__file__, JOBS, measure)
