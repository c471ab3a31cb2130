# SPDX-License-Identifier: Apache-2.0
"""Compare the numpy model of smollm2.py with two independent programs on the same GGUF and text.

llama.cpp uses its own tokenizer, reader and 4-bit kernels (which also round the activations to 8
bits, so its logits differ slightly). transformers uses the dequantized weights in float32, and
its q, k, v are compared with the captured files. The outcome is added to the manifest.
"""

import argparse
import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import model as weights
import smollm2  # first: it finds harness.py
from harness import write_json

TORCH = torch.__version__.split("+")[0]
FIRST = 512  # positions of the first top-token comparison


def check_dequantization(tensors: dict) -> None:
    """Compares the library's values of one Q4_1 and one Q8_0 tensor with the formats' definition.

    A Q4_1 block is a float16 scale, a float16 minimum and 32 4-bit numbers, of which byte i holds
    number i (low) and i + 16 (high); a Q8_0 block is a float16 scale and 32 signed bytes.
    """
    def numbers(data: np.ndarray, dtype: str) -> np.ndarray:
        return np.ascontiguousarray(data).view(dtype).astype(np.float32)

    tensor = tensors["blk.0.attn_q.weight"]
    blocks = tensor.data.reshape(-1, 20)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    q4_1 = nibbles * numbers(blocks[:, :2], "<f2") + numbers(blocks[:, 2:4], "<f2")
    assert np.array_equal(q4_1.ravel(), gguf.dequantize(tensor.data, tensor.tensor_type).ravel())

    tensor = tensors["token_embd.weight"]
    blocks = tensor.data.reshape(-1, 34)
    q8_0 = numbers(blocks[:, 2:], "i1") * numbers(blocks[:, :2], "<f2")
    assert np.array_equal(q8_0.ravel(), gguf.dequantize(tensor.data, tensor.tensor_type).ravel())


def compare(logits: np.ndarray, tokens: np.ndarray, losses: np.ndarray, top: np.ndarray) -> dict:
    """Perplexity of logits [N, V], and how often their likeliest token is the one in top [N]."""
    peak = logits.max(axis=1, keepdims=True)
    log_sum = peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1))
    theirs = log_sum[:-1] - logits[np.arange(len(tokens) - 1), tokens[1:]]
    perplexity = np.exp(theirs.mean(dtype=np.float64))
    difference = perplexity - np.exp(losses.mean(dtype=np.float64))
    same = logits.argmax(axis=1) == top
    return {
        "perplexity": round(float(perplexity), 4),
        "perplexity_difference": float(f"{difference:.1e}"),
        f"top_token_agreement_first_{FIRST}": round(float(same[:FIRST].mean()), 4),
        "top_token_agreement": round(float(same.mean()), 4),
    }


def check_llama_cpp(path: Path, text: Path, tokens: np.ndarray, losses: np.ndarray,
                    top: np.ndarray) -> dict:
    """Tokens, perplexity and likeliest tokens of llama.cpp."""
    model = llama_cpp.Llama(str(path), n_ctx=len(tokens), logits_all=True, verbose=False)
    theirs = model.tokenize(text.read_bytes(), add_bos=False)[:len(tokens)]
    model.eval(tokens.tolist())
    return {
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "same_tokens": theirs == tokens.tolist(),
        **compare(model.scores[:len(tokens)], tokens, losses, top),
    }


def check_transformers(path: Path, manifest: dict, folder: Path, tokens: np.ndarray,
                       losses: np.ndarray, top: np.ndarray) -> dict:
    """Perplexity, likeliest tokens and the q, k, v that the attention of transformers is given."""
    wanted = {entry["layer"]: entry for entry in manifest["files"]}
    worst = {"q": 0.0, "k": 0.0, "v": 0.0}

    def attend(module, query, key, value, attention_mask, **options):
        entry = wanted.get(module.layer_idx)
        if entry:
            ours = load_file(folder / entry["file"])
            groups = entry["kv_heads"] if "kv_heads" in entry else [entry["kv_head"]]
            theirs = {"q": query[:, entry["query_heads"]], "k": key[:, groups],
                      "v": value[:, groups]}
            for name, tensor in theirs.items():
                error = np.abs(tensor.numpy() - ours[name]).max() / np.abs(ours[name]).max()
                worst[name] = float(np.maximum(worst[name], error))  # NaN is the worst
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    transformers.utils.logging.disable_progress_bar()
    AttentionInterface.register("compare", attend)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32)
    model.set_attn_implementation("compare")
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    return {
        "version": f"transformers {transformers.__version__}, torch {TORCH}",
        **compare(logits, tokens, losses, top),
        "largest_qkv_difference_over_largest_value": {
            name: float(f"{error:.1e}") for name, error in worst.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=weights.CACHE,
                        help="folder of the downloaded model (default: build/models)")
    parser.add_argument("--out", type=Path, default=smollm2.OUT,
                        help="folder that smollm2.py wrote (default: smollm2-135m)")
    parser.add_argument("--text", type=Path, default=smollm2.DEFAULT.path, metavar="FILE",
                        help="text that it was given (default: text.txt)")
    args = parser.parse_args()

    manifest_path = args.out / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    sample = smollm2.find_sample(args.text)
    if sample.sha256 != manifest["text_sha256"]:
        smollm2.fail(f"{args.text} is not the text of {args.out}")
    path = weights.fetch(args.cache)
    reader = gguf.GGUFReader(path)
    model = smollm2.Model(reader)
    check_dequantization(model.tensors)
    tokens = smollm2.tokenise(smollm2.make_tokenizer(reader), sample, manifest["tokens"])
    losses, top = model.score(model.run(tokens, lambda *_: None), tokens)
    manifest["verification"] = {
        "llama.cpp": check_llama_cpp(path, sample.path, tokens, losses, top),
        "transformers": check_transformers(path, manifest, args.out, tokens, losses, top),
    }
    write_json(manifest_path, manifest, indent=2, allow_nan=False)
    print(json.dumps(manifest["verification"], indent=2))


if __name__ == "__main__":
    main()
