# SPDX-License-Identifier: Apache-2.0
"""Attention by the textbook, in float64, and draws of what it is asked."""
import numpy as np


def visible(is_causal, q_len, k_len):
    """[Nq, Nk]: which pairs causality leaves."""
    shift = {False: k_len, True: 0, "start": 0, "end": k_len - q_len}[is_causal]
    return np.arange(k_len) <= np.arange(q_len)[:, None] + shift


def attention(q, k, v, keep, scale=None, k_bias=None):
    """o and lse of [B, H, N, D]; keep is [Nq, Nk] or [B, H, Nq, Nk]. No key: 0 and -inf."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, 1) for x in (k, v))
    s = np.einsum("bhqd,bhkd->bhqk", q, k) * (1 / np.sqrt(q.shape[-1]) if scale is None else scale)
    if k_bias is not None:
        s = s + np.repeat(k_bias, group, 1)[:, :, None]
    s = np.where(keep, s, -np.inf)
    top = np.max(s, -1, initial=-np.inf, keepdims=True)
    p = np.exp(s - np.where(np.isinf(top), 0, top))
    with np.errstate(divide="ignore", invalid="ignore"):
        total = p.sum(-1, keepdims=True)
        o = np.where(total == 0, 0, p @ v / total)
        return o, (np.log(total) + top)[..., 0]


def bound(q, k, v, scale=None):
    """How far attention computed in float32 may be from attention(): what float32 rounds of a score
    (D products and as many sums, the scale, the bias), and then of exp, the sums over Nk keys and
    the division. A change of all scores by at most x changes a mean of values by at most 2 x
    max|v|."""
    q, k, v = (np.abs(np.asarray(x).astype(np.float64)) for x in (q, k, v))
    if not q.size or not k.size or not v.size:
        return 0.0
    dim, k_len = q.shape[-1], k.shape[-2]
    score = q.max() * k.max() * dim * (1 / np.sqrt(dim) if scale is None else scale)
    unit = 2.0**-24
    return 2 * v.max() * ((dim + 4) * unit * score + (k_len + 16) * unit)


def draw(rng, dtype="float32", lengths=(0, 200), dims=(1, 16, 33, 64)):
    """q, k and v of any sizes."""
    batch, group, kv_heads = (int(n) for n in rng.integers(1, (3, 4, 3)))
    q_len, k_len = (int(n) for n in rng.integers(lengths[0], lengths[1] + 1, 2))
    dim, dim_v = (int(n) for n in rng.choice(dims, 2))
    return [rng.standard_normal(shape).astype(dtype) for shape in (
        (batch, kv_heads * group, q_len, dim), (batch, kv_heads, k_len, dim),
        (batch, kv_heads, k_len, dim_v))]
