#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare sparge-lm with independent programs: tokens with Hugging Face's tokenizers, logits with
transformers.

    python -m venv build/verify-venv
    build/verify-venv/bin/pip install -r experiments/capture/requirements-verify.txt
    build/verify-venv/bin/python experiments/lm/verify.py

Real weights: the GGUF and the same weights as transformers saves them, 512 tokens. Random weights:
small models of every kind that sparge-lm knows, saved by transformers, so that what SmolLM2 does
not have is compared too (biases, scaled frequencies, several files). The outcome is written to
verify.json.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "experiments/capture")]

import model as weights  # noqa: E402
import smollm2  # noqa: E402
import texts  # noqa: E402
from harness import write_json  # noqa: E402

TOKENS = 512
STRINGS = 4000
SCRIPTS = {
    "Latin": (0x20, 0x24F), "Greek": (0x370, 0x3FF), "Cyrillic": (0x400, 0x4FF), "Hebrew":
    (0x590, 0x5FF), "Arabic": (0x600, 0x6FF), "Devanagari": (0x900, 0x97F), "Thai": (0xE00, 0xE7F),
    "Hangul": (0xAC00, 0xD7A3), "CJK": (0x4E00, 0x9FFF), "kana": (0x3040, 0x30FF), "punctuation":
    (0x2000, 0x206F), "symbols": (0x2190, 0x27BF), "emoji": (0x1F300, 0x1FAFF), "any":
    (0x20, 0x1FFFF),
}
SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u180e\u2000\u2003\u200b\u2028\u2029\u202f\u205f\u3000"


def sparge_lm(program, *options):
    done = subprocess.run([program, *map(str, options)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"sparge-lm {' '.join(map(str, options))[:200]}: {done.stderr.strip()}")
    return json.loads(done.stdout)


# ---- Tokens ----

def draw_strings(count):
    """Strings of one script or of several, with all kinds of white space, digits and
    contractions."""
    draw = random.Random(1)
    found = []
    while len(found) < count:
        low, high = SCRIPTS[draw.choice(list(SCRIPTS))]
        parts = []
        for _ in range(draw.randint(1, 40)):
            kind = draw.random()
            if kind < 0.15:
                parts.append(draw.choice(SPACES) * draw.randint(1, 3))
            elif kind < 0.25:
                parts.append(str(draw.randint(0, 10**draw.randint(1, 9))))
            elif kind < 0.3:
                parts.append(
                    draw.choice(["'s", "'LL", "don't", "I've", "...", "\r\n", "--", "«»"]))
            else:
                c = chr(draw.randint(low, high))
                if unicodedata.category(c) not in ("Cs",
                                                   "Cn"):  # Cn: not in the Unicode of this Python
                    parts.append(c)
        if any(parts):
            found.append("".join(parts))
    return found


def real_strings(count):
    """Pieces of the texts, cut anywhere."""
    draw = random.Random(2)
    whole = "".join(path.read_text() for path in texts.fetch(texts.select(["judge"])))
    return [
        whole[at:at + draw.randint(1, 2000)]
        for at in (draw.randrange(len(whole)) for _ in range(count))
    ]


def encode_ours(program, path, strings, folder):
    """Token numbers, or None where the vocabulary lacks a byte."""
    found = []
    for n in range(0, len(strings), 500):
        files = []
        for k, string in enumerate(strings[n:n + 500]):
            files.append(folder / f"{n + k}.txt")
            files[-1].write_bytes(string.encode())
        for m in range(0, len(files), 60):
            found += [
                t["tokens"] for t in sparge_lm(program, "tokens", path, *files[m:m + 60])["texts"]
            ]
    return found


def check_tokens(program, path, folder):
    reference = smollm2.make_tokenizer(gguf.GGUFReader(path))
    known = set(reference.get_vocab())
    shown = {
        b: c for b, c in zip([
            *range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173
        ], [chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]] +
                             [chr(256 + n) for n in range(68)])
    }
    missing = [b for b in range(256) if shown[b] not in known]  # sparge-lm refuses texts with them
    strings = [
        s for s in draw_strings(STRINGS) + real_strings(STRINGS // 4)
        if not set(missing) & set(s.encode())
    ]
    ours = encode_ours(program, path, strings, folder)
    theirs = [reference.encode(s).ids for s in strings]
    apart = [s for s, a, b in zip(strings, ours, theirs) if a != b]
    for string in apart[:5]:
        print("tokens apart:", ascii(string)[:200])
    return {
        "reference": f"tokenizers {tokenizers.__version__}", "strings": len(strings), "tokens":
        sum(map(len, theirs)), "bytes_without_token": missing, "strings_apart": len(apart)
    }


# ---- Logits ----

def theirs_of(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None],
                     use_cache=False).logits[0].double().numpy()


def ours_of(program, path, tokens, folder):
    np.save(folder / "ids.npy", tokens.astype(np.int32))
    row = sparge_lm(program, "ppl", path, folder / "ids.npy", "--attention", "f32", "--logits",
                    folder / "logits.npy")
    return np.load(folder / "logits.npy").astype(np.float64), row["rows"][0]["perplexity"]


def compare(ours, theirs, perplexity, tokens):
    top = theirs.max(axis=1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(theirs - top).sum(axis=1))
    losses = log_sum[:-1] - theirs[np.arange(len(tokens) - 1), tokens[1:]]
    return {
        "tokens": len(tokens),
        "largest_difference": float(f"{np.abs(ours - theirs).max():.2g}"),
        "standard_deviation_of_logits": round(float(theirs.std()), 4),
        "top_token_agreement": float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
        "perplexity": perplexity,
        "perplexity_theirs": round(float(np.exp(losses.mean())), 4),
    }


def check_real(program, path, folder):
    """The GGUF, and the same weights in float32 as .safetensors."""
    text = smollm2.DEFAULT
    tokens = smollm2.tokenise(smollm2.make_tokenizer(gguf.GGUFReader(path)), text, TOKENS)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                              dtype=torch.float32)
    theirs = theirs_of(model, tokens)
    plain = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder / "hf", max_shard_size="200MB")
    return {name: compare(*pair(ours_of(program, at, tokens, folder), theirs), tokens)
            for name, at in (("gguf", path), ("safetensors", folder / "hf"))}


def pair(ours, theirs):
    logits, perplexity = ours
    return logits, theirs, perplexity


def check_random(program, folder):
    """Models with random weights, wide enough that what is computed wrongly shows."""
    common = dict(vocab_size=500, hidden_size=96, intermediate_size=200, num_hidden_layers=3,
                  num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=4096,
                  initializer_range=0.2)
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)
    kinds = {
        "llama":
        transformers.LlamaConfig(**common), "llama, wide heads, tied":
        transformers.LlamaConfig(**common, head_dim=32, tie_word_embeddings=True), "llama 3.1":
        transformers.LlamaConfig(**common, rope_parameters=dict(scaling, rope_theta=500000.0)),
        "qwen2":
        transformers.Qwen2Config(**common),
    }
    tokens = np.random.default_rng(1).integers(0, 500, 300)
    found = {}
    for name, config in kinds.items():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "bias" in key or "norm" in key:
                    value.add_(0.3 * torch.randn_like(value))
        at = folder / name.replace(" ", "_").replace(",", "")
        model.save_pretrained(at, max_shard_size="300KB" if name == "qwen2" else "1GB")
        found[name] = compare(*pair(ours_of(program, at, tokens, folder), theirs_of(model, tokens)),
                              tokens)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparge-lm", default=str(ROOT / "build/release/experiments/lm/sparge-lm"),
                        help="the program")
    args = parser.parse_args()
    path = weights.fetch()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "reference":
            f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}",
            "tokens": check_tokens(args.sparge_lm, path, folder), "SmolLM2-135M-Instruct":
            check_real(args.sparge_lm, path,
                       folder), "random weights": check_random(args.sparge_lm, folder),
        }
    write_json(HERE / "verify.json", found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
