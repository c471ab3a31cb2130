# SPDX-License-Identifier: Apache-2.0
"""Records models with sparge.capture as its users do: python3 recorder.py [PATH-OF-SPARGE
[TEST...]]

The models are tiny, of random weights, of transformers and diffusers
(tests/python/requirements-torch.txt). What attention gave in them is compared with a
softmax in float64 over the recorded files: it may differ by what rounding q, k and v to the type of
the file can do, which is bounded for every row. Rules and refusals are looked at in a model that
does nothing but attention. With the program, sparge reads what was recorded. Ends with "N passed, M
failed".
"""
import contextlib
import functools
import importlib.util
import io
import itertools
import json
import os
import sys
import types
import warnings
from pathlib import Path

if missing := [
        name for name in ("torch", "transformers", "diffusers")
        if not importlib.util.find_spec(name)
]:
    print(f"skipped: {', '.join(missing)}: not on this machine")
    sys.exit()
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
sys.dont_write_bytecode = True
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

sys.path.append(os.path.join(os.path.dirname(__file__), "../support"))
from counted import check, run_tests
from running import FILE, commands_of, read, sha256, write

ROOT = Path(__file__).resolve().parents[2]
from sparge import _files
from sparge.capture import HEADER, Recorder

SPARGE = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else None
warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
diffusers.logging.set_verbosity_error()
HALF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}


# ---- What was recorded, and what it should be -------------------------------------------------

def manifest_of(folder):
    return json.loads(read(f"{folder}/manifest.json"))


def load(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def softmax_of(q, k, v, entry):
    """Attention of [B, H, N, D] in float64; and for each row how far the rounding of q, k and v can
    move it."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    k, v = (x.repeat(q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    unit = HALF[entry["dtype"]]
    s = entry["softmax_scale"] * q @ k.swapaxes(2, 3)
    off = entry["softmax_scale"] * np.abs(q) @ np.abs(k).swapaxes(2, 3) * 2.1 * unit
    if entry["causal"]:
        start = entry.get("causal_at") == "start" or s.shape[2] == s.shape[3]
        seen = np.tril(np.ones(s.shape[2:], bool), 0 if start else s.shape[3] - s.shape[2])
        s, off = np.where(seen, s, -np.inf), np.where(seen, off, 0)
    p = np.exp(s - s.max(axis=3, keepdims=True))
    p /= p.sum(axis=3, keepdims=True)
    largest = np.abs(v).max(axis=2, keepdims=True)
    allowed = (np.expm1(2 * off.max(axis=3, keepdims=True)) + 1.1 * unit) * largest
    return p @ v, allowed


@contextlib.contextmanager
def watched():
    """A list that gets q, k, v and the output of every call of attention, as torch computes it."""
    real, calls = F.scaled_dot_product_attention, []

    def watch(query, key, value, **how):
        calls.append((query, key, value, real(query, key, value, **how)))
        return calls[-1][-1]

    F.scaled_dot_product_attention = watch
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = real


def same_as_model(what, folder, calls, per_step, own=1e-5):
    """Every file of the folder gives what attention gave in the model: calls, per_step of them in a
    step. own: what the model's attention has of rounding errors, of the largest output."""
    manifest = manifest_of(folder)
    for entry in manifest["files"]:
        path = f"{folder}/{entry['file']}"
        x = load(path)
        truth = calls[entry["step"] * per_step + entry["layer"]][-1][entry["batch"]]
        truth = truth.reshape(truth.shape[0], entry["n_heads"], entry["tokens"],
                              -1)[:, entry["query_heads"]]
        got, allowed = softmax_of(x["q"], x["k"], x["v"], entry)
        error = np.abs(got - truth.double().numpy())
        check(
            error.shape == x["q"].shape[:3] + x["v"].shape[3:] and
            (error <= allowed + own * np.abs(got).max()).all(),
            f"{what}: {path}: the model's attention", error.max())
        other = softmax_of(x["q"], -x["k"], x["v"], entry)[0]
        check((np.abs(other - got) > 3 * allowed).any(),
              f"{what}: {path}: another one than with other keys")
        check(
            entry["sha256"] == sha256(path) and {n: list(t.shape)
                                                 for n, t in x.items()} == entry["shapes"] and
            {str(t.dtype) for t in x.values()} == {f"torch.{entry['dtype']}"},
            f"{what}: {path} as listed", entry)
        check(entry["file"] == f"layer{entry['layer']:02}_step{entry['step']:03}.safetensors",
              "its name", entry)
        check(
            x["k"].shape[1] == len(entry["kv_heads"]) and
            x["q"].shape[1] == len(entry["query_heads"]), "heads")
    return manifest


def lively(model, seed=1, gain=1.5):
    """Weights so large that attention differs from a mean."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, gain / p[0].numel() ** 0.5)
    return model.eval()


def refused(error, words, do, *args, **how):
    try:
        do(*args, **how)
    except error as e:
        check(all(w in str(e) for w in words) and "\n" not in str(e), f"says {words}", repr(str(e)))
        return
    check(False, f"refused: {words}")


# ---- Models of transformers -------------------------------------------------------------------

SMALL = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
             num_attention_heads=4)


def llama(seed=1, **more):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=32, **more)
    return lively(transformers.LlamaForCausalLM(config), seed)


def tokens(n, batch=1, seed=2):
    return torch.randint(0, 64, (batch, n), generator=torch.Generator().manual_seed(seed))


def recorded(what, model, run, per_step, steps=2, own=1e-5, **how):
    """Runs it some times while it is recorded; the manifest. Its output must not change."""
    with torch.inference_mode(), watched() as calls:
        before = run()
        calls.clear()
        with Recorder(model, "out", name=what, **how) as record:
            record.begin(what, prompt="x")
            after = [run() for _ in range(steps)]
    check(all(torch.equal(before[0], x[0]) for x in after),
          f"{what}: what the model gives stays the same")
    check(len(calls) == steps * per_step, f"{what}: calls", len(calls))
    return same_as_model(what, f"out/{what}", calls, per_step, own), calls


def test_transformers():
    vit = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
               image_size=32, patch_size=4)
    picture = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    models = {
        "llama": (llama(), lambda m: m(tokens(150), return_dict=False), 3, (4, 2, 32), True),
        "qwen2": (lively(
            transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL,
                                                                   num_key_value_heads=1))),
                  lambda m: m(tokens(70, 2), return_dict=False), 3, (4, 1, 16), True), "bert":
        (lively(transformers.BertModel(transformers.BertConfig(**SMALL))),
         lambda m: m(tokens(33), return_dict=False), 3, (4, 4, 16), False), "vit":
        (lively(transformers.ViTModel(transformers.ViTConfig(**vit))),
         lambda m: m(picture, return_dict=False), 2, (2, 2, 32), False)
    }
    for what, (model, run, layers, (heads, key_heads, dim), causal) in models.items():
        got, calls = recorded(what, model, lambda: run(model), layers)
        files = got["files"]
        check([(e["layer"], e["step"])
               for e in files] == list(itertools.product(range(layers), range(2))), what, files)
        check((got["n_heads"], got["n_kv_heads"], got["head_dim"],
               got["causal"]) == (heads, key_heads, dim, causal),
              f"{what}: the head of its manifest", got)
        check((got["model"], got["sample"], got["prompt"], got["layout"], got["dtype"],
               got["left_out"]) == (what, what, "x", "BHND", "float16", {}),
              f"{what}: and more of it", got)
        check(got["model_class"] == type(model).__name__ and got["softmax_scale"] == dim**-0.5,
              f"{what}: class, scale", got)
        check(
            got["framework"] == {
                "torch": torch.__version__, "transformers": transformers.__version__
            }, "versions", got["framework"])
        check(all(e["module"].count(f".{e['layer']}.") == 1 for e in files),
              f"{what}: modules by layer", files)
        for e in files:
            q, k, v = (x.half() for x in calls[e["step"] * layers + e["layer"]][:3])
            x = load(f"out/{what}/{e['file']}")
            check(
                torch.equal(x["q"], q) and torch.equal(x["k"], k) and torch.equal(x["v"], v),
                f"{what}: arguments")


def test_the_layers_own_output():
    """What comes into the projection after attention, by a hook of torch."""
    model, seen = llama(), []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].detach()))
    with Recorder(model, "out", name="llama"):
        model(tokens(130))
    for e in manifest_of("out/sample")["files"]:
        got, allowed = softmax_of(*(load(f"out/sample/{e['file']}")[n] for n in "qkv"), e)
        truth = seen[e["layer"]].unflatten(2, (4, 32)).transpose(1, 2).double().numpy()
        check((np.abs(got - truth) <= allowed + 1e-5).all(), "output of the layer", e)


def test_grouped_queries():
    """As groups, as copies, and as one token's heads in the place of tokens."""
    model, ids = llama(), tokens(40)
    causal = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    with torch.inference_mode(), watched() as calls:
        with Recorder(model, "out", name="llama") as record:
            record.sample = "groups"
            model(ids)
            record.sample = "copies"
            model(ids, attention_mask=causal)
            record.sample = "next"
            past = model(ids[:, :39], use_cache=True).past_key_values
            model(ids[:, 39:], past_key_values=past, use_cache=True)
            record.sample = "packed"
            past = model(ids[:, :39], use_cache=True).past_key_values
            model(ids[:, 39:], past_key_values=past, use_cache=True, attention_mask=causal[:, :,
                                                                                           39:])
    check([calls[n][1].shape[1] for n in (0, 3)] == [2, 4] and
          calls[9][0].shape == (1, 4, 1, 32) and calls[15][0].shape == (1, 2, 2, 32),
          "transformers does all of these", [x[0].shape for x in calls])
    for n, sample in enumerate(["groups", "copies"]):
        got = same_as_model(sample, f"out/{sample}", calls[3 * n:], 3)
        check(got["n_kv_heads"] == 2 and got["causal"] is True, sample, got)
    for n, sample in enumerate(["next", "packed"]):
        got = same_as_model(sample, f"out/{sample}", calls[6 + 6 * n:], 3)
        check(
            (got["n_heads"], got["n_kv_heads"], got["causal"], got["left_out"]) == (4, 2, True, {}),
            sample, got)
        check([(e["step"], e["tokens"], e["keys"], e["causal"]) for e in got["files"]] ==
              [(0, 39, 39, True), (1, 1, 40, None)] * 3, f"{sample}: the next token", got["files"])
    for layer in range(3):
        a, b, c = (load(f"out/{s}/layer{layer:02}_step{n:03}.safetensors") for s, n in
                   (("groups", 0), ("next", 1), ("packed", 1)))
        for other in b, c:
            check(
                all(((a[n][:, :, -other[n].shape[2]:] - other[n]).abs() < 0.01).all()
                    for n in "qkv"), "the next token is the last one of the whole", layer)


# ---- Models of diffusers ----------------------------------------------------------------------

def random(*shape, seed=4):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux():
    return lively(
        diffusers.FluxTransformer2DModel(in_channels=4, num_layers=2, num_single_layers=2,
                                         attention_head_dim=16, num_attention_heads=3,
                                         joint_attention_dim=32, pooled_projection_dim=32,
                                         axes_dims_rope=(4, 4, 8)), gain=2)


def run_flux(model, side=6, text=10, time=0.5):
    y, x = np.indices((side, side)).reshape(2, -1)
    places = torch.tensor(np.stack([0 * y, y, x], axis=1), dtype=torch.float32)
    return model(hidden_states=random(1, side * side, 4), encoder_hidden_states=random(1, text, 32),
                 pooled_projections=random(1, 32), timestep=torch.tensor([time]), img_ids=places,
                 txt_ids=torch.zeros(text, 3), return_dict=False)


def test_diffusers():
    cog = lively(
        diffusers.CogVideoXTransformer3DModel(num_attention_heads=3, attention_head_dim=16,
                                              in_channels=4, out_channels=4, time_embed_dim=8,
                                              text_embed_dim=8, num_layers=2, sample_width=8,
                                              sample_height=8, sample_frames=9, patch_size=2,
                                              temporal_compression_ratio=4, max_text_seq_length=8,
                                              use_rotary_positional_embeddings=True), gain=2)
    turns = random(3 * 4 * 4, 16)
    run_cog = lambda: cog(hidden_states=random(2, 3, 4, 8, 8), encoder_hidden_states=random(
        2, 8, 8), timestep=torch.tensor([999, 999]), image_rotary_emb=(turns.cos(), turns.sin()),
                          return_dict=False)
    got, _ = recorded("cogvideox", cog, run_cog, 2, grid=[3, 4, 4], n_text=8, text_first=True)
    check((got["n_heads"], got["head_dim"], got["causal"]) == (3, 16, False), "cogvideox", got)
    check((got["grid"], got["n_text"], got["text_first"]) == ([3, 4, 4], 8, True),
          "what the caller says", got)
    check(
        all(e["tokens"] == 56 and e["batch"] == [0, 1] and e["timestep"] == 999
            for e in got["files"]), "cogvideox: text and video", got)
    check(got["framework"].get("diffusers") == diffusers.__version__, "versions", got["framework"])

    model = flux()
    with torch.inference_mode(), watched() as flux_calls:
        with Recorder(model, "out", name="flux") as record:
            record.sample = "flux"
            for time in 1, 0.5, 0.25:
                run_flux(model, time=time)
    got = same_as_model("flux", "out/flux", flux_calls, 4)
    check([(e["layer"], e["step"], e["timestep"])
           for e in got["files"]] == [(a, *b) for a in range(4) for b in enumerate([1, 0.5, 0.25])],
          "flux: steps", got["files"])
    check([e["module"] for e in got["files"][::3]] == [
        "transformer_blocks.0.attn", "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"
    ] and all(e["module"] == got["files"][n // 3 * 3]["module"]
              for n, e in enumerate(got["files"])), "flux: layers stay the same", got["files"])
    check(all(e["tokens"] == 46 for e in got["files"]), "flux: text and image")

    sd3 = lively(
        diffusers.SD3Transformer2DModel(sample_size=16, patch_size=2, in_channels=4, num_layers=2,
                                        attention_head_dim=16, num_attention_heads=2,
                                        caption_projection_dim=32, joint_attention_dim=32,
                                        pooled_projection_dim=16, out_channels=4,
                                        qk_norm="rms_norm", dual_attention_layers=(0, )), gain=2)
    run_sd3 = lambda: sd3(hidden_states=random(1, 4, 16, 16), encoder_hidden_states=random(
        1, 5, 32), pooled_projections=random(1, 16), timestep=torch.tensor([3.0]), return_dict=False
                          )
    got, _ = recorded("sd3", sd3, run_sd3, 3)
    check([e["tokens"] for e in got["files"]] == [69, 69, 64, 64, 69, 69],
          "sd3: both attentions of a layer", got)

    unet = lively(
        diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24,
            norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            attention_head_dim=(2, 4), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")),
        gain=2)
    run_unet = lambda: unet(random(2, 4, 8, 8), 7, random(2, 11, 24), return_dict=False)
    with torch.inference_mode(), watched() as calls:
        run_unet()
    shapes = [(q.shape[2], k.shape[2]) for q, k, _, _ in calls]
    own = [n for n, (a, b) in enumerate(shapes) if a == b]
    check(0 < len(own) < len(shapes), "this unet has both kinds of attention", shapes)
    got, calls = recorded("unet", unet, run_unet, len(shapes))
    check([e["layer"] for e in got["files"][::2]] == own and
          got["left_out"] == {"cross": 2 * (len(shapes) - len(own))}, "cross attention is left out",
          got)
    got, calls = recorded("unet with all", unet, run_unet, len(shapes), cross=True)
    check([(e["tokens"], e["keys"]) for e in got["files"][::2]] == shapes and got["left_out"] == {},
          "or taken", got)
    check({e["n_heads"] for e in got["files"]} == {2, 4} and got["n_heads"] is None and
          got["head_dim"] == 8, "what differs is null at the top", got)


# ---- A model of attention alone ---------------------------------------------------------------

class Attend(nn.Module):
    def forward(self, *qkv, **how):
        return F.scaled_dot_product_attention(*qkv, **how)


class Plain(nn.Module):
    """Every layer gets the same; or, as a list, each its own. `breaks`: the layer that raises."""
    def __init__(self, layers=2):
        super().__init__()
        self.layer, self.breaks, self.error = nn.ModuleList(Attend()
                                                            for _ in range(layers)), None, KeyError

    def forward(self, *qkv, **how):
        for n, layer in enumerate(self.layer):
            if n == self.breaks:
                raise self.error("breaks")
            out = layer(*(qkv[0][n] if isinstance(qkv[0], list) else qkv), **how)
        return out


def qkv(heads=4, key_heads=4, n=20, dim=8, keys=None, batch=1, seed=5):
    return (random(batch, heads, n, dim,
                   seed=seed), random(batch, key_heads, keys or n, dim, seed=seed + 1),
            random(batch, key_heads, keys or n, dim, seed=seed + 2))


def record_plain(folder, *args, model=None, recorder=None, **how):
    """One step; its manifest, checked against the model."""
    model = model or Plain(1)
    with watched() as calls, Recorder(model, folder, name="plain", **(recorder or {})):
        model(*args, **how)
    return same_as_model(folder, f"{folder}/sample", calls, len(model.layer))


def test_masks():
    n, bias = 20, random(1, 1, 20, 20)
    tril = torch.ones(n, n, dtype=torch.bool).tril()
    added = torch.zeros(n, n).masked_fill(~tril, -torch.inf)
    padded = torch.ones(2, 1, 1, n, dtype=torch.bool)
    padded[1, 0, 0, 17:] = False
    lowest = torch.zeros(n, n).masked_fill(~tril, torch.finfo(torch.float32).min)
    names = (f"f{x}" for x in itertools.count())
    for how in [
            dict(is_causal=True),
            dict(attn_mask=tril),
            dict(attn_mask=tril[None, None]),
            dict(attn_mask=added),
            dict(attn_mask=tril.expand(2, 4, n, n)),
            dict(attn_mask=lowest[None]),
            dict(attn_mask=added.clamp(min=-10000.0))
    ]:
        got = record_plain(next(names), *qkv(batch=2), **how)
        check(got["causal"] is True and "causal_at" not in got["files"][0], "causal", how, got)
    for mask in None, torch.ones(n, n, dtype=torch.bool), torch.zeros(1, 1, 1, n), torch.ones(
            1, n, dtype=torch.bool):
        got = record_plain(next(names), *qkv(batch=2), attn_mask=mask)
        check(got["causal"] is False, "hides nothing", got)
    window = tril & ~tril.tril(-5)
    holed = tril.clone()
    holed[9, 3] = False
    for mask in [
            padded, window, bias,
            torch.where(tril, bias, -torch.inf), tril.T, holed, added + 0.5,
            tril.tril(-1), ~torch.eye(n, dtype=torch.bool),
            torch.cat([tril.expand(1, 4, n, n), holed.expand(1, 4, n, n)])
    ]:
        refused(ValueError, ["layer 0 (layer.0)", "step 0", "mask", "skip"], record_plain, folder :=
                next(names), *qkv(batch=2), attn_mask=mask)
        check(manifest_of(f"{folder}/sample")["files"] == [], "and nothing is written")
        got = record_plain(next(names), *qkv(batch=2), attn_mask=mask, recorder=dict(masked="skip"))
        check(got["files"] == [] and got["left_out"] == {"mask": 1}, "or counted", got)
    check(
        record_plain(next(names), *qkv(batch=2), attn_mask=padded,
                     recorder=dict(layers=[]))["left_out"] == {},
        "what is not wanted is not looked at")
    for attempt in "all", None:
        refused(ValueError, ["masked"], Recorder, Plain(), "x", name="plain", masked=attempt)

    # fewer queries than keys: where the first one stands
    chunk = qkv(n=8, keys=20)
    at_end = torch.ones(8, 20, dtype=torch.bool).tril(12)
    got = record_plain(next(names), *chunk, attn_mask=at_end)
    check(got["files"][0]["causal_at"] == "end" and got["causal"] is True and got["left_out"] == {},
          "a chunk", got)
    got = record_plain(next(names), *chunk, is_causal=True)
    check(got["left_out"] == {"cross": 1}, "queries of another sequence", got)
    for how in dict(is_causal=True), dict(attn_mask=at_end.tril(0)):
        got = record_plain(next(names), *chunk, **how, recorder=dict(cross=True))
        check(got["files"][0]["causal_at"] == "start" and got["causal"] is True,
              "from the first key on", got)
    got = record_plain(next(names), *chunk, attn_mask=torch.ones(1, 1, 8, 20),
                       recorder=dict(cross=True, masked="skip"))
    check(got["left_out"] == {"mask": 1}, "a bias, the same everywhere", got)
    refused(ValueError, ["random", "eval"], record_plain, next(names), *qkv(), dropout_p=0.1)
    check(record_plain(next(names), *qkv(), dropout_p=0.0)["left_out"] == {}, "no dropout")


def test_own_and_cross():
    """The next tokens of a place that had as many queries as keys; text that a place sees
    besides."""
    model = Plain(2)
    with Recorder(model, "out", name="plain") as record:
        for n, keys in (20, 20), (1, 21), (3, 24):
            model([qkv(n=n, keys=keys), qkv(n=n, keys=7)])
        record.sample = "masked"
        model([qkv(), qkv(keys=7)], attn_mask=None)
    got = manifest_of("out/sample")
    check([(e["layer"], e["tokens"], e["keys"], e["causal"])
           for e in got["files"]] == [(0, 20, 20, False), (0, 1, 21, None), (0, 3, 24, False)] and
          got["left_out"] == {"cross": 3}, "own", got)
    with Recorder(model, "later", name="plain", steps=[1]):
        for n, keys in (20, 20), (1, 21):
            model([qkv(n=n, keys=keys), qkv(n=n, keys=7)])
    got = manifest_of("later/sample")
    check([(e["layer"], e["step"]) for e in got["files"]] == [(0, 1)] and
          got["left_out"] == {"cross": 1}, "though the step before is not recorded", got)
    padded = torch.ones(20, 7, dtype=torch.bool)
    padded[:, 5:] = False
    got = record_plain("padded", *qkv(keys=7), attn_mask=padded)
    check(got["left_out"] == {"cross": 1}, "a mask of cross attention is not looked at", got)


def test_shapes():
    for n, args in enumerate([[x[0] for x in qkv()], [x[None] for x in qkv()],
                              qkv(heads=1, key_heads=4)]):
        got = record_plain(f"s{n}", *args)
        check(got["left_out"] == {"shape": 1} and got["files"] == [], "not of four axes", got)
    got = record_plain("one", *qkv(key_heads=1))
    check((got["n_heads"], got["n_kv_heads"]) == (4, 1), "one key head for all, without saying so",
          got)
    q, k, v = qkv(batch=3)
    got = record_plain("batch", q[:1], k, v)
    check(got["files"][0]["shapes"]["q"] == [3, 4, 20, 8], "one q for all of a batch", got)
    got = record_plain("wide", q, k, random(3, 4, 20, 12))
    check(got["files"][0]["shapes"]["v"] == [3, 4, 20, 12], "v of other channels", got)
    q, k, v = qkv(heads=12, key_heads=6)
    for name, kk, vv, want in [
        ("2", k[:, :2].repeat_interleave(6, 1), v[:, :2].repeat_interleave(6, 1), 2),
        ("k alone", k[:, :2].repeat_interleave(6, 1), v.repeat_interleave(2, 1), 6),
        ("v of all", k[:, :3].repeat_interleave(4, 1), v[:, :1].expand(-1, 12, -1, -1), 3),
        ("tiled", k[:, :3].repeat(1, 4, 1, 1), v[:, :3].repeat(1, 4, 1, 1), 12),
        ("some", k[:, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 1]],
         v[:, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 1]], 12),
        ("all", k[:, :1].expand(-1, 12, -1, -1), v[:, :1].expand(-1, 12, -1, -1), 1)
    ]:
        got = record_plain(f"copies {name}", q, kk, vv)
        check(got["n_kv_heads"] == want and got["files"][0]["kv_heads"] == list(range(want)),
              f"copies: {name}", got)
    got = record_plain("said", *qkv(heads=8, key_heads=4), enable_gqa=True)
    check(got["n_kv_heads"] == 4, "grouped, and said so", got)
    q, k, v = qkv()
    got = record_plain("strided", q[..., ::2], k.mT.contiguous().mT[..., ::2], v.flip(2)[..., 1::2])
    check(len(got["files"]) == 1, "strided", got)


def test_chosen():
    where = lambda got: [(e["layer"], e["step"]) for e in got["files"]]
    plain, three = Plain(4), qkv(8, 2, batch=3)

    def run(folder, model=None, times=4, args=None, **rules):
        model, args = model or plain, args or three
        with watched() as calls, Recorder(model, folder, name="plain", **rules):
            for _ in range(times):
                model(*args, enable_gqa=True)
        return same_as_model(folder, f"{folder}/sample", calls, 4)

    every = [(a, b) for a in range(4) for b in range(4)]
    got = run("all")
    check(where(got) == every and got["recorded"]["layers"] == "all", "all", got["recorded"])
    got = run("some", layers={3, 1}, steps=range(1, 4, 2))
    check(
        where(got) == [(a, b) for a, b in every if a in (1, 3) and b in (1, 3)], "some", where(got))
    check(
        got["recorded"] == {
            "masked": "refuse", "cross": False, "layers": [1, 3], "steps": [1, 3], "heads": "all",
            "batch": "all"
        } and got["left_out"] == {}, "what it says of them", got)
    got = run("by functions", layers=lambda n: n > 2, steps=lambda n: n % 2 == 0)
    check(where(got) == [(3, 0), (3, 2)], "functions", where(got))
    check(where(run("none", layers=[])) == [], "none")
    check(
        where(run("numpy", layers=np.arange(2), steps=torch.tensor([0]))) == [(0, 0), (1, 0)],
        "numbers of others")
    for heads, of in [([0], [0]), ([1, 3], [0]), ([5, 4], [1]), ([0, 4], [0, 1]),
                      ([2, 3, 7, 6], [0, 1]), (range(8), [0, 1])]:
        got = run(f"heads {heads}", layers=[0], steps=[0], heads=heads)
        check((got["files"][0]["query_heads"], got["files"][0]["kv_heads"]) == (sorted(heads), of),
              "heads", got)
        check((got["n_heads"], got["n_kv_heads"]) == (8, 2), "of so many", got)
    got = run("every other", layers=[0], steps=[0], heads=lambda h: h % 4 == 3)
    check((got["files"][0]["query_heads"], got["files"][0]["kv_heads"]) == ([3, 7], [0, 1]),
          "a function", got)
    refused(ValueError, ["layer 0 (layer.0)", "1 query heads of one key head", "2 of another"], run,
            "uneven", heads=[0, 1, 4])
    refused(ValueError, ["nothing is chosen", "8 heads"], run, "none of them", heads=[8])
    refused(ValueError, ["nothing is chosen", "batch of 3"], run, "no part", batch=[3])
    for batch in [1], [2, 0]:
        got = run(f"batch {batch}", layers=[0], steps=[0], batch=batch)
        check(
            got["files"][0]["batch"] == sorted(batch) and
            got["recorded"]["batch"] == sorted(batch) and
            got["files"][0]["shapes"]["k"] == [len(batch), 2, 20, 8], "batch", got)


def test_layers_keep_their_numbers():
    """Also where a step leaves one out, calls one twice, or calls them in another order."""
    model = Plain(3)
    order = [0, 1, 2]
    model.forward = lambda *args: [model.layer[n](*args) for n in order]
    with Recorder(model, "out", name="plain") as record:
        model(*qkv())
        order = [2, 0]
        model(*qkv())
        order = [0, 0, 1, 2]
        model(*qkv())
        order = [0, 1, 2]
        record.sample = "next"
        model(*qkv())
    got = [(e["step"], e["layer"], e["module"]) for e in manifest_of("out/sample")["files"]]
    check(
        sorted(got) == [(0, 0, "layer.0"), (0, 1, "layer.1"), (0, 2, "layer.2"), (1, 0, "layer.0"),
                        (1, 2, "layer.2"), (2, 0, "layer.0"), (2, 1, "layer.1"), (2, 2, "layer.2"),
                        (2, 3, "layer.0")], "layers", got)
    got = [(e["step"], e["layer"]) for e in manifest_of("out/next")["files"]]
    check(got == [(0, 0), (0, 1), (0, 2)], "a sample begins with step 0", got)


def test_types():
    for dtype, own in (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16,
                                                                     1e-2), (torch.float64, 1e-9):
        model = Plain(1)
        with torch.inference_mode(), watched() as calls, Recorder(model, f"{dtype}", name="plain"):
            model(*(x.to(dtype) for x in qkv()))
        got = same_as_model(str(dtype), f"{dtype}/sample", calls, 1, own)
        check(got["dtype"] == "float16", "float16 of all", got)
    model = llama().to(torch.bfloat16)
    got, _ = recorded("a model of bfloat16", model, lambda: model(tokens(60), return_dict=False), 3,
                      own=1e-2)
    check(got["dtype"] == "float16", "and of a model", got)
    for n, which in enumerate(
            itertools.product((60000.0, 65504.0, 65519.0, 65520.0, 1e6, -1e6), range(3))):
        value, part = which
        x = list(qkv())
        x[part] = x[part] / 100
        x[part][0, 1, 3, 2] = value
        with Recorder(Plain(1), f"w{n}", name="plain", scale_of="x") as record:
            record.model(*x, scale=1e-6)
        got = manifest_of(f"w{n}/sample")
        file = load(f"w{n}/sample/{got['files'][0]['file']}")
        want = "float16" if abs(value) < 65520 else "bfloat16"  # 65519 is nearest to 65504
        check(
            got["dtype"] == want and
            all(torch.equal(file[m], y.to(getattr(torch, want))) for m, y in zip("qkv", x)),
            f"{value}", got["dtype"])
    for bad in torch.inf, -torch.inf, torch.nan:
        for part in range(3):
            x = qkv()
            x[part][0, 3, 19, 7] = bad
            refused(ValueError, ["layer 0", "finite"], record_plain, f"{bad}{part}", *x)
    q, k, v = qkv()
    q.requires_grad_(True)
    with Recorder(m := Plain(1), "grad", name="plain"):
        m(q, k, v).sum().backward()
    check(q.grad is not None and len(manifest_of("grad/sample")["files"]) == 1, "beside gradients")


def test_the_type_that_loses_less():
    """By each token beside its own largest value: a few small numbers in it do no harm, a token of
    them does."""
    def token(x, factor):
        return torch.where(torch.arange(20)[:, None] == 7, factor * x, x)

    half, brain = torch.float16, torch.bfloat16
    single = random(1, 4, 20, 8)
    some = single.clone()
    some[..., ::3] *= 1e-9
    cases = {
        "v": (1e-9 * single, "bfloat16"), "as a bound": (2.0**-14 * single.sign(), "float16"),
        "a token": (token(single, 1e-9), "bfloat16"), "a token of zeros":
        (token(single, 0), "float16"), "some channels": (some, "float16"), "less than bfloat16 has":
        (1e-40 * single, "float32"), "as less in one token": (token(single, 1e-40), "float32"),
        "small as they are": ((1e-7 * single).to(half),
                              "float16"), "as they are": (some.to(brain), "bfloat16"), "of double":
        ((1e-9 * single).double(), "bfloat16"), "large and small": (token(single, 1e6), "bfloat16")
    }
    for (what, (x, want)), part in itertools.product(cases.items(), range(3)):
        inputs = [y.to(x.dtype) for y in qkv(seed=9)]
        inputs[part] = x
        with Recorder(model := Plain(1), f"{what} {part}", name="plain"):
            model(*inputs)
        got = manifest_of(f"{what} {part}/sample")
        file = load(f"{what} {part}/sample/{got['files'][0]['file']}")
        check(got["dtype"] == want, f"{what}: type", got["dtype"])
        check(all(torch.equal(file[n], y.to(getattr(torch, want))) for n, y in zip("qkv", inputs)),
              f"{what}: values")
        unit = HALF[want] * x.abs().amax(-1, keepdim=True)
        check(((file["qkv"[part]].double() - x.double()).abs() <= unit).all(),
              f"{what}: every token")
    refused(ValueError, ["layer 0", "beyond float32"], record_plain, "too small",
            *(1e-60 * x.double() for x in qkv()))


def test_scale():
    got = record_plain("said", *qkv(), scale=0.3)
    check(got["softmax_scale"] == 0.3 and got["files"][0]["softmax_scale"] == 0.3, "a scale", got)
    check(record_plain("usual", *qkv(dim=16))["softmax_scale"] == 0.25, "the usual one")
    model = Plain(2)
    model.forward = lambda: [layer(*qkv(dim=d), scale=s, is_causal=c) for layer, d, s, c in
                             zip(model.layer, (8, 16), (0.5, 0.25), (True, False))]
    with Recorder(model, "both", name="plain"):
        model()
    got = manifest_of("both/sample")
    check(got["softmax_scale"] is got["head_dim"] is got["causal"] is None and got["n_heads"] == 4,
          "null where they differ")
    check([(e["softmax_scale"], e["head_dim"], e["causal"]) for e in got["files"]] == [(0.5, 8,
                                                                                        True),
                                                                               (0.25, 16, False)],
          "each its own", got)


# ---- Files ------------------------------------------------------------------------------------

def run_plain(folder, steps=3, model=None, samples=("a", "b"), name="plain", shape=None, **how):
    model = model or Plain(2)
    with Recorder(model, folder, name=name, **how) as record:
        for n, sample in enumerate(samples):
            record.begin(sample, number=n)
            for step in range(steps):
                model(*qkv(seed=100 * n + step, **(shape or {})))


def contents(folder):
    return {
        str(x.relative_to(folder)): x.read_bytes() for x in Path(folder).rglob("*") if x.is_file()
    }


def names_of(folder):
    return {x for x in contents(folder) if x.endswith(".safetensors")}


def test_budget():
    run_plain("all")
    whole = contents("all")
    sizes = {len(whole[name]) for name in names_of("all")}
    one, = sizes
    check(len(names_of("all")) == 12, "twelve files", names_of("all"))
    for room in 0, 1, 5, 7, 11:
        budget = room * one + HEADER + 100
        run_plain(f"b{room}", budget=budget)
        got = contents(f"b{room}")
        total = sum(len(got[x]) for x in names_of(f"b{room}"))
        check(total == room * one <= budget, f"room for {room}", total)
        left = [manifest_of(f"b{room}/{sample}")["left_out"].get("budget", 0) for sample in "ab"]
        check(sum(left) == 12 - room, "the others are counted", left)
        check(all(got[x] == whole[x] for x in names_of(f"b{room}")), "the others are whole")
        check(sum(len(manifest_of(f"b{room}/{s}")["files"]) for s in "ab") == room, "and listed")
        run_plain(f"b{room}", budget=budget)
        check(contents(f"b{room}") == got, "the same again")
    run_plain("b5")
    check(contents("b5") == whole, "with more room it goes on")
    with Recorder(m := Plain(2), "small", name="plain", budget=2 * one):
        m([qkv(n=100), qkv(n=3)])
    got = manifest_of("small/sample")
    check([e["layer"] for e in got["files"]] == [1] and got["left_out"] == {"budget": 1},
          "a smaller one fits", got)
    run_plain("a few", budget=4 * one + 100, heads=[1], steps=3)
    check(len(names_of("a few")) > 8, "it is what is written that counts")


def test_samples():
    model = Plain(1)
    with Recorder(model, "out", name="plain", licence="none") as record:
        check(record.sample == "sample", "its name at first")
        for n, sample in enumerate(["x", 7]):
            record.sample = sample
            check(record.sample == str(sample), "its name")
            for _ in range(n + 1):
                model(*qkv())
        record.begin("y", prompt="a cat", grid=(1, 2, 3))
        model(*qkv())
    check(sorted(os.listdir("out")) == ["7", "x", "y"], "folders", os.listdir("out"))
    check(len(manifest_of("out/7")["files"]) == 2, "steps of each")
    got = manifest_of("out/y")
    check((got["prompt"], got["grid"], got["licence"]) == ("a cat", [1, 2, 3], "none"), "more", got)
    check(got["files"][0]["step"] == 0 and "prompt" not in manifest_of("out/7"), "of its own", got)
    for name in "a/b", "..", "", ".", "/", "a/":
        refused(ValueError, ["folder"], Recorder(model, "out", name="plain").begin, name)
    for key in "files", "causal", "left_out", "left_out_at", "model_class", "recorded":
        refused(ValueError, [key], Recorder, model, "out", name="plain", **{key: 1})
        refused(ValueError, [key], Recorder(model, "out", name="plain").begin, "z", **{key: 1})
    refused(TypeError, ["JSON"], Recorder, model, "out", name="plain", tensor=random(1))
    with Recorder(model, "out", name="plain") as record:
        changing = model.layer[0].register_forward_pre_hook(lambda *_: record.begin("within"))
        refused(RuntimeError, ["while the model runs"], model, *qkv())
        changing.remove()
        model(*qkv())


def test_the_same_again():
    run_plain("whole")
    want = contents("whole")
    times = {x: x.stat().st_mtime_ns for x in Path("whole").rglob("*.safetensors")}
    run_plain("whole")
    check(
        contents("whole") == want and all(x.stat().st_mtime_ns == t for x, t in times.items()),
        "nothing new")
    os.remove("whole/a/layer01_step002.safetensors")
    run_plain("whole")
    check(contents("whole") == want, "what was removed comes back")
    unlisted = manifest_of("whole/a")
    unlisted["files"].pop()
    write("whole/a/manifest.json", json.dumps(unlisted))
    write("whole/a/layer01_step002.safetensors", "half of it")
    run_plain("whole")
    check(contents("whole") == want, "what is not listed is written again")

    for change, words in [(dict(name="other"), ["'model'", "'plain'", "'other'"]),
                          (dict(layers=[0]), ["recorded"]), (dict(heads=[0]), ["recorded"]),
                          (dict(cross=True), ["recorded"]), (dict(masked="skip"), ["recorded"]),
                          (dict(seed=3), ["'seed'", "None", "3"]),
                          (dict(model=nn.Sequential(Attend())), ["model_class"])]:
        refused(ValueError, ["whole/a/manifest.json", *words], run_plain, "whole", **change)
        check(contents("whole") == want, "and stays as it is", change)
    swapped = Plain(2)
    swapped.forward = lambda *args: [swapped.layer[n](*args) for n in (1, 0)]
    refused(ValueError, ["layer00_step000", "layer.0", "layer.1"], run_plain, "whole",
            model=swapped)
    check(contents("whole") == want, "and stays as it is")
    write("whole/a/manifest.json", "{")
    refused(ValueError, [], run_plain, "whole")


def test_interrupted():
    """By the model, at every layer; by a file that cannot be written. What is there is valid, and
    the rest follows."""
    run_plain("whole")
    want = contents("whole")
    for breaks, n in itertools.product(range(2), range(6)):
        model, folder, calls = Plain(2), f"i{breaks}{n}", iter(range(100))
        stop = lambda *_: setattr(model, "breaks", breaks if next(calls) == n else None)
        model.register_forward_pre_hook(stop)
        refused(KeyError, ["breaks"], run_plain, folder, model=model)
        got = contents(folder)
        files = {
            f"{s}/{e['file']}" for s in os.listdir(folder)
            for e in manifest_of(f"{folder}/{s}")["files"]
        }
        check(files == names_of(folder) and len(files) == 2 * n + breaks, "as far as it came",
              files)
        check(
            all(got[x] == want[x] for x in files) and set(got) <= set(want), "whole files alone",
            set(got))
        run_plain(folder)
        check(contents(folder) == want, "the rest follows")
    real, count = os.replace, 0

    def replace(*args):
        nonlocal count
        count += 1
        if count == stop_at:
            raise OSError("no room")
        real(*args)

    for stop_at in range(1, 9):
        count, _files.os = 0, types.SimpleNamespace(**{**vars(os), "replace": replace})
        try:
            refused(OSError, ["no room"], run_plain, f"o{stop_at}")
        finally:
            _files.os = os
        got = contents(f"o{stop_at}")
        check(not [x for x in got if x not in want], "nothing half", set(got))
        check(all(got[x] == want[x] for x in names_of(f"o{stop_at}")), "whole files")
        for sample in os.listdir(f"o{stop_at}"):
            if f"{sample}/manifest.json" in got:
                check(all((Path(f"o{stop_at}") / sample / e["file"]).exists() for e in
                          manifest_of(f"o{stop_at}/{sample}")["files"]), "what is listed is there")
        run_plain(f"o{stop_at}")
        check(contents(f"o{stop_at}") == want, "the rest follows")


# ---- Attention of other kinds -----------------------------------------------------------------

class Call(nn.Module):
    """Calls a function."""
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Mixed(nn.Module):
    """Attention as it is recorded, something else, attention as it is recorded."""
    def __init__(self, other):
        super().__init__()
        self.first, self.other, self.last = Attend(), other, Attend()

    def forward(self, *args):
        return self.first(*args), self.other(*args), self.last(*args)


def eager(q, k, v, product=torch.matmul, softmax=lambda s: s.softmax(-1)):
    return product(softmax(product(q, k.mT) / 8**0.5), v)


def simple(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def by_bmm(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(
        F.dropout(torch.baddbmm(torch.zeros(1, 1, 1), q, k.mT).softmax(-1), 0.1, training=False), v)


def by_einsum(q, k, v):
    s = torch.einsum("bhqd,bhkd->bhqk", q,
                     k).masked_fill(torch.ones(20, 20).triu(1) > 0, -torch.inf)
    return torch.einsum("bhqk,bhkd->bqhd", F.softmax(s, dim=-1, dtype=torch.float64).type_as(q), v)


def in_place(q, k, v):
    s = torch.empty(1, 4, 20, 20)
    for h in range(4):
        s[0, h] = q[0, h] @ k[0, h].T
    p = s.sub_(s.amax(-1, keepdim=True)).exp_()
    return p.div_(p.sum(-1, keepdim=True)) @ v


def by_heads(q, k, v):
    return torch.stack([simple(*(x[:, h] for x in (q, k, v))) for h in range(4)], 1)


def with_sink(q, k, v):
    return torch.cat([q @ k.mT, torch.zeros(1, 4, 20, 1)], -1).log_softmax(-1).exp()[..., :-1] @ v


def by_default(q, k, v, attention=F.scaled_dot_product_attention):
    return attention(q, k, v)


class OfTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(32, 4, batch_first=True).eval()

    def forward(self, q, k, v):
        x = q.transpose(1, 2).flatten(2)
        return self.own(x, x, x)


class NumpyAttention(nn.Module):
    def forward(self, q, k, v):
        p = np.exp(q.numpy() @ k.mT.numpy())
        return torch.from_numpy(p / p.sum(-1, keepdims=True) @ v.numpy())


@torch.library.custom_op("tests_hook::my_attention", mutates_args=())
def my_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q + v


def test_attention_of_other_kinds():
    """It is listed and has its number, whatever it is called by."""
    kept, products = F.scaled_dot_product_attention, "a softmax between products"
    others = {
        "matmul": (eager, products), "bmm": (by_bmm, products), "einsum": (by_einsum, products),
        "in place": (in_place, products), "heads in a loop": (by_heads, products), "heads at once":
        (torch.vmap(simple, 1, 1), products), "with a sink": (with_sink, products),
        "a compiled function": (torch.compile(eager, backend="eager"),
                                products), "a script": (torch.jit.script(simple), products),
        "checkpoint": (functools.partial(checkpoint, eager,
                                         use_reentrant=False), products), "attribute":
        (kept, "attention"), "partial": (functools.partial(kept, is_causal=True),
                                         "attention"), "default": (by_default, "attention"), "dict":
        (lambda *args, of={"sdpa": kept}: of["sdpa"]
         (*args), "attention"), "compiled": (torch.compile(kept, backend="eager"), "attention"),
        "of C": (torch._C._nn.scaled_dot_product_attention,
                 "attention"), "of ops": (torch.ops.aten.scaled_dot_product_attention, "attention"),
        "of another package": (my_attention,
                               "my_attention"), "flex": (flex_attention,
                                                         "flex_attention"), "flex, compiled":
        (torch.compile(flex_attention, backend="eager"),
         "flex_attention"), "of torch": (OfTorch(), "_native_multi_head_attention",
                                         products), "numpy": (NumpyAttention(), "NumpyAttention")
    }
    grads = {"inference": torch.inference_mode, "no grad": torch.no_grad, "grad": torch.enable_grad}
    for (what, (other, *by)), (mode, context) in itertools.product(others.items(), grads.items()):
        other = other if isinstance(other, nn.Module) else Call(other)
        model, folder = Mixed(other), f"{what} {mode}"
        layer = "other.own" if isinstance(other, OfTorch) else "other"
        with context():
            want = model(*qkv())
            with Recorder(model, folder, name="mixed", layers=[0, 1, 2], steps=[0, 1]):
                for _ in range(3):
                    got = model(*qkv())
        check(all(torch.equal(a, b) for a, b in zip(tree_leaves(got), tree_leaves(want))),
              f"{folder}: the same result")
        got = manifest_of(f"{folder}/sample")
        check([(e["layer"], e["module"])
               for e in got["files"]] == [(0, "first")] * 2 + [(2, "last")] * 2,
              f"{folder}: numbers", got["files"])
        why = "unseen" if what == "numpy" else "bypass"
        check(got["left_out"] == {why: 2}, f"{folder}: counted", got["left_out"])
        at, = got["left_out_at"]
        check((at["layer"], at["module"], at["why"], at["calls"]) == (1, layer, why, 2),
              f"{folder}: where", at)
        check(any(x in at["by"] for x in by), f"{folder}: by", at)
    with Recorder(Mixed(Call(eager)), "not chosen", name="mixed", layers=[0, 2]) as record:
        record.model(*qkv())
    got = manifest_of("not chosen/sample")
    check([e["layer"] for e in got["files"]] == [0, 2] and
          got["left_out"] == {} == dict(got["left_out_at"]), "what is not wanted is not counted",
          got)
    for other, by in (eager, products), (flex_attention, "flex_attention"):
        refused(RuntimeError, ["did not call", f"{by} in 'function'", "by this name"], record_plain,
                "alone", *qkv(), model=Call(Call(other)))
    padded = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
                                   2).eval()
    with torch.no_grad():  # torch makes nested tensors of this
        refused(RuntimeError,
                ["_native_multi_head_attention", "in 'layers.1.self_attn'"], record_plain, "padded",
                random(2, 20,
                       32), model=padded, src_key_padding_mask=torch.arange(20).expand(2, 20) > 15)


def test_what_is_no_attention():
    """A softmax alone, routers, softmax of weights, linear attention, products of products."""
    class Weighs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.codes = nn.Linear(8, 8), nn.Parameter(random(8, 8))
            self.register_buffer("scales", random(8, 8))

        def forward(self, q, k, v):
            x, similarity = self.layer(q), q @ k.mT
            return (
                x.softmax(-1), similarity.softmax(-1), x.softmax(-1) @ v.mT,
                self.codes.softmax(-1) @ v.mT,
                (q @ (self.codes * self.scales).to(torch.float64).float()).softmax(-1) @ self.codes,
                q.softmax(-1) @ (k.softmax(-2).mT @ v), (similarity.tril() @ v) @ (v.mT @ v),
                self.layer.weight.exp() @ v.mT, similarity.sigmoid() * similarity.exp())

    for mode in torch.inference_mode, torch.no_grad, torch.enable_grad:
        with mode(), Recorder(Mixed(Weighs()), "weighs", name="mixed") as record:
            record.model(*qkv())
            with torch.autocast("cpu", torch.bfloat16):
                record.model(*qkv())
                record.model(*qkv())
        got = manifest_of("weighs/sample")
        check([e["layer"] for e in got["files"]] == [0] * 3 + [1] * 3 and got["left_out"] == {} and
              got["left_out_at"] == [], "no attention", got)
    small = dict(num_key_value_heads=2)
    for model in (transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SMALL, **small, num_local_experts=4)),
                  transformers.Gemma3ForCausalLM(
                      transformers.Gemma3TextConfig(**SMALL, **small, head_dim=16))):
        what = type(model).__name__
        with torch.inference_mode(), Recorder(model.eval(), what, name=what, masked="skip"):
            model(tokens(40))
        got = manifest_of(f"{what}/sample")
        check([e["layer"] for e in got["files"]] == [0, 1, 2] and got["left_out"] == {}, what,
              got["left_out_at"])


def test_what_it_says():
    """One line on stderr: files, bytes, what was left out; also where the model breaks."""
    def said(model, *args, breaks=None, **how):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                with Recorder(model, "out", name="mixed", **how) as record:
                    for sample in "ab":
                        record.sample = sample
                        model(*args)
                        model.breaks = breaks
            except KeyError:
                pass
        return err.getvalue()

    line = said(Mixed(Call(eager)), *qkv())
    size = sum(len(x) for name, x in contents("out").items() if name.endswith(".safetensors"))
    check(
        line ==
        f"sparge: out: 4 files written, {size:,} bytes; left out: 2 by bypass (first layer 1, "
        f"other, a softmax "
        "between products)\n", "all", line)
    line = said(Mixed(Call(eager)), *qkv())
    check(line.startswith("sparge: out: 0 files written, 0 bytes; left out: 2 by bypass"), "again",
          line)
    os.rename("out", "before")
    line = said(Plain(3), [qkv(keys=7), qkv(n=15, keys=7), [x[0] for x in qkv()]])
    check(
        line ==
        "sparge: out: 0 files written, 0 bytes; left out: 4 by cross (first layer 0, layer.0), 2 "
        "by shape (first layer 2, layer.2)\n", "more than one reason", line)
    os.rename("out", "nothing")
    line = said(Plain(2), *qkv(), breaks=1)
    check(
        line.startswith("sparge: out: 3 files written, ") and "left out" not in line,
        "a model that breaks", line)


# ---- Around the model -------------------------------------------------------------------------

def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_all_is_put_back():
    real, model = F.scaled_dot_product_attention, Plain(2)
    here = types.ModuleType("imported_by_name")
    here.attention = here.again = real
    sys.modules["imported_by_name"] = here
    model.layer[1].forward = lambda *args: here.attention(*args)
    try:
        for breaks, error in (None, None), (0, KeyError), (1, KeyboardInterrupt):
            model.breaks, model.error = breaks, error
            try:
                with Recorder(model, f"out{breaks}", name="plain"):
                    check(F.scaled_dot_product_attention is not real and here.attention is not real,
                          "replaced")
                    model(*qkv())
            except (KeyError, KeyboardInterrupt):
                check(breaks is not None, "broke")
            check(F.scaled_dot_product_attention is real and here.attention is here.again is real,
                  "put back")
            check(hooks_of(model) == 0 and not Recorder.active, "no hook is left", hooks_of(model))
            check(not _get_current_dispatch_mode_stack(), "nobody watches any more")
            got = manifest_of(f"out{breaks}/sample")
            check([e["module"]
                   for e in got["files"]] == ["layer.0",
                                              "layer.1"][:2 if breaks is None else breaks],
                  "also where the function was imported by name", got)
    finally:
        del sys.modules["imported_by_name"]


def test_a_broken_step_is_forgotten():
    """The model raises, the caller goes on."""
    model = Plain(2)
    model.layer.append(Call(F.scaled_dot_product_attention))
    for error in KeyError, KeyboardInterrupt:
        with Recorder(model, error.__name__, name="plain"):
            model.breaks, model.error = 1, error
            refused(error, ["breaks"], model, *qkv())
            if error is KeyError:
                Attend()(*qkv())
            model.breaks = None
            model(*qkv())
            Attend()(*qkv())
            eager(*qkv())
        got = manifest_of(f"{error.__name__}/sample")
        files = [(e["layer"], e["step"], e["module"]) for e in got["files"]]
        check(files == [(0, 0, "layer.0"), (0, 1, "layer.0"), (1, 1, "layer.1")],
              "its steps and layers", files)
        check(got["left_out"] == {"bypass": 1}, "nothing from elsewhere, and nothing twice",
              got["left_out"])


def test_refused():
    model = Plain(2)
    with Recorder(model, "out", name="plain") as record:
        ours = F.scaled_dot_product_attention
        for other in Recorder(Plain(1), "other", name="plain"), record:
            refused(RuntimeError, ["at work already"], other.__enter__)
        check(F.scaled_dot_product_attention is ours, "the first goes on")
        model(*qkv())
    check(len(names_of("out")) == 2 and not os.path.exists("other"), "one of them")
    with record:
        model(*qkv())
    check(len(names_of("out")) == 4, "again, after the first")

    def never():
        with Recorder(model, "never", name="plain"):
            Attend()(*qkv())

    def unseen(m, *args):
        with Recorder(m, "unseen", name="plain"):
            m(*args)

    refused(RuntimeError, ["not called"], never)
    check(not os.path.exists("never"), "no folder of nothing")
    eager = llama(attn_implementation="eager")
    refused(RuntimeError, [
        "did not call", "a softmax between products in 'model.layers.2.self_attn'",
        'attn_implementation="sdpa"'
    ], unseen, eager, tokens(9))
    check(not Recorder.active and F.scaled_dot_product_attention is not ours, "put back")
    real = F.scaled_dot_product_attention
    compiled = Plain(2)
    compiled.compile()
    part, forward = Plain(2), Plain(2)
    part.layer[1] = torch.compile(part.layer[1])
    forward.forward = torch.compile(forward.forward)
    for m in torch.compile(Plain(2)), compiled, part, forward:
        refused(ValueError, ["compiled"], Recorder(m, "compiled", name="plain").__enter__)
        check(F.scaled_dot_product_attention is real and hooks_of(m) == 0 and not Recorder.active,
              "as it was")


def test_outside_of_the_model():
    """A pipeline: text encoder, model, decoder; one model within another."""
    encoder, model = Plain(1), Plain(2)
    with Recorder(model, "out", name="plain"):
        for _ in range(2):
            encoder(*qkv(n=7))
            model(*qkv())
            model.layer[0](*qkv(n=9))
            Attend()(*qkv(n=8))
    got = manifest_of("out/sample")
    check([(e["layer"], e["step"], e["tokens"]) for e in got["files"]] ==
          [(0, 0, 20), (0, 1, 20), (1, 0, 20), (1, 1, 20)], "the model alone", got)
    whole = nn.Sequential(Plain(1), Plain(1))
    whole.forward = lambda *args: [part(*args) for part in whole]
    with Recorder(whole[1], "part", name="plain"):
        whole(*qkv())
    got = manifest_of("part/sample")
    check([(e["layer"], e["module"]) for e in got["files"]] == [(0, "layer.0")], "a part alone",
          got)


# ---- The program ------------------------------------------------------------------------------

def test_sparge():
    if not SPARGE:
        print("skipped: the program, which was not given")
        return
    _, fine, wrong, _ = commands_of(SPARGE, "sparge")
    model = llama()
    with torch.inference_mode(), Recorder(model, "out", name="llama", text="tokens") as record:
        for sample in "a", "b":
            record.begin(sample)
            model(tokens(300, seed=ord(sample)))
    with torch.inference_mode(), Recorder(m := flux(), "flux", name="flux", layers=[0,
                                                                                    3]) as record:
        for time in 1, 0.5:
            run_flux(m, side=14, time=time)
    with Recorder(p := Plain(1), "wide", name="plain", cross=True):
        p(*(500 * x for x in qkv(4, 2, n=64, dim=32, batch=2, keys=150)), enable_gqa=True,
          scale=1e-6)
        p(*(100000 * x for x in qkv(4, 2, n=64, dim=32, batch=2, keys=150)), enable_gqa=True,
          scale=1e-10)
        q, k, v = qkv(4, 2, n=64, dim=32, batch=2, keys=150)
        v[:, :, 7] *= 1e-40
        p(q, k, v, enable_gqa=True)
    check([e["dtype"]
           for e in manifest_of("wide/sample")["files"]] == ["float16", "bfloat16", "float32"],
          "all types")
    for folder, causal in ("out/a", ["--causal"]), ("flux/sample", []), ("wide/sample", []):
        for entry in manifest_of(folder)["files"]:
            path = f"{folder}/{entry['file']}"
            how = [*causal, "--softmax-scale", repr(entry["softmax_scale"])]
            for option in ["--dense", "--qk-dtype", "f32", "--pv-dtype", "f32"], []:
                got = fine("run", path, *how, *option, "--check", "-o", "o.npy")
                check(got["l1"] < (3e-4 if option else 0.2), f"run {path} {option}", got)
            want, _ = softmax_of(*(load(path)[n] for n in "qkv"), entry)
            fine("run", path, *how, "--dense", "--qk-dtype", "f32", "--pv-dtype", "f32", "-o",
                 "o.npy")
            check(
                np.abs(np.load("o.npy") - want).max() <= 6e-4 * np.abs(want).max(),
                f"output of {path}")
    got = fine("tune", "out/a", "out/b", "--causal", "-o", "p.json")
    check(got["heads"] == 12 and len(json.loads(read("p.json"))["inputs"]) == 6, "tune", got)
    check({x["sample"] for x in json.loads(read("p.json"))["inputs"]} == {"a", "b"}, "samples",
          read("p.json"))
    fine("tune", "out", "-o", "q.json")
    tuned = [[{**head, "seconds": None} for head in json.loads(read(x))["heads"]]
             for x in ("p.json", "q.json")]
    check(tuned[0] == tuned[1], "tune on the whole folder, causal as its manifests say", tuned)
    wrong(FILE, ["causal"], "tune", "out/a", "--causal=none", "-o", "r.json")
    got = fine("run", "out", "--params", "q.json")
    causal = fine("run", f"out/a/{manifest_of('out/a')['files'][0]['file']}", "--causal")
    check([x["pairs"] for x in got["files"]] == [causal["pairs"]] * 6, "run on it, causal too", got)
    got = fine("tune", "flux/sample", "-o", "s.json")
    inputs = json.loads(read("s.json"))["inputs"]
    check(got["heads"] == 6 and [x["layer"] for x in inputs] == [0, 0, 3, 3],
          "tune on two steps of a layer", inputs)
    got = fine("run", "flux/sample/layer03_step001.safetensors", "--params", "s.json")
    check(got["heads"] == 3, "run --params", got)
    with open("out/a/layer01_step000.safetensors", "ab") as f:
        f.write(b"x")
    wrong(FILE, ["SHA-256"], "tune", "out/a", "--causal", "-o", "q.json")


run_tests(globals(), sys.argv[2:], "sparge-hook-")
