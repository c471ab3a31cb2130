# SPDX-License-Identifier: Apache-2.0
"""Capture q, k, v of SmolLM2-135M-Instruct on real texts.

Fetches a pinned package that carries the model as a 4-bit GGUF, runs it in numpy float32 on the
first tokens of text.txt or of other texts, and writes q, k and v of some (layer, key head) pairs or
of all layers, as they are after the position embedding and before the softmax scale, with a
manifest that holds the perplexity.
"""

import argparse
import csv
import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the number of threads changes how products are rounded

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import save
from tokenizers import decoders, models, pre_tokenizers

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import model as weights
import texts
from harness import write_json, writing

OUT = HERE / "smollm2-135m"
OUT_TEXTS = HERE.parents[1] / "build" / "captures"

QUERY_BLOCK = 128  # rows of a query block, in the attention and in the survey
KEY_BLOCK = 64  # keys of a key block in the survey
LOGIT_ROWS = 256  # positions whose logits are held at a time


@dataclass(frozen=True)
class Sample:
    """A text to run the model on, and what the manifest says of it."""

    path: Path
    sha256: str
    licence: str
    source: str
    name: str = ""  # in texts.csv, where it stands there
    tokens: int = 0  # of the whole text, as texts.csv says; 0: not known

    @classmethod
    def of(cls, path: Path, text: texts.Text) -> "Sample":
        """A text of texts.csv that lies at path."""
        return cls(path, text.sha256, text.licence, text.source, text.name, text.tokens)


DEFAULT = Sample(
    HERE / "text.txt", "a447dc3bbf622c1e4cd5ee56b99e5454f20db70221d84eeacc33dc97cd05a70a",
    "public domain", "article 'Atomic Commit In SQLite', atomiccommit.html of the Debian package "
    "sqlite3-doc 3.40.1-2+deb12u2")


def fail(message: str) -> None:
    """Ends the program with one line on standard error."""
    sys.exit(f"smollm2: {message}")


def sha256(data: bytes) -> str:
    """SHA-256 of data as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def make_tokenizer(reader: gguf.GGUFReader) -> tokenizers.Tokenizer:
    """Byte-level BPE from the vocabulary and merges of the GGUF, splitting digits one by one."""
    def field(name: str):
        return reader.fields[f"tokenizer.ggml.{name}"].contents()

    if (field("model"), field("pre")) != ("gpt2", "smollm"):
        fail("the GGUF's tokenizer is not the expected one")
    vocab = {token: i for i, token in enumerate(field("tokens"))}
    merges = [tuple(merge.split(" ")) for merge in field("merges")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def find_sample(path: Path) -> Sample:
    """The text in a file: the default one, one of texts.csv, or one of which nothing is known."""
    if path.resolve() == DEFAULT.path:
        return DEFAULT
    if not path.is_file():
        fail(f"there is no file {path}")
    digest = sha256(path.read_bytes())
    for text in texts.read_table().values():
        if digest == text.sha256:
            return Sample.of(path, text)
    return Sample(path, digest, "unknown", "unknown")


def tokenise(tokenizer: tokenizers.Tokenizer, sample: Sample, count: int) -> np.ndarray:
    """First count tokens of the text: int64 [N]."""
    data = sample.path.read_bytes()
    if sha256(data) != sample.sha256:
        fail(f"{sample.path.name} has the wrong SHA-256")
    text = data.decode("utf-8")
    ids = tokenizer.encode(text).ids
    if tokenizer.decode(ids) != text:
        fail(f"the tokenizer does not give {sample.path.name} back")
    if sample.tokens not in (0, len(ids)):
        fail(f"{sample.path.name} has {len(ids)} tokens, not {sample.tokens}")
    if len(ids) < count:
        fail(f"{sample.path.name} has only {len(ids)} tokens")
    return np.array(ids[:count], dtype=np.int64)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMS normalisation of x [N, D] over its last axis, times weight [D]."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotary position embedding of x [H, N, d], channel i paired with channel i + d/2."""
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half) / half)
    angle = np.arange(x.shape[1])[:, None] * frequency
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray,
              weigh: bool) -> tuple[np.ndarray, np.ndarray]:
    """Causal grouped attention of q [H, N, d] with k, v [G, N, d], one query block at a time.

    Returns the output [H, N, d] and, if weigh, the attention mass [H, query blocks, key blocks]:
    the mean over the rows of a query block of the probability they give to a key block.
    """
    heads, n, d = q.shape
    per_group = heads // k.shape[0]
    out = np.empty_like(q)
    mass = np.zeros((heads, -(-n // QUERY_BLOCK), -(-n // KEY_BLOCK)), dtype=np.float32)
    for start in range(0, n, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, n)
        future = np.triu(np.ones((end - start, end - start), dtype=bool), 1)
        for h in range(heads):
            g = h // per_group
            p = q[h, start:end] @ k[g, :end].T
            p *= np.float32(d ** -0.5)
            p[:, start:][future] = -np.inf
            p -= p.max(axis=1, keepdims=True)
            np.exp(p, out=p)
            p /= p.sum(axis=1, keepdims=True)
            out[h, start:end] = p @ v[g, :end]
            if weigh:
                sums = np.add.reduceat(p.mean(axis=0), np.arange(0, end, KEY_BLOCK))
                mass[h, start // QUERY_BLOCK, :len(sums)] = sums
    return out, mass


class Model:
    """The model's hyper-parameters, and its weights dequantized to float32 on demand."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        def field(name: str):
            return reader.fields[f"llama.{name}"].contents()

        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.layers = field("block_count")
        self.heads = field("attention.head_count")
        self.kv_heads = field("attention.head_count_kv")
        self.head_dim = field("rope.dimension_count")
        self.theta = field("rope.freq_base")
        self.eps = np.float32(field("attention.layer_norm_rms_epsilon"))
        self.quantization = self.tensors["blk.0.attn_q.weight"].tensor_type.name

    def weight(self, name: str) -> np.ndarray:
        """One tensor as float32, a matrix as [outputs, inputs]."""
        tensor = self.tensors[f"{name}.weight"]
        return gguf.dequantize(tensor.data, tensor.tensor_type)

    def projection(self, name: str, heads: int) -> np.ndarray:
        """A query or key matrix [heads * d, D] in half-split channel order.

        The GGUF interleaves the two halves of each head (row 2i + j is channel i + j * d/2).
        """
        w = self.weight(name)
        return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

    def qkv(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q [H, N, d] and k, v [G, N, d] of the normalised input x [N, D], q and k after RoPE."""
        def split(w: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray((x @ w.T).reshape(len(x), -1, self.head_dim).swapaxes(0, 1))

        q = split(self.projection(f"blk.{layer}.attn_q", self.heads))
        k = split(self.projection(f"blk.{layer}.attn_k", self.kv_heads))
        v = split(self.weight(f"blk.{layer}.attn_v"))
        return rope(q, self.theta), rope(k, self.theta), v

    def feed_forward(self, layer: int, x: np.ndarray) -> np.ndarray:
        """SwiGLU of the normalised input x [N, D]."""
        gate = x @ self.weight(f"blk.{layer}.ffn_gate").T
        up = x @ self.weight(f"blk.{layer}.ffn_up").T
        return (gate / (1 + np.exp(-gate)) * up) @ self.weight(f"blk.{layer}.ffn_down").T

    def run(self, tokens: np.ndarray, visit: Callable, weigh: bool = False) -> np.ndarray:
        """Final hidden states [N, D]; calls visit(layer, q, k, v, mass) in each layer.

        The attention mass is zero unless weigh.
        """
        x = self.weight("token_embd")[tokens]
        for layer in range(self.layers):
            h = rms_norm(x, self.weight(f"blk.{layer}.attn_norm"), self.eps)
            q, k, v = self.qkv(layer, h)
            out, mass = attention(q, k, v, weigh)
            visit(layer, q, k, v, mass)
            out = out.swapaxes(0, 1).reshape(len(x), -1)
            x = x + out @ self.weight(f"blk.{layer}.attn_output").T
            h = rms_norm(x, self.weight(f"blk.{layer}.ffn_norm"), self.eps)
            x = x + self.feed_forward(layer, h)
        return rms_norm(x, self.weight("output_norm"), self.eps)

    def score(self, hidden: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihood [N - 1] of each next token, and the likeliest next tokens [N]."""
        embedding = self.weight("token_embd")
        losses, top = [], []
        for start in range(0, len(tokens), LOGIT_ROWS):
            logits = hidden[start:start + LOGIT_ROWS] @ embedding.T
            top.append(logits.argmax(axis=1))
            following = tokens[start + 1:start + 1 + len(logits)]
            logits = logits[:len(following)]
            peak = logits.max(axis=1)
            log_sum = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
            losses.append(log_sum - logits[np.arange(len(following)), following])
        return np.concatenate(losses), np.concatenate(top)


def survey_rows(layer: int, mass: np.ndarray, kv_heads: int) -> list[list]:
    """For each key head: how many of the key blocks it sees a query block needs for 95 % of mass.

    Given are the mean over the query blocks and heads of that fraction, and the needed blocks of
    all of them over all the visible ones (the density that a block-sparse kernel would have).
    """
    heads, query_blocks, key_blocks = mass.shape
    visible = np.minimum((np.arange(query_blocks) + 1) * (QUERY_BLOCK // KEY_BLOCK), key_blocks)
    ordered = np.sort(mass, axis=2)[:, :, ::-1].cumsum(axis=2)
    needed = np.minimum((ordered < 0.95).sum(axis=2) + 1, visible)
    needed = needed.reshape(kv_heads, heads // kv_heads, query_blocks)
    return [[layer, group, f"{np.mean(needed[group] / visible):.4f}",
             f"{needed[group].sum() / (visible.sum() * needed.shape[1]):.4f}"]
            for group in range(kv_heads)]


def write_capture(folder: Path, layer: int, groups: list[int], model: Model,
                  q: np.ndarray, k: np.ndarray, v: np.ndarray) -> dict:
    """Writes these GQA groups as float16 [1, heads, N, d] and returns their manifest entry."""
    per_group = model.heads // model.kv_heads
    query_heads = [group * per_group + i for group in groups for i in range(per_group)]
    whole = len(groups) == model.kv_heads
    path = folder / f"layer{layer:02d}{'' if whole else f'_group{groups[0]}'}.safetensors"
    tensors = {"q": q[None, query_heads], "k": k[None, groups], "v": v[None, groups]}
    tensors = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        fail(f"layer {layer} does not fit into float16")
    with writing(path, "wb") as file:
        file.write(save(tensors))
    return {
        "file": path.name,
        "sha256": sha256(path.read_bytes()),
        "layer": layer,
        "query_heads": query_heads,
        **({"kv_heads": groups} if whole else {"kv_head": groups[0]}),
        "positions": [0, q.shape[1] - 1],
        "tokens": q.shape[1],
        "dtype": "float16",
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }


def make_manifest(model: Model, sample: Sample, tokens: np.ndarray, losses: np.ndarray,
                  files: list[dict], command: str) -> dict:
    """Everything needed to read the files and to make them again."""
    return {
        "model": "SmolLM2-135M-Instruct",
        "model_licence": weights.LICENCE,
        "package": weights.PACKAGE,
        "package_version": weights.VERSION,
        "wheel_sha256": weights.WHEEL_SHA256,
        "gguf": weights.GGUF,
        "gguf_sha256": weights.GGUF_SHA256,
        "quantization": f"{model.quantization} matrices, Q8_0 embedding, F32 norms; run in float32",
        "n_layers": model.layers,
        "n_heads": model.heads,
        "n_kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        **({"sample": sample.name} if sample.name else {}),
        "text": sample.path.name,
        "text_sha256": sample.sha256,
        "text_licence": sample.licence,
        "text_source": sample.source,
        "token_ids_int32_le_sha256": sha256(tokens.astype("<i4").tobytes()),
        "tokens": len(tokens),
        "layout": "BHND",
        "hook_point": "after RoPE, before the softmax scale",
        "channel_order": "half-split: channel i is rotated with i + 32, as in Hugging Face",
        "rope_theta": model.theta,
        "softmax_scale": model.head_dim ** -0.5,
        "causal": True,
        "files": files,
        "perplexity": round(float(np.exp(losses.mean(dtype=np.float64))), 4),
        "perplexity_tokens": len(losses),
        "command": command,
    }


def parse_captures(text: str, model: Model) -> list[tuple[int, list[int]]]:
    """'1:0,15:2' as [(1, [0]), (15, [2])]: layer and key heads of each file. 'all': every layer."""
    if text == "all":
        return [(layer, list(range(model.kv_heads))) for layer in range(model.layers)]
    return [(int(layer), [int(group)]) for layer, group in
            (pair.split(":") for pair in text.split(","))]


def capture(model: Model, tokenizer: tokenizers.Tokenizer, sample: Sample, out: Path,
            command: str, args: argparse.Namespace) -> None:
    """Runs the model on one text and writes the captures and the manifest into out."""
    seconds = time.perf_counter()
    tokens = tokenise(tokenizer, sample, args.tokens)
    captures = parse_captures(args.capture, model)
    out.mkdir(parents=True, exist_ok=True)
    files, rows = [], []

    def visit(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, mass: np.ndarray) -> None:
        if args.survey:
            rows.extend(survey_rows(layer, mass, model.kv_heads))
        for groups in (groups for wanted, groups in captures if wanted == layer):
            files.append(write_capture(out, layer, groups, model, q, k, v))

    losses, _ = model.score(model.run(tokens, visit, weigh=args.survey is not None), tokens)
    manifest = make_manifest(model, sample, tokens, losses, files, command)
    write_json(out / "manifest.json", manifest, indent=2)
    if args.survey:
        with writing(args.survey, newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["layer", "kv_group", "mean_fraction_95", "total_fraction_95"])
            writer.writerows(rows)
    print(f"{sample.path.name}: perplexity {manifest['perplexity']} over {len(losses)} tokens; "
          f"{len(files)} captures in {out}; {time.perf_counter() - seconds:.0f} s", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=weights.CACHE,
                        help="folder of the downloaded model (default: build/models)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, default=DEFAULT.path, metavar="FILE",
                      help="text to run (default: text.txt)")
    text.add_argument("--texts", metavar="NAME|ROLE[,...]",
                      help="run these texts of texts.csv, each into a folder of its name")
    parser.add_argument("--out", type=Path,
                        help="folder for the captures and manifest.json (default: smollm2-135m; "
                             "with --texts build/captures, which gets the folders)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of text to run")
    parser.add_argument(
        "--capture", default="6:2,12:1,21:0",
        help="layer:key-head pairs to write (default: %(default)s), or 'all': every "
        "layer in a file, with all heads")
    parser.add_argument("--survey", type=Path, metavar="CSV",
                        help="also write here how concentrated the attention of each group is")
    args = parser.parse_args()
    if args.texts and args.survey:
        parser.error("--survey is for one text: use --text")
    if args.text.resolve() != DEFAULT.path and not args.out:
        parser.error("--text needs --out")
    return args


def main() -> None:
    args = parse_args()
    command = "python experiments/capture/smollm2.py"
    options = f"--tokens {args.tokens} --capture {args.capture}"
    if args.texts:
        wanted = texts.select(args.texts.split(","))
        out = args.out or OUT_TEXTS
        runs = [(Sample.of(path, text), out / text.name, f"{command} --texts {text.name} {options}")
                for text, path in zip(wanted, texts.fetch(wanted))]
    else:
        sample = find_sample(args.text)
        text = f"--text {args.text} --out {args.out} " if args.out and sample != DEFAULT else ""
        runs = [(sample, args.out or OUT, f"{command} {text}{options}")]
    reader = gguf.GGUFReader(weights.fetch(args.cache))
    model = Model(reader)
    tokenizer = make_tokenizer(reader)
    for sample, out, command in runs:
        capture(model, tokenizer, sample, out, command, args)


if __name__ == "__main__":
    main()
