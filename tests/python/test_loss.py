# SPDX-License-Identifier: Apache-2.0
"""By loss: the numbers of `sparge tune --by loss` on the same inputs, and of whole calls."""
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sparge
from safetensors.numpy import load_file, save_file

CAPTURE = Path(__file__).resolve().parents[2] / "experiments/capture/smollm2-135m"
SUBMASS = {"method": "submass", "is_causal": "end"}


@pytest.fixture(scope="module")
def layers():
    """Two layers, two parts of a text of each: three heads, 512 tokens; the last has a head whose
    error matters."""
    draw, found = np.random.default_rng(1), []
    for name in "layer06_group2", "layer12_group1":
        x = load_file(CAPTURE / f"{name}.safetensors")
        found.append([])
        for at in 0, 1024:
            q, k, v = (np.ascontiguousarray(x[key][:, :, at:at + 512], np.float32) for key in "qkv")
            g = draw.normal(size=q.shape).astype(np.float32) * 0.01
            g[:, 2] *= 10
            found[-1].append((q, k, v, g))
    return found


def test_the_numbers_of_the_program(program, layers, tmp_path):
    for n, layer in enumerate(layers):
        for text, some in enumerate(layer):
            (tmp_path / str(text)).mkdir(exist_ok=True)
            save_file(dict(zip("qkvg", some)), tmp_path / f"{text}/layer{n}.safetensors")
    captures = [tmp_path / f"{text}/layer{n}.safetensors" for n in range(2) for text in range(2)]
    subprocess.run([program, "tune", *captures, "--by", "loss", "--method", "submass", "--density",
                    "0.5", "--causal", "-o", tmp_path / "p.json"], check=True, capture_output=True)
    want = json.loads((tmp_path / "p.json").read_text())
    curves = [sparge.measure_loss(layer, **SUBMASS) for layer in layers]
    for n, curve in enumerate(curves):
        lines = want["curves"][3 * n:3 * n + 3]
        np.testing.assert_allclose(curve.first, np.tile(want["values"], (3, 1)), rtol=1e-8)
        for name in "density", "loss":
            np.testing.assert_allclose(getattr(curve, name), [x[name] for x in lines], rtol=1e-8)
        assert curve.dense_passes == pytest.approx(lines[0]["dense_passes"], rel=1e-3)
    chosen = sparge.choose_by_loss(curves, density=0.5)
    np.testing.assert_allclose(np.concatenate([x.first for x in chosen]),
                               [x["min_mass"] for x in want["heads"]], rtol=1e-6)


def test_what_is_chosen_is_for_a_call(layers):
    """At values that were chosen, density and loss are those of attention() by the definition."""
    curves = [sparge.measure_loss(layer, **SUBMASS) for layer in layers]
    chosen = sparge.choose_by_loss(curves, density=0.6)
    assert np.mean([x.density for x in chosen]) == pytest.approx(0.6)
    for layer, at in zip(layers, chosen):
        worth = sparge.measure_loss(layer, first=at.first[:, None], **SUBMASS)
        loss, density = [], []
        for q, k, v, g in layer:
            o, stats = sparge.attention(q, k, v, is_causal="end", min_mass=at.first, cell=8,
                                        theta=-1, sink=True, return_stats=True)
            want = sparge.attend(q, k, v, None, is_causal="end", qk_dtype="f32", pv_dtype="f32")
            change = (g.astype(np.float64) * (o.astype(np.float64) - want)).sum(-1)
            loss.append((change**2).mean(-1)[0] / 2)
            density.append([c.density for c in stats.head_counts])
        np.testing.assert_allclose(worth.loss[:, 0], np.mean(loss, 0), rtol=1e-9)
        np.testing.assert_allclose(worth.density[:, 0], np.mean(density, 0), rtol=1e-12)
    total = sum(x.loss.sum() for x in chosen)
    again = sparge.choose_by_loss(curves, loss=total)
    np.testing.assert_allclose(again[1].first, chosen[1].first, rtol=1e-6)


def test_spargeattn_by_its_options(layers):
    """Without a method tau is what is chosen; the other thresholds are those of the call."""
    got = sparge.measure_loss(layers[0][:1], first=[0.5, 0.9], is_causal="end", theta=-1)
    q, k, v, _ = layers[0][0]
    for n, tau in enumerate((0.5, 0.9)):
        counts = sparge.predict(q, k, is_causal="end", theta=-1, tau=tau).head_counts
        np.testing.assert_allclose(got.density[:, n], [c.density for c in counts])
    assert got.method == "spargeattn" and (got.density[:, 0] < got.density[:, 1]).any()


def test_refused(layers):
    q, k, v, g = layers[0][0]
    with pytest.raises(TypeError, match=r"inputs\[0\] has 3 arrays, it must be \(q, k, v, g\)"):
        sparge.measure_loss([(q, k, v)], **SUBMASS)
    with pytest.raises(ValueError, match=r"g is .* it must be \[1, 3, 512, 64\] as o"):
        sparge.measure_loss([(q, k, v, g[:, :, :100])], **SUBMASS)
    with pytest.raises(ValueError, match="inputs is empty"):
        sparge.measure_loss([], **SUBMASS)
    with pytest.raises(ValueError, match=r"inputs\[1\] has heads 2, it must be 3"):
        sparge.measure_loss([(q, k, v, g), (q[:, :2], k, v, g[:, :2])], **SUBMASS)
    with pytest.raises(ValueError, match=r"first has the shape \[2, 1\]"):
        sparge.measure_loss([(q, k, v, g)], first=[[1], [2]], **SUBMASS)
    with pytest.raises(ValueError, match="neither density nor state"):
        sparge.measure_loss([(q, k, v, g)], density=0.5, **SUBMASS)
    with pytest.raises(ValueError, match="dense has no parameter"):
        sparge.measure_loss([(q, k, v, g)], method="dense")
    curve = sparge.measure_loss([(q, k, v, g)], first=[1.0, 0.1], **SUBMASS)
    other = sparge.measure_loss([(q, k, v, g)], first=[1.0], **SUBMASS)
    with pytest.raises(ValueError, match="one of both"):
        sparge.choose_by_loss([curve])
    with pytest.raises(ValueError, match="of one method and of as many values"):
        sparge.choose_by_loss([curve, other], density=0.5)
    with pytest.raises(ValueError, match="density 1 cannot be reached"):
        sparge.choose_by_loss([curve], density=1)
