# SPDX-License-Identifier: Apache-2.0
"""sparge.diffusers: a model's attention in its place, beside diffusers' own."""
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers", reason="diffusers is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "experiments" / "dropin"))

import diffusion
from diffusers import AutoencoderKL
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import Attention

import sparge
from sparge.capture import Recorder
from sparge.diffusers import attention, register

DENSE = diffusion.DENSE
# 120 + 20 tokens in two layers, and 144 + 70 in three.
BUILD = {"cogvideox": lambda: diffusion.cogvideox(2, frames=5, height=96, width=160, text=20),
         "flux": lambda: diffusion.flux(1, 2, height=192, width=192, text=70)}


@pytest.fixture(scope="module", params=BUILD)
def pipeline(request):
    """Its name, a function that runs it, its transformer, and its own latents."""
    pipe, arguments = BUILD[request.param]()

    def run(steps=2):
        return diffusion.latents(pipe, arguments, steps)

    return request.param, run, pipe.transformer, run()


def far(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


def draw(*shape):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for _ in "qkv")


class Block(torch.nn.Module):
    """Self and cross attention as a UNet has them."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.attn1 = Attention(32, heads=2, dim_head=16)
        self.attn2 = Attention(32, cross_attention_dim=24, heads=2, dim_head=16)
        self.to(dtype).eval()
        self.x = torch.randn(2, 200, 32, dtype=dtype)
        self.text = torch.randn(2, 77, 24, dtype=dtype)

    def forward(self, mask=None):
        x = self.attn1(self.x)
        return self.attn2(x, encoder_hidden_states=self.text, attention_mask=mask)


# ---- What it computes -------------------------------------------------------------------------


def test_dense_is_diffusers_own(pipeline):
    """1e-4 in f32, where int8 is ten times as far, and sparse attention further."""
    name, run, model, own = pipeline
    with attention(model, **DENSE) as calls:
        assert far(run(), own) <= 1e-4
    assert all(c.fallback == "" and c.density == 1 and c.sparsity == 0 for c in calls)
    with attention(model, topk=1.0):
        assert 5e-4 < far(run(), own)
    with attention(model, topk=0.4, theta=-1.0, block=(16, 16)) as calls:
        assert 2e-3 < far(run(), own) < 1
    assert all(0.6 < c.sparsity < 0.7 and c.sparsity == pytest.approx(1 - c.density, abs=0.02)
               for c in calls)


def test_records_are_of_steps_and_layers(pipeline):
    name, run, model, own = pipeline
    with attention(model, **DENSE) as calls:
        run()
    modules = {"cogvideox": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
               "flux": ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn",
                        "single_transformer_blocks.1.attn"]}[name]
    tokens = {"cogvideox": 140, "flux": 214}[name]
    assert [(c.step, c.layer, c.module, c.queries, c.keys) for c in calls] == [
        (step, layer, module, tokens, tokens)
        for step in (0, 1) for layer, module in enumerate(modules)]
    assert all(0 < c.seconds < 10 for c in calls)


def test_steps_and_layers_are_those_of_capture(pipeline, tmp_path):
    name, run, model, own = pipeline
    with Recorder(model, tmp_path, name=name) as record:
        record.begin("a")
        run()
    files = json.loads((tmp_path / "a" / "manifest.json").read_text())["files"]
    with attention(model, **DENSE) as calls:
        run()
    assert ({(c.step, c.layer, c.module) for c in calls} ==
            {(f["step"], f["layer"], f["module"]) for f in files})


def test_options_by_layer_and_step(pipeline):
    name, run, model, own = pipeline
    asked = []

    def topk(layer, step):
        asked.append((layer, step))
        return 1.0 if step == 0 else 0.3

    with attention(model, theta=-1.0, topk=topk, block=(16, 16)) as calls:
        run()
    assert asked == [(c.layer, c.step) for c in calls]
    assert all((c.sparsity > 0.5) == (c.step == 1) for c in calls)


@torch.no_grad()
def test_thresholds_by_layer():
    """A file of `sparge tune` for layers, and what it lacks."""
    block = Block()
    tuned = sparge.tune([draw(1, 2, 64, 16)], l1=0.5, l2=0.6, block=(16, 16))

    def params(*layers):
        one = tuned.params()._document
        return sparge.Params({**one, "heads": [{**head, "layer": n} for n in layers
                                               for head in one["heads"]]})

    options = dict(block=(16, 16))
    with attention(block, params=params(0, 1), **options) as by_layer:
        block()
    with attention(block, params=lambda layer, step: tuned.thresholds, **options) as by_function:
        block()
    assert [c.density for c in by_layer] == [c.density for c in by_function]
    assert by_layer[0].density < 1
    with pytest.raises(LookupError, match="layer 1"), attention(block, params=params(0), **options):
        block()
    with pytest.raises(ValueError, match=r"layer 0 \(attn1\).*block"):
        with attention(block, params=params(0, 1), block=(32, 16)):
            block()


def test_chosen_layers_and_steps(pipeline):
    """The others are diffusers', to the bit, and nothing is said of them."""
    name, run, model, own = pipeline
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attention(model, layers=[1], steps=lambda n: n > 0, topk=0.3, theta=-1.0) as calls:
            run()
        with attention(model, steps=[]) as none:
            assert torch.equal(run(), own)
    assert {(c.layer, c.step) for c in calls if not c.fallback} == {(1, 1)}
    assert {c.fallback for c in none} == {"not chosen"}


def test_backend_by_name():
    """What dispatches takes it; a processor that calls torch's function itself does not know it."""
    for build, reached in zip(BUILD.values(), (False, True)):
        pipe, arguments = build()
        own = diffusion.latents(pipe, arguments, 1)
        try:
            for options, bound in (DENSE, 1e-4), (dict(topk=0.2, theta=-1.0), None):
                register(**options)
                pipe.transformer.set_attention_backend("sparge")
                error = far(diffusion.latents(pipe, arguments, 1), own)
                assert error <= bound if bound else (error > 1e-3) == reached
            with attention(pipe.transformer, **DENSE) as calls:  # puts it aside
                assert far(diffusion.latents(pipe, arguments, 1), own) <= 1e-4
            assert calls and not any(c.fallback for c in calls)
            with attention_dispatch.attention_backend("sparge"):
                pass
        finally:
            pipe.transformer.reset_attention_backend()
            attention_dispatch._AttentionBackendRegistry.set_active_backend(
                attention_dispatch.AttentionBackendName.NATIVE)


def test_backend_masks_and_causality():
    """[B, N, H, D], and diffusers' masks of keys [B, Nk], as the native backend has them."""
    register(**DENSE)
    q, k, v = draw(2, 90, 2, 16)
    keys = torch.arange(90)[None] < torch.tensor([[70], [90]])
    for more in ({}, {"is_causal": True}, {"scale": 0.1}, {"attn_mask": keys},
                 {"attn_mask": torch.randn(2, 90)}):
        ours, own = (attention_dispatch.dispatch_attention_fn(q, k, v, backend=name, **more)
                     for name in ("sparge", "native"))
        assert ours.shape == own.shape and far(ours, own) < 1e-5, more


# ---- What is left to diffusers ----------------------------------------------------------------


@torch.no_grad()
def test_cross_attention_and_masks_of_keys_are_computed():
    block = Block()
    mask = torch.zeros(2, 1, 77)
    mask[0, :, 50:] = mask[1, :, 60:] = -1e4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in None, mask:
            own = block(given)
            with attention(block, **DENSE) as calls:
                assert far(block(given), own) < 1e-5
            assert [(c.module, c.keys, c.fallback) for c in calls] == [("attn1", 200, ""),
                                                                      ("attn2", 77, "")]


@torch.no_grad()
@pytest.mark.parametrize("block, mask", [(Block(torch.float64), None),
                                         (Block(), torch.randn(2, 200, 77))])
def test_the_rest_is_left_and_said_once(block, mask):
    own = block(mask)
    with pytest.warns(UserWarning, match=r"to diffusers.*layer \d \(attn\d\)") as said:
        with attention(block, topk=0.5, theta=-1.0, block=(16, 16)) as calls:
            ours = block(mask)
            block(mask)
    left = [c for c in calls if c.fallback]
    assert len(said) == 1 and len(left) == (4 if mask is None else 2)
    assert all(c.density == 1 and c.sparsity == 0 for c in left)
    if mask is None:
        assert torch.equal(ours, own)


def test_outside_of_the_model_nothing_changes():
    block, q = Block(), torch.randn(1, 1, 9, 8)
    with torch.no_grad(), attention(block, topk=0.5, theta=-1.0) as calls:
        block()
        F.scaled_dot_product_attention(q, q, q)
        Block().attn1(block.x)
        block.attn1(block.x)
    assert len(calls) == 2


# ---- What is refused --------------------------------------------------------------------------


def state(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    backends = [getattr(getattr(m, "processor", None), "_attention_backend", "")
                for m in model.modules()]
    return (F.scaled_dot_product_attention, hooks, backends,
            attention_dispatch._AttentionBackendRegistry._active_backend)


def test_everything_is_put_back(pipeline):
    name, run, model, own = pipeline
    names = attention_dispatch.AttentionBackendName
    for module in model.modules():
        if getattr(module, "processor", None) is not None:
            module.processor._attention_backend = names._NATIVE_MATH
    before = state(model)
    with pytest.raises(KeyError), attention(model, topk=lambda layer, step: {}[layer]):
        run()
    assert state(model) == before
    with pytest.raises(ZeroDivisionError), attention(model):
        raise ZeroDivisionError
    with pytest.raises(TypeError, match="layers is 3"), attention(model, layers=3):
        run()
    assert state(model) == before and far(run(), own) < 1e-5
    model.reset_attention_backend()


class Dispatching(torch.nn.Module):
    """Attention of diffusers' own choice, without a processor."""

    def forward(self, x):
        return attention_dispatch.dispatch_attention_fn(x, x, x)


def test_the_backend_in_force_is_put_aside():
    register(topk=0.1, theta=-1.0, block=(16, 16))
    model, x = Dispatching(), torch.randn(1, 128, 2, 16)
    with torch.no_grad(), attention_dispatch.attention_backend("sparge"):
        before = state(model)
        with attention(model, **DENSE) as calls:
            model(x)
        assert len(calls) == 1 and calls[0].density == 1 and state(model) == before


@torch.no_grad()
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_interrupted_step_is_begun_again(error):
    block, q = Block(), torch.randn(1, 1, 9, 8)

    def topk(layer, step):
        if step == 0 and layer == 1:
            raise error
        return 0.5

    with attention(block, theta=-1.0, topk=topk) as calls:
        with pytest.raises(error):
            block()
        if error is ZeroDivisionError:  # torch calls no hook after an interrupt
            F.scaled_dot_product_attention(q, q, q)
        block()
        F.scaled_dot_product_attention(q, q, q)
    assert [(c.step, c.layer, c.module) for c in calls] == [(0, 0, "attn1"), (1, 0, "attn1"),
                                                            (1, 1, "attn2")]


def test_gradients_are_refused():
    block = Block()
    with pytest.raises(ValueError, match=r"step 0, layer 0 \(attn1\): query.requires_grad"):
        with attention(block):
            block()
    with torch.no_grad(), attention(block) as calls:
        block()
    assert len(calls) == 2
    register()
    q = torch.randn(1, 8, 1, 8, requires_grad=True)
    with pytest.raises(ValueError, match="query.requires_grad"):
        attention_dispatch.dispatch_attention_fn(q, q, q, backend="sparge")


@pytest.mark.parametrize("options, message", [
    ({"tpk": 0.5}, "did you mean 'topk'"), ({"layout": "NHD"}, "layout"),
    ({"is_causal": True}, "is_causal"),
    ({"topk": 2.0}, r"step 0, layer 0 \(attn1\).*topk"), ({"theta": [0.1] * 3}, "layer 0.*2 heads"),
    ({"steps": 1.5}, "steps is 1.5"), ({"backend": "cuda"}, "layer 0.*cuda")])
def test_wrong_options(options, message):
    block = Block()
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=message):
        with attention(block, **options):
            block()


def test_wrong_models():
    block = Block()
    with pytest.raises(RuntimeError, match="Block was not called"), attention(block):
        pass
    none = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="Linear did not call"), attention(none):
        none(torch.zeros(1, 2))
    with pytest.raises(TypeError, match="model is a str"), attention("flux"):
        pass
    with pytest.raises(ValueError, match="model is compiled"), attention(torch.compile(block)):
        pass
    block.attn1.compile()
    with pytest.raises(ValueError, match="attn1 is compiled"), attention(block):
        pass


def test_register_refuses():
    with pytest.raises(TypeError, match="topk is a function"):
        register(topk=lambda layer, step: 0.5)
    with pytest.raises(TypeError, match="softmax_scale"):
        register(softmax_scale=0.1)


def test_other_versions_of_diffusers(monkeypatch):
    """A registry of another make, and one with a backend of this name."""
    registry = attention_dispatch._AttentionBackendRegistry
    names = attention_dispatch.AttentionBackendName
    register()
    assert names("sparge") is names.SPARGE and repr(names.SPARGE).endswith("'sparge'>")
    monkeypatch.setitem(registry._backends, names("sparge"), lambda query: query)
    with pytest.raises(NotImplementedError, match="of its own"):
        register()
    monkeypatch.delattr(attention_dispatch, "_AttentionBackendRegistry")
    with pytest.raises(NotImplementedError, match=r"diffusers is 0\.\d+"):
        register()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install diffusers"):
        register()


def test_autoencoders_have_attention_too():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).eval()
    z = torch.randn(1, 4, 12, 12)
    with torch.no_grad():
        own = vae.decode(z).sample
        with pytest.raises(RuntimeError, match="not called"), attention(vae):
            vae.decode(z)  # is no call of the model
        with attention(vae.decoder, **DENSE) as calls:
            assert far(vae.decode(z).sample, own) < 1e-4
    assert len(calls) == 1
