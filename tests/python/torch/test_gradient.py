# SPDX-License-Identifier: Apache-2.0
"""Recorder(gradient=True) in a tiny Llama: g beside finite differences and beside autograd."""
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

from sparge._gradient import drawn  # noqa: E402
from sparge.capture import Recorder  # noqa: E402

LAYERS, HEADS, KV_HEADS, DIM, TOKENS, SEED = 3, 4, 2, 16, 40, 5
STEP = 2e-3  # the norms are in float32 whatever the model is: a smaller one finds their rounding


def llama(**config):
    """Weights so large that each head matters."""
    torch.manual_seed(1)
    small = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS,
                 num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM,
                 initializer_range=0.2, attn_implementation="sdpa")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**small, **config})).eval()


def tokens(batch=1):
    draw = torch.Generator().manual_seed(2)
    return torch.randint(0, 64, (batch, TOKENS), generator=draw)


def record(folder, model=None, run=None, **how):
    """The files' tensors by name, and the manifest; run: another call of the model."""
    model = model or llama()
    with Recorder(model, folder, name="llama", **{"gradient": True, "label_seed": SEED, **how}):
        (run or (lambda: model(tokens())))()
    sample = folder / "sample"
    manifest = json.loads((sample / "manifest.json").read_text())
    return {e["file"]: load_file(sample / e["file"]) for e in manifest["files"]}, manifest


def gradients(folder, *args, **how):
    return [x["g"] for x in record(folder, *args, **how)[0].values()]


def labels_of(model, inputs, seed=SEED):
    with torch.no_grad():
        return drawn(model(inputs).logits, seed)[0]


def outputs(model, each):
    """each(layer, o): in place of what a layer's heads give to their projection."""
    return [layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, n=n: each(n, *args))
            for n, layer in enumerate(model.model.layers)]


def surprise(model, inputs, labels):
    return F.cross_entropy(model(inputs).logits.flatten(0, 1).double(), labels.flatten(),
                           reduction="sum")


def by_autograd(model, labels, inputs):
    """g of each layer, by a backward pass through the whole model."""
    kept = {}

    def keep(layer, o):
        kept[layer] = o
        o.retain_grad()

    hooks = outputs(model, keep)
    surprise(model, inputs, labels).backward()
    for hook in hooks:
        hook.remove()
    return [kept[n].grad.unflatten(2, (HEADS, -1)).transpose(1, 2) for n in range(LAYERS)]


def test_finite_differences(tmp_path):
    model = llama().double()
    got, labels = gradients(tmp_path, model), labels_of(model, tokens())
    draw = torch.Generator().manual_seed(3)
    for layer in range(LAYERS):
        for head in range(HEADS):
            way = torch.zeros(1, TOKENS, HEADS, DIM, dtype=torch.float64)
            way[:, :, head] = torch.randn(1, TOKENS, DIM, generator=draw)
            found = []
            for step in STEP, -STEP:
                def move(n, o, step=step, way=way, layer=layer):
                    return (o + step * way.flatten(2),) if n == layer else None

                hooks = outputs(model, move)
                with torch.no_grad():
                    found.append(surprise(model, tokens(), labels).item())
                for hook in hooks:
                    hook.remove()
            slope = (found[0] - found[1]) / (2 * STEP)
            want = (got[layer][0, head].double() * way[0, :, head]).sum().item()
            assert abs(slope - want) <= 1e-3 * got[layer][0, head].norm().item()
            assert abs(want) > 0.01


@pytest.mark.parametrize("dtype, apart", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_autograd(tmp_path, dtype, apart):
    model = llama().to(dtype)
    got, labels = gradients(tmp_path, model), labels_of(model, tokens())
    assert all(g.dtype == torch.float32 for g in got)
    for g, want in zip(got, by_autograd(model, labels, tokens()), strict=True):
        assert g.shape == (1, HEADS, TOKENS, DIM)
        assert (g - want).norm() <= apart * want.norm()


def test_fisher_information(tmp_path):
    """Half the mean of (g . d)^2 over many draws is the KL divergence that d costs."""
    draws, model = 200, llama().double()
    way = torch.zeros(1, TOKENS, HEADS, DIM, dtype=torch.float64)
    way[:, :, 2] = 0.01 * torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(4))
    got = gradients(tmp_path, model, lambda: model(tokens().expand(draws, -1)), layers=[1])
    found = (got[0] * way.transpose(1, 2)).sum((1, 2, 3)).square().mean().item() / 2
    with torch.no_grad():
        before = model(tokens()).logits.log_softmax(-1)
        outputs(model, lambda n, o: (o + way.flatten(2),) if n == 1 else None)
        after = model(tokens()).logits.log_softmax(-1)
    want = (before.exp() * (before - after)).sum().item()
    assert abs(found / want - 1) < 4 * (2 / draws)**0.5


def test_a_batch_and_chosen_heads(tmp_path):
    model = llama()
    want = by_autograd(model, labels_of(model, tokens(2)), tokens(2))
    got = gradients(tmp_path, run=lambda: model(tokens(2)), model=model, layers=[1], batch=[1],
                    heads=[1, 3])
    assert len(got) == 1
    assert (got[0] - want[1][1:, [1, 3]]).abs().max() <= 1e-5 * want[1].abs().max()


def test_labels_are_drawn_from_the_model():
    logits = torch.tensor([2.0, 0, -1, 1]).repeat(4, 5000, 1)
    labels, slope = drawn(logits, SEED)
    p = logits[0, 0].softmax(0)
    share = labels.flatten().bincount(minlength=4) / labels.numel()
    assert (share - p).abs().max() < 4 * (0.25 / labels.numel())**0.5
    assert torch.equal(slope, p - F.one_hot(labels, 4))
    assert not torch.equal(labels[0], labels[1])
    assert torch.equal(drawn(logits, SEED)[0], labels)
    assert not torch.equal(drawn(logits, SEED + 1)[0], labels)


def test_a_seed_is_a_draw(tmp_path):
    model = llama()
    first, again, other = (gradients(tmp_path / name, model, label_seed=seed)
                           for name, seed in (("first", 1), ("again", 1), ("other", 2)))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


def test_the_rest_is_as_without(tmp_path):
    """Files but for g, manifest and model; and layers that run again are not layers again."""
    model = llama()
    with torch.no_grad():
        before = model(tokens()).logits
    plain, _ = record(tmp_path / "plain", model, gradient=False)
    got, manifest = record(tmp_path / "got", model, lambda: [model(tokens()), model(tokens())])
    assert [(e["step"], e["layer"], e["dtype"]) for e in manifest["files"]] == \
        [(step, layer, "float16") for layer in range(LAYERS) for step in range(2)]
    assert manifest["left_out"] == {} and manifest["gradient"]["seed"] == SEED
    assert "drawn from the model" in manifest["gradient"]["loss"]
    for name, tensors in plain.items():
        g = got[name].pop("g")
        assert tensors.keys() == got[name].keys()
        assert all(torch.equal(x, got[name][key]) for key, x in tensors.items())
        assert torch.equal(g, got[name.replace("step000", "step001")]["g"])
    assert all(x.requires_grad and x.grad is None for x in model.parameters())
    with torch.no_grad():
        assert torch.equal(before, model(tokens()).logits)
    assert not any("forward" in vars(module) for module in model.modules())


def test_memory_is_that_of_a_layer(tmp_path):
    """Each layer runs again in the backward pass, the last one first, also one whose forward is its
    own, as accelerate's hooks leave it."""
    model, ran = llama(), []
    own = model.model.layers[1].forward = model.model.layers[1].forward
    for n, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, n=n: ran.append(n))
    record(tmp_path, model)
    assert ran == [0, 1, 2, 2, 1, 0]
    assert [vars(layer).get("forward") for layer in model.model.layers] == [None, own, None]


def test_what_is_there_waits_for_nothing(tmp_path):
    """The same command again; and another seed in the same folder."""
    record(tmp_path)
    before = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*.safetensors")}
    record(tmp_path)
    assert {x: x.stat().st_mtime_ns for x in before} == before
    with pytest.raises(ValueError, match="'gradient'.*another folder"):
        record(tmp_path, label_seed=SEED + 1)


def test_budget(tmp_path):
    """g counts, also of files that wait for it."""
    record(tmp_path / "all")
    one = max(x.stat().st_size for x in tmp_path.rglob("*.safetensors"))
    got, manifest = record(tmp_path / "some", budget=2 * one + 1024)
    assert len(got) == 2 and manifest["left_out"] == {"budget": 1}


def padded(model):
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, :9] = 0
    return model(tokens(2), attention_mask=mask)


def with_cache(model):
    with torch.no_grad():
        past = model(tokens(), use_cache=True).past_key_values
    return lambda model: model(tokens(), past_key_values=past)


@pytest.mark.parametrize("words, run", [
    ("record without padding", padded),
    ("outside of torch.no_grad", torch.no_grad()(lambda model: model(tokens()))),
    ("outside of torch.no_grad", torch.inference_mode()(lambda model: model(tokens()))),
    ("call model.eval", lambda model: model.train()(tokens())),
    ("without a cache", lambda model: model(tokens(), use_cache=True)),
    ("without a cache", lambda model: with_cache(llama())(model)),
    (r"all \[1, 40\] positions, not of \[1, 1\]", lambda model: model(tokens(), logits_to_keep=1)),
    ("without return_dict=False", lambda model: model(tokens(), return_dict=False)),
    ("takes input_ids", lambda model: model(inputs_embeds=torch.ones(1, TOKENS, 64))),
])
def test_refused(tmp_path, words, run):
    model = llama()
    with pytest.raises(ValueError, match=words):
        record(tmp_path, model, lambda: run(model))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert all(x.requires_grad for x in model.parameters())


def test_models_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a language model of transformers"):
        Recorder(torch.nn.Linear(2, 2), tmp_path, name="linear", gradient=True)
    with pytest.raises(RuntimeError, match='give attn_implementation="sdpa"'):
        record(tmp_path, llama(attn_implementation="eager"))
