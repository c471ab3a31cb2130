# SPDX-License-Identifier: Apache-2.0
"""Pictures of masks and reports: the colour of every cell is read back."""
import sys

import numpy as np
import pytest
import sparge

H, G, N, D = 4, 2, 150, 16
HOW = {"is_causal": "end", "block": (32, 16)}
KEPT, SKIPPED, INVISIBLE = "#33265c", "#f6efe6", "#d9dbe2"


@pytest.fixture(scope="module")
def matplotlib():
    return pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(3)
    return [rng.standard_normal(shape).astype(np.float32)
            for shape in ((H, N, D), (G, N, D), (G, N, 8))]


@pytest.fixture(scope="module")
def mask(qkv):
    return sparge.predict(*qkv[:2], theta=-1, tau=0.5, **HOW)


def cells(ax):
    """[Qb, Kb]: the colours of the picture, by name."""
    from matplotlib.colors import to_hex
    image = ax.images[0].get_array()
    return np.array([[to_hex(cell) for cell in row] for row in image])


def words(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def panels(figure):
    return {ax.get_title(loc="left"): ax for ax in figure.axes if ax.images and ax.get_title(
        loc="left")}


def masses(q, k, head):
    """[Qb, Kb]: the mean attention of query blocks to key blocks, by the formula."""
    s = q[head].astype(np.float64) @ k[head // (H // G)].T.astype(np.float64) * D**-0.5
    p = np.where(np.tri(N, dtype=bool), np.exp(s), 0)
    p /= p.sum(-1, keepdims=True)
    rows = np.add.reduceat(p, range(0, N, 32)) / np.array([32, 32, 32, 32, 22])[:, None]
    return np.add.reduceat(rows, range(0, N, 16), axis=1)


def test_every_cell_of_a_mask(matplotlib, mask):
    figure = sparge.plot(mask, head=2)
    (ax, ) = panels(figure).values()
    want = np.where(mask.blocks[2], KEPT, np.where(mask.visible, SKIPPED, INVISIBLE))
    assert (cells(ax) == want).all() and len(set(want.flat)) == 3
    assert words(ax) == ["kept", "skipped", "not visible"]
    assert ax.get_aspect() == 2
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key block", "query block")
    counts = mask.head_counts[2]
    assert figure.get_suptitle().startswith(
        f"head 2, {counts.qk_done} of {counts.pairs} blocks, density {counts.density:.3f}")
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_blocks_in_part(matplotlib):
    pairs = np.ones((H, N, N), bool)
    pairs[1, 40, 20] = False
    figure = sparge.plot(sparge.BlockMask.from_tokens(pairs, block=(32, 16)), head=1)
    (ax, ) = panels(figure).values()
    assert np.argwhere(cells(ax) != KEPT).tolist() == [[1, 1]] and words(ax) == ["kept", "in part"]


def test_attention_and_what_is_dropped(matplotlib, mask, qkv):
    from matplotlib.colors import to_hex
    from sparge.plotting import _scale
    q, k, _ = qkv
    figure = sparge.plot(mask, head=2, q=q, k=k)
    own = panels(figure)
    assert list(own) == ["attention", "mask", "attention that is dropped"]
    mass, kept = masses(q, k, 2), mask.blocks[2]
    scale = _scale(mass)  # 10^-3 to 1 for 10 blocks
    assert (scale.norm.vmin, scale.norm.vmax) == (1e-3, 1)

    def colours(x):
        return np.where(mask.visible, np.vectorize(lambda m: to_hex(scale.to_rgba(max(m, 1e-300))))(
            x), INVISIBLE)

    assert (cells(own["attention"]) == colours(mass)).all()
    assert (cells(own["attention that is dropped"]) == colours(np.where(kept, 0, mass))).all()
    assert f"about {mass[kept].sum() / mass.sum():.1%} of the attention" in figure.get_suptitle()


def test_layouts_and_batches(matplotlib, mask, qkv):
    """What is given in other ways is the same picture."""
    q, k, _ = qkv
    want = sparge.plot(mask, head=1, q=q, k=k).axes
    nhd = [np.ascontiguousarray(x.swapaxes(0, 1)) for x in (q, k)]
    two = [np.stack([x[::-1], x]) for x in (q, k)]
    both = sparge.predict(*two, theta=-1, tau=0.5, **HOW)
    for figure in (sparge.plot(mask, head=1, q=nhd[0], k=nhd[1], layout="NHD"),
                   sparge.plot(both, batch=1, head=1, q=two[0], k=two[1])):
        assert all((a.images[0].get_array() == b.images[0].get_array()).all()
                   for a, b in zip(figure.axes[:3], want))


def test_report(matplotlib, mask, qkv):
    """A mask that is not the predicted one, and rows that are wrong."""
    other = mask.blocks.copy()
    kept, open_ = np.argwhere(other[0]), np.argwhere(~other[0] & mask.visible)
    other[0][tuple(kept[1])], other[0][tuple(open_[0])] = False, True
    o = sparge.attend(*qkv, other, qk_dtype="f32", pv_dtype="f32", **HOW)
    o[0, 70] += 1
    report = sparge.check(o, *qkv, mask=other, theta=-1, tau=0.5, **HOW)
    own = panels(sparge.plot(report))
    assert list(own) == ["attention (\u25b6: wrong rows of o)", "mask", "attention that is dropped",
                         "beside the predicted mask"]
    found = cells(own["beside the predicted mask"])
    assert np.argwhere(found == "#f0902e").tolist() == [kept[1].tolist()]
    assert np.argwhere(found == "#5aa9e6").tolist() == [open_[0].tolist()]
    assert words(own["beside the predicted mask"]) == ["in both", "missing", "extra", "in neither",
                                                       "not visible"]
    marks = own["attention (\u25b6: wrong rows of o)"].collections[0].get_offsets()
    assert marks[:, 1].tolist() == [2]
    assert (cells(own["mask"]) == np.where(other[0], KEPT, np.where(
        mask.visible, SKIPPED, INVISIBLE))).all()
    dense = sparge.plot(sparge.check(o, *qkv, **HOW), head=1)
    assert len(panels(dense)) == 1


def test_axes_of_the_caller(matplotlib, mask, qkv):
    from matplotlib.figure import Figure
    figure = Figure()
    axes = figure.subplots(1, 2)
    assert sparge.plot(mask, ax=axes[0], q=qkv[0], k=qkv[1]) is figure
    assert len(axes[0].images) == 1 and not axes[1].images and not figure.get_suptitle()
    sparge.plot(mask, ax=axes, panels=["dropped", "attention"], q=qkv[0], k=qkv[1])
    assert axes[0].get_title(loc="left") == "attention that is dropped" and axes[1].images


def test_plans(matplotlib, qkv):
    plan = sparge.plan(*qkv, method="xattention", is_causal="end")
    (ax, ) = panels(sparge.plot(plan, head=1)).values()
    assert ((cells(ax) == KEPT) == plan.mask.blocks[1]).all()


def test_refused(matplotlib, mask, qkv):
    for wrong, words in (({"what": mask.blocks}, "what is a ndarray, it must be a BlockMask"),
                         ({"head": 4}, "head is 4, it must be at least 0 and below 4"),
                         ({"batch": 1}, "batch is 1, it must be at least 0 and below 1"),
                         ({"panels": "maps"}, "panels has 'maps', it must have some of attention"),
                         ({"panels": "dropped"}, "'dropped' needs a mask, and q and k"),
                         ({"panels": "predicted"}, "'predicted' needs the Report of a mask"),
                         ({"q": qkv[0][:, 1:], "k": qkv[1]}, "q and k have 149 and 150 tokens"),
                         ({"q": qkv[0][:2], "k": qkv[1]}, r"the mask is of \[B, H\] = \[1, 4\]"),
                         ({"q": [0.0], "k": qkv[1]}, "q is a list, it must be an array of numpy"),
                         ({"what": sparge.predict(qkv[0][:, :0], qkv[1])}, "what has 0 x 3 blocks"),
                         ({"ax": [None, None]}, "ax has 2 axes, it must have one for each of")):
        with pytest.raises((TypeError, ValueError), match=words):
            sparge.plot(**{"what": mask, **wrong})


def test_without_matplotlib(mask, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"sparge.plot\(\) needs matplotlib.*pip install "):
        sparge.plot(mask)
