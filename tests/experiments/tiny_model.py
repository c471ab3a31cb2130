# SPDX-License-Identifier: Apache-2.0
"""Tiny language models for the tests of sparge-lm: random weights, files of them in both formats,
and a forward pass in float64 that shares nothing with the program but the papers (Llama: Touvron et
al. 2023; rotation: Su et al. 2021, in the pairing of Hugging Face)."""
import json
import os
import struct

import numpy as np

from running import save_safetensors, write

# ---- Elements as they stand in files ---------------------------------------------------------

GGML = dict(F32=0, F16=1, Q4_0=2, Q4_1=3, Q8_0=8, Q6_K=14, BF16=30)


def f16(bits):
    return bits.copy().view("<f2").astype(np.float64)


def draw(rng, kind, rows, columns, spread):
    """Random elements of a type: their bytes, and what they are. Of blocks it is the codes that are
    random."""
    if kind in ("F32", "F16", "BF16"):
        x = (rng.standard_normal((rows, columns)) * spread).astype("<f4")
        if kind == "BF16":
            raw = (x.view("<u4") >> 16).astype("<u2")
            return raw.tobytes(), (raw.astype("<u4") << 16).view("<f4").astype(np.float64)
        x = x.astype({"F32": "<f4", "F16": "<f2"}[kind])
        return x.tobytes(), x.astype(np.float64)
    size = 256 if kind == "Q6_K" else 32
    assert columns % size == 0
    n = rows * columns // size
    def steps(per_code):
        return (spread / per_code * rng.uniform(0.5, 1.5, n)).astype("<f2").view(np.uint8).reshape(
            n, 2)
    def code_bytes(count):
        return rng.integers(0, 256, (n, count), np.uint8)
    if kind == "Q8_0":
        step, code = steps(73), code_bytes(32)
        raw, x = [step, code], f16(step) * code.view(np.int8)
    elif kind in ("Q4_0", "Q4_1"):  # the low halves come first
        step, code = steps(4.6), code_bytes(16)
        both = np.concatenate([code & 15, code >> 4], 1).astype(np.float64)
        if kind == "Q4_0":
            raw, x = [step, code], f16(step) * (both - 8)
        else:
            low = (-7.5 * f16(step) + spread * rng.normal(0, 0.2, (n, 1))).astype("<f2").view(
                np.uint8).reshape(n, 2)
            raw, x = [step, low, code], f16(step) * both + f16(low)
    else:  # as ggml's dequantize_row_q6_K goes through it
        low, high, scale, step = code_bytes(128), code_bytes(64), code_bytes(16), steps(18.5 * 74)
        code, signed = np.zeros((n, 256)), scale.view(np.int8).astype(np.float64)
        for half in 0, 1:
            ql, qh, y = low[:, 64 * half:], high[:, 32 * half:], code[:, 128 * half:]
            for lane in range(32):
                y[:, lane] = (ql[:, lane] & 15 | (qh[:, lane] & 3) << 4) - 32.0
                y[:, lane + 32] = (ql[:, lane + 32] & 15 | (qh[:, lane] >> 2 & 3) << 4) - 32.0
                y[:, lane + 64] = (ql[:, lane] >> 4 | (qh[:, lane] >> 4 & 3) << 4) - 32.0
                y[:, lane + 96] = (ql[:, lane + 32] >> 4 | (qh[:, lane] >> 6 & 3) << 4) - 32.0
        raw, x = [low, high, scale, step], code * np.repeat(signed, 16, 1) * f16(step)
    return np.concatenate(raw, 1).tobytes(), x.reshape(rows, columns)


# ---- A model ---------------------------------------------------------------------------------

class Model:
    """Sizes, and random weights by the names of GGUF: raw is (type, shape, bytes) as it is in the
    file, w the values, with the rows of q and k in halves."""
    def __init__(self, seed=1, vocab=600, layers=2, dim=64, hidden=96, heads=4, kv_heads=2,
                 head_dim=16, context=8192, theta=10000.0, eps=1e-5, architecture="llama",
                 tied=False, name="tiny", kinds=None, usual="F32", interleaved=False,
                 divisors=None, window=None):
        self.__dict__.update((x, y) for x, y in locals().items() if x != "self")
        self.rng, self.raw, self.w, self.divisor = np.random.default_rng(seed), {}, {}, np.ones(
            head_dim // 2)
        width, narrow = heads * head_dim, kv_heads * head_dim
        self.add("token_embd.weight", vocab, dim, 1.0)
        self.add("output_norm.weight", None, dim, 0.2)
        if not tied:
            self.add("output.weight", vocab, dim, 2 / dim**0.5)
        for n in range(layers):
            at = f"blk.{n}."
            self.add(at + "attn_norm.weight", None, dim, 0.2)
            self.add(at + "attn_q.weight", width, dim, 1.5 / dim**0.5, heads)
            self.add(at + "attn_k.weight", narrow, dim, 1.5 / dim**0.5, kv_heads)
            self.add(at + "attn_v.weight", narrow, dim, 1 / dim**0.5)
            self.add(at + "attn_output.weight", dim, width, 1 / width**0.5)
            self.add(at + "ffn_norm.weight", None, dim, 0.2)
            self.add(at + "ffn_gate.weight", hidden, dim, 1 / dim**0.5)
            self.add(at + "ffn_up.weight", hidden, dim, 1 / dim**0.5)
            self.add(at + "ffn_down.weight", dim, hidden, 2 / hidden**0.5)
            if architecture == "qwen2":
                for x, size in ("q", width), ("k", narrow), ("v", narrow):
                    self.add(f"{at}attn_{x}.bias", None, size, 1.0)
        if divisors is not None:
            self.divisor = np.asarray(divisors, np.float32).astype(np.float64)
            self.raw["rope_freqs.weight"] = "F32", (head_dim //
                                                    2, ), self.divisor.astype("<f4").tobytes()

    def kind_of(self, name):
        own = (k for part, k in (self.kinds or {}).items() if part in name)
        return next(own, self.usual)

    def add(self, name, rows, columns, spread, turning=0):
        """rows None: a vector; of norms the mean is 1. turning: so many heads in neighbouring
        pairs, if they are."""
        norm, vector = "norm" in name, rows is None
        kind = self.kind_of(name) if not vector else "F32" if self.usual not in (
            "F16", "BF16") else self.usual
        raw, x = draw(self.rng, kind, rows or 1, columns, spread)
        if norm:
            x = x + 1
            top = x.astype("<f4") if kind != "F16" else x.astype("<f2")
            if kind == "BF16":
                top = (top.view("<u4") >> 16 << 16).view("<f4")
            x = top.astype(np.float64)
            raw = (
                top.view("<u4") >> 16).astype("<u2").tobytes() if kind == "BF16" else top.tobytes()
        self.raw[name] = kind, (columns,) if vector else (rows, columns), raw
        if turning and self.interleaved:
            x = x.reshape(turning, self.head_dim // 2, 2,
                          columns).swapaxes(1, 2).reshape(rows, columns)
        self.w[name] = x[0] if vector else x

    def replace(self, name, x):
        """Other values, in float32 and as they are."""
        x = np.asarray(x, "<f4")
        self.raw[name], self.w[name] = ("F32", x.shape, x.tobytes()), x.astype(np.float64)

    # ---- The forward pass ----

    def run(self, token):
        """Logits [tokens][vocab], and q, k, v of each layer, [heads][tokens][head_dim]."""
        w, n, d = self.w, len(token), self.head_dim
        x, seen = w["token_embd.weight"][token], []
        def norm(x, weight):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) +
                               np.float64(np.float32(self.eps))) * w[weight]
        def heads(x, count):
            return x.reshape(n, count, d).swapaxes(0, 1)
        turns = self.theta ** (-np.arange(0, d, 2) / d) / self.divisor
        angle = np.arange(n)[:, None] * turns
        cosine, sine = np.tile(np.cos(angle), 2), np.tile(np.sin(angle), 2)
        def rope(x):
            return x * cosine + np.concatenate([-x[..., d // 2:], x[..., :d // 2]], -1) * sine
        later = np.triu(np.ones((n, n), bool), 1)
        later |= np.tril(np.ones((n, n), bool), -(self.window or n))
        for layer in range(self.layers):
            at = f"blk.{layer}."
            h = norm(x, at + "attn_norm.weight")
            q, k, v = (heads(h @ w[f"{at}attn_{y}.weight"].T + w.get(f"{at}attn_{y}.bias", 0.0),
                             count) for y, count in (("q", self.heads), ("k", self.kv_heads),
                                                     ("v", self.kv_heads)))
            q, k = rope(q), rope(k)
            seen.append((q, k, v))
            group = self.heads // self.kv_heads
            s = q @ np.repeat(k, group, 0).swapaxes(1, 2) / np.sqrt(d)
            s[:, later] = -np.inf
            p = np.exp(s - s.max(-1, keepdims=True))
            o = p / p.sum(-1, keepdims=True) @ np.repeat(v, group, 0)
            x = x + o.swapaxes(0, 1).reshape(n, -1) @ w[at + "attn_output.weight"].T
            h = norm(x, at + "ffn_norm.weight")
            gate = h @ w[at + "ffn_gate.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) *
                     (h @ w[at + "ffn_up.weight"].T)) @ w[at + "ffn_down.weight"].T
        return norm(
            x,
            "output_norm.weight") @ w["token_embd.weight" if self.tied else "output.weight"].T, seen

    # ---- Its files ----

    def keys(self, tokenizer=None):
        a = self.architecture
        return {
            "general.architecture": a, "general.name": self.name, "some.list":
            [np.uint16(n)
             for n in range(9)], f"{a}.block_count": np.uint32(self.layers), f"{a}.context_length":
            np.uint32(self.context), f"{a}.embedding_length": np.uint32(self.dim),
            f"{a}.feed_forward_length": np.uint32(self.hidden), f"{a}.attention.head_count":
            np.uint32(self.heads), "some.flag": True, "some.other": np.float64(0.5),
            f"{a}.attention.head_count_kv": np.uint32(self.kv_heads), f"{a}.rope.freq_base":
            np.float32(self.theta), f"{a}.attention.key_length": np.uint32(self.head_dim),
            f"{a}.attention.layer_norm_rms_epsilon": np.float32(self.eps), **(tokenizer or {}),
        }

    def gguf(self, path, tokenizer=None, change=None, **how):
        """change: other or further keys; one that is None is left out."""
        keys = {
            k: v for k, v in {**self.keys(tokenizer), **(change or {})}.items() if v is not None
        }
        return write_gguf(path, keys, self.raw, **how)

    def folder(self, path, change=None, shards=1):
        """As Hugging Face has it."""
        os.mkdir(path)
        config = dict(model_type=self.architecture, num_hidden_layers=self.layers,
                      hidden_size=self.dim, intermediate_size=self.hidden,
                      num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
                      head_dim=self.head_dim, max_position_embeddings=self.context,
                      rms_norm_eps=self.eps, rope_theta=self.theta, hidden_act="silu",
                      tie_word_embeddings=self.tied)
        config.update(change or {})
        write(f"{path}/config.json", json.dumps({k: v for k, v in config.items() if v is not ...}))
        tensors = {
            theirs(name): raw for name, raw in self.raw.items() if name != "rope_freqs.weight"
        }
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = "F32", (2, ), bytes(
            8)  # as old ones have it
        if shards == 1:
            save_safetensors(f"{path}/model.safetensors", **tensors)
            return path
        place, names = {}, list(tensors)
        for n in range(shards):
            file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
            save_safetensors(f"{path}/{file}", **{name: tensors[name] for name in names[n::shards]})
            place.update((name, file) for name in names[n::shards])
        write(f"{path}/model.safetensors.index.json",
              json.dumps({"metadata": {}, "weight_map": place}))
        return path


def theirs(name):
    """What Hugging Face calls a tensor."""
    if not name.startswith("blk."):
        return {
            "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight":
            "model.norm.weight", "output.weight": "lm_head.weight"
        }[name]
    _, layer, part, what = name.split(".")
    part = dict(attn_norm="input_layernorm", attn_q="self_attn.q_proj", attn_k="self_attn.k_proj",
                attn_v="self_attn.v_proj", attn_output="self_attn.o_proj",
                ffn_norm="post_attention_layernorm", ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj",
                ffn_down="mlp.down_proj")[part]
    return f"model.layers.{layer}.{part}.{what}"


def surprise(logits, token):
    """The mean of -log of the probabilities of tokens after the first."""
    top = logits.max(-1, keepdims=True)
    log = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
    return float((log[:-1] - logits[np.arange(len(token) - 1), token[1:]]).mean())


# ---- GGUF ------------------------------------------------------------------------------------

SCALARS = {
    np.uint8: (0, "<B"), np.int8: (1, "<b"), np.uint16: (2, "<H"), np.int16: (3, "<h"), np.uint32:
    (4, "<I"), np.int32: (5, "<i"), np.float32: (6, "<f"), bool: (7, "<?"), np.uint64: (10, "<Q"),
    np.int64: (11, "<q"), np.float64: (12, "<d")
}


def gguf_string(text):
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text


def gguf_value(x):
    """The number of its type, and its bytes."""
    if isinstance(x, (str, bytes)):
        return 8, gguf_string(x)
    if isinstance(x, list):
        items = [gguf_value(y) for y in x]
        return 9, struct.pack("<IQ", items[0][0] if items else 8, len(items)) + b"".join(
            raw for _, raw in items)
    number, form = SCALARS[type(x)]
    return number, struct.pack(form, x)


def gguf_bytes(keys, tensors, version=3, alignment=32, magic=b"GGUF"):
    """tensors: by name a type (of ggml: a word, or its number), the shape, and bytes. They stand in
    another order than their data."""
    if alignment != 32:
        keys = {**keys, "general.alignment": np.uint32(alignment)}
    head = magic + struct.pack("<IQQ", version, len(tensors), len(keys))
    for key, value in keys.items():
        number, raw = gguf_value(value)
        head += gguf_string(key) + struct.pack("<I", number) + raw
    data, table = b"", []
    for name, (kind, shape, raw) in tensors.items():
        data += bytes(-len(data) % alignment)
        table.append(
            gguf_string(name) + struct.pack("<I", len(shape)) +
            struct.pack(f"<{len(shape)}Q", *shape[::-1]) +
            struct.pack("<IQ", GGML.get(kind, kind), len(data)))
        data += raw
    head += b"".join(table[::-1])
    return head + bytes(-len(head) % alignment) + data


def write_gguf(path, keys, tensors, **how):
    return write(path, gguf_bytes(keys, tensors, **how))
