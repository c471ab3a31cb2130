#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Capture q, k, v and the gradient g of SmolLM2-135M-Instruct on texts of texts.csv, all layers.

    pip install . -r experiments/capture/requirements-verify.txt
    python experiments/capture/gradient.py --texts persuasion,click_core

g is the gradient at each head's output of the loss of labels that the model draws itself, by one
backward pass of sparge.capture. `sparge tune --by loss` reads it. The model is transformers', with
the weights of model.py, in float32.
"""
import argparse
import os
import sys
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

os.environ.setdefault("TQDM_DISABLE", "1")  # of transformers, while it reads the weights

import gguf
import torch
import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "experiments"), str(HERE)]

import model as weights  # noqa: E402
import smollm2  # noqa: E402
import texts  # noqa: E402

from sparge.capture import Recorder  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", metavar="NAME|ROLE[,...]", default="tune",
                        help="of texts.csv (default: tune)")
    parser.add_argument("--length", type=int, default=4096, metavar="TOKENS",
                        help="of each text (default: 4096)")
    parser.add_argument("--seed", type=int, default=0, help="of the labels (default: 0)")
    parser.add_argument("--out", type=Path, default=ROOT / "build/captures/gradient",
                        metavar="FOLDER", help="(default: build/captures/gradient)")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    path = weights.fetch()
    tokenizer = smollm2.make_tokenizer(gguf.GGUFReader(path))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="sdpa").eval()
    with Recorder(model, args.out, name="SmolLM2-135M-Instruct", budget=float("inf"),
                  gradient=True, label_seed=args.seed, gguf_sha256=weights.GGUF_SHA256) as record:
        for file in texts.fetch(texts.select(args.texts.split(","))):
            start = time.perf_counter()
            sample = smollm2.find_sample(file)
            tokens = smollm2.tokenise(tokenizer, sample, args.length)
            record.begin(sample.name, text=file.name, text_sha256=sample.sha256,
                         text_licence=sample.licence, text_source=sample.source)
            model(torch.from_numpy(tokens)[None])
            print(f"{sample.name}: {time.perf_counter() - start:.0f} s, at most "
                  f"{getrusage(RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB so far", file=sys.stderr)


if __name__ == "__main__":
    main()
