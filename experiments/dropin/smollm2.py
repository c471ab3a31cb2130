#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M in transformers with attn_implementation="sparge", beside transformers' own
attention and beside sparge-lm.

    pip install . -r experiments/capture/requirements-verify.txt
    python experiments/dropin/smollm2.py                                # 1024 tokens of one text
    python experiments/dropin/smollm2.py --texts judge --tokens 4096    # 4096 of five: half an hour

The weights are the GGUF of experiments/capture/model.py. Dense attention in f32 must give
transformers' perplexity to a relative 1e-5, and int8, dense and with tuned thresholds, that of
sparge-lm to 1e-3.

In int8 the last bit of q or k decides how a score is rounded and whether a block is kept, and 30
layers make much of it. So the model is run again with the last bits of its embedding changed at
random: `spread` is the standard deviation of what comes, relative to the perplexity. Where it is
above the bound, one text of that length cannot show more than that two runs are within some times
it; more tokens can. An exit code of 1: a difference is above its bound and above four times
the spread.

How many blocks the last bits flip is counted: the masks of every layer here beside those that are
predicted from the q and k of sparge-lm (sparge-lm capture, which rounds them to float16).
"""
import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # of transformers, while it reads the weights

import gguf
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "experiments/capture")]

import model as weights  # noqa: E402
import smollm2  # noqa: E402
import texts  # noqa: E402
from harness import run_json, write_csv  # noqa: E402

import sparge  # noqa: E402
from sparge.transformers import register  # noqa: E402

TUNED = ROOT / "experiments/lm/params_0.03_0.035.json"
NEAR_TRANSFORMERS, NEAR_LM = 1e-5, 1e-3


class Masks:
    """The masks of a model's layers: those of a registered attention, from the q and k it is
    given."""

    def __init__(self, name, options_of):
        self.blocks = {}
        inner = transformers.AttentionInterface()[name]

        def attend(module, query, key, *rest, **kwargs):
            mask = sparge.predict(query, key, is_causal="end", **options_of(module.layer_idx))
            self.blocks[module.layer_idx] = mask.blocks[0]
            return inner(module, query, key, *rest, **kwargs)

        transformers.AttentionInterface.register(name, attend)


@torch.no_grad()
def surprise(model, attention, tokens):
    """-log of the probability of all tokens but the first, in double."""
    model.set_attn_implementation(attention)
    logits = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].double()
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(tokens[1:]),
                                                   reduction="sum"))


def spread(model, attention, tokens, runs):
    """The standard deviation of surprise(), of runs with other last bits of the embedding."""
    kept, found = model.model.embed_tokens.weight.data, []
    for seed in range(runs):
        draw = torch.Generator().manual_seed(seed)
        bits = torch.randint(-1, 2, kept.shape, generator=draw) * 2.0**-23
        model.model.embed_tokens.weight.data = kept * (1 + bits)
        found.append(surprise(model, attention, tokens))
    model.model.embed_tokens.weight.data = kept
    return float(np.std(found, ddof=1))


def of_lm(program, gguf_file, tokens, folder):
    """The rows of sparge-lm ppl, and the blocks predicted from what sparge-lm capture writes."""
    ids, captured = folder / "ids.npy", folder / "captured"
    np.save(ids, tokens.astype(np.int32))
    rows = run_json(program, "ppl", gguf_file, ids, "--attention", f"f32,int8,{TUNED}")["rows"]
    run_json(program, "capture", gguf_file, ids, "--attention", TUNED, "-o", captured)
    params, blocks = sparge.load_params(TUNED), {}
    for file in json.loads((captured / "manifest.json").read_text())["files"]:
        qk = load_file(captured / file["file"])
        mask = sparge.predict(qk["q"], qk["k"], params=params.layer(file["layer"]), is_causal="end")
        blocks[file["layer"]] = mask.blocks[0]
    return {row["attention"]: row for row in rows}, blocks


def compare_masks(ours, theirs, row):
    """A line for each layer. Blocks are those of all heads that causality does not hide."""
    lines = []
    for layer in sorted(ours):
        dense = sparge.BlockMask.from_blocks(np.ones_like(ours[layer]), row["tokens"],
                                             row["tokens"], is_causal="end")
        visible = dense.counts.pairs
        lines.append({
            "layer": layer, "visible": visible, "kept": int(ours[layer].sum()),
            "kept_sparge_lm": round((1 - row["layers_sparsity_qk"][layer]) * visible),
            "kept_by_its_q_k": int(theirs[layer].sum()),
            "differ": int((ours[layer] != theirs[layer]).sum())
        })
    return lines


CASES = [("f32", "sparge_f32", "transformers, sdpa", NEAR_TRANSFORMERS),
         ("f32", "sparge_f32", "transformers, eager", NEAR_TRANSFORMERS),
         ("f32", "sparge_f32", "sparge-lm", NEAR_LM), ("int8", "sparge_int8", "sparge-lm", NEAR_LM),
         (TUNED.name, "sparge_tuned", "sparge-lm", NEAR_LM)]


class Runs:
    """The model and its attentions, on one text after the other."""

    def __init__(self, args):
        self.args, self.path = args, weights.fetch()
        self.tokenizer = smollm2.make_tokenizer(gguf.GGUFReader(self.path))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            self.path.parent, gguf_file=self.path.name, dtype=torch.float32).eval()
        params = sparge.load_params(TUNED)
        self.records = {
            "sparge_f32": register("sparge_f32", method="dense", qk_dtype="f32", pv_dtype="f32"),
            "sparge_int8": register("sparge_int8", method="dense"),
            "sparge_tuned": register("sparge_tuned", params=params),
        }
        self.masks = Masks("sparge_tuned", lambda layer: {"params": params.layer(layer)})

    def text(self, path):
        """The cases over a text, and its masks."""
        tokens = smollm2.tokenise(self.tokenizer, smollm2.find_sample(path), self.args.tokens)
        with tempfile.TemporaryDirectory() as folder:
            lm, their_blocks = of_lm(self.args.sparge_lm, self.path, tokens, Path(folder))
        found, rows = {}, []
        for name in ("sdpa", "eager", *self.records):
            found[name] = surprise(self.model, name, tokens)
        layers = compare_masks(self.masks.blocks, their_blocks, lm[TUNED.name])
        density = {name: float(np.mean([c.density for c in record.calls]))
                   for name, record in self.records.items()}
        for attention, name, beside, bound in CASES:
            rough = attention != "f32" and self.args.spread
            rows.append({
                "attention": attention, "beside": beside, "text": path.stem,
                "tokens": len(tokens), "ours": found[name], "theirs":
                lm[attention]["surprise"] if beside == "sparge-lm" else found[beside.split()[-1]],
                "spread": spread(self.model, name, tokens, self.args.spread) if rough else math.nan,
                "density": density[name], "bound": bound
            })
        for record in self.records.values():
            record.clear()
        return rows, layers


def together(texts):
    """The rows of several texts, and after them those of all texts together."""
    rows = [row for text in texts for row in text]
    if len(texts) > 1:
        for same in zip(*texts):
            total = {key: sum(row[key] for row in same)
                     for key in ("tokens", "ours", "theirs", "density")}
            apart = [(row["ours"] - row["theirs"]) for row in same]
            rows.append({**same[0], **total, "text": f"{len(same)} texts", "count": len(same),
                         "density": total["density"] / len(same),
                         "spread": float(np.std(apart, ddof=1)) * math.sqrt(len(same))})
    return [shown(row) for row in rows]


def shown(row):
    """A row of the table: surprises as perplexities."""
    count = row["tokens"] - row.get("count", 1)
    apart = math.expm1((row["ours"] - row["theirs"]) / count)
    wide = row["spread"] / count
    return {
        "attention": row["attention"], "beside": row["beside"], "text": row["text"],
        "tokens": row["tokens"], "perplexity": f"{math.exp(row['ours'] / count):.7g}",
        "theirs": f"{math.exp(row['theirs'] / count):.7g}", "relative": f"{apart:.2e}",
        "bound": row["bound"], "spread": "" if math.isnan(wide) else f"{wide:.1e}",
        "density": f"{row['density']:.5f}", "within": "yes" if abs(apart) <= row["bound"] else "no",
        "wrong": abs(apart) > max(row["bound"], 0 if math.isnan(wide) else 4 * wide)
    }


def table(rows):
    """Lines with the columns side by side."""
    cells = [list(rows[0]), *([str(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(f"{x:>{w}}" for x, w in zip(line, widths)) for line in cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="of each text (default: 1024)")
    parser.add_argument("--texts", metavar="NAME|ROLE[,...]",
                        help="of experiments/capture/texts.csv (default: text.txt there)")
    parser.add_argument("--spread", type=int, metavar="RUNS",
                        help="runs with other last bits (default: 8, with --texts 0, and then the "
                             "spread is that of the texts)")
    parser.add_argument("--sparge-lm", type=Path, metavar="PROGRAM",
                        default=ROOT / "build/release/experiments/lm/sparge-lm")
    parser.add_argument("-o", "--output", type=Path, metavar="CSV",
                        help="(default: smollm2.csv here, with --texts smollm2_texts.csv; masks go "
                             "to ..._layers.csv beside it)")
    args = parser.parse_args()
    if args.spread is None:
        args.spread = 0 if args.texts else 8
    output = args.output or HERE / ("smollm2_texts.csv" if args.texts else "smollm2.csv")
    paths = [smollm2.DEFAULT.path]
    if args.texts:
        paths = texts.fetch(texts.select(args.texts.split(",")))
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    runs = Runs(args)
    found, masks = zip(*(runs.text(path) for path in paths))
    rows = together(found)
    layers = [{"layer": same[0]["layer"],
               **{key: sum(line[key] for line in same) for key in same[0] if key != "layer"}}
              for same in zip(*masks)]
    wrong = any([row.pop("wrong") for row in rows[-len(CASES):]])
    rows = [{key: x for key, x in row.items() if key != "wrong"} for row in rows]
    write_csv(output, rows)
    write_csv(output.with_name(output.stem + "_layers.csv"), layers)
    print(table(rows))
    total = {key: sum(line[key] for line in layers) for key in layers[0]}
    print(f"\n{total['differ']} of {total['visible']} blocks differ from what the q and k of "
          f"sparge-lm predict; {total['kept']} are kept here and {total['kept_sparge_lm']} there")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
